"""Signs of life between the processes of a run, and why it ends where one of them does.

A process that is killed can say nothing, and one that waits in C++ for it can do nothing. Two threads of each process
are therefore apart from the training: one tells the others, through the store where torchrun let them meet, that it is
alive or why it ended; one looks at what was told.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

__all__ = ["Pulse"]

# Seconds. A process may be slow without being gone; a connection that broke says that one is, and leaves which.
EVERY, LOST, LOST_IF_CUT, COMING = 1.0, 40.0, 5.0, 600.0
GRACE = 3.0  # for a process to end by itself, its files closed
GOES_ON = "--resume goes on from the last checkpoint."


class Pulse:
    """This process's signs of life, and those of the others.

    Args:
        rank, size: which of how many processes this is.
        stalled: seconds without :meth:`moved` after which the run ends.
    """

    def __init__(self, rank: int, size: int, stalled: float) -> None:
        self._rank, self._size, self._stalled = rank, size, stalled
        self._others = [other for other in range(size) if other != rank]
        self._store = dist.PrefixStore("m3em_fast", self.store())
        self._own: dict[str, Any] = {"beat": 0, "host": socket.gethostname(), "end": None, "read": False}
        self._heard: dict[int, dict[str, Any]] = {}
        self._when = dict.fromkeys(self._others, time.monotonic() + COMING)  # the last sign of each
        self._answered = self._moved = time.monotonic()
        self._final: tuple[str, int] | None = None
        self._refused = self._told = False
        self._lock = threading.Lock()
        self._over, self._ending = threading.Event(), threading.Event()
        self._threads = [threading.Thread(target=each, daemon=True) for each in (self._beat, self._watch)]
        for thread in self._threads:
            thread.start()

    def store(self) -> dist.Store:
        """A connection of its own to the store: one that waits would keep the others waiting."""
        return next(dist.rendezvous("env://", timeout=timedelta(seconds=COMING)))[0]

    def moved(self) -> None:
        """The training got on."""
        self._moved = time.monotonic()

    def stop(self) -> None:
        """The run ended well, and every process knows."""
        self._over.set()
        for thread in self._threads:
            thread.join(GRACE)

    def end(self, own: tuple[str, int] | None) -> tuple[str, int] | None:
        """Find out why the run ends, say so once on this machine, and let the others know.

        Args:
            own: this process's reason, a sentence and an exit code; None where it is that another does not answer.

        Returns:
            The reason of the lowest rank that has one, else which rank is gone, else the signal that came; None where
            there is nothing of these, and then nothing is said.
        """
        self._ending.set()
        self._own["end"] = own
        # The signal that torchrun sends because one process was killed must not pass for the reason.
        until = time.monotonic() + LOST_IF_CUT + GRACE
        while self._final is None and time.monotonic() < until:
            self._exchange()
            if self._all_know() or (not _is_reason(own) and _is_reason(self._judged(LOST_IF_CUT))):
                break
            time.sleep(0.1)
        if found := self._final or self._judged(LOST_IF_CUT):
            self.tell(found[0])
        # The store may end with the first process, or with its torchrun.
        until = time.monotonic() + GRACE
        while self._rank == 0 and not self._all_know(ended=False) and time.monotonic() < until and not self._refused:
            time.sleep(0.1)
            self._exchange()
        return found

    def tell(self, said: str) -> None:
        """Print a sentence, unless this process or another of this machine has; it is what the others are to know.

        torchrun ends with a report of its own, for which every process may leave a message."""
        if self._told:
            return
        self._told = True
        if report := os.environ.get("TORCHELASTIC_ERROR_FILE"):
            with contextlib.suppress(OSError):
                details = {"py_callstack": said, "timestamp": str(int(time.time()))}
                Path(report).write_text(json.dumps({"message": {"message": said, "extraInfo": details}}))
        machine = os.environ.get("GROUP_RANK", self._own["host"])
        mine = os.environ["LOCAL_RANK"] == "0"
        if not self._refused and self._lock.acquire(timeout=EVERY):
            try:
                mine = self._store.add(f"told by {machine}", 1) == 1
            except RuntimeError:
                self._refused = True
            finally:
                self._lock.release()
        if mine:
            sys.stderr.flush()
            # The first process's bar has a line of its own, which that ends if it can.
            before = "" if self._rank == 0 and self._ending.is_set() else "\n"
            os.write(2, f"{before}train.py: {said}\n".encode())
        self._own["read"] = True
        self._exchange()

    def _all_know(self, ended: bool = True) -> bool:
        """Whether all others have read why another ended; ``ended``: or have ended as well."""
        states = self._heard.values()
        return len(states) == len(self._others) and all(s["read"] or (ended and s["end"] is not None) for s in states)

    def _beat(self) -> None:
        self._exchange()
        while not self._over.wait(EVERY):
            self._exchange()

    def _exchange(self) -> None:
        # A store that was once gone does not come back, and torch writes thirty lines about each time that it is asked.
        if self._refused or not self._lock.acquire(timeout=EVERY):
            return
        try:
            self._own["beat"] += 1
            self._store.set(str(self._rank), json.dumps(self._own))
            here = [rank for rank in self._others if rank in self._heard or self._store.check([str(rank)])]
            for rank, told in zip(
                here, self._store.multi_get([str(rank) for rank in here]) if here else (), strict=True
            ):
                state = json.loads(told)
                if state["beat"] != self._heard.get(rank, {}).get("beat"):
                    self._when[rank] = time.monotonic()
                self._heard[rank] = state
            self._answered = time.monotonic()
        except RuntimeError:
            self._refused = True
        finally:
            self._lock.release()

    def _judged(self, lost: float) -> tuple[str, int] | None:
        """As :meth:`end`; a process is gone after so many seconds without a sign."""
        states = {**self._heard, self._rank: self._own}
        ends = {rank: states[rank]["end"] for rank in sorted(states) if states[rank]["end"] is not None}
        for rank, end in ends.items():
            if _is_reason(end):
                return (f"{self._named(rank)}: {end[0]}" if rank else end[0]), end[1]
        now = time.monotonic()
        for rank in self._others:
            if rank not in ends and now - self._when[rank] > lost:
                return f"{self._named(rank)} is gone: killed, or its machine is; {GOES_ON}", 2
        if now - self._answered > (LOST_IF_CUT if self._refused else LOST):
            where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            return f"the torchrun at {where}, where all ranks met, is gone; {GOES_ON}", 2
        return next((tuple(end) for end in ends.values()), None)

    def _named(self, rank: int) -> str:
        state = self._own if rank == self._rank else self._heard.get(rank)
        return f"rank {rank} of {self._size}" + (f" on {state['host']}" if state else "")

    def _watch(self) -> None:
        while not (self._over.wait(EVERY / 2) or self._ending.is_set()):
            found = self._judged(LOST)
            if found is None and time.monotonic() - self._moved > self._stalled:
                found = f"no rank has finished a step for {self._stalled / 60:.0f} minutes; {GOES_ON}", 2
            # Others may end by the same reason, and the signal that torchrun sends if one was killed is none.
            if found is None or self._ending.wait(EVERY if _is_reason(found) else LOST_IF_CUT + GRACE):
                continue
            self._final = self._judged(LOST_IF_CUT) or found
            self.tell(self._final[0])
            # The training ends by itself, and in better order, where its next sum fails.
            if not (self._ending.wait(GRACE) or self._over.is_set()):
                os._exit(self._final[1])


def _is_reason(end: Sequence[Any] | None) -> bool:
    return end is not None and end[1] < 128
