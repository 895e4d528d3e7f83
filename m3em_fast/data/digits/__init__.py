"""The digits benchmark: an unsupervised domain adaptation task that fits in a few minutes on two cores.

Real handwriting moves over real photographs; the digit is the noun, its motion the verb, and there are pictures,
optical flow and the sound of the motion. :func:`prepare` makes feature stores of two domains, :func:`load_frames` draws
any clip again, and ``python -m m3em_fast.data.digits --preview clips.gif`` shows what it looks like.
"""

from __future__ import annotations

from .prepare import backbone_path, load_backbone, load_frames, prepare
from .settings import NOUNS, SOURCES, SPLITS, TARGETS, VERBS, DigitsConfig, Domain

__all__ = [
    "NOUNS",
    "SOURCES",
    "SPLITS",
    "TARGETS",
    "VERBS",
    "DigitsConfig",
    "Domain",
    "backbone_path",
    "load_backbone",
    "load_frames",
    "prepare",
]
