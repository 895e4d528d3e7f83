"""The memory that PTX is run on: this process's own arrays as global memory, shared memory, parameters, constants."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

__all__ = ["CONSTANTS", "PARAMETERS", "SHARED", "Fault", "Memory", "Region"]

# Where the windows of other memory lie among generic addresses: far above any address of a process.
SHARED, PARAMETERS, CONSTANTS = 1 << 56, 1 << 57, 1 << 58


class Fault(Exception):
    """An access that a card would not forgive, in one sentence."""


@dataclass
class Region:
    """A piece of memory that kernels may touch, and which of its pairs of bytes they have."""

    name: str
    start: int  # its address
    data: Any  # its bytes, an array of uint8
    maps: bool = False  # one of the large tensors, whose numbers are counted
    read: Any = field(init=False)
    written: Any = field(init=False)

    def __post_init__(self) -> None:
        self.read, self.written = (np.zeros(len(self.data) // 2 + 1, dtype=bool) for _ in range(2))

    def view(self, dtype: Any) -> Any:
        size = np.dtype(dtype).itemsize
        return self.data[: len(self.data) // size * size].view(dtype)


class Memory:
    """Regions, by their addresses."""

    def __init__(self, regions: list[Region]) -> None:
        self.regions = sorted(regions, key=lambda region: region.start)
        self._starts = np.array([region.start for region in self.regions], dtype=np.uint64)

    @classmethod
    def of_launch(cls, regions: list[Region], shared: int, parameters: bytes, constants: Mapping[str, bytes]) -> Memory:
        """Global memory with what a launch adds to it."""
        own = [Region("shared memory", SHARED, np.empty(shared, dtype=np.uint8))]
        own.append(Region("parameters", PARAMETERS, np.frombuffer(parameters, dtype=np.uint8).copy()))
        held = b"".join(data.ljust(-(-len(data) // 16) * 16, b"\0") for data in constants.values())
        own.append(Region("constants", CONSTANTS, np.frombuffer(held, dtype=np.uint8).copy()))
        return cls([*regions, *own])

    def region(self, at: Any, size: int, what: str) -> list[tuple[Region, Any]]:
        """Which region each address is in, with the lanes that are there (None for all of them)."""
        places = np.searchsorted(self._starts, at, side="right") - 1
        first = int(places[0])
        if (places == first).all():
            parts: list[tuple[int, Any]] = [(first, None)]
        else:
            parts = [(int(place), np.flatnonzero(places == place)) for place in np.unique(places)]
        found = []
        for place, lanes in parts:
            mine = at if lanes is None else at[lanes]
            top = int(mine.max()) + size
            if place < 0 or top > self.regions[place].start + len(self.regions[place].data):
                raise Fault(f"{what} touches {size} bytes at {int(mine.max()):#x}, which is no memory of the launch.")
            found.append((self.regions[place], lanes))
        return found

    def load(self, at: Any, dtype: Any, count: int, what: str) -> Any:
        """Numbers at addresses (uint64), `count` in a row at each: an array (addresses, count)."""
        unit = np.dtype(dtype).itemsize
        found = np.empty((len(at), count), dtype=dtype)
        for region, lanes in self.region(at, unit * count, what):
            index = self._index(region, at if lanes is None else at[lanes], unit, count, what)
            found[slice(None) if lanes is None else lanes] = region.view(dtype)[index]
            self._touch(region.read, index, unit)
        return found

    def store(self, at: Any, values: Any, what: str) -> None:
        """Stores an array (addresses, count). Where two lanes meet the later one wins."""
        count, unit = values.shape[1], values.dtype.itemsize
        for region, lanes in self.region(at, unit * count, what):
            index = self._index(region, at if lanes is None else at[lanes], unit, count, what)
            region.view(values.dtype)[index] = values if lanes is None else values[lanes]
            self._touch(region.written, index, unit)

    @staticmethod
    def _index(region: Region, at: Any, unit: int, count: int, what: str) -> Any:
        offset = at - np.uint64(region.start)
        if (offset % np.uint64(unit * count)).any():
            raise Fault(f"{what} is not aligned to {unit * count} bytes in {region.name}.")
        index = (offset // np.uint64(unit)).astype(np.int64)
        return index[:, None] + np.arange(count)

    @staticmethod
    def _touch(marks: Any, index: Any, unit: int) -> None:
        if unit <= 2:
            marks[index * unit // 2] = True
        else:
            for pair in range(unit // 2):
                marks[index * (unit // 2) + pair] = True
