"""consensus_pool with a map (the weighting of section 2.2 of the report) and without (global average pooling)."""

from __future__ import annotations

import torch

from bench import eager
from bench.case import Case, Draw, Layout, Problem, Size, cases_of, sizes_of, traffic
from m3em_fast import ops

OP = "consensus_pool"
WITH_MAP = {"with cmap": ("x", "cmap"), "with cmap, x frozen": ("cmap",)}
WITHOUT = {"without cmap": ("x",), "without cmap, x frozen": ()}


def setup(size: Size, dtype: torch.dtype, layout: Layout, needs: tuple[str, ...], with_map: bool = True) -> Problem:
    draw = Draw(dtype, layout, OP, size)
    inputs = {"x": draw(size.n, size.c, size.h, size.w)}
    reads: dict[str, tuple[str, ...]] = {"x": ()}
    if with_map:
        # A sum of three cosines of which most are positive.
        inputs["cmap"] = draw(size.n, 1, size.h, size.w, scale=0.5, offset=1.0)
        reads = {"x": ("cmap",), "cmap": ("x",)}
    sizes = sizes_of(inputs)
    moved = traffic(sizes, sizes["x"] // (size.h * size.w), needs, reads)
    return Problem(inputs, needs, moved, ops.consensus_pool, eager.consensus_pool)


def _without(size: Size, dtype: torch.dtype, layout: Layout, needs: tuple[str, ...]) -> Problem:
    return setup(size, dtype, layout, needs, with_map=False)


def cases(size: Size, dtype: torch.dtype, layout: Layout) -> list[Case]:
    shape = f"x {size.n}x{size.c}x{size.h}x{size.w}"
    return [
        *cases_of(OP, WITH_MAP, setup, shape, size, dtype, layout),
        *cases_of(OP, WITHOUT, _without, shape, size, dtype, layout),
    ]
