from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from m3em_fast import reference
from m3em_fast.backends import native
from m3em_fast.ops import _checks
from m3em_fast.ops._cpu import arg, args, empty_beside, gradient_of
from m3em_fast.ops._function import Kernels, Op, Tensors


def channel_gate(x: Tensor, *gates: Tensor) -> Tensor:
    """Gate the channels of ``x`` by each gate and concatenate the copies over channels.

    Equations 2 to 4 of the M3EM report with two gates (self and cross refinement); squeeze-and-excitation with one.

    Args:
        x: (N,C,H,W) in float64, float32, float16 or bfloat16. N may be 0.
        *gates: G >= 1 tensors (N,C), each in the dtype of ``x``, or float32 beside a half ``x``. Any values; the
            report takes them from a sigmoid.

    Returns:
        (N, G*C, H, W) in the dtype and memory format of ``x``: channel ``g*C + c`` is ``x[:, c] * gates[g][:, c]``.

    Raises:
        TypeError: something is no floating-point tensor, or a dtype does not go with that of ``x``.
        ValueError: no gate, or a shape or device that differs from what ``x`` asks for.
    """
    _checks.tensor("channel_gate", "x", x, 4, "(N,C,H,W)")
    return _op((), x, *_checks.gates("channel_gate", gates, x))


def _reference(options: tuple, tensors: Tensors) -> Tensor:
    x, *gates = tensors
    return reference.channel_gate(x, gates)


def _cpu_forward(options: tuple, tensors: Tensors, saves: bool) -> tuple[Tensor, Sequence[Tensor]]:
    x, *gates = tensors
    out = empty_beside(x, len(gates) * x.shape[1], x.dtype)
    native.channel_gate_forward(arg(x), args(gates), arg(out), x.shape, torch.get_num_threads())
    return out, ()


def _cpu_backward(
    options: tuple, grad: Tensor, tensors: Tensors, saved: Sequence[Tensor], needs: Sequence[bool]
) -> Sequence[Tensor | None]:
    x, *gates = tensors
    grads = [gradient_of(t, need) for t, need in zip(tensors, needs, strict=True)]
    native.channel_gate_backward(
        arg(x), args(gates), arg(grad), arg(grads[0]), args(grads[1:]), x.shape, torch.get_num_threads()
    )
    return grads


def _reads(needs: Sequence[bool]) -> Sequence[bool]:
    return (any(needs[1:]), *(needs[0],) * (len(needs) - 1))


def _cpu_form(options: tuple, tensors: Tensors) -> tuple[Tensor, Sequence[Tensor]]:
    x, *gates = tensors
    return empty_beside(x, len(gates) * x.shape[1], x.dtype), ()


_SCHEMA = "(Tensor x, Tensor[] gates, str backend) -> Tensor"
_op = Op("channel_gate", _reference, _reads, {"cpu": Kernels(_cpu_forward, _cpu_backward, _cpu_form)}, _SCHEMA)
