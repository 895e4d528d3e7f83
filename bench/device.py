"""Where something is measured: the clock of a CPU or that of a card, and how fast either copies memory and multiplies.

On a card the clock is read by the card itself, in the order of its work (CUDA events), so that nothing waits for the
host between the forward and the backward of a call. Calls take turns with copies of their inputs, more of them than the
caches hold: inputs then come from memory, and nothing of another's is left there to be written back while the clock
runs. The card waits a little before every call, so that the host is ahead of it when the first event is due.
"""

from __future__ import annotations

import time
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch

COPY_BUFFER = 256 * 2**20
NAMES = ("cpu", "cuda")
clock = time.perf_counter


class Device:
    """The CPU."""

    name = "cpu"
    # How many bytes of other inputs a call is to read before it reads the same ones again: four times what the
    # last-level cache of most processors has for one program.
    cold = 128 * 2**20

    def prepare(self) -> None:
        """Before a call that is timed, outside its time."""

    def mark(self) -> Any:
        """A reading of the clock."""
        return clock()

    def seconds(self, *marks: Any) -> list[float]:
        """From each mark to the next."""
        return [end - start for start, end in pairwise(marks)]

    def finish(self) -> None:
        """Until everything that was asked for is done."""


class Card(Device):
    """The current CUDA device."""

    name = "cuda"
    # Twice the largest second-level cache of a card, and of known size where the card does not tell its own.
    cold = COPY_BUFFER
    LEAD = 400_000  # cycles: a fifth of a millisecond and more

    def prepare(self) -> None:
        torch.cuda._sleep(self.LEAD)

    def mark(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, *marks: Any) -> list[float]:
        marks[-1].synchronize()
        return [start.elapsed_time(end) / 1e3 for start, end in pairwise(marks)]

    def finish(self) -> None:
        torch.cuda.synchronize()


@cache
def device_of(name: str) -> Device:
    return Card() if name == "cuda" else Device()


class CopyBandwidth:
    """Bytes read plus written a second between two reused buffers, on all threads: what memory can do at best."""

    def __init__(self, size: int = COPY_BUFFER, *, device: str = "cpu") -> None:
        self.device = device_of(device)
        # Written once, so that no page is new when the clock runs.
        self.source = torch.zeros(size // 4, device=device)
        self.target = torch.zeros(size // 4, device=device)
        self.bytes = 2 * size // 4 * 4

    def __call__(self, repeats: int = 5) -> list[float]:
        """Seconds a copy."""
        self.target.copy_(self.source)
        times = []
        for _ in range(repeats):
            self.device.prepare()
            start = self.device.mark()
            self.target.copy_(self.source)
            times += self.device.seconds(start, self.device.mark())
        return times

    def of(self, times: list[float]) -> float:
        return self.bytes / float(np.median(times))


def product_rate(dtype: torch.dtype, *, device: str = "cpu", size: int = 8192, repeats: int = 5) -> float:
    """Floating-point operations a second of a large square product: what the matrix units do at best. Random numbers:
    of zeros it takes less time."""
    where = device_of(device)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    out = torch.mm(a, b)
    times = []
    for _ in range(repeats):
        where.prepare()
        start = where.mark()
        torch.mm(a, b, out=out)
        times += where.seconds(start, where.mark())
    return 2 * size**3 / float(np.median(times))
