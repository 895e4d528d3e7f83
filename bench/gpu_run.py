"""Runs the commands of ``make gpu``: each in a process group of its own, with a time limit, several at once, and with
what they say in a log as well, line by line, so that whatever ends this process leaves what was said before."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

ROOT = Path(__file__).resolve().parents[1]
GRACE = 5.0  # seconds of its limit that a command has to say what it knows, once it is interrupted
clock = time.monotonic

_log: TextIO | None = None
_lock = threading.Lock()


def say(text: str = "") -> None:
    """A line for whoever looks on, and for the log."""
    with _lock:
        print(text, flush=True)
        _write(text)


def note(text: str) -> None:
    """A line for the log alone."""
    with _lock:
        _write(text)


def _write(text: str) -> None:
    if _log is not None:
        _log.write(text + "\n")
        _log.flush()


@contextlib.contextmanager
def logged(path: Path) -> Iterator[None]:
    """Within, what is said is written to a file too."""
    global _log
    with open(path, "w") as _log:
        try:
            yield
        finally:
            _log = None


@dataclass(frozen=True)
class Done:
    """How a command ended: its exit code, None where it was stopped at its limit; and what it printed."""

    code: int | None
    text: str = ""


def environment(**more: str) -> dict[str, str]:
    """Of the commands: this checkout first, no choice of backend from outside, and Triton on the card."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    inherited = {name: value for name, value in os.environ.items() if name != "M3EM_BACKEND"}
    # tests/conftest.py would have Triton interpret its kernels. Python would hold back what it prints to a pipe.
    return {**inherited, "PYTHONPATH": path, "TRITON_INTERPRET": "0", "PYTHONUNBUFFERED": "1", **more}


class _Running:
    """A command that has been started, and a thread that reads what it prints."""

    def __init__(self, name: str, command: Sequence[str], show: bool, variables: Mapping[str, str]) -> None:
        self.name, self.show = name, show
        self.lines: list[str] = []
        self.code: int | None = None
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment(**variables),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,  # so that all of it can be ended
        )
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)
            if self.show:
                say(line.rstrip("\n"))
            else:
                note(f"{self.name}: {line.rstrip()}")

    def wait(self, until: float) -> bool:
        """Whether it has ended by then, of itself."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.code = self.process.wait(max(until - clock(), 0))
            return True
        return False

    def end(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def done(self, stopped: bool) -> Done:
        self.end(signal.SIGKILL)  # and what it has left behind
        self.process.wait()
        self.reader.join(2)
        return Done(None if stopped else self.code, "".join(self.lines))


def call_all(
    commands: Mapping[str, Sequence[str]], limit: float, *, show: bool = False, grace: float = 0.0, **variables: str
) -> dict[str, Done]:
    """Run commands at the same time, for ``limit`` seconds at most; then they end with everything that they have
    started. Those that are not done ``grace`` seconds before are interrupted, as by Ctrl-C. What they print is said as
    it comes or, without ``show``, goes to the log alone."""
    end = clock() + max(limit, 0.1)
    running: list[_Running] = []
    try:
        for name, command in commands.items():
            running.append(_Running(name, command, show, variables))
        late = [each for each in running if not each.wait(end - grace)]
        if grace:
            for each in late:
                each.end(signal.SIGINT)
        for each in late:
            each.wait(end)
        return {each.name: each.done(each in late) for each in running}
    except BaseException:
        for each in running:
            each.end(signal.SIGKILL)
        raise


def call(command: Sequence[str], limit: float, *, show: bool = False, **variables: Any) -> Done:
    """One command alone, as in :func:`call_all`."""
    name = next((word for word in command if word.startswith("bench.")), "command")
    return call_all({name: command}, limit, show=show, **variables)[name]
