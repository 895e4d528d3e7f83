"""What the ops' calls into the compiled CPU kernels share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# The numbers of m3em::Dtype in csrc/cpu/kernels.h.
DTYPES = {torch.float64: 0, torch.float32: 1, torch.float16: 2, torch.bfloat16: 3}


def arg(x: Tensor | None) -> tuple | None:
    """A tensor as the kernels take it; None for one that is not there or not wanted."""
    return None if x is None else (x.data_ptr(), DTYPES[x.dtype], x.stride())


def args(tensors: Sequence[Tensor | None]) -> tuple:
    return tuple([arg(x) for x in tensors])


def is_channels_last(x: Tensor) -> bool:
    """Whether results beside x (N,C,H,W) are to be channels_last; a tensor that is both is row-major."""
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def empty_beside(x: Tensor, channels: int, dtype: torch.dtype) -> Tensor:
    """Memory for a result (N,channels,H,W) in the memory format of x."""
    shape = (x.shape[0], channels, x.shape[2], x.shape[3])
    if is_channels_last(x):
        return torch.empty(shape, dtype=dtype, memory_format=torch.channels_last)
    return torch.empty(shape, dtype=dtype)


def gradient_of(x: Tensor | None, needed: bool) -> Tensor | None:
    """Memory for the gradient of x (any rank), without the gaps that x may have; None where none is needed."""
    if x is None or not needed:
        return None
    return empty_beside(x, x.shape[1], x.dtype) if x.dim() == 4 else torch.empty(x.shape, dtype=x.dtype)
