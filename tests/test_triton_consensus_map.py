"""consensus_map in Triton, interpreted: what the tests of the ops, which run on every backend, do not reach."""

import os
from dataclasses import replace

import pytest
import torch

# Before the first import of triton; a process that has imported it otherwise has no interpreter.
os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton", reason="Triton is not installed")

from m3em_fast import ops
from m3em_fast.triton import _launch, _plan
from m3em_fast.triton import consensus_map as kernels
from op_cases import HALF, Call, check, lay_out, random_tensors

pytestmark = [
    pytest.mark.op("consensus_map"),
    pytest.mark.parametrize("backend", ["triton"], indirect=True),
    pytest.mark.skipif(not _launch.INTERPRETED, reason="TRITON_INTERPRET was not set when triton was imported"),
]
PLAIN, CENTER = Call("consensus_map"), Call("consensus_map", options={"center": True})


def scales(call, number):
    return replace(call, options=call.options | {"num_scales": number})


@pytest.fixture
def card(monkeypatch):
    """Tiles as they are on a V100, which are smaller than those of the interpreter."""
    monkeypatch.setattr(kernels, "capability_of", lambda x: 70)


@pytest.mark.parametrize("call", (PLAIN, CENTER), ids=str)
@pytest.mark.parametrize("shape", ((7, 7), (14, 14), (7, 8), (1, 9), (8, 1), (5, 3), (1, 1)), ids=str)
def test_tiles_of_a_card(backend, card, call, shape):
    check("triton", call, random_tensors(call, 1, 19, *shape, torch.float32))


@pytest.mark.parametrize("dtype", (torch.float64, *HALF), ids=str)
def test_tiles_of_a_card_in_other_dtypes(backend, card, dtype):
    check("triton", CENTER, random_tensors(CENTER, 1, 19, 7, 7, dtype))


# 30 -> 7: windows of 5 and of 6 positions, and more cells than a window has positions.
@pytest.mark.parametrize("shape", ((9, 9), (3, 8), (16, 1), (1, 5), (30, 1)), ids=str)
def test_every_number_of_scales(backend, card, shape):
    for number in range(1, max(shape).bit_length() + 1):
        call = scales(PLAIN, number)
        check("triton", call, random_tensors(call, 1, 3, *shape, torch.float32))


@pytest.mark.parametrize(("shape", "number"), (((5, 40), 3), ((34, 3), 4), ((2, 70), 7)), ids=str)
def test_maps_that_are_cut_into_blocks_of_positions(backend, card, shape, number):
    call = scales(CENTER, number)
    how = _plan.plan(torch.float32, 3, *shape, number, True, 1e-8, 70)
    assert how.backward_programs > how.backward_chunks  # several blocks of positions
    check("triton", call, random_tensors(call, 1, 3, *shape, torch.float32))


def test_maps_that_are_cut_into_bands_of_rows(backend, card, monkeypatch):
    monkeypatch.setattr(_plan, "PORTION", 1 << 10)
    _plan.plan.cache_clear()
    for shape in (7, 7), (9, 5):
        assert _plan.plan(torch.float32, 40, *shape, 2, False, 1e-8, 70).partial["BANDS"] > 1
        call = scales(PLAIN, 2)
        check("triton", call, random_tensors(call, 1, 40, *shape, torch.float32))
    _plan.plan.cache_clear()


@pytest.mark.parametrize("call", (PLAIN, CENTER), ids=str)
def test_several_chunks_and_a_short_last_one(backend, card, monkeypatch, call):
    monkeypatch.setattr(_plan, "LEAST", 8)
    monkeypatch.setattr(_plan, "PORTION", 1 << 10)
    _plan.plan.cache_clear()
    how = _plan.plan(torch.float32, 27, 5, 3, 2, False, 1e-8, 70)
    assert (how.chunk, how.chunks) == (8, 4)
    check("triton", scales(call, 2), random_tensors(call, 2, 27, 5, 3, torch.float32))
    _plan.plan.cache_clear()


@pytest.mark.parametrize(
    "layouts", (("channels_last", "sliced"), ("transposed", "channels_last"), ("spread", "expanded")), ids=str
)
@pytest.mark.parametrize("grad", ("spread", "channels_last", "sliced", "expanded"))
def test_a_and_b_and_the_gradient_in_layouts_of_their_own(backend, layouts, grad):
    check("triton", PLAIN, random_tensors(PLAIN, 2, 5, 4, 3, torch.float32, layouts=layouts), grad_layout=grad)


@pytest.mark.parametrize("needs", (["a"], ["b"]), ids=str)
def test_one_of_two_gradients(backend, needs):
    check("triton", PLAIN, random_tensors(PLAIN, 2, 5, 7, 7, torch.float16), needs=needs)


@pytest.mark.parametrize("call", (PLAIN, CENTER), ids=str)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
def test_zero_vectors_pass_nothing_on(backend, call, dtype):
    a, b = random_tensors(call, 2, 6, 5, 5, dtype)
    a[0, :, 1, 2] = 0
    a[1] = 0  # every window of it
    b[0, :, 3:, :] = 0
    _, (grad_a, grad_b) = check("triton", call, [a, b])
    assert (grad_a[1] == 0).all() and (grad_b[1] == 0).all()


@pytest.mark.parametrize("value", (torch.nan, torch.inf, -torch.inf), ids=str)
def test_nan_and_infinity_reach_the_result_and_the_gradient(backend, card, value):
    a, b = random_tensors(PLAIN, 2, 5, 7, 7, torch.float32)
    a[0, 3, 2, 2] = value
    b[0, :, 2, 2] = 0  # no dead position: the other map is not finite there
    for call in (PLAIN, scales(PLAIN, 1)):  # of several scales the others would reach the position too
        out, (grad_a, _) = check("triton", call, [a, b])
        assert not out[0, 0, 2, 2].isfinite() and not grad_a[0, :, 2, 2].isfinite().any()
        assert out[1].isfinite().all() and grad_a[1].isfinite().all()


def test_an_infinite_gradient_stops_at_a_dead_cell(backend):
    a, b = random_tensors(PLAIN, 1, 5, 4, 4, torch.float32)
    a[:] = 0
    a, b = a.requires_grad_(), b.requires_grad_()
    out = ops.consensus_map(a, b)
    for gradient in torch.autograd.grad(out, (a, b), torch.full_like(out, torch.inf)):
        assert (gradient == 0).all()


def test_every_finite_half_gives_a_finite_result(backend):
    largest, least = torch.finfo(torch.float16).max, 2.0**-24
    a = torch.tensor([largest, -largest, least, 0.0, 1.0, -least], dtype=torch.float16)
    a = a.repeat(2, 700)[:, :4096].reshape(2, 256, 4, 4)
    b = a.roll(1, 1)
    assert ops.consensus_map(a, b).isfinite().all()
    assert ops.consensus_map(a, b, center=True).isfinite().all()
    full = torch.full_like(a, largest)
    assert torch.allclose(ops.consensus_map(full, full).float(), torch.tensor(3.0), atol=2e-3)


@pytest.mark.parametrize("offset", (30.0, 1000.0))
def test_center_with_a_large_mean(backend, card, offset):
    a, b = random_tensors(CENTER, 1, 40, 7, 7, torch.float32)
    check("triton", CENTER, [a + offset, b - offset])


def test_center_with_one_channel_far_away(backend, card):
    """Of sums that are shifted by that channel few digits would be left."""
    a, b = random_tensors(CENTER, 1, 40, 3, 3, torch.float32)
    a[:, 0] += 3000
    check("triton", scales(CENTER, 1), [a, b])


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
def test_eps_is_a_number_of_the_accumulation_dtype(backend, dtype):
    """1e-8 in float32 is less than 1e-8: a norm between them is small in float64 alone."""
    between = 9.9999999700e-9
    a = torch.full((1, 1, 1, 1), between, dtype=dtype)
    assert float(torch.tensor(1e-8)) < between < 1e-8
    assert ops.consensus_map(a, torch.ones_like(a)).item() == (0 if dtype == torch.float64 else 1)
    assert ops.consensus_map(a, torch.ones_like(a), eps=1e-60).item() == 1


@pytest.mark.parametrize("call", (PLAIN, CENTER), ids=str)
def test_a_clip_has_its_bits_whatever_else_is_in_the_batch(backend, card, call):
    a, b = (t.requires_grad_() for t in random_tensors(call, 3, 9, 7, 5, torch.float32))
    out = call(a, b)
    grad = torch.rand(out.shape, generator=torch.Generator().manual_seed(0))
    both = torch.autograd.grad(out, (a, b), grad)
    for n in (0, 2):
        alone = [t[n : n + 1].detach().clone().requires_grad_() for t in (a, b)]
        result = call(*alone)
        assert torch.equal(result, out[n : n + 1])
        for one, every in zip(torch.autograd.grad(result, alone, grad[n : n + 1]), both, strict=True):
            assert torch.equal(one, every[n : n + 1])


def test_no_samples(backend):
    a = torch.zeros(0, 4, 7, 7, requires_grad=True)
    out = ops.consensus_map(a, a)
    assert out.shape == (0, 1, 7, 7)
    out.sum().backward()
    assert a.grad.shape == a.shape


def test_the_split_knows_nothing_of_the_number_of_samples(backend, monkeypatch):
    seen = []
    monkeypatch.setattr(
        kernels, "launch", lambda kernel, programs, writes, *arguments, **constants: seen.append((programs, constants))
    )
    for n in (1, 4):
        a, b = random_tensors(PLAIN, n, 6, 7, 7, torch.float32)
        kernels.forward((3, False, 1e-8, a.dtype), (a, b), True)
    half = len(seen) // 2
    assert [programs * 4 for programs, _ in seen[:half]] == [programs for programs, _ in seen[half:]]
    assert [constants for _, constants in seen[:half]] == [constants for _, constants in seen[half:]]


def test_what_is_saved_has_the_promised_size(backend):
    for center in (False, True):
        a = lay_out(torch.rand(2, 3, 7, 5), "channels_last")
        options = (3, center, 1e-8, a.dtype)
        out, (stats,) = kernels.forward(options, (a, a), True)
        shape, (form,) = kernels.form(options, (a, a))
        assert out.shape == shape.shape and out.stride() == shape.stride()
        assert stats.shape == form.shape == (2, _plan.stats_size(7, 5, 3, center))
        assert kernels.forward(options, (a, a), False)[1] == []
