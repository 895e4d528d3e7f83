"""The scales of consensus_map: which positions a cell pools, and which cells the upsampling of a position reads.

A *cell* is a position of some scale; scale 0 has the map's own positions, whose windows are one position large. torch's
windows: of ROWS cells in a line of H, cell i holds the positions from ``i·H // ROWS`` up to ``ceil((i+1)·H / ROWS)``.
Where ROWS does not divide H they overlap, so that two of them may hold a position.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Arguments that are no reason to compile once more: strides of N, which one sample may have as it likes, and whether an
# address is a multiple of 16, which may differ from sample to sample.
STRIDES = ("a_n", "b_n", "g_n", "ga_n", "gb_n")
ADDRESSES = ("a", "b", "out", "grad", "grad_a", "grad_b", "partial", "stats", "factors")


@triton.jit
def divide(a, b):
    """a / b, rounded to nearest: a plain quotient of float32 is off by up to two units, and 0 for large divisors."""
    if a.dtype == tl.float64:
        return a / b
    else:
        return tl.div_rn(a, b)


@triton.jit
def root(x):
    """The square root, rounded to nearest."""
    if x.dtype == tl.float64:
        return tl.sqrt(x)
    else:
        return tl.sqrt_rn(x)


@triton.jit
def numbers(
    x, channel, known, c_stride, y_stride, x_stride, means, y, z, inside, W: tl.constexpr, CENTER: tl.constexpr,
    A: tl.constexpr,
):  # fmt: skip
    """[channels, positions] of the sample that begins at x, at rows y and columns z, less ``means`` with CENTER.

    0 where a channel is not ``known`` or a position not ``inside``.
    """
    row = x + channel.to(tl.int64)[:, None] * c_stride
    at = y.to(tl.int64) * y_stride + z.to(tl.int64) * x_stride
    value = tl.load(row + at[None, :], mask=known[:, None] & inside[None, :], other=0).to(A)
    if CENTER:
        value -= tl.load(means + y * W + z, mask=inside, other=0)[None, :]
    return value


@triton.jit
def pooled(
    x, channel, known, c_stride, y_stride, x_stride, means, i, j, live,
    H: tl.constexpr, W: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, CENTER: tl.constexpr, A: tl.constexpr,
):  # fmt: skip
    """Means over the windows of cells (i, j): [channels, cells]. Lanes take cells, and a loop their positions."""
    # The longest window.
    TALL: tl.constexpr = H // ROWS + (0 if H % ROWS == 0 else 1 if ROWS % (H % ROWS) == 0 else 2)
    WIDE: tl.constexpr = W // COLUMNS + (0 if W % COLUMNS == 0 else 1 if COLUMNS % (W % COLUMNS) == 0 else 2)
    top, bottom = i * H // ROWS, ((i + 1) * H + ROWS - 1) // ROWS
    left, right = j * W // COLUMNS, ((j + 1) * W + COLUMNS - 1) // COLUMNS
    total = tl.zeros([channel.shape[0], i.shape[0]], A)
    for tap in range(TALL * WIDE):
        y, z = top + tap // WIDE, left + tap % WIDE
        inside = (y < bottom) & (z < right) & live
        total += numbers(x, channel, known, c_stride, y_stride, x_stride, means, y, z, inside, W, CENTER, A)
    area = ((bottom - top) * (right - left)).to(A)
    return total * divide(tl.full([i.shape[0]], 1, A), area)[None, :]


@triton.jit
def pooled_cell(
    x, channel, known, c_stride, y_stride, x_stride, means, i, j,
    H: tl.constexpr, W: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, CENTER: tl.constexpr,
    BLOCK_T: tl.constexpr, A: tl.constexpr,
):  # fmt: skip
    """The same of one cell, [channels, 1]: lanes take the positions of its window."""
    TALL: tl.constexpr = H // ROWS + (0 if H % ROWS == 0 else 1 if ROWS % (H % ROWS) == 0 else 2)
    WIDE: tl.constexpr = W // COLUMNS + (0 if W % COLUMNS == 0 else 1 if COLUMNS % (W % COLUMNS) == 0 else 2)
    top, bottom = i * H // ROWS, ((i + 1) * H + ROWS - 1) // ROWS
    left, right = j * W // COLUMNS, ((j + 1) * W + COLUMNS - 1) // COLUMNS
    total = tl.zeros([channel.shape[0], BLOCK_T], A)
    for first in range(0, TALL * WIDE, BLOCK_T):
        tap = first + tl.arange(0, BLOCK_T)
        y, z = top + tap // WIDE, left + tap % WIDE
        inside = (y < bottom) & (z < right)
        total += numbers(x, channel, known, c_stride, y_stride, x_stride, means, y, z, inside, W, CENTER, A)
    area = (tl.zeros([1], tl.int32) + (bottom - top) * (right - left)).to(A)
    return (tl.sum(total, 1) * divide(tl.full([1], 1, A), area))[:, None]


@triton.jit
def tap_of(p, LENGTH: tl.constexpr, SIZE: tl.constexpr, A: tl.constexpr):
    """The first of the two cells that linear upsampling reads for a position, and the share of the second."""
    at = tl.maximum((2 * p + 1) * SIZE - LENGTH, 0)
    low = tl.minimum(at // (2 * LENGTH), SIZE - 1)
    share = divide((at - low * (2 * LENGTH)).to(A), (tl.zeros_like(at) + 2 * LENGTH).to(A))
    return low, tl.where(low == SIZE - 1, 0, share)


@triton.jit
def weight_of(p, cell, LENGTH: tl.constexpr, SIZE: tl.constexpr, A: tl.constexpr):
    """The weight with which the upsampling of a position reads a cell."""
    low, share = tap_of(p, LENGTH, SIZE, A)
    return tl.where(cell == low, 1 - share, tl.where(cell == low + 1, share, 0))


@triton.jit
def reader_of(i, LENGTH: tl.constexpr, SIZE: tl.constexpr, COUNT: tl.constexpr):
    """The first of COUNT positions among which are all that read cell i."""
    start = tl.maximum((2 * i - 1) * LENGTH - SIZE, 0) // (2 * SIZE)
    return tl.minimum(start, LENGTH - COUNT) if COUNT > 1 else i
