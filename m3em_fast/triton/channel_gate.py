"""channel_gate: one read of x, one write of every gated copy; backward, one read of x and of the copies' gradients."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from m3em_fast.ops._cpu import Form, is_channels_last
from m3em_fast.triton._launch import accumulation, blocks, launch, present, sizes, strides_of
from m3em_fast.triton._table import power_of_two


@triton.jit
def _forward(
    x,
    gates,
    out,
    size,
    C,
    P,
    W,
    x_n,
    x_c,
    x_h,
    x_w,
    out_n,
    out_c,
    out_h,
    out_w,
    out_copy,
    gate_n,
    gate_c,
    G: tl.constexpr,
    ACC: tl.constexpr,
    DENSE: tl.constexpr,
    ACROSS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program takes a block of the numbers of one sample, in the order of their memory: no sum is made, so that any
    width of access will do. ``DENSE``: x and each copy lie in memory as they are counted; ``ACROSS``: channels first.
    """
    parts = (size + BLOCK - 1) // BLOCK
    n = (tl.program_id(0) // parts).to(tl.int64)
    i = tl.program_id(0) % parts * BLOCK + tl.arange(0, BLOCK)
    inside = i < size
    if ACROSS:
        q = i // C
        c = i - q * C
    else:
        c = i // P
        q = i - c * P
    if DENSE:
        from_ = i
        to = i
    else:
        row = (q // W).to(tl.int64)
        column = (q % W).to(tl.int64)
        from_ = c.to(tl.int64) * x_c + row * x_h + column * x_w
        to = c.to(tl.int64) * out_c + row * out_h + column * out_w
    value = tl.load(x + n * x_n + from_, mask=inside, other=0.0).to(ACC)
    for g in tl.static_range(G):
        gate = tl.load(gates[g] + n * gate_n[g] + c.to(tl.int64) * gate_c[g], mask=inside, other=0.0).to(ACC)
        tl.store(out + n * out_n + g * out_copy + to, value * gate, mask=inside)


@triton.jit(do_not_specialize_on_alignment=["x", "grad", "grad_x"])
def _backward(
    x,
    gates,
    grad,
    grad_x,
    grad_gates,
    C,
    P,
    W,
    x_n,
    x_c,
    x_h,
    x_w,
    grad_n,
    grad_c,
    grad_h,
    grad_w,
    to_n,
    to_c,
    to_h,
    to_w,
    grad_copy,
    gate_n,
    gate_c,
    G: tl.constexpr,
    MANY: tl.constexpr,
    ACC: tl.constexpr,
    LINE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """A program takes BLOCK_C channels of one sample and walks over their positions. ``MANY`` is a power of two, G at
    least."""
    chunks = (C + BLOCK_C - 1) // BLOCK_C
    n = (tl.program_id(0) // chunks).to(tl.int64)
    c = tl.program_id(0) % chunks * BLOCK_C + tl.arange(0, BLOCK_C)
    live = c < C
    across = c.to(tl.int64)[:, None]
    gate_of = tl.arange(0, MANY)[:, None]
    sums = tl.full([MANY, BLOCK_C], 0, ACC)
    for p0 in range(0, P, BLOCK_P):
        q = p0 + tl.arange(0, BLOCK_P)
        inside = live[:, None] & (q < P)[None, :]
        if LINE:
            row = tl.full([1, BLOCK_P], 0, tl.int64)
            column = q.to(tl.int64)[None, :]
        else:
            row = (q // W).to(tl.int64)[None, :]
            column = (q % W).to(tl.int64)[None, :]
        total = tl.full([BLOCK_C, BLOCK_P], 0, ACC)
        if x is not None:
            value = tl.load(x + n * x_n + across * x_c + row * x_h + column * x_w, mask=inside, other=0.0).to(ACC)
        from_ = grad + n * grad_n + across * grad_c + row * grad_h + column * grad_w
        for g in tl.static_range(G):
            given = tl.load(from_ + g * grad_copy, mask=inside, other=0.0).to(ACC)
            if grad_x is not None:
                gate = tl.load(gates[g] + n * gate_n[g] + c.to(tl.int64) * gate_c[g], mask=live, other=0.0).to(ACC)
                total += given * gate[:, None]
            if grad_gates[g] is not None:
                sums += tl.where(gate_of == g, tl.sum(given * value, axis=1)[None, :], 0.0)
        if grad_x is not None:
            to = grad_x + n * to_n + across * to_c + row * to_h + column * to_w
            tl.store(to, total, mask=inside)
    for g in tl.static_range(G):
        if grad_gates[g] is not None:
            tl.store(grad_gates[g] + n * C + c, tl.sum(tl.where(gate_of == g, sums, 0.0), axis=0), mask=live)


def _gate_strides(gates: Sequence[Tensor | None]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    found = [(0, 0) if gate is None else gate.stride() for gate in gates]
    return tuple(s[0] for s in found), tuple(s[1] for s in found)


def forward(x: Tensor, gates: Sequence[Tensor], out: Tensor) -> None:
    """The gated copies of x into memory of any strides (N,G*C,H,W), in any dtype."""
    n, c, h, w = x.shape
    tile = sizes("channel_gate", x, x.dtype, c, h * w)
    block = tile["BLOCK_C"] * tile["BLOCK_P"]
    across = is_channels_last(x)
    strides, _ = strides_of(x, out)
    line = (h * w, w, 1)
    dense = not across and tuple(strides[1:4]) == line and tuple(strides[5:8]) == line
    launch(
        _forward,
        n * blocks(c * h * w, block),
        [out],
        x,
        tuple(gates),
        out,
        c * h * w,
        c,
        h * w,
        w,
        *strides,
        c * out.stride(1),
        *_gate_strides(gates),
        G=len(gates),
        ACC=accumulation(x.dtype),
        DENSE=dense,
        ACROSS=across,
        BLOCK=block,
        num_warps=tile["num_warps"],
    )


def backward(x: Tensor | Form, gates: Sequence[Tensor | Form], grad: Tensor, grads: Sequence[Tensor | None]) -> None:
    """The gradients of x and of the gates, those that are there, from that of the gated copies."""
    grad_x, *grad_gates = grads
    n, (_, c, h, w) = grad.shape[0], x.shape
    tile = sizes("channel_gate_backward", grad, x.dtype, c, h * w)
    read = present(x) if any(t is not None for t in grad_gates) else None
    factors = [None if grad_x is None else present(gate) for gate in gates]
    strides, line = strides_of(read, grad, grad_x)
    launch(
        _backward,
        n * blocks(c, tile["BLOCK_C"]),
        grads,
        read,
        tuple(factors),
        grad,
        grad_x,
        tuple(grad_gates),
        c,
        h * w,
        w,
        *strides,
        c * grad.stride(1),
        *_gate_strides(factors),
        G=len(gates),
        MANY=power_of_two(len(gates)),
        ACC=accumulation(x.dtype),
        LINE=line,
        **tile,
    )
