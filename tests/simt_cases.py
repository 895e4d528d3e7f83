"""Device code on the CPU: the driver library of csrc/simt, built with the host's compiler, and the backend `simt`."""

import ctypes
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import zipfile
from collections import namedtuple
from contextlib import contextmanager
from pathlib import Path

import torch

from m3em_fast import backends
from m3em_fast.backends import native
from m3em_fast.ops import _cuda
from m3em_fast.ops._cpu import DTYPES as NUMBERS
from op_cases import lay_out

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "build/simt"  # what has been built stays, under the name of its contents
ORDERS = {"forward": 0, "reverse": 1, "shuffled": 2}
GLOBAL, THREAD_LOCAL, RELAXED = range(3)  # capture modes
V100 = {"capability": 70, "shared": 96 << 10}

Called = namedtuple("Called", "name error thread device mode subject")


def compiler(flags):
    command = [os.environ.get("CXX", "g++"), "-std=c++17", *flags, "-g1", "-fPIC", "-fvisibility=hidden"]
    # Of two libraries in one process each has its own statics.
    return [*command, "-fno-gnu-unique", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]


def compiled(command, sources, *parts, output):
    """Makes `output` of parts, the names of files in simt/ or objects."""
    parts = [str(sources / "simt" / f"{part}.cpp") if part in LIBRARY else str(part) for part in parts]
    new = output.with_suffix(".new")
    command = [*command, f"-I{sources}/simt", f"-I{sources}", *parts, "-o", str(new)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    os.replace(new, output)


def place_of(sources, command, folder):
    """A folder that is of these sources and this command alone."""
    digest = hashlib.sha256(" ".join(command).encode())
    for path in sorted(p for name in ("cuda", "simt") for p in (sources / name).glob("*") if p.is_file()):
        digest.update(path.name.encode() + path.read_bytes())
    place = folder / digest.hexdigest()[:16]
    place.mkdir(parents=True, exist_ok=True)
    return place


def build(sources=ROOT / "csrc", flags=("-O1",), folder=FOLDER):
    """The library, made of the sources of a tree, once for the same sources."""
    command = [*compiler(flags), "-shared"]
    library = place_of(sources, command, folder) / "driver.so"
    with open(library.parent / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of two workers one compiles
        if not library.exists():
            archive(library.with_name("images.zip"))
            compiled(command, sources, *LIBRARY, output=library)
    return library


def with_fault(folder, op, path, right, wrong):
    """A library in which one place of a file is wrong for one op; what else it is made of is compiled once."""
    command = compiler(["-O0"])
    objects = place_of(ROOT / "csrc", command, FOLDER)
    others = [objects / f"{name}.o" for name in LIBRARY if name != op]
    with open(objects / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for missing in [other for other in others if not other.exists()]:
            compiled([*command, "-c"], ROOT / "csrc", missing.stem, output=missing)
    sources = shutil.copytree(ROOT / "csrc", folder / "csrc")
    text = (sources / path).read_text()
    assert text.count(right) == 1, f"{path} has {text.count(right)} places such as:\n{right}"
    (sources / path).write_text(text.replace(right, wrong))
    compiled([*command, "-shared"], sources, op, *others, output=folder / "faulty.so")
    return opened(folder, folder / "faulty.so")[0]


# The runner of kernels, the driver, and one file an op.
OPS = ("channel_gate", "consensus_map", "consensus_pool")
LIBRARY = ("simt", "kernels", "driver", *OPS)


def image(arch):
    """As much of a cubin or of PTX as tells for which card it is."""
    kind, number = arch.split("_")
    if kind == "compute":
        return f".version 8.0\n.target sm_{number}\n".encode()
    number, newer = int(number), int(number) >= 100
    flags = number << 8 if newer else number
    return b"\x7fELF\2\1\1\x33" + bytes([8 if newer else 7]) + bytes(39) + flags.to_bytes(4, "little") + bytes(12)


def archive(path, archs=("sm_70",), ops=OPS, **other):
    """A _cuda.zip with such images, and with other entries."""
    with zipfile.ZipFile(path, "w") as packed:
        for arch in archs:
            for op in ops:
                suffix = "cubin" if arch.startswith("sm_") else "ptx"
                packed.writestr(f"{arch}/{op}.{suffix}", image(arch))
        packed.writestr("index.json", json.dumps({"missing": other.pop("missing", {})}))
        for name, data in other.items():
            packed.writestr(name, data)
    return path


class Driver:
    """The functions of a library that are there for tests."""

    def __init__(self, library, devices=2, capability=70, shared=96 << 10):
        self.path = library
        self.library = ctypes.CDLL(str(library))
        self.library.simt_log.restype = ctypes.c_char_p
        self.library.simt_stream.restype = ctypes.c_void_p
        self.library.simt_devices(devices, capability, shared)

    def log(self):
        """Every call of the driver since the last time."""
        lines = self.library.simt_log().decode().splitlines()
        return [Called(name, int(e), int(t), d, int(m), s) for name, e, t, d, m, s in (x.split("\t") for x in lines)]

    def order(self, name):
        self.library.simt_order(ORDERS[name])

    def fail(self, name, error, after=0):
        self.library.simt_fail(name.encode(), error, after)

    def slow(self, microseconds):
        """Every call takes so long, and other threads come in between."""
        self.library.simt_slow(microseconds)

    def retained(self, device):
        return self.library.simt_retained(device)

    def stream(self, device):
        return self.library.simt_stream(device)

    def capture(self, stream, mode=GLOBAL):
        self.library.simt_capture(ctypes.c_void_p(stream), mode)

    def end_capture(self, stream):
        return self.library.simt_end_capture(ctypes.c_void_p(stream))

    def replay(self, stream):
        return self.library.simt_replay(ctypes.c_void_p(stream))

    def exchange_mode(self, mode):
        """Sets the capture mode of this thread and gives the one before."""
        value = ctypes.c_int(mode)
        assert self.library.cuThreadExchangeStreamCaptureMode(ctypes.byref(value)) == 0
        return value.value

    def current(self):
        """The context of this thread."""
        context = ctypes.c_void_p()
        assert self.library.cuCtxGetCurrent(ctypes.byref(context)) == 0
        return context.value


def opened(folder, library=None, archs=("sm_70",), **devices):
    """A library that nobody has used, with cards of its own behind the backend `simt`."""
    copy = shutil.copy(library or build(), folder / "driver.so")
    driver = Driver(copy, **devices)
    return driver, backends.simulate(copy, archive(folder / "images.zip", archs))


def launched(driver):
    """The names of the kernels since the last time that somebody asked for the log."""
    return [call.subject.split()[0] for call in driver.log() if call.name == "cuLaunchKernel"]


def form_of_consensus_map(call, *maps):
    """Which kernels serve a pass that reads and writes these maps: those for 7x7 and 14x14 take three scales of maps
    that are all contiguous or all channels_last, in packs of 16 bytes and nothing else."""
    first = maps[0]
    _, d, h, w = first.shape
    element = first.element_size()
    options = call.options.get("num_scales") or 3, call.options.get("center", False)
    fits = (h, w) in ((7, 7), (14, 14)) and options == (3, False) and element < 8 and d * h * w * element % 16 == 0
    rows, last = True, d * element % 16 == 0
    for t in maps:
        fits = fits and t.data_ptr() % 16 == 0 and t.stride(0) * element % 16 == 0
        rows = rows and t.stride()[1:] == (h * w, w, 1)
        _, channel, row, column = t.stride()
        last = last and channel == 1 and row == w * column and column * element % 16 == 0
    return f"{h}x{w}" if fits and (rows or last) else "any"


def forms_of_consensus_map(forward, backward):
    """Of its three kernels, from which serve its passes: chunks of 14x14 are put together by the kernel for any map."""
    return [forward, "any" if forward == "14x14" else forward, backward]


def forms(driver):
    """Of the kernels since the last time, one after the other."""
    return [name.rsplit("_", 1)[1] for name in launched(driver)]


def consensus_map_forward(a, b):
    """consensus_map's result and what its backward is left with: (N, cells, 3), the cells of the finest scale first."""
    n, d, h, w = shape = a.shape
    workspace, size, _ = native.cuda_consensus_map_needs(NUMBERS[a.dtype], d, h, w, 3, False)
    module, stream = _cuda.loaded("consensus_map", a)
    out, stats, partial = a.new_empty((n, 1, h, w)), torch.empty(n, size // 3, 3), torch.empty(n * workspace)
    ends = stats.data_ptr(), partial.data_ptr(), shape, 3, False, 1e-8
    native.cuda_consensus_map_forward(module, stream, a, b, out, *ends)
    return out, stats


def consensus_map_backward(a, b, grad, stats, layouts=("contiguous", "contiguous")):
    """Gradients in these layouts; None for one that is not wanted."""
    module, stream = _cuda.loaded("consensus_map", a)
    found = [layout and lay_out(torch.full(a.shape, torch.nan, dtype=a.dtype), layout) for layout in layouts]
    ends = stats.data_ptr(), a.shape, 3, False, 1e-8
    native.cuda_consensus_map_backward(module, stream, a, b, grad, *found, *ends)
    return found


def orders_that_catch(driver, run):
    """The orders of threads in which `run` fails."""
    caught = []
    for order in ORDERS:
        driver.order(order)
        try:
            run()
        except (native.DriverError, AssertionError):
            caught.append(order)
    return caught


_opened = {}


def simulated():
    """The library that all tests of the backend `simt` share, and its cards."""
    if not _opened:
        library = build()
        _opened["driver"] = Driver(library)
        _opened["cards"] = backends.simulate(library, library.with_name("images.zip"))
    backends.simulated = _opened["cards"]
    return _opened["driver"], _opened["cards"]


@contextmanager
def simt():
    """The backend `simt` with that library. Memory that nobody has written to is NaN."""
    driver, _ = simulated()
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with backends.backend("simt"):
            yield driver
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        driver.order("forward")
