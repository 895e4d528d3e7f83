"""The modules of M3EM over the ops: semantic mutual refinement, cross-modality consensus, and both together.

Yang, Huang, Sugano, Sato: "EPIC-KITCHENS-100 Unsupervised Domain Adaptation Challenge for Action Recognition 2021:
Team M3EM Technical Report". A spatial modality (RGB, Flow, crops) brings maps (N,C,H,W), a vector modality (audio,
objects) brings (N,C); N is clips x frames, and every modality has its own number of channels.
"""

from __future__ import annotations

import numbers
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import _register_namedtuple

# From the files and not from the package, where a type checker takes these names for the files.
from m3em_fast.ops.channel_gate import channel_gate
from m3em_fast.ops.consensus_map import consensus_map
from m3em_fast.ops.consensus_pool import consensus_pool
from m3em_fast.ops.gated_consensus_pool import gated_consensus_pool
from m3em_fast.ops.gated_projection import gated_projection

__all__ = ["CrossModalityConsensus", "Enhanced", "MutualEnhancement", "SemanticMutualRefinement", "initialize"]

Init = Literal["torch", "ta3n"]


def initialize(module: nn.Module, init: Init) -> None:
    """Set every linear layer in ``module``: ``"ta3n"`` normal(0, 0.001) and zero bias, ``"torch"`` torch's default."""
    if init not in ("torch", "ta3n"):
        raise ValueError(f"init must be 'torch' or 'ta3n', got {init!r}")
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            if init == "torch":
                layer.reset_parameters()
            else:
                nn.init.normal_(layer.weight, 0.0, 0.001)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)


def _beside(value: Tensor, x: Tensor) -> Tensor:
    """``value`` in a dtype that the ops take beside ``x``: that of x, or float32 beside a half x.

    Under autocast the gates come out in half beside a float32 x, which the ops refuse as a mixture nobody meant.
    """
    if value.dtype == x.dtype:
        return value
    return value.to(x.dtype if x.dtype in (torch.float32, torch.float64) else torch.float32)


def _check_count(where: str, what: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{where}: {what} must be an integer, got {value!r}")
    if value < 1:
        raise ValueError(f"{where}: {what} must be at least 1, got {value}")


def _check_channels(where: str, channels: Mapping[str, int]) -> dict[str, int]:
    if not isinstance(channels, Mapping):
        raise TypeError(f"{where}: wants modality names with numbers of channels, {{'RGB': 1024}}, got {channels!r}")
    for name, count in channels.items():
        if not isinstance(name, str) or not name or "." in name:
            raise ValueError(f"{where}: a modality name must be a non-empty string without dots, got {name!r}")
        _check_count(where, f"the channels of modality {name!r}", count)
    return dict(channels)


def _check_features(where: str, features: Mapping[str, Tensor], channels: Mapping[str, int], ndim: int | None) -> None:
    """Exactly the modalities that the module was made for, of one N, each with its number of channels."""
    if not isinstance(features, Mapping):
        raise TypeError(f"{where}: features must be tensors by modality, got {type(features).__name__}")
    if set(features) != set(channels):
        raise ValueError(f"{where}: features must hold the modalities {sorted(channels)}, got {sorted(features)}")
    first = next(iter(channels))
    for name, count in channels.items():
        x = features[name]
        if not isinstance(x, Tensor):
            raise TypeError(f"{where}: features[{name!r}] must be a tensor, got {type(x).__name__}")
        if x.dim() not in (2, 4) or (ndim is not None and x.dim() != ndim):
            wanted = {2: "(N,C)", 4: "(N,C,H,W)", None: "(N,C) or (N,C,H,W)"}[ndim]
            raise ValueError(f"{where}: features[{name!r}] must be {wanted}, got shape {tuple(x.shape)}")
        if x.shape[1] != count:
            raise ValueError(f"{where}: features[{name!r}] must have {count} channels, got shape {tuple(x.shape)}")
        if x.shape[0] != features[first].shape[0]:
            raise ValueError(
                f"{where}: features[{name!r}] must have N = {features[first].shape[0]} like {first!r}, "
                f"got shape {tuple(x.shape)}"
            )


class SemanticMutualRefinement(nn.Module):
    """SMR: gate each modality's channels by itself and by the others (section 2.1, equations 1 to 4).

    Args:
        channels: modality name -> number of channels. With a single modality there is no other to ask, and only the
            self gate exists.
        reduction: ``r``, the ratio of the bottleneck in both gates; its width is ``max(1, C // r)``.
        bias: biases in the gates' two layers. The report writes matrices only, so the default is none.
    """

    def __init__(self, channels: Mapping[str, int], reduction: int = 16, bias: bool = False) -> None:
        super().__init__()
        if not channels:
            raise ValueError("SemanticMutualRefinement: channels must name at least one modality, got none")
        _check_count("SemanticMutualRefinement", "reduction", reduction)
        self.channels = _check_channels("SemanticMutualRefinement", channels)
        self.num_gates = 2 if len(channels) > 1 else 1

        def gate(inputs: int, outputs: int) -> nn.Sequential:
            width = max(1, outputs // reduction)
            return nn.Sequential(
                nn.Linear(inputs, width, bias=bias), nn.ReLU(), nn.Linear(width, outputs, bias=bias), nn.Sigmoid()
            )

        total = sum(channels.values())
        self.self_gates = nn.ModuleDict({name: gate(count, count) for name, count in channels.items()})
        if self.num_gates == 2:
            self.cross_gates = nn.ModuleDict({name: gate(total - count, count) for name, count in channels.items()})

    def gates(self, pooled: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, ...]]:
        """The gates of every modality from the pooled, unrefined features.

        Args:
            pooled: modality -> (N,C), floating point; half features are read in the precision of the weights.

        Returns:
            modality -> (self gate, cross gate), each (N,C) in (0, 1).
        """
        _check_features("SemanticMutualRefinement", pooled, self.channels, 2)
        # Gates that torch.ao has quantized dynamically have no parameters, and take float32.
        dtypes = [weight.dtype for weight in self.parameters()]  # next() with a default is beyond Dynamo of torch 2.7
        dtype = dtypes[0] if dtypes else torch.float32
        inputs = {name: pooled[name].to(dtype) for name in self.channels}
        gates = {}
        for name in self.channels:
            own: tuple[Tensor, ...] = (self.self_gates[name](inputs[name]),)
            if self.num_gates == 2:
                others = torch.cat([x for other, x in inputs.items() if other != name], dim=1)
                own += (self.cross_gates[name](others),)
            gates[name] = own
        return gates

    def forward(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Refined features: modality -> (N, 2C, H, W) for maps, (N, 2C) for vectors (one gate: C).

        :class:`MutualEnhancement` never makes these: it pools and projects the unrefined maps instead.
        """
        _check_features("SemanticMutualRefinement", features, self.channels, None)
        gates = self.gates({n: consensus_pool(x) if x.dim() == 4 else x for n, x in features.items()})
        return {
            name: channel_gate(x, *(_beside(g, x) for g in gates[name])) if x.dim() == 4 else _gate(x, gates[name])
            for name, x in features.items()
        }


def _gate(vector: Tensor, gates: Sequence[Tensor]) -> Tensor:
    return torch.cat([vector * _beside(gate, vector) for gate in gates], dim=1)


class CrossModalityConsensus(nn.Module):
    """CMC: where the spatial modalities agree, and their features pooled there (section 2.2, equation 5).

    Each modality has a 1x1 convolution of its own into one latent space; the consensus map is the sum over every pair
    of modalities of the multi-scale cosine, and the pooling weight is 1 + C, not normalised. The layers in
    ``projections`` hold the weights alone: their ``forward`` is never called, so neither are hooks on them.

    Args:
        channels: spatial modality -> number of channels, at least two modalities.
        latent_channels: D, the width of the latent space.
        num_scales: S; None takes 3, or fewer on maps too small for three.
        center: the Pearson coefficient instead of the cosine.
        num_gates: how many gates come with the features (SMR: 2); 0 for features that are not gated.
        bias: a bias in the 1x1 convolutions.
    """

    def __init__(
        self,
        channels: Mapping[str, int],
        latent_channels: int = 512,
        num_scales: int | None = None,
        center: bool = False,
        num_gates: int = 0,
        bias: bool = False,
    ) -> None:
        super().__init__()
        if len(channels) < 2:
            raise ValueError(
                f"CrossModalityConsensus: needs at least two spatial modalities to compare, got {sorted(channels)}"
            )
        self.channels = _check_channels("CrossModalityConsensus", channels)
        _check_count("CrossModalityConsensus", "latent_channels", latent_channels)
        if num_scales is not None:
            _check_count("CrossModalityConsensus", "num_scales", num_scales)
        self.num_scales = num_scales
        self.center = center
        self.num_gates = num_gates
        self.projections = nn.ModuleDict(
            {n: nn.Linear(max(1, num_gates) * count, latent_channels, bias=bias) for n, count in channels.items()}
        )

    def consensus(self, features: Mapping[str, Tensor], gates: Mapping[str, Sequence[Tensor]] | None = None) -> Tensor:
        """The consensus map (N,1,H,W) of maps (N,C,H,W), with ``num_gates`` gates (N,C) a modality."""
        _check_features("CrossModalityConsensus", features, self.channels, 4)
        if (gates is None) if self.num_gates else (gates is not None):
            wanted = f"{self.num_gates} gates a modality" if self.num_gates else "no gates"
            raise ValueError(f"CrossModalityConsensus: made for {wanted}, got gates={'some' if gates else gates}")
        first = next(iter(self.channels))
        for name in self.channels:
            if features[name].shape[2:] != features[first].shape[2:]:
                raise ValueError(
                    f"CrossModalityConsensus: features[{name!r}] must have the map size of {first!r} "
                    f"{tuple(features[first].shape[2:])}, got {tuple(features[name].shape[2:])}"
                )
        latent = []
        for name in self.channels:
            x, layer = features[name], self.projections[name]
            if not isinstance(layer, nn.Linear):  # its weight is read, and its forward never called
                kind = f"{type(layer).__module__}.{type(layer).__qualname__}"
                raise TypeError(f"CrossModalityConsensus: projections[{name!r}] must be a torch.nn.Linear, got {kind}")
            if gates is None:
                latent.append(F.conv2d(x.to(layer.weight.dtype), layer.weight[:, :, None, None], layer.bias))
            else:
                latent.append(gated_projection(x, [_beside(g, x) for g in gates[name]], layer.weight, layer.bias))
        maps = [consensus_map(a, b, self.num_scales, center=self.center) for a, b in combinations(latent, 2)]
        return maps[0] if len(maps) == 1 else torch.stack(maps).sum(0)

    def forward(self, features: Mapping[str, Tensor], gates: Mapping[str, Sequence[Tensor]] | None = None) -> Enhanced:
        """Pool every modality where the modalities agree: modality -> (N, G*C) (ungated: C), and the map."""
        cmap = self.consensus(features, gates)
        pooled = {}
        for name in self.channels:
            x = features[name]
            weight = _beside(cmap, x)
            if gates is None:
                pooled[name] = consensus_pool(x, weight)
            else:
                pooled[name] = gated_consensus_pool(x, [_beside(g, x) for g in gates[name]], weight)
        return Enhanced(pooled, cmap)


class Enhanced(NamedTuple):
    """What the modules give: a vector a modality, and the consensus map where there is one."""

    vectors: dict[str, Tensor]
    consensus: Tensor | None


# By this name torch.export.save writes it, and torch.export.load finds it where this module is imported.
_register_namedtuple(Enhanced, serialized_type_name="m3em_fast.nn.Enhanced")


class MutualEnhancement(nn.Module):
    """M3EM: every modality refined by the others and pooled where they agree, one vector a frame and modality.

    The refined maps, twice the size of the input, are never made: a projection of gated copies reads the input once,
    and pooling commutes with gating.

    Args:
        spatial: modality with maps -> number of channels, such as ``{"RGB": 1024, "Flow": 1024}``.
        vector: modality with vectors -> number of channels, such as ``{"Audio": 1024}``.
        latent_channels: D of :class:`CrossModalityConsensus`.
        num_scales: S; None takes 3, or fewer on maps too small for three.
        reduction: r of :class:`SemanticMutualRefinement`.
        gate_bias, projection_bias, center: as in the two modules.
        smr, cmc: leave one module out; what is left out has no parameters.
        init: ``"torch"`` or ``"ta3n"`` (normal, 0.001), see :func:`initialize`.

    ``out_channels`` (modality -> width of its vector) says what comes out: 2C with SMR, C without.
    """

    def __init__(
        self,
        spatial: Mapping[str, int],
        vector: Mapping[str, int] | None = None,
        *,
        latent_channels: int = 512,
        num_scales: int | None = None,
        reduction: int = 16,
        gate_bias: bool = False,
        projection_bias: bool = False,
        center: bool = False,
        smr: bool = True,
        cmc: bool = True,
        init: Init = "torch",
    ) -> None:
        super().__init__()
        vector = vector or {}
        self.spatial = _check_channels("MutualEnhancement", spatial)
        self.vector = _check_channels("MutualEnhancement", vector)
        if both := sorted(set(spatial) & set(vector)):
            raise ValueError(f"MutualEnhancement: a modality is either spatial or vector, got {both} as both")
        if not spatial and not vector:
            raise ValueError("MutualEnhancement: there must be at least one modality, got none")
        channels = {**self.spatial, **self.vector}
        self.smr = SemanticMutualRefinement(channels, reduction, gate_bias) if smr else None
        num_gates = self.smr.num_gates if self.smr is not None else 0
        self.cmc = (
            CrossModalityConsensus(spatial, latent_channels, num_scales, center, num_gates, projection_bias)
            if cmc
            else None
        )
        self.out_channels = {name: max(1, num_gates) * count for name, count in channels.items()}
        initialize(self, init)

    def forward(self, features: Mapping[str, Tensor]) -> Enhanced:
        """Enhance one frame of every modality.

        Args:
            features: spatial modality -> (N,C,H,W), all of one (H,W); vector modality -> (N,C). Half features beside
                float32 parameters are read as they are.

        Returns:
            ``Enhanced(vectors, consensus)``: modality -> (N, out_channels[modality]), and the map (N,1,H,W), None
            without CMC.
        """
        _check_features("MutualEnhancement", features, {**self.spatial, **self.vector}, None)
        for name, x in features.items():
            if x.dim() != (4 if name in self.spatial else 2):
                wanted = "(N,C,H,W)" if name in self.spatial else "(N,C)"
                raise ValueError(f"MutualEnhancement: features[{name!r}] must be {wanted}, got {tuple(x.shape)}")
        maps = {name: features[name] for name in self.spatial}
        gates = None
        if self.smr is not None or self.cmc is None:
            pooled = {name: consensus_pool(x) if name in maps else x for name, x in features.items()}
            if self.smr is None:
                return Enhanced(pooled, None)
            gates = self.smr.gates(pooled)
            if self.cmc is None:
                return Enhanced({name: _gate(pooled[name], gates[name]) for name in self.out_channels}, None)
        vectors, cmap = self.cmc(maps, None if gates is None else {name: gates[name] for name in maps})
        for name in self.vector:
            vectors[name] = features[name] if gates is None else _gate(features[name], gates[name])
        return Enhanced(vectors, cmap)
