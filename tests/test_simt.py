"""The CUDA kernels on the CPU, through the Python and the launcher of a card (csrc/simt), against the exact results;
and that this net has no holes. The general op tests run on the backend `simt` as well."""

import pytest
import torch

import exact
import m3em_fast
import simt_cases
from m3em_fast import backends
from m3em_fast.backends import BackendError, native
from m3em_fast.ops._cpu import DTYPES as NUMBERS
from op_cases import DTYPES, HALF, Call, check, lay_out, random_grad, random_tensors
from simt_cases import ORDERS, form_of_consensus_map, forms_of_consensus_map, launched

# One chunk and several, full tiles and parts of one, more cells than threads, maps longer than wide.
SHAPES = [(2, 64, 7, 7), (1, 200, 7, 7), (2, 5, 14, 14), (2, 3, 5, 3), (1, 33, 1, 1), (2, 8, 1, 9), (1, 130, 7, 8)]
SHAPES += [(1, 16, 28, 20), (0, 3, 7, 7)]
STAGES = ("partial", "finish", "backward")
KINDS = {torch.float64: "f64", torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
EVERY_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)
CENTER = pytest.mark.parametrize("center", [False, True], ids=["cosine", "pearson"])


@pytest.fixture(autouse=True)
def driver():
    with simt_cases.simt() as found:
        yield found


EVERY_LAYOUT = [(shape, layout) for shape in SHAPES for layout in ("contiguous", "channels_last")]
EVERY_LAYOUT += [(shape, layout) for shape in SHAPES[:3] for layout in ("sliced", "expanded")]


@EVERY_DTYPE
@pytest.mark.parametrize(("shape", "layout"), EVERY_LAYOUT, ids=str)
@CENTER
def test_consensus_map(driver, dtype, shape, layout, center):
    call = Call("consensus_map", options={"center": center})
    driver.log()
    tensors = random_tensors(call, *shape, dtype, layouts=[layout] * 2)
    _, gradients = check("simt", call, tensors)
    forward = form_of_consensus_map(call, *tensors)
    forms = forms_of_consensus_map(forward, form_of_consensus_map(call, *tensors, *gradients))
    expected = [f"consensus_map_{stage}_{KINDS[dtype]}_{form}" for stage, form in zip(STAGES, forms, strict=True)]
    assert launched(driver) == (expected if shape[0] else [])


@EVERY_DTYPE
@pytest.mark.parametrize("shape", [(2, 64, 7, 7), (1, 130, 7, 8)], ids=str)
@CENTER
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_no_order_of_threads_changes_a_bit(driver, dtype, shape, center, layout):
    call = Call("consensus_map", options={"center": center})
    tensors = random_tensors(call, *shape, dtype, layouts=[layout] * 2)
    results = []
    for order in ORDERS:
        driver.order(order)
        out, gradients = check("simt", call, tensors)
        results.append([out.detach(), *gradients])
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@EVERY_DTYPE
@pytest.mark.parametrize("scales", [1, 2])
def test_the_general_kernels_on_the_special_shape(driver, dtype, scales):
    """The kernels for 7x7 and 14x14 are for three scales alone."""
    call = Call("consensus_map", options={"num_scales": scales})
    driver.log()
    for side, d in ((7, 200), (14, 20)):
        check("simt", call, random_tensors(call, 1, d, side, side, dtype))
    assert all(name.endswith("_any") for name in launched(driver))


def test_a_clip_does_not_depend_on_the_batch():
    call = Call("consensus_map")
    a, b = random_tensors(call, 3, 130, 7, 7, torch.float16)
    grad = random_grad(call(a, b))
    _, whole = check("simt", call, [a, b], grad=grad)
    out, alone = check("simt", call, [a[1:2], b[1:2]], grad=grad[1:2])
    assert torch.equal(call(a, b)[1:2], out)
    assert all(torch.equal(one[1:2], other) for one, other in zip(whole, alone, strict=True))


@pytest.mark.parametrize("half", HALF, ids=str)
@pytest.mark.parametrize("shape", [(2, 64, 7, 7), (1, 16, 7, 8)], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "sliced", "expanded"])
def test_a_float32_result_of_half_maps(half, shape, layout):
    """As under CUDA autocast: not rounded to half on the way, and neither is its gradient."""
    call = Call("consensus_map")
    tensors = random_tensors(call, *shape, half)
    leaves = [t.requires_grad_() for t in tensors]
    out, _ = torch.ops.m3em_fast._consensus_map(*leaves, 3, False, 1e-8, "float32", "simt")
    assert out.dtype == torch.float32
    expected = call.exact(tensors)
    exact.assert_close(out, expected.value, exact.bound(expected, torch.float32, torch.float32))
    # Beyond what half can hold, as GradScaler has it.
    grad = lay_out(65536 * random_grad(torch.empty(out.shape)), layout)
    for got, wanted in zip(torch.autograd.grad(out, leaves, grad), call.exact_gradients(tensors, grad), strict=True):
        exact.assert_close(got, wanted.value, exact.bound(wanted, half, torch.float32))


def test_python_and_the_host_know_alike_what_fits():
    """Shared memory of every small map, for any number of channels and scales, is what the smallest card has."""
    for h in range(1, 513):
        for w in {1, 2, 3, 7, 22, 512 // h} - {0}:
            if h * w <= 512:
                for dtype in (torch.float64, torch.float32):
                    needed = [
                        native.cuda_consensus_map_needs(NUMBERS[dtype], d, h, w, exact.scale_limit(h, w), True)[2]
                        for d in (1, 512)
                    ]
                    assert max(needed) <= 64 << 10, (h, w, dtype)


@pytest.mark.parametrize(("center", "side"), [(False, 57), (True, 51)])
def test_the_largest_map_of_a_v100(center, side):
    fits, does_not = (native.cuda_consensus_map_needs(1, 512, h, h, 3, center)[2] <= 96 << 10 for h in (side, side + 1))
    assert fits and not does_not


def test_a_map_too_large_for_a_block_is_declined():
    call = Call("consensus_map")
    tensors = random_tensors(call, 1, 2, 80, 80, torch.float32)
    reason = r"a map of 80x80 needs \d+ bytes of shared memory a block, and there are 98304"
    with pytest.raises(BackendError, match=f"consensus_map: backend simt cannot serve this call: {reason}"):
        call(*tensors)
    assert call.op in m3em_fast.explain("consensus_map", *tensors)
    assert "is served by none" in m3em_fast.explain("consensus_map", *tensors)
    with pytest.raises(Exception, match=reason):
        torch.compile(lambda *t: call(*t), backend="eager", fullgraph=True)(*tensors)


def test_more_shared_memory_than_is_given_unasked(driver):
    call = Call("consensus_map")
    driver.log()
    check("simt", call, random_tensors(call, 1, 2, 56, 56, torch.float32))
    found = [int(c.subject.split("shared=")[1].split()[0]) for c in driver.log() if c.name == "cuLaunchKernel"]
    assert max(found) > 48 << 10


# What would go wrong on a card -> a step too few or too many in a copy of the kernels for every shape.
SEEDED = {
    "a barrier is missing before the pooled values are read": (
        "(nullptr));\n        __syncthreads();\n",
        "(nullptr));\n",
    ),
    "a barrier is missing before the next tile is written": (
        "c1 - c : m.tile;\n        __syncthreads();\n",
        "c1 - c : m.tile;\n        if (c == c0)\n            __syncthreads();\n",
    ),
    "some threads leave out a barrier": (
        "(nullptr));\n        __syncthreads();\n",
        "(nullptr));\n        if (tid < 64)\n            __syncthreads();\n",
    ),
    "an element is not written": (
        "            static_cast<T *>(m.out.data)[first + q] = narrow<T>(value);",
        "            if (q != 48)\n            static_cast<T *>(m.out.data)[first + q] = narrow<T>(value);",
    ),
    "a channel is left out": ("for (int i = 0; i < mine; ++i) {", "for (int i = 1; i < mine; ++i) {"),
}


@pytest.mark.parametrize("fault", SEEDED)
def test_a_seeded_fault_is_caught(tmp_path, monkeypatch, fault):
    monkeypatch.setattr(backends, "simulated", None)
    broken = simt_cases.with_fault(tmp_path, "consensus_map", "cuda/consensus_map.cu", *SEEDED[fault])
    call = Call("consensus_map")
    tensors = random_tensors(call, 1, 200, 7, 8, torch.float32)
    assert simt_cases.orders_that_catch(broken, lambda: check("simt", call, tensors))
