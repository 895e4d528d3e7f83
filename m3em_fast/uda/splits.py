"""Which feature stores a training reads, and what has to be true of them together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from m3em_fast.data.store import FeatureStore, Modality
from m3em_fast.epic.models import MODELS
from m3em_fast.uda.run import UsageError

__all__ = ["PROTOCOLS", "SPLITS", "Protocol", "Stores", "labels_of", "modalities_of", "open_stores"]


@dataclass(frozen=True)
class Protocol:
    """What a run does with each split.

    Attributes:
        splits: all that it reads.
        source: labelled clips that it trains on.
        target: clips that it trains on without a look at their labels.
        evaluated: target clips that it is made for.
        reported: labelled splits whose accuracy is reported after every epoch.
        scored: splits whose scores are kept at the end.
        optional: those of the splits that may be missing.
    """

    splits: tuple[str, ...]
    source: str
    target: str
    evaluated: str
    reported: tuple[str, ...]
    scored: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()


PROTOCOLS = {
    "digits": Protocol(
        ("source_train", "source_val", "target_train", "target_test"),
        "source_train",
        "target_train",
        "target_test",
        reported=("source_val", "target_test"),
    ),
    # The challenge's, for hyper-parameters: every labelled source clip trains, so that none is left to report on.
    "val": Protocol(
        ("source_val", "target_val"),
        "source_val",
        "target_val",
        "target_val",
        reported=("target_val",),
        scored=("source_val", "target_val"),
    ),
    # Its submission: the target has no labels to report with. source_val, whose kitchens it does not train on, says how
    # well the source is known, and on its scores the weights of an ensemble are searched.
    "test": Protocol(
        ("source_train", "source_val", "target_train", "target_test"),
        "source_train",
        "target_train",
        "target_test",
        reported=("source_val",),
        scored=("source_val", "target_test"),
        optional=("source_val",),
    ),
}
SPLITS = PROTOCOLS["digits"].splits


def _form(modality: Modality | None) -> str:
    if modality is None:
        return "none"
    return f"a {modality.kind} of {' x '.join(map(str, modality.shape))} in {modality.dtype}"


class Stores(dict[str, FeatureStore]):
    """The stores of a run, by split.

    Attributes:
        plan: what the run does with them.
    """

    def __init__(self, plan: Protocol, folder: Path) -> None:
        super().__init__((split, FeatureStore(folder / split)) for split in plan.splits)
        self.plan = plan

    @property
    def source(self) -> FeatureStore:
        """Of the labelled clips that it trains on."""
        return self[self.plan.source]

    @property
    def target(self) -> FeatureStore:
        """Of the clips that it trains on without a look at their labels."""
        return self[self.plan.target]


def _plan(name: str, data: Path) -> Protocol:
    """One of ``PROTOCOLS`` without the optional splits that the folder ``data`` does not have."""
    plan = PROTOCOLS[name]
    missing = {split for split in plan.optional if not (data / split).exists()}

    def there(splits: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(split for split in splits if split not in missing)

    return replace(plan, splits=there(plan.splits), reported=there(plan.reported), scored=there(plan.scored))


def modalities_of(store: FeatureStore, model: str = "all") -> Mapping[str, Modality]:
    """The modalities of a store that a model reads, in the model's order; ``"all"`` of them in the store's."""
    if model == "all":
        return store.modalities
    for name in MODELS[model].modalities:
        if name not in store.modalities:
            raise UsageError(
                f"{store.path} has no modality {name}, which --model {model} reads; it has "
                f"{', '.join(store.modalities)}."
            )
    return {name: store.modalities[name] for name in MODELS[model].modalities}


def open_stores(data: Path, protocol: str = "digits", model: str = "all") -> Stores:
    """The stores of all splits, with the same modalities and classes, and labels wherever they are needed.

    What ``model``, one of :data:`m3em_fast.epic.models.MODELS` or ``"all"``, does not read may differ.
    """
    plan = _plan(protocol, data)
    if data.is_file():
        raise UsageError(f"--data {data} is a file, and no folder of feature stores.")
    if not data.is_dir():
        if protocol != "digits":
            raise UsageError(f"--data {data} is no folder; docs/reproduce.md says what makes feature stores there.")
        hint = f"python -m m3em_fast.data.digits --out {data}"
        raise UsageError(f"--data {data} is no folder; `{hint}` makes the digits benchmark there.")
    stores = Stores(plan, data)
    first = stores.source
    if set(first.num_classes) != {"verb", "noun"}:
        raise UsageError(
            f"{first.path} has classes of {', '.join(first.num_classes) or 'nothing'}, not of verb and noun."
        )
    wanted = modalities_of(first, model)
    for split, store in stores.items():
        if not len(store):
            raise UsageError(f"{store.path} holds no clips, and training needs some in every split.")
        others = modalities_of(store, model)
        for name in sorted({*wanted, *others}):
            own, other = others.get(name), wanted.get(name)
            if own != other:
                raise UsageError(
                    f"{store.path} has other modalities than {plan.source}: {name} is {_form(own)}, not {_form(other)}."
                )
        if store.num_classes != first.num_classes:
            raise UsageError(
                f"{store.path} has other classes than {plan.source}: {store.num_classes}, not {first.num_classes}."
            )
        if store.labels is None and split in (plan.source, *plan.reported):
            raise UsageError(f"{store.path} has no labels, and the {split} split needs them.")
    return stores


def labels_of(store: FeatureStore) -> dict[str, np.ndarray]:
    """The labels of a store that has them, as :func:`open_stores` has made sure."""
    assert store.labels is not None
    return store.labels
