"""``gated_projection`` on a card: the gated operand, a few samples at a time, and torch's matrix product.

Folded weights, the way of the CPU, would be one matrix a sample: 1.8 GB at the paper's step in float16, against 0.17 GB
of x. The gated operand is twice x, and as it is made in parts it never takes more than ``WORKSPACE``. What is faster
than this has to multiply on the tensor cores itself; docs/decisions.md has the arithmetic.
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
"""Bytes of gated operand, and of its gradient, that there are at a time; a sample that takes more is on its own."""


def _parts(n: int, sample: int) -> Iterator[slice]:
    """Samples 0 .. n in parts of as many as the workspace holds, ``sample`` bytes each."""
    step = max(1, WORKSPACE // sample)
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


def _size(x: Tensor | Form, weight: Tensor | Form) -> int:
    _, _, h, w = x.shape
    return weight.shape[1] * h * w * weight.dtype.itemsize


def kernels(gate: Gate, gate_backward: GateBackward, refuses: Any = None) -> Kernels:
    """Those of a backend that has kernels of ``channel_gate`` alone."""
    return Kernels(partial(_forward, gate), partial(_backward, gate, gate_backward), _form, refuses)


def _form(options: tuple, tensors: Sequence[Any]) -> tuple[Tensor, Sequence[Tensor]]:
    x, *_, weight, _ = tensors
    return _cuda.empty_beside(x, weight.shape[0], weight.dtype), ()


def _forward(gate_all: Gate, options: tuple, tensors: Sequence[Any], saves: bool) -> tuple[Tensor, Sequence[Tensor]]:
    x, *gates, weight, bias = tensors
    out = _cuda.empty_beside(x, weight.shape[0], weight.dtype)
    last = is_channels_last(out)
    workspace: Tensor | None = None
    for part in _parts(x.shape[0], _size(x, weight)):
        if workspace is None:
            workspace = _cuda.empty_beside(x[part], weight.shape[1], weight.dtype)
        to = out[part]
        gated = workspace[: to.shape[0]]
        gate_all(x[part], [gate[part] for gate in gates], gated)
        # With `out` a product is what it is under autocast too.
        if last and bias is not None:
            torch.addmm(bias, _rows(gated), weight.t(), out=_rows(to))
        elif last:
            torch.mm(_rows(gated), weight.t(), out=_rows(to))
        else:
            weights, planes = weight.expand(len(to), -1, -1), _planes(to)
            if bias is None:
                torch.bmm(weights, _planes(gated), out=planes)
            else:
                torch.baddbmm(bias[:, None].expand(planes.shape), weights, _planes(gated), out=planes)
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
    x, *gates, weight, bias = tensors
    grads = _cuda.gradients_of(grad, [x, *gates], needs[:-2])
    if any(needs[:-2]):
        _backward_inputs(gate_backward, grad, x, gates, weight, grads)
    grad_weight = _backward_weight(gate_all, grad, x, gates, weight) if needs[-2] else None
    grad_bias = None
    if needs[-1]:
        grad_bias = grad.sum((0, 2, 3), dtype=reference.accumulation_dtype(bias.dtype)).to(bias.dtype)
    return [*grads, grad_weight, grad_bias]


def _backward_inputs(
    gate_backward: GateBackward,
    grad: Tensor,
    x: Tensor | Form,
    gates: Sequence[Tensor | Form],
    weight: Tensor,
    grads: Sequence[Tensor | None],
) -> None:
    """Gradients of x and the gates, through that of the gated operand."""
    n, _, h, w = x.shape
    last = is_channels_last(grad)
    layout = torch.channels_last if last else torch.contiguous_format
    workspace: Tensor | None = None
    for part in _parts(n, _size(x, weight)):
        given = grad[part]
        if workspace is None:
            sizes = (len(given), weight.shape[1], h, w)
            workspace = torch.empty(sizes, dtype=weight.dtype, device=grad.device, memory_format=layout)
        gated = workspace[: len(given)]
        if last:
            torch.mm(_rows(given), weight, out=_rows(gated))
        else:
            torch.bmm(weight.t().expand(len(given), -1, -1), _planes(given), out=_planes(gated))
        gate_backward(_cut(x, part), [_cut(g, part) for g in gates], gated, [_cut(g, part) for g in grads])


def _backward_weight(gate_all: Gate, grad: Tensor, x: Tensor, gates: Sequence[Tensor], weight: Tensor | Form) -> Tensor:
    """The gated operand once more, with all positions of all samples of a part as the inner dimension of one product.

    Parts are added in the accumulation type and rounded once.
    """
    n, _, h, w = x.shape
    last, channels = is_channels_last(grad), weight.shape[1]
    workspace = total = None
    for part in _parts(n, _size(x, weight)):
        given = grad[part]
        count = len(given) * h * w
        if workspace is None:
            workspace = given.new_empty(count * channels)
        if last:
            operand = workspace[: count * channels].view(count, channels)
            gated = operand.view(len(given), h, w, channels).permute(0, 3, 1, 2)
        else:
            operand = workspace[: count * channels].view(channels, count)
            gated = operand.view(channels, len(given), h, w).transpose(0, 1)
        gate_all(x[part], [gate[part] for gate in gates], gated)
        product = grad.new_empty(weight.shape)
        if last:
            torch.mm(_rows(given).t(), operand, out=product)
        else:
            torch.mm(given.transpose(0, 1).reshape(weight.shape[0], -1), operand.t(), out=product)
        if len(given) == n:
            return product
        wide = product.to(reference.accumulation_dtype(weight.dtype))
        total = wide if total is None else total.add_(wide)
    return grad.new_zeros(weight.shape) if total is None else total.to(weight.dtype)
