from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from m3em_fast import reference
from m3em_fast.backends import native
from m3em_fast.ops import _checks, _cuda
from m3em_fast.ops._cpu import Form, empty_beside, gradients_of
from m3em_fast.ops._function import Kernels, Op, Tensors

MOST = 0 if native is None else native.cuda_channel_gate_most()


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
    native.channel_gate_forward(x, gates, out, x.shape, torch.get_num_threads())
    return out, ()


def _cpu_backward(
    options: tuple, grad: Tensor, tensors: Tensors, saved: Sequence[Tensor], needs: Sequence[bool]
) -> Sequence[Tensor | None]:
    x, *gates = tensors
    grads = gradients_of(tensors, needs)
    native.channel_gate_backward(x, gates, grad, grads[0], grads[1:], x.shape, torch.get_num_threads())
    return grads


def _reads(needs: Sequence[bool]) -> Sequence[bool]:
    return (any(needs[1:]), *(needs[0],) * (len(needs) - 1))


def _cpu_form(options: tuple, tensors: Tensors) -> tuple[Tensor, Sequence[Tensor]]:
    x, *gates = tensors
    return empty_beside(x, len(gates) * x.shape[1], x.dtype), ()


def _cuda_refuses(options: tuple, tensors: Sequence[Any]) -> str | None:
    return too_many(len(tensors) - 1)


def too_many(gates: int) -> str | None:
    """Why the kernels for cards cannot serve so many gates; None where they can."""
    return None if gates <= MOST else f"it takes {MOST} gates at most, and there are {gates}"


def cuda_forward(x: Tensor, gates: Sequence[Tensor], out: Tensor) -> None:
    """The gated copies of x into memory of any strides (N,G*C,H,W), in the dtype of x or the accumulation type."""
    module, stream = _cuda.loaded("channel_gate", x)
    native.cuda_channel_gate_forward(module, stream, x, gates, out, x.shape)


def cuda_backward(
    x: Tensor | Form, gates: Sequence[Tensor | Form], grad: Tensor, grads: Sequence[Tensor | None]
) -> None:
    """The gradients of x and of the gates that are there, from those of the gated copies, for the samples of these."""
    module, stream = _cuda.loaded("channel_gate", grad)
    shape = (grad.shape[0], *x.shape[1:])
    native.cuda_channel_gate_backward(module, stream, x, gates, grad, grads[0], grads[1:], shape)


def _cuda_forward(options: tuple, tensors: Tensors, saves: bool) -> tuple[Tensor, Sequence[Tensor]]:
    x, *gates = tensors
    out = _cuda.empty_beside(x, len(gates) * x.shape[1], x.dtype)
    cuda_forward(x, gates, out)
    return out, ()


def _cuda_backward(
    options: tuple, grad: Tensor, tensors: Tensors, saved: Sequence[Tensor], needs: Sequence[bool]
) -> Sequence[Tensor | None]:
    x, *gates = tensors
    grads = _cuda.gradients_of(grad, tensors, needs)
    cuda_backward(x, gates, grad, grads)
    return grads


def _cuda_form(options: tuple, tensors: Tensors) -> tuple[Tensor, Sequence[Tensor]]:
    x, *gates = tensors
    return _cuda.empty_beside(x, len(gates) * x.shape[1], x.dtype), ()


def triton_forward(x: Tensor, gates: Sequence[Tensor], out: Tensor) -> None:
    """``cuda_forward``, by the kernels in Triton."""
    from m3em_fast.triton import channel_gate as kernels

    kernels.forward(x, gates, out)


def triton_backward(
    x: Tensor | Form, gates: Sequence[Tensor | Form], grad: Tensor, grads: Sequence[Tensor | None]
) -> None:
    """``cuda_backward``, by the kernels in Triton."""
    from m3em_fast.triton import channel_gate as kernels

    kernels.backward(x, gates, grad, grads)


def _triton_forward(options: tuple, tensors: Tensors, saves: bool) -> tuple[Tensor, Sequence[Tensor]]:
    x, *gates = tensors
    out = _cuda.empty_beside(x, len(gates) * x.shape[1], x.dtype)
    triton_forward(x, gates, out)
    return out, ()


def _triton_backward(
    options: tuple, grad: Tensor, tensors: Tensors, saved: Sequence[Tensor], needs: Sequence[bool]
) -> Sequence[Tensor | None]:
    x, *gates = tensors
    grads = _cuda.gradients_of(grad, tensors, needs)
    triton_backward(x, gates, grad, grads)
    return grads


_SCHEMA = "(Tensor x, Tensor[] gates, str backend) -> Tensor"
_CUDA = Kernels(_cuda_forward, _cuda_backward, _cuda_form, _cuda_refuses)
_TRITON = Kernels(_triton_forward, _triton_backward, _cuda_form)
_KERNELS = {"cpu": Kernels(_cpu_forward, _cpu_backward, _cpu_form), "cuda": _CUDA, "simt": _CUDA, "triton": _TRITON}
_op = Op("channel_gate", _reference, _reads, _KERNELS, _SCHEMA)
