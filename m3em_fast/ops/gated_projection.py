from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from m3em_fast import reference
from m3em_fast.backends import native
from m3em_fast.ops import _checks
from m3em_fast.ops._cpu import arg, args, empty_beside, gradient_of
from m3em_fast.ops._function import Kernels, Op, Tensors

_OP = "gated_projection"
_FOLDED_BYTES = 4 << 20


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
    _checks.tensor(_OP, "weight", weight, 2, "(D, G*C)")
    if bias is not None:
        _checks.tensor(_OP, "bias", bias, 1, "(D,)")
    device = x.device.type
    if device in ("cpu", "cuda") and torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        half = torch.get_autocast_dtype(device)
        x = x.to(half)
        # As autocast does, float64 stays: a mixture with it is refused below.
        weight = weight if weight.dtype == torch.float64 else weight.to(half)
        bias = bias if bias is None or bias.dtype == torch.float64 else bias.to(half)
        # Gates made in another half dtype than autocast's have no place beside x; float32 has, and loses nothing.
        if isinstance(gates, (list, tuple)):
            gates = [g.float() if isinstance(g, Tensor) and g.dtype in _checks.HALVES else g for g in gates]
    gates = _checks.gates(_OP, gates, x)
    _checks.beside(_OP, "weight", weight, "x", x)
    if weight.shape[1] != len(gates) * x.shape[1]:
        raise ValueError(
            f"{_OP}: weight must be (D, G*C) with G*C = {len(gates)}*{x.shape[1]} = {len(gates) * x.shape[1]} "
            f"for this x and these gates, got {tuple(weight.shape)}"
        )
    if bias is not None:
        _checks.same_device(_OP, "bias", bias, "weight", weight)
        if bias.dtype != weight.dtype:
            raise TypeError(
                f"{_OP}: bias must have the dtype of weight ({_checks.name_of(weight.dtype)}), "
                f"got {_checks.name_of(bias.dtype)}"
            )
        if bias.shape[0] != weight.shape[0]:
            raise ValueError(f"{_OP}: bias must be (D,) = ({weight.shape[0]},) like weight, got {tuple(bias.shape)}")
    return _op((), x, *gates, weight, bias)


def _reference(options: tuple, tensors: Tensors) -> Tensor:
    x, *gates, weight, bias = tensors
    return reference.gated_projection(x, gates, weight, bias)


def _samples(weight: Tensor, channels: int) -> int:
    """How many samples share one call of the matrix product: as many as keep the folded weights in the cache."""
    return max(1, min(64, _FOLDED_BYTES // (4 * weight.shape[0] * channels)))


def _as_matrices(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Samples (M,C,H,W) of any strides as matrices (M,C,H*W); a view where their memory allows one."""
    return x.to(dtype).flatten(2)


def _cpu_forward(options: tuple, tensors: Tensors, saves: bool) -> tuple[Tensor, Sequence[Tensor]]:
    x, *gates, weight, bias = tensors
    (n, c), d = x.shape[:2], weight.shape[0]
    acc = reference.accumulation_dtype(x.dtype)
    out = empty_beside(x, d, weight.dtype)
    samples, threads = _samples(weight, c), torch.get_num_threads()
    matrix = torch.empty((min(samples, n), d, c), dtype=acc)
    add = None if bias is None else bias.to(acc)[None, :, None]
    with _full_precision():
        for first in range(0, n, samples):
            part = x[first : first + samples]
            m = len(part)
            native.gated_projection_fold(arg(weight), args(gates), matrix.data_ptr(), d, c, first, m, threads)
            product = torch.bmm(matrix[:m], _as_matrices(part, acc))
            if add is not None:
                product += add
            out[first : first + m] = product.unflatten(2, x.shape[2:])
    return out, ()


def _cpu_backward(
    options: tuple, grad: Tensor, tensors: Tensors, saved: Sequence[Tensor], needs: Sequence[bool]
) -> Sequence[Tensor | None]:
    x, *gates, weight, bias = tensors
    (n, c), d = x.shape[:2], weight.shape[0]
    acc = reference.accumulation_dtype(x.dtype)
    grad_x = gradient_of(x, needs[0])
    grad_gates = [gradient_of(gate, need) for gate, need in zip(gates, needs[1:-2], strict=True)]
    grad_weight = torch.zeros(weight.shape, dtype=acc) if needs[-2] else None
    grad_bias = torch.zeros(d, dtype=acc) if needs[-1] else None
    unfolds = grad_weight is not None or any(g is not None for g in grad_gates)
    samples, threads = _samples(weight, c), torch.get_num_threads()
    matrix = torch.empty((min(samples, n), d, c), dtype=acc)
    with _full_precision():
        for first in range(0, n, samples):
            part = _as_matrices(grad[first : first + samples], acc)
            m = len(part)
            if grad_x is not None:
                native.gated_projection_fold(arg(weight), args(gates), matrix.data_ptr(), d, c, first, m, threads)
                # The transposed product and a copy take three quarters of the time of the product itself.
                product = torch.bmm(part.transpose(1, 2), matrix[:m]).transpose(1, 2)
                grad_x[first : first + m] = product.unflatten(2, x.shape[2:])
            if unfolds:
                torch.bmm(part, _as_matrices(x[first : first + m], acc).transpose(1, 2), out=matrix[:m])
                native.gated_projection_unfold(
                    arg(weight),
                    args(gates),
                    matrix.data_ptr(),
                    0 if grad_weight is None else grad_weight.data_ptr(),
                    args(grad_gates),
                    d,
                    c,
                    first,
                    m,
                    threads,
                )
            if grad_bias is not None:
                grad_bias += part.sum((0, 2))
    if grad_weight is not None:
        grad_weight = grad_weight.to(weight.dtype)
    if grad_bias is not None:
        grad_bias = grad_bias.to(bias.dtype)
    return (grad_x, *grad_gates, grad_weight, grad_bias)


def _full_precision() -> AbstractContextManager:
    """Autocast would round the operands of the matrix products, which are in the accumulation type on purpose."""
    return torch.autocast("cpu", enabled=False) if torch.is_autocast_enabled("cpu") else nullcontext()


def _reads(needs: Sequence[bool]) -> Sequence[bool]:
    x, *gates, weight, _ = needs
    return (weight or any(gates), *(x or weight for _ in gates), x or any(gates), False)


_op = Op(_OP, _reference, _reads, {"cpu": Kernels(_cpu_forward, _cpu_backward)})
