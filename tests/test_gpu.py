"""The op tests that need a card: ``consensus_map`` on backend ``cuda`` against the exact results, and what only a card
shows: streams, threads, graphs, synchronisation. ``make gpu`` runs them.

The first half of them runs on a stand-in as well (gpu_cases.py); the other ops and the module are in test_gpu_ops.py.
"""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import exact
import m3em_fast
from gpu_cases import BACKENDS, COMPILED_KERNELS, DEVICE, ON_CARD, assert_equal, fits, on_the_card
from m3em_fast import ops
from m3em_fast.backends import current
from op_cases import DTYPES, HALF, Call, check, lay_out, random_grad, random_tensors

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).resolve().parents[1]
# The special shape with one chunk of channels and with several, other shapes, full tiles and parts of one, more cells
# than threads, maps longer than wide, one position, no clip.
SHAPES = [(3, 40, 7, 7), (2, 512, 7, 7), (2, 200, 7, 8), (2, 64, 14, 14), (1, 5, 28, 20), (2, 33, 5, 3), (1, 9, 1, 9)]
SHAPES += [(2, 7, 1, 1), (0, 3, 7, 7)]
LAYOUTS = ("contiguous", "channels_last", "sliced", "expanded", "transposed")
CALLS = (Call("consensus_map"), Call("consensus_map", options={"center": True}))
EVERY_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)
EVERY_CALL = pytest.mark.parametrize("call", CALLS, ids=str)


@pytest.fixture(autouse=True, params=BACKENDS)
def card(request):
    fits(request, request.param)
    with on_the_card(request.param):
        yield request.param


def draw(call, shape, dtype, layouts=("contiguous", "contiguous"), grad_layout="contiguous"):
    """Both maps and a gradient of the result. Laid out on the card: a copy there would not keep all strides."""
    tensors = [t.to(DEVICE) for t in random_tensors(call, *shape, dtype)]
    grad = random_grad(torch.empty(shape[0], 1, *shape[2:], dtype=dtype)).to(DEVICE)
    return [lay_out(t, layout) for t, layout in zip(tensors, layouts, strict=True)], lay_out(grad, grad_layout)


def compute(tensors, grad, **options):
    """Result and gradients."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    out = ops.consensus_map(*leaves, **options)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


@EVERY_CALL
@EVERY_DTYPE
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_values_and_gradients(call, dtype, shape, layout):
    tensors, grad = draw(call, shape, dtype, [layout] * 2, layout)
    check(current(), call, tensors, grad=grad)


# What compute-sanitizer looks at: every kernel once, and no more than it has time for.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(2, 70, 7, 7), (1, 6, 7, 8)], ids=str)
def test_handful(dtype, shape):
    for call, layout in zip(CALLS, ("contiguous", "channels_last"), strict=True):
        tensors, grad = draw(call, shape, dtype, [layout] * 2)
        check(current(), call, tensors, grad=grad)


@EVERY_DTYPE
def test_layouts_that_differ(dtype):
    call = CALLS[0]
    for layouts in (("contiguous", "channels_last"), ("channels_last", "sliced"), ("expanded", "contiguous")):
        tensors, grad = draw(call, (2, 66, 7, 7), dtype, layouts, "spread")
        check(current(), call, tensors, grad=grad)


@pytest.mark.parametrize("scales", [1, 2, 3, 4, 5])
def test_every_number_of_scales(scales):
    call = Call("consensus_map", options={"num_scales": scales})
    tensors, grad = draw(call, (2, 40, 17, 9), torch.float32)
    check(current(), call, tensors, grad=grad)


@pytest.mark.parametrize("needs", [["a"], ["b"], []])
def test_gradients_that_nobody_wants(needs):
    tensors, grad = draw(CALLS[0], (2, 130, 7, 7), torch.float16)
    check(current(), CALLS[0], tensors, grad=grad, needs=needs)


def test_a_mean_of_a_hundred_deviations():
    (a, b), grad = draw(CALLS[1], (1, 200, 7, 7), torch.float32)
    check(current(), CALLS[1], [a + 100, b - 100], grad=grad)


@pytest.mark.parametrize("value", [0.0, torch.nan, torch.inf])
def test_dead_positions_and_what_is_not_finite(value):
    (a, b), grad = draw(CALLS[0], (1, 40, 7, 7), torch.float32)
    a[0, :, 2, 3] = value
    out, grad_a, grad_b = compute([a, b], grad, num_scales=1)
    if value == 0:
        assert out[0, 0, 2, 3] == 0 and not grad_a[0, :, 2, 3].any() and not grad_b[0, :, 2, 3].any()
    else:
        assert out[0, 0, 2, 3].isnan() and grad_a[0, :, 2, 3].isnan().all()
        assert out.isnan().sum() == 1


@EVERY_CALL
@EVERY_DTYPE
def test_bitwise_from_run_to_run_and_for_a_clip_alone(call, dtype):
    tensors, grad = draw(call, (5, 200, 7, 7), dtype)
    wanted = compute(tensors, grad, **call.options)
    for _ in range(3):
        assert_equal(compute(tensors, grad, **call.options), wanted)
    alone = compute([t[2:3] for t in tensors], grad[2:3], **call.options)
    assert_equal(alone, [t[2:3] for t in wanted])


def test_second_derivatives():
    torch.use_deterministic_algorithms(False)  # torch has no such pooling, and the second derivative is the reference's
    call = Call("consensus_map", options={"num_scales": 2})
    (a, b), _ = draw(call, (1, 4, 3, 3), torch.float64)
    leaves = a.requires_grad_(), b.requires_grad_()
    assert torch.autograd.gradcheck(call, leaves)
    assert torch.autograd.gradgradcheck(call, leaves, nondet_tol=1e-10)


# ------------------------------------------------------------------------------------------- what only a card shows


@ON_CARD
@pytest.mark.parametrize("half", HALF, ids=str)
def test_autocast(half):
    """The result is float32 and has been rounded to nothing else on the way; so is its gradient."""
    call = CALLS[0]
    tensors, grad = draw(call, (2, 130, 7, 7), half)
    grad = grad.float()
    with torch.autocast("cuda", half):
        found = compute(tensors, grad)
    wanted = [call.exact(tensors), *call.exact_gradients(tensors, grad)]
    assert [t.dtype for t in found] == [torch.float32, half, half]
    for got, want in zip(found, wanted, strict=True):
        exact.assert_close(got, want.value, exact.bound(want, got.dtype, torch.float32), str(call))
    with torch.autocast("cuda", half):
        assert compute([t.float() for t in tensors], grad)[0].dtype == torch.float32
        assert compute([t.double() for t in tensors], grad.double())[0].dtype == torch.float64


@ON_CARD
def test_a_side_stream():
    """On the stream of the caller: behind what it still computes there, and not in the way of the default stream."""
    tensors, grad = draw(CALLS[0], (4, 200, 7, 7), torch.float32)
    wanted = compute(tensors, grad)
    late = [torch.full_like(t, torch.nan) for t in tensors]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(400_000_000)
        for to, t in zip(late, tensors, strict=True):
            to.copy_(t)
        found = compute(late, grad)
        assert not side.query()  # still at work: nothing has waited for it
    torch.cuda.current_stream().wait_stream(side)
    assert_equal(found, wanted)


@ON_CARD
def test_another_thread(card):
    """A fresh one has no context of the card."""
    tensors, grad = draw(CALLS[0], (2, 200, 7, 7), torch.float16)
    wanted, found = compute(tensors, grad), []

    def work():
        with m3em_fast.backend(card):
            found.append(compute(tensors, grad))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3
    for each in found:
        assert_equal(each, wanted)


@ON_CARD
def test_a_graph():
    """Captured once, forward and backward, and replayed with other numbers."""
    tensors, grad = draw(CALLS[0], (4, 200, 7, 7), torch.float32)
    leaves = [t.clone().requires_grad_() for t in tensors]
    incoming = grad.clone()

    def step():
        out = ops.consensus_map(*leaves)
        return [out, *torch.autograd.grad(out, leaves, incoming)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for factor in (1.0, -2.0):
        with torch.no_grad():
            for leaf, t in zip(leaves, tensors, strict=True):
                leaf.copy_(t.roll(1, 0) if factor < 0 else t)
            incoming.copy_(grad * factor)
        graph.replay()
        wanted = compute([leaf.detach() for leaf in leaves], incoming)
        assert_equal([t.detach() for t in captured], wanted)


FIRST_CALL = """
import torch, m3em_fast
from m3em_fast import ops
a, b = torch.randn(2, 2, 70, 7, 7, device="cuda")
graph = torch.cuda.CUDAGraph()
with m3em_fast.backend("cuda"), torch.no_grad():
    with torch.cuda.graph(graph):
        captured = ops.consensus_map(a, b)
    graph.replay()
    assert torch.equal(captured, ops.consensus_map(a, b))
print("equal")
"""


@ON_CARD
@COMPILED_KERNELS
def test_a_first_call_inside_a_capture():
    """Kernels are loaded while nothing else is allowed. Triton's must have run before: it compiles at a first call."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", FIRST_CALL], capture_output=True, text=True, env=environment)
    assert done.stdout == "equal\n", done.stderr[-3000:]


@ON_CARD
def test_no_call_waits_for_the_card():
    tensors, grad = draw(CALLS[0], (4, 200, 7, 7), torch.float32)
    compute(tensors, grad)  # leaves memory for the next call, for an allocation may wait
    wanted = compute(tensors, grad)
    compute(tensors, grad)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(400_000_000)
        found = compute(tensors, grad)
        # Torch's mode sees torch's own calls alone; that the card is still asleep says it of ours.
        assert not torch.cuda.current_stream().query()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_equal(found, wanted)


@ON_CARD
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one card")
def test_a_card_that_is_not_the_current_one():
    tensors, grad = draw(CALLS[0], (2, 200, 7, 7), torch.float32)
    found = compute([t.to("cuda:1") for t in tensors], grad.to("cuda:1"))
    assert torch.cuda.current_device() == 0 and {t.get_device() for t in found} == {1}
    assert_equal([t.to("cuda:0") for t in found], compute(tensors, grad))


@ON_CARD
def test_a_compiled_program():
    """One node of the graph, with the same bits."""
    tensors, grad = draw(CALLS[0], (2, 200, 7, 7), torch.float32)
    wanted = compute(tensors, grad)
    torch.compiler.reset()
    leaves = [t.clone().requires_grad_() for t in tensors]
    out = torch.compile(ops.consensus_map, fullgraph=True)(*leaves)
    assert_equal([out.detach(), *torch.autograd.grad(out, leaves, grad)], wanted)


@ON_CARD
@COMPILED_KERNELS
def test_auto_takes_these_kernels():
    tensors, _ = draw(CALLS[0], (1, 8, 7, 7), torch.float32)
    with m3em_fast.backend("auto"):
        assert m3em_fast.explain("consensus_map", *tensors).startswith("consensus_map is served by cuda")
