"""TA3N: the Temporal Attentive Adversarial Adaptation Network of one stream.

Chen et al., "Temporal Attentive Alignment for Large-Scale Video Domain Adaptation" (ICCV 2019), in the form of the
EPIC-KITCHENS-100 UDA baseline: TRN-m over 5 frames, discriminators for frames, relations and the clip behind gradient
reversal, attention by the relations' domain entropy, verb and noun heads. Parameter names are those of the public code.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from m3em_fast.nn import Init

__all__ = ["TA3N", "MultiScaleTRN", "StreamOutput", "entropy", "grad_reverse", "warmup_coefficient"]

SUBSETS_PER_SCALE = 3


class _GradReverse(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, beta: Tensor | float) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor | float], output: Tensor) -> None:
        ctx.beta = inputs[1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return -ctx.beta * grads[0], None


def grad_reverse(x: Tensor, beta: Tensor | float) -> Tensor:
    """The identity, whose gradient is ``-beta`` times the incoming one. ``beta`` is a number or a 0-d tensor."""
    return _GradReverse.apply(x, beta)


def warmup_coefficient(progress: float) -> float:
    """``2 / (1 + exp(-p)) - 1`` for the share ``p`` of training done: 0 at the start, 0.46 at ``p = 1``.

    The public baseline multiplies every beta by it, counting epochs from 1, so that its p passes 1 a little. DANN has
    ``10 p`` in the exponent; the baseline has not, and never reaches its nominal beta.
    """
    return 2.0 / (1.0 + math.exp(-progress)) - 1.0


def entropy(logits: Tensor) -> Tensor:
    """Entropy (natural logarithm) of ``softmax(logits)`` over the last dimension; at least float32."""
    log_p = torch.log_softmax(logits, -1, dtype=torch.promote_types(logits.dtype, torch.float32))
    return -(log_p.exp() * log_p).sum(-1)


class StreamOutput(NamedTuple):
    """What TA3N gives for B clips of T frames; None in place of what a model without adaptation does not have."""

    verb: Tensor
    """(B, verbs) logits."""
    noun: Tensor
    """(B, nouns) logits."""
    domain_relation: Tensor | None
    """(B, T-1, 2) logits, the relation over all T frames first; class 0 is the source."""
    domain_video: Tensor | None
    """(B, 2) logits."""
    domain_frame: Tensor | None
    """(B, T, 2) logits."""
    attention: Tensor | None
    """(B, T-1) weights w = 1 - entropy; each relation is multiplied by 1 + w."""


class MultiScaleTRN(nn.Module):
    """TRN-m: for every scale s = T..2, up to three ordered subsets of s frames, fused and summed (B,T,C -> B,T-1,R)."""

    def __init__(self, num_segments: int, channels: int, relation_dim: int) -> None:
        super().__init__()
        scales = range(num_segments, 1, -1)
        self.subsets = [_even_subsets(num_segments, scale) for scale in scales]
        self.fc_fusion_scales = nn.ModuleList(
            nn.Sequential(nn.ReLU(), nn.Linear(scale * channels, relation_dim), nn.ReLU()) for scale in scales
        )

    def forward(self, x: Tensor) -> Tensor:
        relations = []
        for fusion, subsets in zip(self.fc_fusion_scales, self.subsets, strict=True):
            fused = [fusion(x[:, list(frames)].flatten(1)) for frames in subsets]
            relations.append(torch.stack(fused).sum(0))
        return torch.stack(relations, dim=1)


def _even_subsets(num_segments: int, scale: int) -> list[tuple[int, ...]]:
    """At most three of the ordered frame subsets of one size, spread evenly over their lexicographic order."""
    subsets = list(itertools.combinations(range(num_segments), scale))
    count = min(SUBSETS_PER_SCALE, len(subsets))
    return [subsets[math.ceil(i * len(subsets) / count)] for i in range(count)]


class TA3N(nn.Module):
    """One stream of TA3N.

    Args:
        in_features: channels of a frame's feature vector.
        num_verbs, num_nouns: classes of the two heads.
        num_segments: T, frames a clip, at least 2.
        fc_dim, relation_dim: widths of the shared frame layer and of the relations.
        dropout_i, dropout_v: dropout after the shared frame layer and on the clip's feature.
        adversarial: with discriminators and attention; without, source-only training, and their parameters do not
            exist.
        init: ``"ta3n"`` as in the public code (shared layer, heads and the frame and clip discriminators normal(0,
            0.001) with zero bias; TRN and relation discriminators torch's default), or ``"torch"`` (all default).
    """

    def __init__(
        self,
        in_features: int,
        num_verbs: int,
        num_nouns: int,
        *,
        num_segments: int = 5,
        fc_dim: int = 512,
        relation_dim: int = 256,
        dropout_i: float = 0.5,
        dropout_v: float = 0.5,
        adversarial: bool = True,
        init: Init = "ta3n",
    ) -> None:
        super().__init__()
        if num_segments < 2:
            raise ValueError(f"TA3N: num_segments must be at least 2, got {num_segments}")
        if init not in ("torch", "ta3n"):
            raise ValueError(f"TA3N: init must be 'torch' or 'ta3n', got {init!r}")
        self.in_features = in_features
        self.num_segments = num_segments
        self.adversarial = adversarial
        self.dropout_i = nn.Dropout(dropout_i)
        self.dropout_v = nn.Dropout(dropout_v)
        self.fc_feature_shared_source = nn.Linear(in_features, fc_dim)
        self.TRN = MultiScaleTRN(num_segments, fc_dim, relation_dim)
        self.fc_classifier_video_verb_source = nn.Linear(relation_dim, num_verbs)
        self.fc_classifier_video_noun_source = nn.Linear(relation_dim, num_nouns)
        if adversarial:
            self.fc_feature_domain = nn.Linear(fc_dim, fc_dim)
            self.fc_classifier_domain = nn.Linear(fc_dim, 2)
            self.fc_feature_domain_video = nn.Linear(relation_dim, relation_dim)
            self.fc_classifier_domain_video = nn.Linear(relation_dim, 2)
            self.relation_domain_classifier_all = nn.ModuleList(
                nn.Sequential(nn.Linear(relation_dim, relation_dim), nn.ReLU(), nn.Linear(relation_dim, 2))
                for _ in range(num_segments - 1)
            )
        if init == "ta3n":
            for layer in self.children():
                if isinstance(layer, nn.Linear):
                    nn.init.normal_(layer.weight, 0.0, 0.001)
                    nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, beta: Sequence[Tensor | float] = (0.75, 0.75, 0.5)) -> StreamOutput:
        """Source and target clips in one batch.

        Args:
            x: (B, T, in_features), floating point.
            beta: how much of the (relation, clip, frame) discriminators' gradient is reversed into the features. It
                does not scale what the discriminators themselves learn.

        Raises:
            ValueError: ``x`` has another shape.
        """
        if x.dim() != 3 or x.shape[1:] != (self.num_segments, self.in_features):
            raise ValueError(f"TA3N: x must be (B, {self.num_segments}, {self.in_features}), got {tuple(x.shape)}")
        frames = self.dropout_i(torch.relu(self.fc_feature_shared_source(x)))
        relations = self.TRN(frames)
        domain_relation = domain_video = domain_frame = attention = None
        if self.adversarial:
            reversed_frames = torch.relu(self.fc_feature_domain(grad_reverse(frames, beta[2])))
            domain_frame = self.fc_classifier_domain(reversed_frames)
            reversed_relations = grad_reverse(relations, beta[0])
            domain_relation = torch.stack(
                [d(reversed_relations[:, k]) for k, d in enumerate(self.relation_domain_classifier_all)], dim=1
            )
            # Not detached, as in the public code: the classification loss trains the relation discriminators too.
            attention = 1.0 - entropy(domain_relation)
            relations = (1.0 + attention)[..., None] * relations
        video = self.dropout_v(relations.sum(1))
        if self.adversarial:
            reversed_video = torch.relu(self.fc_feature_domain_video(grad_reverse(video, beta[1])))
            domain_video = self.fc_classifier_domain_video(reversed_video)
        return StreamOutput(
            verb=self.fc_classifier_video_verb_source(video),
            noun=self.fc_classifier_video_noun_source(video),
            domain_relation=domain_relation,
            domain_video=domain_video,
            domain_frame=domain_frame,
            attention=attention,
        )
