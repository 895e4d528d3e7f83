"""Counts of what a block's warps do: instructions, accesses with their bank conflicts and sectors, waits for memory."""

from __future__ import annotations

from typing import Any

import numpy as np

from bench.ptx.code import Kernel, names
from bench.ptx.memory import PARAMETERS, SHARED

__all__ = ["Access", "Tally"]

WARP, BANKS, SECTOR = 32, 32, 32


class Access:
    """What one instruction did to memory."""

    def __init__(self) -> None:
        self.requests = 0  # of warps
        self.wavefronts = 0  # shared memory: passes over the banks
        self.ideal = 0  # and as many without a conflict
        self.sectors = 0  # global memory: pieces of 32 bytes, each request for itself
        self.bytes = 0  # that lanes asked for


class Tally:
    """Counts of all blocks that a machine has run; `rounds` and `barriers` are sums over blocks.

    A warp goes on after a load, and waits where it first needs what was loaded; then all of its loads so far have come.
    """

    def __init__(self, kernel: Kernel, warps: int) -> None:
        self.kernel, self.warps = kernel, warps
        count = len(kernel.instructions)
        self.executed = [0] * count  # by instruction: of warps
        self.near: dict[int, Access] = {}  # by instruction: of shared memory,
        self.far: dict[int, Access] = {}  # and of global memory
        self.rounds = 0  # between two barriers those of the warp that has most
        self.waits = 0  # of all warps
        self.barriers = 0
        self._touched = [i.registers for i in kernel.instructions]
        self._load = [i.far_load for i in kernel.instructions]
        self._here = 0
        self._active = np.zeros(warps, dtype=bool)

    def begin(self) -> None:
        """A block starts."""
        self.pending: dict[str, Any] = {}  # by register: the number of the load by warp, 0 for none
        self._issued, self._arrived, self._waited = (np.zeros(self.warps, dtype=np.int64) for _ in range(3))

    def end(self) -> None:
        self.rounds += int(self._waited.max())
        self.waits += int(self._waited.sum())

    def barrier(self) -> None:
        self.barriers += 1
        self.end()
        self._waited[:] = 0

    def lanes_are(self, mask: Any) -> None:
        self._active = mask.reshape(-1, WARP).any(axis=1)
        self._here = int(self._active.sum())

    def issue(self, at: int) -> None:
        self.executed[at] += self._here
        if self.pending and not self._touched[at].isdisjoint(self.pending):
            self.wait(self._touched[at] & self.pending.keys())

    def wait(self, names: set[str]) -> None:
        """Warps that are here need what was loaded under these names."""
        for name in names:
            number = self.pending[name]
            late = self._active & (number > self._arrived)
            self._waited += late
            self._arrived = np.where(late, self._issued, self._arrived)
            if (number <= self._arrived).all():
                del self.pending[name]

    def access(self, at: int, where: Any, warp: Any, lane: Any, size: int, name: str = "") -> None:
        """Lanes of some warps access `size` bytes each at addresses, in one instruction; a load is waited for by its
        registers, or by a name."""
        first = int(where[0])
        if first >= PARAMETERS:
            return
        access = (self.near if first >= SHARED else self.far).setdefault(at, Access())
        here = np.unique(warp)
        access.requests += len(here)
        access.bytes += len(where) * size
        if first >= SHARED:
            self._shared(access, where - np.uint64(SHARED), warp, lane, size)
            return
        start = where.min() // np.uint64(SECTOR) * np.uint64(SECTOR)
        sector = ((where - start) // np.uint64(SECTOR)).astype(np.int64)
        access.sectors += len(np.unique(sector * self.warps + warp))
        if name or self._load[at]:
            self._issued[here] += 1
            for each in [name] if name else names(self.kernel.instructions[at].operands[0]):
                number = self.pending.setdefault(each, np.zeros(self.warps, dtype=np.int64))
                number[here] = self._issued[here]

    def _shared(self, access: Access, where: Any, warp: Any, lane: Any, size: int) -> None:
        # A warp is served in one part, in halves or in quarters: 128 bytes at most.
        words, part = max(1, size // 4), warp.astype(np.int64) * 4 + lane * max(4, size) // (4 * WARP)
        word = (where // np.uint64(4)).astype(np.int64)
        every = (word[:, None] + np.arange(words)).reshape(-1)
        parts = np.repeat(part, words)
        span = int(every.max()) + 1
        distinct = np.unique(parts * span + every)
        parts, every = distinct // span, distinct % span
        full = np.bincount(parts * BANKS + every % BANKS, minlength=4 * self.warps * BANKS).reshape(-1, BANKS)
        access.wavefronts += int(full.max(axis=1).sum())
        access.ideal += int((-(-full.sum(axis=1) // BANKS)).sum())
