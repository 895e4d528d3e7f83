"""A shard while it is written: clips go to the disk as they come, so that a shard of 256 MB takes no memory."""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from ._manifest import Modality, Shard, sha256

_CHUNK_BYTES = 2**23


class ShardFile:
    """One .npy file of a modality.

    Without ``steps`` a uint8 shard waits as float16 in a file beside it until its largest values are known.

    Args:
        folder: where it is written.
        name: the modality's name.
        modality: what its clips look like.
        number: how many shards of the modality there are before it.
        start: its first clip.
        steps: for uint8, the step of each channel.
        clips: how many clips of it are there already, from a writer that was stopped; what follows them is cut off.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        modality: Modality,
        number: int,
        start: int,
        steps: np.ndarray | None = None,
        clips: int = 0,
    ) -> None:
        self.name, self.modality, self.start, self.steps, self.clips = name, modality, start, steps, clips
        self.path = folder / f"{name}-{number:05d}.npy"
        self._waits = modality.dtype == "uint8" and steps is None
        self.written = self.path.with_suffix(".half") if self._waits else self.path
        head = 0 if self._waits else len(_header(modality, 0))
        clip_bytes = 2 * modality.clip_bytes if self._waits else modality.clip_bytes
        self._handle: IO[bytes] = self.written.open("r+b" if clips else "wb")
        size = self._handle.seek(0, os.SEEK_END)
        if clips and size < head + clips * clip_bytes:
            self._handle.close()
            raise ValueError(f"{self.written.name} has {size} bytes, and {head + clips * clip_bytes} had been written")
        self._handle.truncate(head + clips * clip_bytes)
        self._handle.seek(head + clips * clip_bytes)

    def append(self, half: np.ndarray) -> None:
        """Add clips, float16 (n, *shape)."""
        if self.steps is not None:
            half = _quantised(half, self.steps)
        self._handle.write(np.ascontiguousarray(half).data.cast("B") if half.size else b"")
        self.clips += len(half)

    def sync(self) -> None:
        """Have what was written on the disk."""
        self._handle.flush()
        os.fsync(self._handle.fileno())

    def close(self) -> None:
        self._handle.close()

    def finish(self) -> Shard:
        """Complete the file. What it waited in stays until :meth:`discard`."""
        self._handle.flush()
        steps = self.steps
        if self._waits:
            self._handle.close()
            steps = self._largest() / np.float32(255)
            steps[steps == 0] = 1
            parts = self._waiting()
            self._handle = self.path.open("wb")
            self._handle.write(_header(self.modality, 0))
            for part in parts:
                self._handle.write(_quantised(part, steps).data.cast("B"))
        self._handle.seek(0)
        self._handle.write(_header(self.modality, self.clips))
        self.sync()
        self._handle.close()
        scale = None if steps is None else [float(step) for step in steps]
        size = self.path.stat().st_size
        return Shard(self.name, self.path.name, self.start, self.clips, size, sha256(self.path), scale)

    def _waiting(self) -> Iterator[np.ndarray]:
        """All clips that wait, some at a time: a mapping of the file would count as memory as a whole."""
        some = max(1, _CHUNK_BYTES // (2 * self.modality.clip_bytes))
        with self.written.open("rb") as handle:
            for start in range(0, self.clips, some):
                part = np.empty((min(some, self.clips - start), *self.modality.shape), np.float16)
                if handle.readinto(part.data.cast("B")) != part.nbytes:
                    raise OSError(errno.EIO, os.strerror(errno.EIO), str(self.written))
                yield part

    def _largest(self) -> np.ndarray:
        """Of each channel, float32 (C,)."""
        others = tuple(i for i in range(1 + len(self.modality.shape)) if i != 2)
        return np.max([part.max(axis=others) for part in self._waiting()], axis=0).astype(np.float32)

    def discard(self) -> None:
        """Remove what the shard waited in."""
        if self._waits:
            self.written.unlink(missing_ok=True)


def _header(modality: Modality, clips: int) -> bytes:
    """Of the .npy file. numpy leaves room in it for any number of clips, so its length does not depend on them."""
    facts: dict[str, Any] = {
        "descr": np.lib.format.dtype_to_descr(modality.numpy_dtype),
        "fortran_order": False,
        "shape": (clips, *modality.shape),
    }
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, facts)
    return head.getvalue()


def _quantised(half: np.ndarray, steps: np.ndarray) -> np.ndarray:
    shape = (-1, *[1] * (half.ndim - 3))
    return np.clip(np.rint(half.astype(np.float32) / steps.reshape(shape)), 0, 255).astype(np.uint8)
