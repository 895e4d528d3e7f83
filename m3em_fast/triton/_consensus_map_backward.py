"""The kernels of consensus_map's backward; consensus_map.py says what they do."""

from __future__ import annotations

import triton
import triton.language as tl

from m3em_fast.triton._scales import ADDRESSES, STRIDES, divide, numbers, pooled, pooled_cell, reader_of, weight_of


@triton.jit(do_not_specialize=STRIDES, do_not_specialize_on_alignment=ADDRESSES)
def _factors(
    grad, stats, factors, g_n, g_y, g_x,
    H: tl.constexpr, W: tl.constexpr, SCALES: tl.constexpr, LOG_Q: tl.constexpr,
    LOG_T: tl.constexpr, CELLS: tl.constexpr, CENTER: tl.constexpr,
):  # fmt: skip
    """Of one sample: the gradient of every cell's cosine times the three numbers that the forward left.

    Leaves ``factors[n, 3, cell]``, for the way back through the pooling divided by the area of the window.
    """
    n = tl.program_id(0).to(tl.int64)
    stats += n * (3 * CELLS + (2 * H * W if CENTER else 0))
    first = 0
    for k in tl.static_range(SCALES):
        _factors_of_scale(
            grad + n * g_n, stats + first, factors + n * (3 * CELLS) + first, g_y, g_x,
            H, W, (H >> k) if (H >> k) > 1 else 1, (W >> k) if (W >> k) > 1 else 1, CELLS,
            1 << ((LOG_Q >> (4 * k)) & 15), 1 << ((LOG_T >> (4 * k)) & 15),
        )  # fmt: skip
        first += ((H >> k) if (H >> k) > 1 else 1) * ((W >> k) if (W >> k) > 1 else 1)


@triton.jit
def _factors_of_scale(
    grad, stats, to, g_y, g_x,
    H: tl.constexpr, W: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, CELLS: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    A: tl.constexpr = stats.dtype.element_ty
    # The positions that may read a cell: from the centre of the cell before it to that of the cell behind it.
    TALL: tl.constexpr = 1 if ROWS == H else (H if 2 * H // ROWS + 2 > H else 2 * H // ROWS + 2)
    WIDE: tl.constexpr = 1 if COLUMNS == W else (W if 2 * W // COLUMNS + 2 > W else 2 * W // COLUMNS + 2)
    for start in range(0, ROWS * COLUMNS, BLOCK_Q):
        cell = start + tl.arange(0, BLOCK_Q)
        live = cell < ROWS * COLUMNS
        i, j = cell // COLUMNS, cell % COLUMNS
        top = reader_of(i, H, ROWS, TALL)
        left = reader_of(j, W, COLUMNS, WIDE)
        total = tl.zeros([BLOCK_Q, BLOCK_T], A)
        for tap in range(0, TALL * WIDE, BLOCK_T):
            at = tap + tl.arange(0, BLOCK_T)
            y = top[:, None] + (at // WIDE)[None, :]
            x = left[:, None] + (at % WIDE)[None, :]
            weight = weight_of(y, i[:, None], H, ROWS, A) * weight_of(x, j[:, None], W, COLUMNS, A)
            read = live[:, None] & (at < TALL * WIDE)[None, :] & (weight > 0)
            value = tl.load(grad + y.to(tl.int64) * g_y + x.to(tl.int64) * g_x, mask=read, other=0).to(A)
            total += tl.where(read, weight * value, 0)
        area = (((i + 1) * H + ROWS - 1) // ROWS - i * H // ROWS) * (
            ((j + 1) * W + COLUMNS - 1) // COLUMNS - j * W // COLUMNS
        )
        arriving = divide(tl.sum(total, 1), area.to(A))
        inverse = tl.load(stats + cell, mask=live, other=0)
        ratio_a = tl.load(stats + CELLS + cell, mask=live, other=0)
        ratio_b = tl.load(stats + 2 * CELLS + cell, mask=live, other=0)
        # A dead cell passes nothing on, not even of a gradient that is infinite.
        dead = (inverse == 0) & (ratio_a == 0) & (ratio_b == 0)
        tl.store(to + cell, tl.where(dead, 0, arriving * inverse), mask=live)
        tl.store(to + CELLS + cell, tl.where(dead, 0, arriving * ratio_a), mask=live)
        tl.store(to + 2 * CELLS + cell, tl.where(dead, 0, arriving * ratio_b), mask=live)


@triton.jit(do_not_specialize=STRIDES, do_not_specialize_on_alignment=ADDRESSES)
def _backward(
    a, b, grad_a, grad_b, stats, factors,
    a_n, a_c, a_y, a_x, b_n, b_c, b_y, b_x, ga_n, ga_c, ga_y, ga_x, gb_n, gb_c, gb_y, gb_x, d, chunks,
    H: tl.constexpr, W: tl.constexpr, SCALES: tl.constexpr, LOG_T: tl.constexpr, CELLS: tl.constexpr,
    CENTER: tl.constexpr, NEED_A: tl.constexpr, NEED_B: tl.constexpr, SPAN: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Both gradients, of BLOCK_C channels of one sample and of a block of positions: as many rows as fit, or a part of
    one."""
    A: tl.constexpr = factors.dtype.element_ty
    LINES: tl.constexpr = BLOCK_P // SPAN
    program = tl.program_id(0)
    left, program = program % ((W + SPAN - 1) // SPAN) * SPAN, program // ((W + SPAN - 1) // SPAN)
    top, program = program % ((H + LINES - 1) // LINES) * LINES, program // ((H + LINES - 1) // LINES)
    n = (program // chunks).to(tl.int64)
    channel = program % chunks * BLOCK_C + tl.arange(0, BLOCK_C)
    known = channel < d
    lane = tl.arange(0, BLOCK_P)
    y, x = top + lane // SPAN, left + lane % SPAN
    live = (lane < LINES * SPAN) & (y < H) & (x < W)
    a += n * a_n
    b += n * b_n
    means = stats + n * (3 * CELLS + (2 * H * W if CENTER else 0)) + 3 * CELLS
    factors += n * (3 * CELLS)
    p = y * W + x
    va = numbers(a, channel, known, a_c, a_y, a_x, means, y, x, live, W, CENTER, A)
    vb = numbers(b, channel, known, b_c, b_y, b_x, means + H * W, y, x, live, W, CENTER, A)
    sum_a, sum_b = _passed_on(va, vb, factors + p, live, CELLS)
    factors += H * W
    for k in tl.static_range(1, SCALES):
        sum_a, sum_b = _passed_on_by_scale(
            sum_a, sum_b, a, b, means, factors, a_c, a_y, a_x, b_c, b_y, b_x, channel, known, top, left, y, x, live,
            H, W, (H >> k) if (H >> k) > 1 else 1, (W >> k) if (W >> k) > 1 else 1, LINES, SPAN, CELLS, CENTER,
            (LOG_T >> (4 * k)) & 15,
        )  # fmt: skip
        factors += ((H >> k) if (H >> k) > 1 else 1) * ((W >> k) if (W >> k) > 1 else 1)
    written = known[:, None] & live[None, :]
    c, y, x = channel.to(tl.int64)[:, None], y.to(tl.int64)[None, :], x.to(tl.int64)[None, :]
    if NEED_A:
        tl.store(grad_a + n * ga_n + c * ga_c + y * ga_y + x * ga_x, sum_a, mask=written)
    if NEED_B:
        tl.store(grad_b + n * gb_n + c * gb_c + y * gb_y + x * gb_x, sum_b, mask=written)


@triton.jit
def _passed_on(va, vb, factors, live, CELLS: tl.constexpr):
    """What cells pass on to each position of their windows, by a and by b: [channels, cells]."""
    inverse = tl.load(factors, mask=live, other=0)[None, :]
    ratio_a = tl.load(factors + CELLS, mask=live, other=0)[None, :]
    ratio_b = tl.load(factors + 2 * CELLS, mask=live, other=0)[None, :]
    return inverse * vb - ratio_a * va, inverse * va - ratio_b * vb


@triton.jit
def _passed_on_by_scale(
    sum_a, sum_b, a, b, means, factors, a_c, a_y, a_x, b_c, b_y, b_x, channel, known, top, left, y, x, live,
    H: tl.constexpr, W: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    LINES: tl.constexpr, SPAN: tl.constexpr, CELLS: tl.constexpr, CENTER: tl.constexpr, LOG_T: tl.constexpr,
):  # fmt: skip
    """The sums of a block of positions (y, x), and what the cells of one scale pass on to it."""
    A: tl.constexpr = factors.dtype.element_ty
    if (H % ROWS == 0 and W % COLUMNS == 0) and H * W <= 4 * ROWS * COLUMNS:
        # One cell holds a position, and its window is small: every position makes its cell's means itself.
        i, j = y * ROWS // H, x * COLUMNS // W
        va = pooled(a, channel, known, a_c, a_y, a_x, means, i, j, live, H, W, ROWS, COLUMNS, CENTER, A)
        vb = pooled(b, channel, known, b_c, b_y, b_x, means + H * W, i, j, live, H, W, ROWS, COLUMNS, CENTER, A)
        from_a, from_b = _passed_on(va, vb, factors + i * COLUMNS + j, live, CELLS)
        sum_a += from_a
        sum_b += from_b
    else:
        # One cell after another, of those that hold positions of the block.
        bottom, right = tl.minimum(top + LINES, H), tl.minimum(left + SPAN, W)
        for i in range(top * ROWS // H, (bottom * ROWS + H - 1) // H):
            for j in range(left * COLUMNS // W, (right * COLUMNS + W - 1) // W):
                va = pooled_cell(
                    a, channel, known, a_c, a_y, a_x, means, i, j, H, W, ROWS, COLUMNS, CENTER, 1 << LOG_T, A
                )
                vb = pooled_cell(
                    b, channel, known, b_c, b_y, b_x, means + H * W, i, j, H, W, ROWS, COLUMNS, CENTER, 1 << LOG_T, A
                )
                lane = tl.arange(0, 1)
                from_a, from_b = _passed_on(va, vb, factors + i * COLUMNS + j + lane, lane == 0, CELLS)
                held = (y * ROWS < (i + 1) * H) & ((y + 1) * ROWS > i * H)
                held = held & (x * COLUMNS < (j + 1) * W) & ((x + 1) * COLUMNS > j * W)
                sum_a += tl.where(held[None, :], from_a, 0)
                sum_b += tl.where(held[None, :], from_b, 0)
    return sum_a, sum_b
