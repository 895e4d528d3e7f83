"""What the host's half of an op launches on a card, without one: the sources of csrc/cuda call a driver of a few lines,
which tells with which grid, shared memory and arguments.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shlex
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from m3em_fast import nvrtc

__all__ = ["Failed", "Host", "Launch"]

# The driver: tells what it is to launch. Then the ops by plain names; an error is a sentence.
PROGRAM = """
#include "cuda/ops.h"
#include <cstdio>
namespace m3em {
using Seen = void (*)(const char *, long long, int, long long, const void *);
static Seen seen;
struct DriverFunctions {};
Module::Module(std::shared_ptr<Driver> of, int device, const std::string &) : driver(std::move(of)), index(device) {}
void Module::launch(const Launch &l) {
    const KernelName &k = l.kernel;
    const std::string name = std::string(k.op) + "_" + k.stage + "_" + k.dtype + "_" + k.form;
    if (l.blocks)
        seen(name.c_str(), l.blocks, l.threads, l.shared, l.arguments);
}
template <class Body>
const char *guarded(Seen by, const Body &body) {
    static char said[512];
    try {
        Module module(nullptr, 0, "");
        seen = by;
        body(module);
        return nullptr;
    } catch (const std::exception &error) {
        std::snprintf(said, sizeof(said), "%s", error.what());
        return said;
    }
}
} // namespace m3em
using namespace m3em;
#define M3EM_CALL(name, Type, ...)                                                              \\
    extern "C" const char *name(Seen by, const Type *of, void *workspace) {                     \\
        (void)workspace;                                                                        \\
        return guarded(by, [&](Module &m) { cuda::name(m, nullptr, *of, ##__VA_ARGS__); });     \\
    }
"""
CALLS = {
    "channel_gate": """
M3EM_CALL(channel_gate_forward, ChannelGate)
M3EM_CALL(channel_gate_backward, ChannelGate)
""",
    "consensus_map": """
M3EM_CALL(consensus_map_forward, ConsensusMap, workspace)
M3EM_CALL(consensus_map_backward, ConsensusMap)
extern "C" void consensus_map_needs(int dtype, const ConsensusMap *of, long long *numbers) {
    const auto needs = cuda::consensus_map_needs(static_cast<Dtype>(dtype), *of);
    numbers[0] = needs.workspace, numbers[1] = needs.stats;
}
""",
    "consensus_pool": """
M3EM_CALL(consensus_pool_forward, ConsensusPool)
M3EM_CALL(consensus_pool_backward, ConsensusPool, workspace)
extern "C" void consensus_pool_needs(int dtype, const ConsensusPool *of, long long *numbers) {
    numbers[0] = cuda::consensus_pool_workspace(static_cast<Dtype>(dtype), *of);
}
""",
}
DTYPES = {torch.float64: 0, torch.float32: 1, torch.float16: 2, torch.bfloat16: 3}


class Failed(Exception):
    """The host's half cannot be asked, or refuses a call. The message is for the user."""


class Launch(NamedTuple):
    """As the driver gets it. The arguments are as many bytes as the kernel takes, at an address."""

    kernel: str
    blocks: int
    threads: int
    shared: int  # bytes of a block
    arguments: int


# csrc/cpu/kernels.h
class _Tensor(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("dtype", ctypes.c_int), ("stride", ctypes.c_int64 * 4)]


class _ConsensusMap(ctypes.Structure):
    _fields_ = [
        *((name, _Tensor) for name in ("a", "b", "out", "grad_out", "grad_a", "grad_b")),
        ("stats", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in "ndhw"),
        ("num_scales", ctypes.c_int),
        ("center", ctypes.c_bool),
        ("eps", ctypes.c_double),
        ("threads", ctypes.c_int),
    ]


class _ChannelGate(ctypes.Structure):
    _fields_ = [
        ("x", _Tensor),
        ("gates", ctypes.POINTER(_Tensor)),
        *((name, _Tensor) for name in ("out", "grad_out", "grad_x")),
        ("grad_gates", ctypes.POINTER(_Tensor)),
        ("num_gates", ctypes.c_int),
        *((name, ctypes.c_int64) for name in "nchw"),
        ("threads", ctypes.c_int),
    ]


class _ConsensusPool(ctypes.Structure):
    _fields_ = [
        *((name, _Tensor) for name in ("x", "cmap", "out", "grad_out", "grad_x", "grad_cmap")),
        *((name, ctypes.c_int64) for name in "nchw"),
        ("threads", ctypes.c_int),
    ]


def _tensor(t: Tensor | None) -> _Tensor:
    if t is None:
        return _Tensor(None, 1, (0, 0, 0, 0))
    return _Tensor(t.data_ptr(), DTYPES[t.dtype], (*t.stride(), *[0] * (4 - t.dim())))


def _tensors(given: Sequence[Tensor | None]) -> Any:
    return (_Tensor * max(1, len(given)))(*map(_tensor, given))


_SEEN = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_longlong, ctypes.c_int, ctypes.c_longlong, ctypes.c_void_p)
Run = Callable[[Launch], None]  # what is done for each launch, in its order


class Host:
    """The host's half of the ops of a tree `csrc`, compiled once for the same sources. Raises :class:`Failed`.

    Tensors are those of this process; the calls have the arguments of the ops and hand every launch to `run`, while its
    arguments are in memory.
    """

    def __init__(self, csrc: Path) -> None:
        self._csrc = csrc
        self._libraries: dict[str, ctypes.CDLL] = {}

    def _library(self, op: str) -> ctypes.CDLL:
        if op not in self._libraries:
            self._libraries[op] = ctypes.CDLL(str(_built(self._csrc, op)))
        return self._libraries[op]

    def _call(self, name: str, run: Run, given: ctypes.Structure, workspace: Tensor | None = None) -> None:
        raised: list[BaseException] = []

        def seen(kernel: bytes, blocks: int, threads: int, shared: int, arguments: int) -> None:
            try:
                if not raised:
                    run(Launch(kernel.decode(), blocks, threads, shared, arguments))
            except BaseException as error:  # ctypes would print it and go on
                raised.append(error)

        function = getattr(self._library(name.rpartition("_")[0]), name)
        function.restype = ctypes.c_char_p
        at = ctypes.c_void_p(workspace.data_ptr() if workspace is not None else None)
        said = function(_SEEN(seen), ctypes.byref(given), at)
        if raised:
            raise raised[0]
        if said is not None:
            raise Failed(said.decode())

    def channel_gate_forward(self, run: Run, x: Tensor, gates: Sequence[Tensor], out: Tensor) -> None:
        given = _ChannelGate(_tensor(x), _tensors(gates), _tensor(out), num_gates=len(gates))
        given.n, given.c, given.h, given.w = x.shape
        self._call("channel_gate_forward", run, given)

    def channel_gate_backward(
        self,
        run: Run,
        x: Tensor,
        gates: Sequence[Tensor],
        grad_out: Tensor,
        grad_x: Tensor | None,
        grad_gates: Sequence[Tensor | None],
    ) -> None:
        given = _ChannelGate(_tensor(x), _tensors(gates), num_gates=len(gates))
        given.grad_out, given.grad_x, given.grad_gates = _tensor(grad_out), _tensor(grad_x), _tensors(grad_gates)
        given.n, given.c, given.h, given.w = x.shape
        self._call("channel_gate_backward", run, given)

    def _consensus_map(self, a: Tensor, b: Tensor, stats: Tensor | None, scales: int, center: bool) -> _ConsensusMap:
        given = _ConsensusMap(_tensor(a), _tensor(b), num_scales=scales, center=center, eps=1e-8)
        given.stats = None if stats is None else stats.data_ptr()
        given.n, given.d, given.h, given.w = a.shape
        return given

    def consensus_map_needs(self, a: Tensor, scales: int = 3, center: bool = False) -> tuple[int, int]:
        """Numbers of the workspace and of the statistics, for every sample."""
        numbers = (ctypes.c_longlong * 2)()
        given = self._consensus_map(a, a, None, scales, center)
        self._library("consensus_map").consensus_map_needs(DTYPES[a.dtype], ctypes.byref(given), numbers)
        return numbers[0], numbers[1]

    def consensus_map_forward(
        self,
        run: Run,
        a: Tensor,
        b: Tensor,
        out: Tensor,
        stats: Tensor | None,
        workspace: Tensor,
        scales: int = 3,
        center: bool = False,
    ) -> None:
        given = self._consensus_map(a, b, stats, scales, center)
        given.out = _tensor(out)
        self._call("consensus_map_forward", run, given, workspace)

    def consensus_map_backward(
        self,
        run: Run,
        a: Tensor,
        b: Tensor,
        grad_out: Tensor,
        grad_a: Tensor | None,
        grad_b: Tensor | None,
        stats: Tensor,
        scales: int = 3,
        center: bool = False,
    ) -> None:
        given = self._consensus_map(a, b, stats, scales, center)
        given.grad_out, given.grad_a, given.grad_b = _tensor(grad_out), _tensor(grad_a), _tensor(grad_b)
        self._call("consensus_map_backward", run, given)

    def consensus_pool_workspace(self, x: Tensor) -> int:
        """Numbers of the workspace for every sample."""
        given = _ConsensusPool(_tensor(x))
        given.n, given.c, given.h, given.w = x.shape
        number = ctypes.c_longlong()
        self._library("consensus_pool").consensus_pool_needs(DTYPES[x.dtype], ctypes.byref(given), ctypes.byref(number))
        return number.value

    def consensus_pool_forward(self, run: Run, x: Tensor, cmap: Tensor | None, out: Tensor) -> None:
        given = _ConsensusPool(_tensor(x), _tensor(cmap), _tensor(out))
        given.n, given.c, given.h, given.w = x.shape
        self._call("consensus_pool_forward", run, given)

    def consensus_pool_backward(
        self,
        run: Run,
        x: Tensor,
        cmap: Tensor | None,
        grad_out: Tensor,
        grad_x: Tensor | None,
        grad_cmap: Tensor | None,
        workspace: Tensor | None,
    ) -> None:
        given = _ConsensusPool(_tensor(x), _tensor(cmap), grad_out=_tensor(grad_out))
        given.grad_x, given.grad_cmap = _tensor(grad_x), _tensor(grad_cmap)
        given.n, given.c, given.h, given.w = x.shape
        self._call("consensus_pool_backward", run, given, workspace)


def _built(csrc: Path, op: str) -> Path:
    command = [*shlex.split(os.environ.get("CXX") or "g++"), "-std=c++17", "-O1", "-fPIC", "-shared", f"-I{csrc}"]
    text = PROGRAM + CALLS[op]
    digest = hashlib.sha256(" ".join(command).encode() + text.encode())
    needed = [*csrc.glob("cuda/*.h"), *csrc.glob("cuda/*.cuh"), csrc / "cpu/kernels.h", csrc / f"cuda/{op}.cpp"]
    for path in sorted(needed):
        digest.update(path.name.encode() + path.read_bytes())
    library = nvrtc.cache_folder() / f"{op}-{digest.hexdigest()}.so"
    if library.exists():
        return library
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        program, new = Path(folder) / "program.cpp", Path(folder) / "host.so"
        program.write_text(text)
        try:
            parts = [str(program), str(csrc / f"cuda/{op}.cpp"), "-o", str(new)]
            done = subprocess.run([*command, *parts], text=True, capture_output=True)
        except OSError as error:
            raise Failed(f"The host's half cannot be compiled without a C++ compiler ({error}).") from None
        if done.returncode:
            raise Failed(f"The host's half of {op} in {csrc} does not compile:\n{done.stderr}")
        os.replace(new, library)
    return library
