"""Every op in plain torch: the definition that the fast kernels are written against, and the fallback.

Nothing here checks its arguments (``m3em_fast.ops`` does) and nothing here is meant to be fast. What it does keep is
every rule that holds for all backends: half inputs are accumulated in float32 and float64 in float64, a half result is
rounded once at the end, positions whose norm is below ``eps`` contribute neither value nor gradient, and NaN or
infinity in an input always reaches the output. Written from differentiable torch functions only, so that double
backward, forward mode, vmap and the meta device work.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from m3em_fast.backends import under_vmap

__all__ = [
    "channel_gate",
    "consensus_map",
    "consensus_pool",
    "gated_consensus_pool",
    "gated_projection",
    "num_scales_limit",
]


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 accumulates in float64, everything else in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def num_scales_limit(height: int, width: int) -> int:
    """How many scales a map has before halving stops changing it: ``1 + floor(log2(max(H, W)))``."""
    limit = 1
    while max(height, width) >> limit:
        limit += 1
    return limit


def _memory_format(x: Tensor) -> torch.memory_format:
    if under_vmap():  # there a tensor does not answer questions about memory formats
        return torch.contiguous_format
    channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if channels_last else torch.contiguous_format


def _gated(x: Tensor, gates: Sequence[Tensor]) -> Tensor:
    """Copies of x, one a gate, in the accumulation dtype."""
    # Converted once: a conversion for every gate would round each one's gradient to half before they are added.
    wide = x.to(accumulation_dtype(x.dtype))
    return torch.cat([wide * gate.to(wide.dtype)[:, :, None, None] for gate in gates], dim=1)


def channel_gate(x: Tensor, gates: Sequence[Tensor]) -> Tensor:
    return _gated(x, gates).to(x.dtype).contiguous(memory_format=_memory_format(x))


def _cosine(a: Tensor, b: Tensor, eps: float) -> Tensor:
    """Cosine over dim 1, kept as (N,1,h,w); exactly 0, with no gradient, where a finite norm is below ``eps``."""
    dot = (a * b).sum(1, keepdim=True)
    square_a = (a * a).sum(1, keepdim=True)
    square_b = (b * b).sum(1, keepdim=True)
    with torch.no_grad():
        small = (square_a.sqrt() < eps) | (square_b.sqrt() < eps)
        # A position with a NaN or an infinity in one map is no dead position, however small the other map is there.
        small = small & square_a.isfinite() & square_b.isfinite()
    # sqrt has an infinite slope at 0 and 0 times infinity is NaN, so dead positions must not pass through it at all.
    norm_a = torch.where(small, torch.ones_like(square_a), square_a).sqrt()
    norm_b = torch.where(small, torch.ones_like(square_b), square_b).sqrt()
    return torch.where(small, torch.zeros_like(dot), dot / (norm_a * norm_b))


def _adaptive_pool(x: Tensor, dim: int, size: int) -> Tensor:
    """Adaptive average pooling of one dimension to ``size``, with torch's windows (7 -> 3: [0,3) [2,5) [4,7)).

    Slices, and not ``F.adaptive_avg_pool2d`` and ``F.interpolate``: torch.compile fails on the backward of both
    (overlapping windows), and on the forward of the pooling where sizes are symbolic.
    """
    length = x.shape[dim]
    windows = [(i * length // size, -(-(i + 1) * length // size)) for i in range(size)]
    return torch.stack([x.narrow(dim, start, stop - start).mean(dim) for start, stop in windows], dim)


def _upsample(x: Tensor, dim: int, size: int) -> Tensor:
    """Linear interpolation of one dimension to ``size``, as bilinear upsampling with align_corners=False has it."""
    length = x.shape[dim]
    lines = []
    for i in range(size):
        position = max(0.0, (i + 0.5) * length / size - 0.5)
        low = min(int(position), length - 1)
        high = min(low + 1, length - 1)
        share = position - low
        line = x.select(dim, low)
        lines.append(line if high == low else line * (1.0 - share) + x.select(dim, high) * share)
    return torch.stack(lines, dim)


def consensus_map(
    a: Tensor, b: Tensor, num_scales: int, center: bool, eps: float, out_dtype: torch.dtype | None = None
) -> Tensor:
    out_dtype = out_dtype or a.dtype
    height, width = a.shape[2], a.shape[3]
    acc = accumulation_dtype(a.dtype)
    a, b = a.to(acc), b.to(acc)
    if center:
        a = a - a.mean(1, keepdim=True)
        b = b - b.mean(1, keepdim=True)
    total = _cosine(a, b, eps)
    for k in range(1, num_scales):
        pooled_a, pooled_b = (
            _adaptive_pool(_adaptive_pool(x, 2, max(1, height >> k)), 3, max(1, width >> k)) for x in (a, b)
        )
        coarse = _cosine(pooled_a, pooled_b, eps)
        total = total + _upsample(_upsample(coarse, 2, height), 3, width)
    return total.to(out_dtype).contiguous()


def pool(x: Tensor, cmap: Tensor | None) -> Tensor:
    """The pooled vector in the accumulation dtype, not yet rounded."""
    acc = accumulation_dtype(x.dtype)
    x = x.to(acc)
    if cmap is not None:
        x = x * (1 + cmap.to(acc))
    return x.mean((2, 3))


def consensus_pool(x: Tensor, cmap: Tensor | None) -> Tensor:
    return pool(x, cmap).to(widest(x, cmap))


def gated_consensus_pool(x: Tensor, gates: Sequence[Tensor], cmap: Tensor | None) -> Tensor:
    pooled = pool(x, cmap)
    return torch.cat([pooled * gate.to(pooled.dtype) for gate in gates], dim=1).to(widest(x, cmap, *gates))


def widest(x: Tensor, *others: Tensor | None) -> torch.dtype:
    """float32 where any float32 stands beside a half x, else the dtype of x."""
    for t in others:  # a loop: next() with a default is beyond torch.compile of torch 2.7
        if t is not None and t.dtype != x.dtype:
            return t.dtype
    return x.dtype


def gated_projection(
    x: Tensor, gates: Sequence[Tensor], weight: Tensor, bias: Tensor | None, out_dtype: torch.dtype | None = None
) -> Tensor:
    gated = _gated(x, gates)
    acc = gated.dtype
    # autocast would round the operands of this convolution to half; what is to be rounded is decided by the caller.
    with torch.autocast(x.device.type if x.device.type != "meta" else "cpu", enabled=False):
        out = F.conv2d(gated, weight.to(acc)[:, :, None, None], None if bias is None else bias.to(acc))
    return out.to(out_dtype or weight.dtype).contiguous(memory_format=_memory_format(x))
