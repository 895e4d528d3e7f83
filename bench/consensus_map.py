"""consensus_map at three scales: equation 5 of the report."""

from __future__ import annotations

import torch

from bench import eager
from bench.case import Case, Draw, Layout, Problem, Size, cases_of, sizes_of, traffic
from m3em_fast import ops

OP = "consensus_map"
VARIANTS = {"3 scales": ("a", "b")}
# The cosine's gradient by either map is made of both.
READS = {"a": ("a", "b"), "b": ("a", "b")}


def setup(
    size: Size, dtype: torch.dtype, layout: Layout, needs: tuple[str, ...], beside: torch.dtype | None = None
) -> Problem:
    draw = Draw(dtype, layout, OP, size)
    inputs = {name: draw(size.n, size.d, size.h, size.w) for name in ("a", "b")}
    sizes = sizes_of(inputs)
    moved = traffic(sizes, sizes["a"] // size.d, needs, READS)
    return Problem(inputs, needs, moved, ops.consensus_map, eager.consensus_map)


def cases(size: Size, dtype: torch.dtype, layout: Layout, beside: torch.dtype | None = None) -> list[Case]:
    """None with ``beside``: a and b have one dtype."""
    if beside:
        return []
    shape = f"a, b {size.n}x{size.d}x{size.h}x{size.w}"
    return cases_of(OP, VARIANTS, setup, shape, size, dtype, layout)
