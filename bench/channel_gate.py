"""channel_gate with two gates: equations 2 to 4 of the report."""

from __future__ import annotations

import torch
from torch import Tensor

from bench import eager
from bench.case import Case, Draw, Layout, Problem, Size, cases_of, sizes_of, traffic
from m3em_fast import ops

OP = "channel_gate"
# Features are frozen in training, so that x needs no gradient there.
VARIANTS = {"2 gates": ("x", "gate0", "gate1"), "2 gates, x frozen": ("gate0", "gate1")}
READS = {"x": ("gate0", "gate1"), "gate0": ("x",), "gate1": ("x",)}


def setup(
    size: Size, dtype: torch.dtype, layout: Layout, needs: tuple[str, ...], beside: torch.dtype | None = None
) -> Problem:
    inputs, _ = Draw(dtype, layout, OP, size).gated(size, beside)
    sizes = sizes_of(inputs)

    def cast(x: Tensor, *gates: Tensor) -> Tensor:
        # Beside a float32 gate torch makes the product float32, and its owner wants it in x's dtype. Casting the gates
        # beforehand is the cheaper way.
        return eager.channel_gate(x, *(gate.to(x.dtype) for gate in gates))

    moved = traffic(sizes, 2 * sizes["x"], needs, READS)
    return Problem(inputs, needs, moved, ops.channel_gate, cast if beside else eager.channel_gate)


def cases(size: Size, dtype: torch.dtype, layout: Layout, beside: torch.dtype | None = None) -> list[Case]:
    shape = f"x {size.n}x{size.c}x{size.h}x{size.w}"
    return cases_of(OP, VARIANTS, setup, shape, size, dtype, layout, beside)
