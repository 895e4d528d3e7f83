"""consensus_pool with a map (the weighting of section 2.2 of the report) and without (global average pooling)."""

from __future__ import annotations

import torch

from bench import eager
from bench.case import Case, Draw, Layout, Problem, Size, Traffic, cases_of, sizes_of, traffic
from m3em_fast import ops

OP = "consensus_pool"
WITH_MAP = {"with cmap": ("x", "cmap"), "with cmap, x frozen": ("cmap",)}
WITHOUT = {"without cmap": ("x",), "without cmap, x frozen": ()}


def setup(
    size: Size,
    dtype: torch.dtype,
    layout: Layout,
    needs: tuple[str, ...],
    beside: torch.dtype | None = None,
    with_map: bool = True,
) -> Problem:
    draw = Draw(dtype, layout, OP, size)
    inputs = {"x": draw(size.n, size.c, size.h, size.w)}
    reads: dict[str, tuple[str, ...]] = {"x": ()}
    if with_map:
        # A sum of three cosines of which most are positive.
        inputs["cmap"] = draw.beside(beside)(size.n, 1, size.h, size.w, scale=0.5, offset=1.0)
        reads = {"x": ("cmap",), "cmap": ("x",)}
    result = beside or dtype
    sizes, pooled = sizes_of(inputs), size.n * size.c * result.itemsize
    moved = traffic(sizes, pooled, needs, reads)
    if not with_map and needs:
        # The gradient of a plain mean is one number a channel; torch's is expanded from it as well.
        moved = Traffic(moved.forward, pooled + size.n * size.c * dtype.itemsize)
    return Problem(inputs, needs, moved, ops.consensus_pool, eager.consensus_pool, result_dtype=result)


def _without(
    size: Size, dtype: torch.dtype, layout: Layout, needs: tuple[str, ...], beside: torch.dtype | None = None
) -> Problem:
    return setup(size, dtype, layout, needs, beside, with_map=False)


def cases(size: Size, dtype: torch.dtype, layout: Layout, beside: torch.dtype | None = None) -> list[Case]:
    shape = f"x {size.n}x{size.c}x{size.h}x{size.w}"
    with_map = cases_of(OP, WITH_MAP, setup, shape, size, dtype, layout, beside)
    # Without a map nothing stands beside x.
    return with_map if beside else [*with_map, *cases_of(OP, WITHOUT, _without, shape, size, dtype, layout)]
