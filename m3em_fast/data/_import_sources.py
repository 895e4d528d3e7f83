"""Where an import reads from: a pickle of pooled features, or a folder with a .npy file a clip."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from ._manifest import Modality, StoreError, check_modality
from ._unpickle import PickleFile


class Source(Protocol):
    """One modality's features of many clips.

    Attributes:
        name: the modality.
        path: file or folder.
        clips: narration ids, in its own order.
    """

    name: str
    path: Path
    clips: list[str]

    def modality(self, clips: Iterable[str], dtype: str) -> tuple[Modality, str]:
        """How the store holds it, with maps in ``dtype``, and the dtype it has now; every clip is looked at.

        Raises:
            StoreError: the features of a clip are not what the store can hold, or not like those of the others.
        """

    def state(self, clip: str) -> list[int]:
        """What changes when the features of the clip do."""

    def read(self, clips: Sequence[str]) -> np.ndarray:
        """Features (n, frames, C) or (n, frames, C, H, W) of clips that :meth:`modality` has looked at."""

    def release(self) -> None:
        """Memory that reading took is needed elsewhere."""


def _modality(name: str, shape: Sequence[int], dtype: str, where: str) -> Modality:
    kind: Literal["map", "vector"] = "map" if len(shape) == 4 else "vector"
    names = ("frames", "channels", "height", "width")
    facts: dict[str, Any] = {"height": None, "width": None} | dict(zip(names, shape, strict=False))
    facts |= {"kind": kind, "dtype": dtype if kind == "map" else "float16"}
    return check_modality(name, facts, where)


class PickledFeatures:
    """One array of a pickle, (N, frames, C); see :func:`read_pickle`."""

    def __init__(self, name: str, file: PickleFile, array: np.ndarray, rows: dict[str, int]) -> None:
        self.name, self.path, self.clips = name, file.path, list(rows)
        self._file, self._array, self._rows = file, array, rows

    def modality(self, clips: Iterable[str], dtype: str) -> tuple[Modality, str]:
        return _modality(self.name, self._array.shape[1:], dtype, str(self.path)), self._array.dtype.name

    def state(self, clip: str) -> list[int]:
        return []  # of the file as a whole

    def read(self, clips: Sequence[str]) -> np.ndarray:
        rows = [self._rows[clip] for clip in clips]
        if rows == list(range(rows[0], rows[0] + len(rows))):
            return self._array[rows[0] : rows[0] + len(rows)]
        return self._array[rows]

    def release(self) -> None:
        self._file.release()


def read_pickle(path: Path) -> dict[str, PickledFeatures]:
    """Modality -> its features, of a pickle as the challenge hands them out, in the pickle's order.

    That is ``{"features": {"RGB": (N, frames, C), ...}, "narration_ids": N strings}`` in any floating-point dtype.

    Raises:
        UnpickleError: the pickle asks for what is no data, or is none.
        StoreError: it holds something else.
    """
    file = PickleFile(path)
    value = file.value
    if not isinstance(value, dict) or not {"features", "narration_ids"} <= set(value):
        raise StoreError(f"{path} must hold a dict with 'features' and 'narration_ids'{_holds(value)}.")
    ids = value["narration_ids"]
    if isinstance(ids, np.ndarray) and ids.ndim == 1:
        ids = ids.tolist()
    if not isinstance(ids, list | tuple):
        raise StoreError(f"{path}: narration_ids must be a list of strings.")
    ids = [str(clip, "latin-1") if isinstance(clip, bytes) else clip for clip in ids]
    rows: dict[str, int] = {}
    for row, clip in enumerate(ids):
        if not isinstance(clip, str) or not clip:
            kind = type(clip).__name__
            raise StoreError(f"{path}: narration_ids must be non-empty strings, got {kind} as entry {row}.")
        if clip in rows:
            raise StoreError(f"{path}: clip {clip!r:.80} is there twice, as entry {rows[clip]} and {row}.")
        rows[clip] = row
    features = value["features"]
    if not isinstance(features, dict) or not features:
        raise StoreError(f"{path}: features must be a dict with an array for each modality.")
    found = {}
    for name, array in features.items():
        if not isinstance(array, np.ndarray) or array.dtype.kind != "f" or array.ndim != 3:
            form = f"{array.shape} of {array.dtype}" if isinstance(array, np.ndarray) else f"a {type(array).__name__}"
            raise StoreError(
                f"{path}: {name!r:.80} must be a floating-point array (clips, frames, channels), got {form}."
            )
        if len(array) != len(rows):
            raise StoreError(f"{path}: there are {len(rows)} narration_ids but {len(array)} clips of {name!r:.80}.")
        found[name] = PickledFeatures(name, file, array, rows)
    return found


def _holds(value: Any) -> str:
    if not isinstance(value, dict):
        return f", got a {type(value).__name__}"
    return f", got {', '.join(repr(key)[:40] for key in list(value)[:5]) or 'an empty one'}"


class MapFolder:
    """A folder with one .npy file a clip, named by its narration id: maps (frames, C, H, W) or vectors (frames, C).

    Raises:
        StoreError: it is no folder, or has no such file.
    """

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.path = name, folder
        try:
            files = sorted(entry.name for entry in os.scandir(folder) if entry.name.endswith(".npy"))
        except OSError as error:
            raise StoreError(f"{folder} cannot be read ({error.strerror}).") from error
        if not files:
            raise StoreError(f"{folder} holds no .npy file; there must be one a clip, named by its narration id.")
        self.clips = [file.removesuffix(".npy") for file in files]
        self._shape: tuple[int, ...] = ()

    def modality(self, clips: Iterable[str], dtype: str) -> tuple[Modality, str]:
        found: Modality | None = None
        first, kinds = "", set()
        for clip in clips:
            array = self._load(clip)
            if found is None:
                if array.ndim not in (2, 4):
                    raise StoreError(
                        f"{self._file(clip)} must hold a map (frames, channels, height, width) or a vector "
                        f"(frames, channels), got {array.shape}."
                    )
                found = _modality(self.name, array.shape, dtype, str(self._file(clip)))
                self._shape, first = array.shape, clip
            self._check(clip, array, first)
            kinds.add(array.dtype.name)
        assert found is not None
        return found, " and ".join(sorted(kinds))

    def _check(self, clip: str, array: np.ndarray, first: str) -> None:
        if array.dtype.kind != "f":
            raise StoreError(f"{self._file(clip)} must be floating point, got {array.dtype}.")
        if array.shape != self._shape:
            like = f"which is that of {first}" if first else "as when the import began"
            raise StoreError(f"{self._file(clip)} must have shape {self._shape}, {like}, got {array.shape}.")

    def state(self, clip: str) -> list[int]:
        try:
            facts = self._file(clip).stat()
        except OSError as error:
            raise StoreError(f"{self._file(clip)} cannot be read ({error.strerror}).") from error
        return [facts.st_size, facts.st_mtime_ns]

    def read(self, clips: Sequence[str]) -> np.ndarray:
        arrays = [self._load(clip) for clip in clips]
        for clip, array in zip(clips, arrays, strict=True):
            self._check(clip, array, "")
        return np.stack(arrays)

    def release(self) -> None:
        pass

    def _file(self, clip: str) -> Path:
        return self.path / f"{clip}.npy"

    def _load(self, clip: str) -> np.ndarray:
        path = self._file(clip)
        try:
            if not stat.S_ISREG(path.stat().st_mode):
                raise StoreError(f"{path} is no ordinary file.")
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except StoreError:
            raise
        except OSError as error:
            raise StoreError(f"{path} cannot be read ({error.strerror}).") from error
        except Exception as error:  # numpy evaluates the header as a literal, which fails in many ways
            raise StoreError(f"{path} is no readable .npy file ({' '.join(str(error).split())[:80]}).") from error
        if not isinstance(array, np.memmap):
            raise StoreError(f"{path} is an archive of arrays, not one .npy array.")
        return array
