"""Every argument of every op, wrong in every way: an error that names the argument, what it got and what it wants."""

import re

import pytest
import torch

from m3em_fast import ops

N, C, H, W, D = 2, 3, 7, 5, 4


def x(*shape, dtype=torch.float32, device="cpu"):
    return torch.ones(*(shape or (N, C, H, W)), dtype=dtype, device=device)


def gate(*shape, **options):
    return x(*(shape or (N, C)), **options)


def cmap(*shape, **options):
    return x(*(shape or (N, 1, H, W)), **options)


def weight(*shape, **options):
    return x(*(shape or (D, 2 * C)), **options)


def bias(*shape, **options):
    return x(*(shape or (D,)), **options)


# How to call each op with one argument replaced. `gates` stands for the second of two gates.
def channel_gate(name, value):
    return ops.channel_gate(value, gate(), gate()) if name == "x" else ops.channel_gate(x(), gate(), value)


def consensus_map(name, value):
    maps = {"a": x(), "b": x()}
    maps[name] = value
    return ops.consensus_map(**maps)


def consensus_pool(name, value):
    return ops.consensus_pool(**({"x": x(), "cmap": cmap()} | {name: value}))


def gated_projection(name, value):
    arguments = {"x": x(), "gates": [gate(), gate()], "weight": weight(), "bias": bias()}
    arguments[name] = [gate(), value] if name == "gates" else value
    return ops.gated_projection(**arguments)


def gated_consensus_pool(name, value):
    arguments = {"x": x(), "gates": [gate(), gate()], "cmap": cmap()}
    arguments[name] = [gate(), value] if name == "gates" else value
    return ops.gated_consensus_pool(**arguments)


ARGUMENTS = {
    channel_gate: ["x", "gates"],
    consensus_map: ["a", "b"],
    consensus_pool: ["x", "cmap"],
    gated_projection: ["x", "gates", "weight", "bias"],
    gated_consensus_pool: ["x", "gates", "cmap"],
}
EVERY_ARGUMENT = pytest.mark.parametrize(
    ("op", "name"),
    [(op, name) for op, names in ARGUMENTS.items() for name in names],
    ids=[f"{op.__name__}-{name}" for op, names in ARGUMENTS.items() for name in names],
)
RIGHT = {"x": x, "a": x, "b": x, "gates": gate, "cmap": cmap, "weight": weight, "bias": bias}
# How a message writes the shape that it wants, and the shape that fits the other arguments here.
FORM = {
    "x": "(N,C,H,W)",
    "a": "(N,D,H,W)",
    "b": "(N,D,H,W)",
    "gates": "(N,C)",
    "cmap": "(N,1,H,W)",
    "weight": "(D, G*C)",
    "bias": "(D,)",
}
FITTING = {
    "b": "(2, 3, 7, 5)",
    "gates": "(2, 3)",
    "cmap": "(2, 1, 7, 5)",
    "weight": "= 6",
    "bias": "(4,)",
}


def shape_of(tensor):
    return str(tuple(tensor.shape))


def assert_says(error, op, name, got, wants):
    """The message begins with the op and the argument, and holds what it got and what it wants."""
    message = str(error.value)
    before, _, after = message.rpartition(", got ")
    assert before.startswith(f"{op.__name__}: {'gates[1]' if name == 'gates' else name} must "), message
    assert wants in before, message
    assert got in after, message


def test_the_right_arguments_are_taken():
    """Otherwise every error below could be one about something else."""
    for op, names in ARGUMENTS.items():
        for name in names:
            assert op(name, RIGHT[name]()).dtype == torch.float32


@EVERY_ARGUMENT
@pytest.mark.parametrize("value", ["text", 3, [1.0, 2.0]], ids=str)
def test_no_tensor(op, name, value):
    with pytest.raises(TypeError) as error:
        op(name, value)
    assert_says(error, op, name, type(value).__name__, "must be a tensor " + FORM[name])


@EVERY_ARGUMENT
def test_none(op, name):
    if name in ("cmap", "bias"):
        assert op(name, None).dtype == torch.float32
        return
    with pytest.raises(TypeError) as error:
        op(name, None)
    assert_says(error, op, name, "NoneType", "must be a tensor " + FORM[name])


@EVERY_ARGUMENT
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn], ids=str)
def test_no_floating_point_tensor(op, name, dtype):
    with pytest.raises(TypeError) as error:
        op(name, RIGHT[name]().to(dtype))
    assert_says(error, op, name, str(dtype).removeprefix("torch."), "float64, float32, float16 or bfloat16")


@EVERY_ARGUMENT
def test_no_dense_tensor(op, name):
    with pytest.raises(TypeError) as error:
        op(name, RIGHT[name]().to_sparse())
    assert_says(error, op, name, "sparse", "dense")


@EVERY_ARGUMENT
@pytest.mark.parametrize("change", ["one dimension more", "one dimension less", "none"])
def test_wrong_number_of_dimensions(op, name, change):
    right = RIGHT[name]()
    wrong = {"one dimension more": right[None], "one dimension less": right[0], "none": right.sum()}[change]
    with pytest.raises(ValueError) as error:
        op(name, wrong)
    assert_says(error, op, name, shape_of(wrong), f"{right.dim()} dimensions {FORM[name]}")


@pytest.mark.parametrize("op", ARGUMENTS, ids=lambda op: op.__name__)
@pytest.mark.parametrize("shape", [(2, 3, 0, 5), (2, 3, 5, 0)], ids=str)
def test_maps_without_positions(op, shape):
    name = ARGUMENTS[op][0]
    with pytest.raises(ValueError) as error:
        op(name, x(*shape))
    message = str(error.value)
    assert re.match(rf"{op.__name__}: {name} ", message), message
    assert shape_of(x(*shape)) in message, message
    assert "empty in its first dimension only" in message, message


WRONG_SHAPES = {
    # Each size off by one or taken for 1, which must not broadcast; and the transposed shape.
    "b": [(3, 3, 7, 5), (1, 3, 7, 5), (2, 1, 7, 5), (2, 3, 7, 4), (2, 3, 1, 5), (2, 3, 5, 7)],
    "gates": [(3, 3), (1, 3), (2, 1), (2, 4), (3, 2)],
    "cmap": [(3, 1, 7, 5), (1, 1, 7, 5), (2, 3, 7, 5), (2, 1, 5, 7), (2, 1, 1, 1), (2, 1, 7, 1)],
    "weight": [(4, 3), (4, 5), (4, 7), (4, 9), (6, 4), (4, 1)],
    "bias": [(3,), (1,), (5,), (6,)],
}
SHAPES = [(op, name, s) for op, names in ARGUMENTS.items() for name in names for s in WRONG_SHAPES.get(name, [])]


@pytest.mark.parametrize(("op", "name", "shape"), SHAPES, ids=[f"{op.__name__}-{name}-{s}" for op, name, s in SHAPES])
def test_wrong_shapes(op, name, shape):
    with pytest.raises(ValueError) as error:
        op(name, x(*shape))
    assert_says(error, op, name, shape_of(x(*shape)), FITTING[name])


def test_the_first_gate_is_checked_too():
    for call in (
        lambda: ops.channel_gate(x(), gate(2, 4), gate()),
        lambda: ops.gated_projection(x(), [gate(2, 4), gate()], weight()),
        lambda: ops.gated_consensus_pool(x(), [gate(2, 4), gate()]),
    ):
        with pytest.raises(ValueError, match=r"gates\[0\] must be \(N,C\) = \(2, 3\).*got \(2, 4\)"):
            call()


# Beside the first tensor in this dtype, the others may have these.
TAKEN = {
    torch.float64: {torch.float64},
    torch.float32: {torch.float32},
    torch.float16: {torch.float16, torch.float32},
    torch.bfloat16: {torch.bfloat16, torch.float32},
}
MIXED = [(one, other) for one in TAKEN for other in TAKEN if one != other]


@pytest.mark.parametrize(("dtype", "other"), MIXED, ids=[f"{one}-{other}" for one, other in MIXED])
@pytest.mark.parametrize("name", ["gates", "cmap", "weight"])
def test_mixtures_of_dtypes(name, dtype, other):
    """float32 beside a half x, and nothing else."""
    second = RIGHT[name](dtype=other)
    calls = {
        "gates": [
            (channel_gate, lambda: ops.channel_gate(x(dtype=dtype), gate(dtype=dtype), second)),
            (
                gated_projection,
                lambda: ops.gated_projection(x(dtype=dtype), [gate(dtype=dtype), second], weight(dtype=dtype)),
            ),
            (gated_consensus_pool, lambda: ops.gated_consensus_pool(x(dtype=dtype), [gate(dtype=dtype), second])),
        ],
        "cmap": [
            (consensus_pool, lambda: ops.consensus_pool(x(dtype=dtype), second)),
            (gated_consensus_pool, lambda: ops.gated_consensus_pool(x(dtype=dtype), [gate(dtype=dtype)], second)),
        ],
        "weight": [
            (gated_projection, lambda: ops.gated_projection(x(dtype=dtype), [gate(dtype=dtype)] * 2, second)),
        ],
    }
    for op, call in calls[name]:
        if other in TAKEN[dtype]:
            call()
            continue
        with pytest.raises(TypeError) as error:
            call()
        assert_says(error, op, name, str(other).removeprefix("torch."), str(dtype).removeprefix("torch."))


@pytest.mark.parametrize(("dtype", "other"), MIXED, ids=[f"{one}-{other}" for one, other in MIXED])
def test_what_must_be_of_one_dtype(dtype, other):
    """a and b, and weight and bias."""
    got, wants = str(other).removeprefix("torch."), str(dtype).removeprefix("torch.")
    with pytest.raises(TypeError) as error:
        ops.consensus_map(x(dtype=dtype), x(dtype=other))
    assert_says(error, consensus_map, "b", got, f"dtype of a ({wants})")
    with pytest.raises(TypeError) as error:
        gates = [gate(dtype=dtype)] * 2
        ops.gated_projection(x(dtype=dtype), gates, weight(dtype=dtype), bias(dtype=other))
    assert_says(error, gated_projection, "bias", got, f"dtype of weight ({wants})")


@EVERY_ARGUMENT
def test_devices_that_differ(op, name):
    """The first argument on another device than the second is the second one's fault."""
    wrong = RIGHT[name](device="meta")
    first = name == ARGUMENTS[op][0]
    with pytest.raises(ValueError) as error:
        op(name, wrong)
    if first:
        message = str(error.value)
        assert f"device of {name} (meta)" in message and message.endswith("got cpu"), message
    else:
        owner = "weight" if name == "bias" else ARGUMENTS[op][0]
        assert_says(error, op, name, "meta", f"device of {owner} (cpu)")


@pytest.mark.parametrize("empty", [[], ()], ids=str)
def test_no_gates(empty):
    with pytest.raises(ValueError, match=r"channel_gate: gates must hold at least one tensor \(N,C\), got none"):
        ops.channel_gate(x())
    with pytest.raises(ValueError, match=r"gated_projection: gates must hold at least one tensor \(N,C\), got none"):
        ops.gated_projection(x(), empty, weight())
    with pytest.raises(ValueError, match=r"gated_consensus_pool: gates must hold at least one .*\(N,C\), got none"):
        ops.gated_consensus_pool(x(), empty)


@pytest.mark.parametrize(
    "value", [gate(), None, 3, {"gate": gate()}, iter([gate()])], ids=lambda value: type(value).__name__
)
def test_gates_that_are_no_sequence(value):
    """One tensor in place of a list of one is the likely slip; iterating over it would give N gates."""
    wants = rf"gates must be a sequence of tensors \(N,C\), got {type(value).__name__}"
    with pytest.raises(TypeError, match="gated_projection: " + wants):
        ops.gated_projection(x(), value, weight())
    with pytest.raises(TypeError, match="gated_consensus_pool: " + wants):
        ops.gated_consensus_pool(x(), value)


def test_gates_may_be_any_sequence():
    for kind in (list, tuple):
        assert ops.gated_projection(x(), kind([gate(), gate()]), weight()).shape == (N, D, H, W)
        assert ops.gated_consensus_pool(x(), kind([gate(), gate()])).shape == (N, 2 * C)


@pytest.mark.parametrize(
    ("shape", "limit"), [((1, 1), 1), ((2, 2), 2), ((7, 7), 3), ((8, 1), 4), ((1, 9), 4), ((14, 14), 4)], ids=str
)
def test_the_number_of_scales(shape, limit):
    a = x(2, 3, *shape)
    for scales in range(1, limit + 1):
        assert ops.consensus_map(a, a, scales).shape == (2, 1, *shape)
    for scales in (limit + 1, 100, 0, -1):
        with pytest.raises(ValueError, match=rf"consensus_map: num_scales must be from 1 to {limit} .*, got {scales}$"):
            ops.consensus_map(a, a, scales)


@pytest.mark.parametrize("value", [True, False, 2.0, "2", [2], torch.tensor(2.0)], ids=repr)
def test_a_number_of_scales_that_is_no_integer(value):
    with pytest.raises(TypeError, match=r"consensus_map: num_scales must be an integer or None, got ") as error:
        ops.consensus_map(x(), x(), value)
    assert str(error.value).endswith(repr(value))


@pytest.mark.parametrize("value", [0, 0.0, -1e-8, -1, float("nan")], ids=repr)
def test_eps_that_is_not_positive(value):
    with pytest.raises(ValueError, match=r"consensus_map: eps must be a positive, finite number, got ") as error:
        ops.consensus_map(x(), x(), eps=value)
    assert str(error.value).endswith(repr(value))


@pytest.mark.parametrize("value", ["1e-8", None, True, [1e-8], 1j], ids=repr)
def test_eps_that_is_no_number(value):
    with pytest.raises(TypeError, match=r"consensus_map: eps must be a positive number, got ") as error:
        ops.consensus_map(x(), x(), eps=value)
    assert str(error.value).endswith(repr(value))


@pytest.mark.parametrize("value", [1, 0, None, "yes"], ids=repr)
def test_center_that_is_no_bool(value):
    with pytest.raises(TypeError, match=r"consensus_map: center must be True or False, got ") as error:
        ops.consensus_map(x(), x(), center=value)
    assert str(error.value).endswith(repr(value))


def test_options_have_names():
    """A number in third place is num_scales; center and eps cannot be passed by position."""
    with pytest.raises(TypeError, match="positional"):
        ops.consensus_map(x(), x(), 2, True)


def test_messages_under_autocast():
    """Arguments are cast before they are checked against each other; what is wrong with them must still be said."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with pytest.raises(ValueError, match=r"gated_projection: weight must be .*= 6 .*, got \(4, 5\)"):
            ops.gated_projection(x(), [gate(), gate()], weight(4, 5))
        with pytest.raises(TypeError, match=r"gated_projection: weight must be .*float16 or bfloat16, got int64"):
            ops.gated_projection(x(), [gate(), gate()], weight(dtype=torch.int64))
        with pytest.raises(TypeError, match=r"gated_projection: gates\[0\] must be a tensor \(N,C\), got int"):
            ops.gated_projection(x(), [1, gate()], weight())
