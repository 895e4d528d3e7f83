"""channel_gate's kernels for cards where the positions of a channel lie one after another, and channels and samples
begin anywhere (gate_lines.cuh), on the CPU (csrc/simt): what gated_projection writes and reads; and that the rows of
its products begin where tensor cores want them."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import exact
import m3em_fast
import simt_cases
from m3em_fast import backends, ops
from m3em_fast.ops import _gated_projection_cuda
from m3em_fast.ops.channel_gate import cuda_backward, cuda_forward
from op_cases import Call, check, random_tensors

ACCUMULATED = {torch.float64: torch.float64, torch.float32: torch.float32, torch.float16: torch.float32}
ACCUMULATED[torch.bfloat16] = torch.float32
# Lines of a part of four lanes' numbers, of two numbers a lane, of more; chunks of fewer lines than a step, of whole
# steps, of both; several chunks, the last one a part of one.
SHAPES = [(3, 70, 7, 7), (2, 5, 1, 1), (1, 33, 1, 3), (2, 9, 14, 14), (1, 4, 3, 40), (1, 300, 3, 3), (2, 40, 5, 13)]


def every_case(test):
    for mark in (
        pytest.mark.parametrize("accumulated", [False, True], ids=["", "accumulated"]),
        pytest.mark.parametrize("gates", [1, 2, 3]),
        pytest.mark.parametrize("shape", SHAPES, ids=str),
        pytest.mark.parametrize("dtype", ACCUMULATED, ids=str),
    ):
        test = mark(test)
    return test


@pytest.fixture(autouse=True)
def driver():
    with simt_cases.simt() as found:
        yield found


def columns(channels, n, h, w, dtype, pad=3):
    """Maps (N,C,H,W) whose positions are the columns of one matrix, and the matrix, full of NaN."""
    count = n * h * w
    matrix = torch.full((channels, count + pad), torch.nan, dtype=dtype)
    return matrix, matrix[:, :count].unflatten(1, (n, h, w)).transpose(0, 1)


def draw(shape, gates, dtype):
    torch.manual_seed(0)
    x = torch.randn(shape).to(dtype)
    return x, [torch.randn(shape[:2]).to(dtype) for _ in range(gates)]


def wider(x):
    """The same numbers, channels and samples further apart."""
    n, c, h, w = x.shape
    room = torch.full((n, c + 1, h * w + 5), torch.nan, dtype=x.dtype)
    view = room[:, :c, : h * w].unflatten(2, (h, w))
    return view.copy_(x)


@every_case
def test_gated_copies(driver, dtype, shape, gates, accumulated):
    """Each is one product, rounded once. Nothing is written between the maps."""
    x, given = draw(shape, gates, dtype)
    n, c, h, w = shape
    wide = ACCUMULATED[dtype]
    for source in (x, wider(x)):
        matrix, out = columns(gates * c, n, h, w, wide if accumulated else dtype)
        cuda_forward(source, given, out)
        wanted = torch.cat([x.to(wide) * gate.to(wide)[:, :, None, None] for gate in given], 1).to(out.dtype)
        assert torch.equal(out, wanted)
        assert matrix[:, n * h * w :].isnan().all()


@every_case
def test_gradients(driver, dtype, shape, gates, accumulated):
    x, given = draw(shape, gates, dtype)
    n, c, h, w = shape
    wide = ACCUMULATED[dtype]
    _, grad = columns(gates * c, n, h, w, wide if accumulated else dtype)
    grad.copy_(torch.randn(grad.shape))
    arriving = grad.double().unflatten(1, (gates, c))
    by_x = torch.stack([arriving[:, g] * gate.double()[:, :, None, None] for g, gate in enumerate(given)])
    by_gates = (arriving * x.double()[:, None]).flatten(3)
    # What is wanted, and how large the numbers are that it is the sum of.
    wanted = [(by_x.sum(0), by_x.abs().sum(0))]
    wanted += zip(by_gates.sum(3).unbind(1), by_gates.abs().sum(3).unbind(1), strict=True)
    for source in (x, wider(x)):
        for needs in ([True] * (1 + gates), [True, *[False] * gates], [False, *[True] * gates]):
            room = [torch.full(t.shape, torch.nan, dtype=dtype) for t in (x, *given)]
            grads = [t if need else None for t, need in zip(room, needs, strict=True)]
            cuda_backward(source, given, grad, grads)
            for found, (value, size) in zip(grads, wanted, strict=True):
                if found is not None:
                    allowed = exact.bound(exact.Exact(value.numpy(), size.numpy()), dtype, wide)
                    exact.assert_close(found, value.numpy(), allowed)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_no_number_stays_in_its_line(driver, value):
    """The last number of a line is read by lanes behind its end too."""
    x, given = draw((2, 10, 7, 7), 2, torch.float16)
    x[1, 3, 6, 6] = value
    _, out = columns(20, 2, 7, 7, torch.float16)
    cuda_forward(x, given, out)
    wrong = torch.zeros(out.shape, dtype=torch.bool)
    wrong[1, [3, 13], 6, 6] = True
    assert torch.equal(~out.isfinite(), wrong)
    grads = [torch.empty_like(t) for t in (x, *given)]
    _, arriving = columns(20, 2, 7, 7, torch.float16)
    cuda_backward(x, given, arriving.copy_(torch.ones(1)), grads)
    assert grads[0].isfinite().all()
    for grad in grads[1:]:
        assert (~grad.isfinite()).nonzero().tolist() == [[1, 3]]


SEEDED = {
    "a barrier is missing before the sums are written": ("    });\n    __syncthreads();\n", "    });\n"),
    "a number behind the end counts twice": ("(on.second ? other : A(0))", "other"),
    "a line is left out": ("c - line < count; c += step", "c - line + step < count; c += step"),
    "lines get each other's sums": ("sum = (high ? up : low)", "sum = (high ? low : up)"),
    "a lane is left out": ("apart < 32; apart *= 2", "apart < 16; apart *= 2"),
    "the first stretch of a line is forgotten": ("on.start ? all + sum : sum", "sum"),
    "the gates of other lines": ("gate[u * on.step], first", "gate[u], first"),
    "the next copy begins elsewhere": ("O *to = begin;", "O *to = begin + g;"),
}


@pytest.mark.parametrize("fault", SEEDED)
def test_a_seeded_fault_is_caught(tmp_path, monkeypatch, fault):
    monkeypatch.setattr(backends, "simulated", None)
    broken = simt_cases.with_fault(tmp_path, "channel_gate", "cuda/gate_lines.cuh", *SEEDED[fault])

    def run():
        call = Call("channel_gate", gates=2)
        for side in (7, 9):  # float64 has no other way
            check("simt", call, random_tensors(call, 2, 70, side, side, torch.float64))
            check(
                "simt",
                call,
                [wider(t) if t.dim() == 4 else t for t in random_tensors(call, 2, 70, side, side, torch.float16)],
            )

    assert simt_cases.orders_that_catch(broken, run)


class Products(TorchDispatchMode):
    """The matrices of every product: shape, bytes from row to row, and where they begin."""

    def __init__(self):
        super().__init__()
        self.matrices = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        aten = torch.ops.aten
        if func.overloadpacket in (aten.mm, aten.addmm, aten.bmm, aten.baddbmm):
            names = [argument.name for argument in func._schema.arguments]
            given = dict(zip(names, args, strict=False)) | (kwargs or {})
            if func.overloadpacket in (aten.addmm, aten.baddbmm):
                del given["self"]  # the bias
            self.matrices += [t for t in given.values() if isinstance(t, torch.Tensor)]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("side", [7, 8, 14])
@pytest.mark.parametrize("n", [3, 19])
def test_rows_of_products_begin_at_multiples_of_16_bytes(monkeypatch, dtype, layout, side, n):
    """Forward and both products of the backward, in parts: 16 samples, then 3."""
    monkeypatch.setattr(_gated_projection_cuda, "WORKSPACE", 18 * 2 * 24 * side**2 * dtype.itemsize)
    tensors = [torch.randn(n, 24, side, side).to(dtype, memory_format=layout), *torch.randn(2, n, 24).to(dtype)]
    tensors += [torch.randn(16, 48).to(dtype), torch.randn(16).to(dtype)]
    for t in tensors:
        t.requires_grad_()
    x, first, second, weight, bias = tensors
    seen = Products()
    kernels = _gated_projection_cuda.kernels(cuda_forward, cuda_backward)
    with seen:
        out, _ = kernels.forward((), [t.detach() for t in tensors], False)
        grads = kernels.backward((), torch.ones_like(out), [t.detach() for t in tensors], (), [True] * 5)
    assert len(seen.matrices) == 3 * 3 * (1 if n == 3 else 2)
    if n == 19:  # as many samples as fill whole rows, not the 18 that there is room for
        assert max(t.numel() for t in seen.matrices) == 16 * 48 * side**2
    for t in seen.matrices:
        rows = [stride * t.element_size() for stride in t.stride()[-2:] if stride != 1]
        assert 1 in t.stride()[-2:] and all(row % 16 == 0 for row in rows), (t.shape, t.stride())
        assert t.data_ptr() % 16 == 0
    with m3em_fast.backend("reference"):
        wanted = ops.gated_projection(x.double(), [first.double(), second.double()], weight.double(), bias.double())
    gradients = torch.autograd.grad(wanted.sum(), tensors)
    for found, expected in zip([out, *grads], [wanted, *gradients], strict=True):
        allowed = 32 * torch.finfo(dtype).eps * expected.double().abs().max().item()
        torch.testing.assert_close(found.double(), expected.double(), rtol=0, atol=allowed)
