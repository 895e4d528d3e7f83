"""One epoch of train.py in float16 on a card, on the kernels and on the reference: its seconds, its memory, its losses.

    python -m bench.gpu_train --json FILE

The data are random maps of the paper's size (RGB and flow 1024 x 7 x 7, audio 1024, five frames a clip) with random
labels, the model is the full M3EM with D = 512, and a step holds 128 source and 207 target clips. A first epoch of
every backend warms up and is not timed. Seconds are those of a whole epoch of train.py: reading the store, steps,
evaluation of a few clips, checkpoint. The losses of both have to agree as half precision lets them.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import train
from bench.records import conditions
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
# Of a loss: half precision has some eleven bits, and a loss is a mean over many clips.
AGREE = 5e-3


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
    sizes = {"latent": 512, "reduction": 16, "fc_dim": 512, "relation_dim": 256, "dropout": 0.0}
    sizes |= {f"batch_{domain}": count for domain, count in BATCHES.items()}
    chosen = {
        "init": "torch",
        "method": "m3em",
        "precision": "fp16",
        "epochs": 1,
        "lr": 0.003,
        "device": device,
        "threads": 0,
    }
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with backends.backend(backend):
        train.train(train.Options(data=data, run=run, **{**sizes, **chosen, **options}))
    losses = json.loads((run / "metrics.json").read_text())["history"]["loss"]
    seconds = json.loads((run / "run.json").read_text())["seconds"]
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else None
    return {"backend": backend, "seconds": seconds, "steps": len(losses), "loss": losses, "peak_memory_bytes": peak}


def measure(chosen: Sequence[str], data: Path, runs: Path, device: str, **options: Any) -> list[dict[str, Any]]:
    """Every backend twice; the second time counts."""
    found = []
    for backend in chosen:
        epoch(backend, data, runs / f"{backend}-first", device, **options)
        found.append(epoch(backend, data, runs / backend, device, **options))
    return found


def disagreement(found: Sequence[dict[str, Any]]) -> str | None:
    """The first loss in which a backend differs from the last of them by more than half precision explains."""
    *others, reference = found
    for each in others:
        for step, (own, wanted) in enumerate(zip(each["loss"], reference["loss"], strict=True)):
            if not abs(own - wanted) <= AGREE * abs(wanted):
                return f"{each['backend']}: loss {own:.4f} at step {step}, {reference['backend']} has {wanted:.4f}"
    return None


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _cli.Parser(prog="python -m bench.gpu_train", description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, required=True, help="where the record goes")
    parser.add_argument("--conditions", type=json.loads, default={}, help="more for the record, as JSON")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("bench.gpu_train: torch sees no CUDA device here.", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        write_stores(Path(folder) / "data")
        found = measure(backends.available("cuda"), Path(folder) / "data", Path(folder) / "runs", "cuda")
    where = {**conditions("cuda"), **options.conditions}
    records = [{**each, "batch": BATCHES, "precision": "fp16", **where} for each in found]
    options.json.write_text(json.dumps(records, indent=1) + "\n")
    for each in found:
        memory = f"{each['peak_memory_bytes'] / 2**30:.2f} GB at most"
        print(f"{each['backend']:9} {each['seconds']:7.2f} s an epoch of {each['steps']} steps, {memory}")
    if wrong := disagreement(found):
        print(f"bench.gpu_train: {wrong}.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
