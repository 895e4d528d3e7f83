"""Device code on the CPU: builds csrc/simt with the host's compiler and calls consensus_map's kernels through it."""

import ctypes
import os
import subprocess
from pathlib import Path

import torch

from m3em_fast.ops._cpu import DTYPES

ROOT = Path(__file__).resolve().parents[1]
ORDERS = {"forward": 0, "reverse": 1, "shuffled": 2}


class Map(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("stride", ctypes.c_longlong * 4)]


class Arguments(ctypes.Structure):
    """``ConsensusMapArguments`` of csrc/cuda/consensus_map.cuh."""

    _fields_ = [
        *((name, Map) for name in ("a", "b", "out", "grad_out", "grad_a", "grad_b")),
        ("partial", ctypes.c_void_p),
        ("stats", ctypes.c_void_p),
        ("eps", ctypes.c_double),
        *((name, ctypes.c_int) for name in ("n", "d", "h", "w", "scales", "center", "chunk", "chunks", "tile")),
    ]


def build(folder, sources=ROOT / "csrc", flags=("-O1",)):
    """The library, made of the sources of a tree."""
    library = folder / "simt.so"
    command = [os.environ.get("CXX", "g++"), "-std=c++17", *flags, "-g1", "-fPIC", "-shared", "-fvisibility=hidden"]
    command += ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", f"-I{sources}/simt", f"-I{sources}"]
    command += [f"{sources}/simt/simt.cpp", f"{sources}/simt/consensus_map.cpp", "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loaded = ctypes.CDLL(str(library))
    loaded.simt_consensus_map.restype = ctypes.c_char_p
    return loaded


class Failed(Exception):
    """What no card forgives."""


def as_map(tensor):
    if tensor is None:
        return Map(None, (ctypes.c_longlong * 4)())
    return Map(tensor.data_ptr(), (ctypes.c_longlong * 4)(*tensor.stride()))


def nan_beside(tensor):
    """Memory full of NaN in the memory format of a tensor."""
    last = tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()
    made = torch.full(tuple(tensor.shape), torch.nan, dtype=tensor.dtype)
    return made.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def consensus_map(library, a, b, grad, scales, center=False, *, eps=1e-8, general=False, order="forward", needs="ab"):
    """The result and the gradients by a and b."""
    n, d, h, w = a.shape
    out = torch.full((n, 1, h, w), torch.nan, dtype=a.dtype)
    grads = [nan_beside(t) if name in needs else None for name, t in (("a", a), ("b", b))]
    given = Arguments(a=as_map(a), b=as_map(b), out=as_map(out), grad_out=as_map(grad))
    given.grad_a, given.grad_b = map(as_map, grads)
    given.n, given.d, given.h, given.w, given.scales, given.center, given.eps = n, d, h, w, scales, center, eps
    sizes = (ctypes.c_longlong * 2)()
    library.simt_consensus_map_sizes(ctypes.byref(given), DTYPES[a.dtype], sizes)
    accumulation = torch.float64 if a.dtype == torch.float64 else torch.float32
    partial = torch.full((max(1, sizes[0]),), torch.nan, dtype=accumulation)
    stats = torch.full((n, sizes[1]), torch.nan, dtype=accumulation)
    given.partial, given.stats = partial.data_ptr(), stats.data_ptr()
    for backward in (0, 1):
        error = library.simt_consensus_map(ctypes.byref(given), DTYPES[a.dtype], backward, int(general), ORDERS[order])
        if error is not None:
            raise Failed(error.decode())
    return out, *grads
