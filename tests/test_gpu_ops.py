"""The other ops on a card against the exact results, and the whole module: streams, graphs, synchronisation, memory.
``make gpu`` runs them; as far as they need no stream, a stand-in on the CPU does too (gpu_cases.py)."""

import pytest
import torch

import m3em_fast
from gpu_cases import BACKENDS, DEVICE, ON_CARD, assert_equal, fits, on_the_card
from m3em_fast.backends import current
from m3em_fast.nn import MutualEnhancement
from m3em_fast.ops import _gated_projection_cuda
from op_cases import DTYPES, FULL_CALLS, HALF, Call, check, lay_out, random_grad, random_tensors

pytestmark = pytest.mark.gpu

CALLS = (
    Call("channel_gate", gates=1),
    Call("channel_gate", gates=2),
    Call("consensus_pool"),
    Call("consensus_pool", cmap=True),
    Call("gated_projection", gates=1),
    Call("gated_projection", gates=2, bias=True),
    Call("gated_consensus_pool", gates=2, cmap=True),
)
FULL = [call for call in FULL_CALLS if call.op != "consensus_map"]
SHAPES = [(3, 40, 7, 7), (2, 512, 7, 7), (2, 200, 7, 8), (2, 64, 14, 14), (1, 5, 28, 20), (1, 9, 1, 9), (2, 7, 1, 1)]
SHAPES += [(0, 3, 7, 7)]
EVERY_LAYOUT = [(shape, "contiguous") for shape in SHAPES] + [(shape, "channels_last") for shape in SHAPES[:4]]
EVERY_LAYOUT += [(SHAPES[0], layout) for layout in ("sliced", "transposed")]
EVERY_CALL = pytest.mark.parametrize("call", CALLS, ids=str)
FULLEST = pytest.mark.parametrize("call", FULL, ids=str)
EVERY_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(autouse=True, params=BACKENDS)
def card(request):
    fits(request, request.param)
    with on_the_card(request.param):
        yield request.param


def draw(call, shape, dtype, layout="contiguous", companion=None, grad_layout=None):
    """Inputs and a gradient of the result, laid out on the card."""
    tensors = [lay_out(t.to(DEVICE), layout) for t in random_tensors(call, *shape, dtype, companion, d=24)]
    with torch.no_grad():
        out = call(*tensors)
    grad = random_grad(torch.empty(out.shape, dtype=out.dtype)).to(DEVICE)
    return tensors, lay_out(grad, grad_layout or layout)


def compute(call, tensors, grad):
    """Result and gradients."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    out = call(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


@EVERY_CALL
@EVERY_DTYPE
@pytest.mark.parametrize(("shape", "layout"), EVERY_LAYOUT, ids=str)
def test_values_and_gradients(call, dtype, shape, layout):
    tensors, grad = draw(call, shape, dtype, layout)
    check(current(), call, tensors, grad=grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(2, 70, 7, 7), (1, 6, 7, 8)], ids=str)
def test_handful(dtype, shape):
    for call in FULL:
        tensors, grad = draw(call, shape, dtype)
        check(current(), call, tensors, grad=grad)


@FULLEST
@pytest.mark.parametrize("half", HALF, ids=str)
def test_half_features_beside_float32(call, half):
    tensors, grad = draw(call, (3, 200, 7, 7), half, companion=torch.float32)
    check(current(), call, tensors, grad=grad)


@FULLEST
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_frozen_features_and_a_gradient_of_one_number(call, dtype):
    tensors, grad = draw(call, (3, 130, 7, 7), dtype, grad_layout="spread")
    check(current(), call, tensors, grad=grad, needs=call.names[1:])
    check(current(), call, tensors, needs=[])


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@EVERY_DTYPE
def test_a_projection_in_parts(monkeypatch, dtype, layout):
    """Two samples at a time, and the last one alone."""
    call = Call("gated_projection", gates=2, bias=True)
    monkeypatch.setattr(_gated_projection_cuda, "WORKSPACE", 2 * 2 * 40 * 49 * dtype.itemsize)
    tensors, grad = draw(call, (5, 40, 7, 7), dtype, layout)
    check(current(), call, tensors, grad=grad)


@EVERY_CALL
@EVERY_DTYPE
def test_bitwise_from_run_to_run(call, dtype):
    tensors, grad = draw(call, (5, 200, 7, 7), dtype)
    wanted = compute(call, tensors, grad)
    for _ in range(3):
        assert_equal(compute(call, tensors, grad), wanted)


# ------------------------------------------------------------------------------------------------------- the module

SPATIAL, VECTOR = {"RGB": 64, "Flow": 48}, {"Audio": 20}
PRECISION = [(torch.float32, None), (torch.float16, torch.float32), (torch.bfloat16, torch.float32)]
EVERY_PRECISION = pytest.mark.parametrize(("dtype", "beside"), PRECISION, ids=str)
FROZEN = pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "features too"])


def make(dtype=torch.float32, beside=None, frozen=False, n=8):
    torch.manual_seed(0)
    module = MutualEnhancement(SPATIAL, VECTOR, latent_channels=32, reduction=2)
    features = {name: torch.randn(n, count, 7, 7) for name, count in SPATIAL.items()}
    features |= {name: torch.randn(n, count) for name, count in VECTOR.items()}
    features = {name: x.to(DEVICE, dtype).requires_grad_(not frozen) for name, x in features.items()}
    return module.to(DEVICE, beside or dtype), features


def step(module, features):
    """Results, and gradients by the parameters and by what else wants one."""
    out = module(features)
    results = [out.consensus, *out.vectors.values()]
    grads = [torch.linspace(-1, 1, t.numel(), device=t.device, dtype=t.dtype).view(t.shape) for t in results]
    leaves = [*module.parameters(), *(x for x in features.values() if x.requires_grad)]
    return [*results, *torch.autograd.grad(results, leaves, grads)]


@EVERY_PRECISION
@FROZEN
def test_the_module_is_its_definition(monkeypatch, dtype, beside, frozen):
    """Within 64 roundings of the largest value, to the dtype of the features, as bench/gate.py has it."""
    monkeypatch.setattr(_gated_projection_cuda, "WORKSPACE", 3 * 2 * 64 * 49 * (beside or dtype).itemsize)
    module, features = make(dtype, beside, frozen)
    found = step(module, features)
    with m3em_fast.backend("reference"):
        wide = {name: x.detach().double().requires_grad_(not frozen) for name, x in features.items()}
        wanted = step(module.double(), wide)
    for got, want in zip(found, wanted, strict=True):
        allowed = 32 * torch.finfo(dtype).eps * want.abs().max().item()
        torch.testing.assert_close(got.double(), want, rtol=0, atol=allowed)


@EVERY_PRECISION
@FROZEN
def test_the_module_is_bitwise_the_same_from_run_to_run(dtype, beside, frozen):
    module, features = make(dtype, beside, frozen)
    wanted = step(module, features)
    for _ in range(3):
        assert_equal(step(module, features), wanted)


@ON_CARD
@EVERY_PRECISION
@FROZEN
def test_a_graph_of_the_module(dtype, beside, frozen):
    """Captured once, forward and backward, and replayed with other numbers."""
    module, features = make(dtype, beside, frozen)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(module, features)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(module, features)
    for shift in (0, 1):
        with torch.no_grad():
            for x in features.values():
                x.copy_(x.roll(shift, 0))
        graph.replay()
        found = [t.detach().clone() for t in captured]
        assert_equal(found, [t.detach() for t in step(module, features)])


@ON_CARD
@EVERY_PRECISION
@FROZEN
def test_the_module_never_waits_for_the_card(dtype, beside, frozen):
    module, features = make(dtype, beside, frozen)
    # All at a time: they leave memory for the next call, for an allocation may wait.
    wanted, *_ = [step(module, features) for _ in range(3)]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(400_000_000)
        found = step(module, features)
        assert not torch.cuda.current_stream().query()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_equal(found, wanted)


@ON_CARD
def test_a_step_under_autocast():
    """Every gradient is finite, in float32 like the parameter, and near that without autocast."""
    module, features = make(frozen=True)
    wanted = step(module, features)
    with torch.autocast("cuda", torch.float16):
        found = step(module, features)
    for got, want in zip(found[-14:], wanted[-14:], strict=True):
        assert got.dtype == torch.float32 and got.isfinite().all()
        torch.testing.assert_close(got, want, rtol=0, atol=32 * 2**-10 * want.abs().max().item())


@ON_CARD
def test_the_memory_of_the_module(monkeypatch):
    """No gated tensor and no copy of the features: either is larger than what is given for all the small tensors."""
    module, features = make(torch.float16, torch.float32, frozen=True, n=256)
    workspace, latent = 4 * 2 * 64 * 49 * 4, 2 * 256 * 32 * 49 * 4
    monkeypatch.setattr(_gated_projection_cuda, "WORKSPACE", workspace)
    step(module, features)  # what the library of the matrix products keeps
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with torch.no_grad():
        module(features)
    assert torch.cuda.max_memory_allocated() - before < latent + workspace + features["RGB"].nbytes
