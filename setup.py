"""Builds csrc/ into the extension module m3em_fast._C and the archive of device code m3em_fast/_cuda.zip.

Needs a C++17 compiler and Python's headers, and neither torch nor a CUDA toolkit: NVRTC, a Python package, compiles
device code. setuptools knows no headers, no flags per file and no parallel compilation, so this writes a build.ninja
and lets ninja run the compilers.

    python setup.py build_ext --inplace     compiles what has changed, for a checkout
    pip install .                           the same through an isolated build

CXX, CXXFLAGS and LDFLAGS are honoured, and M3EM_CUDA_ARCHS (csrc/cuda/compile.py). Where a tool is missing the package
is built without the extension or without compiled device code, and one line says so; an error in our own sources fails.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
# Every file of csrc/cpu but the dispatch is compiled once for each of these, and one is chosen at run time.
ISAS = {
    "plain": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mf16c"],
}
if platform.machine().lower() not in ("x86_64", "amd64"):
    ISAS = {"plain": []}
FOLDERS = ("csrc", "csrc/cpu", "csrc/cuda")
SOURCES = sorted(p.relative_to(ROOT).as_posix() for d in FOLDERS for p in (ROOT / d).glob("*.cpp"))
HEADERS = sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "csrc").rglob("*.h"))
CFLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-DNDEBUG", "-Wall", "-Wextra"]
# --as-needed: csrc/openmp.cpp defines what g++'s code calls of OpenMP, so that libgomp is not needed. -z now: all of it
# is then found in one library, even if another one is loaded between two calls.
SHARED = ["-shared", "-Wl,--as-needed,-z,now"]
if sys.platform == "darwin":
    SHARED = ["-bundle", "-undefined", "dynamic_lookup"]
# pip hides what a build prints, so why there is no extension is also left where m3em_fast.env finds it.
NOTE = "_C_missing.txt"
ARCHIVE = "_cuda.zip"
DEVICE_SCRIPT = "csrc/cuda/compile.py"
COST = "m3em_fast is built without its compiled kernels: every op works, in plain PyTorch, which is slower."


class Missing(Exception):
    """A tool that the build needs is not there. The message is one sentence for the user."""


def device_code() -> Any:
    """csrc/cuda/compile.py, which ninja runs as well."""
    spec = importlib.util.spec_from_file_location("_m3em_compile", ROOT / DEVICE_SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def find_compiler() -> list[str]:
    if sys.platform == "win32":
        raise Missing("The C++ build supports Linux and macOS only.")
    if chosen := os.environ.get("CXX", "").strip():
        # No second guess: whoever names a compiler wants that one or a word about it.
        if shutil.which(shlex.split(chosen)[0]):
            return shlex.split(chosen)
        raise Missing(f"The C++ compiler named by CXX, {chosen}, is not there (on Debian: apt install g++).")
    for name in (sysconfig.get_config_var("CXX"), "g++", "c++", "clang++"):
        if name and shutil.which(shlex.split(name)[0]):
            return shlex.split(name)
    raise Missing("There is no C++ compiler (on Debian: apt install g++).")


def find_python_headers() -> str:
    include = sysconfig.get_path("include")
    if not (Path(include) / "Python.h").is_file():
        raise Missing("Python.h is missing (on Debian: apt install python3-dev).")
    return include


def find_pybind11() -> tuple[str, str]:
    try:
        import pybind11
    except ImportError:
        raise Missing("pybind11 is missing (pip install pybind11).") from None
    return pybind11.get_include(), pybind11.__version__


def find_ninja() -> str:
    try:
        import ninja

        return str(Path(ninja.BIN_DIR) / "ninja")
    except ImportError:
        if found := shutil.which("ninja"):
            return found
    raise Missing("ninja is missing (pip install ninja).")


def openmp_flags(cxx: list[str], flags: list[str]) -> list[str]:
    """-fopenmp where the compiler can compile and link with it. A compiler that can build nothing at all is missing.

    clang on Linux counts as one without: its code would bring a library of its own beside torch's (csrc/openmp.cpp
    stands in for what g++'s code calls), and both would start their threads.
    """
    # <vector>: a compiler can come without the standard library's headers.
    plain = "#include <vector>\nint n() { return std::vector<int>(1)[0]; }\n"
    other = "#if defined(__clang__) && defined(__linux__)\n#error another OpenMP than torch's\n#endif\n"
    program = f"{other}#include <omp.h>\nint threads() {{ return omp_get_max_threads(); }}\n{plain}"
    with tempfile.TemporaryDirectory() as tmp:
        for code, openmp in ((program, ["-fopenmp"]), (plain, [])):
            command = [*cxx, *flags, *openmp, *SHARED, "-x", "c++", "-", "-o", str(Path(tmp) / "probe.so")]
            done = subprocess.run(command, input=code, text=True, capture_output=True)
            if done.returncode == 0:
                if not openmp:
                    cost = "the kernels will run on one thread"
                    print(f"m3em_fast: {cxx[0]} has no OpenMP that goes with torch's: {cost}.", flush=True)
                return openmp
    reason = next((line for line in done.stderr.splitlines() if "error" in line), f"status {done.returncode}")
    raise Missing(f"The C++ compiler {cxx[0]} cannot build a shared library ({reason.strip()}).")


def ninja_value(words: list[str]) -> str:
    """Words as the value of a ninja variable that a shell command will hold."""
    return " ".join(shlex.quote(word).replace("$", "$$") for word in words)


def ninja_path(path: str) -> str:
    return re.sub(r"([$ :])", r"$\1", path)


def cpp_rules(build: str, library: str, version: str) -> list[str]:
    """Raises Missing where a tool is not there."""
    cxx = find_compiler()
    include, pybind11_include = find_python_headers(), find_pybind11()[0]
    flags = CFLAGS + shlex.split(os.environ.get("CXXFLAGS", ""))
    flags += openmp_flags(cxx, flags)
    link = [*SHARED, *flags, *shlex.split(os.environ.get("LDFLAGS", ""))]
    # Only bindings.cpp sees these, so that a new version number does not compile the kernels again.
    about = [f'-DM3EM_VERSION="{version}"', f'-DM3EM_FLAGS="{" ".join(flags)}"']
    lines = [
        f"cxx = {ninja_value(cxx)}",
        f"cflags = {ninja_value([*flags, '-Icsrc', '-I' + pybind11_include, '-I' + include])}",
        f"ldflags = {ninja_value(link)}",
        "rule compile",
        "  command = $cxx $cflags $defines -MMD -MF $out.d -c $in -o $out",
        "  description = compile $in",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        "  command = $cxx $in $ldflags -o $out",
        "  description = link $out",
    ]
    objects = []
    for source in SOURCES:
        kernel = source.startswith("csrc/cpu/") and source != "csrc/cpu/dispatch.cpp"
        for isa, isa_flags in ISAS.items() if kernel else [("", [])]:
            objects.append(ninja_path(f"{build}/{source}{'.' + isa if isa else ''}.o"))
            lines.append(f"build {objects[-1]}: compile {ninja_path(source)}")
            if source == "csrc/bindings.cpp":
                lines.append(f"  defines = {ninja_value(about)}")
            elif isa:
                lines.append(f"  defines = {ninja_value([*isa_flags, '-DM3EM_ISA=' + isa])}")
    return [*lines, f"build {ninja_path(library)}: link {' '.join(objects)}"]


def cuda_rules(build: str, archive: str, index: dict[str, Any], nvrtc: Any) -> list[str]:
    # -S: the script needs the standard library alone, and what else an environment loads at its start costs more.
    command = ninja_value([sys.executable, "-I", "-S", DEVICE_SCRIPT])
    found = ninja_value([str(nvrtc.path), str(nvrtc.include)]) if nvrtc else ""
    lines = [
        "rule image",
        f"  command = {command} image {found} $in $arch $out",
        "  description = compile $in for $arch",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule pack",
        f"  command = {command} pack $plan $out $in",
        "  description = pack $out",
    ]
    images = []
    for name in index["images"]:
        arch, _, file = name.partition("/")
        images.append(ninja_path(f"{build}/cuda/{name}"))
        source = f"csrc/cuda/{Path(file).stem}.cu"
        lines += [f"build {images[-1]}: image {source} | {DEVICE_SCRIPT} m3em_fast/nvrtc.py", f"  arch = {arch}"]
    sources = [p.relative_to(ROOT).as_posix() for p in sorted((ROOT / "csrc/cuda").glob("*.cu*"))]
    others = [f"{build}/cuda.json", DEVICE_SCRIPT, *sources]
    lines.append(f"build {ninja_path(archive)}: pack {' '.join(images)} | {' '.join(map(ninja_path, others))}")
    return [*lines, f"  plan = {ninja_value([f'{build}/cuda.json'])}"]


class NinjaBuild(build_ext):
    """build_ext with ninja in the place of setuptools' compiler calls; where results go stays setuptools' affair."""

    def build_extension(self, ext: Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name))
        note = output.with_name(NOTE)
        output.parent.mkdir(parents=True, exist_ok=True)
        # A library of an earlier build must not pass for this one's.
        output.unlink(missing_ok=True)
        note.unlink(missing_ok=True)
        # Not build_temp: an editable install would put that into a folder that is thrown away, and compile all again.
        build = f"build/ninja-{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        (ROOT / build).mkdir(parents=True, exist_ok=True)
        library, archive, version = f"{build}/{output.name}", f"{build}/{ARCHIVE}", self.distribution.get_version()
        script, rules, ninja = device_code(), [], None
        try:
            index, nvrtc, said = script.plan(version)
        except ValueError as error:
            raise SystemExit(f"m3em_fast: {error}") from None
        try:
            ninja = find_ninja()
            rules = cpp_rules(build, library, version)
        except Missing as missing:
            said.insert(0, f"{missing} {COST}")
            note.write_text(f"{missing}\n")
            if ninja is None:
                index["missing"] |= {name.partition("/")[0]: str(missing) for name in index["images"]}
                index["images"] = []
        for line in said:
            print(f"m3em_fast: {line}", flush=True)
        plan = ROOT / build / "cuda.json"
        if not plan.exists() or json.loads(plan.read_text()) != index:
            plan.write_text(json.dumps(index))
        if ninja is None:
            script.pack(plan, ROOT / archive)
        else:
            self.run_ninja(ninja, build, rules + cuda_rules(build, archive, index, nvrtc))
        if rules:
            shutil.copy2(ROOT / library, output)
        shutil.copy2(ROOT / archive, output.with_name(ARCHIVE))

    def run_ninja(self, ninja: str, build: str, rules: list[str]) -> None:
        path = ROOT / build / "build.ninja"
        path.write_text("\n".join(["ninja_required_version = 1.5", f"builddir = {ninja_path(build)}", *rules]) + "\n")
        command = [ninja, "-f", str(path)] + (["-j", str(self.parallel)] if self.parallel else [])
        if subprocess.run(command, cwd=ROOT).returncode:
            raise SystemExit("m3em_fast: csrc/ did not compile; the compiler's message is above.")

    def copy_extensions_to_source(self) -> None:
        for ext in self.extensions:
            built = Path(self.build_lib, self.get_ext_filename(ext.name))
            for name in (built.name, NOTE, ARCHIVE):
                source, target = built.with_name(name), ROOT / "m3em_fast" / name
                if source.exists():
                    # By renaming, so that a process which has the old library mapped keeps it whole.
                    os.replace(shutil.copy2(source, target.with_name(name + ".new")), target)
                else:
                    target.unlink(missing_ok=True)


setup(
    ext_modules=[Extension("m3em_fast._C", sources=SOURCES, depends=HEADERS, language="c++")],
    cmdclass={"build_ext": NinjaBuild},
)
