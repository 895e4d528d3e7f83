"""Whose threads the kernels run on.

The extension takes OpenMP's functions from the process's global symbols, and has stand-ins of one thread for a process
that has none (csrc/openmp.cpp). torch puts its own OpenMP library there, so both share one set of threads.
"""

from __future__ import annotations

import ctypes
import os
import sys
from contextlib import suppress
from pathlib import Path


class _Place(ctypes.Structure):
    _fields_ = (
        ("file", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("symbol", ctypes.c_char_p),
        ("address", ctypes.c_void_p),
    )


def offer() -> None:
    """Put an OpenMP library among the global symbols where torch has put none. To be called before the extension is
    loaded, for it looks once."""
    if sys.platform == "linux" and not hasattr(ctypes.CDLL(None), "GOMP_parallel"):
        with suppress(OSError):
            ctypes.CDLL("libgomp.so.1", mode=ctypes.RTLD_GLOBAL)


def library(extension: str) -> Path | None:
    """The file whose threads a loaded extension uses, None where it uses one thread."""
    asked, place = ctypes.CDLL(extension).m3em_openmp, _Place()
    asked.restype = ctypes.c_void_p
    address = asked()
    if not address or not ctypes.CDLL(None).dladdr(ctypes.c_void_p(address), ctypes.byref(place)):
        return None
    found = Path(os.fsdecode(place.file))
    return None if found.samefile(extension) else found
