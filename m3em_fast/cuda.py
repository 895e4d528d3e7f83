"""Which compiled kernels a card runs, and why a card cannot be served.

Kernels come from ``_cuda.zip`` beside this file, which the build fills: cubins for some architectures, PTX for newer
ones, and the sources. Where the driver rejects what is packed, or nothing is packed for the card, the sources are
compiled here with the NVRTC that torch carries; the results stay on disk (``nvrtc.py``).
"""

from __future__ import annotations

import json
import re
import threading
import zipfile
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from m3em_fast import nvrtc

LIBRARY = "libcuda.so.1"
OLDEST = 70
# Ops without device code of their own -> whose they use.
IMAGES = {"gated_consensus_pool": "consensus_pool", "gated_projection": "channel_gate"}
ARCHIVE = Path(__file__).with_name("_cuda.zip")


class Declined(Exception):
    """A card has no kernels of an op. The message says why."""


def version_of(capability: int) -> str:
    return f"{capability // 10}.{capability % 10}"


def image_for(names: Iterable[str], op: str, capability: int) -> str | None:
    """The entry of the archive that a card (70 for 7.0) is to run: the cubin of its own generation for the highest
    minor version up to its own, else the newest PTX that is not newer than the card."""
    cubins, ptx = {}, {}
    for name in names:
        if found := re.fullmatch(rf"(?:sm_(\d+)/{op}\.cubin)|(?:compute_(\d+)/{op}\.ptx)", name):
            cubin, virtual = found.groups()
            if cubin and int(cubin) // 10 == capability // 10 and int(cubin) <= capability:
                cubins[int(cubin)] = name
            elif virtual and int(virtual) <= capability:
                ptx[int(virtual)] = name
    chosen = cubins or ptx
    return chosen[max(chosen)] if chosen else None


class Cards:
    """The devices of one driver library, and what is loaded on them.

    ``modules`` maps (op, device index) to a loaded image; an entry is made once, under a lock, and read without.
    """

    def __init__(self, native: Any, library: str = LIBRARY, archive: Path = ARCHIVE) -> None:
        self.native, self.library, self.archive = native, library, archive
        self.modules: dict[tuple[str, int], Any] = {}
        self._declined: dict[tuple[str, int], str] = {}
        self._lock = threading.RLock()
        self._driver: Any = None
        self._unavailable: str | None = ""  # not asked yet

    def unavailable(self) -> str | None:
        """Why no device can be served at all; None where one may. Starts no driver, so the process may still fork."""
        if self._unavailable == "":
            self._unavailable = self._find_driver()
        return self._unavailable

    def _find_driver(self) -> str | None:
        try:
            self._driver = self.native.Driver(self.library)
        except self.native.DriverError as error:
            return str(error)
        return self._without_devices()

    def _without_devices(self) -> str | None:
        if torch.version.cuda is None:
            return "this PyTorch is built without CUDA"
        return None if torch.cuda.device_count() else "there is no CUDA device"

    def place(self, tensor: torch.Tensor) -> int:
        """The index of the device that a tensor is on."""
        return tensor.get_device()

    def stream(self, index: int) -> int:
        """The handle of torch's current stream on a device."""
        return torch._C._cuda_getCurrentRawStream(index)

    def shared_memory(self, index: int) -> int:
        """The bytes of shared memory that a block may have."""
        return self._driver.shared_memory(index)

    def refusal(self, op: str, index: int) -> str | None:
        """Why the kernels of an op cannot run on a device; None where they are loaded, which this does if need be. What
        has failed for good is not tried again."""
        op = IMAGES.get(op, op)
        if (op, index) in self.modules:
            return None
        with self._lock:
            if (op, index) in self.modules:
                return None
            reason = self._declined.get((op, index)) or self.unavailable()
            if reason is not None:
                return reason
            try:
                self.modules[op, index] = self._load(op, index)
            except Declined as error:
                self._declined[op, index] = str(error)
                return str(error)
            except self.native.DriverError as error:
                return str(error)
        return None

    def _load(self, op: str, index: int) -> Any:
        capability = self._driver.capability(index)
        if capability < OLDEST:
            oldest = f"{version_of(OLDEST)}, the oldest that is served"
            raise Declined(f"compute capability {version_of(capability)} is older than {oldest}")
        load = partial(self.native.Module, self._driver, index)
        try:
            with zipfile.ZipFile(self.archive) as packed:
                name = image_for(packed.namelist(), op, capability)
                image = None if name is None else packed.read(name)
                sources = {n: packed.read(n).decode() for n in packed.namelist() if n.startswith("source/")}
                missing = json.loads(packed.read("index.json")).get("missing", {})
        except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
            raise Declined(f"the compiled kernels cannot be read from {self.archive.name} ({error})") from None
        if image is None:
            reason = f"no kernels of {op} for compute capability {version_of(capability)} are packed"
            if why := missing.get(f"sm_{capability}"):
                reason += f" ({why.rstrip('.')})"
        else:
            try:
                return load(image)
            except self.native.ImageRejected as error:
                reason = f"the driver rejects {name} ({str(error).rstrip('.')})"
        try:
            return load(self._compile(op, capability, sources))
        except (nvrtc.Missing, nvrtc.Failed, self.native.ImageRejected) as error:
            first = str(error).partition("\n")[0].rstrip(".:")
            raise Declined(f"{reason}, and compiling them here failed: {first}") from None

    @staticmethod
    def _compile(op: str, capability: int, sources: dict[str, str]) -> bytes:
        compiler = nvrtc.find()
        able = [each for each in compiler.architectures() if each <= capability]
        if not able or f"source/cuda/{op}.cu" not in sources:
            what = (
                f"code for compute capability {version_of(capability)}" if not able else f"{op}, whose source is gone"
            )
            raise nvrtc.Missing(f"NVRTC {compiler.name} cannot make {what}")
        # PTX for what the compiler does not know yet: the driver does the rest.
        arch = f"sm_{capability}" if capability in able else f"compute_{max(able)}"
        headers = {name.removeprefix("source/"): text for name, text in sources.items()}
        source = headers.pop(f"cuda/{op}.cu")
        return nvrtc.cached(compiler, source, f"{op}.cu", arch, headers).image


class Simulated(Cards):
    """A driver library without cards, that tests build (csrc/simt): it computes on CPU tensors.

    ``device`` and ``current`` (a stream) are what every call is made with.
    """

    def __init__(self, native: Any, library: str, archive: Path) -> None:
        super().__init__(native, library, archive)
        self.device, self.current = 0, 0

    def _without_devices(self) -> str | None:
        return None

    def place(self, tensor: torch.Tensor) -> int:
        return self.device

    def stream(self, index: int) -> int:
        return self.current
