"""consensus_pool: one read of x; backward, one write of its gradient, and a read of x only where the map's gradient is
wanted."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from m3em_fast import reference
from m3em_fast.ops._cpu import Form
from m3em_fast.triton._launch import accumulation, blocks, launch, present, sizes_of, strides_of
from m3em_fast.triton._maps import offset, place, tile

# Tiles of channels that a program of the backward adds up: fewer sums for the second kernel.
TILES = 4


@triton.jit
def _weight(cmap, strides, row, column, inside, ACC: tl.constexpr):
    """One and the map of a sample."""
    return 1 + tl.load(cmap + offset(strides, 0, row, column), mask=inside, other=0.0).to(ACC)


@triton.jit(do_not_specialize_on_alignment=["x", "cmap"])
def _forward(
    x, cmap, out, x_strides, map_strides, C, P, W,
    ACC: tl.constexpr, LINE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """A program takes BLOCK_C channels of one sample."""
    chunks = (C + BLOCK_C - 1) // BLOCK_C
    n = (tl.program_id(0) // chunks).to(tl.int64)
    c = tl.program_id(0) % chunks * BLOCK_C + tl.arange(0, BLOCK_C)
    sums = tl.full([BLOCK_C, BLOCK_P], 0, ACC)
    for p0 in range(0, P, BLOCK_P):
        q = p0 + tl.arange(0, BLOCK_P)
        inside = (c < C)[:, None] & (q < P)[None, :]
        row, column = place(q, W, LINE)
        from_ = x + n * x_strides[0] + tile(x_strides, c.to(tl.int64), row, column)
        value = tl.load(from_, mask=inside, other=0.0).to(ACC)
        if cmap is not None:
            value *= _weight(cmap + n * map_strides[0], map_strides, row, column, q < P, ACC)[None, :]
        sums += value
    tl.store(out + n * C + c, tl.sum(sums, axis=1) / P, mask=c < C)


@triton.jit(do_not_specialize_on_alignment=["x", "cmap", "grad", "grad_x", "partial"])
def _backward(
    x, cmap, grad, grad_x, partial, x_strides, map_strides, to_strides, grad_n, grad_c, C, P, W,
    ACC: tl.constexpr, LINE: tl.constexpr, TILES: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """A program takes TILES times BLOCK_C channels of one sample. ``grad_x`` is made from the map, ``partial``
    (N, chunks, P), the chunks' sums for the map's gradient, from x: each where it is there."""
    chunks = (C + TILES * BLOCK_C - 1) // (TILES * BLOCK_C)
    n = (tl.program_id(0) // chunks).to(tl.int64)
    c0 = tl.program_id(0) % chunks * (TILES * BLOCK_C)
    for p0 in range(0, P, BLOCK_P):
        q = p0 + tl.arange(0, BLOCK_P)
        row, column = place(q, W, LINE)
        if grad_x is not None:
            weight = _weight(cmap + n * map_strides[0], map_strides, row, column, q < P, ACC)
        sums = tl.full([BLOCK_C, BLOCK_P], 0, ACC)
        for part in range(TILES):
            c = c0 + part * BLOCK_C + tl.arange(0, BLOCK_C)
            inside = (c < C)[:, None] & (q < P)[None, :]
            channel = c.to(tl.int64)
            given = tl.load(grad + n * grad_n + channel * grad_c, mask=c < C, other=0.0).to(ACC) / P
            if grad_x is not None:
                to = grad_x + n * to_strides[0] + tile(to_strides, channel, row, column)
                tl.store(to, given[:, None] * weight[None, :], mask=inside)
            if partial is not None:
                from_ = x + n * x_strides[0] + tile(x_strides, channel, row, column)
                sums += given[:, None] * tl.load(from_, mask=inside, other=0.0).to(ACC)
        if partial is not None:
            tl.store(partial + tl.program_id(0).to(tl.int64) * P + q, tl.sum(sums, axis=0), mask=q < P)


@triton.jit
def _finish(partial, grad_cmap, chunks, P, ACC: tl.constexpr, BLOCK_P: tl.constexpr):
    """The map's gradient: the chunks of one sample in their order."""
    parts = (P + BLOCK_P - 1) // BLOCK_P
    n = (tl.program_id(0) // parts).to(tl.int64)
    q = tl.program_id(0) % parts * BLOCK_P + tl.arange(0, BLOCK_P)
    total = tl.full([BLOCK_P], 0, ACC)
    for chunk in range(chunks):
        total += tl.load(partial + (n * chunks + chunk) * P + q, mask=q < P, other=0.0)
    tl.store(grad_cmap + n * P + q, total, mask=q < P)


def forward(x: Tensor, cmap: Tensor | None, out: Tensor) -> None:
    """The means into contiguous memory (N,C) of any dtype."""
    n, c, h, w = x.shape
    strides, line = strides_of(x, cmap)
    sizes = sizes_of("consensus_pool", x, x.dtype, c, h * w)
    launch(
        _forward, n * blocks(c, sizes["BLOCK_C"]), [out],
        x, cmap, out, *strides, c, h * w, w, ACC=accumulation(x.dtype), LINE=line, **sizes,
    )  # fmt: skip


def backward(
    x: Tensor | Form, cmap: Tensor | Form, grad: Tensor, grad_x: Tensor | None, grad_cmap: Tensor | None
) -> None:
    """The gradients that are there: without a map there is no kernel to run. ``grad_cmap`` is contiguous."""
    n, c, h, w = x.shape
    sizes, acc = sizes_of("consensus_pool_backward", grad, x.dtype, c, h * w), accumulation(x.dtype)
    chunks = blocks(c, TILES * sizes["BLOCK_C"])
    partial = grad_cmap
    if grad_cmap is not None and chunks > 1:
        partial = grad.new_empty((n, chunks, h * w), dtype=reference.accumulation_dtype(x.dtype))
    read, weights = None if grad_cmap is None else present(x), None if grad_x is None else present(cmap)
    strides, line = strides_of(read, weights, grad_x)
    launch(
        _backward, n * chunks, [grad_x, partial],
        read, weights, grad, grad_x, partial, *strides, *grad.stride(), c, h * w, w,
        ACC=acc, LINE=line, TILES=TILES, **sizes,
    )  # fmt: skip
    if grad_cmap is not None and partial is not grad_cmap:
        block = sizes["BLOCK_P"]
        launch(
            _finish, n * blocks(h * w, block), [grad_cmap],
            partial, grad_cmap, chunks, h * w, ACC=acc, BLOCK_P=block,
        )  # fmt: skip
