"""What a bug report needs to know: ``python -m m3em_fast.env``, with ``--json`` for programs.

Every probe stands alone. One that fails says so in its own place, because a broken installation is just where this is
needed most.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from m3em_fast import _cli

PACKAGE = Path(__file__).resolve().parent
INSTRUCTION_SETS = ("sse2", "avx", "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_fp16", "avx512_bf16", "asimd")
DTYPES = ("float32", "float16", "bfloat16", "float64")
# Beside our own variables, those that most often explain why two machines differ.
VARIABLES = re.compile(
    r"(M3EM|OMP|GOMP|KMP|MKL|PYTORCH)_\w+|CUDA_VISIBLE_DEVICES|TRITON_INTERPRET|LD_PRELOAD|LD_LIBRARY_PATH"
    r"|CXX|CXXFLAGS|LDFLAGS"
)


def _tilde(path: Path) -> str:
    """A home folder's name belongs to its owner and not into a public report."""
    home = Path.home()
    return f"~/{path.relative_to(home)}" if path.is_relative_to(home) else str(path)


def _package() -> dict[str, Any]:
    from m3em_fast._version import __version__

    return {"version": __version__, "from": _tilde(PACKAGE), "commit": _commit()}


def _commit() -> str | None:
    if not (PACKAGE.parent / ".git").exists():
        return None
    answers = []
    for question in ("rev-parse HEAD", "status --porcelain"):
        command = ["git", "-C", str(PACKAGE.parent), *question.split()]
        try:
            answers.append(
                subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
            )
        except (OSError, subprocess.SubprocessError):
            return "unknown: git could not tell"
    return answers[0] + (" and uncommitted changes" if answers[1] else "")


def _backends() -> dict[str, Any]:
    """What serves the ops: the choice in force, whom it means for which tensors, what is available, and why the rest
    is not."""
    import torch

    from m3em_fast import backends

    usable = {*backends.available("cpu"), *backends.available("cuda")}
    found: dict[str, Any] = {"in force": backends.current()}
    found["available"] = [name for name in backends.BACKENDS if name in usable]
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        found[f"serves {device} tensors"] = _served(device)
    if backends.native is not None:
        found["cpu instruction set"] = backends.native.isa()
    for name in backends.BACKENDS:
        if name not in usable:
            found[name] = backends.refusal(name, "", ())
    if found.get("triton", "") is None:
        found["triton"] = "interpreted: it serves CPU tensors where it is chosen by name"
    for index in range(torch.cuda.device_count()):
        if "cuda" in usable:
            found[f"cuda on device {index}"] = (
                backends.cards.refusal("consensus_map", index) or "its kernels are loaded"
            )
        if "triton" in usable:
            refused = {d: backends.triton_devices.refusal(index, (getattr(torch, d),)) for d in DTYPES}
            found[f"triton on device {index}"] = _by_dtype({d: why or "ready" for d, why in refused.items()})
    return found


def _served(device: str) -> str:
    """Who serves ordinary calls of ``consensus_map``."""
    import torch

    from m3em_fast import explain

    found = {}
    for dtype in DTYPES:
        x = torch.empty(0, 1, 1, 1, device=device, dtype=getattr(torch, dtype))
        said = explain("consensus_map", x)
        found[dtype] = re.findall(r"is served by (\w+)", said)[0]
    return _by_dtype(found)


def _by_dtype(found: dict[str, str]) -> str:
    """One answer, where it is the same for all dtypes, and else one for each."""
    if len(set(found.values())) == 1:
        return next(iter(found.values()))
    return "; ".join(f"{dtype}: {answer}" for dtype, answer in found.items())


def _extension() -> dict[str, Any]:
    try:
        module = importlib.import_module("m3em_fast._C")
        # Where two checkouts meet in one environment, the library of the other one can be what was found.
        found, built = Path(module.__file__ or ""), module.build_info()
        return {"built": True, "from": _tilde(found.parent), **built, "threads": _threads(found, built["openmp"])}
    except ImportError as error:
        note = PACKAGE / "_C_missing.txt"
        if note.exists():
            reason = f"{note.read_text().strip()} Every op works, in plain PyTorch, which is slower."
        elif any(PACKAGE.glob("_C.*.so")):
            reason = f"The compiled file is there and does not load: {error}"
        else:
            reason = "It has not been compiled here (python setup.py build_ext --inplace)."
        return {"built": False, "reason": reason}


def _threads(extension: Path, openmp: int | None) -> str:
    """Whose threads the kernels use."""
    from m3em_fast import _openmp

    if (library := _openmp.library(str(extension))) is not None:
        return f"those of {_tilde(library)}"
    return f"one, for {'the build had no OpenMP' if openmp is None else 'no OpenMP library was found'}"


def _device_code() -> dict[str, Any]:
    """For which architectures kernels are packed, and why not for others."""
    try:
        with zipfile.ZipFile(PACKAGE / "_cuda.zip") as packed:
            index = json.loads(packed.read("index.json"))
    except FileNotFoundError:
        return {"packed for": None, "reason": "It has not been compiled here (python setup.py build_ext --inplace)."}
    found: dict[str, Any] = {"packed for": _in_order(image.partition("/")[0] for image in index["images"])}
    found["compiled by"] = f"NVRTC {index['nvrtc']}" if index["nvrtc"] else None
    without = index["missing"]
    for reason in sorted(set(without.values())):
        found["not " + " ".join(_in_order(name for name in without if without[name] == reason))] = reason
    return found


def _in_order(architectures: Iterable[str]) -> list[str]:
    return sorted(set(architectures), key=lambda name: (name.startswith("compute"), int(name.partition("_")[2])))


def _processor() -> dict[str, Any]:
    model, flags = platform.processor() or platform.machine(), set()
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else ():
        key, _, value = (part.strip() for part in line.partition(":"))
        if key == "model name":
            model = value
        elif key in ("flags", "Features"):
            flags = set(value.split())
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    sets = [name for name in INSTRUCTION_SETS if name in flags]
    return {"model": model, "instruction_sets": sets, "cores": os.cpu_count(), "usable_cores": usable}


def _torch() -> dict[str, Any]:
    import torch

    cudnn = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
    return {
        "version": torch.__version__,
        "threads": torch.get_num_threads(),
        "interop_threads": torch.get_num_interop_threads(),
        "cuda_build": torch.version.cuda,
        "nvidia_driver": _nvidia_driver(),
        "cudnn": cudnn,
        "compiled_for": torch.cuda.get_arch_list(),
    }


def _nvidia_driver() -> str | None:
    version = Path("/proc/driver/nvidia/version")
    return version.read_text().splitlines()[0].strip() if version.exists() else None


def _devices() -> list[dict[str, Any]]:
    import torch

    found = []
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        capability, memory = f"{device.major}.{device.minor}", round(device.total_memory / 2**30, 1)
        found.append({"name": device.name, "compute_capability": capability, "memory_gib": memory})
    return found


def _libraries() -> dict[str, str | None]:
    """Everything that our own metadata names, so that there is no second list to keep."""
    found: dict[str, str | None] = {}
    for requirement in importlib.metadata.requires("m3em_fast") or ():
        name = re.split(r"[^\w.-]", requirement, maxsplit=1)[0]
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return dict(sorted(found.items()))


def _variables() -> dict[str, str]:
    found = {name: value for name, value in sorted(os.environ.items()) if VARIABLES.fullmatch(name)}
    home = str(Path.home())
    return {name: value.replace(home, "~") if len(home) > 1 else value for name, value in found.items()}


PROBES: dict[str, Callable[[], Any]] = {
    "package": _package,
    "extension": _extension,
    "device code": _device_code,
    "backends": _backends,
    "python": lambda: f"{platform.python_implementation()} {platform.python_version()} ({platform.python_compiler()})",
    "platform": lambda: f"{platform.platform()}, {' '.join(platform.libc_ver()).strip() or 'unknown C library'}",
    "processor": _processor,
    "torch": _torch,
    "devices": _devices,
    "libraries": _libraries,
    "variables": _variables,
}


def report() -> dict[str, Any]:
    """All that a bug report needs, as plain values that json can write."""
    found: dict[str, Any] = {}
    for name, probe in PROBES.items():
        try:
            found[name] = probe()
        except Exception as error:
            found[name] = {"failed": f"{type(error).__name__}: {error}"}
    return found


def _text(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return " ".join(map(_text, value)) or "none"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_text(item)}" for key, item in value.items())
    return str(value)


def _lines(found: dict[str, Any]) -> list[str]:
    lines = []
    for name, value in found.items():
        if isinstance(value, dict) and value:
            lines.append(name)
            lines += [f"  {key:<{max(map(len, value)) + 2}}{_text(item)}" for key, item in value.items()]
        elif isinstance(value, list) and value:
            lines.append(name)
            lines += [f"  {_text(item)}" for item in value]
        else:
            lines.append(f"{name:<12}{_text(value) or 'none'}")
    return lines


def main() -> None:
    parser = _cli.Parser(prog="python -m m3em_fast.env", description="Print what a bug report needs.")
    parser.add_argument("--json", action="store_true", help="print it as JSON")
    as_json = parser.parse_args().json
    found = report()
    sys.stdout.write((json.dumps(found, indent=2, default=str) if as_json else "\n".join(_lines(found))) + "\n")


if __name__ == "__main__":
    main()
