"""Late fusion of the streams' scores, and the ranking of actions."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["STREAM_WEIGHTS", "VISUAL", "action_scores", "fuse"]

VISUAL = "visual"
"""The stream of the concatenated spatial modalities; every other stream is named after its vector modality."""
STREAM_WEIGHTS = {VISUAL: 1.0}
OTHER_WEIGHT = 0.5


def fuse(scores: Mapping[str, Tensor]) -> Tensor:
    """Weighted sum of the streams' logits (B, classes): the visual stream 1, every other 0.5 (M3EM, section 2.3)."""
    weighted = [STREAM_WEIGHTS.get(name, OTHER_WEIGHT) * value for name, value in scores.items()]
    return torch.stack(weighted).sum(0)


def action_scores(verb_logits: Tensor, noun_logits: Tensor) -> Tensor:
    """Scores of all (verb, noun) pairs, (B, verbs * nouns); the action's index is ``verb * nouns + noun``.

    The challenge ranks pairs by the product of the two softmax scores, here the sum of their logarithms.
    """
    verb = torch.log_softmax(verb_logits.double(), -1)
    noun = torch.log_softmax(noun_logits.double(), -1)
    return (verb[:, :, None] + noun[:, None, :]).flatten(1)
