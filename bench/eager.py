"""What a researcher would write: the baseline of every figure of speed.

The shortest composition of torch's own functions, in the dtype of the inputs. Nobody tuned it and nobody should; a
ratio is only worth something against the code that it replaces.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations

import torch
import torch.nn.functional as F
from torch import Tensor


def channel_gate(x: Tensor, *gates: Tensor) -> Tensor:
    return torch.cat([x * gate[:, :, None, None] for gate in gates], dim=1)


def consensus_map(a: Tensor, b: Tensor, num_scales: int = 3) -> Tensor:
    height, width = a.shape[2:]
    total = F.cosine_similarity(a, b, dim=1)[:, None]
    for k in range(1, num_scales):
        cells = max(1, height >> k), max(1, width >> k)
        pooled_a, pooled_b = F.adaptive_avg_pool2d(a, cells), F.adaptive_avg_pool2d(b, cells)
        coarse = F.cosine_similarity(pooled_a, pooled_b, dim=1)[:, None]
        total = total + F.interpolate(coarse, size=(height, width), mode="bilinear", align_corners=False)
    return total


def consensus_pool(x: Tensor, cmap: Tensor | None = None) -> Tensor:
    if cmap is not None:
        x = (1 + cmap) * x
    return F.adaptive_avg_pool2d(x, 1).flatten(1)


def gated_projection(x: Tensor, gates: list[Tensor], weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.conv2d(channel_gate(x, *gates), weight[:, :, None, None], bias)


def gated_consensus_pool(x: Tensor, gates: list[Tensor], cmap: Tensor | None = None) -> Tensor:
    return consensus_pool(channel_gate(x, *gates), cmap)


def mutual_enhancement(
    features: Mapping[str, Tensor], state: Mapping[str, Tensor], num_scales: int = 3
) -> dict[str, Tensor]:
    """The whole of M3EM: modality -> vector.

    Args:
        features: modality -> (N,C,H,W), at least two of them, or (N,C).
        state: what ``named_parameters`` or ``state_dict`` of :class:`m3em_fast.nn.MutualEnhancement` gives.
    """
    pooled = {name: consensus_pool(x) if x.dim() == 4 else x for name, x in features.items()}
    refined = {}
    for name, x in features.items():
        others = torch.cat([v for other, v in pooled.items() if other != name], dim=1)
        gates = [_gate(pooled[name], state, f"smr.self_gates.{name}"), _gate(others, state, f"smr.cross_gates.{name}")]
        refined[name] = channel_gate(x, *gates) if x.dim() == 4 else torch.cat([x * gate for gate in gates], dim=1)
    latent = [_project(x, state, f"cmc.projections.{name}") for name, x in refined.items() if x.dim() == 4]
    cmap = torch.stack([consensus_map(a, b, num_scales) for a, b in combinations(latent, 2)]).sum(0)
    return {name: consensus_pool(x, cmap) if x.dim() == 4 else x for name, x in refined.items()}


def _project(x: Tensor, state: Mapping[str, Tensor], name: str) -> Tensor:
    return F.conv2d(x, state[f"{name}.weight"][:, :, None, None], state.get(f"{name}.bias"))


def _gate(pooled: Tensor, state: Mapping[str, Tensor], name: str) -> Tensor:
    hidden = F.relu(F.linear(pooled, state[f"{name}.0.weight"], state.get(f"{name}.0.bias")))
    return torch.sigmoid(F.linear(hidden, state[f"{name}.2.weight"], state.get(f"{name}.2.bias")))
