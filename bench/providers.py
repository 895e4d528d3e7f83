"""Who is measured: the eager baseline, torch.compile of it, and every backend of m3em_fast that can run here."""

from __future__ import annotations

import contextlib
import importlib
import logging
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

import m3em_fast
from bench.case import Problem

BASELINES = ("eager", "compile")
# Runs device code on the CPU, for tests: a time of it says nothing.
NOT_FOR_TIMES = ("simt",)


@dataclass(frozen=True)
class Provider:
    """``name`` is ``eager``, ``compile`` or a backend of m3em_fast."""

    name: str

    @property
    def backend(self) -> str | None:
        return None if self.name in BASELINES else self.name

    def function(self, problem: Problem) -> Callable[..., object]:
        """What is to be called with the inputs of ``problem``."""
        if self.name == "eager":
            return problem.eager
        if self.name == "compile":
            # The settings of somebody who wants speed: a graph for the very shape, and an error where there is none.
            return torch.compile(problem.eager, dynamic=False, fullgraph=True)
        return problem.fast

    def chosen(self) -> AbstractContextManager[object]:
        """While it lasts, calls of m3em_fast are served by this provider's backend."""
        return nullcontext() if self.backend is None else choose(self.backend)


def choose(backend: str) -> AbstractContextManager[object]:
    choice = getattr(m3em_fast, "backend", None)
    return nullcontext() if choice is None else choice(backend)


def backends(device: str = "cpu") -> tuple[str, ...]:
    """The backends of m3em_fast that serve tensors of a device on this machine and whose times mean something."""
    try:
        module = importlib.import_module("m3em_fast.backends")
    except ModuleNotFoundError:
        return ("reference",)
    return tuple(name for name in module.available(device) if name not in NOT_FOR_TIMES)


def select(names: Sequence[str], compiled: bool, device: str = "cpu") -> list[Provider]:
    """The providers in the order of their columns; ``names`` limits the backends, the baseline is always there."""
    known = backends(device)
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"--backends: {unknown[0]!r} cannot run here; there is {', '.join(known)}.")
    chosen = [name for name in known if not names or name in names]
    return [Provider(name) for name in ("eager", *(("compile",) if compiled else ()), *chosen)]


class TookTooLong(BaseException):
    """No ``Exception``, because the compiler catches those and goes on with something else."""


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps the compiler from logging what the table is going to show."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


@contextlib.contextmanager
def time_limit(seconds: float, what: str) -> Iterator[None]:
    """Raises :class:`TookTooLong` in what runs longer. Only in the main thread, and where the system has alarms.

    And again every second: what is raised in a weak reference's callback or a destructor is lost, and the compiler
    makes many of both."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def give_up(signum: int, frame: object) -> None:
        raise TookTooLong(f"{what} took longer than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def fresh_compiler(device: str = "cpu") -> None:
    """Forget earlier graphs, so that a shape is not compiled with the sizes of the last one left open."""
    import torch._inductor.config as inductor

    if device == "cpu":
        # With workers of its own the compiler would leave a process behind that goes on while others are timed. A
        # card's clock does not see it, and there its time is short.
        inductor.compile_threads = 1
    torch._dynamo.reset()
