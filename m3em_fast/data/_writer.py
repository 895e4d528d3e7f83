"""Writing a feature store; see :mod:`m3em_fast.data.store`."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
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
)
from ._shard_file import ShardFile

JOURNAL, _LOCK = "progress.json", ".lock"


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
        resume: what is written, as JSON. With it the temporary folder has one name, stays when the block ends with an
            exception or the process is killed, and the next writer with an equal ``resume`` goes on in it. Everything
            that decides what is appended belongs in it.

    Attributes:
        folder: the temporary one.
        done: with ``resume``, inside the block: how many clips a writer before this one has left; the next
            append begins with the clip after them.
        note: with ``resume``: anything that JSON can hold, kept by :meth:`sync` for the writer that goes on.

    Raises:
        StoreError: the path exists, or an argument is not what it should be; with ``resume``, on entering the block:
            another process writes there, or what is there was begun with another ``resume``.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        modalities: Mapping[str, Modality],
        num_classes: Mapping[str, int] | None = None,
        meta: dict[str, Any] | None = None,
        shard_bytes: int = MAX_SHARD_BYTES,
        scales: Mapping[str, np.ndarray] | None = None,
        resume: Any = None,
    ) -> None:
        self.path = Path(path)
        self._refuse_existing()
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
        self._open: dict[str, ShardFile] = {}
        self._counts = dict.fromkeys(modalities, 0)
        self._shards: list[Shard] = []
        self._resume, self.done = resume, 0
        self.note: Any = None
        mark = uuid.uuid4().hex[:8] + "." if resume is None else ""
        self.folder = self.path.parent / f".{self.path.name}.{mark}partial"
        self._held = contextlib.ExitStack()

    def _refuse_existing(self) -> None:
        if self.path.exists():
            raise StoreError(f"{self.path} already exists; a store is never written over.")

    def __enter__(self) -> FeatureStoreWriter:
        self.folder.mkdir(parents=True, exist_ok=self._resume is not None)
        if self._resume is not None:
            self._held.enter_context(_alone(self.folder))
            try:
                self._refuse_existing()  # again: now nobody else is about to finish it
                self._go_on()
            except BaseException:
                with contextlib.suppress(OSError):
                    if os.listdir(self.folder) == [_LOCK]:  # it was made for this alone
                        shutil.rmtree(self.folder)
                self._held.close()
                raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._finish()
            elif self._resume is not None:
                # The disk may be full, a file finished but for its entry: what ends the block is what is told.
                with contextlib.suppress(OSError, ValueError):
                    self.sync()
        finally:
            for file in self._open.values():
                with contextlib.suppress(OSError):
                    file.close()
            if self._resume is None:
                shutil.rmtree(self.folder, ignore_errors=True)
            self._held.close()

    def sync(self) -> None:
        """With ``resume``: have what was appended on the disk, so that a writer after this one finds it."""
        if self._resume is None:
            raise StoreError(f"{self.path}: sync needs a writer that can be resumed.")
        for file in self._open.values():
            file.sync()
        labels = None
        if self._labels is not None:
            labels = {name: np.concatenate(parts).tolist() for name, parts in self._labels.items()}
        state = {
            "resume": self._resume,
            "note": self.note,
            "clips": self._clips,
            "labels": labels,
            "shards": [asdict(shard) for shard in self._shards],
            "open": {name: file.clips for name, file in self._open.items()},
        }
        _write_whole(self.folder / JOURNAL, json.dumps(state))

    def _go_on(self) -> None:
        journal = self.folder / JOURNAL
        keep = {_LOCK}
        if journal.exists():
            try:
                state = json.loads(journal.read_text(encoding="utf-8"))
                if state["resume"] != json.loads(json.dumps(self._resume)):
                    raise StoreError(
                        f"{self.folder} holds an unfinished store of other data or options; "
                        "finish it with those, or delete it to begin anew."
                    )
                self._take_up(state)
            except StoreError:
                raise
            except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
                reason = " ".join(str(error).split())
                raise StoreError(
                    f"{self.folder} cannot be gone on with ({reason:.100}); delete it to begin anew."
                ) from error
            keep |= {JOURNAL, *(shard.file for shard in self._shards)}
            keep |= {file.written.name for file in self._open.values()}
        for path in self.folder.iterdir():
            if path.name not in keep:
                path.unlink()

    def _take_up(self, state: dict[str, Any]) -> None:
        self.note, self._clips = state["note"], list(state["clips"])
        self._known, self.done = set(self._clips), len(self._clips)
        if state["labels"] is not None:
            self._labels = {name: [np.array(values, np.int64)] for name, values in state["labels"].items()}
        self._shards = [Shard(**facts) for facts in state["shards"]]
        for shard in self._shards:
            self._counts[shard.modality] += shard.clips
        for name, clips in state["open"].items():
            self._open[name] = self._shard_file(name, clips)
            self._counts[name] += clips

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
        if not self.folder.is_dir():
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
        arrays = {name: self._checked(name, features[name], clips) for name in self.modalities}
        if self._clips and (labels is None) != (self._labels is None):
            raise StoreError(f"{self.path}: labels must be given with every append or with none.")
        if labels is not None:
            checked = check_labels(labels, self.num_classes, count, str(self.path))
            if self._labels is None:
                self._labels = {name: [] for name in checked}
            for name, values in checked.items():
                self._labels[name].append(values)
        before = len(self._clips)
        for name, array in arrays.items():
            # A writer before this one may have been stopped when some modalities had got these clips.
            self._write(name, array[self._counts[name] - before :])
        self._clips.extend(clips)
        self._known.update(clips)

    def _checked(self, name: str, values: np.ndarray, clips: Sequence[str]) -> np.ndarray:
        modality, values = self.modalities[name], np.asarray(values)
        if values.shape != (len(clips), *modality.shape):
            raise StoreError(
                f"{self.path}: {name} must have shape {(len(clips), *modality.shape)}, got {values.shape}."
            )
        if values.dtype.kind != "f":
            raise StoreError(f"{self.path}: {name} must be floating point, got {values.dtype}.")
        with np.errstate(over="ignore"):
            half = values.astype(np.float16)
        good = np.isfinite(half)
        if not good.all():
            raise StoreError(
                f"{self.path}: {name} holds values that are not finite in float16, in clip {_first(clips, ~good)}."
            )
        if modality.dtype == "uint8" and (half < 0).any():
            raise StoreError(
                f"{self.path}: {name} is stored as uint8, which holds no negative value, got {half.min()} in clip "
                f"{_first(clips, half < 0)}."
            )
        return half

    def _room(self, name: str) -> int:
        return max(1, (self.shard_bytes - 128) // self.modalities[name].clip_bytes)

    def _shard_file(self, name: str, clips: int = 0) -> ShardFile:
        mine = [shard for shard in self._shards if shard.modality == name]
        start = sum(shard.clips for shard in mine)
        return ShardFile(self.folder, name, self.modalities[name], len(mine), start, self._scales.get(name), clips)

    def _write(self, name: str, half: np.ndarray) -> None:
        while len(half):
            if name not in self._open:
                self._open[name] = self._shard_file(name)
            file = self._open[name]
            part = half[: self._room(name) - file.clips]
            file.append(part)
            self._counts[name] += len(part)
            half = half[len(part) :]
            if file.clips == self._room(name):
                self._complete(name)

    def _complete(self, name: str) -> None:
        file = self._open[name]
        self._shards.append(file.finish())
        del self._open[name]
        if self._resume is not None:
            self.sync()
        file.discard()

    def _finish(self) -> None:
        for name in list(self._open):
            self._complete(name)
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
        _write_whole(self.folder / MANIFEST, text + "\n")
        try:
            os.rename(self.folder, self.path)
        except OSError as error:
            raise StoreError(f"{self.path} could not be given its final name ({error.strerror}).") from error
        for name in (JOURNAL, _LOCK):  # last: whoever is killed before has all that goes on
            (self.path / name).unlink(missing_ok=True)


def _checked_scale(name: str, scale: np.ndarray, channels: int) -> np.ndarray:
    steps = np.asarray(scale, np.float32)
    if steps.shape != (channels,) or not ((steps > 0) & (steps <= MAX_STEP)).all():
        raise StoreError(f"scales: {name} needs {channels} steps above 0 and up to {MAX_STEP}, one per channel.")
    return steps


def _first(clips: Sequence[str], bad: np.ndarray) -> str:
    return f"{clips[int(bad.reshape(len(clips), -1).any(axis=1).argmax())]!r:.80}"


def _write_whole(path: Path, text: str) -> None:
    temporary = path.with_name(f"{path.name}.tmp")
    with open(temporary, "w", encoding="utf-8") as handle:
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(temporary, path)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Refuse a folder that another process writes in; the lock falls when its holder dies."""
    try:
        import fcntl
    except ImportError:  # no such locks on Windows
        yield
        return
    with open(folder / _LOCK, "a") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StoreError(f"{folder} is in use: another process is writing that store.") from error
        except OSError:
            pass  # a file system that knows no locks
        yield
