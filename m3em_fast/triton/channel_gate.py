"""channel_gate: one read of x, one write of every gated copy; backward, one read of x and of the copies' gradients."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from m3em_fast.ops._cpu import Form, is_channels_last
from m3em_fast.triton._launch import accumulation, blocks, launch, present, sizes_of, strides_of
from m3em_fast.triton._maps import offset, place, tile
from m3em_fast.triton._table import power_of_two


@triton.jit
def _forward(
    x, gates, out, x_strides, out_strides, out_copy, gate_n, gate_c, size, C, P, W,
    G: tl.constexpr, ACC: tl.constexpr, DENSE: tl.constexpr, ACROSS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
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
    channel = c.to(tl.int64)
    if DENSE:
        from_, to = i, i
    else:
        row, column = place(q, W, False)
        from_, to = offset(x_strides, channel, row, column), offset(out_strides, channel, row, column)
    value = tl.load(x + n * x_strides[0] + from_, mask=inside, other=0.0).to(ACC)
    for g in tl.static_range(G):
        gate = tl.load(gates[g] + n * gate_n[g] + channel * gate_c[g], mask=inside, other=0.0).to(ACC)
        tl.store(out + n * out_strides[0] + tl.cast(g, tl.int64) * out_copy + to, value * gate, mask=inside)


@triton.jit(do_not_specialize_on_alignment=["x", "grad", "grad_x"])
def _backward(
    x, gates, grad, grad_x, grad_gates, x_strides, grad_strides, to_strides, grad_copy, gate_n, gate_c, C, P, W,
    G: tl.constexpr, MANY: tl.constexpr, ACC: tl.constexpr, LINE: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):  # fmt: skip
    """A program takes BLOCK_C channels of one sample and walks over their positions. ``MANY`` is a power of two, G at
    least."""
    chunks = (C + BLOCK_C - 1) // BLOCK_C
    n = (tl.program_id(0) // chunks).to(tl.int64)
    c = tl.program_id(0) % chunks * BLOCK_C + tl.arange(0, BLOCK_C)
    live = c < C
    channel = c.to(tl.int64)
    gate_of = tl.arange(0, MANY)[:, None]
    sums = tl.full([MANY, BLOCK_C], 0, ACC)
    for p0 in range(0, P, BLOCK_P):
        q = p0 + tl.arange(0, BLOCK_P)
        inside = live[:, None] & (q < P)[None, :]
        row, column = place(q, W, LINE)
        total = tl.full([BLOCK_C, BLOCK_P], 0, ACC)
        if x is not None:
            from_ = x + n * x_strides[0] + tile(x_strides, channel, row, column)
            value = tl.load(from_, mask=inside, other=0.0).to(ACC)
        from_ = grad + n * grad_strides[0] + tile(grad_strides, channel, row, column)
        for g in tl.static_range(G):
            given = tl.load(from_ + tl.cast(g, tl.int64) * grad_copy, mask=inside, other=0.0).to(ACC)
            if grad_x is not None:
                gate = tl.load(gates[g] + n * gate_n[g] + channel * gate_c[g], mask=live, other=0.0).to(ACC)
                total += given * gate[:, None]
            if grad_gates[g] is not None:
                sums += tl.where(gate_of == g, tl.sum(given * value, axis=1)[None, :], 0.0)
        if grad_x is not None:
            tl.store(grad_x + n * to_strides[0] + tile(to_strides, channel, row, column), total, mask=inside)
    for g in tl.static_range(G):
        if grad_gates[g] is not None:
            tl.store(grad_gates[g] + n * C + c, tl.sum(tl.where(gate_of == g, sums, 0.0), axis=0), mask=live)


def _gate_strides(gates: Sequence[Tensor | None]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    found = [(0, 0) if gate is None else gate.stride() for gate in gates]
    return tuple(s[0] for s in found), tuple(s[1] for s in found)


def forward(x: Tensor, gates: Sequence[Tensor], out: Tensor) -> None:
    """The gated copies of x into memory of any strides (N,G*C,H,W), in any dtype."""
    n, c, h, w = x.shape
    sizes = sizes_of("channel_gate", x, x.dtype, c, h * w)
    block = sizes["BLOCK_C"] * sizes["BLOCK_P"]
    across = is_channels_last(x)
    dense = not across and x.stride()[1:] == out.stride()[1:] == (h * w, w, 1)
    launch(
        _forward, n * blocks(c * h * w, block), [out],
        x, tuple(gates), out, x.stride(), out.stride(), c * out.stride(1), *_gate_strides(gates),
        c * h * w, c, h * w, w, G=len(gates), ACC=accumulation(x.dtype), DENSE=dense, ACROSS=across, BLOCK=block,
        num_warps=sizes["num_warps"],
    )  # fmt: skip


def backward(x: Tensor | Form, gates: Sequence[Tensor | Form], grad: Tensor, grads: Sequence[Tensor | None]) -> None:
    """The gradients of x and of the gates, those that are there, from that of the gated copies."""
    grad_x, *grad_gates = grads
    n, (_, c, h, w) = grad.shape[0], x.shape
    read = present(x) if any(t is not None for t in grad_gates) else None
    factors = [None if grad_x is None else present(gate) for gate in gates]
    strides, line = strides_of(read, grad, grad_x)
    sizes = sizes_of("channel_gate_backward", grad, x.dtype, c, h * w)
    launch(
        _backward, n * blocks(c, sizes["BLOCK_C"]), grads,
        read, tuple(factors), grad, grad_x, tuple(grad_gates), *strides, c * grad.stride(1), *_gate_strides(factors),
        c, h * w, w, G=len(gates), MANY=power_of_two(len(gates)), ACC=accumulation(x.dtype), LINE=line, **sizes,
    )  # fmt: skip
