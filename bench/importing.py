"""Memory and time of importing a large folder of maps: ``python -m m3em_fast.data.importer`` on tens of gigabytes.

    python -m bench.importing                    folders of 4 and of 40 GB (ten minutes, 22 GB free on the disk)
    python -m bench.importing --gigabytes 0.1    whether it runs
    python -m bench.importing --json bench/results/importing.json

A clip's map is 5 x 1024 x 7 x 7 in float32, a file each. The files of a folder are hard links to a few that are really
there, so that it takes no room: what the import reads, checks and writes is that of the whole folder, but it reads from
memory; what a disk takes to bring the files comes on top. The store is written for real, compared with the files, and
deleted.

The peak is VmHWM of the importing process, in which mapped pages of files count as long as they are mapped; what of it
the process has of its own (RssAnon) and of files (RssFile, libraries too) is sampled, each at its largest.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from m3em_fast.data import _extra

if __name__ == "__main__":
    _extra.require("bench.importing", "rich", "tqdm", "tyro")

import numpy as np
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from bench import records
from bench.step_memory import FRAMES, SIDE, SPATIAL
from m3em_fast import _cli
from m3em_fast.data.store import FeatureStore

LIMIT = 1e9  # bytes of memory
SHAPE = (FRAMES, SPATIAL["RGB"], SIDE, SIDE)
CLIP_BYTES = 4 * math.prod(SHAPE)
REAL = 64  # files that are no links
MARGIN = 1e9  # bytes that are to stay free on the disk
EVERY = 0.05  # seconds between looks at the memory
LABELS = ("VmRSS", "VmHWM", "RssAnon", "RssFile")

IMPORT = """
import json, sys, time
from pathlib import Path
from m3em_fast.data import importer
def status():
    return Path("/proc/self/status").read_text()
before, start, worked = status(), time.perf_counter(), time.process_time()
code = importer.main(sys.argv[2:])
times = {"seconds": time.perf_counter() - start, "cpu": time.process_time() - worked}
Path(sys.argv[1]).write_text(json.dumps({"before": before, "after": status(), **times}))
sys.exit(code)
"""


@dataclass(frozen=True)
class Options:
    gigabytes: tuple[float, ...] = (4.0, 40.0)
    """Sizes of the folders."""
    dtype: Literal["float16", "uint8"] = "float16"
    """How the store holds the maps."""
    folder: Path | None = None
    """Where files and stores are made for the time being. None: where the system has its temporary files."""
    json: Path | None = None
    """Write the records there; those worth keeping go to bench/results/."""


class UsageError(ValueError):
    """Something the user can put right; the message is one sentence."""


@dataclass(frozen=True)
class Result:
    """One import.

    Attributes:
        read, stored: bytes of the folder and of the store.
        seconds: of the import, without starting Python.
        cpu: seconds of them in which a processor worked for it; the others it waited for the disk, or for a processor.
        base: bytes of memory before it, of Python and the libraries.
        peak: the most bytes of memory, of the process's own (``anon``) and of mapped files.
    """

    clips: int
    dtype: str
    read: int
    stored: int
    seconds: float
    cpu: float
    base: int
    peak: int
    anon: int
    file: int


def memory(status: str) -> dict[str, int]:
    """Bytes under each of ``LABELS`` of a process's ``/proc/.../status``; none of a process that has ended."""
    lines = (line.split() for line in status.splitlines() if line.partition(":")[0] in LABELS)
    return {words[0].rstrip(":"): 1024 * int(words[1]) for words in lines}


def make_folder(folder: Path, clips: int) -> list[np.ndarray]:
    """``clips`` files of maps, of which the first few are real; those."""
    rng, made = np.random.default_rng(0), []
    (folder / "maps").mkdir()
    for i in tqdm(range(clips), desc=f"{clips * CLIP_BYTES / 1e9:.1f} GB of maps", unit=" clips"):
        path = folder / "maps" / f"P01_01_{i}.npy"
        if i < REAL:
            made.append(rng.random(SHAPE, dtype=np.float32))
            np.save(path, made[-1])
        else:
            os.link(folder / "maps" / f"P01_01_{i % REAL}.npy", path)
    return made


def measure(folder: Path, clips: int, dtype: str) -> Result:
    made = make_folder(folder, clips)
    command = [str(folder / "store"), "--maps", f"RGB={folder / 'maps'}", "--dtype", dtype]
    said, most = folder / "said.json", dict.fromkeys(LABELS, 0)
    with subprocess.Popen([sys.executable, "-c", IMPORT, str(said), *command]) as process:
        while process.poll() is None:
            try:
                now = memory(Path(f"/proc/{process.pid}/status").read_text())
            except OSError:
                now = {}
            most |= {label: max(most[label], size) for label, size in now.items()}
            time.sleep(EVERY)
    if process.returncode:
        raise UsageError(f"the import of {clips} clips ended with status {process.returncode}.")
    found = json.loads(said.read_text())
    check(FeatureStore(folder / "store"), made, clips)
    stored = sum(path.stat().st_size for path in (folder / "store").iterdir())
    peak = memory(found["after"])["VmHWM"]
    base = memory(found["before"])["VmRSS"]
    times = found["seconds"], found["cpu"]
    return Result(clips, dtype, clips * CLIP_BYTES, stored, *times, base, peak, most["RssAnon"], most["RssFile"])


def check(store: FeatureStore, made: Sequence[np.ndarray], clips: int) -> None:
    """The store holds the folder: every clip by name, and those of the first, a middle and the last one's values."""
    if sorted(store.clips) != sorted(f"P01_01_{i}" for i in range(clips)):
        raise AssertionError("the store has other clips than the folder")
    for clip in (0, clips // 2, clips - 1):
        name = store.clips[clip]
        wanted = made[int(name.rpartition("_")[2]) % REAL]
        room = 1 / 256 if store.modalities["RGB"].dtype == "uint8" else 2.0**-11
        if np.abs(store.read([clip])["RGB"][0].numpy() - wanted).max() > room:
            raise AssertionError(f"{name} was not stored as it was read")


def table(found: Sequence[Result]) -> Table:
    shown = Table("folder, GB", "store", title="Importing maps")
    columns = ("store, GB", "minutes", "seconds a GB", "of a core", "peak, MB", "before, MB", "own, MB", "of files, MB")
    for column in (*columns, f"within {LIMIT / 1e9:.0f} GB"):
        shown.add_column(column, justify="right")
    for one in found:
        sizes = [f"{size / 1e6:.0f}" for size in (one.peak, one.base, one.anon, one.file)]
        times = [f"{one.stored / 1e9:.1f}", f"{one.seconds / 60:.1f}", f"{one.seconds / one.read * 1e9:.2f}"]
        times.append(f"{one.cpu / one.read * 1e9:.2f}")
        shown.add_row(f"{one.read / 1e9:.1f}", one.dtype, *times, *sizes, "yes" if one.peak <= LIMIT else "no")
    return shown


def record(one: Result, where: dict[str, Any]) -> dict[str, Any]:
    return {
        "op": "importing",
        "dtype": one.dtype,
        "clips": one.clips,
        "read_gb": one.read / 1e9,
        "stored_gb": one.stored / 1e9,
        "seconds": one.seconds,
        "cpu_seconds": one.cpu,
        "base_mb": one.base / 1e6,
        "peak_mb": one.peak / 1e6,
        "own_mb": one.anon / 1e6,
        "file_mb": one.file / 1e6,
        **where,
    }


def resolve(options: Options) -> list[int]:
    """Clips of each folder; UsageError where the options cannot be."""
    if not Path("/proc/self/status").is_file():
        raise UsageError("memory is read from /proc, which this system does not have.")
    if not options.gigabytes or not all(0 < size <= 1e4 for size in options.gigabytes):
        raise UsageError("--gigabytes must be sizes of folders, above 0 and up to 10000.")
    for path, name in ((options.folder, "folder"), (options.json and options.json.parent, "json")):
        if path is not None and not path.is_dir():
            raise UsageError(f"--{name}: there is no folder {path}.")
    clips = [max(1, round(1e9 * size / CLIP_BYTES)) for size in options.gigabytes]
    place = options.folder or Path(tempfile.gettempdir())
    # The store, the files that are no links, and uint8 waits for its scale in float16, a shard at a time.
    needed = max(clips) * CLIP_BYTES / (2 if options.dtype == "float16" else 4) + REAL * CLIP_BYTES + MARGIN
    free = shutil.disk_usage(place).free
    if free < needed:
        raise UsageError(f"{place} has {free / 1e9:.1f} GB free, and {needed / 1e9:.1f} are needed.")
    return clips


def main(arguments: Sequence[str] | None = None) -> int:
    options: Options = _cli.cli(Options, arguments, description=__doc__, prog="python -m bench.importing")
    try:
        sizes = resolve(options)
        where, found = records.conditions(), []
        for clips in sizes:
            with tempfile.TemporaryDirectory(dir=options.folder, prefix="m3em-importing-") as folder:
                found.append(measure(Path(folder), clips, options.dtype))
        if options.json is not None:
            records.write_records(options.json, [record(one, where) for one in found])
    except (UsageError, OSError) as error:
        print(f"bench.importing: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("bench.importing: interrupted; nothing was kept.", file=sys.stderr)
        return 130
    console = Console() if sys.stdout.isatty() else Console(width=120)
    console.print(table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
