"""Measuring in a process of its own: a kernel that kills its process loses its own times and nobody else's.

A case is measured whole in one child, so that ratios are still taken within rounds of one process. Where the child
dies, the provider whose turn it was gets the signal as its error, and the case is measured again without it.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import traceback
from ctypes import c_int
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Any

import torch

from bench.allocator import keep_freed_memory
from bench.case import Case
from bench.core import CopyBandwidth, Row, Settings, measure, modes_of
from bench.providers import Provider

NOBODY = -1
# A fork would inherit the threads of OpenMP as locks that nobody holds, and CUDA not at all.
SPAWN = multiprocessing.get_context("spawn")
Question = tuple[Case, list[Provider], Settings, bool, Case | None]


class Died(Exception):
    """What ended the child."""


class Child:
    """The process that measures: started when it is needed, and again after it has died; to be used in ``with``."""

    def __init__(self, copy_buffer: int, device: str = "cpu", keeps: bool = True) -> None:
        self.copy_buffer, self.device, self.keeps = copy_buffer, device, keeps
        # Shared memory, because what the child says of itself has to survive it, and must cost a step nothing.
        self.turn = SPAWN.RawValue(c_int, NOBODY)
        self.process: Any = None
        self.pipe: Connection

    def __enter__(self) -> Child:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.end()

    def copy_bandwidth(self) -> float:
        """Bytes a second, measured where everything else is."""
        try:
            return self._ask(None)
        except Died as death:
            raise OSError(f"the process that measures died of {death} while it copied memory.") from death

    def measure(
        self, case: Case, providers: list[Provider], settings: Settings, tiny: bool = False, twin: Case | None = None
    ) -> list[Row]:
        """As :func:`bench.core.measure`, with ``crashed: SIGSEGV`` as the error of who has killed the process."""
        left, found = list(providers), []
        crashed: dict[Provider, str] = {}
        while left:
            try:
                found = self._ask((case, left, settings, tiny, twin))
                break
            except Died as death:
                if self.turn.value == NOBODY:
                    crashed |= dict.fromkeys(left, f"crashed: {death}, before anybody's turn")
                    break
                crashed[left.pop(self.turn.value)] = f"crashed: {death}"
        rows = []
        for provider in providers:
            if provider in crashed:
                rows += [Row(case, provider, mode, error=crashed[provider]) for mode in modes_of(case, tiny)]
            else:
                rows += [row for row in found if row.provider == provider]
        return rows

    def end(self) -> None:
        """At once, and with it whatever it has started: a compiler, for instance."""
        if self.process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()  # it heads no group before it has imported torch
        self.process.join()
        self.pipe.close()
        self.process = None

    def _ask(self, question: Question | None) -> Any:
        if self.process is None:
            self._start()
        try:
            self.pipe.send(question)
            answer = self.pipe.recv()
        except (EOFError, ConnectionError) as error:
            self.process.join()
            death = Died(_cause(self.process.exitcode))
            self.end()
            raise death from error
        if isinstance(answer, str):
            raise RuntimeError(f"in the process that measures:\n{answer}")
        return answer

    def _start(self) -> None:
        self.pipe, theirs = SPAWN.Pipe()
        self.turn.value = NOBODY
        arguments = (theirs, self.turn, self.copy_buffer, torch.get_num_threads(), self.device, self.keeps)
        process = SPAWN.Process(target=_serve, args=arguments, daemon=True)
        resource_tracker.ensure_running()  # when it starts, it lets the signal through
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            process.start()  # with the signal blocked: no traceback from the middle of its imports
            self.process = process
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()


def _cause(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"


def _serve(pipe: Connection, turn: Any, copy_buffer: int, threads: int, device: str, keeps: bool) -> None:
    """The child: a list of rows for every question, or the traceback of what went wrong."""
    if keeps:
        keep_freed_memory()
    os.setpgrp()  # out of reach of Ctrl-C in a terminal: the parent hears it and ends the whole group
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
    copy = CopyBandwidth(copy_buffer, device=device)
    answer: float | list[Row] | str
    while True:
        question = pipe.recv()
        try:
            answer = copy.of(copy(15)) if question is None else _rows(copy, turn, *question)
        except Exception:
            answer = traceback.format_exc()
        pipe.send(answer)


def _rows(
    copy: CopyBandwidth,
    turn: Any,
    case: Case,
    providers: list[Provider],
    settings: Settings,
    tiny: bool,
    twin: Case | None,
) -> list[Row]:
    names = [provider.name for provider in providers]

    def take(name: str | None) -> None:
        turn.value = NOBODY if name is None else names.index(name)

    return measure(case, providers, settings, copy, tiny, take, twin, copy.device.name)


def _end_with_parent() -> None:
    """However the parent ends, nobody goes on measuring for it."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os.killpg(0, signal.SIGKILL)
