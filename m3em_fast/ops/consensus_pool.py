from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from m3em_fast import reference
from m3em_fast.backends import native
from m3em_fast.ops import _checks, _cuda
from m3em_fast.ops._cpu import DTYPES, gradient_of, gradients_of
from m3em_fast.ops._function import Kernels, Op, Tensors


def consensus_pool(x: Tensor, cmap: Tensor | None = None) -> Tensor:
    """Mean over positions of ``(1 + cmap) * x``; without a map the plain mean (global average pooling).

    The weighted average with a residual connection of section 2.2 of the M3EM report. The map is not normalised.

    Args:
        x: (N,C,H,W) in float64, float32, float16 or bfloat16. N may be 0.
        cmap: (N,1,H,W) in the dtype of ``x``, or float32 beside a half ``x``; or None.

    Returns:
        (N,C), float32 if ``cmap`` is float32, else in the dtype of ``x``.

    Raises:
        TypeError: something is no floating-point tensor, or a dtype does not go with that of ``x``.
        ValueError: a shape or device differs from what ``x`` asks for.
    """
    _checks.tensor("consensus_pool", "x", x, 4, "(N,C,H,W)")
    if cmap is not None:
        _checks.consensus("consensus_pool", cmap, x)
    return pool(x, cmap, reference.widest(x, cmap))


def pool(x: Tensor, cmap: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``consensus_pool`` of checked tensors, rounded to a dtype of the caller's choice."""
    return _op((dtype,), x, cmap)


def _reference(options: tuple, tensors: Tensors) -> Tensor:
    return reference.pool(*tensors).to(options[0])


def _spread(grad: Tensor, x: Any) -> Tensor:
    """The gradient of the plain mean: one number a channel. Expanded, for memory of x's size would only repeat it."""
    n, c, h, w = x.shape
    each = grad.to(reference.accumulation_dtype(x.dtype)) / (h * w)
    return each.to(x.dtype)[:, :, None, None].expand(n, c, h, w)


def _gradients(tensors: Tensors, needs: Sequence[bool]) -> Sequence[Tensor | None]:
    x, cmap = tensors
    if cmap is None and needs[0]:
        return _spread(torch.empty(x.shape[:2], dtype=x.dtype, device=x.device), x), None
    return gradients_of(tensors, needs)


def _cpu_forward(options: tuple, tensors: Tensors, saves: bool) -> tuple[Tensor, Sequence[Tensor]]:
    x, cmap = tensors
    n, c, _, _ = x.shape
    dtype = options[0]
    out = x.new_empty(n, c) if x.dtype is dtype else x.new_empty((n, c), dtype=dtype)
    native.consensus_pool_forward(x, cmap, out, x.shape, torch.get_num_threads())
    return out, ()


def _cpu_backward(
    options: tuple, grad: Tensor, tensors: Tensors, saved: Sequence[Tensor], needs: Sequence[bool]
) -> Sequence[Tensor | None]:
    x, cmap = tensors
    if cmap is None:
        return _spread(grad, x), None
    grad_x = gradient_of(x, needs[0])
    grad_cmap = grad.new_empty(cmap.shape, dtype=cmap.dtype) if needs[1] else None
    native.consensus_pool_backward(x, cmap, grad, grad_x, grad_cmap, x.shape, torch.get_num_threads())
    return grad_x, grad_cmap


def _cpu_form(options: tuple, tensors: Tensors) -> tuple[Tensor, Sequence[Tensor]]:
    x, _ = tensors
    return x.new_empty(x.shape[:2], dtype=options[0]), ()


def _cuda_forward(options: tuple, tensors: Tensors, saves: bool) -> tuple[Tensor, Sequence[Tensor]]:
    x, cmap = tensors
    n, c, _, _ = x.shape
    module, stream = _cuda.loaded("consensus_pool", x)
    out = x.new_empty((n, c), dtype=options[0])
    native.cuda_consensus_pool_forward(module, stream, x, cmap, out, x.shape)
    return out, ()


def _cuda_backward(
    options: tuple, grad: Tensor, tensors: Tensors, saved: Sequence[Tensor], needs: Sequence[bool]
) -> Sequence[Tensor | None]:
    x, cmap = tensors
    if cmap is None:
        return _spread(grad, x), None
    module, stream = _cuda.loaded("consensus_pool", grad)
    grad_x, grad_cmap, workspace = _cuda.gradient_of(x, needs[0], grad.device), None, 0
    if needs[1]:
        n, c, h, w = x.shape
        grad_cmap = grad.new_empty(cmap.shape, dtype=cmap.dtype)
        numbers = n * native.cuda_consensus_pool_workspace(DTYPES[x.dtype], c, h, w)
        partial = grad.new_empty(numbers, dtype=reference.accumulation_dtype(x.dtype))
        workspace = partial.data_ptr()
    native.cuda_consensus_pool_backward(module, stream, x, cmap, grad, grad_x, grad_cmap, workspace, x.shape)
    return grad_x, grad_cmap


def _cuda_form(options: tuple, tensors: Tensors) -> tuple[Tensor, Sequence[Tensor]]:
    x, _ = tensors
    return x.new_empty(x.shape[:2], dtype=options[0]), ()


def _triton_forward(options: tuple, tensors: Tensors, saves: bool) -> tuple[Tensor, Sequence[Tensor]]:
    from m3em_fast.triton import consensus_pool as kernels

    x, cmap = tensors
    out = x.new_empty(x.shape[:2], dtype=options[0])
    kernels.forward(x, cmap, out)
    return out, ()


def _triton_backward(
    options: tuple, grad: Tensor, tensors: Tensors, saved: Sequence[Tensor], needs: Sequence[bool]
) -> Sequence[Tensor | None]:
    from m3em_fast.triton import consensus_pool as kernels

    x, cmap = tensors
    if cmap is None:
        return _spread(grad, x), None
    grad_x = _cuda.gradient_of(x, needs[0], grad.device)
    grad_cmap = grad.new_empty(cmap.shape, dtype=cmap.dtype) if needs[1] else None
    kernels.backward(x, cmap, grad, grad_x, grad_cmap)
    return grad_x, grad_cmap


_SCHEMA = "(Tensor x, Tensor? cmap, str dtype, str backend) -> Tensor"
_CUDA = Kernels(_cuda_forward, _cuda_backward, _cuda_form)
_TRITON = Kernels(_triton_forward, _triton_backward, _cuda_form)
_KERNELS = {"cpu": Kernels(_cpu_forward, _cpu_backward, _cpu_form), "cuda": _CUDA, "simt": _CUDA, "triton": _TRITON}
_op = Op("consensus_pool", _reference, lambda needs: (needs[1], needs[0]), _KERNELS, _SCHEMA, _gradients)
