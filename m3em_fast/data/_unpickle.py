"""Read a pickle without running it: numpy arrays, containers, strings, bytes, numbers, bools, None and nothing else.

:class:`PickleFile` interprets the opcodes of protocols 0 to 5 itself. Nothing is imported and nothing of the file's
choice is called: the few names that a pickled array needs stand for functions of :mod:`m3em_fast.data._unpickle_numpy`,
and any other name is refused. The file is mapped, and arrays of protocols 3 to 5 are views of the mapping, so a file
costs the memory of the pages that are looked at. In protocols 0 to 2 the numbers are text, which has to be decoded:
their arrays are copies, and take once their size.

What a small file can ask for is bounded: every opcode makes one small object at most, a file may have ``MAX_OPCODES``,
and no length in it is believed before the bytes are there.
"""

from __future__ import annotations

import mmap
import os
import stat
import struct
from pathlib import Path

from ._unpickle_machine import MAX_OPCODES, Machine
from ._unpickle_numpy import Refused

__all__ = ["MAX_OPCODES", "PickleFile", "UnpickleError"]


class UnpickleError(ValueError):
    """A pickle is refused; the message is one sentence: which file, and what it asked for or what is wrong with it."""


class PickleFile:
    """What a pickle holds.

    Args:
        path: the file. Its arrays are views of it, so it has to stay as it is while they are used.

    Attributes:
        value: the object. Arrays are not writeable where they are views of the file; bytearrays come as bytes, numpy's
            scalars as Python's, strings of Python 2 as str, one character a byte.

    Raises:
        UnpickleError: the file asks for anything else, or is no pickle.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            with open(self.path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as handle:
                state = os.fstat(handle.fileno())
                if not stat.S_ISREG(state.st_mode):
                    raise UnpickleError(f"{self.path} is no ordinary file.")
                if not state.st_size:
                    raise UnpickleError(f"{self.path} is no readable pickle (it is empty).")
                if os.pread(handle.fileno(), 4, 0) == b"PK\x03\x04":
                    raise UnpickleError(
                        f"{self.path} is a zip archive, as torch.save and numpy.savez make them, and no pickle."
                    )
                self._map = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise UnpickleError(f"{self.path} cannot be read ({error.strerror}).") from error
        machine = Machine(self._map, self.release)
        try:
            self.value = machine.run()
        except Refused as error:
            raise UnpickleError(
                f"{self.path} asks for {error}; only arrays, containers, strings and numbers are read from a pickle."
            ) from error
        except (ValueError, IndexError, KeyError, TypeError, OverflowError, struct.error) as error:
            reason = f"{' '.join(str(error).split()) or type(error).__name__:.100}"
            start = " ".join(str(self._map[:40], "latin-1").split())
            # A failed download, a csv file: a text breaks off at one of its first letters.
            if machine.position < len(start) and start.isascii() and start.isprintable():
                reason += f"; it begins with {start!r}"
            raise UnpickleError(f"{self.path} is no readable pickle ({reason}).") from error

    def release(self) -> None:
        """Give the pages of the file that were looked at back to the system; they are read again when needed."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)
