"""NVRTC, NVIDIA's compiler as a library: device code to cubins and PTX, with neither nvcc nor a card, kept on disk.

Two users: the build (csrc/cuda/compile.py), which loads this file by its path, and run-time compilation on a machine
for whose card nothing is packed. So nothing but the standard library is imported here.

M3EM_NVRTC names the library, M3EM_CUDA_INCLUDE the folder of CUDA's headers, M3EM_CACHE the folder of results.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

# No fast-math of any kind: the tests hold kernels to exact divisions, square roots and subnormal numbers.
# Functions without a word of where they run, lambdas above all, run on the card.
OPTIONS = ("-std=c++17", "--device-as-default-execution-space", "--ptxas-options=-v")
# Wheels of CUDA 12 and 13, and torch's own folder in its older packages.
WHEELS = ("nvidia/cuda_nvrtc/lib", "nvidia/cu13/lib", "torch/lib")
PATTERN = re.compile(r"libnvrtc(?!-builtins)(?!.*\.alt\.)[\w.-]*\.so(\.[\d.]+)?|nvrtc64_\w+\.dll")
HEADER = "cuda_fp16.h"
# Half types are all that kernels take from CUDA's headers.
HALVES = (HEADER, "cuda_fp16.hpp", "cuda_bf16.h", "cuda_bf16.hpp")
INSTALL = "pip install nvidia-cuda-nvrtc-cu12 nvidia-cuda-runtime-cu12"
KEPT = 512  # results in the cache; one of a developer's day is soon replaced by the next


class Missing(Exception):
    """There is no NVRTC that can be used. The message is one sentence for the user."""


class Failed(Exception):
    """Device code does not compile. The message names the file and the architecture and holds the compiler's log."""


class Compiled(NamedTuple):
    """A cubin or PTX, and what the compiler said: with a cubin, the registers and spills of every kernel."""

    image: bytes
    log: str


def find() -> Nvrtc:
    """The NVRTC named by M3EM_NVRTC; else that of the installed packages, of CUDA 12 before 13, which knows no sm_70;
    else the system's.

    Raises :class:`Missing`, with a sentence that says how to get one.
    """
    if named := os.environ.get("M3EM_NVRTC", "").strip():
        return Nvrtc(Path(named).expanduser())
    problems: list[str] = []
    for path in _libraries():
        try:
            return Nvrtc(path)
        except Missing as missing:
            # That the system has none is no problem; that one is there and does not load is.
            if path.is_absolute() or "cannot be loaded" not in str(missing):
                problems.append(str(missing))
    raise Missing(problems[0] if problems else f"There is no NVRTC ({INSTALL}).")


def _packages(folder: str) -> Iterator[Path]:
    for entry in dict.fromkeys(sys.path):
        if (found := Path(entry or ".").resolve() / folder).is_dir():
            yield found


def _toolkits() -> list[Path]:
    named = [os.environ.get(name, "").strip() for name in ("CUDA_HOME", "CUDA_PATH")]
    return [Path(name) for name in (*named, "/usr/local/cuda") if name]


def _libraries() -> Iterator[Path]:
    for wheel in WHEELS:
        for folder in _packages(wheel):
            yield from sorted(path for path in folder.iterdir() if PATTERN.fullmatch(path.name))
    for name in ("libnvrtc.so.12", "libnvrtc.so.13", "libnvrtc.so"):
        yield Path(name)  # without a folder it is the system's loader that looks
        yield from (toolkit / "lib64" / name for toolkit in _toolkits() if (toolkit / "lib64" / name).is_file())


def _header_version(folder: Path) -> int:
    """The major version of CUDA's headers in a folder, 0 where there are none."""
    if not (folder / HEADER).is_file():
        return 0
    with suppress(OSError):
        if found := re.search(r"#define\s+CUDA_VERSION\s+(\d+)", (folder / "cuda.h").read_text(errors="replace")):
            return int(found[1]) // 1000
    return 0


def _find_headers(library: Path, version: tuple[int, int]) -> Path:
    if named := os.environ.get("M3EM_CUDA_INCLUDE", "").strip():
        if (Path(named) / HEADER).is_file():
            return Path(named)
        raise Missing(f"M3EM_CUDA_INCLUDE, {named}, is not the folder of CUDA's headers: {HEADER} is not in it.")
    home = library.parent.parent if library.is_absolute() else Path("/usr")
    folders = [home / "include", home.parent / "cuda_runtime/include", *_packages("nvidia/cuda_runtime/include")]
    folders += [*_packages("nvidia/cu13/include"), *(toolkit / "include" for toolkit in _toolkits())]
    for folder in folders:
        # Those of another major version need not compile.
        if _header_version(folder) == version[0]:
            return folder
    package = "nvidia-cuda-runtime-cu12" if version[0] == 12 else "nvidia-cuda-runtime"
    major, minor = version
    raise Missing(
        f"NVRTC {major}.{minor} is there and CUDA's headers of version {major} are not (pip install {package})."
    )


class Nvrtc:
    """One loaded NVRTC with the headers of its version. Raises :class:`Missing` where either cannot be used."""

    def __init__(self, path: Path) -> None:
        try:
            if path.parent != Path("."):
                # NVRTC opens it by its bare name, which the loader then knows.
                for builtins in path.parent.glob("libnvrtc-builtins.so.*"):
                    ctypes.CDLL(str(builtins))
            self._library = ctypes.CDLL(str(path))
            for name in ("nvrtcGetSupportedArchs", "nvrtcGetCUBIN"):
                getattr(self._library, name)
        except (OSError, AttributeError) as error:
            raise Missing(f"NVRTC cannot be loaded from {path} ({error}).") from None
        self._library.nvrtcGetErrorString.restype = ctypes.c_char_p
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._check(self._library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)))
        self.version: tuple[int, int] = (major.value, minor.value)
        self.path = path
        self.include = _find_headers(path, self.version)
        # Two releases can share a version; what compiles differently differs in size, and so may the half types.
        parts = [f"{path.stat().st_size if path.is_file() else 0}".encode()]
        parts += [(self.include / name).read_bytes() for name in HALVES if (self.include / name).is_file()]
        self.identity = f"{self.name} {hashlib.sha256(b' '.join(parts)).hexdigest()}"

    @property
    def name(self) -> str:
        return f"{self.version[0]}.{self.version[1]}"

    def _check(self, status: int) -> None:
        if status:
            raise Missing(f"NVRTC does not work ({self._library.nvrtcGetErrorString(status).decode()}).")

    def architectures(self) -> list[int]:
        """The compute capabilities that this NVRTC compiles for, as 70 for 7.0."""
        count = ctypes.c_int()
        self._check(self._library.nvrtcGetNumSupportedArchs(ctypes.byref(count)))
        found = (ctypes.c_int * count.value)()
        self._check(self._library.nvrtcGetSupportedArchs(found))
        return list(found)

    def compile(self, source: str, name: str, arch: str, headers: Mapping[str, str]) -> Compiled:
        """A source to a cubin (``arch`` = "sm_70") or to PTX ("compute_80").

        ``headers`` are our own, under the names that the source includes; ``name`` is what messages call the source.
        Raises :class:`Failed`.
        """
        library, program, count = self._library, ctypes.c_void_p(), len(headers)
        texts = (ctypes.c_char_p * count)(*(text.encode() for text in headers.values()))
        names = (ctypes.c_char_p * count)(*(each.encode() for each in headers))
        made = library.nvrtcCreateProgram(
            ctypes.byref(program), source.encode(), name.encode(), ctypes.c_int(count), texts, names
        )
        self._check(made)
        try:
            words = [f"--gpu-architecture={arch}", *OPTIONS, f"-I{self.include}"]
            options = (ctypes.c_char_p * len(words))(*(os.fsencode(word) for word in words))
            status = library.nvrtcCompileProgram(program, ctypes.c_int(len(words)), options)
            log = self._read(program, "ProgramLog").rstrip(b"\0").decode(errors="replace")
            if status:
                what = library.nvrtcGetErrorString(status).decode()
                raise Failed(f"{name} does not compile for {arch} (NVRTC {self.name}: {what}):\n{log.rstrip()}")
            kind = "CUBIN" if arch.startswith("sm_") else "PTX"
            image = self._read(program, kind)
            return Compiled(image.rstrip(b"\0") if kind == "PTX" else image, log)
        finally:
            library.nvrtcDestroyProgram(ctypes.byref(program))

    def _read(self, program: ctypes.c_void_p, what: str) -> bytes:
        size = ctypes.c_size_t()
        self._check(getattr(self._library, f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
        text = ctypes.create_string_buffer(size.value)
        self._check(getattr(self._library, f"nvrtcGet{what}")(program, text))
        return text.raw


def needed(source: str, headers: Mapping[str, str]) -> dict[str, str]:
    """Those of our own headers that a source includes, directly or not, by name."""
    found: dict[str, str] = {}
    texts = [source]
    while texts:
        for name in re.findall(r'^\s*#\s*include\s+"([^"]+)"', texts.pop(), re.MULTILINE):
            if name in headers and name not in found:
                found[name] = headers[name]
                texts.append(headers[name])
    return dict(sorted(found.items()))


def cache_folder() -> Path:
    """$M3EM_CACHE, else m3em_fast in $XDG_CACHE_HOME, else in ~/.cache."""
    if named := os.environ.get("M3EM_CACHE", "").strip():
        return Path(named)
    if named := os.environ.get("XDG_CACHE_HOME", "").strip():
        return Path(named) / "m3em_fast"
    return Path(os.path.expanduser("~/.cache/m3em_fast"))


def cache_problem() -> str | None:
    """One sentence where nothing can be kept in the cache, else None."""
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return None
    except OSError as error:
        return (
            f"Compiled device code cannot be kept in {folder} ({error.strerror or error}); the next time takes as long."
        )


_said: set[str] = set()


def _say_once(line: str) -> None:
    if line not in _said:
        _said.add(line)
        print(f"m3em_fast: {line}", file=sys.stderr, flush=True)


def cached(
    nvrtc: Any,
    source: str,
    name: str,
    arch: str,
    headers: Mapping[str, str],
    say: Callable[[str], None] = _say_once,
) -> Compiled:
    """``nvrtc.compile(...)``, or what it gave for the same contents before. Headers that the source does not include
    count for nothing. Where the cache cannot be written, ``say`` gets one sentence, and nothing else is lost.
    """
    headers = needed(source, headers)
    key = json.dumps([source, headers, OPTIONS, arch, nvrtc.identity])
    # Not the name: it stands in warnings alone, and the build and run-time compilation call a file differently.
    path = cache_folder() / f"{hashlib.sha256(key.encode()).hexdigest()}.{arch}"
    if (kept := _load(path)) is not None:
        return kept
    made = nvrtc.compile(source, name, arch, headers)
    if not _store(path, made) and (problem := cache_problem()):
        say(problem)
    return made


def _load(path: Path) -> Compiled | None:
    """A kept result; None where there is none, and where it is not what was stored."""
    try:
        checksum, _, rest = path.read_bytes().partition(b"\n")
        if checksum.decode("ascii", "replace") != hashlib.sha256(rest).hexdigest():
            return None
        log, _, image = rest.partition(b"\n")
        with suppress(OSError):
            os.utime(path)
        return Compiled(image, json.loads(log))
    except OSError:
        return None


def _store(path: Path, made: Compiled) -> bool:
    rest = json.dumps(made.log).encode() + b"\n" + made.image
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".new")
        try:
            with open(handle, "wb") as file:
                file.write(hashlib.sha256(rest).hexdigest().encode() + b"\n" + rest)
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
        # The ones that nobody has asked for the longest go.
        for old in sorted(path.parent.glob("*.*"), key=lambda each: each.stat().st_mtime)[:-KEPT]:
            old.unlink(missing_ok=True)
    except OSError:
        return False
    return True
