"""The folder of a run: one process at a time writes to it, what it holds is whole, and a signal ends the run between
two steps."""

from __future__ import annotations

import fcntl
import itertools
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from torch.utils.tensorboard import SummaryWriter

__all__ = [
    "CHECKPOINT",
    "EventLog",
    "NoLog",
    "StopSignals",
    "Stopped",
    "UsageError",
    "open_run",
    "write_whole",
    "writing",
]

CHECKPOINT, LOCK = "checkpoint.pt", ".lock"
# What a run may leave that ends before its first checkpoint.
_YOUNG = (LOCK, CHECKPOINT + ".tmp", "events.out.tfevents")


class UsageError(ValueError):
    """Something the user can put right; the message is one sentence."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """The disk may be full: the system's errors do not say which file they are about."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise UsageError(
            f"{path} could not be written ({reason}); --resume goes on from the last checkpoint, which is untouched."
        ) from error


def write_whole(path: Path, data: bytes | memoryview) -> None:
    """Write to a temporary file beside ``path``, flush it to the disk, rename: ``path`` is never half a file."""
    temporary = path.with_name(path.name + ".tmp")
    with writing(path):
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except OSError:
            with suppress(OSError):
                temporary.unlink()  # half a file takes room that is needed
            raise


@contextmanager
def open_run(run: Path | None, name: str, resume: bool) -> Iterator[Path]:
    """The run's folder, held against other processes for as long as the block lasts.

    Args:
        run: a new folder, or with ``resume`` that of a run. None: runs/<name>-<first free number>.
        name: what the run is called where ``run`` is None.
        resume: whether the folder has to be there, or must hold nothing yet.

    Raises:
        UsageError: another process is at work in the folder, or it is not what it has to be.
    """
    if resume:
        if run is None:
            raise UsageError("--resume needs --run, the folder of the run to go on with.")
        _check_old(run)
    elif run is not None:
        if (run / LOCK).is_file():
            with _held(run):  # "in use" says more than "exists already"
                pass
        _check_new(run)
    try:
        if run is None:
            run = _first_free(name)
        run.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--run {run or 'runs'} cannot be made ({error.strerror}).") from error
    with _held(run):
        if not resume:
            _check_new(run)  # again: now nobody else can put anything there
        yield run


def _first_free(name: str) -> Path:
    for number in itertools.count(1):
        run = Path("runs") / f"{name}-{number}"
        with suppress(FileExistsError):
            run.mkdir(parents=True)  # fails for all but one of several processes that look for a name
            return run
    raise AssertionError


def _check_new(run: Path) -> None:
    if run.exists() and (not run.is_dir() or any(file.name != LOCK for file in run.iterdir())):
        raise UsageError(f"--run {run} exists already: name a new folder, or add --resume to go on with it.")


def _check_old(run: Path) -> None:
    if not run.is_dir():
        raise UsageError(f"--resume: there is no run folder {run}.")
    if not (run / CHECKPOINT).exists():
        # Killed before its first checkpoint a run has nothing to lose; a folder of other things has.
        foreign = sorted(file.name for file in run.iterdir() if not file.name.startswith(_YOUNG))
        if foreign:
            raise UsageError(f"--resume: {run} holds {foreign[0]!r} and no {CHECKPOINT}: it is no run to go on with.")


@contextmanager
def _held(run: Path) -> Iterator[None]:
    # A lock of the system's and no file with a process id: it is let go of however the process ends.
    try:
        handle = os.open(run / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise UsageError(f"--run {run}: nothing can be written there ({error.strerror}).") from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(f"--run {run} is in use: another process is training there.") from error
        except OSError:
            pass  # a file system that knows no locks
        yield
    finally:
        os.close(handle)


class EventLog(SummaryWriter):
    """TensorBoard's writer, whose thread would end with a traceback of its own where the disk is full."""

    def __init__(self, run: Path, purge_step: int) -> None:
        self._where = run / "events.out.tfevents"
        with writing(self._where):
            super().__init__(str(run), purge_step=purge_step)
        self._hook = threading.excepthook
        threading.excepthook = self._unless_disk_full

    def _unless_disk_full(self, error: threading.ExceptHookArgs) -> None:
        if not issubclass(error.exc_type, OSError):  # that one comes up again at the next add_scalar or flush
            self._hook(error)

    def add_scalar(self, *arguments: Any, **options: Any) -> None:
        with writing(self._where):
            super().add_scalar(*arguments, **options)

    def flush(self) -> None:
        with writing(self._where):
            super().flush()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            with writing(self._where):
                self.close()
        except UsageError:
            if kind is None:  # what ends the run already is what has to be told
                raise
        finally:
            threading.excepthook = self._hook


class NoLog:
    """In place of :class:`EventLog` in a process that writes nothing."""

    def __enter__(self) -> NoLog:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def add_scalar(self, *arguments: Any, **options: Any) -> None:
        pass

    def flush(self) -> None:
        pass


class Stopped(KeyboardInterrupt):
    """The run was asked to end, and its state is saved.

    Attributes:
        signal: the signal that asked.
    """

    def __init__(self, number: int, run: Path) -> None:
        self.signal = number
        name = signal.Signals(number).name
        super().__init__(f"stopped by {name}; --run {run} --resume goes on from the last checkpoint.")


class StopSignals:
    """In its block Ctrl-C, and SIGTERM as schedulers send it, wait until the run asks for them.

    A second Ctrl-C does not wait. A second SIGTERM does: timeout(1) sends it twice. Nor is there hurry where several
    processes train: torchrun passes on each Ctrl-C that they have had from the terminal.

    Attributes:
        came: the signal that this process got; None before.
        agreed: the signal that any process of several got, as of the last step; each of them then ends at that step.
    """

    def __init__(self, run: Path, several: bool = False) -> None:
        self.run, self.several = run, several
        self.came: int | None = None
        self.agreed: int | None = None
        self._waits = True
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():  # Python gives signals to no other
            for number in (signal.SIGINT, signal.SIGTERM):
                before = signal.getsignal(number)
                if before not in (signal.SIG_IGN, None):  # under nohup and behind & an ignored signal stays ignored
                    self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        again = self.came is not None and number == signal.SIGINT and not self.several
        self.came = number
        if again or not self._waits:
            raise Stopped(number, self.run)

    @property
    def asked(self) -> int | None:
        """The signal by which the run is asked to end; None before."""
        return self.agreed if self.several else self.came

    def check(self) -> None:
        """End here if a signal came."""
        if self.asked is not None:
            raise Stopped(self.asked, self.run)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """For what takes long and changes nothing: no signal waits in this block."""
        self._waits = False
        try:
            self.check()
            yield
        finally:
            self._waits = True
