"""gated_consensus_pool with two gates and a map: what the enhanced vector of a modality is made with."""

from __future__ import annotations

import torch
from torch import Tensor

from bench import eager
from bench.case import Case, Draw, Layout, Problem, Size, Traffic, cases_of, sizes_of, traffic
from m3em_fast import ops

OP = "gated_consensus_pool"
VARIANTS = {"2 gates": ("x", "gate0", "gate1", "cmap"), "2 gates, x frozen": ("gate0", "gate1", "cmap")}
# A gate's gradient is made of the pooled vector, which is as small as a gate.
READS = {
    "x": ("gate0", "gate1", "cmap"),
    "gate0": ("pooled",),
    "gate1": ("pooled",),
    "cmap": ("x", "gate0", "gate1"),
}


def moved(sizes: dict[str, int], needs: tuple[str, ...]) -> Traffic:
    return traffic(sizes | {"pooled": sizes["gate0"]}, 2 * sizes["gate0"], needs, READS)


def setup(
    size: Size, dtype: torch.dtype, layout: Layout, needs: tuple[str, ...], beside: torch.dtype | None = None
) -> Problem:
    inputs, others = Draw(dtype, layout, OP, size).gated(size, beside)
    # A sum of three cosines of which most are positive.
    inputs["cmap"] = others(size.n, 1, size.h, size.w, scale=0.5, offset=1.0)

    def fast(x: Tensor, gate0: Tensor, gate1: Tensor, cmap: Tensor) -> Tensor:
        return ops.gated_consensus_pool(x, [gate0, gate1], cmap)

    def short(x: Tensor, gate0: Tensor, gate1: Tensor, cmap: Tensor) -> Tensor:
        return eager.gated_consensus_pool(x, [gate0, gate1], cmap)

    result = inputs["cmap"].dtype
    return Problem(inputs, needs, moved(sizes_of(inputs), needs), fast, short, rounds="operands", result_dtype=result)


def cases(size: Size, dtype: torch.dtype, layout: Layout, beside: torch.dtype | None = None) -> list[Case]:
    shape = f"x {size.n}x{size.c}x{size.h}x{size.w}"
    return cases_of(OP, VARIANTS, setup, shape, size, dtype, layout, beside)
