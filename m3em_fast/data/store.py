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
_STREAMED = 2**23  # bytes; of more, a cache holds too little until it is used


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
            found[name] = fresh(shape) if out is None else _checked_out(out, name, shape)
            self._gather(name, where, picked, found[name].numpy())
        return found

    def _gather(self, name: str, where: np.ndarray, picked: list[int], out: np.ndarray) -> None:
        """Clip by clip, each in one copy: indexing with arrays copies twice, and not at the speed of memory."""
        modality, shards = self.modalities[name], self._shards[name]
        owner = np.searchsorted([shard.start for shard in shards], where, side="right") - 1
        opened = {number: self._open(shards[number], modality) for number in np.unique(owner).tolist()}
        rows = where - np.array([shard.start for shard in shards], np.int64)[owner]
        large = len(picked) == modality.frames and modality.clip_bytes >= _WORTH_EXPECTING
        if large and name not in self._in_memory:
            for number, row in zip(owner.tolist(), rows.tolist(), strict=True):
                opened[number].expect(row)
        began = time.perf_counter()
        if modality.dtype == "uint8":
            for number, mapped in opened.items():
                places = np.flatnonzero(owner == number)
                _widen(mapped.clips, rows[places], picked, shards[number], out, places)
        else:
            for place, number, row in zip(out, owner.tolist(), rows.tolist(), strict=True):
                stored = opened[number].clips[row]
                if len(picked) == modality.frames:
                    place[...] = stored
                else:
                    np.take(stored, picked, axis=0, out=place, mode="clip")
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


def _widen(
    stored: np.ndarray, rows: np.ndarray, picked: Sequence[int], shard: Shard, out: np.ndarray, places: np.ndarray
) -> None:
    """float16 of some frames of clips of a uint8 shard: ``stored[rows][:, picked]`` times the shard's steps, rounded
    once, into ``out[places]``."""
    steps, frames = np.array(shard.scale, np.float32), np.array(picked, np.int64)
    if native is not None and native.isa() != "plain":  # the plain kernel is slower than torch
        source, to = stored.ctypes.data + rows * stored.strides[0], out.ctypes.data + places * out.strides[0]
        addresses = (x.ctypes.data for x in (source, to, steps, frames))
        sizes = len(rows), len(picked), len(steps), math.prod(stored.shape[3:])
        native.uint8_features(*addresses, *sizes, out.nbytes > _STREAMED)
        return
    # torch converts to float16, which numpy does ten times slower; in pieces within the processor's cache, too small
    # for torch to share them out among threads: one that reads ahead would wait for cores that the training has.
    shape = (len(picked), *stored.shape[2:])
    spread = torch.from_numpy(np.array(np.broadcast_to(steps.reshape(-1, *[1] * (len(shape) - 2)), shape)))
    clip, wide = np.empty(shape, np.uint8), torch.empty(_PIECE, dtype=torch.float32)
    parts, factors = torch.from_numpy(clip).flatten().split(_PIECE), spread.flatten().split(_PIECE)
    for row, place in zip(rows.tolist(), places.tolist(), strict=True):
        np.take(stored[row], picked, axis=0, out=clip, mode="clip")
        made = torch.from_numpy(out[place]).flatten().split(_PIECE)
        for part, factor, target in zip(parts, factors, made, strict=True):
            target.copy_(wide[: len(part)].copy_(part).mul_(factor))


def fresh(shape: Sequence[int]) -> torch.Tensor:
    """Memory for a batch, float16, in huge pages where the system has them: the first time it is filled five times as
    fast, later by a quarter faster."""
    x = torch.empty(tuple(shape), dtype=torch.float16)
    if native is not None:
        native.advise_huge_pages(x.data_ptr(), x.nbytes)
    return x


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
    prog = "m3em_fast.data.store"
    try:
        _cli.cli(show, arguments, prog=f"python -m {prog}")
    except (StoreError, ImportError) as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{prog}: interrupted.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
