"""Writing a feature store; see :mod:`m3em_fast.data.store`."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from ._manifest import (
    FORMAT,
    MANIFEST,
    MAX_SHARD_BYTES,
    MAX_STEP,
    VERSION,
    Modality,
    Shard,
    StoreError,
    check_labels,
    check_modality,
    check_num_classes,
    sha256,
)


class FeatureStoreWriter:
    """Write a store; a context manager.

    Everything goes to a temporary folder beside ``path`` that gets its final name when the block ends without an
    exception, so half a store is never found under that name.

    Args:
        path: folder to make; it must not exist.
        modalities: name of each modality and what it looks like.
        num_classes: number of classes under each label name ("verb", "noun"); needed where labels are appended.
        meta: anything that JSON can hold, given back as ``FeatureStore.meta``.
        shard_bytes: size that a shard may reach, at most 256 MB.
        scales: for ``uint8`` modalities, one positive step per channel; a value is the stored integer times the step,
            and values above 255 steps are cut off there. Without it each shard gets a scale, from its largest values.

    Raises:
        StoreError: the path exists, or an argument is not what it should be.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        modalities: Mapping[str, Modality],
        num_classes: Mapping[str, int] | None = None,
        meta: dict[str, Any] | None = None,
        shard_bytes: int = MAX_SHARD_BYTES,
        scales: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        self.path = Path(path)
        if self.path.exists():
            raise StoreError(f"{self.path} already exists; a store is never written over.")
        if not modalities:
            raise StoreError(f"{self.path}: a store needs at least one modality.")
        for name, modality in modalities.items():
            check_modality(name, asdict(modality), str(self.path))
        if not 1 <= shard_bytes <= MAX_SHARD_BYTES:
            raise StoreError(f"shard_bytes must be from 1 to {MAX_SHARD_BYTES}, got {shard_bytes}.")
        self._scales = {}
        for name, scale in (scales or {}).items():
            if name not in modalities or modalities[name].dtype != "uint8":
                raise StoreError(f"scales: {name!r} is no uint8 modality of this store.")
            self._scales[name] = _checked_scale(name, scale, modalities[name].channels)
        self.modalities = dict(modalities)
        self.num_classes = check_num_classes(dict(num_classes or {}), str(self.path))
        self.meta, self.shard_bytes = dict(meta or {}), shard_bytes
        self._clips: list[str] = []
        self._known: set[str] = set()
        self._labels: dict[str, list[np.ndarray]] | None = None
        self._pending: dict[str, list[np.ndarray]] = {name: [] for name in modalities}
        self._shards: list[Shard] = []
        self._folder = self.path.parent / f".{self.path.name}.{uuid.uuid4().hex[:8]}.partial"

    def __enter__(self) -> FeatureStoreWriter:
        self._folder.mkdir(parents=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            shutil.rmtree(self._folder, ignore_errors=True)

    def append(
        self, clips: Sequence[str], features: Mapping[str, np.ndarray], labels: Mapping[str, np.ndarray] | None = None
    ) -> None:
        """Add clips.

        Args:
            clips: their narration ids, unique in the store.
            features: for every modality a floating-point array, maps (n, frames, C, H, W) and vectors (n, frames, C).
            labels: for every name in ``num_classes`` an integer array (n,); with all appends or with none.

        Raises:
            StoreError: an id appears twice; a shape, length, value or label is not what the store was made for.
        """
        if not self._folder.is_dir():
            raise StoreError(f"{self.path}: append works inside the writer's with block only.")
        count = len(clips)
        for clip in clips:
            if not isinstance(clip, str) or not clip:
                raise StoreError(f"{self.path}: a clip id must be a non-empty string, got {clip!r}.")
        if len(set(clips)) < count or not self._known.isdisjoint(clips):
            twice = next(clip for i, clip in enumerate(clips) if clip in self._known or clip in clips[:i])
            raise StoreError(f"{self.path}: clip id {twice!r} is given twice.")
        if set(features) != set(self.modalities):
            wanted, got = ", ".join(sorted(self.modalities)), ", ".join(sorted(features)) or "none"
            raise StoreError(f"{self.path}: features must be given for {wanted}, got {got}.")
        arrays = {name: self._checked(name, features[name], count) for name in self.modalities}
        if self._clips and (labels is None) != (self._labels is None):
            raise StoreError(f"{self.path}: labels must be given with every append or with none.")
        if labels is not None:
            checked = check_labels(labels, self.num_classes, count, str(self.path))
            if self._labels is None:
                self._labels = {name: [] for name in checked}
            for name, values in checked.items():
                self._labels[name].append(values)
        self._clips.extend(clips)
        self._known.update(clips)
        for name, array in arrays.items():
            self._pending[name].append(array)
            self._flush(name, last=False)

    def _checked(self, name: str, values: np.ndarray, count: int) -> np.ndarray:
        modality, values = self.modalities[name], np.asarray(values)
        if values.shape != (count, *modality.shape):
            raise StoreError(f"{self.path}: {name} must have shape {(count, *modality.shape)}, got {values.shape}.")
        if values.dtype.kind != "f":
            raise StoreError(f"{self.path}: {name} must be floating point, got {values.dtype}.")
        with np.errstate(over="ignore"):
            half = values.astype(np.float16)
        if not np.isfinite(half).all():
            raise StoreError(f"{self.path}: {name} holds values that are not finite in float16.")
        if modality.dtype == "uint8" and half.size and half.min() < 0:
            raise StoreError(
                f"{self.path}: {name} is stored as uint8, which holds no negative value, got {half.min()}."
            )
        return half

    def _flush(self, name: str, last: bool) -> None:
        modality = self.modalities[name]
        room = max(1, (self.shard_bytes - 128) // modality.clip_bytes)
        waiting = sum(len(part) for part in self._pending[name])
        if waiting < room and not (last and waiting):
            return
        values = np.concatenate(self._pending[name])
        while len(values) >= room or (last and len(values)):
            self._write_shard(name, values[:room])
            values = values[room:]
        self._pending[name] = [values.copy()] if len(values) else []

    def _write_shard(self, name: str, values: np.ndarray) -> None:
        modality, scale = self.modalities[name], None
        if modality.dtype == "uint8":
            axis = 2
            others = tuple(i for i in range(values.ndim) if i != axis)
            if name in self._scales:
                steps = self._scales[name]
            else:
                steps = values.max(axis=others).astype(np.float32) / np.float32(255)
                steps[steps == 0] = 1
            shape = (-1, *[1] * (values.ndim - axis - 1))
            values = np.clip(np.rint(values.astype(np.float32) / steps.reshape(shape)), 0, 255).astype(np.uint8)
            scale = [float(step) for step in steps]
        mine = [shard for shard in self._shards if shard.modality == name]
        file = f"{name}-{len(mine):05d}.npy"
        with open(self._folder / file, "xb") as handle:
            np.lib.format.write_array(handle, np.ascontiguousarray(values), version=(1, 0), allow_pickle=False)
            handle.flush()
            os.fsync(handle.fileno())
        path = self._folder / file
        start = sum(shard.clips for shard in mine)
        self._shards.append(Shard(name, file, start, len(values), path.stat().st_size, sha256(path), scale))

    def _finish(self) -> None:
        for name in self.modalities:
            self._flush(name, last=True)
        labels = None
        if self._labels is not None:
            labels = {name: np.concatenate(parts).tolist() for name, parts in self._labels.items()}
        document = {
            "format": FORMAT,
            "version": VERSION,
            "modalities": {name: asdict(modality) for name, modality in self.modalities.items()},
            "num_classes": self.num_classes,
            "meta": self.meta,
            "shards": [asdict(shard) for shard in self._shards],
            "labels": labels,
            "clips": self._clips,
        }
        try:
            text = json.dumps(document, indent=1, sort_keys=False, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise StoreError(f"{self.path}: meta must be something that JSON can hold ({error}).") from error
        with open(self._folder / MANIFEST, "x", encoding="utf-8") as handle:
            handle.write(text + "\n")
            handle.flush()
            os.fsync(handle.fileno())
        try:
            os.rename(self._folder, self.path)
        except OSError as error:
            raise StoreError(f"{self.path} could not be given its final name ({error.strerror}).") from error


def _checked_scale(name: str, scale: np.ndarray, channels: int) -> np.ndarray:
    steps = np.asarray(scale, np.float32)
    if steps.shape != (channels,) or not ((steps > 0) & (steps <= MAX_STEP)).all():
        raise StoreError(f"scales: {name} needs {channels} steps above 0 and up to {MAX_STEP}, one per channel.")
    return steps
