"""Tests of `exact` itself: its formulas against torch, finite differences and mpmath, its bound against broken ops."""

import mpmath
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import exact
from conftest import backends_short_of_cases
from op_cases import CALLS, HALF, Call, generator, random_tensors


@pytest.mark.parametrize("size", range(1, 20))
def test_windows_are_those_of_torch(size):
    for cells in range(1, size + 1):
        for i, (start, stop) in enumerate(exact.pooling_windows(size, cells)):
            # Which inputs the gradient of a cell reaches, and how strongly, shows the window.
            x = torch.zeros(1, 1, size, 1, dtype=torch.float64, requires_grad=True)
            F.adaptive_avg_pool2d(x, (cells, 1))[0, 0, i, 0].backward()
            wanted = torch.zeros(size, dtype=torch.float64)
            wanted[start:stop] = 1 / (stop - start)
            torch.testing.assert_close(x.grad[0, 0, :, 0], wanted, rtol=1e-15, atol=0)


def test_windows_of_seven_in_three_overlap():
    assert exact.pooling_windows(7, 3) == [(0, 3), (2, 5), (4, 7)]


@pytest.mark.parametrize("size", range(1, 20))
def test_interpolation_is_that_of_torch(size):
    for cells in range(1, size + 1):
        matrix = torch.eye(cells, dtype=torch.float64).reshape(cells, 1, cells, 1)
        wanted = F.interpolate(matrix, size=(size, 1), mode="bilinear", align_corners=False)[:, 0, :, 0]
        found = torch.zeros(cells, size, dtype=torch.float64)
        for i, taps in enumerate(exact.bilinear_taps(cells, size)):
            for cell, weight in taps:
                found[cell, i] += weight
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-14)


def test_scale_limit():
    assert [exact.scale_limit(n, 1) for n in (1, 2, 3, 4, 7, 8, 14, 16)] == [1, 2, 2, 3, 3, 4, 4, 5]


@pytest.mark.parametrize("call", [*CALLS, Call("consensus_map", options={"eps": 0.9})], ids=str)
def test_gradients_against_finite_differences(call):
    tensors = random_tensors(call, 2, 2, 5, 3, torch.float64, d=3, key=("differences",))
    arrays, step = [exact.array(tensor) for tensor in tensors], np.longdouble(2) ** -20
    grad = torch.randn(call.exact(arrays).value.shape, generator=generator(call), dtype=torch.float64)
    weights = exact.array(grad)
    for i, expected in enumerate(call.exact_gradients(arrays, grad)):
        found = np.zeros_like(arrays[i])
        for index in np.ndindex(arrays[i].shape):
            for sign in (1, -1):
                moved = [array.copy() for array in arrays]
                moved[i][index] += sign * step
                found[index] += sign * (call.exact(moved).value * weights).sum() / (2 * step)
        # Errors: the third derivative times step^2 / 6, and longdouble's rounding divided by the step.
        np.testing.assert_allclose(found.astype(float), expected.value.astype(float), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("center", [False, True])
def test_consensus_map_against_fifty_digits(center):
    """Eq. 5 written with mpmath for one clip of 2x2 and two scales, where the coarse scale is one constant."""
    a, b = random_tensors(Call("consensus_map"), 1, 3, 2, 2, torch.float64, key=("digits",))

    with mpmath.workdps(50):

        def cosine(u, v):
            if center:
                u, v = ([x - mpmath.fsum(w) / 3 for x in w] for w in (u, v))
            return mpmath.fdot(u, v) / mpmath.sqrt(mpmath.fdot(u, u) * mpmath.fdot(v, v))

        vectors = [[[mpmath.mpf(float(m[0, d, i, j])) for d in range(3)] for m in (a, b)] for i, j in np.ndindex(2, 2)]
        pooled = [[mpmath.fsum(pair[m][d] for pair in vectors) / 4 for d in range(3)] for m in (0, 1)]
        wanted = [cosine(*pair) + cosine(*pooled) for pair in vectors]
        found = exact.consensus_map(exact.array(a), exact.array(b), 2, center).value.ravel()
        for value, digits in zip(found, wanted, strict=True):
            text = np.format_float_positional(value, precision=25, unique=False)
            assert abs(mpmath.mpf(text) - digits) < 1e-17


def honest(call, tensors, dtype):
    """The op as a careful implementation computes it: float32 inside, rounded to `dtype` at the end."""
    arrays = [exact.array(tensor).astype(np.float32) for tensor in tensors]
    return torch.from_numpy(call.exact(arrays).value).to(dtype)


def honest_gradients(call, tensors, grad):
    arrays = [exact.array(tensor).astype(np.float32) for tensor in tensors]
    gradients = call.exact_gradients(arrays, grad)
    return [torch.from_numpy(g.value).to(t.dtype) for g, t in zip(gradients, tensors, strict=True)]


def close(call, tensors, result, backend="any"):
    expected = call.exact(tensors)
    rounded = call.rounded("out", result.dtype, tensors, backend)
    exact.assert_close(result, expected.value, exact.bound(expected, result.dtype, torch.float32, rounded))


def gradients_close(call, tensors, grad, gradients):
    for name, result, expected in zip(call.names, gradients, call.exact_gradients(tensors, grad), strict=True):
        rounded = call.rounded(name, result.dtype, tensors, "any")
        exact.assert_close(result, expected.value, exact.bound(expected, result.dtype, torch.float32, rounded), name)


LOWER = pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
EVERY_CALL = pytest.mark.parametrize("call", CALLS, ids=str)


@LOWER
@EVERY_CALL
@pytest.mark.parametrize("side", [1, 7, 14])
def test_honest_code_passes(call, dtype, side):
    tensors = random_tensors(call, 2, 64, side, side, dtype, key=("honest",))
    close(call, tensors, honest(call, tensors, dtype))
    grad = torch.randn(call.exact(tensors).value.shape, generator=generator(call), dtype=torch.float64).to(dtype)
    gradients_close(call, tensors, grad, honest_gradients(call, tensors, grad))


@LOWER
@EVERY_CALL
def test_an_unwritten_row_is_caught(call, dtype):
    tensors = random_tensors(call, 2, 64, 7, 7, dtype, key=("broken",))
    for garbage in (0, torch.nan):
        result = honest(call, tensors, dtype)
        result[-1, ..., -1] = garbage
        with pytest.raises(AssertionError, match="elements are off"):
            close(call, tensors, result)


@LOWER
@EVERY_CALL
def test_a_dropped_channel_is_caught(call, dtype):
    tensors = random_tensors(call, 2, 64, 7, 7, dtype, key=("broken",))
    shortened = [tensors[0].clone(), *tensors[1:]]
    shortened[0][:, -1] = 0
    with pytest.raises(AssertionError, match="elements are off"):
        close(call, tensors, honest(call, shortened, dtype))
    grad = torch.randn(call.exact(tensors).value.shape, generator=generator(call), dtype=torch.float64).to(dtype)
    if len(tensors) > 1:  # without a second input the gradient does not depend on x
        with pytest.raises(AssertionError, match="elements are off"):
            gradients_close(call, tensors, grad, honest_gradients(call, shortened, grad))


@LOWER
@pytest.mark.parametrize("call", [call for call in CALLS if call.op == "consensus_map"], ids=str)
@pytest.mark.parametrize("what", ["windows", "corners"])
def test_wrong_windows_and_aligned_corners_are_caught(call, dtype, what, monkeypatch):
    tensors = random_tensors(call, 2, 64, 7, 7, dtype, key=("broken",))
    if what == "windows":
        name = "pooling_windows"

        def wrong(size, cells):
            return [(i * size // cells, (i + 1) * size // cells) for i in range(cells)]

    else:
        name = "bilinear_taps"

        def wrong(cells, size, dtype):
            places = [i * (cells - 1) / (size - 1) for i in range(size)]
            return [[(int(p), dtype(1 - p % 1)), (min(int(p) + 1, cells - 1), dtype(p % 1))] for p in places]

    exact._readers.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(exact, name, wrong)
        result = honest(call, tensors, dtype)
        grad = torch.randn(result.shape, generator=generator(call), dtype=torch.float64).to(dtype)
        gradients = honest_gradients(call, tensors, grad)
    exact._readers.cache_clear()
    if not call.positive:  # the cosines of a nearly equal pair are nearly 1 in any window
        with pytest.raises(AssertionError, match="elements are off"):
            close(call, tensors, result)
    with pytest.raises(AssertionError, match="elements are off"):
        gradients_close(call, tensors, grad, gradients)


def running_sum(terms):
    """A sum that is rounded to the terms' dtype after every addition, as accumulation in half is."""
    total = torch.zeros_like(terms[0])
    for term in terms:
        total = total + term
    return total


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_accumulation_in_half_is_caught(dtype):
    call = Call("consensus_pool", cmap=True)
    x, cmap = tensors = random_tensors(call, 2, 64, 7, 7, dtype, key=("half",))
    with pytest.raises(AssertionError, match="elements are off"):
        close(call, tensors, running_sum(((1 + cmap) * x).flatten(2).unbind(2)) / 49)

    for positive in (False, True):
        call = Call("consensus_map", positive=positive, options={"num_scales": 1})
        a, b = tensors = random_tensors(call, 2, 64, 7, 7, dtype, key=("half",))
        dot, norm_a, norm_b = (running_sum((p * q).unbind(1))[:, None] for p, q in ((a, b), (a, a), (b, b)))
        with pytest.raises(AssertionError, match="elements are off"):
            close(call, tensors, dot / (norm_a.sqrt() * norm_b.sqrt()))

    # A projection may round an operand to half. Among numbers of either sign that is as much as a sum in half loses.
    for positive, backend in (True, "any"), (False, "reference"):
        call = Call("gated_projection", gates=2, positive=positive)
        x, *gates, weight = tensors = random_tensors(call, 2, 64, 7, 7, dtype, key=("half",))
        gated = torch.cat([x * gate[:, :, None, None] for gate in gates], dim=1)
        terms = [gated[:, c, None] * weight[:, c, None, None] for c in range(gated.shape[1])]
        with pytest.raises(AssertionError, match="elements are off"):
            close(call, tensors, running_sum(terms), backend)


def test_assert_close_names_the_first_five():
    expected = np.zeros((3, 4))
    with pytest.raises(AssertionError) as caught:
        exact.assert_close(torch.ones(3, 4), expected, 0.5, "map")
    assert "map: 12 of 12 elements are off (float32)" in str(caught.value)
    assert str(caught.value).count("got 1, exact 0") == 5
    with pytest.raises(AssertionError, match="shape"):
        exact.assert_close(torch.zeros(4, 3), expected, 0.5)


def test_assert_close_and_what_is_not_finite():
    nan, inf = np.nan, np.inf
    exact.assert_close(torch.tensor([nan, inf, -inf]), np.array([nan, nan, inf]), 0.0)
    exact.assert_close(torch.tensor([nan]), np.array([1.0]), 0.0, may_spread=True)
    # 65520 is halfway to the next number that float16 would have, and rounds to infinity.
    exact.assert_close(torch.tensor([inf, -inf], dtype=torch.float16), np.array([65520.0, -7e4]), 0.0)
    for got, wanted in ((1.0, nan), (0.0, inf), (nan, 1.0), (inf, 1.0)):
        with pytest.raises(AssertionError):
            exact.assert_close(torch.tensor([got]), np.array([wanted]), 1e9)
    for got, wanted in ((inf, 65519.0), (inf, -65520.0), (nan, 65520.0)):
        with pytest.raises(AssertionError):
            exact.assert_close(torch.tensor([got], dtype=torch.float16), np.array([wanted]), 0.0)


def test_a_skipped_backend_is_short_of_cases():
    """Op by op: what one op has more on a backend makes up for nothing."""
    passed = {("a", "reference"): 5, ("a", "cpu"): 5, ("a", "simt"): 4, ("b", "reference"): 3, ("b", "cpu"): 9}
    assert backends_short_of_cases(passed, {"simt": {"a"}}) == {("a", "simt"): 4}
    short = {("a", "simt"): 4, ("b", "simt"): 0}
    assert backends_short_of_cases(passed, {"simt": {"a", "b"}}) == short
    assert backends_short_of_cases(passed, {"simt": {"a", "b"}, "triton": {"b"}}) == short | {("b", "triton"): 0}
    assert backends_short_of_cases({("", "reference"): 1}, {"simt": {"a"}}) == {("", "cpu"): 0}
    assert backends_short_of_cases({}, {"simt": {"a"}}) == {}
