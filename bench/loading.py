"""How fast batches come out of a feature store, against a plain copy of the same pages, and whether a V100 would wait.

    python -m bench.loading                     stores of 670 clips of the paper's size, 1 GB on the disk (2 minutes)
    python -m bench.loading --quick             whether it all runs; the figures mean nothing
    python -m bench.loading --json bench/results/loading.json

A clip is an RGB and a flow map, 5 x 1024 x 7 x 7. All ways to read take turns on the same shuffled batches, and ratios
are taken within a turn. The pages are in memory, as they are from the second epoch on where memory allows; what a disk
brings is a matter of the disk. "raw" copies clip after clip from the mapped shards into memory that was used before;
"read" is FeatureStore.read into fresh memory; "prefetch" is what training does. uint8 is delivered as float16.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from m3em_fast.data import _extra

if __name__ == "__main__":
    _extra.require("bench.loading", "rich", "tqdm", "tyro")

import numpy as np
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from bench import mutual_enhancement, records
from bench.case import Size
from bench.core import clock
from bench.step_memory import CLIPS, FRAMES, SIDE, SPATIAL
from m3em_fast import _cli
from m3em_fast.data.prefetch import Batch, BatchReader, Prefetch
from m3em_fast.data.store import FeatureStore, FeatureStoreWriter, Modality

TARGET = 0.7
# A V100 by its data sheet, and its products at two thirds of the peak, which is what docs/decisions.md reckons with.
V100_FLOPS, V100_BYTES, BUS_BYTES = 125e12 * 2 / 3, 900e9, 12e9  # the bus: PCIe 3.0 x16, as measured by many


@dataclass(frozen=True)
class Options:
    clips: int = 2 * CLIPS
    """Clips in a store."""
    batch: int = CLIPS
    """Clips in a batch."""
    channels: int = SPATIAL["RGB"]
    """C of the two maps."""
    batches: int = 12
    """Batches that are read in a turn. Of few, what the way before left in the cache would count."""
    rounds: int = 7
    """Turns of each way to read; the median counts."""
    workers: tuple[int, ...] = (1, 2)
    """Threads that read ahead."""
    folder: Path | None = None
    """Where the stores are made for the time being. None: where the system has its temporary files."""
    json: Path | None = None
    """Write the records there; those worth keeping go to bench/results/."""
    quick: bool = False
    """Small stores and few rounds, to see that everything runs."""


class UsageError(ValueError):
    """Something the user can put right; the message is one sentence."""


@dataclass(frozen=True)
class Result:
    """One way to read, of one store.

    Attributes:
        seconds: of a turn, each.
        ratio: to "raw" with as many threads, of the same pages; above 1: faster.
    """

    way: str
    dtype: str
    workers: int
    seconds: tuple[float, ...]
    stored: int
    delivered: int
    ratio: float

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def make_store(path: Path, dtype: str, options: Options) -> FeatureStore:
    rng = np.random.default_rng(0)
    maps = {name: Modality("map", FRAMES, options.channels, SIDE, SIDE, dtype) for name in SPATIAL}
    block = {name: rng.random((16, *m.shape), dtype=np.float32) for name, m in maps.items()}
    scales = {name: np.full(m.channels, 1 / 255) for name, m in maps.items()} if dtype == "uint8" else None
    with (
        FeatureStoreWriter(path, maps, scales=scales) as writer,
        tqdm(total=options.clips, desc=f"{dtype} store") as bar,
    ):
        for start in range(0, options.clips, 16):
            count = min(16, options.clips - start)
            shifted = {name: np.roll(x, start, axis=2)[:count] for name, x in block.items()}  # no two clips are alike
            writer.append([str(i) for i in range(start, start + count)], shifted)
            bar.update(count)
    return FeatureStore(path, verify=True)


class Raw:
    """A plain copy of clips from the mapped files, by as many threads as there are buffers, a batch each."""

    def __init__(self, store: FeatureStore, batch: int, workers: int) -> None:
        self.maps = {
            name: [np.load(path, mmap_mode="r") for path in sorted(store.path.glob(f"{name}-*.npy"))]
            for name in store.modalities
        }
        self.places: dict[str, list[tuple[int, int]]] = {
            name: [(number, row) for number, shard in enumerate(shards) for row in range(len(shard))]
            for name, shards in self.maps.items()
        }
        self.flat = {name: [np.asarray(shard) for shard in shards] for name, shards in self.maps.items()}
        self.rooms = [
            {name: np.zeros((batch, *shards[0].shape[1:]), shards[0].dtype) for name, shards in self.flat.items()}
            for _ in range(workers)
        ]
        self.pool = ThreadPoolExecutor(workers)

    def copy(self, room: dict[str, np.ndarray], batch: np.ndarray) -> None:
        for name, out in room.items():
            shards, places = self.flat[name], self.places[name]
            for place, clip in enumerate(batch.tolist()):
                number, row = places[clip]
                out[place] = shards[number][row]

    def __call__(self, batches: Sequence[np.ndarray]) -> None:
        def run(number: int) -> None:
            for batch in batches[number :: len(self.rooms)]:
                self.copy(self.rooms[number], batch)

        list(self.pool.map(run, range(len(self.rooms))))


def ways(store: FeatureStore, batch: int, workers: Sequence[int]) -> dict[tuple[str, int], Callable[..., None]]:
    """(way, threads) -> what reads some batches."""

    def fresh(batches: Sequence[np.ndarray]) -> None:
        for part in batches:
            store.read(part)

    def ahead(count: int) -> Callable[..., None]:
        reader = BatchReader([store], store.modalities, FRAMES)
        spare: list[Batch] = []

        def read(batches: Sequence[np.ndarray]) -> None:
            used: dict[int, Batch] = {}

            def into_used_memory(item: tuple[np.ndarray], room: Batch) -> Batch:
                # A training makes its memory once, and a turn is too short for that.
                if not room and spare:
                    room.update(spare.pop())
                used[id(room)] = room
                return reader(item, room)

            with Prefetch(((part,) for part in batches), into_used_memory, depth=count, workers=count) as found:
                for _ in found:
                    pass
            spare.extend(used.values())

        return read

    found: dict[tuple[str, int], Callable[..., None]] = {}
    for count in workers:
        found["raw", count] = Raw(store, batch, count)
        found["prefetch", count] = ahead(count)
    found["read", workers[0]] = fresh
    return found


def check(store: FeatureStore, batch: np.ndarray, raw: Raw) -> None:
    """What is timed delivers what is stored."""
    raw.copy(raw.rooms[0], batch)
    with Prefetch([(batch,)], BatchReader([store], store.modalities, FRAMES)) as found:
        for _, features in found:
            for name, x in features.items():
                wanted = raw.rooms[0][name][: len(batch)].astype(np.float32)
                wanted = wanted if store.modalities[name].dtype == "float16" else wanted * np.float32(1 / 255)
                if not np.array_equal(x.numpy(), wanted.astype(np.float16)):
                    raise AssertionError(f"{name} was not read as it is stored")


def measure(store: FeatureStore, options: Options) -> list[Result]:
    rng = np.random.default_rng(1)
    batch = min(options.batch, options.clips)

    def drawn(count: int) -> list[np.ndarray]:
        return [rng.permutation(options.clips)[:batch] for _ in range(count)]

    todo = ways(store, batch, options.workers)
    raw = todo["raw", options.workers[0]]
    assert isinstance(raw, Raw)
    check(store, drawn(1)[0], raw)
    times: dict[tuple[str, int], list[float]] = {key: [] for key in todo}
    for number in tqdm(range(options.rounds + 1), desc=f"reading {store.path.name}", unit="turn"):
        batches = drawn(options.batches)
        for key, read in todo.items():
            start = clock()
            read(batches)
            if number:  # the first one warms up
                times[key].append(clock() - start)
    dtype = next(iter(store.modalities.values())).dtype
    elements = options.batches * batch * sum(int(np.prod(m.shape)) for m in store.modalities.values())
    stored = elements * (2 if dtype == "float16" else 1)
    found = []
    for (way, count), seconds in times.items():
        ratios = [raw / own for raw, own in zip(times["raw", count], seconds, strict=True)]
        found.append(Result(way, dtype, count, tuple(seconds), stored, 2 * elements, statistics.median(ratios)))
    return found


def step_of_a_v100() -> tuple[float, int, int]:
    """Seconds of a training step of the paper's size at best, its bytes, and its floating-point operations.

    Floors of the module's ops (:func:`bench.mutual_enhancement.moved`), forward and backward with frozen features:
    products at two thirds of the peak, and then the traffic at the data sheet's bandwidth. What is left out (gates,
    TA3N, the optimizer, the host) only makes a step longer.
    """
    size = Size(n=CLIPS * FRAMES, c=SPATIAL["RGB"], d=512, h=SIDE, w=SIDE)
    moved, flops = mutual_enhancement.moved(size, 2, 2, False).of("forward+backward")
    return flops / V100_FLOPS + moved / V100_BYTES, moved, flops


def table(found: Sequence[Result]) -> Table:
    shown = Table("store", "way", "threads", title="Loading")
    for column in ("stored GB/s", "delivered GB/s", "of raw", f"at least {TARGET:.0%}"):
        shown.add_column(column, justify="right")
    for one in found:
        met = "" if one.way != "prefetch" else "yes" if one.ratio >= TARGET else "no"
        speeds = [f"{size / one.median / 1e9:.2f}" for size in (one.stored, one.delivered)]
        if one.way == "raw":
            speeds[1] = ""
        shown.add_row(one.dtype, one.way, str(one.workers), *speeds, f"{one.ratio:.0%}", met)
    return shown


def verdict(found: Sequence[Result]) -> list[str]:
    """What a V100 needs, and whether this machine brings it."""
    seconds, moved, flops = step_of_a_v100()
    size = 2 * CLIPS * FRAMES * sum(SPATIAL.values()) * SIDE * SIDE
    needed = size / seconds
    lines = [
        f"A step of {CLIPS} clips takes a V100 {1e3 * seconds:.1f} ms at best, of {flops / 1e9:.0f} GFLOP and "
        f"{moved / 1e9:.2f} GB: it needs {needed / 1e9:.1f} GB/s of float16 maps, {needed / 2e9:.1f} GB/s of uint8.",
        f"Its bus brings {BUS_BYTES / 1e9:.0f} GB/s, a batch of float16 in {1e3 * size / BUS_BYTES:.1f} ms.",
    ]
    for dtype in dict.fromkeys(one.dtype for one in found):
        best = min((one for one in found if (one.way, one.dtype) == ("prefetch", dtype)), key=lambda one: one.median)
        speed = best.delivered / best.median
        for name, wanted in (("step", needed), ("bus", min(needed, BUS_BYTES))):
            met = "met" if speed >= wanted else "not met"
            lines.append(f"{dtype}: {speed / 1e9:.2f} GB/s delivered here, {wanted / 1e9:.1f} for the {name}: {met}.")
    return lines


def record(one: Result, options: Options, where: dict[str, Any]) -> dict[str, Any]:
    low, middle, high = (float(x) for x in np.percentile(one.seconds, (20, 50, 80)))
    return {
        "op": "loading",
        "way": one.way,
        "dtype": one.dtype,
        "workers": one.workers,
        "clips": options.clips,
        "batch": min(options.batch, options.clips),
        "batches": options.batches,
        "channels": options.channels,
        "rounds": len(one.seconds),
        "p20_ms": low * 1e3,
        "p50_ms": middle * 1e3,
        "p80_ms": high * 1e3,
        "stored_gb_per_s": one.stored / middle / 1e9,
        "delivered_gb_per_s": None if one.way == "raw" else one.delivered / middle / 1e9,
        "ratio_to_raw": one.ratio,
        **where,
    }


def resolve(options: Options) -> Options:
    """The options in use; UsageError where one cannot be."""
    if options.quick:
        small = Options(clips=24, batch=10, channels=32, batches=2, rounds=2)
        options = replace(small, workers=options.workers, folder=options.folder, json=options.json, quick=True)
    for name in ("clips", "batch", "channels", "batches", "rounds"):
        if getattr(options, name) < 1:
            raise UsageError(f"--{name} must be at least 1, got {getattr(options, name)}.")
    if not options.workers or min(options.workers) < 1:
        raise UsageError("--workers must be numbers of threads, at least 1 each.")
    for path, name in ((options.folder, "folder"), (options.json and options.json.parent, "json")):
        if path is not None and not path.is_dir():
            raise UsageError(f"--{name}: there is no folder {path}.")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options: Options = _cli.cli(Options, arguments, description=__doc__, prog="python -m bench.loading")
    try:
        options = resolve(options)
        where, found = records.conditions(), []
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            for dtype in ("float16", "uint8"):
                found += measure(make_store(Path(folder) / dtype, dtype, options), options)
        if options.json is not None:
            records.write_records(options.json, [record(one, options, where) for one in found])
    except (UsageError, OSError) as error:
        print(f"bench.loading: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("bench.loading: interrupted; nothing was kept.", file=sys.stderr)
        return 130
    console = Console() if sys.stdout.isatty() else Console(width=120)
    console.print(table(found))
    for line in verdict(found):
        console.print(line, highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
