"""The whole module, MutualEnhancement of RGB, flow and audio, with frozen features (as in training) and without."""

from __future__ import annotations

import copy
from functools import partial

import torch
from torch import Tensor
from torch.func import functional_call

from bench import consensus_map, eager, gated_consensus_pool, gated_projection
from bench.case import Case, Draw, Layout, Problem, Size, Traffic, traffic
from m3em_fast.nn import MutualEnhancement

OP = "mutual_enhancement"
VARIANTS = {"RGB, flow, audio; features frozen": False, "RGB, flow, audio": True}
SPATIAL, VECTOR = ("RGB", "Flow"), ("Audio",)


def moved(size: Size, itemsize: int, beside: int, features_need: bool) -> Traffic:
    """The floors of the ops in it, one after another. A fusion across ops may go below.

    Left out: the small layers of the gates, the vector modality, and the sum of the three gradients by each map.
    """
    positions = size.h * size.w
    maps, pooled, gates = size.n * size.c * positions * itemsize, size.n * size.c * itemsize, size.n * size.c * beside
    latent, cmap = size.n * size.d * positions * beside, size.n * positions * beside
    x = ("x",) if features_need else ()
    gated = {"x": maps, "gate0": gates, "gate1": gates}
    # The gradient of the plain mean is one number a channel.
    one = Traffic(maps + pooled, 2 * pooled if features_need else 0)
    projected = {**gated, "weight": 2 * size.c * size.d * beside}
    one += gated_projection.moved(projected, latent, size, (*x, "gate0", "gate1", "weight"))
    one += gated_consensus_pool.moved({**gated, "cmap": cmap}, (*x, "gate0", "gate1", "cmap"))
    pair = traffic({"a": latent, "b": latent}, cmap, ("a", "b"), consensus_map.READS)
    return one + one + pair


def setup(
    size: Size, dtype: torch.dtype, layout: Layout, features_need: bool, beside: torch.dtype | None = None
) -> Problem:
    draw = Draw(dtype, layout, OP, size)
    own = beside or dtype
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = MutualEnhancement(
            dict.fromkeys(SPATIAL, size.c), dict.fromkeys(VECTOR, size.c), latent_channels=size.d
        ).to(own)
    state = dict(module.named_parameters())
    features = {name: draw(size.n, size.c, size.h, size.w) for name in SPATIAL}
    features |= {name: draw(size.n, size.c) for name in VECTOR}
    blank = copy.deepcopy(module)

    def split(tensors: tuple[Tensor, ...]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        count = len(features)
        return dict(zip(features, tensors[:count], strict=True)), dict(zip(state, tensors[count:], strict=True))

    def fast(*tensors: Tensor) -> tuple[Tensor, ...]:
        # The parameters among the inputs are the module's own.
        return tuple(module(split(tensors)[0]).vectors.values())

    def short(*tensors: Tensor) -> tuple[Tensor, ...]:
        maps, parameters = split(tensors)
        if beside:
            # Torch's layers refuse a half input beside a float32 weight, so that its owner casts the features.
            maps = {name: x.to(beside) for name, x in maps.items()}
        return tuple(eager.mutual_enhancement(maps, parameters).values())

    def exact(*tensors: Tensor) -> tuple[Tensor, ...]:
        maps, parameters = split(tensors)
        return tuple(functional_call(blank, parameters, (maps,)).vectors.values())

    return Problem(
        features | state,
        (*features, *state) if features_need else tuple(state),
        moved(size, dtype.itemsize, own.itemsize, features_need),
        fast,
        short,
        exact,
        shared=frozenset(state),
        rounds="between",
        result_dtype=own,
    )


def cases(size: Size, dtype: torch.dtype, layout: Layout, beside: torch.dtype | None = None) -> list[Case]:
    shape = f"maps {size.n}x{size.c}x{size.h}x{size.w}, D = {size.d}"
    return [
        Case(
            OP,
            name,
            size,
            dtype,
            layout,
            "features and parameters" if need else "parameters",
            shape,
            partial(setup, size, dtype, layout, need, beside),
            beside,
        )
        for name, need in VARIANTS.items()
    ]
