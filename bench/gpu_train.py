"""One epoch of train.py in float16 on a card, on the kernels and on the reference: its seconds, its memory, its losses.

    python -m bench.gpu_train --json FILE
    python -m bench.gpu_train --cpu           what the bound below was measured with: a minute, small, on the CPU

The data are random maps of the paper's size (RGB and flow 1024 x 7 x 7, audio 1024, five frames a clip) with random
labels, the model is the full M3EM with D = 512, and a step holds 128 source and 207 target clips. An epoch of one step
warms every backend up and is not timed. Seconds are those of a whole epoch of train.py: reading the store, steps,
evaluation of a few clips, checkpoint. The record is written after every epoch.

The losses of the kernels have to agree with the reference's. Both go through the same float16 layers and differ by
roundings alone; how much of a rounding arrives in a loss depends on model, data and step, so that no fixed number is
right. The run measures it: the reference does the epoch in float32 too, and the largest distance of its own float16
losses from those is what float16 costs here. The kernels may be ``ROUNDOFFS`` times as far from the float16 reference:
8 is what bfloat16 rounds more than float16 (2^-8 and 2^-11), and kernels that are as far away as bfloat16 would be do
not compute in float16. With the CPU's kernels (--cpu) they were 0.04 to 0.73 times as far, and a reference in bfloat16
2.6 to 13 times.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import train
from bench.records import conditions, write_records
from m3em_fast import _cli, backends
from m3em_fast.data.store import FeatureStoreWriter, Modality

MODALITIES = {
    "RGB": Modality("map", 5, 1024, 7, 7),
    "Flow": Modality("map", 5, 1024, 7, 7),
    "Audio": Modality("vector", 5, 1024),
}
CLASSES = {"verb": 97, "noun": 300}
STEPS, BATCHES = 4, {"source": 128, "target": 207}
EVALUATED = 16
ROUNDOFFS = torch.finfo(torch.bfloat16).eps / torch.finfo(torch.float16).eps
# The same on a CPU.
SMALL = {
    "RGB": Modality("map", 5, 32, 7, 7),
    "Flow": Modality("map", 5, 32, 7, 7),
    "Audio": Modality("vector", 5, 32),
}
SMALL_STEPS, SMALL_BATCHES, SEEDS = 6, {"source": 16, "target": 24}, range(4)
SMALL_SIZES = {"latent": 16, "reduction": 4, "fc_dim": 128, "relation_dim": 64, "threads": 1}


def write_stores(
    folder: Path, modalities: dict[str, Modality] = MODALITIES, steps: int = STEPS, batches: dict[str, int] = BATCHES
) -> None:
    """As many clips as ``steps`` take. A block of features serves all of them: their values take no time."""
    rng = np.random.default_rng(0)
    clips = {"source_train": steps * batches["source"], "target_train": steps * batches["target"]}
    clips |= dict.fromkeys(("source_val", "target_test"), EVALUATED)
    block = 32
    drawn = {name: rng.random((block, *m.shape), dtype=np.float32).astype(np.float16) for name, m in modalities.items()}
    for split, count in clips.items():
        with FeatureStoreWriter(folder / split, modalities, CLASSES) as writer:
            for first in range(0, count, block):
                size = min(block, count - first)
                labels = {kind: rng.integers(0, number, size) for kind, number in CLASSES.items()}
                ids = [f"{split}_{i}" for i in range(first, first + size)]
                writer.append(ids, {name: x[:size] for name, x in drawn.items()}, labels)


def epoch(backend: str, data: Path, run: Path, device: str, **options: Any) -> dict[str, Any]:
    """One epoch on a backend; its seconds and losses, and the most memory that torch gave out on the card."""
    # torch's initial weights: from those of the epic preset, all near zero, every loss would be the same.
    chosen = {"latent": 512, "reduction": 16, "fc_dim": 512, "relation_dim": 256, "dropout": 0.0}
    chosen |= {f"batch_{domain}": count for domain, count in BATCHES.items()}
    chosen |= {"init": "torch", "method": "m3em", "precision": "fp16", "epochs": 1, "lr": 0.003, "threads": 0}
    chosen |= {"device": device, **options}
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with backends.backend(backend):
        train.train(train.Options(data=data, run=run, **chosen))
    losses = json.loads((run / "metrics.json").read_text())["history"]["loss"]
    seconds = json.loads((run / "run.json").read_text())["seconds"]
    return {
        "backend": backend,
        "precision": chosen["precision"],
        "seconds": seconds,
        "steps": len(losses),
        "loss": losses,
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if device == "cuda" else None,
    }


def measure(
    chosen: Sequence[str], data: Path, first: Path, runs: Path, device: str, **options: Any
) -> Iterator[dict[str, Any]]:
    """An epoch on every backend, after one on the data in ``first`` that warms it up. The reference and, for the
    bound, its float32 come second, so that they are there whatever ends this."""
    kernels = [name for name in chosen if name != "reference"]
    for backend in [*kernels[:1], "reference", *kernels[1:]]:
        epoch(backend, first, runs / f"{backend}-first", device, **options)
        yield epoch(backend, data, runs / backend, device, **options)
        if backend == "reference":
            yield epoch(backend, data, runs / f"{backend}-fp32", device, **{**options, "precision": "fp32"})


def distance(losses: Sequence[float], others: Sequence[float]) -> list[float]:
    """Step by step, by the size of the other loss."""
    return [abs(own - other) / abs(other) for own, other in zip(losses, others, strict=True)]


def allowed(found: Sequence[dict[str, Any]]) -> float:
    """How far the kernels' losses may be from those of the float16 reference; see above."""
    half, single = (_losses(found, "reference", precision) for precision in ("fp16", "fp32"))
    # A loss is a float32: what that rounds is no finding.
    return ROUNDOFFS * max(*distance(half, single), torch.finfo(torch.float32).eps / 2)


def _losses(found: Sequence[dict[str, Any]], backend: str, precision: str) -> list[float]:
    return next(each["loss"] for each in found if (each["backend"], each["precision"]) == (backend, precision))


def disagreement(found: Sequence[dict[str, Any]]) -> str | None:
    """The first loss in which kernels differ from the reference by more than float16 explains."""
    bound, wanted = allowed(found), _losses(found, "reference", "fp16")
    for each in found:
        if each["backend"] == "reference":
            continue
        for step, off in enumerate(distance(each["loss"], wanted)):
            if not off <= bound:
                return (
                    f"{each['backend']}: loss {each['loss'][step]:.6f} at step {step}, the reference has "
                    f"{wanted[step]:.6f}: {off:.1e} of it, and {bound:.1e} is allowed"
                )
    return None


def survey(say: Callable[[str], object] = print) -> None:
    """Distances of losses on the CPU, for several seeds: of float16 and of bfloat16 from float32, and of the kernels'
    float16 from the reference's; the last two in units of the first."""
    say(f"{'seed':>4} {'float16':>9} {'bfloat16':>9} {'kernels':>9}")
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        write_stores(data, SMALL, SMALL_STEPS, SMALL_BATCHES)
        sizes = {**SMALL_SIZES, **{f"batch_{domain}": count for domain, count in SMALL_BATCHES.items()}}
        for seed in SEEDS:

            def losses(backend: str, precision: str, seed: int = seed) -> list[float]:
                run = Path(folder) / f"{backend}-{precision}-{seed}"
                return epoch(backend, data, run, "cpu", precision=precision, seed=seed, **sizes)["loss"]

            single, half, brain = (losses("reference", precision) for precision in ("fp32", "fp16", "bf16"))
            own = max(distance(half, single))
            others = (max(distance(brain, single)), max(distance(losses("cpu", "fp16"), half)))
            say(f"{seed:>4} {own:>9.1e} {others[0] / own:>9.2f} {others[1] / own:>9.2f}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _cli.Parser(prog="python -m bench.gpu_train", description=__doc__.splitlines()[0])
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--json", type=Path, help="where the record goes")
    where.add_argument("--cpu", action="store_true", help="on the CPU, small: what the bound was measured with")
    parser.add_argument("--conditions", type=json.loads, default={}, help="more for the record, as JSON")
    options = parser.parse_args(arguments)
    if options.cpu:
        survey()
        return 0
    if not torch.cuda.is_available():
        print("bench.gpu_train: torch sees no CUDA device here.", file=sys.stderr)
        return 2
    torch.backends.cudnn.allow_tf32 = False  # float32 is to be what float16 is compared with
    about = {"batch": BATCHES, **conditions("cuda"), **options.conditions}
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        data, first = Path(folder) / "data", Path(folder) / "first"
        write_stores(first, steps=1)
        write_stores(data)
        for each in measure(backends.available("cuda"), data, first, Path(folder) / "runs", "cuda"):
            found.append(each)
            write_records(options.json, [{**about, **one} for one in found])
            memory = f"{each['peak_memory_bytes'] / 2**30:.2f} GB at most"
            print(
                f"epoch of {each['steps']} steps, {each['backend']} in {each['precision']}: {each['seconds']:.2f} s, "
                f"{memory}, losses {' '.join(f'{loss:.6f}' for loss in each['loss'])}",
                flush=True,
            )
    if wrong := disagreement(found):
        print(f"bench.gpu_train: {wrong}.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
