"""Kernels in Triton: the readable twins of those in csrc/cuda, for cards that have no others.

This module says what Triton can serve, and imports it only where a card or the interpreter is to run kernels: it takes
0.4 s, and may be missing. The kernels are in a module an op, which does import it.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import re
import sys
import threading
from collections.abc import Iterable

import torch

from m3em_fast.cuda import IMAGES, OLDEST, version_of
from m3em_fast.triton import _table

OLDEST_TRITON = (3, 3)
# From this compute capability on every dtype is served; before it those that Triton and the cards are both good at.
EVERY_DTYPE = 80
BEFORE = (torch.float32, torch.float16)


def version() -> str | None:
    """Of the Triton that an import would find; None where there is none."""
    try:
        if importlib.util.find_spec("triton") is None:
            return None
    except (ImportError, ValueError):  # a module by that name that is none of a package
        return None
    for name in ("triton", "pytorch-triton", "triton-windows"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return str(getattr(importlib.import_module("triton"), "__version__", "unknown"))


def interpreted() -> bool:
    """Whether Triton runs kernels on the CPU: TRITON_INTERPRET=1 when it is, or was, imported."""
    standard = sys.modules.get("triton.language.standard")
    if standard is not None and hasattr(standard, "sum"):
        return type(standard.sum).__name__ == "InterpretedFunction"
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


def without_driver() -> str | None:
    """Why Triton has no driver for CUDA devices; None where it has. Starts none, so the process may still fork."""
    if torch.version.cuda is None:
        return "this PyTorch is built without CUDA"
    if not torch.cuda.device_count():
        return "there is no CUDA device"
    found = importlib.import_module("triton.backends").backends
    active = [name for name, each in found.items() if each.driver.is_active()]
    return None if len(active) == 1 else f"of its drivers {' and '.join(active) or 'none'} would be active"


def capability(index: int) -> int:
    """The compute capability of a device, 70 for 7.0."""
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def start() -> None:
    """Have Triton start its driver, for which it may compile a few lines of C; raises whatever goes wrong."""
    importlib.import_module("triton").runtime.driver.active.get_current_target()


class Devices:
    """What Triton serves in this process, and why not the rest. What has been found out is not asked again."""

    def __init__(self) -> None:
        self._unavailable: str | None = ""  # not asked yet
        self._capabilities: dict[int, int] = {}
        self._declined: dict[int, str] = {}
        self._faster: dict[tuple[str, int, torch.dtype], tuple[tuple[int, int], ...]] = {}
        self._lock = threading.RLock()

    def unavailable(self) -> str | None:
        """Why nothing can be served at all; None where something may."""
        if self._unavailable == "":
            self._unavailable = self._find()
        return self._unavailable

    @staticmethod
    def _find() -> str | None:
        try:
            found = version()
            if found is None:
                return "Triton is not installed (the extra m3em_fast[triton] brings it)"
            numbers = tuple(int(n) for n in re.findall(r"\d+", found)[:2])
            if numbers and numbers < OLDEST_TRITON:
                return f"Triton {found} is older than {'.'.join(map(str, OLDEST_TRITON))}, the oldest that is served"
            if interpreted():
                return None
            missing = without_driver()
        except Exception as error:  # whatever a broken installation raises
            return f"Triton cannot be imported ({type(error).__name__}: {_first_line(error)})"
        return None if missing is None else f"Triton {found} has no active driver: {missing}"

    def refusal(self, index: int, dtypes: Iterable[torch.dtype]) -> str | None:
        """Why calls with tensors of some dtypes cannot run on a device; None where they can."""
        own = self._capabilities.get(index)
        if own is None:
            with self._lock:
                reason = self.unavailable() or self._declined.get(index) or self._look(index)
                if reason is not None:
                    return reason
                own = self._capabilities[index]
        if own < EVERY_DTYPE:
            for dtype in dtypes:
                if dtype not in BEFORE:
                    served = " and ".join(str(each).removeprefix("torch.") for each in BEFORE)
                    other = str(dtype).removeprefix("torch.")
                    return f"on compute capability {version_of(own)} it serves {served}, not {other}"
        return None

    def _look(self, index: int) -> str | None:
        try:
            own = capability(index)
            if own < OLDEST:
                oldest = f"{version_of(OLDEST)}, the oldest that is served"
                self._declined[index] = f"compute capability {version_of(own)} is older than {oldest}"
            else:
                start()
                self._capabilities[index] = own
        except Exception as error:  # of the driver, or of the C compiler that Triton calls
            self._declined[index] = f"Triton's driver cannot be started ({_first_line(error)})"
        return self._declined.get(index)

    def faster(self, op: str, index: int, dtype: torch.dtype) -> tuple[tuple[int, int], ...]:
        """The shapes in which an op's calls on a device are faster here than with compiled kernels, by a measurement on
        such a card (``_table.faster``). Asks nothing of Triton, which may be missing."""
        key = (op, index, dtype)
        found = self._faster.get(key)
        if found is None:
            try:
                found = _table.faster(IMAGES.get(op, op), dtype, capability(index))
            except (AssertionError, RuntimeError):  # a fake tensor of a card that is not here
                found = ()
            self._faster[key] = found
        return found

    def times(self, op: str, index: int, dtype: torch.dtype, channels: int, positions: int) -> str:
        """What was measured of both backends on such a card, in a few words, or none."""
        try:
            own = capability(index)
        except (AssertionError, RuntimeError):
            return ""
        words = []
        measured = _table.times(IMAGES.get(op, op), dtype, channels, positions, own)
        for name, each in zip(("forward", "backward"), measured, strict=False):
            words.append(f"{name} cuda {each['cuda']:g} us, triton {each['triton']:g} us")
        return f"measured on compute capability {version_of(own)}: {'; '.join(words)}" if words else ""

    def capability(self, index: int) -> int:
        """Of a device that has been served before; 0 under the interpreter."""
        return self._capabilities.get(index, 0)


def _first_line(error: Exception) -> str:
    return (str(error).strip().partition("\n")[0] or type(error).__name__).rstrip(".:")
