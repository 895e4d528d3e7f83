"""``gated_projection`` on a card: the gated operand, a few samples at a time, and torch's matrix product.

Folded weights, the way of the CPU, would be one matrix a sample: 1.8 GB at the paper's step in float16, against 0.17 GB
of x. The gated operand is twice x, and as it is made in parts it never takes more than ``WORKSPACE``. What is faster
than this has to multiply on the tensor cores itself; docs/decisions.md has the arithmetic.

A plane of 7x7 half numbers is 98 bytes, and cuBLAS asks for rows that begin at multiples of 16 where tensor cores are
to run at full speed. So in row-major memory the positions of all samples of a part stand side by side, as the
columns of one matrix whose rows begin at multiples of ``ALIGNMENT``. channels_last memory is such a matrix already, and
planes of whole multiples need none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from m3em_fast import reference
from m3em_fast.ops import _cuda
from m3em_fast.ops._cpu import Form, is_channels_last
from m3em_fast.ops._function import Kernels

# channel_gate of a backend, into memory that is there: (x, gates, out) and (x, gates, gradient, gradients of both).
Gate = Callable[[Tensor, Sequence[Tensor], Tensor], None]
GateBackward = Callable[[Any, Sequence[Any], Tensor, Sequence[Any]], None]

WORKSPACE = 64 << 20
"""Bytes of gated operand, or of its gradient, that there are at a time; a sample that takes more is on its own."""

ALIGNMENT = 16
"""Bytes: where rows of a matrix begin for products at full speed."""


def _parts(x: Tensor | Form, weight: Tensor | Form) -> Iterator[slice]:
    """The samples in parts of as many as the workspace holds, if it can be as many as fill the columns of a matrix."""
    n, _, h, w = x.shape
    unit = ALIGNMENT // weight.dtype.itemsize
    step = max(1, WORKSPACE // (weight.shape[1] * h * w * weight.dtype.itemsize))
    if step > unit:
        step -= step % unit
    for start in range(0, n, step):
        yield slice(start, min(n, start + step))


def _cut(t: Any, part: slice) -> Any:
    """Some samples of a tensor; what is left of one that is not read has no samples to cut."""
    return t if t is None or isinstance(t, Form) else t[part]


def _rows(t: Tensor) -> Tensor:
    """(N,C,H,W) in channels_last as (N*H*W, C)."""
    return t.permute(0, 2, 3, 1).view(-1, t.shape[1])


def _planes(t: Tensor) -> Tensor:
    """(N,C,H,W) as (N, C, H*W); a copy where its strides allow no view."""
    return t.reshape(*t.shape[:2], -1)


class _Room:
    """Memory for the matrices of one part after another, which is made for the first part and its dtype and device."""

    def __init__(self, like: Tensor, channels: int, last: bool) -> None:
        self._like, self._channels, self._last = like, channels, last
        self._memory: Tensor | None = None

    def __call__(self, samples: int, fill: bool = False) -> tuple[Tensor, Tensor]:
        """A matrix, and what of it is maps (samples, channels, H, W).

        (samples*H*W, channels) for channels_last, else (channels, at least samples*H*W); ``fill``: what is more is 0.
        """
        h, w = self._like.shape[2:]
        count, channels = samples * h * w, self._channels
        unit = 1 if self._last else ALIGNMENT // self._like.dtype.itemsize
        pitch = -(-count // unit) * unit
        if self._memory is None:
            self._memory = self._like.new_empty(channels * pitch)
        memory = self._memory[: channels * pitch]
        if self._last:
            matrix = memory.view(count, channels)
            return matrix, matrix.view(samples, h, w, channels).permute(0, 3, 1, 2)
        matrix = memory.view(channels, pitch)
        if fill and pitch > count:
            matrix[:, count:].zero_()
        return matrix, matrix[:, :count].unflatten(1, (samples, h, w)).transpose(0, 1)


def kernels(gate: Gate, gate_backward: GateBackward, refuses: Any = None) -> Kernels:
    """Those of a backend that has kernels of ``channel_gate`` alone."""
    return Kernels(partial(_forward, gate), partial(_backward, gate, gate_backward), _form, refuses)


def _form(options: tuple, tensors: Sequence[Any]) -> tuple[Tensor, Sequence[Tensor]]:
    x, *_, weight, _ = tensors
    return _cuda.empty_beside(x, weight.shape[0], weight.dtype), ()


def _forward(gate_all: Gate, options: tuple, tensors: Sequence[Any], saves: bool) -> tuple[Tensor, Sequence[Tensor]]:
    x, *gates, weight, bias = tensors
    out = _cuda.empty_beside(x, weight.shape[0], weight.dtype)
    last, (h, w) = is_channels_last(out), out.shape[2:]
    planes = not last and h * w * weight.dtype.itemsize % ALIGNMENT == 0
    operand, product = _Room(out, weight.shape[1], last), _Room(out, weight.shape[0], last)
    workspace: Tensor | None = None
    for part in _parts(x, weight):
        to = out[part]
        if planes:
            if workspace is None:
                workspace = _cuda.empty_beside(x[part], weight.shape[1], weight.dtype)
            gated = workspace[: len(to)]
        else:
            matrix, gated = operand(len(to))
        gate_all(x[part], [gate[part] for gate in gates], gated)
        # With `out` a product is what it is under autocast too.
        if last:
            if bias is None:
                torch.mm(matrix, weight.t(), out=_rows(to))
            else:
                torch.addmm(bias, matrix, weight.t(), out=_rows(to))
        elif planes:
            weights, into = weight.expand(len(to), -1, -1), _planes(to)
            if bias is None:
                torch.bmm(weights, _planes(gated), out=into)
            else:
                torch.baddbmm(bias[:, None].expand(into.shape), weights, _planes(gated), out=into)
        else:
            made, maps = product(len(to))
            torch.mm(weight, matrix, out=made)
            if bias is None:
                to.copy_(maps)
            else:
                torch.add(maps, bias[:, None, None], out=to)
    return out, ()


def _backward(
    gate_all: Gate,
    gate_backward: GateBackward,
    options: tuple,
    grad: Tensor,
    tensors: Sequence[Any],
    saved: Sequence[Tensor],
    needs: Sequence[bool],
) -> Sequence[Tensor | None]:
    """The gradient of the gated operand, then the operand once more for that of the weight, with all positions of all
    samples of a part as the inner dimension of one product. Parts are added in the accumulation type, rounded once.
    """
    x, *gates, weight, bias = tensors
    grads = _cuda.gradients_of(grad, [x, *gates], needs[:-2])
    last, wide = is_channels_last(grad), reference.accumulation_dtype(weight.dtype)
    operand, arriving = _Room(grad, weight.shape[1], last), _Room(grad, weight.shape[0], last)
    grad_weight: Tensor | None = None
    for part in _parts(x, weight) if any(needs[:-1]) else ():
        given = grad[part]
        if last:
            rows = _rows(given)
        else:
            rows, maps = arriving(len(given), fill=True)
            maps.copy_(given)
        if any(needs[:-2]):
            matrix, gated = operand(len(given))
            torch.mm(*((rows, weight) if last else (weight.t(), rows)), out=matrix)
            gate_backward(_cut(x, part), [_cut(g, part) for g in gates], gated, [_cut(g, part) for g in grads])
        if needs[-2]:
            matrix, gated = operand(len(given), fill=True)
            gate_all(x[part], [gate[part] for gate in gates], gated)
            product = grad.new_empty(weight.shape)
            torch.mm(*((rows.t(), matrix) if last else (rows, matrix.t())), out=product)
            if len(given) == len(grad):
                grad_weight = product
            elif grad_weight is None:
                grad_weight = product.to(wide)
            else:
                grad_weight.add_(product)
    if needs[-2]:
        grad_weight = grad.new_zeros(weight.shape) if grad_weight is None else grad_weight.to(weight.dtype)
    grad_bias = None
    if needs[-1]:
        grad_bias = grad.sum((0, 2, 3), dtype=reference.accumulation_dtype(bias.dtype)).to(bias.dtype)
    return [*grads, grad_weight, grad_bias]
