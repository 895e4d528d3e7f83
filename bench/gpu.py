"""What only a card can show, in at most eight minutes and without a network: ``make gpu``, or ``python -m bench.gpu``.

Builds the extension, says whether packed or newly compiled kernels serve the card, runs the tests of the ops and of the
module on it (tests/test_gpu*.py), some of them under compute-sanitizer where that is found, and measures all of them
against eager PyTorch, torch.compile and a copy, as far as the time goes: float16 first, and what is left out is in the
records. Between them an epoch of train.py in float16, on the kernels and on the reference. The records go to
bench/results/gpu-<card>-<dtype>.json and gpu-<card>-train.json. Needs torch with CUDA, numpy, pytest and hypothesis; to
build also setuptools, pybind11, ninja and a C++ compiler; for the epoch also what the extra `train` brings, without
tyro. Runs in the Python that runs it, in no environment of its own.

Exit code: 0, or 1 where a part failed or was stopped, or 2 with a sentence where this machine cannot run it.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench/results"
ARCHIVE = ROOT / "m3em_fast/_cuda.zip"
# Seconds. What a part leaves over is nobody's; the looks at the card between the parts take theirs from what is spare.
PARTS = {"build": 90.0, "tests": 95.0, "triton": 50.0, "sanitizer": 40.0, "training": 50.0, "benchmark": 140.0}
LIMIT = 480.0
LOOK = 60.0  # at most, at the card
# The dtype of training first, with the time of two.
SHARES = {"float16": 2, "float32": 1, "bfloat16": 1}
OPS = ("channel_gate", "consensus_map", "consensus_pool")  # those with device code of their own
TESTS = ("tests/test_gpu.py", "tests/test_gpu_ops.py")
NO_TESTS = 5  # pytest's exit code where none are chosen
TOOLS = ("memcheck", "racecheck")
NEEDED = ("torch", "numpy", "pytest", "hypothesis")
# Of the extra `train`, what a training takes that is not called from a command line.
TRAINING = ("matplotlib", "rich", "tensorboard", "torchmetrics", "tqdm")


class CannotRun(Exception):
    """This machine cannot run it. The message is one sentence."""


@dataclass(frozen=True)
class Done:
    """How a command ended: its exit code, None where it was stopped at its limit; what it printed, if kept."""

    code: int | None
    text: str = ""


def environment(**more: str) -> dict[str, str]:
    """Of the commands: this checkout first, no choice of backend from outside, and Triton on the card."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    inherited = {name: value for name, value in os.environ.items() if name != "M3EM_BACKEND"}
    # tests/conftest.py would have Triton interpret its kernels.
    return {**inherited, "PYTHONPATH": path, "TRITON_INTERPRET": "0", **more}


def call(command: Sequence[str], limit: float, keep: bool = False, **variables: str) -> Done:
    """Run a command for ``limit`` seconds at most; then it ends with everything that it has started."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment(**variables),
        stdout=subprocess.PIPE if keep else None,
        stderr=subprocess.STDOUT if keep else None,
        text=True,
        errors="replace",
        start_new_session=True,  # so that all of it can be ended
    )
    try:
        text, _ = process.communicate(timeout=max(limit, 0.1))
        return Done(process.returncode, text or "")
    except subprocess.TimeoutExpired:
        _end(process)
        return Done(None, process.communicate()[0] or "")
    except BaseException:
        _end(process)
        raise


def _end(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def python(*arguments: str) -> list[str]:
    return [sys.executable, *arguments]


def check_packages() -> None:
    if absent := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        raise CannotRun(f"{sys.executable} has no {' and no '.join(absent)}.")


def look(limit: float, kernels: bool = False) -> dict[str, Any]:
    """What bench.gpu_card says of the card; raises what is in the way."""
    done = call(python("-m", "bench.gpu_card", *(["--kernels"] if kernels else [])), limit, keep=True)
    lines = done.text.strip().splitlines() or ["nothing said"]
    answers = [line for line in lines if line.startswith("{")]
    if done.code != 0 or not answers:
        ended = f"took longer than {limit:.0f} s" if done.code is None else f"failed ({lines[-1].rstrip('.')})"
        raise CannotRun(f"looking at the card with the torch of {sys.executable} {ended}.")
    found: dict[str, Any] = json.loads(answers[-1])
    for problem in ("problem", "kernel_problem"):
        if problem in found:
            raise CannotRun(found[problem])
    return found


def packed_for(capability: str) -> bool:
    """Whether the archive of this checkout is of its sources and has code that a card can run as it is."""
    try:
        with zipfile.ZipFile(ARCHIVE) as packed:
            names, index = packed.namelist(), json.loads(packed.read("index.json"))
    except (OSError, KeyError, ValueError, zipfile.BadZipFile):
        return False
    folder, digest = ROOT / "csrc/cuda", hashlib.sha256()
    for path in sorted([*folder.glob("*.cu"), *folder.glob("*.cuh")], key=lambda path: path.name):
        data = path.read_bytes()
        digest.update(f"source/cuda/{path.name} {len(data)}\n".encode() + data)
    own = int(capability.replace(".", ""))
    found = [match for name in names if (match := re.fullmatch(r"(sm|compute)_(\d+)/(\w+)\.(cubin|ptx)", name))]
    fits = {
        op
        for kind, arch, op, _ in map(re.Match.groups, found)
        if int(arch) <= own and (kind == "compute" or int(arch) // 10 == own // 10)
    }
    return index.get("digest") == digest.hexdigest() and fits.issuperset(OPS)


@contextlib.contextmanager
def kept(path: Path, keep: bool) -> Iterator[None]:
    """The file as it was, afterwards."""
    before = path.read_bytes() if keep else None
    try:
        yield
    finally:
        if before is not None:
            path.write_bytes(before)


def build(limit: float, capability: str) -> str:
    """The extension of this checkout, and device code for this card alone where none is packed for it."""
    ready = packed_for(capability)
    archs = "none" if ready else capability
    with kept(ARCHIVE, ready):
        done = call(python("setup.py", "--quiet", "build_ext", "--inplace"), limit, keep=True, M3EM_CUDA_ARCHS=archs)
    if done.code == 0:
        print("\n".join(line for line in done.text.splitlines() if line.startswith("m3em_fast:")) or "up to date")
        return "done"
    # An extension of an earlier build may do; the next look says whether it does.
    print(done.text.strip()[-4000:])
    return "stopped" if done.code is None else "failed"


def tests(limit: float, chosen: str = "not triton") -> str:
    """Those of the ops and of the module, on the card. Triton, which compiles as it goes, has a time of its own."""
    done = call(python("-m", "pytest", "-q", "--maxfail=10", *TESTS, "-k", chosen), limit)
    if done.code is None:
        print(f"The tests took longer than {limit:.0f} s and were stopped.")
        return "stopped"
    if done.code == NO_TESTS and chosen == "triton":
        print("Triton serves nothing here (python -m m3em_fast.env says why), so its tests are left out.")
        return "not found"
    return "passed" if done.code == 0 else "failed"


def find_sanitizer() -> str | None:
    folders = [Path(os.environ[name], "bin") for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    folders.append(Path("/usr/local/cuda/bin"))
    return shutil.which("compute-sanitizer") or next(
        (str(folder / "compute-sanitizer") for folder in folders if (folder / "compute-sanitizer").is_file()), None
    )


def sanitizer(limit: float) -> str:
    """A handful of the tests under each tool; every tensor is an allocation of its own, so that its end is known."""
    program = find_sanitizer()
    if program is None:
        print("compute-sanitizer is not found (it comes with the CUDA toolkit), so it is left out.")
        return "not found"
    end, outcome = time.monotonic() + limit, "passed"
    chosen = python("-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS, "-k", "handful and not triton")
    for tool in TOOLS:
        command = [program, "--tool", tool, "--error-exitcode", "9", *chosen]
        done = call(command, end - time.monotonic(), keep=True, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        if done.code is None:
            print(f"compute-sanitizer {tool}: stopped, for the {limit:.0f} s of this part are over.")
            outcome = "stopped" if outcome == "passed" else outcome
            continue
        summary = [line for line in done.text.splitlines() if "SUMMARY" in line] or done.text.splitlines()[-1:]
        print(f"compute-sanitizer {tool}: {' '.join(summary).strip('= ') or 'no word'}")
        if done.code:
            print(done.text.strip()[-4000:])
            outcome = "failed"
    return outcome


def slug(card: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", card.lower()).strip("-")


def training(limit: float, results: Path, where: dict[str, Any]) -> str:
    """An epoch of train.py in float16, on the kernels and on the reference."""
    if absent := [name for name in TRAINING if importlib.util.find_spec(name) is None]:
        print(f"{' and '.join(absent)} missing, so no epoch of train.py is run.")
        return "not found"
    results.mkdir(parents=True, exist_ok=True)
    path = results / f"gpu-{slug(where['card'])}-train.json"
    done = call(python("-m", "bench.gpu_train", "--json", str(path), "--conditions", json.dumps(where)), limit)
    if done.code is None:
        print(f"The training took longer than {limit:.0f} s and was stopped.")
        return "stopped"
    return "done" if done.code == 0 else "failed"


def benchmark(limit: float, results: Path, where: dict[str, Any]) -> str:
    """Every dtype in a process of its own: one that loses the card loses its own figures."""
    results.mkdir(parents=True, exist_ok=True)
    end, outcome = time.monotonic() + limit, "done"
    left = sum(SHARES.values())
    for dtype, share in SHARES.items():
        path, seconds = results / f"gpu-{slug(where['card'])}-{dtype}.json", (end - time.monotonic()) * share / left
        left -= share
        # It keeps to fewer seconds than it is stopped after, and writes what it has after every case.
        words = ("--json", str(path), "--seconds", f"{max(seconds - 15, 1):.0f}", "--conditions", json.dumps(where))
        done = call(python("-m", "bench.gpu_measure", dtype, *words), seconds)
        if done.code is None:
            print(f"The benchmark in {dtype} took longer than {seconds:.0f} s and was stopped.")
            outcome = "stopped"
        elif done.code:
            outcome = "failed"
    return outcome


class Parser(argparse.ArgumentParser):
    """That of m3em_fast._cli: the package cannot be imported before it is known what this machine lacks."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}.\n")


def run(options: argparse.Namespace) -> int:
    start = time.monotonic()
    outcomes: dict[str, str] = {}

    def limit(part: str) -> float:
        """What a part may take: its own share of the whole, as far as that is left."""
        print(f"\n== {part} (at most {PARTS[part]:.0f} s)", flush=True)
        return min(PARTS[part], LIMIT - (time.monotonic() - start))

    check_packages()
    found = look(LOOK)
    print(f"{found['card']}, compute capability {found['capability']}, driver {found['driver']}")
    print(f"torch {found['torch']}, CUDA {found['cuda']}, Python {found['python']}")
    outcomes["build"] = build(limit("build"), found["capability"])
    found = look(LOOK, kernels=True)
    print(f"kernels {found['kernels']}, NVRTC {found['nvrtc']}", flush=True)
    outcomes["tests"] = tests(limit("tests"))
    outcomes["triton"] = tests(limit("triton"), "triton")
    outcomes["sanitizer"] = sanitizer(limit("sanitizer"))
    outcomes["training"] = training(limit("training"), options.results, {**found, **outcomes})
    outcomes["benchmark"] = benchmark(limit("benchmark"), options.results, {**found, **outcomes})
    spent = time.monotonic() - start
    print(f"\n{', '.join(f'{part} {outcome}' for part, outcome in outcomes.items())}; {spent:.0f} s")
    return 1 if {"failed", "stopped"} & set(outcomes.values()) else 0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python -m bench.gpu", description=__doc__.split("\n\n")[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the records")
    options = parser.parse_args(arguments)
    try:
        return run(options)
    except (CannotRun, OSError) as error:
        print(f"make gpu: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("make gpu: interrupted.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
