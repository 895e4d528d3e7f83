"""consensus_map in Triton: all scales in one pass over a and b. The readable twin of csrc/cuda/consensus_map.cu.

Forward: a program takes a chunk of the channels of one sample and adds up a·b, a·a and b·b for every cell of every
scale (``_partial``); a second kernel adds the chunks in their order, takes the cosines and upsamples (``_finish``).
Backward: the gradient of the result goes through the transpose of the upsampling to every cell's cosine and becomes
three factors there (``_factors``); then a program takes a few channels of a block of positions of one sample and adds
up what all cells pass on to them (``_backward``):

    d cos / d a  =  inv · b - ratio_a · a,     inv = 1 / (|a| |b|),  ratio_a = cos / |a|².

Each number of a and b comes from memory once. A program reads it again for every scale that pools it, a few thousand
numbers after the first time, out of a cache. How the work is split depends on D, H, W and the dtype alone, every sum
has one order, and there are no atomics. No kernel is compiled anew for how an address is aligned: that would change
orders.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from m3em_fast.ops._cuda import gradients_of
from m3em_fast.reference import accumulation_dtype
from m3em_fast.triton._consensus_map_backward import _backward, _factors
from m3em_fast.triton._launch import capability_of, launch
from m3em_fast.triton._plan import Plan, plan, stats_size
from m3em_fast.triton._scales import ADDRESSES, STRIDES, divide, pooled, pooled_cell, root, tap_of

__all__ = ["backward", "form", "forward"]


@triton.jit
def _partial_of_scale(
    a, b, to, a_c, a_y, a_x, b_c, b_y, b_x, c0, c1, first, end,
    H: tl.constexpr, W: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, CELLS: tl.constexpr,
    CENTER: tl.constexpr, BLOCK_C: tl.constexpr, LOG_Q: tl.constexpr, LOG_T: tl.constexpr,
):  # fmt: skip
    """Sums over channels c0 .. c1 for cells first .. end of one scale, to ``to[CELLS]`` and the rows behind it."""
    A: tl.constexpr = to.dtype.element_ty
    BLOCK_Q: tl.constexpr = 1 << LOG_Q
    for start in range(first, end, BLOCK_Q):
        cell = start + tl.arange(0, BLOCK_Q)
        live = cell < end
        # Lane by lane, of the channels that a lane has met: with CENTER their means, and sums over deviations from them
        # (Welford). A mean taken off a sum afterwards would lose the digits where it is large.
        ab = tl.zeros([BLOCK_C, BLOCK_Q], A)
        aa = tl.zeros([BLOCK_C, BLOCK_Q], A)
        bb = tl.zeros([BLOCK_C, BLOCK_Q], A)
        mean_a = tl.zeros([BLOCK_C, BLOCK_Q], A)
        mean_b = tl.zeros([BLOCK_C, BLOCK_Q], A)
        lane = tl.arange(0, BLOCK_C)
        met = tl.zeros([BLOCK_C], A)
        for c in range(c0, c1, BLOCK_C):
            known = c + lane < c1
            if LOG_Q > 0:
                i, j = cell // COLUMNS, cell % COLUMNS
                va = pooled(a, c + lane, known, a_c, a_y, a_x, a, i, j, live, H, W, ROWS, COLUMNS, False, A)
                vb = pooled(b, c + lane, known, b_c, b_y, b_x, b, i, j, live, H, W, ROWS, COLUMNS, False, A)
            else:
                i, j = start // COLUMNS, start % COLUMNS
                va = pooled_cell(a, c + lane, known, a_c, a_y, a_x, a, i, j, H, W, ROWS, COLUMNS, False, 1 << LOG_T, A)
                vb = pooled_cell(b, c + lane, known, b_c, b_y, b_x, b, i, j, H, W, ROWS, COLUMNS, False, 1 << LOG_T, A)
            if CENTER:
                met += known.to(A)
                part = tl.where(known, divide(tl.full([BLOCK_C], 1, A), tl.maximum(met, 1)), 0)[:, None]
                da = tl.where(known[:, None], va - mean_a, 0)
                db = tl.where(known[:, None], vb - mean_b, 0)
                mean_a += da * part
                mean_b += db * part
                va = tl.where(known[:, None], va - mean_a, 0)
                vb = tl.where(known[:, None], vb - mean_b, 0)
                ab += da * vb
                aa += da * va
                bb += db * vb
            else:
                ab += va * vb
                aa += va * va
                bb += vb * vb
        at = to + cell
        if CENTER:
            # The lanes together (Chan): of every lane the distance of its mean from the mean of all of them.
            count = met[:, None]
            every = (c1 - c0).to(A)
            all_a = divide(tl.sum(mean_a * count, 0), every + tl.zeros([BLOCK_Q], A))
            all_b = divide(tl.sum(mean_b * count, 0), every + tl.zeros([BLOCK_Q], A))
            da = tl.where(count > 0, mean_a - all_a[None, :], 0)
            db = tl.where(count > 0, mean_b - all_b[None, :], 0)
            ab += da * db * count
            aa += da * da * count
            bb += db * db * count
            tl.store(at + 3 * CELLS, all_a, mask=live)
            tl.store(at + 4 * CELLS, all_b, mask=live)
        tl.store(at, tl.sum(ab, 0), mask=live)
        tl.store(at + CELLS, tl.sum(aa, 0), mask=live)
        tl.store(at + 2 * CELLS, tl.sum(bb, 0), mask=live)


@triton.jit(do_not_specialize=STRIDES, do_not_specialize_on_alignment=ADDRESSES)
def _partial(
    a, b, partial, a_n, a_c, a_y, a_x, b_n, b_c, b_y, b_x, d, chunk, chunks,
    H: tl.constexpr, W: tl.constexpr, SCALES: tl.constexpr, BANDS: tl.constexpr, LOG_Q: tl.constexpr,
    LOG_T: tl.constexpr, CELLS: tl.constexpr, CENTER: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Of one chunk of channels of one sample, and of one of the BANDS of rows into which every scale is cut.

    Leaves ``partial[n, chunk, sum, cell]``: a·b, a·a, b·b, and with CENTER both means.
    """
    program = tl.program_id(0)
    band, program = program % BANDS, program // BANDS
    n = (program // chunks).to(tl.int64)
    to = partial + program.to(tl.int64) * ((5 if CENTER else 3) * CELLS)
    c0 = program % chunks * chunk
    c1 = tl.minimum(c0 + chunk, d)
    first = 0
    for k in tl.static_range(SCALES):
        rows = (H >> k) if (H >> k) > 1 else 1
        columns = (W >> k) if (W >> k) > 1 else 1
        _partial_of_scale(
            a + n * a_n, b + n * b_n, to + first, a_c, a_y, a_x, b_c, b_y, b_x, c0, c1,
            band * rows // BANDS * columns, (band + 1) * rows // BANDS * columns,
            H, W, (H >> k) if (H >> k) > 1 else 1, (W >> k) if (W >> k) > 1 else 1, CELLS, CENTER, BLOCK_C,
            (LOG_Q >> (4 * k)) & 15, (LOG_T >> (4 * k)) & 15,
        )  # fmt: skip
        first += rows * columns


@triton.jit
def _summed(partial, cell, live, d, chunk, chunks, CELLS: tl.constexpr, CENTER: tl.constexpr):
    """The sums of cells over all chunks, in their order: a·b, a·a, b·b, and with CENTER both means."""
    ab = tl.load(partial + cell, mask=live, other=0)
    aa = tl.load(partial + CELLS + cell, mask=live, other=0)
    bb = tl.load(partial + 2 * CELLS + cell, mask=live, other=0)
    mean_a, mean_b = ab, ab
    if CENTER:
        mean_a = tl.load(partial + 3 * CELLS + cell, mask=live, other=0)
        mean_b = tl.load(partial + 4 * CELLS + cell, mask=live, other=0)
    for i in range(1, chunks):
        partial += (5 if CENTER else 3) * CELLS
        ab += tl.load(partial + cell, mask=live, other=0)
        aa += tl.load(partial + CELLS + cell, mask=live, other=0)
        bb += tl.load(partial + 2 * CELLS + cell, mask=live, other=0)
        if CENTER:
            before = i * chunk
            more = tl.minimum(chunk, d - before)
            part = divide(more.to(ab.dtype), (before + more).to(ab.dtype))
            da = tl.load(partial + 3 * CELLS + cell, mask=live, other=0) - mean_a
            db = tl.load(partial + 4 * CELLS + cell, mask=live, other=0) - mean_b
            ab += da * db * (before * part)
            aa += da * da * (before * part)
            bb += db * db * (before * part)
            mean_a += da * part
            mean_b += db * part
    return ab, aa, bb, mean_a, mean_b


@triton.jit
def _small(aa, bb, EPS: tl.constexpr):
    """Where a norm is below eps. A NaN or an infinity in one map is no small norm, however small the other map is."""
    eps = tl.full([1], EPS, aa.dtype)  # a number of that dtype, whatever the dtype of a literal is
    small = (root(aa) < eps) | (root(bb) < eps)
    return small & (tl.abs(aa) < float("inf")) & (tl.abs(bb) < float("inf"))


@triton.jit(do_not_specialize_on_alignment=ADDRESSES)
def _finish(
    partial, out, stats, d, chunk, chunks,
    H: tl.constexpr, W: tl.constexpr, SCALES: tl.constexpr, CELLS: tl.constexpr,
    CENTER: tl.constexpr, EPS: tl.constexpr, SAVES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of BLOCK cells of one sample: the numbers that the backward will need; and the result where they are positions.

    A position takes the cosines of its cells from ``partial`` anew: they are few, and no program waits for another one.
    """
    BLOCKS: tl.constexpr = (CELLS + BLOCK - 1) // BLOCK
    A: tl.constexpr = partial.dtype.element_ty
    program = tl.program_id(0)
    n = (program // BLOCKS).to(tl.int64)
    cell = program % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    live = cell < CELLS
    partial += n * chunks * ((5 if CENTER else 3) * CELLS)
    ab, aa, bb, mean_a, mean_b = _summed(partial, cell, live, d, chunk, chunks, CELLS, CENTER)
    small = _small(aa, bb, EPS)
    norms = tl.where(small, 1, root(aa) * root(bb))
    value = tl.where(small, 0, divide(ab, norms))
    position = cell < H * W
    if SAVES:
        to = stats + n * (3 * CELLS + (2 * H * W if CENTER else 0)) + cell
        tl.store(to, tl.where(small, 0, divide(tl.full([BLOCK], 1, A), norms)), mask=live)
        tl.store(to + CELLS, tl.where(small, 0, divide(value, aa)), mask=live)
        tl.store(to + 2 * CELLS, tl.where(small, 0, divide(value, bb)), mask=live)
        if CENTER:
            tl.store(to + 3 * CELLS, mean_a, mask=position)
            tl.store(to + 3 * CELLS + H * W, mean_b, mask=position)
    first = H * W
    for k in tl.static_range(1, SCALES):
        value += _upsampled(
            partial, cell, position, first, d, chunk, chunks,
            H, W, (H >> k) if (H >> k) > 1 else 1, (W >> k) if (W >> k) > 1 else 1, CELLS, CENTER, EPS,
        )  # fmt: skip
        first += ((H >> k) if (H >> k) > 1 else 1) * ((W >> k) if (W >> k) > 1 else 1)
    tl.store(out + n * (H * W) + cell, value, mask=position)


@triton.jit
def _upsampled(
    partial, p, live, first, d, chunk, chunks,
    H: tl.constexpr, W: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    CELLS: tl.constexpr, CENTER: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    """What one scale, whose cells begin at ``first``, adds to the positions p."""
    A: tl.constexpr = partial.dtype.element_ty
    i, below = tap_of(p // W, H, ROWS, A)
    j, beside = tap_of(p % W, W, COLUMNS, A)
    total = tl.zeros([p.shape[0]], A)
    for tap in range(4):
        weight = tl.where(tap < 2, 1 - below, below) * tl.where(tap % 2 == 0, 1 - beside, beside)
        # A cell of weight 0 has no part in the position, and its NaN neither.
        read = live & (weight > 0)
        cell = first + (i + tap // 2) * COLUMNS + j + tap % 2
        ab, aa, bb, _, _ = _summed(partial, cell, read, d, chunk, chunks, CELLS, CENTER)
        small = _small(aa, bb, EPS)
        cosine = divide(ab, tl.where(small, 1, root(aa) * root(bb)))
        total += tl.where(read & (small == 0), weight * cosine, 0)
    return total


def _plan(x: Tensor, options: tuple) -> Plan:
    scales, center, eps, _ = options
    _, d, h, w = x.shape
    return plan(x.dtype, d, h, w, scales, center, eps, capability_of(x))


def forward(options: tuple, tensors: tuple[Any, ...], saves: bool) -> tuple[Tensor, Sequence[Tensor]]:
    """The result, and what the backward will need.

    Args:
        options: (num_scales, center, eps, dtype of the result).
        tensors: a, b (N,D,H,W) on one card, in any layout.
        saves: whether there will be a backward.

    Returns:
        (N,1,H,W), row-major; and with ``saves`` one tensor of the accumulation dtype, (N, 3·cells) or with center=True
        (N, 3·cells + 2·H·W): of all cells 1 / (|a| |b|), of all cells cos / |a|², of all cells cos / |b|², each 0 where
        a cell is dead; then the means over channels of a, and of b.
    """
    a, b = tensors
    n, d, h, w = a.shape
    how = _plan(a, options)
    accumulation = accumulation_dtype(a.dtype)
    out = a.new_empty((n, 1, h, w), dtype=options[3])
    saved = [a.new_empty((n, how.stats), dtype=accumulation)] if saves else []
    partial = a.new_empty((n, how.sums), dtype=accumulation)
    launch(
        _partial, n * how.partial_programs, [partial],
        a, b, partial, *a.stride(), *b.stride(), d, how.chunk, how.chunks, **how.partial,
    )  # fmt: skip
    stats = saved[0] if saves else partial
    launch(
        _finish, n * how.finish_programs, [out, *saved],
        partial, out, stats, d, how.chunk, how.chunks, SAVES=saves, **how.finish,
    )  # fmt: skip
    return out, saved


def backward(
    options: tuple, grad: Tensor, tensors: tuple[Any, ...], saved: Sequence[Tensor], needs: Sequence[bool]
) -> Sequence[Tensor | None]:
    """The gradients by a and b, None where ``needs`` is False.

    Args:
        options, tensors, saved: those of the forward.
        grad: (N,1,H,W) with any strides, in the dtype of the result.
        needs: of a and of b.
    """
    a, b = tensors
    n, d, _, _ = a.shape
    how = _plan(a, options)
    grads = gradients_of(grad, tensors, needs)
    stats = saved[0]
    factors = stats.new_empty((n, 3 * how.cells))
    g_n, _, g_y, g_x = grad.stride()
    launch(_factors, n, [factors], grad, stats, factors, g_n, g_y, g_x, **how.factors)
    to_a, to_b = (a if g is None else g for g in grads)
    launch(
        _backward, n * how.backward_programs, grads,
        a, b, to_a, to_b, stats, factors, *a.stride(), *b.stride(), *to_a.stride(), *to_b.stride(),
        d, how.backward_chunks, NEED_A=needs[0], NEED_B=needs[1], **how.backward,
    )  # fmt: skip
    return grads


def form(options: tuple, tensors: tuple[Any, ...]) -> tuple[Tensor, Sequence[Tensor]]:
    """What a forward that saves returns, in memory that nothing is written to."""
    a, _ = tensors
    scales, center, _, out_dtype = options
    n, _, h, w = a.shape
    stats = a.new_empty((n, stats_size(h, w, scales, center)), dtype=accumulation_dtype(a.dtype))
    return a.new_empty((n, 1, h, w), dtype=out_dtype), (stats,)
