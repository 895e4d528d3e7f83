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
from pathlib import Path

from m3em_fast import backends

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "build/simt"  # what has been built stays, under the name of its contents
ORDERS = {"forward": 0, "reverse": 1, "shuffled": 2}
GLOBAL, THREAD_LOCAL, RELAXED = range(3)  # capture modes
V100 = {"capability": 70, "shared": 96 << 10}

Called = namedtuple("Called", "name error thread device mode subject")


def build(sources=ROOT / "csrc", flags=("-O1",), folder=FOLDER):
    """The library, made of the sources of a tree, once for the same sources."""
    command = [os.environ.get("CXX", "g++"), "-std=c++17", *flags, "-g1", "-fPIC", "-shared", "-fvisibility=hidden"]
    # Of two libraries in one process each has its own statics.
    command += ["-fno-gnu-unique", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    digest = hashlib.sha256(" ".join(command).encode())
    for path in sorted(p for name in ("cuda", "simt") for p in (sources / name).glob("*") if p.is_file()):
        digest.update(path.name.encode() + path.read_bytes())
    library = folder / digest.hexdigest()[:16] / "driver.so"
    library.parent.mkdir(parents=True, exist_ok=True)
    with open(library.parent / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of two workers one compiles
        if not library.exists():
            new = library.with_suffix(".new")
            parts = [str(sources / "simt" / f"{name}.cpp") for name in LIBRARY]
            command += [f"-I{sources}/simt", f"-I{sources}", *parts, "-o", str(new)]
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            archive(library.with_name("images.zip"))
            os.replace(new, library)
    return library


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


_opened = {}


def simulated():
    """The library that all tests of the backend `simt` share, and its cards."""
    if not _opened:
        library = build()
        _opened["driver"] = Driver(library)
        _opened["cards"] = backends.simulate(library, library.with_name("images.zip"))
    backends.simulated = _opened["cards"]
    return _opened["driver"], _opened["cards"]
