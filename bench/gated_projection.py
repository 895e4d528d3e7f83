"""gated_projection of two gated copies: the 1x1 convolution into the latent space of section 2.2 of the report."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from bench import eager
from bench.case import Case, Draw, Layout, Problem, Size, Traffic, cases_of, sizes_of, traffic
from m3em_fast import ops

OP = "gated_projection"
VARIANTS = {"2 gates": ("x", "gate0", "gate1", "weight"), "2 gates, x frozen": ("gate0", "gate1", "weight")}
READS = {
    "x": ("gate0", "gate1", "weight"),
    "gate0": ("x", "weight"),
    "gate1": ("x", "weight"),
    "weight": ("x", "gate0", "gate1"),
}


def moved(sizes: dict[str, int], out: int, size: Size, needs: tuple[str, ...]) -> Traffic:
    """Bytes, and the operations of the matrix products with the gates folded into the weight."""
    product = 2 * size.n * size.h * size.w * size.c * size.d
    # One more product by x; and one for all of gates and weight, whose gradients come from the same M_n = go_n x_n^T.
    backward = product * (("x" in needs) + any(name != "x" for name in needs))
    return replace(traffic(sizes, out, needs, READS), forward_flops=product, backward_flops=backward)


def setup(
    size: Size, dtype: torch.dtype, layout: Layout, needs: tuple[str, ...], beside: torch.dtype | None = None
) -> Problem:
    inputs, others = Draw(dtype, layout, OP, size).gated(size, beside)
    inputs["weight"] = others(size.d, 2 * size.c, scale=(2 * size.c) ** -0.5)
    sizes = sizes_of(inputs)

    def fast(x: Tensor, gate0: Tensor, gate1: Tensor, weight: Tensor) -> Tensor:
        return ops.gated_projection(x, [gate0, gate1], weight)

    def short(x: Tensor, gate0: Tensor, gate1: Tensor, weight: Tensor) -> Tensor:
        return eager.gated_projection(x, [gate0, gate1], weight)

    result = inputs["weight"].dtype
    moves = moved(sizes, size.n * size.d * size.h * size.w * result.itemsize, size, needs)
    shared = frozenset({"weight"})
    return Problem(inputs, needs, moves, fast, short, shared=shared, rounds="operands", result_dtype=result)


def cases(size: Size, dtype: torch.dtype, layout: Layout, beside: torch.dtype | None = None) -> list[Case]:
    shape = f"x {size.n}x{size.c}x{size.h}x{size.w}, D = {size.d}"
    return cases_of(OP, VARIANTS, setup, shape, size, dtype, layout, beside)
