"""How the Triton kernels are launched: on the device of their tensors, or interpreted on the CPU.

Rules that every kernel keeps. Sums are made in float32, in float64 for float64, and rounded once, when they are stored.
Their order depends on sizes, dtype and layout alone: no atomics, nothing of N, and no guess at how an address is
aligned (``do_not_specialize_on_alignment``), which would change the order from one clip of a batch to the next. Strides
are arguments, and what is multiplied by one is a 64-bit number. There is no float argument: Triton takes a Python float
for float32, and its interpreter for float64.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import triton.language as tl
from torch import Tensor

from m3em_fast import backends
from m3em_fast.ops._cpu import Form
from m3em_fast.triton import interpreted
from m3em_fast.triton._table import config, power_of_two

INTERPRETED = interpreted()
_interpreter = threading.Lock()


def accumulation(dtype: torch.dtype) -> Any:
    """The accumulation type of tensors of a dtype, in Triton's terms."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def capability_of(x: Tensor) -> int:
    """What ``_table.config`` asks for: 70 for a card of 7.0, and 0 under the interpreter."""
    return 0 if INTERPRETED else backends.triton_devices.capability(x.get_device())


def sizes_of(op: str, x: Tensor, dtype: torch.dtype, channels: int, positions: int) -> dict[str, int]:
    """BLOCK_C, BLOCK_P and num_warps for maps of a dtype, on the device of x."""
    if INTERPRETED:  # what costs there is the number of programs
        return {
            "BLOCK_C": min(power_of_two(channels), 128),
            "BLOCK_P": min(power_of_two(positions), 256),
            "num_warps": 4,
        }
    return config(op, dtype, channels, positions, capability_of(x))


def present(x: Any) -> Any:
    """The tensor, or None in the place of one that is not read."""
    return None if isinstance(x, Form) else x


def strides_of(*tensors: Tensor | None) -> tuple[list[tuple[int, ...]], bool]:
    """The strides of maps (N,C,H,W), 0 for one that is not there, and whether the positions of each are one evenly
    spaced line, so that the stride of W alone leads along them."""
    found = [(0, 0, 0, 0) if x is None else x.stride() for x in tensors]
    line = all(x is None or x.shape[2] == 1 or x.stride(2) == x.shape[3] * x.stride(3) for x in tensors)
    return found, line


def blocks(count: int, size: int) -> int:
    return -(-count // size)


def launch(kernel: Any, programs: int, writes: Sequence[Tensor | None], *arguments: Any, **constants: Any) -> None:
    """Run so many programs of a kernel, on torch's current stream of the device of what it writes to."""
    if not programs:
        return
    if INTERPRETED:
        _interpret(kernel, programs, [t for t in writes if t is not None], arguments, constants)
        return
    index = next(t for t in writes if t is not None).get_device()
    if index == torch.cuda.current_device():
        kernel[(programs,)](*arguments, **constants)
    else:
        with torch.cuda.device(index):
            kernel[(programs,)](*arguments, **constants)


def _interpret(kernel: Any, programs: int, writes: Sequence[Tensor], arguments: Any, constants: Any) -> None:
    """The interpreter cuts float32 to bfloat16, where cards round. It writes float32 instead, which torch rounds."""
    rounded: list[tuple[Tensor, Tensor]] = []

    def wide(argument: Any) -> Any:
        if isinstance(argument, tuple):
            return tuple(wide(each) for each in argument)
        if not any(argument is t for t in writes) or argument.dtype != torch.bfloat16:
            return argument
        # All of its memory in a row, gaps and what lies in them too, so that the strides hold.
        reach = 1 + sum((size - 1) * stride for size, stride in zip(argument.shape, argument.stride(), strict=True))
        memory = argument.as_strided((reach,), (1,))
        rounded.append((memory, memory.float()))
        return rounded[-1][1]

    # It keeps the number of the running program in one place, and warns of every NaN.
    with _interpreter, np.errstate(all="ignore"):
        kernel[(programs,)](*[wide(argument) for argument in arguments], **constants)
    for memory, written in rounded:
        memory.copy_(written)
