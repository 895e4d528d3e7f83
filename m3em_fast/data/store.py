"""Feature store: frozen backbone features of one split on disk, read clip by clip without loading the rest.

A store is a folder with one ``manifest.json`` and ``.npy`` shards of at most 256 MB. Nothing in it is ever unpickled,
and a store that was truncated, altered or put together wrongly is refused with a sentence.

``python -m m3em_fast.data.store PATH --verify`` prints what a store holds and checks every shard.
"""

from __future__ import annotations

import contextlib
import json
import math
import mmap
import os
import sys
import threading
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import _cli
from ..backends import native
from ._manifest import Manifest, Modality, Shard, StoreError, check_shard_header, load_manifest, sha256
from ._writer import FeatureStoreWriter

__all__ = ["FeatureStore", "FeatureStoreWriter", "Modality", "StoreError", "frame_offsets"]

_VERIFIED = ".verified.json"
_WORTH_EXPECTING = 2**16  # bytes of a clip
_NO_DISK = 2e9  # bytes a second
_PIECE = 2**15 - 1  # elements; from one more on torch uses threads


def frame_offsets(stored: int, wanted: int) -> list[int]:
    """Which of the stored frames an even selection takes: the middle of each of ``wanted`` equal segments.

    This is int(tick / 2 + tick * i) with tick = stored / wanted, in exact arithmetic: 25 to 5 gives [2, 7, 12, 17, 22].

    Raises:
        StoreError: ``wanted`` is not from 1 to ``stored``.
    """
    if not 1 <= wanted <= stored:
        raise StoreError(f"frames must be from 1 to the {stored} stored ones, got {wanted}.")
    return [stored * (2 * i + 1) // (2 * wanted) for i in range(wanted)]


class FeatureStore:
    """Read a store.

    Opening checks the manifest, and size and header of every shard; the checksum of a shard is checked at its first use
    and remembered, by size and time of modification, in a small file in the store (in memory where it is read-only).

    Args:
        path: the store's folder.
        verify: check every shard's checksum now.

    Attributes:
        clips: narration ids, in the store's order.
        modalities: name -> :class:`Modality`.
        labels: "verb" and "noun" -> int64 array (clips,); None for a split without labels.
        num_classes: classes under each label name.
        meta: what the writer was given.
        fingerprint: SHA-256 of the manifest, which holds that of every shard.

    Raises:
        StoreError: anything about the store is not as it should be.
    """

    def __init__(self, path: str | os.PathLike[str], verify: bool = False) -> None:
        self.path = Path(path)
        manifest: Manifest = load_manifest(self.path)
        self.clips, self.modalities, self.labels = manifest.clips, manifest.modalities, manifest.labels
        self.num_classes, self.meta, self.fingerprint = manifest.num_classes, manifest.meta, manifest.sha256
        self._shards: dict[str, list[Shard]] = {name: [] for name in self.modalities}
        self._offsets: dict[str, int] = {}
        for shard in manifest.shards:
            self._shards[shard.modality].append(shard)
            self._offsets[shard.file] = check_shard_header(self.path, shard, self.modalities[shard.modality])
        self._maps: dict[str, _Mapped] = {}
        self._in_memory: set[str] = set()  # modalities that were read faster than from a disk, the last time
        self._lock = threading.Lock()  # of maps and checksums: several threads may read
        self._verified = self._read_verified()
        if verify:
            for shard in manifest.shards:
                self._check_sum(shard, again=True)
            self._write_verified()

    def __len__(self) -> int:
        return len(self.clips)

    def __reduce__(self) -> tuple[type[FeatureStore], tuple[Path]]:
        # A worker process opens the files itself; pickled memory maps would carry all the data.
        return FeatureStore, (self.path,)

    def read(
        self,
        indices: Sequence[int] | np.ndarray | torch.Tensor,
        modalities: Iterable[str] | None = None,
        frames: int | None = None,
        out: Mapping[str, torch.Tensor] | None = None,
    ) -> dict[str, torch.Tensor]:
        """Features of some clips. Several threads may read at a time.

        Args:
            indices: positions (B,) in ``clips``, in any order, repetitions allowed.
            modalities: names to read; all by default.
            frames: how many of the stored frames, evenly spread (:func:`frame_offsets`); only these are read. All by
                default.
            out: name -> contiguous float16 tensor on the CPU of the shape that is returned, to be filled. Memory that
                was used before takes a fraction of the time of fresh memory.

        Returns:
            name -> float16 tensor, maps (B, frames, C, H, W) and vectors (B, frames, C); with ``out`` its tensors.

        Raises:
            StoreError: an unknown modality, an index outside the store, more frames than stored, an altered shard.
            ValueError: a tensor of ``out`` is not what it should be.
        """
        wanted = list(self.modalities) if modalities is None else list(modalities)
        for name in wanted:
            if name not in self.modalities:
                raise StoreError(f"{self.path} has no modality {name!r}; it has {', '.join(self.modalities)}.")
        where = np.asarray(indices)
        if where.size == 0:
            where = where.astype(np.int64)
        if where.ndim != 1 or where.dtype.kind not in "iu":
            raise StoreError(f"indices must be one row of integers, got shape {where.shape} of {where.dtype}.")
        where = where.astype(np.int64)
        if where.size and not 0 <= where.min() <= where.max() < len(self):
            bad = int(where.min() if where.min() < 0 else where.max())
            raise StoreError(f"{self.path} holds clips 0 to {len(self) - 1}, got index {bad}.")
        found = {}
        for name in wanted:
            modality = self.modalities[name]
            picked = frame_offsets(modality.frames, modality.frames if frames is None else frames)
            shape = (len(where), len(picked), *modality.shape[1:])
            found[name] = torch.empty(shape, dtype=torch.float16) if out is None else _checked_out(out, name, shape)
            self._gather(name, where, picked, found[name].numpy())
        return found

    def _gather(self, name: str, where: np.ndarray, picked: list[int], out: np.ndarray) -> None:
        """Clip by clip, each in one copy: indexing with arrays copies twice, and not at the speed of memory."""
        modality, shards = self.modalities[name], self._shards[name]
        owner = np.searchsorted([shard.start for shard in shards], where, side="right") - 1
        opened = {number: self._open(shards[number], modality) for number in np.unique(owner).tolist()}
        whole = len(picked) == modality.frames
        # The plain kernel, for processors without AVX2, is slower than torch.
        compiled = modality.dtype == "uint8" and native is not None and native.isa() != "plain"
        steps = {n: np.array(shards[n].scale, np.float32) for n in opened} if compiled else {}
        widen = None if modality.dtype == "float16" or compiled else _Widener(out.shape[1:])
        large = whole and modality.clip_bytes >= _WORTH_EXPECTING
        if large and name not in self._in_memory:
            for number, clip in zip(owner.tolist(), where.tolist(), strict=True):
                opened[number].expect(clip - shards[number].start)
        began = time.perf_counter()
        for place, number, clip in zip(out, owner.tolist(), where.tolist(), strict=True):
            shard = shards[number]
            stored = opened[number].clips[clip - shard.start]
            if compiled:
                _widen(stored, picked, steps[number], place)
                continue
            target = place if widen is None else widen.stored
            if whole:
                target[...] = stored
            else:
                np.take(stored, picked, axis=0, out=target, mode="clip")
            if widen is not None:
                widen(shard, place)
        if large and len(where):
            # Asking costs a third of a copy from memory, and no disk is that fast: the last read says which it was.
            speed = len(where) * modality.clip_bytes / (time.perf_counter() - began)
            (self._in_memory.add if speed > _NO_DISK else self._in_memory.discard)(name)

    def _open(self, shard: Shard, modality: Modality) -> _Mapped:
        with self._lock:
            if shard.file not in self._maps:
                if self._check_sum(shard, again=False):
                    self._write_verified()
                self._maps[shard.file] = _Mapped(self.path, shard, modality, self._offsets[shard.file])
            return self._maps[shard.file]

    def _check_sum(self, shard: Shard, again: bool) -> bool:
        """Whether the checksum had to be computed."""
        path = self.path / shard.file
        state = path.stat()
        fact = [state.st_size, state.st_mtime_ns, shard.sha256]
        if not again and self._verified.get(shard.file) == fact:
            return False
        found = sha256(path)
        if found != shard.sha256:
            raise StoreError(f"{path} was altered: its SHA-256 is {found}, the manifest says {shard.sha256}.")
        self._verified[shard.file] = fact
        return True

    def _read_verified(self) -> dict[str, Any]:
        try:
            known = json.loads((self.path / _VERIFIED).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return {}
        return known if isinstance(known, dict) else {}

    def _write_verified(self) -> None:
        temporary = self.path / f"{_VERIFIED}.{uuid.uuid4().hex[:8]}"
        with contextlib.suppress(OSError):
            try:
                temporary.write_text(json.dumps(self._verified), encoding="utf-8")
                os.replace(temporary, self.path / _VERIFIED)
            finally:
                temporary.unlink(missing_ok=True)


class _Mapped:
    """A shard in memory, as far as the system has read it.

    Attributes:
        clips: (n, *shape), in the dtype on disk.
    """

    def __init__(self, folder: Path, shard: Shard, modality: Modality, offset: int) -> None:
        with open(folder / shard.file, "rb") as handle:
            self._map = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
        flat = np.frombuffer(self._map, modality.numpy_dtype, offset=offset)
        self.clips = flat.reshape(shard.clips, *modality.shape)
        self._offset, self._clip_bytes = offset, modality.clip_bytes

    def expect(self, clip: int) -> None:
        """Have the system read the clip's pages, where they are on the disk, while others are copied: left to itself it
        reads them a few at a time when they are touched, which takes two to three times as long."""
        if hasattr(mmap, "MADV_WILLNEED"):
            start = self._offset + clip * self._clip_bytes
            page = start // mmap.PAGESIZE * mmap.PAGESIZE
            self._map.madvise(mmap.MADV_WILLNEED, page, start + self._clip_bytes - page)


class _Widener:
    """Makes float16 of a clip's uint8 and its shard's scale, where no compiled kernel does.

    torch converts to float16, which numpy does ten times slower; in pieces within the processor's cache, too small for
    torch to share them out among threads: one that reads ahead would wait for cores that the training has.

    Args:
        shape: of a clip, (frames, C, ...).

    Attributes:
        stored: uint8, where the clip is put before a call.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.stored = np.empty(shape, np.uint8)
        self._shape = shape
        self._parts = torch.from_numpy(self.stored).flatten().split(_PIECE)
        self._wide = torch.empty(_PIECE, dtype=torch.float32)
        self._shard: Shard | None = None
        self._steps: Sequence[torch.Tensor] = ()

    def __call__(self, shard: Shard, out: np.ndarray) -> None:
        if shard is not self._shard:
            steps = np.array(shard.scale, np.float32).reshape(-1, *[1] * (len(self._shape) - 2))
            whole = torch.from_numpy(np.array(np.broadcast_to(steps, self._shape)))
            self._shard, self._steps = shard, whole.flatten().split(_PIECE)
        made = torch.from_numpy(out).flatten().split(_PIECE)
        for part, step, target in zip(self._parts, self._steps, made, strict=True):
            target.copy_(self._wide[: len(part)].copy_(part).mul_(step))


def _widen(stored: np.ndarray, picked: Sequence[int], steps: np.ndarray, out: np.ndarray) -> None:
    """float16 of some frames of a clip's uint8, straight from where it is stored."""
    frames, channels, *positions = stored.shape
    numbers = math.prod(positions)
    source, to, frame = stored.ctypes.data, out.ctypes.data, channels * numbers
    if len(picked) == frames:
        native.uint8_features(source, steps.ctypes.data, to, frames, channels, numbers)
        return
    for place, wanted in enumerate(picked):
        native.uint8_features(source + wanted * frame, steps.ctypes.data, to + 2 * place * frame, 1, channels, numbers)


def _checked_out(out: Mapping[str, torch.Tensor], name: str, shape: tuple[int, ...]) -> torch.Tensor:
    if name not in out:
        raise ValueError(f"out must have a tensor for {name}, it has {', '.join(out) or 'none'}.")
    x = out[name]
    if x.shape != shape or x.dtype != torch.float16 or x.device.type != "cpu" or not x.is_contiguous():
        form = f"{tuple(x.shape)} of {x.dtype} on {x.device}{'' if x.is_contiguous() else ', not contiguous'}"
        raise ValueError(f"out: {name} must be contiguous, {shape} of torch.float16 on cpu, got {form}.")
    return x


def show(path: Path, /, verify: bool = False) -> None:
    """Show what a feature store holds, after checking its manifest and the size and header of every shard.

    Args:
        path: The store's folder.
        verify: Check the SHA-256 of every shard too.
    """
    store = FeatureStore(path, verify=verify)
    print(f"{path}: {len(store)} clips")
    for name, modality in store.modalities.items():
        shape = " x ".join(str(extent) for extent in modality.shape)
        print(f"  {name:8} {modality.kind:6} {shape} {modality.dtype}")
    for label, classes in store.num_classes.items():
        present = "no labels" if store.labels is None else f"{len(np.unique(store.labels[label]))} of them present"
        print(f"  {label:8} {classes} classes, {present}")
    if verify:
        print("  every checksum is right")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line of :func:`show`; one sentence on stderr and status 2 where something is refused."""
    try:
        _cli.cli(show, arguments, prog="python -m m3em_fast.data.store")
    except (StoreError, ImportError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
