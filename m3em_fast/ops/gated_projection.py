from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from m3em_fast import reference
from m3em_fast.backends import native
from m3em_fast.ops import _checks, _gated_projection_cuda
from m3em_fast.ops._cpu import empty_beside, gradients_of
from m3em_fast.ops._function import Kernels, Op, Tensors
from m3em_fast.ops.channel_gate import cuda_backward, cuda_forward, too_many, triton_backward, triton_forward

_OP = "gated_projection"


def gated_projection(x: Tensor, gates: Sequence[Tensor], weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The 1x1 convolution of ``channel_gate(x, *gates)``.

    The projection of the refined features into the latent space of the consensus module (M3EM report, section 2.2).

    Args:
        x: (N,C,H,W) in float64, float32, float16 or bfloat16. N may be 0.
        gates: G >= 1 tensors (N,C), each in the dtype of ``x``, or float32 beside a half ``x``.
        weight: (D, G*C) in the dtype of ``x``, or float32 beside a half ``x``. Column ``g*C + c`` meets
            ``gates[g][:, c] * x[:, c]``.
        bias: (D,) in the dtype of ``weight``, or None.

    Returns:
        (N,D,H,W) in the dtype of ``weight`` and the memory format of ``x``. Under autocast ``x``, ``weight`` and
        ``bias`` are cast to the autocast dtype as ``F.conv2d`` does (float64 is left alone), and the result has it.

    Raises:
        TypeError: something is no floating-point tensor, or a dtype does not go with that of ``x``.
        ValueError: no gate, or a shape or device that differs from what ``x`` asks for.
    """
    _checks.tensor(_OP, "x", x, 4, "(N,C,H,W)")
    device = "cpu" if x.is_cpu else "cuda" if x.is_cuda else None
    if device is not None and torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        _checks.tensor(_OP, "weight", weight, 2, "(D, G*C)")
        if bias is not None:
            _checks.tensor(_OP, "bias", bias, 1, "(D,)")
        half = torch.get_autocast_dtype(device)
        x = x.to(half)
        # As autocast does, float64 stays: a mixture with it is refused below.
        weight = weight if weight.dtype == torch.float64 else weight.to(half)
        bias = bias if bias is None or bias.dtype == torch.float64 else bias.to(half)
        # Gates made in another half dtype than autocast's have no place beside x; float32 has, and loses nothing.
        if isinstance(gates, (list, tuple)):
            gates = [g.float() if isinstance(g, Tensor) and g.dtype in _checks.HALVES else g for g in gates]
    gates = _checks.gates(_OP, gates, x)
    _checks.tensor_beside(_OP, "weight", weight, 2, "(D, G*C)", x)
    d, all_channels = weight.shape
    if all_channels != len(gates) * x.shape[1]:
        raise ValueError(
            f"{_OP}: weight must be (D, G*C) with G*C = {len(gates)}*{x.shape[1]} = {len(gates) * x.shape[1]} "
            f"for this x and these gates, got {tuple(weight.shape)}"
        )
    if bias is not None:
        _checks.tensor(_OP, "bias", bias, 1, "(D,)")
        _checks.same_device(_OP, "bias", bias, "weight", weight)
        if bias.dtype != weight.dtype:
            raise TypeError(
                f"{_OP}: bias must have the dtype of weight ({_checks.name_of(weight.dtype)}), "
                f"got {_checks.name_of(bias.dtype)}"
            )
        if bias.shape[0] != d:
            raise ValueError(f"{_OP}: bias must be (D,) = ({weight.shape[0]},) like weight, got {tuple(bias.shape)}")
    return _op((), x, *gates, weight, bias)


def _reference(options: tuple, tensors: Tensors) -> Tensor:
    x, *gates, weight, bias = tensors
    return reference.gated_projection(x, gates, weight, bias)


def _cpu_forward(options: tuple, tensors: Tensors, saves: bool) -> tuple[Tensor, Sequence[Tensor]]:
    x, *gates, weight, bias = tensors
    d = weight.shape[0]
    out = empty_beside(x, d, weight.dtype)
    native.gated_projection_forward(x, gates, weight, bias, out, x.shape, d, torch.get_num_threads())
    return out, ()


def _cpu_backward(
    options: tuple, grad: Tensor, tensors: Tensors, saved: Sequence[Tensor], needs: Sequence[bool]
) -> Sequence[Tensor | None]:
    x, *gates, weight, _ = tensors
    grads = gradients_of(tensors, needs)
    grad_x, *grad_gates, grad_weight, grad_bias = grads
    native.gated_projection_backward(
        x,
        gates,
        weight,
        grad,
        grad_x,
        grad_gates,
        grad_weight,
        grad_bias,
        x.shape,
        weight.shape[0],
        torch.get_num_threads(),
    )
    return grads


def _reads(needs: Sequence[bool]) -> Sequence[bool]:
    x, *gates, weight, _ = needs
    return (weight or any(gates), *(x or weight for _ in gates), x or any(gates), False)


def _cpu_form(options: tuple, tensors: Tensors) -> tuple[Tensor, Sequence[Tensor]]:
    x, *_, weight, _ = tensors
    return empty_beside(x, weight.shape[0], weight.dtype), ()


def _cuda_refuses(options: tuple, tensors: Sequence[Any]) -> str | None:
    return too_many(len(tensors) - 3)


_SCHEMA = "(Tensor x, Tensor[] gates, Tensor weight, Tensor? bias, str backend) -> Tensor"
_CUDA = _gated_projection_cuda.kernels(cuda_forward, cuda_backward, _cuda_refuses)
_TRITON = _gated_projection_cuda.kernels(triton_forward, triton_backward)
_KERNELS = {"cpu": Kernels(_cpu_forward, _cpu_backward, _cpu_form), "cuda": _CUDA, "simt": _CUDA, "triton": _TRITON}
_op = Op(_OP, _reference, _reads, _KERNELS, _SCHEMA)
