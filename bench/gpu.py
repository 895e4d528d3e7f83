"""What only a card can show, in at most eight minutes and without a network: ``make gpu``, or ``python -m bench.gpu``.

Builds the extension, says whether packed or newly compiled kernels serve the card, and runs the tests of the ops and of
the module on it (tests/test_gpu*.py), each op's in a process of its own and all of them at once. Then it measures, the
most telling first: all ops and the module in float16 against eager PyTorch, torch.compile and a copy; an epoch of
train.py in float16, on the kernels and on the reference; compute-sanitizer, where that is found; and the other dtypes.
What there was no time for is in the records. What one part leaves over of its time goes to the measuring.

In the folder of the records, bench/results/ or what --results names, everything is written as it comes, so that
whatever ends this leaves what was found before:

    gpu-<card>.log           all that was said, and the output of the tests
    gpu-<card>.json          the card, how every part ended and what it took, at the end the summary
    gpu-<card>-<dtype>.json  the times; python -m bench.gpu_summary reads them
    gpu-<card>-train.json    the epochs

Needs torch with CUDA, numpy, pytest and hypothesis; to build also setuptools, pybind11, ninja and a C++ compiler; for
the epoch also what the extra `train` brings, without tyro. Runs in the Python that runs it, in no environment of its
own. An extension or an archive of kernels that is there already serves where the build here fails.

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
import sys
import sysconfig
import time
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from bench import gpu_summary
from bench.gpu_run import GRACE, ROOT, Done, call, call_all, logged, say

RESULTS = ROOT / "bench/results"
ARCHIVE = ROOT / "m3em_fast/_cuda.zip"
EXTENSION = ROOT / f"m3em_fast/_C{sysconfig.get_config_var('EXT_SUFFIX')}"
# Seconds, in the order in which they are run. The looks at the card, before and after the build, take theirs from what
# is spare; what is left of that, and what a part leaves over, goes to the measuring.
PARTS = {"build": 90.0, "tests": 95.0, "float16": 110.0, "training": 55.0, "sanitizer": 50.0, "others": 60.0}
LIMIT = 480.0
SPARE = {"float16": 0.6, "others": 1.0}  # the share of what is spare by then
FIRST_LOOK, LOOK = 90.0, 60.0  # at most, at the card; the first one reads torch from the disk
# Dtypes of the last part, with their shares of its time.
OTHERS = {"float32": 1, "bfloat16": 1}
START = 12.0  # a measuring process keeps to so much less than it is stopped after
OPS = ("channel_gate", "consensus_map", "consensus_pool")  # those with device code of their own
TESTS = ("tests/test_gpu.py", "tests/test_gpu_ops.py")
# One process each: what one kernel does to the card ends the process, and not the tests of the others. Triton compiles
# as it goes, so that it has one of its own.
CUDA_TESTS = {
    "consensus_map": (TESTS[:1], "not triton"),
    "channel_gate": (TESTS[1:], "not triton and channel_gate"),
    "consensus_pool": (TESTS[1:], "not triton and consensus_pool"),
    "gated_projection": (TESTS[1:], "not triton and projection"),
    "module": (TESTS[1:], "not triton and not channel_gate and not consensus_pool and not projection"),
}
NO_TESTS = 5  # pytest's exit code where none are chosen
# Not initcheck: it would have to look at torch's kernels too, which write what ours read.
TOOLS = ("memcheck", "racecheck", "synccheck")
NEEDED = ("torch", "numpy", "pytest", "hypothesis")
# Of the extra `train`, what a training takes that is not called from a command line.
TRAINING = ("matplotlib", "rich", "tensorboard", "torchmetrics", "tqdm")
TAIL = 2500  # characters of what a failed command said; the log has all of it


class CannotRun(Exception):
    """This machine cannot run it. The message is one sentence."""


def python(*arguments: str) -> list[str]:
    return [sys.executable, *arguments]


def check_packages() -> None:
    if absent := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        raise CannotRun(f"{sys.executable} has no {' and no '.join(absent)}.")


def look(limit: float, kernels: bool = False) -> dict[str, Any]:
    """What bench.gpu_card says of the card; raises what is in the way of everything."""
    done = call(python("-m", "bench.gpu_card", *(["--kernels"] if kernels else [])), limit)
    lines = done.text.strip().splitlines() or ["nothing said"]
    answers = [line for line in lines if line.startswith("{")]
    if done.code != 0 or not answers:
        ended = f"took longer than {limit:.0f} s" if done.code is None else f"failed ({lines[-1].rstrip('.')})"
        raise CannotRun(f"looking at the card with the torch of {sys.executable} {ended}.")
    found: dict[str, Any] = json.loads(answers[-1])
    if "problem" in found:
        raise CannotRun(found["problem"])
    return found


def look_at_kernels(found: dict[str, Any]) -> dict[str, Any]:
    """The same and where our kernels come from, or ``kernel_problem``: then Triton and the baselines are left."""
    try:
        found = look(LOOK, kernels=True)
    except CannotRun as error:
        found = {**found, "kernel_problem": str(error)}
    if "kernel_problem" in found:
        say(f"NO KERNELS OF OURS: {found['kernel_problem']}")
    else:
        say(f"kernels {found['kernels']}, NVRTC {found['nvrtc']}")
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
def kept(archive: bool) -> Iterator[None]:
    """The archive as it was, afterwards, and the extension where there is no new one."""
    before = {path: path.read_bytes() for path in (ARCHIVE, EXTENSION) if path.exists()}
    try:
        yield
    finally:
        for path, data in before.items():
            if (path == ARCHIVE and archive) or not path.exists():
                path.write_bytes(data)


def build(limit: float, capability: str) -> str:
    """The extension of this checkout, and device code for this card alone where none is packed for it."""
    ready = packed_for(capability)
    if ready:
        say("Kernels for this card are packed already.")
    with kept(ready):
        done = call(
            python("setup.py", "--quiet", "build_ext", "--inplace"),
            limit,
            M3EM_CUDA_ARCHS="none" if ready else capability,
        )
    if done.code == 0:
        said = [line for line in done.text.splitlines() if line.startswith("m3em_fast:") and "=none" not in line]
        say("\n".join(said) or "done")
        return "done"
    # An extension of an earlier build may do; the next look says whether it does.
    say(done.text.strip()[-TAIL:])
    return "stopped" if done.code is None else "failed"


def run_all(commands: Mapping[str, list[str]], limit: float, alone: bool, **variables: str) -> dict[str, Done]:
    """At once; one after another on a card that has been told to take one process at a time."""
    if not alone:
        return call_all(commands, limit, grace=GRACE, **variables)
    end, found = time.monotonic() + limit, {}
    for name, command in commands.items():
        found |= call_all({name: command}, end - time.monotonic(), grace=GRACE, **variables)
    return found


def worst(outcomes: Sequence[str]) -> str:
    return next((each for each in ("failed", "stopped", "passed", "done") if each in outcomes), "not found")


def tests(limit: float, ours: bool = True, alone: bool = False) -> str:
    """Those of the ops and of the module, on the card; without kernels of ours, those of Triton."""
    groups = {**(CUDA_TESTS if ours else {}), "triton": (TESTS, "triton")}
    words = ("-m", "pytest", "-q", "--maxfail=10", "--tb=short", "--durations=3", "-p", "no:cacheprovider")
    # No plugins of whoever owns the machine; and the processes share its cores (tests/conftest.py).
    variables = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_XDIST_WORKER_COUNT": str(len(groups))}
    commands = {name: python(*words, *files, "-k", chosen) for name, (files, chosen) in groups.items()}
    outcomes = []
    for name, done in run_all(commands, limit, alone, **variables).items():
        last = (done.text.strip().splitlines() or ["no word"])[-1].strip("= ")
        if done.code is None:
            outcomes.append("stopped")
            last = f"took longer than {limit:.0f} s and were stopped ({last})"
        elif done.code == NO_TESTS and name == "triton":
            outcomes.append("not found")
            last = "none, for Triton serves nothing here (python -m m3em_fast.env says why)"
        else:
            outcomes.append("passed" if done.code == 0 else "failed")
        if outcomes[-1] in ("failed", "stopped"):
            say(done.text.strip()[-TAIL:])
        say(f"tests of {name}: {last}")
    return worst(outcomes)


def find_sanitizer() -> str | None:
    folders = [Path(os.environ[name], "bin") for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    folders.append(Path("/usr/local/cuda/bin"))
    return shutil.which("compute-sanitizer") or next(
        (str(folder / "compute-sanitizer") for folder in folders if (folder / "compute-sanitizer").is_file()), None
    )


def sanitizer(limit: float, alone: bool = False) -> str:
    """A handful of the tests under every tool, which looks at our kernels alone; every tensor is an allocation of its
    own, so that its end is known."""
    program = find_sanitizer()
    if program is None:
        say("compute-sanitizer is not found (it comes with the CUDA toolkit), so it is left out.")
        return "not found"
    chosen = python("-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS, "-k", "handful and not triton")
    ours = ("--kernel-name", "kns=channel_gate_,kns=consensus_")
    commands = {tool: [program, "--tool", tool, *ours, "--error-exitcode", "9", *chosen] for tool in TOOLS}
    variables = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    outcomes = []
    for tool, done in run_all(commands, limit, alone, **variables).items():
        summary = [line for line in done.text.splitlines() if "SUMMARY" in line] or done.text.splitlines()[-1:]
        said = " ".join(summary).strip("= ") or "no word"
        if done.code is None:
            outcomes.append("stopped")
            said = f"stopped, for the {limit:.0f} s of this part are over ({said})"
        else:
            outcomes.append("failed" if done.code else "passed")
        if outcomes[-1] == "failed":
            say(done.text.strip()[-TAIL:])
        say(f"compute-sanitizer {tool}: {said}")
    return worst(outcomes)


def slug(card: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", card.lower()).strip("-")


def training(limit: float, path: Path, where: dict[str, Any]) -> str:
    """An epoch of train.py in float16, on the kernels and on the reference."""
    if absent := [name for name in TRAINING if importlib.util.find_spec(name) is None]:
        say(f"{' and '.join(absent)} missing, so no epoch of train.py is run.")
        return "not found"
    words = ("--json", str(path), "--conditions", json.dumps(where))
    done = call(python("-m", "bench.gpu_train", *words), limit)
    lines = [line for line in done.text.splitlines() if line.startswith(("bench.gpu_train:", "epoch "))]
    say("\n".join(lines) or done.text.strip()[-TAIL:])
    if done.code is None:
        say(f"The training took longer than {limit:.0f} s and was stopped.")
        return "stopped"
    return "done" if done.code == 0 else "failed"


def benchmark(limit: float, paths: Mapping[str, Path], where: dict[str, Any], shares: Mapping[str, int]) -> str:
    """Every dtype in a process of its own: one that loses the card loses its own figures."""
    end, outcomes = time.monotonic() + limit, ["done"]
    left = sum(shares.values())
    for dtype, share in shares.items():
        seconds = (end - time.monotonic()) * share / left
        left -= share
        # It writes what it has after every case.
        words = ("--json", str(paths[dtype]), "--seconds", f"{max(seconds - START, 1):.0f}")
        done = call(
            python("-m", "bench.gpu_measure", dtype, *words, "--conditions", json.dumps(where)), seconds, show=True
        )
        if done.code is None:
            say(f"The benchmark in {dtype} took longer than {seconds:.0f} s and was stopped.")
        outcomes.append("stopped" if done.code is None else "failed" if done.code else "done")
    return worst(outcomes)


class Parser(argparse.ArgumentParser):
    """That of m3em_fast._cli: the package cannot be imported before it is known what this machine lacks."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog.removeprefix('python -m ')}: {message}.\n")


class Progress:
    """How the parts have ended, on the disk after each of them; and what time the next one may take."""

    def __init__(self, path: Path, start: float) -> None:
        self.path, self.start = path, start
        self.found: dict[str, Any] = {}
        self.parts: dict[str, dict[str, Any]] = {}
        self.summary: list[str] = []

    @property
    def outcomes(self) -> dict[str, str]:
        return {part: each["outcome"] for part, each in self.parts.items()}

    def limit(self, part: str) -> float:
        names = list(PARTS)
        left = LIMIT - (time.monotonic() - self.start)
        spare = left - sum(PARTS[each] for each in names[names.index(part) :])
        return min(PARTS[part] + SPARE.get(part, 0.0) * max(spare, 0.0), left)

    def run(self, part: str, function: Any, *arguments: Any) -> None:
        limit, begin = self.limit(part), time.monotonic()
        say(f"\n== {part} (at most {limit:.0f} s)")
        try:
            outcome = function(limit, *arguments)
        except (OSError, ValueError) as error:  # of one part: the others are to have their turn
            say(f"{part}: {error}")
            outcome = "failed"
        self.parts[part] = {"outcome": outcome, "seconds": round(time.monotonic() - begin, 1)}
        self.write()

    def write(self) -> None:
        new = self.path.with_name(self.path.name + ".new")
        everything = {"where": self.found, "parts": self.parts, "summary": self.summary}
        new.write_text(json.dumps(everything, indent=1) + "\n")
        new.replace(self.path)


def run(options: argparse.Namespace) -> int:
    start, begun, results = time.monotonic(), time.time(), options.results
    check_packages()
    found = look(FIRST_LOOK)
    results.mkdir(parents=True, exist_ok=True)
    base = f"gpu-{slug(found['card'])}"
    paths = {name: results / f"{base}-{name}.json" for name in ("float16", *OTHERS, "train")}
    with logged(results / f"{base}.log"):
        progress = Progress(results / f"{base}.json", start)
        progress.found = found
        say(f"{found['card']}, compute capability {found['capability']}, driver {found['driver']}")
        say(f"torch {found['torch']}, CUDA {found['cuda']}, Python {found['python']}; records in {results}")
        progress.run("build", build, found["capability"])
        progress.found = found = look_at_kernels(found)
        ours = "kernel_problem" not in found
        alone = found.get("exclusive", False)
        progress.run("tests", tests, ours, alone)
        progress.run("float16", benchmark, paths, {**found, **progress.outcomes}, {"float16": 1})
        progress.run("training", training, paths["train"], {**found, **progress.outcomes})
        if ours:
            progress.run("sanitizer", sanitizer, alone)
        progress.run("others", benchmark, paths, {**found, **progress.outcomes}, OTHERS)
        # One of an earlier run stays until there is another in its place; its figures are not this run's.
        new = [path for path in paths.values() if path.exists() and path.stat().st_mtime >= begun]
        progress.summary = gpu_summary.summary(gpu_summary.read(new))
        progress.write()
        say("\n" + "\n".join(progress.summary))
        ended = ", ".join(f"{part} {outcome}" for part, outcome in progress.outcomes.items())
        say(f"\n{ended}; {time.monotonic() - start:.0f} s; records in {results}")
        if not ours:
            say(f"NO KERNELS OF OURS: {found['kernel_problem']}")
        return 0 if ours and not {"failed", "stopped"} & set(progress.outcomes.values()) else 1


def _terminated(number: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python -m bench.gpu", description=__doc__.split("\n\n")[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the records")
    options = parser.parse_args(arguments)
    before = signal.signal(signal.SIGTERM, _terminated)  # so that nothing that it has started goes on
    try:
        return run(options)
    except (CannotRun, OSError) as error:
        print(f"make gpu: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("make gpu: interrupted.", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    sys.exit(main())
