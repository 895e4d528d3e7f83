"""The four feature stores that a training reads, and what has to be true of them together."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from m3em_fast.data.store import FeatureStore, Modality
from m3em_fast.uda.run import UsageError

__all__ = ["SPLITS", "labels_of", "open_stores"]

SPLITS = ("source_train", "source_val", "target_train", "target_test")


def _form(modality: Modality | None) -> str:
    if modality is None:
        return "none"
    return f"a {modality.kind} of {' x '.join(map(str, modality.shape))} in {modality.dtype}"


def open_stores(data: Path) -> dict[str, FeatureStore]:
    """The stores of all splits, with the same modalities and classes, and labels wherever they are needed."""
    if not data.is_dir():
        hint = f"python -m m3em_fast.data.digits --out {data}"
        raise UsageError(f"--data {data} is no folder; `{hint}` makes the digits benchmark there.")
    stores = {split: FeatureStore(data / split) for split in SPLITS}
    first = stores["source_train"]
    if set(first.num_classes) != {"verb", "noun"}:
        raise UsageError(
            f"{first.path} has classes of {', '.join(first.num_classes) or 'nothing'}, not of verb and noun."
        )
    for split, store in stores.items():
        if not len(store):
            raise UsageError(f"{store.path} holds no clips, and training needs some in every split.")
        for name in sorted({*first.modalities, *store.modalities}):
            own, other = store.modalities.get(name), first.modalities.get(name)
            if own != other:
                raise UsageError(
                    f"{store.path} has other modalities than source_train: {name} is {_form(own)}, not {_form(other)}."
                )
        if store.num_classes != first.num_classes:
            raise UsageError(
                f"{store.path} has other classes than source_train: {store.num_classes}, not {first.num_classes}."
            )
        if store.labels is None and split != "target_train":
            raise UsageError(f"{store.path} has no labels, and the {split} split needs them.")
    return stores


def labels_of(store: FeatureStore) -> dict[str, np.ndarray]:
    """The labels of a store that has them, as :func:`open_stores` has made sure."""
    assert store.labels is not None
    return store.labels
