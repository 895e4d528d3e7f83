"""What one row of the table measures: inputs, who computes what from them, and the traffic that nobody can avoid."""

from __future__ import annotations

import contextlib
import copy
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
from torch import Tensor

Layout = Literal["contiguous", "channels_last"]
Outputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Size:
    """Samples, channels, latent channels, height and width of the maps. The defaults are a step of the paper."""

    n: int = 160
    c: int = 1024
    d: int = 512
    h: int = 7
    w: int = 7


# So small that what is timed is the way to the kernel; three scales need a map of 4x4.
TINY = Size(n=1, c=8, d=8, h=4, w=4)


@dataclass(frozen=True)
class Traffic:
    """Bytes that every implementation has to move, and the floating-point operations of the matrix products, if any."""

    forward: int
    backward: int
    forward_flops: int = 0
    backward_flops: int = 0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(
            self.forward + other.forward,
            self.backward + other.backward,
            self.forward_flops + other.forward_flops,
            self.backward_flops + other.backward_flops,
        )

    def of(self, mode: str) -> tuple[int, int]:
        """Bytes and operations of a mode of timing."""
        parts = {"forward": (self.forward, self.forward_flops), "backward": (self.backward, self.backward_flops)}
        if mode == "forward+backward":
            return self.forward + self.backward, self.forward_flops + self.backward_flops
        return parts[mode]


def traffic(sizes: Mapping[str, int], out: int, needs: Sequence[str], reads: Mapping[str, Sequence[str]]) -> Traffic:
    """The floor of an op: forward reads every input once and writes the result; backward reads the gradient of the
    result and what the wanted gradients are made of, each once, and writes those gradients.

    Args:
        sizes: input -> bytes; and whatever else ``reads`` names.
        out: bytes of the result.
        needs: the inputs by which a gradient is wanted.
        reads: input -> what its gradient is made of, beside the gradient of the result.
    """
    forward = sum(sizes[name] for name in reads) + out
    if not needs:
        return Traffic(forward, 0)
    read = {part for name in needs for part in reads[name]}
    return Traffic(forward, out + sum(sizes[part] for part in read) + sum(sizes[name] for name in needs))


@dataclass
class Problem:
    """A case with its tensors, made once and used for the check, for the times and for the memory.

    ``fast`` (m3em_fast), ``eager`` and ``exact`` take the inputs in order and return a tensor or a tuple of tensors.
    ``exact`` is asked for the definition, in float64 and a few samples at a time; None: ``fast`` does that as well.
    """

    inputs: dict[str, Tensor]
    needs: tuple[str, ...]
    traffic: Traffic
    fast: Callable[..., Tensor | Outputs]
    eager: Callable[..., Tensor | Outputs]
    exact: Callable[..., Tensor | Outputs] | None = None
    # Inputs without a batch axis, whose gradients are sums over the batch.
    shared: frozenset[str] = frozenset()
    # What m3em_fast may round to half on the way to a half result: nothing, an operand of a matrix product or a factor
    # of the result, or everything that one op hands to the next.
    rounds: Literal["once", "operands", "between"] = "once"
    # Of the results; None: that of the first input.
    result_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        if self.result_dtype is None:
            self.result_dtype = next(iter(self.inputs.values())).dtype
        for name in self.needs:
            self.inputs[name].requires_grad_()

    @property
    def wanted(self) -> list[Tensor]:
        return [self.inputs[name] for name in self.needs]


_place = "cpu"  # where tensors of a case are made


@contextlib.contextmanager
def _placed(device: str) -> Iterator[None]:
    global _place
    before, _place = _place, device
    try:
        # Modules too are made where torch makes things.
        with torch.device(device) if device != "cpu" else contextlib.nullcontext():
            yield
    finally:
        _place = before


@dataclass(frozen=True)
class Case:
    """One case: everything about it that a row has to state, and ``setup``, which makes its tensors."""

    op: str
    variant: str
    size: Size
    dtype: torch.dtype
    layout: Layout
    needs: str
    shape: str
    setup: Callable[[], Problem] = field(repr=False)
    # Dtype of what stands beside x (gates, weight, map or parameters); None: that of x.
    beside: torch.dtype | None = None

    def made(self, device: str = "cpu") -> Problem:
        """Its tensors, on a device."""
        with _placed(device):
            return self.setup()

    @property
    def dtype_name(self) -> str:
        """As on the command line; float16+float32 is a float16 x beside float32."""
        return "+".join(str(dtype).removeprefix("torch.") for dtype in (self.dtype, self.beside) if dtype is not None)

    def __str__(self) -> str:
        layout = "" if self.layout == "contiguous" else f" {self.layout}"
        gradients = f"gradients by {self.needs}" if self.needs else "no gradient"
        return f"{self.op}, {self.variant}: {self.shape} {self.dtype_name}{layout}; {gradients}"


Setup = Callable[[Size, torch.dtype, Layout, tuple[str, ...], torch.dtype | None], Problem]


def cases_of(
    op: str,
    variants: Mapping[str, tuple[str, ...]],
    setup: Setup,
    shape: str,
    size: Size,
    dtype: torch.dtype,
    layout: Layout,
    beside: torch.dtype | None = None,
) -> list[Case]:
    """A case a variant; ``variants`` says by which inputs each one wants gradients."""
    return [
        Case(op, name, size, dtype, layout, ", ".join(needs), shape, made, beside)
        for name, needs in variants.items()
        for made in [partial(setup, size, dtype, layout, needs, beside)]
    ]


class Draw:
    """Random tensors of one dtype and layout: the same numbers for the same key, on every machine."""

    def __init__(self, dtype: torch.dtype, layout: Layout, *key: object) -> None:
        self.dtype = dtype
        self.layout = layout
        self.source = torch.Generator().manual_seed(zlib.crc32("/".join(map(str, key)).encode()))

    def __call__(self, *shape: int, scale: float = 1.0, offset: float = 0.0) -> Tensor:
        values = torch.randn(shape, generator=self.source, device="cpu").mul_(scale).add_(offset)
        values = values.to(_place, self.dtype)
        if len(shape) == 4 and self.layout == "channels_last":
            return values.contiguous(memory_format=torch.channels_last)
        return values

    def beside(self, dtype: torch.dtype | None) -> Draw:
        """The same source in another dtype; None: in this one."""
        other = copy.copy(self)
        other.dtype = dtype or self.dtype
        return other

    def gated(self, size: Size, beside: torch.dtype | None) -> tuple[dict[str, Tensor], Draw]:
        """x and two gates as inputs, and what draws all that stands beside x."""
        inputs = {"x": self(size.n, size.c, size.h, size.w)}
        others = self.beside(beside)
        inputs |= {f"gate{g}": others.gate(size.n, size.c) for g in range(2)}
        return inputs, others

    def gate(self, *shape: int) -> Tensor:
        """As a sigmoid leaves it."""
        return torch.randn(shape, generator=self.source, device="cpu").sigmoid_().to(_place, self.dtype)


def sizes_of(inputs: Mapping[str, Tensor]) -> dict[str, int]:
    """Input -> bytes."""
    return {name: tensor.numel() * tensor.element_size() for name, tensor in inputs.items()}
