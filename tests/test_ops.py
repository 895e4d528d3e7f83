"""Values and gradients of every op against `exact`, for every dtype, shape and memory layout."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import exact
from m3em_fast import ops
from op_cases import CALLS, CHANNELS, DTYPES, FULL_CALLS, HALF, LAYOUTS, SHAPES, Call, check, random_tensors

EVERY_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)
EVERY_CALL = pytest.mark.parametrize("call", CALLS, ids=str)
FULL_CALL = pytest.mark.parametrize("call", FULL_CALLS, ids=str)


def named(call, dtypes, default):
    """The dtype of each tensor of a call."""
    return [dtypes.get(name.rstrip("012"), default) for name in call.names]


@EVERY_CALL
@EVERY_DTYPE
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "{}x{}".format(*shape))
@pytest.mark.parametrize("channels", CHANNELS)
def test_values_and_gradients(backend, call, dtype, shape, channels):
    check(backend, call, random_tensors(call, 2, channels, *shape, dtype))


@FULL_CALL
@EVERY_DTYPE
@pytest.mark.parametrize("layout", LAYOUTS[1:])
@pytest.mark.parametrize("shape", [(7, 8), (5, 3)], ids=lambda shape: "{}x{}".format(*shape))
def test_layouts(backend, call, dtype, layout, shape):
    tensors = random_tensors(call, 3, 4, *shape, dtype, layouts=[layout] * len(call.names))
    check(backend, call, tensors)


@pytest.mark.op("consensus_map")
@EVERY_DTYPE
@pytest.mark.parametrize("first", LAYOUTS)
@pytest.mark.parametrize("second", LAYOUTS)
def test_consensus_map_of_two_layouts(backend, dtype, first, second):
    call = Call("consensus_map", options={"num_scales": 3})
    check(backend, call, random_tensors(call, 2, 3, 7, 4, dtype, layouts=[first, second]))


@FULL_CALL
@EVERY_DTYPE
@pytest.mark.parametrize("layout", LAYOUTS[1:])
@pytest.mark.parametrize("x_layout", ["contiguous", "channels_last"])
def test_layouts_of_the_incoming_gradient(backend, call, dtype, layout, x_layout):
    tensors = random_tensors(call, 3, 4, 5, 6, dtype, layouts=[x_layout] * len(call.names))
    check(backend, call, tensors, grad_layout=layout)


@EVERY_CALL
@EVERY_DTYPE
def test_gradient_of_the_sum(backend, call, dtype):
    """`.sum()` sends a single number that is expanded with strides of 0."""
    tensors = random_tensors(call, 2, 3, 7, 5, dtype)
    ones = torch.ones((), dtype=dtype).expand(call.exact(tensors).value.shape)
    _, gradients = check(backend, call, tensors, grad=ones)
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    call(*leaves).sum().backward()
    for leaf, gradient in zip(leaves, gradients, strict=True):
        assert torch.equal(leaf.grad, gradient)


# A half x beside gates, map or weight in float32: features from the store, parameters as they are.
MIXTURES = [
    (Call("channel_gate", gates=2), {"gate": torch.float32}),
    (Call("consensus_pool", cmap=True), {"cmap": torch.float32}),
    (Call("gated_projection", gates=2, bias=True), {"gate": torch.float32}),
    (Call("gated_projection", gates=2, bias=True), {"weight": torch.float32, "bias": torch.float32}),
    (Call("gated_projection", gates=2), {"gate": torch.float32, "weight": torch.float32}),
    (Call("gated_consensus_pool", gates=2), {"gate": torch.float32}),
    (Call("gated_consensus_pool", gates=2, cmap=True), {"gate": torch.float32}),
    (Call("gated_consensus_pool", gates=2, cmap=True), {"cmap": torch.float32}),
    (Call("gated_consensus_pool", gates=2, cmap=True), {"gate": torch.float32, "cmap": torch.float32}),
]


@pytest.mark.parametrize(("call", "wide"), MIXTURES, ids=[f"{call}-{'+'.join(wide)}" for call, wide in MIXTURES])
@pytest.mark.parametrize("half", HALF, ids=str)
@pytest.mark.parametrize("channels", [3, 64])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
def test_half_maps_beside_float32(backend, call, wide, half, channels, layout):
    layouts = [layout] * len(call.names)
    # Drawn in float64, so that the float32 inputs have digits that half does not hold.
    tensors = random_tensors(call, 2, channels, 7, 8, torch.float64, layouts=layouts)
    tensors = [tensor.to(dtype) for tensor, dtype in zip(tensors, named(call, wide, half), strict=True)]
    check(backend, call, tensors)


def test_half_maps_beside_one_float32_gate(backend):
    """Gates of one call need not have one dtype."""
    call = Call("channel_gate", gates=2)
    x, first, second = random_tensors(call, 2, 3, 5, 4, torch.float16)
    check(backend, call, [x, first.float(), second])
    call = Call("gated_consensus_pool", gates=2)
    check(backend, call, [x, first, second.float()])


def test_result_dtypes(backend):
    """Written out once more by hand, beside the rule in `Call.result_dtype`."""
    half, single = torch.float16, torch.float32
    x, gate, cmap = torch.ones(2, 3, 4, 5, dtype=half), torch.ones(2, 3), torch.ones(2, 1, 4, 5)
    weight, bias = torch.ones(6, 3), torch.ones(6)
    assert ops.channel_gate(x, gate).dtype == half
    assert ops.consensus_map(x, x).dtype == half
    assert ops.consensus_pool(x).dtype == half
    assert ops.consensus_pool(x, cmap.half()).dtype == half
    assert ops.consensus_pool(x, cmap).dtype == single
    assert ops.gated_projection(x, [gate], weight, bias).dtype == single
    assert ops.gated_projection(x, [gate.half()], weight).dtype == single
    assert ops.gated_projection(x, [gate], weight.half(), bias.half()).dtype == half
    assert ops.gated_consensus_pool(x, [gate.half()]).dtype == half
    assert ops.gated_consensus_pool(x, [gate]).dtype == single
    assert ops.gated_consensus_pool(x, [gate.half()], cmap).dtype == single


@pytest.mark.op("consensus_map")
@pytest.mark.parametrize("shape", [(7, 7), (14, 14), (7, 8), (1, 9), (8, 1), (2, 1), (17, 31)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("center", [False, True])
def test_every_number_of_scales(backend, shape, dtype, center):
    limit = 1 + math.floor(math.log2(max(shape)))
    assert limit == exact.scale_limit(*shape)
    for scales in range(1, limit + 1):
        call = Call("consensus_map", options={"num_scales": scales, "center": center})
        tensors = random_tensors(call, 1, 5, *shape, dtype)
        out, _ = check(backend, call, tensors)
        default = ops.consensus_map(*tensors, center=center)
        assert torch.equal(out, default) == (scales == min(3, limit))


@pytest.mark.parametrize("call", CALLS, ids=str)
@EVERY_DTYPE
def test_no_clips(backend, call, dtype):
    tensors = random_tensors(call, 0, 3, 7, 5, dtype)
    out, gradients = check(backend, call, tensors)
    assert out.shape[0] == 0
    for name, gradient in zip(call.names, gradients, strict=True):
        assert name in ("weight", "bias") or gradient.numel() == 0
        assert not gradient.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_memory_format_follows_the_first_tensor(backend, dtype, layout):
    wanted = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    other = "contiguous" if layout == "channels_last" else "channels_last"
    for call in FULL_CALLS:
        layouts = [layout] + [other] * (len(call.names) - 1)
        out = call(*random_tensors(call, 2, 3, 5, 4, dtype, layouts=layouts))
        assert out.dim() != 4 or out.is_contiguous(memory_format=wanted), call


# Random calls. Everything is drawn: the call, sizes down to nothing, dtypes, layouts, and who needs a gradient.


@st.composite
def random_calls(draw, op):
    options = {}
    shape = draw(st.integers(0, 3)), draw(st.integers(1, 9)), draw(st.integers(1, 12)), draw(st.integers(1, 12))
    if op == "consensus_map":
        options["num_scales"] = draw(st.none() | st.integers(1, exact.scale_limit(*shape[2:])))
        options["center"] = draw(st.booleans())
        options["eps"] = draw(st.sampled_from([1e-8, 0.5]))
    call = Call(
        op,
        gates=draw(st.integers(1, 3)) if op in ("channel_gate", "gated_projection", "gated_consensus_pool") else 0,
        cmap="pool" in op and draw(st.booleans()),
        bias=op == "gated_projection" and draw(st.booleans()),
        positive=draw(st.booleans()),
        options=options,
    )
    names = call.names
    return {
        "call": call,
        "shape": shape,
        "latent": draw(st.integers(1, 9)),
        "dtype": draw(st.sampled_from(DTYPES)),
        "wide": draw(st.booleans()),
        "layouts": draw(st.lists(st.sampled_from(LAYOUTS), min_size=len(names), max_size=len(names))),
        "grad_layout": draw(st.sampled_from(LAYOUTS)),
        "needs": draw(st.sets(st.sampled_from(names))),
        "seed": draw(st.integers(0, 2**32 - 1)),
    }


@pytest.mark.parametrize("op", sorted({call.op for call in CALLS}))
@given(data=st.data())
def test_random_calls(backend, op, data):
    drawn = data.draw(random_calls(op))
    call, dtype = drawn["call"], drawn["dtype"]
    companion = torch.float32 if drawn["wide"] and dtype in HALF else dtype
    tensors = random_tensors(
        call, *drawn["shape"], dtype, companion, drawn["layouts"], key=(drawn["seed"],), d=drawn["latent"]
    )
    check(backend, call, tensors, drawn["grad_layout"], drawn["needs"])
