"""Models A to D of the M3EM report and the challenge's public baseline: what each reads of a feature store, how what it
reads forms streams, and where its training departs from the others'."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

__all__ = ["MODELS", "EpicModel", "without_consensus"]


@dataclass(frozen=True)
class EpicModel:
    """One configuration, over the modalities' names in the feature store.

    Attributes:
        visual: modalities of the visual stream, as maps (frames, C, H, W) or as vectors (frames, C). CMC compares those
            that are maps.
        vector: modalities with a stream each, as vectors.
        projected: those of the vectors that a linear layer brings to the width of the others first.
        lambda_d: weight of the adversarial losses (section 3.2).
        method: what ``train.py`` trains unless told otherwise.
    """

    visual: tuple[str, ...]
    vector: tuple[str, ...] = ()
    projected: tuple[str, ...] = ()
    lambda_d: float = 1.0
    method: Literal["ta3n", "m3em"] = "m3em"

    @property
    def modalities(self) -> tuple[str, ...]:
        """All that it reads, the visual ones first."""
        return self.visual + self.vector


MODELS = {
    "A": EpicModel(("RGB", "Flow"), ("Audio",)),
    "B": EpicModel(("RGB", "Flow"), ("Audio", "Objects"), projected=("Objects",)),
    "C": EpicModel(("RGB-crop", "Flow-crop"), ("Audio",)),
    "D": EpicModel(("RGB-I3D", "Flow-I3D"), lambda_d=3.0),
    # TA3N as the challenge published it: the three vectors joined, one stream of 3072 channels.
    "baseline": EpicModel(("RGB", "Flow", "Audio"), method="ta3n"),
}
"""Name -> configuration (section 3.4); RGB, Flow, Audio and the crops come from TBN."""


def without_consensus(model: str, maps: Collection[str]) -> str | None:
    """Why CMC has nothing to compare in one of ``MODELS``; None where it has.

    Args:
        model: its name.
        maps: the modalities that the store holds as maps.

    Returns:
        one sentence. The challenge's public features are vectors, pooled over positions.
    """
    visual = MODELS[model].visual
    there = [name for name in visual if name in maps]
    if len(there) > 1:
        return None
    pooled = " and ".join(name for name in visual if name not in maps)
    return (
        f"CMC is left out: the features of {pooled} are vectors, pooled over positions, and it compares maps, from "
        "before the pooling."
    )
