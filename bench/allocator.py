"""What the C library does with memory that is freed, which decides how dear a new tensor is."""

from __future__ import annotations

import ctypes
from typing import Any

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def _mallopt() -> Any:
    try:
        return ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return None


def can_keep() -> bool:
    """Whether the C library takes such orders: glibc does."""
    return _mallopt() is not None


def keep_freed_memory() -> bool:
    """Let this process keep what it frees, and use it again; False where the C library cannot.

    By itself glibc gives blocks above 32 MB back to the system at once, and smaller ones as the state of its heap has
    it. Every large tensor is then made of pages that the system has to find and to zero, which takes longer than what
    a memory-bound op does with them, and how much longer changes from hour to hour. Kept blocks are found again as long
    as calls repeat, as they do here; a program that allocates aligned blocks of ever other sizes could grow.
    """
    mallopt = _mallopt()
    return mallopt is not None and bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, -1))
