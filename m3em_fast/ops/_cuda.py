"""What the ops' calls into the kernels for cards share. They serve the backends ``cuda`` and ``simt`` alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from m3em_fast import backends
from m3em_fast.ops._cpu import Form, is_channels_last


def loaded(op: str, x: Tensor) -> tuple[Any, int]:
    """The kernels of an op on the device of x, and the stream that they are to run on."""
    cards: Any = backends.cards if x.is_cuda else backends.simulated
    index = cards.place(x)
    module = cards.modules.get((op, index))
    if module is None:  # a backward, or a compiled program, in a process that has chosen nothing itself
        reason = cards.refusal(op, index)
        if reason is not None:
            raise backends.refused_by("cuda" if x.is_cuda else "simt", op, reason)
        module = cards.modules[op, index]
    return module, cards.stream(index)


@backends.constant
def shared_memory(kind: str, index: int | None) -> int:
    """The bytes of shared memory that a block may have on a device."""
    if kind == "cuda":
        return backends.cards.shared_memory(index or 0)
    return 48 << 10 if backends.simulated is None else backends.simulated.shared_memory(backends.simulated.device)


def gradient_of(x: Tensor | Form | None, needed: bool, device: torch.device) -> Tensor | None:
    """Memory on a device for the gradient of x (any rank), without the gaps that x may have; None if not needed."""
    if x is None or not needed:
        return None
    last = x.channels_last if isinstance(x, Form) else x.dim() == 4 and is_channels_last(x)
    layout = torch.channels_last if last else torch.contiguous_format
    return torch.empty(x.shape, dtype=x.dtype, device=device, memory_format=layout)


def gradients_of(grad: Tensor, tensors: Sequence[Tensor | Form | None], needs: Sequence[bool]) -> list[Tensor | None]:
    """Memory for the needed gradients, beside the incoming one: what is left of an unread input has no device."""
    return [gradient_of(t, need, grad.device) for t, need in zip(tensors, needs, strict=True)]


def empty_beside(x: Tensor, channels: int, dtype: torch.dtype) -> Tensor:
    """Memory for a result (N,channels,H,W) beside x, in its memory format."""
    n, _, h, w = x.shape
    layout = torch.channels_last if is_channels_last(x) else torch.contiguous_format
    return torch.empty((n, channels, h, w), dtype=dtype, device=x.device, memory_format=layout)
