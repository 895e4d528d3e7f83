"""Make the digits benchmark's feature stores, stage by stage; a stage that is there already is used again.

Stages carry a hash of everything they depend on and get their name when they are complete, so an interrupted run
continues at the first unfinished one, and nothing is taken for what it is not.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import shutil
import sys
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .._extra import needs
from .._manifest import sha256
from ..store import FeatureStore, FeatureStoreWriter, Modality, StoreError
from .backbones import RECIPES, Backbone, accuracy, extract, train
from .render import ClipSpec, plan, render_clips
from .settings import FRAMES, NOUNS, SPLITS, VERBS, DigitsConfig, digest
from .workers import Workers, default_workers, tick

CHUNK = 25
_TRAINING = ("source_train", "source_val")  # splits that the backbones need
MAP_SIDE = 7
_ARRAYS = {"RGB": "rgb", "Flow": "flow", "Audio": "audio"}
_MEGABYTE = 2**20


def _split_facts(config: DigitsConfig, split: str) -> dict[str, Any]:
    """What the frames of a split depend on, as arguments of DigitsConfig."""
    side = "source" if split.startswith("source") else "target"
    return {"seed": config.seed, side: getattr(config, side), split: config.size(split)}


def _backbone_facts(config: DigitsConfig, modality: str) -> dict[str, Any]:
    epochs = f"{modality.lower()}_epochs"
    facts = _split_facts(config, "source_train") | _split_facts(config, "source_val")
    return facts | {"channels": config.channels, epochs: getattr(config, epochs)}


def _feature_facts(config: DigitsConfig, split: str) -> dict[str, Any]:
    facts = _split_facts(config, split)
    for modality in RECIPES:
        facts |= _backbone_facts(config, modality)
    # Left out where it is the default: stores that were made when there was no other stay valid.
    return facts | ({} if config.dtype == "float16" else {"dtype": config.dtype})


def _named(kind: str, look: str, config: DigitsConfig, facts: dict[str, Any]) -> str:
    domain = config.domain("source_train"), config.domain("target_train") if "target" in facts else None
    return f"{kind}-{look}-seed{config.seed}-{digest({'kind': kind, 'facts': facts, 'domains': domain})}"


def _store_key(config: DigitsConfig, split: str) -> str:
    return _named(split, getattr(config, split.split("_")[0]), config, _feature_facts(config, split))


def _check_store(path: Path, config: DigitsConfig, split: str) -> None:
    """Refuse a store that is damaged or was made with other settings."""
    try:
        meta = FeatureStore(path).meta
    except StoreError as error:
        raise StoreError(f"{str(error).rstrip('.')}; delete {path} to have it made again.") from error
    if meta.get("key") != _store_key(config, split):
        asked, found = _feature_facts(config, split) | {"dtype": config.dtype}, meta.get("config")
        found = {"dtype": DigitsConfig.dtype} | (found if isinstance(found, dict) else {})
        other = [
            f"{name} {found.get(name)} and not {value}" for name, value in asked.items() if found.get(name) != value
        ]
        why = ", ".join(other) or "another version of the benchmark"
        raise StoreError(f"{path} was made with {why}; choose another folder, or delete this one.")


def backbone_path(root: Path, config: DigitsConfig, modality: str) -> Path:
    """Checkpoint of the backbone of a modality, whether it has been made or not."""
    return root / f"{_named(f'backbone-{modality}', config.source, config, _backbone_facts(config, modality))}.pt"


def _raw_path(root: Path, config: DigitsConfig, split: str) -> Path:
    return root / _named(f"raw-{split}", config.source, config, _split_facts(config, split))


def prepare(
    root: str | os.PathLike[str],
    config: DigitsConfig | None = None,
    progress: bool = True,
    workers: int | None = None,
) -> dict[str, Path]:
    """Make the benchmark, or find it made.

    The stores take 60 MB per 1000 clips; frames of the source take 120 MB per 1000 clips until they are made.

    Args:
        root: folder for one configuration; it is created.
        config: what to make; the default configuration by default.
        progress: show a progress bar for every stage.
        workers: processes; one per core, at most eight, by default. The result does not depend on it.

    Returns:
        split -> ``root/split``, its feature store, for each of ``SPLITS``. RGB and Flow are maps (5, C, 7, 7), Audio is
        a vector (5, C), all divided by one number a modality, its root mean square over source_train, and read as
        float16. With ``config.dtype`` uint8 the maps are stored as such, and are otherwise the same.

    Raises:
        ImportError: scikit-learn, scikit-image or OpenCV is missing; the message names the extra.
        StoreError: a store in ``root`` was altered, or made with another configuration.
        OSError: ``root`` cannot be written.
    """
    root, config = Path(root), config or DigitsConfig()
    root.mkdir(parents=True, exist_ok=True)
    paths = {split: root / split for split in SPLITS}
    for split, path in paths.items():
        if path.exists():
            _check_store(path, config, split)
    raws = [_raw_path(root, config, split) for split in _TRAINING]
    if not all(path.exists() for path in paths.values()) or any(raw.exists() for raw in raws):
        with Workers(workers or default_workers()) as pool, _alone(root):
            if not all(path.exists() for path in paths.values()):
                _Stages(root, config, pool, progress).run(paths)
            for raw in raws:
                shutil.rmtree(raw, ignore_errors=True)
            for split, path in paths.items():
                _check_store(path, config, split)
    return paths


@contextlib.contextmanager
def _alone(root: Path) -> Iterator[None]:
    """Let one process at a time make things in ``root``; the lock falls when its holder dies."""
    try:
        import fcntl
    except ImportError:  # no such locks on Windows: two processes then do the same work twice
        yield
        return
    with open(root / ".lock", "a") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            print(f"Another process is making things in {root}; waiting for it.", file=sys.stderr)
            fcntl.flock(handle, fcntl.LOCK_EX)
        for rest in root.glob(".*.partial"):
            shutil.rmtree(rest) if rest.is_dir() else rest.unlink()
        yield


@dataclass(frozen=True)
class _TrainJob:
    modality: str
    raw: Path
    raw_val: Path
    out: Path
    config: DigitsConfig


def _train_job(job: _TrainJob) -> None:
    config, key = job.config, _ARRAYS[job.modality]
    label = RECIPES[job.modality].label
    clips, labels = (np.load(job.raw / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in (key, label))
    epochs = getattr(config, f"{job.modality.lower()}_epochs")
    net = train(job.modality, clips, labels, config.channels, epochs, config.seed, tick)
    square = [
        float(extract(net, job.modality, clips[start : start + CHUNK]).double().square().sum())
        for start in range(0, len(clips), CHUNK)
    ]
    side = 1 if job.modality == "Audio" else MAP_SIDE
    rms = (sum(square) / (len(clips) * FRAMES * config.channels * side**2)) ** 0.5
    val, val_labels = (np.load(job.raw_val / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in (key, label))
    state = {
        "weights": net.state_dict(),
        "channels": config.channels,
        "rms": rms,
        "label": label,
        "source_val_accuracy": accuracy(net, job.modality, val, val_labels),
    }
    with _renamed(job.out) as temporary:
        torch.save(state, temporary)
        # Before the file has its name: there is none without its checksum.
        _checksum_path(job.out).write_text(f"{sha256(temporary)}  {job.out.name}\n")


@dataclass(frozen=True)
class _ExtractJob:
    specs: Sequence[ClipSpec]
    raw: Path | None
    start: int
    backbones: dict[str, Path]


def _extract_job(job: _ExtractJob) -> dict[str, np.ndarray]:
    if job.raw is None:
        clips = dict(zip(_ARRAYS, render_clips(job.specs), strict=True))
    else:
        part = slice(job.start, job.start + len(job.specs))
        clips = {
            m: np.load(job.raw / f"{key}.npy", mmap_mode="r", allow_pickle=False)[part] for m, key in _ARRAYS.items()
        }
    features = {}
    for modality, path in job.backbones.items():
        net, state = load_backbone(path, modality)
        scaled = extract(net, modality, clips[modality]) / state["rms"]
        features[modality] = scaled.clamp(max=65504).half().numpy()
    return features


def load_backbone(path: Path, modality: str) -> tuple[Backbone, dict[str, Any]]:
    """A trained backbone in evaluation mode, and what else its checkpoint holds (rms, label, source_val_accuracy).

    Raises:
        StoreError: the checkpoint is not the one that was written.
    """
    data, beside = path.read_bytes(), _checksum_path(path)
    try:
        said = beside.read_text(encoding="utf-8").split()[0]
    except (OSError, UnicodeDecodeError, IndexError):
        said = "nothing"
    found = hashlib.sha256(data).hexdigest()
    again = "delete it to have it made again"
    if found != said:
        raise StoreError(f"{path} was altered: its SHA-256 is {found}, {beside.name} says {said:.80}; {again}.")
    try:
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        net = Backbone(RECIPES[modality], state["channels"])
        net.load_state_dict(state["weights"])
    except Exception as error:  # somebody wrote file and checksum: it fails in any way he likes
        reason = " ".join(str(error).split()) or type(error).__name__
        raise StoreError(f"{path} is no backbone of {modality} ({reason:.80}); {again}.") from error
    return net.eval(), state


def _checksum_path(path: Path) -> Path:
    """A file beside it, of the form that ``sha256sum --check`` reads."""
    return path.with_name(f"{path.name}.sha256")


@contextlib.contextmanager
def _renamed(path: Path) -> Iterator[Path]:
    temporary = path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}.partial"
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


class _Stages:
    def __init__(self, root: Path, config: DigitsConfig, pool: Workers, progress: bool) -> None:
        self.root, self.config, self.pool, self.progress = root, config, pool, progress
        self.raws = {split: _raw_path(root, config, split) for split in _TRAINING}
        self.backbones = {modality: backbone_path(root, config, modality) for modality in RECIPES}

    def bar(self, what: str, total: int, unit: str) -> Any:
        return needs("tqdm").tqdm(
            total=total, desc=f"digits: {what}", unit=unit, disable=not self.progress, file=sys.stderr
        )

    def run(self, paths: dict[str, Path]) -> None:
        missing = [modality for modality, path in self.backbones.items() if not path.exists()]
        if missing:
            for split, raw in self.raws.items():
                if not raw.exists():
                    self.render(split, raw)
            self.train(missing)
        for split, path in paths.items():
            if not path.exists():
                self.extract(split, path)

    def render(self, split: str, out: Path) -> None:
        specs = plan(self.config, split)
        temporary = out.parent / f".{out.name}.{uuid.uuid4().hex[:8]}.partial"
        temporary.mkdir()
        arrays: dict[str, np.ndarray] = {}
        with self.bar(f"rendering {split}", len(specs), " clips") as bar:
            chunks = [specs[start : start + CHUNK] for start in range(0, len(specs), CHUNK)]
            for number, parts in enumerate(self.pool.map(render_clips, chunks)):
                for name, part in zip(_ARRAYS.values(), parts, strict=True):
                    if name not in arrays:
                        shape = (len(specs), *part.shape[1:])
                        arrays[name] = np.lib.format.open_memmap(temporary / f"{name}.npy", "w+", part.dtype, shape)
                    arrays[name][number * CHUNK : number * CHUNK + len(part)] = part
                bar.update(len(parts[0]))
        for array in arrays.values():
            array.flush()  # type: ignore[attr-defined]
        for label in ("verb", "noun"):
            np.save(temporary / f"{label}.npy", np.array([getattr(spec, label) for spec in specs], np.int64))
        os.replace(temporary, out)

    def train(self, missing: list[str]) -> None:
        # The longest job first, the others share the second core.
        jobs = [
            _TrainJob(
                modality, self.raws["source_train"], self.raws["source_val"], self.backbones[modality], self.config
            )
            for modality in missing
        ]
        epochs = sum(getattr(self.config, f"{modality.lower()}_epochs") for modality in missing)
        with self.bar(f"training backbones ({', '.join(missing)})", epochs * self.config.source_train, " clips") as bar:
            for _ in self.pool.map(_train_job, jobs, bar.update):
                pass

    def extract(self, split: str, out: Path) -> None:
        specs, config = plan(self.config, split), self.config
        raw = self.raws.get(split)
        if raw is not None and not raw.exists():
            raw = None
        shape = (FRAMES, config.channels, MAP_SIDE, MAP_SIDE)
        maps = {name: Modality("map", *shape, config.dtype) for name in ("RGB", "Flow")}
        modalities = maps | {"Audio": Modality("vector", FRAMES, config.channels)}
        states = {modality: load_backbone(path, modality)[1] for modality, path in self.backbones.items()}
        meta = {
            "benchmark": "digits",
            "split": split,
            "key": _store_key(config, split),
            "config": _feature_facts(config, split),
            "verbs": list(VERBS),
            "nouns": list(NOUNS),
            "rms": {modality: state["rms"] for modality, state in states.items()},
            "backbone_source_val_accuracy": {
                f"{modality} {state['label']}": state["source_val_accuracy"] for modality, state in states.items()
            },
        }
        starts = range(0, len(specs), CHUNK)
        jobs = [_ExtractJob(specs[start : start + CHUNK], raw, start, self.backbones) for start in starts]
        what = f"features of {split}" if raw else f"rendering and features of {split}"
        with (
            FeatureStoreWriter(out, modalities, {"verb": len(VERBS), "noun": len(NOUNS)}, meta) as writer,
            self.bar(what, len(specs), " clips") as bar,
        ):
            for job, features in zip(jobs, self.pool.map(_extract_job, jobs), strict=True):
                labels = {
                    "verb": np.array([spec.verb for spec in job.specs], np.int64),
                    "noun": np.array([spec.noun for spec in job.specs], np.int64),
                }
                ids = [f"{split}_{job.start + offset:05d}" for offset in range(len(job.specs))]
                writer.append(ids, features, labels)
                bar.update(len(ids))


def load_frames(
    origin: DigitsConfig | str | os.PathLike[str], split: str, indices: Sequence[int] | np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw clips again, for pictures: bit for bit what their features were made from.

    Args:
        origin: a configuration, the ``root`` of :func:`prepare`, or the split's store in it.
        split: one of ``SPLITS``.
        indices: positions (n,) in the split.

    Returns:
        frames (n, 5, 56, 56, 3) uint8, RGB; flow (n, 5, 56, 56, 2) float16 in units of 5 pixels a frame, x before y;
        log-spectrograms (n, 5, 32, 16) float32, low frequencies first.

    Raises:
        StoreError: ``origin`` is no such folder.
        IndexError: an index outside the split.
    """
    config = origin if isinstance(origin, DigitsConfig) else _config_of(Path(origin), split)
    specs = plan(config, split)
    wanted = [int(index) for index in indices]
    for index in wanted:
        if not 0 <= index < len(specs):
            raise IndexError(f"{split} has clips 0 to {len(specs) - 1}, got index {index}.")
    return render_clips([specs[index] for index in wanted])


def _config_of(path: Path, split: str) -> DigitsConfig:
    if (path / split).is_dir():
        path = path / split
    meta = FeatureStore(path).meta
    facts, names = meta.get("config"), {field.name for field in fields(DigitsConfig)}
    if meta.get("benchmark") != "digits" or not isinstance(facts, dict) or not set(facts) <= names:
        raise StoreError(f"{path} was not made by the digits benchmark.")
    if split != meta.get("split"):
        raise StoreError(f"{path} holds {meta.get('split')}, not {split}.")
    return DigitsConfig(**facts)
