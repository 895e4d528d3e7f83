"""Generated features under real narration ids and labels: everything around the challenge runs without its features.

``python -m m3em_fast.epic.generate --annotations DIR --out OUT --clips 400`` makes a feature store for each split of
the val protocol (with ``--protocols val test`` of both), which hold all that Models A to D and the baseline read, and
OUT/annotations, the label files cut down to the same clips. A figure reached on them says that the programs work, and
nothing about kitchens.

A feature is noise, not negative, as behind a ReLU; where the action is, which all modalities of a clip agree on, lies
the sum of a code of its verb and one of its noun, and somewhere else a thing that has no class. The target domain has
other gains and offsets of every channel, and codes that are turned a little.
"""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from m3em_fast.data._extra import needs
from m3em_fast.data.store import FeatureStoreWriter, Modality
from m3em_fast.epic import _program
from m3em_fast.epic._errors import EpicError
from m3em_fast.epic.annotations import CLASSES, PROTOCOLS, SPLITS, TAIL, UNSEEN, Annotations, Split, annotations_folder

__all__ = ["OBJECT_CLASSES", "Sizes", "features_of", "generate"]

OBJECT_CLASSES = 352
"""Classes of the object detector (fpv-iplab/rulstm); a feature is the sum of the confidences under each of them."""
# How loud verb and noun are in a modality. Audio alone carries no position.
LOUD = {
    "RGB": (0.6, 1.5),
    "Flow": (1.5, 0.4),
    "RGB-crop": (0.6, 1.5),
    "Flow-crop": (1.5, 0.4),
    "RGB-I3D": (1.0, 1.2),
    "Flow-I3D": (1.5, 0.4),
    "Audio": (0.8, 0.4),
}
TURNED, GAIN, OFFSET, NOISE, RADIUS = 0.45, 0.25, 0.25, 0.5, 1.2
STORED = {"map": 5, "vector": 25}
BATCH = 32


@dataclass(frozen=True)
class Sizes:
    """What the features look like.

    Attributes:
        side: height and width of maps; 7 behind TBN and I3D.
        map_channels: of maps; 1024 behind TBN and I3D.
        vector_channels: of Audio; 1024 behind TBN.
        pooled: RGB, Flow and the others as vectors of 25 frames, like the public features, instead of maps of 5.
    """

    side: int = 7
    map_channels: int = 32
    vector_channels: int = 64
    pooled: bool = False

    def modalities(self) -> dict[str, Modality]:
        """Of the feature stores."""
        vector = Modality("vector", STORED["vector"], self.map_channels)
        spatial = vector if self.pooled else Modality("map", STORED["map"], self.map_channels, self.side, self.side)
        forms = dict.fromkeys([name for name in LOUD if name != "Audio"], spatial)
        forms["Audio"] = Modality("vector", STORED["vector"], self.vector_channels)
        forms["Objects"] = Modality("vector", STORED["vector"], OBJECT_CLASSES)
        return forms


def _codes(seed: int, name: str, classes: dict[str, int], channels: int, target: bool) -> dict[str, np.ndarray]:
    """Codes of verbs and nouns (classes, C), gain and offset (C,) of one modality in one domain."""
    rng = np.random.default_rng([seed, 1, *name.encode()])
    found = {kind: rng.standard_normal((count, channels)) for kind, count in classes.items()}
    turned = {kind: rng.standard_normal(codes.shape) for kind, codes in found.items()}
    gain, offset = np.exp(GAIN * rng.standard_normal(channels)), OFFSET * np.abs(rng.standard_normal(channels))
    if not target:
        return {**found, "gain": np.ones(channels), "offset": np.zeros(channels)}
    mixed = {kind: np.cos(TURNED) * codes + np.sin(TURNED) * turned[kind] for kind, codes in found.items()}
    return {**mixed, "gain": gain, "offset": offset}


def features_of(
    seed: int, split: str, row: int, verb: int, noun: int, codes: dict[str, dict[str, np.ndarray]], sizes: Sizes
) -> dict[str, np.ndarray]:
    """Features of one clip, float16: (frames, C, H, W) or (frames, C) a modality.

    The same arguments give the same features, whatever other clips there are.
    """
    rng = np.random.default_rng([seed, 2, *split.encode(), row])
    where, elsewhere = (_places(rng, sizes.side) for _ in range(2))
    features = {}
    for name, form in sizes.modalities().items():
        if name == "Objects":
            features[name] = _objects(rng, noun, form.frames)
            continue
        code, (verb_loud, noun_loud) = codes[name], LOUD[name]
        signal = verb_loud * code["verb"][verb] + noun_loud * code["noun"][noun]
        if name == "Audio":
            values = signal + rng.standard_normal((form.frames, form.channels))
            features[name] = (np.maximum(values, 0) * code["gain"] + code["offset"]).astype(np.float16)
            continue
        shape = (STORED["map"], form.channels, sizes.side, sizes.side)
        values = NOISE * rng.standard_normal(shape)
        values += where[:, None] * signal[:, None, None]
        values += elsewhere[:, None] * rng.standard_normal(form.channels)[:, None, None]
        values = np.maximum(values, 0) * code["gain"][:, None, None] + code["offset"][:, None, None]
        if sizes.pooled:
            values = np.repeat(values.mean((2, 3)), STORED["vector"] // STORED["map"], axis=0)
        features[name] = values.astype(np.float16)
    return features


def _places(rng: np.random.Generator, side: int) -> np.ndarray:
    """How near each position is to a point that drifts, (frames, H, W)."""
    start, drift = rng.uniform(0, side - 1, 2), rng.uniform(-0.3, 0.3, 2)
    points = start + drift * np.arange(STORED["map"])[:, None]
    grid = np.arange(side)
    far = (grid[None, :, None] - points[:, :1, None]) ** 2 + (grid[None, None, :] - points[:, None, 1:]) ** 2
    return 2.0 * np.exp(-far / (2 * RADIUS**2))


def _objects(rng: np.random.Generator, noun: int, frames: int) -> np.ndarray:
    seen = np.zeros((frames, OBJECT_CLASSES))
    for frame in seen:
        for others in rng.integers(0, OBJECT_CLASSES, 3):
            frame[others] += rng.uniform(0.1, 0.6)
        if rng.random() < 0.6:
            frame[noun % OBJECT_CLASSES] += rng.uniform(0.4, 1.0)
    return seen.astype(np.float16)


def _chosen(split: Split, clips: int, seed: int) -> np.ndarray:
    """Rows of ``clips`` clips drawn at random, all of them where there are fewer, in the file's order."""
    rng = np.random.default_rng([seed, 3, *split.name.encode()])
    return np.sort(rng.permutation(len(split.table))[:clips])


def _labels(split: Split, source: Split, rows: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """Labels of some rows; drawn from the actions of ``source`` where a split has none."""
    if split.labels is not None:
        return {kind: values[rows] for kind, values in split.labels.items()}
    assert source.labels is not None
    drawn = np.random.default_rng([seed, 4, *split.name.encode()]).integers(0, len(source.table), len(split.table))
    return {kind: values[drawn[rows]] for kind, values in source.labels.items()}


def generate(
    out: Path,
    annotations: Path | None = None,
    clips: int = 400,
    protocols: tuple[Literal["val", "test"], ...] = ("val",),
    side: int = 7,
    map_channels: int = 32,
    vector_channels: int = 64,
    pooled: bool = False,
    seed: int = 0,
    published: bool = True,
) -> None:
    """Make feature stores of generated features under the challenge's narration ids and labels.

    Args:
        out: Folder to make.
        annotations: Folder of EPIC_100_*.csv. None: what M3EM_EPIC_ANNOTATIONS says.
        clips: Clips drawn from each split; all of them where it has fewer.
        protocols: Whose splits.
        side: Height and width of maps.
        map_channels: Channels of maps; TBN and I3D have 1024.
        vector_channels: Channels of Audio; TBN has 1024.
        pooled: Vectors instead of maps, like the public features: CMC has nothing to compare then.
        seed: Draws clips and features.
        published: Refuse label files that do not hold as much as the published ones.
    """
    facts = {"clips": clips, "side": side, "map-channels": map_channels, "vector-channels": vector_channels}
    for name, value in facts.items():
        if value < 1:
            raise EpicError(f"--{name} must be positive, got {value}.")
    if not 0 <= seed < 2**32:
        raise EpicError(f"--seed must be from 0 to 2**32 - 1, got {seed}.")
    if not protocols:
        raise EpicError("--protocols must be val, test or both.")
    if out.exists():
        raise EpicError(f"{out} already exists; nothing is written over.")
    labels = Annotations(annotations_folder(annotations), published)
    sizes = Sizes(side, map_channels, vector_channels, pooled)
    partial = out.with_name(f".{out.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        (partial / "annotations").mkdir(parents=True)
        for file, _ in (*CLASSES.values(), *TAIL.values(), *UNSEEN.values()):
            shutil.copyfile(labels.folder / file, partial / "annotations" / file)
        rows = {}
        for protocol in protocols:
            plan = PROTOCOLS[protocol]
            # source_val, too, under the test protocol: it is reported on, and ensembles are weighed on it.
            for name in (plan.source, PROTOCOLS["val"].source, plan.target, plan.report):
                if name not in rows:
                    rows[name] = _chosen(labels.split(name), clips, seed)
                    _write(partial, labels, name, labels.split(plan.source), rows[name], sizes, seed)
        partial.rename(out)
    except OSError as error:
        raise EpicError(f"{out} could not be made ({error.strerror or error}).") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    _say(out, labels, rows)


def _write(
    folder: Path, labels: Annotations, name: str, source: Split, rows: np.ndarray, sizes: Sizes, seed: int
) -> None:
    """The store of one split, and its label file."""
    split = labels.split(name)
    split.table.iloc[rows].to_csv(folder / "annotations" / SPLITS[name].file, index=False, lineterminator="\n")
    classes = {kind: len(names) for kind, names in labels.classes.items()}
    channels = {one: form.channels for one, form in sizes.modalities().items() if one in LOUD}
    target = name.startswith("target")
    codes = {one: _codes(seed, one, classes, count, target) for one, count in channels.items()}
    drawn = _labels(split, source, rows, seed)
    meta = {"benchmark": "epic-generated", "split": name, "seed": seed, "clips_of_split": len(split.table)}
    tqdm = needs("tqdm", "epic").tqdm
    with (
        FeatureStoreWriter(folder / name, sizes.modalities(), classes, meta) as writer,
        tqdm(total=len(rows), desc=name, unit="clip", leave=False, delay=1) as bar,
    ):
        for start in range(0, len(rows), BATCH):
            part = range(start, min(start + BATCH, len(rows)))
            made = [
                features_of(seed, name, int(rows[i]), int(drawn["verb"][i]), int(drawn["noun"][i]), codes, sizes)
                for i in part
            ]
            known = None if split.labels is None else {kind: values[list(part)] for kind, values in drawn.items()}
            features = {one: np.stack([clip[one] for clip in made]) for one in sizes.modalities()}
            writer.append([split.ids[rows[i]] for i in part], features, known)
            bar.update(len(part))


def _say(out: Path, labels: Annotations, rows: dict[str, np.ndarray]) -> None:
    """What was drawn, and how many of the classes it covers."""
    table = needs("rich.table", "epic").Table(title=f"Generated features in {out}", header_style="bold")
    table.add_column("split", no_wrap=True)
    for column in ("clips", "verb classes", "noun classes", "actions"):
        table.add_column(column, justify="right")
    for name, chosen in rows.items():
        known, cells = labels.split(name).labels, [f"{len(chosen)} of {len(labels.split(name).table)}"]
        if known is None:
            table.add_row(name, *cells, *["no labels"] * 3)
            continue
        for values in (known["verb"], known["noun"], known["verb"] * 2**31 + known["noun"]):
            cells.append(f"{len(np.unique(values[chosen]))} of {len(np.unique(values))}")
        table.add_row(name, *cells)
    _program.console().print(table)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line of :func:`generate`."""
    return _program.run(generate, arguments, "m3em_fast.epic.generate")


if __name__ == "__main__":
    raise SystemExit(main())
