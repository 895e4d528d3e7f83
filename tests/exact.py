"""What every op must return, written out a second time, and how far a fast result may be from it.

Nothing here comes from m3em_fast or from torch's pooling and interpolation: windows and interpolation weights are
derived below, and the loops run over scales, windows and positions. Only clips and channels are vectors. Every function
works in the dtype of the arrays it is given: float64 for results in float32 and half, longdouble for those in float64.

A result comes as `Exact(value, size)`. `size` is the largest value over the tensor of the same expression with every
product and sum taken over absolute values, which is what rounding errors are proportional to (`bound`).
"""

from fractions import Fraction
from functools import cache
from typing import NamedTuple

import numpy as np
import torch


class Exact(NamedTuple):
    value: np.ndarray
    size: float  # the M of the bound
    spread: float | None = None  # center=True: 1 + the largest |mean| / deviation over channels


def array(tensor):
    """The tensor's numbers in a dtype that is finer than theirs; an array is left as it is.

    longdouble is finer than float64 on x86-64 and on Linux on ARM. Where it is not, results in float64 are compared
    with something that is only as good as they are."""
    if isinstance(tensor, np.ndarray):
        return tensor
    tensor = tensor.detach().cpu()
    if tensor.dtype == torch.float64:
        return tensor.numpy().astype(np.longdouble)
    return tensor.double().numpy()


def largest(magnitudes):
    """The largest finite entry: a NaN that a test puts in must not make the bound of the other entries useless."""
    finite = magnitudes[np.isfinite(magnitudes)]
    return float(finite.max()) if finite.size else 0.0


# ---------------------------------------------------------------------------------------------- channel_gate


def channel_gate(x, gates):
    channels = x.shape[1]
    out = np.empty((x.shape[0], len(gates) * channels, *x.shape[2:]), x.dtype)
    for g, gate in enumerate(gates):
        out[:, g * channels : (g + 1) * channels] = x * gate[:, :, None, None]
    return Exact(out, largest(abs(out)))


def channel_gate_gradients(x, gates, grad):
    channels = x.shape[1]
    dx, dx_size = np.zeros_like(x), np.zeros_like(x)
    dgates = []
    for g, gate in enumerate(gates):
        part = grad[:, g * channels : (g + 1) * channels]
        dx += part * gate[:, :, None, None]
        dx_size += abs(part * gate[:, :, None, None])
        dgates.append(_sum_over_positions(part, x))
    return [Exact(dx, largest(dx_size)), *dgates]


def _sum_over_positions(left, right):
    total, size = np.zeros(left.shape[:2], left.dtype), np.zeros(left.shape[:2], left.dtype)
    for i, j in np.ndindex(left.shape[2:]):
        total += left[:, :, i, j] * right[:, :, i, j]
        size += abs(left[:, :, i, j] * right[:, :, i, j])
    return Exact(total, largest(size))


# --------------------------------------------------------------------------------------------- consensus_map


def scale_limit(height, width):
    """1 + floor(log2(longest side)), without a logarithm that could round."""
    return max(height, width).bit_length()


def pooling_windows(size, cells):
    """Cell i of an adaptive pooling covers every position that it touches when the line is cut into equal cells, so the
    start is rounded down and the end up: 7 -> 3 gives [0, 3) [2, 5) [4, 7)."""
    return [(i * size // cells, -((-(i + 1) * size) // cells)) for i in range(cells)]


@cache
def bilinear_taps(cells, size, dtype=np.float64):
    """For each fine position the coarse cells it is read from, with their weights, when corners are not aligned.

    Both grids cover the same line and values sit at the centres of the cells: fine position i has its centre at
    (i + 1/2) / size of the line, which is coordinate (i + 1/2) * cells / size - 1/2 when the coarse centres are at
    0, 1, 2, ... Before the first and after the last centre the border value holds."""
    taps = []
    for i in range(size):
        place = min(
            max(Fraction(2 * i + 1, 2) * Fraction(cells, size) - Fraction(1, 2), Fraction(0)), Fraction(cells - 1)
        )
        low = place.numerator // place.denominator
        part = place - low
        weights = [(low, 1 - part), (low + 1, part)]
        # A weight of exactly 0 is no tap: the value there, were it NaN, is not part of the definition.
        taps.append([(cell, dtype(w.numerator) / dtype(w.denominator)) for cell, w in weights if w])
    return taps


class _Cosine(NamedTuple):
    value: np.ndarray  # (N,)
    da: np.ndarray  # (N, D): the derivative by a, and by b
    db: np.ndarray
    da_size: np.ndarray  # the same with the two terms added in absolute values
    db_size: np.ndarray
    offset: float  # the largest |mean| / deviation over channels among live vectors


def _cosine(a, b, center, eps):
    """Cosine over channels of the vectors in the rows of a and b."""
    mean_a, mean_b = a.mean(axis=1, keepdims=True), b.mean(axis=1, keepdims=True)
    if center:
        a, b = a - mean_a, b - mean_b
    norm_a = np.sqrt((a * a).sum(axis=1, keepdims=True))
    norm_b = np.sqrt((b * b).sum(axis=1, keepdims=True))
    # A zero vector says nothing, unless the other one is NaN or infinite, which must not get lost.
    dead = ((norm_a < eps) | (norm_b < eps)) & np.isfinite(norm_a) & np.isfinite(norm_b)
    value = (a * b).sum(axis=1, keepdims=True) / (norm_a * norm_b)
    # With center=True these have mean 0 over channels already, as a and b do: they are the derivative by the vectors
    # before the mean was taken off, too.
    terms_a = b / (norm_a * norm_b), value * a / (norm_a * norm_a)
    terms_b = a / (norm_a * norm_b), value * b / (norm_b * norm_b)
    offset = 0.0
    if center:
        root = np.sqrt(a.dtype.type(a.shape[1]))
        live = ~dead
        for mean, norm in (mean_a, norm_a), (mean_b, norm_b):
            offset = max(offset, largest(abs(mean[live]) / (norm[live] / root)))
    da, db = terms_a[0] - terms_a[1], terms_b[0] - terms_b[1]
    da_size, db_size = abs(terms_a[0]) + abs(terms_a[1]), abs(terms_b[0]) + abs(terms_b[1])
    alive = [np.where(dead, 0, v) for v in (value, da, db, da_size, db_size)]
    return _Cosine(alive[0][:, 0], *alive[1:], offset)


def _mean_of_window(x, rows, columns):
    total = np.zeros(x.shape[:2], x.dtype)
    for i in range(*rows):
        for j in range(*columns):
            total += x[:, :, i, j]
    return total / ((rows[1] - rows[0]) * (columns[1] - columns[0]))


def _cells(height, width, scales):
    """Every cell of every scale: its window, and the fine positions that read it, with their weights."""
    for k in range(scales):
        rows, columns = max(1, height >> k), max(1, width >> k)
        windows = pooling_windows(height, rows), pooling_windows(width, columns)
        for i, j in np.ndindex(rows, columns):
            yield k, (i, j), windows[0][i], windows[1][j]


@cache
def _readers(cell, height, width, k, dtype):
    down = bilinear_taps(max(1, height >> k), height, dtype)
    across = bilinear_taps(max(1, width >> k), width, dtype)
    return [
        (i, j, v * h)
        for i, vertical in enumerate(down)
        for row, v in vertical
        if row == cell[0]
        for j, horizontal in enumerate(across)
        for column, h in horizontal
        if column == cell[1]
    ]


def consensus_map(a, b, scales, center=False, eps=1e-8):
    height, width = a.shape[2:]
    out, offset = np.zeros((a.shape[0], 1, height, width), a.dtype), 0.0
    for k, cell, rows, columns in _cells(height, width, scales):
        cosine = _cosine(_mean_of_window(a, rows, columns), _mean_of_window(b, rows, columns), center, eps)
        offset = max(offset, cosine.offset)
        for i, j, weight in _readers(cell, height, width, k, a.dtype.type):
            out[:, 0, i, j] += weight * cosine.value
    return Exact(out, scales, 1 + offset if center else None)


def consensus_map_gradients(a, b, grad, scales, center=False, eps=1e-8):
    height, width = a.shape[2:]
    da, db, da_size, db_size = (np.zeros_like(a) for _ in range(4))
    offset = 0.0
    for k, cell, rows, columns in _cells(height, width, scales):
        cosine = _cosine(_mean_of_window(a, rows, columns), _mean_of_window(b, rows, columns), center, eps)
        offset = max(offset, cosine.offset)
        arriving, arriving_size = np.zeros((2, a.shape[0], 1), a.dtype)
        for i, j, weight in _readers(cell, height, width, k, a.dtype.type):
            arriving += weight * grad[:, :, i, j]
            arriving_size += weight * abs(grad[:, :, i, j])
        area = (rows[1] - rows[0]) * (columns[1] - columns[0])
        for i in range(*rows):
            for j in range(*columns):
                da[:, :, i, j] += arriving * cosine.da / area
                db[:, :, i, j] += arriving * cosine.db / area
                da_size[:, :, i, j] += arriving_size * cosine.da_size / area
                db_size[:, :, i, j] += arriving_size * cosine.db_size / area
    spread = 1 + offset if center else None
    return [Exact(da, largest(da_size), spread), Exact(db, largest(db_size), spread)]


# -------------------------------------------------------------------------------------------- consensus_pool


def _pool(x, cmap):
    positions = x.shape[2] * x.shape[3]
    total, size = np.zeros(x.shape[:2], x.dtype), np.zeros(x.shape[:2], x.dtype)
    for i, j in np.ndindex(x.shape[2:]):
        weight = 1 if cmap is None else 1 + cmap[:, :, i, j]
        total += weight * x[:, :, i, j]
        size += (1 if cmap is None else 1 + abs(cmap[:, :, i, j])) * abs(x[:, :, i, j])
    return total / positions, size / positions


def _pool_gradients(x, cmap, grad, grad_size):
    """By x and cmap, for the gradient `grad` by the pooled features; `grad_size` is its own expression in absolutes."""
    positions = x.shape[2] * x.shape[3]
    dx, dx_size = np.zeros_like(x), np.zeros_like(x)
    dcmap, dcmap_size = np.zeros((2, x.shape[0], 1, *x.shape[2:]), x.dtype)
    for i, j in np.ndindex(x.shape[2:]):
        weight = 1 if cmap is None else 1 + cmap[:, :, i, j]
        dx[:, :, i, j] = weight * grad / positions
        dx_size[:, :, i, j] = (1 if cmap is None else 1 + abs(cmap[:, :, i, j])) * grad_size / positions
        dcmap[:, 0, i, j] = (grad * x[:, :, i, j]).sum(axis=1) / positions
        dcmap_size[:, 0, i, j] = (grad_size * abs(x[:, :, i, j])).sum(axis=1) / positions
    both = [Exact(dx, largest(dx_size)), Exact(dcmap, largest(dcmap_size))]
    return both[:1] if cmap is None else both


def consensus_pool(x, cmap=None):
    pooled, size = _pool(x, cmap)
    return Exact(pooled, largest(size))


def consensus_pool_gradients(x, cmap, grad):
    return _pool_gradients(x, cmap, grad, abs(grad))


def gated_consensus_pool(x, gates, cmap=None):
    pooled, size = _pool(x, cmap)
    value = np.concatenate([gate * pooled for gate in gates], axis=1)
    return Exact(value, largest(np.concatenate([abs(gate) * size for gate in gates], axis=1)))


def gated_consensus_pool_gradients(x, gates, cmap, grad):
    channels = x.shape[1]
    pooled, size = _pool(x, cmap)
    dgates, arriving, arriving_size = [], np.zeros_like(pooled), np.zeros_like(pooled)
    for g, gate in enumerate(gates):
        part = grad[:, g * channels : (g + 1) * channels]
        dgates.append(Exact(part * pooled, largest(abs(part) * size)))
        arriving += part * gate
        arriving_size += abs(part * gate)
    dx, *dcmap = _pool_gradients(x, cmap, arriving, arriving_size)
    return [dx, *dgates, *dcmap]


# ------------------------------------------------------------------------------------------ gated_projection


def gated_projection(x, gates, weight, bias=None):
    out, size = np.zeros((2, x.shape[0], weight.shape[0], *x.shape[2:]), x.dtype)
    for i, j in np.ndindex(x.shape[2:]):
        gated = np.concatenate([gate * x[:, :, i, j] for gate in gates], axis=1)
        out[:, :, i, j] = gated @ weight.T
        size[:, :, i, j] = abs(gated) @ abs(weight).T
    if bias is not None:
        out += bias[:, None, None]
        size += abs(bias)[:, None, None]
    return Exact(out, largest(size))


def gated_projection_gradients(x, gates, weight, bias, grad):
    channels = x.shape[1]
    dx, dx_size = np.zeros_like(x), np.zeros_like(x)
    dgates, dgates_size = np.zeros((2, len(gates), *gates[0].shape), x.dtype)
    dweight, dweight_size = np.zeros((2, *weight.shape), x.dtype)
    dbias, dbias_size = np.zeros((2, weight.shape[0]), x.dtype)
    for i, j in np.ndindex(x.shape[2:]):
        here, arriving = x[:, :, i, j], grad[:, :, i, j]
        gated = np.concatenate([gate * here for gate in gates], axis=1)
        dweight += arriving.T @ gated
        dweight_size += abs(arriving).T @ abs(gated)
        dbias += arriving.sum(axis=0)
        dbias_size += abs(arriving).sum(axis=0)
        for g, gate in enumerate(gates):
            block = weight[:, g * channels : (g + 1) * channels]
            back, back_size = arriving @ block, abs(arriving) @ abs(block)
            dx[:, :, i, j] += back * gate
            dx_size[:, :, i, j] += back_size * abs(gate)
            dgates[g] += back * here
            dgates_size[g] += back_size * abs(here)
    results = [Exact(dx, largest(dx_size))]
    results += [Exact(value, largest(size)) for value, size in zip(dgates, dgates_size, strict=True)]
    results.append(Exact(dweight, largest(dweight_size)))
    if bias is not None:
        results.append(Exact(dbias, largest(dbias_size)))
    return results


# ------------------------------------------------------------------------------------------------- the bound


def unit_roundoff(dtype):
    return torch.finfo(dtype).eps / 2


def smallest_subnormal(dtype):
    return torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps


def bound(exact, dtype, accumulation, rounded=None):
    """How far a result of `dtype` may be from `exact`, element by element.

    One rounding to the result's dtype, relative to the value itself, plus the roundings of the accumulation, relative
    to what was summed and not to what is left of it. `rounded` is the half dtype to which an operand may be rounded on
    the way: two such roundings, one for each factor. With `center=True` the mean that is taken off may be many
    deviations large. Its digits are lost, which `spread` counts, and a quarter of the roundings is enough for that."""
    roundings = 16 if exact.spread is None else 4 * exact.spread
    accumulated = roundings * unit_roundoff(accumulation) * exact.size
    if rounded is not None:
        accumulated += 2 * unit_roundoff(rounded) * exact.size
    with np.errstate(invalid="ignore"):
        return unit_roundoff(dtype) * abs(exact.value) + accumulated + smallest_subnormal(dtype)


def assert_close(fast, exact, allowed, what="result", may_spread=False):
    """`fast` (a tensor) is `exact` (an array) up to `allowed`, and NaN or infinite exactly where `exact` is.

    NaN and infinity are not told apart: which of the two an infinite input ends in depends on the order of a sum.
    Beyond the largest number of fast's dtype infinity is the rounded result. `may_spread` lets entries be NaN that are
    finite in `exact`, for ops in which an implementation may multiply a NaN by a weight of 0."""
    __tracebackhide__ = True
    assert tuple(fast.shape) == exact.shape, f"{what}: shape {tuple(fast.shape)}, exact {exact.shape}"
    got = array(fast).astype(exact.dtype)
    largest_number = torch.finfo(fast.dtype).max
    with np.errstate(invalid="ignore", over="ignore"):
        overflow_from = largest_number * (1 + exact.dtype.type(unit_roundoff(fast.dtype)) / 2)
        overflows = np.isinf(got) & (np.sign(got) == np.sign(exact)) & (abs(exact) + allowed >= overflow_from)
        good = (abs(got - exact) <= allowed) | overflows
        good = np.where(np.isfinite(exact), good | (may_spread & ~np.isfinite(got)), ~np.isfinite(got))
    if good.all():
        return
    bad = np.argwhere(~good)
    allowed = np.broadcast_to(allowed, exact.shape)
    lines = [f"{what}: {len(bad)} of {exact.size} elements are off ({str(fast.dtype).removeprefix('torch.')})"]
    for index in map(tuple, bad[:5]):
        error = abs(got[index] - exact[index])
        where = tuple(int(i) for i in index)
        lines.append(
            f"  {where}: got {got[index]:.9g}, exact {exact[index]:.9g}, off {error:.3g} > {allowed[index]:.3g}"
        )
    raise AssertionError("\n".join(lines))
