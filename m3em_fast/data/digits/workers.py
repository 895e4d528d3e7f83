"""Spread the benchmark's work over processes, with results that do not depend on how many there are."""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.process
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")

_ticks: Any = None


def tick(count: int) -> None:
    """Report ``count`` units of progress from inside a job."""
    if _ticks is not None:
        with _ticks.get_lock():
            _ticks.value += count


def default_workers() -> int:
    """One process per core that this process may use, at most eight."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, 8)


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _start(ticks: Any) -> None:
    global _ticks
    _ticks = ticks
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what Ctrl-C means
    threading.Thread(target=_die_with_parent, daemon=True).start()


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Torch on one thread inside: sums come out the same on a machine with any number of cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class Workers:
    """Processes that start with the first work; a context manager.

    Processes are spawned: forking one that has run torch's threads may hang. Where they cannot start (a script whose
    main part is not guarded by ``if __name__ == "__main__"``) the work is done in this process, with a warning.

    Args:
        count: number of processes; 1 does everything in this process.
    """

    def __init__(self, count: int) -> None:
        if getattr(multiprocessing.process.current_process(), "_inheriting", False):
            raise RuntimeError(
                'Guard the calls of your script with if __name__ == "__main__": it was imported by a worker.'
            )
        self.count = count
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if self._pool is None:
            return
        if kind is not None:
            # terminate_workers() is public from Python 3.14 on; a training job would run for a minute after Ctrl-C.
            for process in list((getattr(self._pool, "_processes", None) or {}).values()):
                process.terminate()
        self._pool.shutdown(cancel_futures=True)
        self._pool = None

    def map(
        self, job: Callable[[Item], Result], items: Iterable[Item], advance: Callable[[int], object] | None = None
    ) -> Iterator[Result]:
        """``job`` of each item, in order.

        Args:
            job: a function of a module; it may call :func:`tick`.
            items: what to work on.
            advance: called with the units of progress that jobs reported since the last call.
        """
        global _ticks
        todo = list(items)
        done = 0
        if self.count > 1 and len(todo) > 1:
            try:
                for result in self._spread(job, todo, advance):
                    yield result
                    done += 1
                return
            except BrokenProcessPool:
                warnings.warn("Worker processes ended unexpectedly; going on in this process.", RuntimeWarning, 2)
                self.count, self._pool = 1, None
        for item in todo[done:]:
            before, _ticks = _ticks, _Local(advance)
            try:
                with one_thread():
                    result = job(item)
            finally:
                _ticks = before
            yield result

    def _spread(
        self, job: Callable[[Item], Result], todo: list[Item], advance: Callable[[int], object] | None
    ) -> Iterator[Result]:
        if self._pool is None:
            context = multiprocessing.get_context("spawn")
            self._shared = context.Value("q", 0)
            self._pool = ProcessPoolExecutor(self.count, context, _start, (self._shared,))
        seen = self._shared.value
        queue: list[Future[Result]] = []
        given = 0
        for _ in range(len(todo)):
            while given < len(todo) and len(queue) < 3 * self.count:
                queue.append(self._pool.submit(job, todo[given]))
                given += 1
            while not queue[0].done():
                wait(queue[:1], timeout=0.2, return_when=FIRST_COMPLETED)
                if advance is not None and (now := self._shared.value) > seen:
                    advance(now - seen)
                    seen = now
            yield queue.pop(0).result()
        if advance is not None and self._shared.value > seen:
            advance(self._shared.value - seen)


class _Local:
    """Stands for the shared counter where a job runs in this process."""

    def __init__(self, advance: Callable[[int], object] | None) -> None:
        self.advance, self._value = advance, 0

    def get_lock(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    @property
    def value(self) -> int:
        return self._value

    @value.setter
    def value(self, now: int) -> None:
        if self.advance is not None:
            self.advance(now - self._value)
        self._value = now
