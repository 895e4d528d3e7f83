"""The CUDA kernels, run on the CPU by csrc/simt, against the exact results; and that this net has no holes."""

import shutil

import pytest
import torch

import exact
import simt_cases
from op_cases import DTYPES, Call, random_grad, random_tensors
from simt_cases import ORDERS, ROOT, Failed

# One chunk and several, full tiles and parts of one, more cells than threads, maps longer than wide.
SHAPES = [(2, 64, 7, 7), (1, 200, 7, 7), (2, 5, 14, 14), (2, 3, 5, 3), (1, 33, 1, 1), (2, 8, 1, 9), (1, 130, 7, 8)]
SHAPES += [(1, 16, 28, 20), (0, 3, 7, 7)]
EVERY_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return simt_cases.build(tmp_path_factory.mktemp("simt"))


def accumulation(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def check(library, call, a, b, grad, **options):
    scales = call.options.get("num_scales") or min(3, exact.scale_limit(*a.shape[2:]))
    center = call.options.get("center", False)
    found = simt_cases.consensus_map(library, a, b, grad, scales, center, **options)
    expected = [call.exact([a, b]), *call.exact_gradients([a, b], grad)]
    for got, want in zip(found, expected, strict=True):
        if got is not None:
            exact.assert_close(got, want.value, exact.bound(want, a.dtype, accumulation(a.dtype)), str(call))
    return found


def draw(call, shape, dtype, layout="contiguous"):
    a, b = random_tensors(call, *shape, dtype, layouts=[layout] * 2)
    return a, b, random_grad(torch.empty(shape[0], 1, *shape[2:], dtype=dtype))


@EVERY_DTYPE
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("center", [False, True], ids=["cosine", "pearson"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced", "expanded"])
def test_consensus_map(library, dtype, shape, center, layout):
    call = Call("consensus_map", options={"center": center})
    a, b, grad = draw(call, shape, dtype, layout)
    for general in {False, shape[2:] == (7, 7)}:
        check(library, call, a, b, grad, general=general)


@EVERY_DTYPE
@pytest.mark.parametrize("shape", [(2, 64, 7, 7), (1, 130, 7, 8)], ids=str)
@pytest.mark.parametrize("center", [False, True], ids=["cosine", "pearson"])
def test_no_order_of_threads_changes_a_bit(library, dtype, shape, center):
    call = Call("consensus_map", options={"center": center})
    a, b, grad = draw(call, shape, dtype)
    results = [simt_cases.consensus_map(library, a, b, grad, 3, center, order=order) for order in ORDERS]
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.parametrize("scales", [1, 2, 3, 4, 5])
def test_every_number_of_scales(library, scales):
    call = Call("consensus_map", options={"num_scales": scales})
    check(library, call, *draw(call, (2, 6, 17, 9), torch.float32))


def test_a_clip_does_not_depend_on_the_batch(library):
    call = Call("consensus_map")
    a, b, grad = draw(call, (3, 130, 7, 7), torch.float16)
    whole = simt_cases.consensus_map(library, a, b, grad, 3)
    alone = simt_cases.consensus_map(library, a[1:2], b[1:2], grad[1:2], 3)
    assert all(torch.equal(one[1:2], other) for one, other in zip(whole, alone, strict=True))


@pytest.mark.parametrize("needs", ["a", "b"])
def test_a_gradient_of_one_map_alone(library, needs):
    call = Call("consensus_map")
    found = check(library, call, *draw(call, (1, 40, 7, 7), torch.float32), needs=needs)
    assert [g is not None for g in found[1:]] == [name in needs for name in "ab"]


def test_a_mean_of_a_hundred_deviations(library):
    call = Call("consensus_map", options={"center": True})
    a, b, grad = draw(call, (1, 200, 7, 7), torch.float32)
    check(library, call, a + 100, b - 100, grad)


@pytest.mark.parametrize("value", [0.0, torch.nan, torch.inf])
def test_dead_positions_and_what_is_not_finite(library, value):
    a, b, grad = draw(Call("consensus_map"), (1, 40, 7, 7), torch.float32)
    a[0, :, 2, 3] = value
    out, grad_a, grad_b = simt_cases.consensus_map(library, a, b, grad, 1)
    if value == 0:
        assert out[0, 0, 2, 3] == 0 and not grad_a[0, :, 2, 3].any() and not grad_b[0, :, 2, 3].any()
        assert out[0, 0].count_nonzero() == 48
    else:
        assert out[0, 0, 2, 3].isnan() and grad_a[0, :, 2, 3].isnan().all()
        assert out.isnan().sum() == 1


# What would go wrong on a card -> a step too few or too many in a copy of the kernel.
SEEDED = {
    "a barrier is missing before the pooled values are read": (
        "        pool_tiles(g, room, count);\n        __syncthreads();\n        if",
        "        pool_tiles(g, room, count);\n        if",
    ),
    "a barrier is missing before the next tile is written": (
        "c1 - c : m.tile;\n        __syncthreads();\n",
        "c1 - c : m.tile;\n        if (c == c0)\n            __syncthreads();\n",
    ),
    "some threads leave out a barrier": (
        "        pool_tiles(g, room, count);\n        __syncthreads();\n        if",
        "        pool_tiles(g, room, count);\n        if (tid < 64)\n            __syncthreads();\n        if",
    ),
    "an element is not written": (
        "        out[q] = narrow<T>(value);",
        "        if (q != 48)\n            out[q] = narrow<T>(value);",
    ),
    "a channel is left out": ("for (int i = 0; i < mine; ++i) {", "for (int i = 1; i < mine; ++i) {"),
}


@pytest.mark.parametrize("fault", SEEDED)
def test_a_seeded_fault_is_caught(tmp_path, fault):
    right, wrong = SEEDED[fault]
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    path = tmp_path / "csrc/cuda/consensus_map.cu"
    source = path.read_text()
    assert source.count(right) == 1
    path.write_text(source.replace(right, wrong))
    library = simt_cases.build(tmp_path, tmp_path / "csrc", ["-O0"])
    call = Call("consensus_map")
    a, b, grad = draw(call, (1, 200, 7, 7), torch.float32)
    caught = 0
    for order in ORDERS:
        try:
            check(library, call, a, b, grad, order=order)
        except (Failed, AssertionError):
            caught += 1
    assert caught
