from __future__ import annotations

import numbers
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from m3em_fast import reference
from m3em_fast.backends import constant, native
from m3em_fast.ops import _checks, _cuda
from m3em_fast.ops._cpu import DTYPES, gradients_of
from m3em_fast.ops._function import Kernels, Op, Tensors

_OP = "consensus_map"


def consensus_map(
    a: Tensor, b: Tensor, num_scales: int | None = None, *, center: bool = False, eps: float = 1e-8
) -> Tensor:
    """Where two feature maps agree: cosine similarity over channels at several scales, upsampled and summed.

    Equation 5 of the M3EM report. For ``k = 0 .. num_scales-1`` both maps are reduced by adaptive average pooling to
    ``(max(1, H >> k), max(1, W >> k))`` (scale 0 is the map itself), the cosine over channels is taken at every
    position, the result goes back to (H,W) by bilinear interpolation (``align_corners=False``), and the scales are
    summed. Values lie in ``[-num_scales, num_scales]``.

    On a CPU a thread works on a sample at a time, in ``4 * H * W * (25 + 44 * s)`` bytes, whatever D is, with
    ``s = 1 + 1/4 + 1/16 ...``, a term for each scale (float64: twice that). With three scales these are 331 bytes a
    position, of which it touches 235, or 267 of maps with gaps.

    Args:
        a, b: (N,D,H,W) of one shape, dtype and device; their memory layouts may differ. N may be 0. float32 and
            bfloat16 are specified for ``|x| <= 1e17`` (beyond, squares overflow); float16 for every finite input.
        num_scales: 1 to ``1 + floor(log2(max(H, W)))``. None: 3, or that limit where it is smaller.
        center: remove the mean over channels at every position first. The report's text speaks of the Pearson
            coefficient, which this is; its equation 5 is the plain cosine, the default.
        eps: where a norm over channels is below ``eps``, that position and scale contribute 0 and pass no gradient.
            ``F.cosine_similarity`` differs there: it divides by ``eps``, and a gradient of ``1/eps`` overflows
            float16. NaN and infinity are never taken for small: they reach the output and the gradient.

    Returns:
        (N,1,H,W) in the dtype of ``a`` and ``b``; under CUDA autocast float32, as ``F.cosine_similarity`` gives.

    Raises:
        TypeError: no floating-point tensors, different dtypes, or an option of the wrong type.
        ValueError: shapes or devices differ, ``num_scales`` is out of range, or ``eps`` is not positive.
    """
    _checks.tensor(_OP, "a", a, 4, "(N,D,H,W)")
    _checks.tensor(_OP, "b", b, 4, "(N,D,H,W)")
    if b.dtype is not a.dtype:
        raise TypeError(
            f"{_OP}: b must have the dtype of a ({_checks.name_of(a.dtype)}), got {_checks.name_of(b.dtype)}"
        )
    if b.shape != a.shape:
        raise ValueError(f"{_OP}: b must have the shape of a {tuple(a.shape)}, got {tuple(b.shape)}")
    _checks.same_device(_OP, "b", b, "a", a)
    if not isinstance(center, bool):
        raise TypeError(f"{_OP}: center must be True or False, got {center!r}")
    if type(eps) is not float and (isinstance(eps, bool) or not isinstance(eps, numbers.Real)):
        raise TypeError(f"{_OP}: eps must be a positive number, got {eps!r}")
    if not 0 < eps < float("inf"):
        raise ValueError(f"{_OP}: eps must be a positive, finite number, got {eps!r}")
    _, _, h, w = a.shape
    scales = resolve_num_scales(num_scales, h, w)
    out_dtype = torch.float32 if a.is_cuda and torch.is_autocast_enabled("cuda") else a.dtype
    if a.dtype == torch.float64:
        out_dtype = a.dtype
    return _op((scales, center, float(eps), out_dtype), a, b)


def resolve_num_scales(num_scales: int | None, height: int, width: int) -> int:
    """The number of scales to use on an (H,W) map, or the reason why ``num_scales`` cannot be served."""
    limit = reference.num_scales_limit(height, width)
    if num_scales is None:
        return min(3, limit)
    if isinstance(num_scales, bool) or not isinstance(num_scales, numbers.Integral):
        raise TypeError(f"{_OP}: num_scales must be an integer or None, got {num_scales!r}")
    if not 1 <= num_scales <= limit:
        raise ValueError(
            f"{_OP}: num_scales must be from 1 to {limit} on a map of {height}x{width} "
            f"(limit = 1 + floor(log2(max(H, W)))), got {num_scales}"
        )
    return int(num_scales)


def _reference(options: tuple, tensors: Tensors) -> Tensor:
    return reference.consensus_map(*tensors, *options)


def _cpu_forward(options: tuple, tensors: Tensors, saves: bool) -> tuple[Tensor, Sequence[Tensor]]:
    a, b = tensors
    scales, center, eps, _ = options
    n, _, h, w = shape = a.shape
    out = a.new_empty(n, 1, h, w)
    saved = []
    if saves:
        size = native.consensus_map_stats(h, w, scales, center)
        saved.append(a.new_empty((n, size), dtype=reference.accumulation_dtype(a.dtype)))
    stats = saved[0].data_ptr() if saves else 0
    native.consensus_map_forward(a, b, out, stats, shape, scales, center, eps, torch.get_num_threads())
    return out, saved


def _cpu_backward(
    options: tuple, grad: Tensor, tensors: Tensors, saved: Sequence[Tensor], needs: Sequence[bool]
) -> Sequence[Tensor | None]:
    a, b = tensors
    scales, center, eps, _ = options
    grads = gradients_of(tensors, needs)
    stats = saved[0].data_ptr()
    native.consensus_map_backward(a, b, grad, *grads, stats, a.shape, scales, center, eps, torch.get_num_threads())
    return grads


def _cpu_form(options: tuple, tensors: Tensors) -> tuple[Tensor, Sequence[Tensor]]:
    a, _ = tensors
    scales, center, _, _ = options
    n, _, h, w = a.shape
    stats = (n, native.consensus_map_stats(h, w, scales, center))
    return a.new_empty(n, 1, h, w), (a.new_empty(stats, dtype=reference.accumulation_dtype(a.dtype)),)


@lru_cache(maxsize=1024)
def _needs(dtype: torch.dtype, d: int, h: int, w: int, scales: int, center: bool) -> tuple[int, int, int]:
    """Of the kernels for cards: numbers of the workspace and of the statistics a sample, bytes of shared memory."""
    return native.cuda_consensus_map_needs(DTYPES[dtype], d, h, w, scales, center)


@constant
def _shared_memory_missing(dtype: torch.dtype, d: int, h: int, w: int, options: tuple, kind: str, index: Any) -> Any:
    needed, given = _needs(dtype, d, h, w, *options)[2], _cuda.shared_memory(kind, index)
    if needed <= given:
        return None
    return f"a map of {h}x{w} needs {needed} bytes of shared memory a block, and there are {given}"


def _cuda_refuses(options: tuple, tensors: Sequence[Any]) -> str | None:
    a = tensors[0]
    if a.dim() != 4 or a.is_meta:
        return None
    _, d, h, w = a.shape
    if h * w <= 512:  # that fits into the 64 KB that every card has, however many scales there are
        return None
    scales, center = options[:2] or (resolve_num_scales(None, h, w), False)
    return _shared_memory_missing(a.dtype, d, h, w, (scales, center), a.device.type, a.device.index)


def _cuda_forward(options: tuple, tensors: Tensors, saves: bool) -> tuple[Tensor, Sequence[Tensor]]:
    a, b = tensors
    scales, center, eps, out_dtype = options
    n, d, h, w = shape = a.shape
    module, stream = _cuda.loaded(_OP, a)
    workspace, size, _ = _needs(a.dtype, d, h, w, scales, center)
    accumulation = reference.accumulation_dtype(a.dtype)
    out = a.new_empty((n, 1, h, w), dtype=out_dtype)
    partial = a.new_empty(n * workspace, dtype=accumulation)
    saved = [a.new_empty((n, size), dtype=accumulation)] if saves else []
    stats = saved[0].data_ptr() if saves else 0
    native.cuda_consensus_map_forward(module, stream, a, b, out, stats, partial.data_ptr(), shape, scales, center, eps)
    return out, saved


def _cuda_backward(
    options: tuple, grad: Tensor, tensors: Tensors, saved: Sequence[Tensor], needs: Sequence[bool]
) -> Sequence[Tensor | None]:
    a, b = tensors
    scales, center, eps, _ = options
    module, stream = _cuda.loaded(_OP, a)
    grads = _cuda.gradients_of(grad, tensors, needs)
    native.cuda_consensus_map_backward(
        module, stream, a, b, grad, *grads, saved[0].data_ptr(), a.shape, scales, center, eps
    )
    return grads


def _cuda_form(options: tuple, tensors: Tensors) -> tuple[Tensor, Sequence[Tensor]]:
    a, _ = tensors
    scales, center, _, out_dtype = options
    n, d, h, w = a.shape
    size = native.cuda_consensus_map_needs(DTYPES[a.dtype], d, h, w, scales, center)[1]
    stats = a.new_empty((n, size), dtype=reference.accumulation_dtype(a.dtype))
    return a.new_empty((n, 1, h, w), dtype=out_dtype), (stats,)


def _triton_forward(options: tuple, tensors: Tensors, saves: bool) -> tuple[Tensor, Sequence[Tensor]]:
    from m3em_fast.triton import consensus_map as kernels

    return kernels.forward(options, tensors, saves)


def _triton_backward(
    options: tuple, grad: Tensor, tensors: Tensors, saved: Sequence[Tensor], needs: Sequence[bool]
) -> Sequence[Tensor | None]:
    from m3em_fast.triton import consensus_map as kernels

    return kernels.backward(options, grad, tensors, saved, needs)


def _triton_form(options: tuple, tensors: Tensors) -> tuple[Tensor, Sequence[Tensor]]:
    from m3em_fast.triton import _plan

    a, _ = tensors
    scales, center, _, out_dtype = options
    n, _, h, w = a.shape
    stats = a.new_empty((n, _plan.stats_size(h, w, scales, center)), dtype=reference.accumulation_dtype(a.dtype))
    return a.new_empty((n, 1, h, w), dtype=out_dtype), (stats,)


_SCHEMA = "(Tensor a, Tensor b, int num_scales, bool center, float eps, str out_dtype, str backend) -> (Tensor, Tensor)"
_CUDA = Kernels(_cuda_forward, _cuda_backward, _cuda_form, _cuda_refuses)
_TRITON = Kernels(_triton_forward, _triton_backward, _triton_form)
_KERNELS = {"cpu": Kernels(_cpu_forward, _cpu_backward, _cpu_form), "cuda": _CUDA, "simt": _CUDA, "triton": _TRITON}
_op = Op(_OP, _reference, lambda needs: (True, True), _KERNELS, _SCHEMA)
