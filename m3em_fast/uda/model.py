"""The whole trainable model: M3EM over frames, then one TA3N a stream, then late fusion."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from m3em_fast.nn import Init, MutualEnhancement
from m3em_fast.uda.fusion import VISUAL, fuse
from m3em_fast.uda.ta3n import TA3N, StreamOutput

__all__ = ["METHODS", "ActionModel", "ActionOutput"]

METHODS: dict[str, dict[str, bool]] = {
    "source_only": {"adversarial": False, "smr": False, "cmc": False},
    "ta3n": {"adversarial": True, "smr": False, "cmc": False},
    "ta3n_smr": {"adversarial": True, "smr": True, "cmc": False},
    "ta3n_cmc": {"adversarial": True, "smr": False, "cmc": True},
    "m3em": {"adversarial": True, "smr": True, "cmc": True},
}


class ActionOutput(NamedTuple):
    streams: dict[str, StreamOutput]
    """Stream -> TA3N's output: ``visual`` and one for every other modality, named after it."""
    verb: Tensor
    """(B, verbs) fused logits."""
    noun: Tensor
    """(B, nouns) fused logits."""
    consensus: Tensor | None
    """(B, T, H, W) consensus maps; None without CMC."""


class ActionModel(nn.Module):
    """Verbs and nouns of clips from frame-level features of several modalities.

    Args:
        spatial, vector: modality -> channels of its features, as in :class:`m3em_fast.nn.MutualEnhancement`.
        num_verbs, num_nouns: classes.
        method: one of ``METHODS``; parameters that it does not use do not exist.
        visual: modalities whose vectors are concatenated into the visual stream; every other has a stream of its own.
            None: the spatial ones. RGB that comes pooled is a vector, and visual all the same.
        projected: vector modality -> channels that a linear layer of the model brings it to first. The layer has a
            bias, starts from torch's default whatever ``init`` is, and learns from every loss.
        latent_channels, num_scales, reduction, gate_bias, center: of M3EM.
        init: ``"ta3n"`` or ``"torch"``, for M3EM and TA3N alike.
        **ta3n: ``num_segments``, ``fc_dim``, ``relation_dim``, ``dropout_i``, ``dropout_v`` of :class:`TA3N`.
    """

    def __init__(
        self,
        spatial: Mapping[str, int],
        vector: Mapping[str, int],
        num_verbs: int,
        num_nouns: int,
        *,
        method: str = "m3em",
        visual: Sequence[str] | None = None,
        projected: Mapping[str, int] | None = None,
        latent_channels: int = 512,
        num_scales: int | None = None,
        reduction: int = 16,
        gate_bias: bool = False,
        center: bool = False,
        init: Init = "ta3n",
        **ta3n: Any,
    ) -> None:
        super().__init__()
        if method not in METHODS:
            raise ValueError(f"ActionModel: method must be one of {', '.join(METHODS)}, got {method!r}")
        if not spatial and not vector:
            raise ValueError("ActionModel: needs at least one modality, got none")
        visual, projected = tuple(spatial if visual is None else visual), dict(projected or {})
        if unknown := sorted({*visual} - {*spatial, *vector}) + sorted({*projected} - {*vector}):
            raise ValueError(f"ActionModel: visual and projected name modalities that are not given: {unknown}")
        # Two layers of weights near 0.001 in a row would pass on next to nothing, forwards and backwards.
        self.projections = nn.ModuleDict({n: nn.Linear(vector[n], width) for n, width in projected.items()})
        self.enhancement = MutualEnhancement(
            spatial,
            {**vector, **projected},
            latent_channels=latent_channels,
            num_scales=num_scales,
            reduction=reduction,
            gate_bias=gate_bias,
            center=center,
            smr=METHODS[method]["smr"],
            cmc=METHODS[method]["cmc"],
            init=init,
        )
        members = {VISUAL: visual} if visual else {}
        members.update({name: (name,) for name in (*spatial, *vector) if name not in visual})
        self.members = members
        adversarial = METHODS[method]["adversarial"]
        self.streams = nn.ModuleDict()
        for stream, names in members.items():
            width = sum(self.enhancement.out_channels[name] for name in names)
            self.streams[stream] = TA3N(width, num_verbs, num_nouns, adversarial=adversarial, init=init, **ta3n)

    @property
    def modalities(self) -> tuple[str, ...]:
        """The modalities that ``forward`` reads, spatial ones first."""
        return tuple(self.enhancement.out_channels)

    @property
    def num_segments(self) -> int:
        """T, the frames of a clip."""
        ta3n = next(iter(self.streams.values()))
        assert isinstance(ta3n, TA3N)
        return ta3n.num_segments

    def forward(
        self, features: Mapping[str, Tensor], beta: Sequence[Tensor | float] = (0.75, 0.75, 0.5)
    ) -> ActionOutput:
        """Source and target clips in one batch, source first.

        Args:
            features: spatial modality -> (B,T,C,H,W), vector modality -> (B,T,C); half or float32.
            beta: reversal of the (relation, clip, frame) discriminators' gradients.
        """
        clips, frames = next(iter(features.values())).shape[:2]
        flat = {name: x.flatten(0, 1) for name, x in features.items()}
        for name, layer in self.projections.items():
            assert isinstance(layer, nn.Linear)
            flat[name] = layer(flat[name].to(layer.weight.dtype))
        enhanced = self.enhancement(flat)
        outputs = {}
        for stream, names in self.members.items():
            ta3n = self.streams[stream]
            assert isinstance(ta3n, TA3N)
            # Before they are joined: bfloat16's autocast has no way to join features that come in float16.
            dtype = ta3n.fc_feature_shared_source.weight.dtype
            vectors = torch.cat([enhanced.vectors[name].to(dtype) for name in names], dim=1)
            outputs[stream] = ta3n(vectors.unflatten(0, (clips, frames)), beta)
        consensus = enhanced.consensus
        return ActionOutput(
            streams=outputs,
            verb=fuse({stream: out.verb for stream, out in outputs.items()}),
            noun=fuse({stream: out.noun for stream, out in outputs.items()}),
            consensus=None if consensus is None else consensus[:, 0].unflatten(0, (clips, frames)),
        )
