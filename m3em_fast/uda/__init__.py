"""Unsupervised domain adaptation around M3EM: TA3N, its losses, late fusion and the whole model."""

from m3em_fast.uda.fusion import action_scores, fuse
from m3em_fast.uda.losses import adversarial_loss, attentive_entropy, classification_loss, stream_losses, total_loss
from m3em_fast.uda.model import METHODS, ActionModel, ActionOutput
from m3em_fast.uda.ta3n import TA3N, MultiScaleTRN, StreamOutput, grad_reverse, warmup_coefficient

__all__ = [
    "METHODS",
    "TA3N",
    "ActionModel",
    "ActionOutput",
    "MultiScaleTRN",
    "StreamOutput",
    "action_scores",
    "adversarial_loss",
    "attentive_entropy",
    "classification_loss",
    "fuse",
    "grad_reverse",
    "stream_losses",
    "total_loss",
    "warmup_coefficient",
]
