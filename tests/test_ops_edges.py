"""Values and gradients where an op can go wrong quietly: vanishing norms, NaN and infinity, the ends of the range of
numbers, means that are much larger than the deviations, and results that must not change from run to run."""

import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

import m3em_fast
from m3em_fast import backends, ops
from op_cases import CALLS, DTYPES, FULL_CALLS, HALF, Call, check, generator, random_grad, random_tensors

EVERY_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def positions(vectors, dtype):
    """A map of one clip and one row that has the vectors as its positions."""
    return torch.tensor(vectors, dtype=torch.float64).T.reshape(1, len(vectors[0]), 1, len(vectors)).to(dtype)


def assert_dead(out, gradients, dead):
    """Exactly nothing at these positions; the bound alone would let a small number pass."""
    dead = torch.tensor(dead)
    assert torch.equal(out[0, 0, 0] == 0, dead)
    for gradient in gradients:
        assert not gradient[0, :, 0, dead].any()
        assert gradient[0, :, 0, ~dead].any(dim=0).all()


@pytest.mark.op("consensus_map")
@EVERY_DTYPE
def test_a_norm_below_eps_contributes_nothing(backend, dtype):
    """Below, at and above eps, in a and in b. The norms are exact: one channel holds all of each."""
    eps, step = 0.25, torch.finfo(dtype).eps
    norms = [0.0, eps / 2, eps * (1 - step), eps, eps * (1 + step), 3 * eps]
    faint, strong = [[norm, 0.0, 0.0] for norm in norms], [[3.0, -4.0, 12.0]] * len(norms)
    dead = [True, True, True, False, False, False]
    call = Call("consensus_map", options={"num_scales": 1, "eps": eps})
    for tensors in ([faint, strong], [strong, faint]):
        out, gradients = check(backend, call, [positions(vectors, dtype) for vectors in tensors])
        assert_dead(out, gradients, dead)


@pytest.mark.op("consensus_map")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("incoming", [float("inf"), float("nan")])
def test_a_dead_position_passes_on_nothing_of_any_gradient(backend, dtype, incoming):
    """0 times infinity would be NaN."""
    faint, strong = positions([[0.0] * 3, [3.0, -4.0, 12.0]], dtype), positions([[1.0, 2.0, 3.0]] * 2, dtype)
    for pair in ([faint, strong], [strong, faint]):
        leaves = [tensor.clone().requires_grad_() for tensor in pair]
        out = Call("consensus_map", options={"num_scales": 1})(*leaves)
        grad = torch.tensor([incoming, 1.0], dtype=dtype).expand_as(out)
        assert_dead(out, torch.autograd.grad(out, leaves, grad), [True, False])


@pytest.mark.op("consensus_map")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_the_default_eps(backend, dtype):
    """Each norm is compared with eps, never their product: 1e-5 twice is live, 5e-9 beside 1000 is dead."""
    a = [[1e-5, 0.0], [5e-9, 0.0], [2e-8, 0.0], [600.0, 800.0], [0.0, 0.0], [5e-9, 0.0]]
    b = [[6e-6, 8e-6], [600.0, 800.0], [6e-8, 8e-8], [0.0, 9e-9], [0.0, 0.0], [3e-9, 4e-9]]
    call = Call("consensus_map", options={"num_scales": 1})
    out, gradients = check(backend, call, [positions(a, dtype), positions(b, dtype)])
    assert_dead(out, gradients, [False, True, False, True, True, True])


@pytest.mark.op("consensus_map")
@EVERY_DTYPE
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_a_scale_can_be_dead_alone(backend, dtype, layout):
    """A checkerboard of plus and minus one vector: its mean over any window of the coarser scales is exactly 0."""
    signs = torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=torch.float64).repeat(2, 2)
    vector = torch.tensor([1.5, -2.0, 0.5, 3.0], dtype=torch.float64)
    a = (vector[:, None, None] * signs).expand(2, 4, 4, 4).to(dtype).contiguous()
    call = Call("consensus_map")
    _, b = random_tensors(call, 2, 4, 4, 4, dtype, layouts=[layout] * 2)
    out, gradients = check(backend, call, [a, b])
    fine, fine_gradients = check(
        backend, Call("consensus_map", options={"num_scales": 1}), [a, b], grad=random_grad(out, key=call.names)
    )
    assert torch.equal(out, fine)
    for gradient, wanted in zip(gradients, fine_gradients, strict=True):
        assert torch.equal(gradient, wanted)


@pytest.mark.op("consensus_map")
@EVERY_DTYPE
@pytest.mark.parametrize("center", [False, True])
def test_some_and_all_positions_are_zero(backend, dtype, center):
    call = Call("consensus_map", options={"center": center})
    a, b = random_tensors(call, 2, 4, 7, 5, dtype)
    a[:, :, :3] = 0
    b[:, :, 2:4, 1:3] = 0
    check(backend, call, [a, b])
    for tensors in ([a, torch.zeros_like(b)], [torch.zeros_like(a), b], [torch.zeros_like(a)] * 2):
        out, gradients = check(backend, call, tensors)
        assert not out.any()
        assert not any(gradient.any() for gradient in gradients)


@pytest.mark.op("consensus_map")
@EVERY_DTYPE
def test_equal_channels_have_no_deviation(backend, dtype):
    """center=True leaves nothing of a vector whose channels are all equal, nor of one that has a single channel."""
    call = Call("consensus_map", options={"center": True})
    for channels in (1, 4):
        _, b = random_tensors(call, 2, channels, 7, 7, dtype)
        a = torch.full_like(b, 0.75)
        out, gradients = check(backend, call, [a, b])
        assert not out.any()
        assert not any(gradient.any() for gradient in gradients)


# ----------------------------------------------------------------------------------------- NaN and infinity


SINGLE_SCALE = Call("consensus_map", options={"num_scales": 1})
CENTERED = Call("consensus_map", options={"center": True})


@EVERY_DTYPE
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("call", [*FULL_CALLS, Call("consensus_pool"), SINGLE_SCALE, CENTERED], ids=str)
def test_what_is_not_finite_is_passed_on(backend, call, value, dtype):
    """One such number in one input in turn. It reaches every result that depends on it, and nothing of another clip.

    Within the clip a consensus map of several scales may be NaN further around (0 times NaN in an interpolation)."""
    for i, name in enumerate(call.names):
        tensors = random_tensors(call, 2, 3, 5, 4, dtype)
        place = (0, *(0 if size == 1 else 1 for size in tensors[i].shape[1:]))
        tensors[i][place] = value
        several_scales = call.op == "consensus_map" and call != SINGLE_SCALE
        out, gradients = check(backend, call, tensors, may_spread=several_scales)
        affected = out[:, 0] if name in ("weight", "bias") else out[0]
        assert not affected.isfinite().all()
        if math.isnan(value):
            assert affected.isnan().any()
        if name not in ("weight", "bias"):
            assert out[1].isfinite().all()
            for other, gradient in zip(call.names, gradients, strict=True):
                assert other in ("weight", "bias") or gradient[1].isfinite().all()


@pytest.mark.op("consensus_map")
@EVERY_DTYPE
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("norm", [0.0, 2.0**-24])
@pytest.mark.parametrize("swap", [False, True])
def test_a_vanishing_vector_does_not_hide_what_is_not_finite(backend, dtype, value, norm, swap):
    """A position whose other vector is dead counts as 0, but not if that would make a NaN or an infinity vanish."""
    eps = 1e-3
    dead = positions([[norm, 0.0, 0.0]] * 3, dtype)
    other = positions([[1.0, 2.0, 3.0], [1.0, value, 3.0], [0.0, 0.0, value]], dtype)
    call = Call("consensus_map", options={"num_scales": 1, "eps": eps})
    out, gradients = check(backend, call, [other, dead] if swap else [dead, other])
    assert out[0, 0, 0, 0] == 0
    assert not out[0, 0, 0, 1:].isfinite().any()
    for gradient in gradients:
        assert not gradient[..., 0].any()
        assert not gradient[..., 1:].isfinite().any()


@pytest.mark.op("consensus_map")
@EVERY_DTYPE
def test_nan_beside_zero_in_every_scale(backend, dtype):
    call = Call("consensus_map")
    _, b = random_tensors(call, 2, 3, 7, 7, dtype)
    b[0, 1, 3, 3] = math.nan  # the middle, which is in a window of every scale
    out, gradients = check(backend, call, [torch.zeros_like(b), b], may_spread=True)
    assert out[0, 0, 3, 3].isnan()
    assert not out[1].any()
    for gradient in gradients:
        assert gradient[0, :, 3, 3].isnan().all()
        assert not gradient[1].any()


# ------------------------------------------------------------------------------------ the ends of the range


@pytest.mark.parametrize("call", CALLS, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_float16_at_its_largest_number(backend, call, layout):
    """Squares and sums of 65504 do not fit float16; what does fit must come out finite."""
    tensors = random_tensors(call, 2, 64, 7, 7, torch.float16, layouts=[layout] * len(call.names))
    for name, tensor in zip(call.names, tensors, strict=True):
        if name in ("x", "a", "b"):
            tensor.copy_(torch.where(tensor < 0, -65504, 65504))
        elif name == "weight":
            tensor.div_(16)
        elif name == "cmap":
            tensor.copy_(-tensor.sigmoid())
    grad = random_grad(call(*tensors)) / 2**12
    out, gradients = check(backend, call, tensors, grad=grad)
    assert out.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_the_mean_of_the_largest_number(backend, dtype):
    """A running sum in half would be infinite after two terms."""
    x, cmap = torch.full((2, 3, 7, 7), 65504.0, dtype=dtype), torch.zeros(2, 1, 7, 7, dtype=dtype)
    wanted = x[:, :, 0, 0]
    for pooled in ops.consensus_pool(x), ops.consensus_pool(x, cmap):
        assert torch.equal(pooled, wanted)
    for pooled in ops.gated_consensus_pool(x, [wanted / wanted]), ops.gated_consensus_pool(x, [wanted / wanted], cmap):
        assert torch.equal(pooled, wanted)


@pytest.mark.op("consensus_map")
@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("exponent", [-20, -6, 17])
def test_large_and_small_maps(backend, exponent, center):
    """The cosine does not depend on the length. float32 and bfloat16 are specified up to 1e17, where squares fit."""
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        call = Call("consensus_map", options={"center": center, "eps": 1e-15})
        tensors = random_tensors(call, 2, 64, 7, 7, torch.float64)
        tensors = [(tensor.clamp(-1, 1) * 10.0**exponent).to(dtype) for tensor in tensors]
        out, gradients = check(backend, call, tensors)
        assert out.isfinite().all()
        assert out.any() == (exponent > -20)
        assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_float16_at_its_smallest_number(backend, call):
    tensors = random_tensors(call, 2, 64, 7, 7, torch.float16)
    for name, tensor in zip(call.names, tensors, strict=True):
        if name in ("x", "a", "b"):
            tensor.copy_(torch.where(tensor < 0, -(2.0**-24), 2.0**-24))
    out, _ = check(backend, call, tensors)
    assert out.isfinite().all()


# ------------------------------------------------------------------------------------ center=True, repeatability


@pytest.mark.op("consensus_map")
@EVERY_DTYPE
@pytest.mark.parametrize("channels", [3, 64])
@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("scales", [1, 3])
def test_a_mean_of_a_hundred_deviations(backend, dtype, channels, smooth, scales):
    """Sums of squares minus squares of sums have few digits left. `smooth` maps keep their deviation when pooled."""
    call = Call("consensus_map", options={"center": True, "num_scales": scales})
    source = generator(dtype, channels, smooth, scales)
    tensors = []
    for mean in (100, -100):
        deviation = torch.randn(2, channels, 7, 7, generator=source, dtype=torch.float64)
        if smooth:
            deviation = deviation[:, :, :1, :1] + 0.1 * deviation
        tensors.append((mean + deviation).to(dtype))
    check(backend, call, tensors)


def run(call, tensors):
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    out = call(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, random_grad(out))]


@EVERY_DTYPE
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize(
    ("shape", "latent"),
    [((6, 150, 3, 2), 19), ((5, 17, 17, 16), 134), ((1, 1, 41, 40), 7), ((2, 300, 1, 1), 33), ((9, 40, 7, 7), 300)],
)
def test_projections_larger_than_the_blocks_of_a_matrix_product(backend, dtype, layout, shape, latent):
    """Channels, positions, samples and rows of the weight that fill several blocks and a part of one."""
    call = Call("gated_projection", gates=2, bias=True)
    layouts = [layout] * len(call.names)
    check(backend, call, random_tensors(call, *shape, dtype, layouts=layouts, d=latent), grad_layout=layout)


@pytest.mark.parametrize("call", CALLS, ids=str)
@EVERY_DTYPE
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_bitwise_equal_from_run_to_run(backend, call, dtype, layout):
    tensors = random_tensors(call, 5, 64, 7, 8, dtype, layouts=[layout] * len(call.names))
    first = run(call, tensors)
    for _ in range(3):
        again = run(call, tensors)
        assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


def test_results_do_not_share_memory(backend):
    """One gate of ones, one position: a result that is the input's own memory would change with it."""
    for call in CALLS:
        tensors = random_tensors(call, 2, 3, 1, 1, torch.float32)
        for name, tensor in zip(call.names, tensors, strict=True):
            if name != "x":
                tensor.fill_(name.startswith("gate"))
        out = call(*tensors)
        assert out.untyped_storage().data_ptr() not in [tensor.untyped_storage().data_ptr() for tensor in tensors]
        assert np.shares_memory(out.numpy(), tensors[0].numpy()) is False


@pytest.mark.parametrize("call", [call for call in FULL_CALLS if call.op != "gated_consensus_pool"], ids=str)
@pytest.mark.parametrize(
    ("dtype", "layout"), [(dtype, "contiguous") for dtype in DTYPES] + [(torch.float32, "channels_last")]
)
def test_more_than_caches_hold(call, dtype, layout):
    """Such results are stored past the caches: they have to be what the clips give in parts that fit. With an odd
    number of channels and of positions no clip but the first begins where a line of a cache does."""
    c, maps = 37, 1 if call.op == "gated_projection" else 2  # of x's size or nearly, that a call reads or writes
    n = 32 * 2**20 // (c * 49 * dtype.itemsize * maps)
    n += 3
    tensors = random_tensors(call, n, c, 7, 7, dtype, layouts=[layout] * len(call.names), d=5)
    batched = [len(tensor) == n for tensor in tensors]
    grad = None
    found = []
    with m3em_fast.backend("cpu"):
        for part in (n, n // 16):
            own = [[], *([] for _ in tensors)]
            for start in range(0, n, part):
                clips = [t[start : start + part] if b else t for t, b in zip(tensors, batched, strict=True)]
                clips = [clip.detach().requires_grad_() for clip in clips]
                out = call(*clips)
                grad = random_grad(out) if grad is None else grad
                gradients = torch.autograd.grad(out, clips, grad[start : start + part])
                for results, result in zip(own, (out.detach(), *gradients), strict=True):
                    results.append(result)
            found.append([torch.cat(results) for results, b in zip(own, [True, *batched], strict=True) if b])
    assert all(torch.equal(whole, parts) for whole, parts in zip(*found, strict=True))


LARGE = [Call("channel_gate", gates=1)] + [
    call for call in FULL_CALLS if call.op in ("consensus_map", "consensus_pool")
]
LARGE += [Call("gated_projection", gates=1)]


def free_bytes():
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):  # not on every system
        return 0


@pytest.mark.parametrize("name", [name for name in backends.available() if name != "reference"])
@pytest.mark.parametrize("call", LARGE, ids=str)
def test_more_elements_than_32_bits_can_count(name, call):
    """Zeros but for the first and the last clip, which have to come out as they do alone."""
    n, shape = 2**31 // (512 * 64) + 2, (512, 8, 8)
    needed = 2 * n * math.prod(shape) * 2  # a result and a gradient; zeros that are only read take none
    if free_bytes() < 1.5 * needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of memory, {free_bytes() / 2**30:.0f} are free")
    ends = random_tensors(call, 2, *shape, torch.float16, d=1)
    tensors = []
    for end in ends:
        if len(end) == 2:  # one row a clip
            # numpy's zeros take no memory until they are written to.
            whole = torch.from_numpy(np.zeros((n, *end.shape[1:]), dtype=np.float16))
            whole[0], whole[-1] = end
            tensors.append(whole)
        else:
            tensors.append(end)
    with m3em_fast.backend(name):
        out = call(*tensors)
        assert torch.equal(out[[0, -1]], call(*ends))
        gradients = []
        for x, *others in (tensors, ends):
            out = call(x.requires_grad_(), *others)
            (gradient,) = torch.autograd.grad(out, x, torch.ones((), dtype=out.dtype).expand(out.shape))
            gradients.append(gradient[[0, -1]])
            del out, gradient
        assert torch.equal(*gradients)
        assert gradients[0].any()


SHORT_OF_MEMORY = """
import resource, sys, torch
from m3em_fast import ops
torch.set_num_threads(int(sys.argv[1]))
x = torch.zeros(2, 1, 2000, 2000)
held = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (held + 4 * x.nbytes, -1))
try:
    ops.consensus_map(x, x)
except MemoryError:
    print("refused")
"""


@pytest.mark.skipif(backends.native is None, reason="without compiled kernels torch alone asks for memory")
@pytest.mark.parametrize("threads", ["1", "2"])
def test_working_memory_that_is_not_there_is_an_error_of_python(threads):
    """A kernel's own memory: 1.3 GB a thread here, 330 bytes a position."""
    run = subprocess.run([sys.executable, "-c", SHORT_OF_MEMORY, threads], capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (0, "refused\n"), run.stderr
