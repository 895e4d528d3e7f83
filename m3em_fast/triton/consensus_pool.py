"""consensus_pool: one read of x; backward, one write of its gradient, and a read of x only where the map's gradient is
wanted."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from m3em_fast import reference
from m3em_fast.ops._cpu import Form
from m3em_fast.triton._launch import accumulation, blocks, launch, present, sizes, strides_of

# Tiles of channels that a program of the backward adds up: fewer sums for the second kernel.
TILES = 4


@triton.jit(do_not_specialize_on_alignment=["x", "cmap"])
def _forward(
    x,
    cmap,
    out,
    C,
    P,
    W,
    x_n,
    x_c,
    x_h,
    x_w,
    map_n,
    map_c,
    map_h,
    map_w,
    ACC: tl.constexpr,
    LINE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """A program takes BLOCK_C channels of one sample."""
    chunks = (C + BLOCK_C - 1) // BLOCK_C
    n = (tl.program_id(0) // chunks).to(tl.int64)
    c = tl.program_id(0) % chunks * BLOCK_C + tl.arange(0, BLOCK_C)
    sums = tl.full([BLOCK_C, BLOCK_P], 0, ACC)
    for p0 in range(0, P, BLOCK_P):
        q = p0 + tl.arange(0, BLOCK_P)
        if LINE:
            row = tl.full([BLOCK_P], 0, tl.int64)
            column = q.to(tl.int64)
        else:
            row = (q // W).to(tl.int64)
            column = (q % W).to(tl.int64)
        from_ = x + n * x_n + c.to(tl.int64)[:, None] * x_c + (row * x_h + column * x_w)[None, :]
        value = tl.load(from_, mask=(c < C)[:, None] & (q < P)[None, :], other=0.0).to(ACC)
        if cmap is not None:
            weight = tl.load(cmap + n * map_n + row * map_h + column * map_w, mask=q < P, other=0.0).to(ACC)
            value *= (1 + weight)[None, :]
        sums += value
    tl.store(out + n * C + c, tl.sum(sums, axis=1) / P, mask=c < C)


@triton.jit(do_not_specialize_on_alignment=["x", "cmap", "grad", "grad_x", "partial"])
def _backward(
    x,
    cmap,
    grad,
    grad_x,
    partial,
    C,
    P,
    W,
    x_n,
    x_c,
    x_h,
    x_w,
    map_n,
    map_c,
    map_h,
    map_w,
    to_n,
    to_c,
    to_h,
    to_w,
    grad_n,
    grad_c,
    ACC: tl.constexpr,
    LINE: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """A program takes TILES times BLOCK_C channels of one sample. ``partial`` (N, chunks, P) gets their sum for the
    map's gradient."""
    chunks = (C + TILES * BLOCK_C - 1) // (TILES * BLOCK_C)
    n = (tl.program_id(0) // chunks).to(tl.int64)
    c0 = tl.program_id(0) % chunks * (TILES * BLOCK_C)
    for p0 in range(0, P, BLOCK_P):
        q = p0 + tl.arange(0, BLOCK_P)
        if LINE:
            row = tl.full([BLOCK_P], 0, tl.int64)
            column = q.to(tl.int64)
        else:
            row = (q // W).to(tl.int64)
            column = (q % W).to(tl.int64)
        weight = tl.full([BLOCK_P], 1.0, ACC)
        if cmap is not None:
            weight += tl.load(cmap + n * map_n + row * map_h + column * map_w, mask=q < P, other=0.0).to(ACC)
        sums = tl.full([BLOCK_C, BLOCK_P], 0, ACC)
        for tile in range(TILES):
            c = c0 + tile * BLOCK_C + tl.arange(0, BLOCK_C)
            inside = (c < C)[:, None] & (q < P)[None, :]
            across = c.to(tl.int64)
            given = tl.load(grad + n * grad_n + across * grad_c, mask=c < C, other=0.0).to(ACC) / P
            if grad_x is not None:
                to = grad_x + n * to_n + across[:, None] * to_c + (row * to_h + column * to_w)[None, :]
                tl.store(to, given[:, None] * weight[None, :], mask=inside)
            if partial is not None:
                from_ = x + n * x_n + across[:, None] * x_c + (row * x_h + column * x_w)[None, :]
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
    tile = sizes("consensus_pool", x, x.dtype, c, h * w)
    strides, line = strides_of(x, cmap)
    launch(
        _forward,
        n * blocks(c, tile["BLOCK_C"]),
        [out],
        x,
        cmap,
        out,
        c,
        h * w,
        w,
        *strides,
        ACC=accumulation(x.dtype),
        LINE=line,
        **tile,
    )


def backward(
    x: Tensor | Form, cmap: Tensor | Form | None, grad: Tensor, grad_x: Tensor | None, grad_cmap: Tensor | None
) -> None:
    """The gradients that are there. ``grad_cmap`` is contiguous."""
    n, c, h, w = x.shape
    tile = sizes("consensus_pool_backward", grad, x.dtype, c, h * w)
    chunks = blocks(c, TILES * tile["BLOCK_C"])
    partial = grad_cmap
    if grad_cmap is not None and chunks > 1:
        partial = grad.new_empty((n, chunks, h * w), dtype=reference.accumulation_dtype(x.dtype))
    read, weights = None if grad_cmap is None else present(x), None if grad_x is None else present(cmap)
    strides, line = strides_of(read, weights, grad_x)
    accumulated = accumulation(x.dtype)
    launch(
        _backward,
        n * chunks,
        [grad_x, partial],
        read,
        weights,
        grad,
        grad_x,
        partial,
        c,
        h * w,
        w,
        *strides,
        *grad.stride(),
        ACC=accumulated,
        LINE=line,
        TILES=TILES,
        **tile,
    )
    if grad_cmap is not None and partial is not grad_cmap:
        block = tile["BLOCK_P"]
        launch(
            _finish,
            n * blocks(h * w, block),
            [grad_cmap],
            partial,
            grad_cmap,
            chunks,
            h * w,
            ACC=accumulated,
            BLOCK_P=block,
        )
