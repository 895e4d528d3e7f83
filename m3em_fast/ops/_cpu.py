"""What the ops' calls into the compiled CPU kernels share.

Memory is always made on the device of a tensor at hand: ``with torch.device(...)`` and ``torch.set_default_device``
move what ``torch.empty`` gives without one, and a kernel would write to an address that is none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from m3em_fast.backends import native

# The numbers of m3em::Dtype in csrc/cpu/kernels.h.
DTYPES = {torch.float64: 0, torch.float32: 1, torch.float16: 2, torch.bfloat16: 3}
if native is not None:
    native.dtypes(DTYPES)  # with it they read tensors themselves


class Form:
    """What is left of an input that a backward does not read: enough to make memory for its gradient.

    Kernels take it for a tensor without memory.
    """

    __slots__ = ("channels_last", "device", "dtype", "shape", "strides")

    def __init__(self, x: Tensor) -> None:
        self.shape, self.dtype, self.device, self.strides = x.shape, x.dtype, x.device, x.stride()
        self.channels_last = x.dim() == 4 and is_channels_last(x)

    def stride(self) -> tuple[int, ...]:
        return self.strides

    def data_ptr(self) -> int:
        return 0


def is_channels_last(x: Tensor) -> bool:
    """Whether results beside x (N,C,H,W) are to be channels_last; a tensor that is both is row-major."""
    return not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def empty_beside(x: Tensor, channels: int, dtype: torch.dtype) -> Tensor:
    """Memory for a result (N,channels,H,W) in the memory format of x."""
    n, _, h, w = x.shape
    if is_channels_last(x):
        return torch.empty((n, channels, h, w), dtype=dtype, device=x.device, memory_format=torch.channels_last)
    # The quickest call: sizes not in a tuple, of a tensor of that dtype.
    return x.new_empty(n, channels, h, w) if x.dtype is dtype else x.new_empty((n, channels, h, w), dtype=dtype)


def gradient_of(x: Tensor | Form | None, needed: bool) -> Tensor | None:
    """Memory for the gradient of x (any rank), without the gaps that x may have; None where none is needed."""
    if x is None or not needed:
        return None
    if x.channels_last if isinstance(x, Form) else x.dim() == 4 and is_channels_last(x):
        return torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def gradients_of(tensors: Sequence[Any], needs: Sequence[bool]) -> list[Tensor | None]:
    """Memory for the gradients of an op's tensors, None where none is needed."""
    return [gradient_of(t, need) for t, need in zip(tensors, needs, strict=True)]
