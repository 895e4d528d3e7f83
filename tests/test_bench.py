"""bench/: what it counts, what it compares with, and what it refuses to time."""

import pytest
import torch

from bench import core, eager, gate
from bench.case import Traffic, traffic
from bench.providers import Provider, choose, select
from bench_cases import QUICK, all_cases, case_of, rendered, with_problem
from m3em_fast import ops

X, GATE, LATENT, MAP, WEIGHT = 3 * 8 * 56, 3 * 8, 3 * 4 * 56, 3 * 56, 4 * 16  # elements at SMALL


# ------------------------------------------------------------------------------------------------ what is counted

# Written out by hand from the table in which the ops are defined: what has to be read and written, in elements.
BY_HAND = {
    ("channel_gate", "2 gates"): (X + 2 * GATE + 2 * X, 2 * X + X + 2 * GATE + X + 2 * GATE),
    ("channel_gate", "2 gates, x frozen"): (X + 2 * GATE + 2 * X, 2 * X + X + 2 * GATE),
    ("consensus_map", "3 scales"): (2 * LATENT + MAP, MAP + 2 * LATENT + 2 * LATENT),
    ("consensus_pool", "with cmap"): (X + MAP + GATE, GATE + X + MAP + X + MAP),
    ("consensus_pool", "with cmap, x frozen"): (X + MAP + GATE, GATE + X + MAP),
    # One number a channel, which stands at every position.
    ("consensus_pool", "without cmap"): (X + GATE, GATE + GATE),
    ("consensus_pool", "without cmap, x frozen"): (X + GATE, 0),
    ("gated_projection", "2 gates"): (
        X + 2 * GATE + WEIGHT + LATENT,
        LATENT + 2 * (X + 2 * GATE + WEIGHT),
    ),
    ("gated_projection", "2 gates, x frozen"): (
        X + 2 * GATE + WEIGHT + LATENT,
        LATENT + X + 2 * (2 * GATE + WEIGHT),
    ),
    # The vector that was pooled (as large as a gate) is read for the gradients of the gates.
    ("gated_consensus_pool", "2 gates"): (
        X + 2 * GATE + MAP + 2 * GATE,
        2 * GATE + 2 * (X + 2 * GATE + MAP) + GATE,
    ),
    ("gated_consensus_pool", "2 gates, x frozen"): (
        X + 2 * GATE + MAP + 2 * GATE,
        2 * GATE + X + 2 * (2 * GATE + MAP) - MAP + GATE,
    ),
}


FROZEN = {"": ("without cmap", ""), "; features frozen": ("without cmap, x frozen", ", x frozen")}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
def test_the_bytes_that_have_to_be_moved(dtype):
    found = {(case.op, case.variant): case.setup().traffic for case in all_cases(dtype=dtype)}
    for key, (forward, backward) in BY_HAND.items():
        assert (found[key].forward, found[key].backward) == (forward * dtype.itemsize, backward * dtype.itemsize), key
    # The module is its ops one after another: for two modalities pooling, projection and weighted pooling; one map.
    for features, (pool, tail) in FROZEN.items():
        keys = (
            ("consensus_pool", pool),
            ("gated_projection", f"2 gates{tail}"),
            ("gated_consensus_pool", f"2 gates{tail}"),
        )
        pair = BY_HAND["consensus_map", "3 scales"]
        expected = [2 * sum(BY_HAND[key][i] for key in keys) + pair[i] for i in range(2)]
        moved = found["mutual_enhancement", f"RGB, flow, audio{features}"]
        assert [moved.forward, moved.backward] == [count * dtype.itemsize for count in expected]


# Two bytes for what has the form of x (the gated copies too, which have its dtype), four for everything beside it.
MIXED_BY_HAND = {
    ("channel_gate", "2 gates"): (2 * 3 * X + 4 * 2 * GATE, 2 * 4 * X + 4 * 4 * GATE),
    ("channel_gate", "2 gates, x frozen"): (2 * 3 * X + 4 * 2 * GATE, 2 * 3 * X + 4 * 2 * GATE),
    ("consensus_pool", "with cmap"): (2 * X + 4 * (MAP + GATE), 4 * GATE + 2 * 2 * X + 4 * 2 * MAP),
    ("consensus_pool", "with cmap, x frozen"): (2 * X + 4 * (MAP + GATE), 4 * GATE + 2 * X + 4 * MAP),
    ("gated_projection", "2 gates"): (
        2 * X + 4 * (2 * GATE + WEIGHT + LATENT),
        4 * LATENT + 2 * 2 * X + 4 * 2 * (2 * GATE + WEIGHT),
    ),
    ("gated_projection", "2 gates, x frozen"): (
        2 * X + 4 * (2 * GATE + WEIGHT + LATENT),
        4 * LATENT + 2 * X + 4 * 2 * (2 * GATE + WEIGHT),
    ),
    ("gated_consensus_pool", "2 gates"): (
        2 * X + 4 * (2 * GATE + MAP + 2 * GATE),
        4 * 2 * GATE + 2 * 2 * X + 4 * 2 * (2 * GATE + MAP) + 4 * GATE,
    ),
    ("gated_consensus_pool", "2 gates, x frozen"): (
        2 * X + 4 * (2 * GATE + MAP + 2 * GATE),
        4 * 2 * GATE + 2 * X + 4 * (2 * 2 * GATE + MAP) + 4 * GATE,
    ),
}


def test_the_bytes_of_a_half_x_beside_float32():
    found = {(c.op, c.variant): c.setup().traffic for c in all_cases(dtype=torch.float16, beside=torch.float32)}
    module = {variant: found.pop(("mutual_enhancement", f"RGB, flow, audio{variant}")) for variant in FROZEN}
    assert {key: (moved.forward, moved.backward) for key, moved in found.items()} == MIXED_BY_HAND
    pair = BY_HAND["consensus_map", "3 scales"]  # of latent maps, which have the dtype of the weight
    for variant, (pool, tail) in FROZEN.items():
        pooled = BY_HAND["consensus_pool", pool]  # a half vector of a half map
        ops = [MIXED_BY_HAND[op, f"2 gates{tail}"] for op in ("gated_projection", "gated_consensus_pool")]
        expected = [2 * (2 * pooled[i] + sum(op[i] for op in ops)) + 4 * pair[i] for i in range(2)]
        assert [module[variant].forward, module[variant].backward] == expected


def test_every_case_has_its_bytes_written_out():
    assert {(c.op, c.variant) for c in all_cases() if c.op != "mutual_enhancement"} == set(BY_HAND)


def test_the_operations_of_the_matrix_products():
    product = 2 * 3 * 56 * 8 * 4
    assert case_of("gated_projection", "2 gates").setup().traffic.of("forward")[1] == product
    assert case_of("gated_projection", "2 gates").setup().traffic.of("backward")[1] == 2 * product
    assert case_of("gated_projection", "2 gates, x frozen").setup().traffic.of("forward+backward")[1] == 2 * product
    assert case_of("mutual_enhancement", "RGB, flow, audio").setup().traffic.of("forward")[1] == 2 * product


def test_rows_state_which_inputs_need_gradients():
    for case in all_cases():
        problem = case.setup()
        needing = {name for name, tensor in problem.inputs.items() if tensor.requires_grad}
        assert needing == set(problem.needs)
        if case.op == "mutual_enhancement":
            assert case.needs == ("parameters" if "frozen" in case.variant else "features and parameters")
            assert ("RGB" in needing, "Audio" in needing) == (("frozen" not in case.variant),) * 2
        else:
            assert case.needs == ", ".join(problem.needs)
            assert "frozen" not in case.variant or "x" not in needing


def test_saved_bytes_of_known_functions():
    x, y = torch.randn(10, requires_grad=True), torch.randn(10, requires_grad=True)
    assert core.saved_bytes(lambda: x * y) == 2 * 40
    assert core.saved_bytes(lambda: x * x) == 40  # one storage, saved twice
    assert core.saved_bytes(lambda: x[2:4] * x[5:7]) == 40  # two views of one storage
    assert core.saved_bytes(lambda: x.detach() * y.detach()) == 0
    assert core.saved_bytes(lambda: (x * y, (x * 2).exp())) == 3 * 40
    assert core.saved_bytes(lambda: x + ((x * y) * 0).detach()) == 0  # what an abandoned graph had saved


def test_saved_bytes_see_what_a_function_keeps_beside_the_official_way():
    class Keeps(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            ctx.also = {"list": [torch.ones(3, dtype=torch.float64)]}
            return x * 2

        @staticmethod
        def backward(ctx, grad):
            return grad * 2

    assert core.saved_bytes(lambda: Keeps.apply(torch.randn(10, requires_grad=True)) + 1) == 40 + 24


def test_traffic_adds_up():
    moved = traffic({"x": 10, "g": 1}, 20, ("g",), {"x": ("g",), "g": ("x",)})
    assert moved == Traffic(10 + 1 + 20, 20 + 10 + 1)
    assert moved + Traffic(1, 2, 3, 4) == Traffic(32, 33, 3, 4)
    assert moved.of("forward+backward") == (62, 0)


# ------------------------------------------------------------------------------------------- what is compared with


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("case", all_cases(dtype=torch.float64), ids=lambda case: f"{case.op}-{case.variant}")
def test_the_eager_baseline_is_the_op(case, layout):
    """In float64, where rounding cannot hide a different definition: values and gradients."""
    case = next(
        c for c in all_cases(dtype=torch.float64, layout=layout) if (c.op, c.variant) == (case.op, case.variant)
    )
    problem = case.setup()
    results = []
    for function in (problem.fast, problem.eager):
        with choose("reference"):
            outputs = gate.as_tuple(function(*problem.inputs.values()))
        grads = [torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out) for out in outputs]
        results.append([*outputs, *(torch.autograd.grad(outputs, problem.wanted, grads) if problem.needs else ())])
    for own, other in zip(*results, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-10, atol=1e-12)


def test_the_eager_baseline_takes_another_number_of_scales_and_a_bias():
    a, b = torch.randn(2, 2, 5, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(eager.consensus_map(a, b, 2), ops.consensus_map(a, b, 2))
    x, weight, bias = a, torch.randn(3, 5, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    gates = [torch.rand(2, 5, dtype=torch.float64)]
    torch.testing.assert_close(
        eager.gated_projection(x, gates, weight, bias), ops.gated_projection(x, gates, weight, bias)
    )


def test_a_problem_is_evaluated_in_pieces(monkeypatch):
    """Chunks of the definition are put together: rows joined, gradients of what is shared summed."""
    problem = case_of("gated_projection", "2 gates", dtype=torch.float64).setup()
    whole, grads = gate.exact_results(problem)
    monkeypatch.setattr(gate, "CHUNK", 1)
    pieces, same = gate.exact_results(problem)
    assert all(torch.equal(a, b) for a, b in zip(grads, same, strict=True))
    torch.testing.assert_close(pieces.outputs, whole.outputs)
    torch.testing.assert_close(pieces.gradients, whole.gradients)


# ------------------------------------------------------------------------------------------------ what is refused


def wrong(change, dtype=torch.float32, beside=None):
    """What the gate says of gated_projection with something changed in it."""
    problem = case_of("gated_projection", "2 gates", dtype=dtype, beside=beside).setup()
    right = problem.fast
    problem.exact, problem.fast = right, lambda *tensors: change(right, *tensors)
    exact, grads = gate.exact_results(problem)
    return core.admit(Provider("reference"), problem, grads, exact, 60.0)


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone()
        grad[-1, 0, 0, 0] = 0
        return grad


def unwritten(right, x, *others):
    out = right(x, *others).clone()
    out.data[-1, -1, -1, -1] = float("nan")
    return out


WRONG = {
    "a channel is left out": (
        lambda right, x, *others: right(x * (torch.arange(8) > 0)[:, None, None], *others),
        "result",
    ),
    "an element is not written": (unwritten, "result"),
    "one element is lost in the backward": (
        lambda right, x, *others: right(WrongGradient.apply(x), *others),
        "gradient by x",
    ),
    "the shape is another one": (lambda right, *tensors: right(*tensors)[:, :, :1], "shape"),
    "half precision inside": (lambda right, *tensors: right(*(t.half() for t in tensors)).float(), "result"),
}


@pytest.mark.parametrize("name", WRONG)
def test_the_gate_rejects(name):
    change, said = WRONG[name]
    entrant = wrong(change)
    assert entrant.forward_error is not None and entrant.forward_error.startswith("wrong: ")
    assert said in entrant.forward_error


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_the_gate_rejects_in_half(dtype):
    assert wrong(WRONG["a channel is left out"][0], dtype).forward_error is not None
    assert wrong(lambda right, *tensors: right(*tensors), dtype).forward_error is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_the_gate_rejects_half_on_the_way_to_float32(dtype):
    """Beside a float32 weight the result is float32, and nothing in it has to be rounded to the dtype of x."""
    assert wrong(lambda right, *tensors: right(*tensors), dtype, torch.float32).forward_error is None
    for change in (
        lambda right, x, *others: right(x, *(t.to(dtype).float() for t in others)),
        lambda right, *tensors: right(*tensors).to(dtype).float(),
    ):
        said = wrong(change, dtype, torch.float32).forward_error
        assert said is not None and said.startswith("wrong: the result: ")
    in_half = wrong(lambda right, *tensors: right(*tensors).to(dtype), dtype, torch.float32).forward_error
    assert in_half == f"wrong: the result is {dtype}, wanted torch.float32"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("case", all_cases(beside=torch.float32), ids=lambda case: f"{case.op}-{case.variant}")
def test_a_half_x_beside_float32_is_measured(case, dtype):
    """By everybody, who all give the dtype that the op promises; so that the baseline does the same work."""
    case = case_of(case.op, case.variant, dtype=dtype, beside=torch.float32)
    assert case.dtype_name == f"{str(dtype).removeprefix('torch.')}+float32"
    problem = case.setup()
    first, *others = problem.inputs.values()
    assert first.dtype == dtype
    if case.op == "mutual_enhancement":
        others = [tensor for name, tensor in problem.inputs.items() if "." in name]
    assert others and {tensor.dtype for tensor in others} == {torch.float32}
    assert problem.result_dtype == (dtype if case.op == "channel_gate" else torch.float32)
    # Else every backward that is timed would begin with a conversion.
    assert {grad.dtype for grad in gate.exact_results(problem)[1]} == {problem.result_dtype}
    rows = core.measure(with_problem(case, problem), select((), compiled=False), QUICK)
    assert {(row.provider.name, row.error) for row in rows} == {(p.name, None) for p in select((), compiled=False)}
    assert all(row.times for row in rows)


def test_sums_held_in_half_are_the_privilege_of_the_baselines():
    """They are in the dtype of the inputs what torch makes of it; a kernel has to accumulate in float32."""

    def pool(x):
        total = torch.zeros(x.shape[:2], dtype=x.dtype)
        for i in range(x.shape[2]):
            for j in range(x.shape[3]):
                total = total + x[:, :, i, j]
        return total / (x.shape[2] * x.shape[3])

    problem = case_of("consensus_pool", "without cmap, x frozen", dtype=torch.float16).setup()
    problem.exact, problem.fast, problem.eager = problem.fast, pool, pool
    exact, grads = gate.exact_results(problem)
    errors = [core.admit(Provider(name), problem, grads, exact, 60.0).forward_error for name in ("eager", "reference")]
    assert errors[0] is None and errors[1] is not None and errors[1].startswith("wrong: the result: ")


def test_a_rejected_provider_gets_no_time_and_the_row_says_why():
    case = case_of("channel_gate", "2 gates")
    problem = case.setup()
    problem.eager = lambda x, *gates: torch.cat([x * 1.01 * gate[:, :, None, None] for gate in gates], 1)
    rows = core.measure(with_problem(case, problem), [Provider("eager"), Provider("reference")], QUICK)
    refused, fine = [[row for row in rows if row.provider.name == name] for name in ("eager", "reference")]
    assert [row.mode for row in refused] == list(core.MODES)
    for row in refused:
        assert row.percentiles is None and row.error is not None and row.error.startswith("wrong: ")
    for row in fine:
        assert row.error is None and row.percentiles is not None and row.ratio_to_eager is None
    text = rendered(rows)
    assert "failed" in text and "eager failed: wrong: the result: " in text
