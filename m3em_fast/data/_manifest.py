"""The feature store's manifest and what is checked about it before a byte of a shard is believed."""

from __future__ import annotations

import hashlib
import io
import json
import math
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np

FORMAT, VERSION, MANIFEST = "m3em-feature-store", 1, "manifest.json"
MAX_SHARD_BYTES = 256 * 2**20
LABELS = ("verb", "noun")
_MAX_MANIFEST_BYTES = 2**28
_MAX_EXTENT = 2**20
MAX_STEP = 256.9  # 255 steps of it still round to a finite float16
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}\.npy")


class StoreError(ValueError):
    """A store, or a request to one, is refused; the message is one sentence: what, where, and what was expected."""


@dataclass(frozen=True)
class Modality:
    """What one modality of a store looks like.

    Attributes:
        kind: "map" for feature maps (frames, C, H, W), "vector" for pooled features (frames, C).
        frames: stored frames per clip.
        channels: C.
        height: H, None for vectors.
        width: W, None for vectors.
        dtype: "float16", or "uint8" for non-negative features with one scale per channel.
    """

    kind: Literal["map", "vector"]
    frames: int
    channels: int
    height: int | None = None
    width: int | None = None
    dtype: str = "float16"

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one clip."""
        if self.kind == "vector":
            return (self.frames, self.channels)
        return (self.frames, self.channels, cast(int, self.height), cast(int, self.width))

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        """The dtype on disk."""
        return np.dtype("<f2" if self.dtype == "float16" else "|u1")

    @property
    def clip_bytes(self) -> int:
        """Bytes of one clip on disk."""
        return math.prod(self.shape) * self.numpy_dtype.itemsize


@dataclass(frozen=True)
class Shard:
    """One .npy file: ``clips`` clips of one modality, from clip ``start`` on."""

    modality: str
    file: str
    start: int
    clips: int
    bytes: int
    sha256: str
    scale: list[float] | None


@dataclass(frozen=True)
class Manifest:
    """A manifest that has passed every check."""

    clips: list[str]
    modalities: dict[str, Modality]
    labels: dict[str, np.ndarray] | None
    num_classes: dict[str, int]
    meta: dict[str, Any]
    shards: list[Shard]
    sha256: str


def _whole(value: Any, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def check_modality(name: Any, facts: Any, where: str) -> Modality:
    """The modality that ``facts`` describe; StoreError if they describe none."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise StoreError(f"{where}: a modality's name must be letters, digits, _ and -, at most 64, got {name!r:.80}.")
    if not isinstance(facts, dict) or set(facts) != {"kind", "frames", "channels", "height", "width", "dtype"}:
        raise StoreError(f"{where}: modality {name} must have kind, frames, channels, height, width and dtype.")
    if facts["kind"] not in ("map", "vector"):
        raise StoreError(f"{where}: modality {name} must be a map or a vector, got kind {facts['kind']!r:.80}.")
    if facts["dtype"] not in ("float16", "uint8"):
        raise StoreError(f"{where}: modality {name} must be float16 or uint8, got dtype {facts['dtype']!r:.80}.")
    extents = ("frames", "channels", "height", "width") if facts["kind"] == "map" else ("frames", "channels")
    for extent in extents:
        if not _whole(facts[extent], 1, _MAX_EXTENT):
            raise StoreError(f"{where}: {extent} of {name} must be from 1 to {_MAX_EXTENT}, got {facts[extent]!r:.80}.")
    if facts["kind"] == "vector" and not facts["height"] is facts["width"] is None:
        raise StoreError(f"{where}: modality {name} is a vector, so height and width must be None.")
    modality = Modality(**facts)
    if modality.clip_bytes + 128 > MAX_SHARD_BYTES:
        raise StoreError(
            f"{where}: one clip of {name} would take {modality.clip_bytes} bytes, more than a shard may hold."
        )
    return modality


def check_labels(labels: Any, num_classes: Mapping[str, int], count: int, where: str) -> dict[str, np.ndarray]:
    """Labels as int64 arrays (count,), each in the range that ``num_classes`` gives; StoreError otherwise."""
    if not isinstance(labels, Mapping) or set(labels) != set(num_classes):
        wanted = " and ".join(num_classes) or "no name"
        raise StoreError(f"{where}: labels must be given for {wanted}, the names in num_classes.")
    checked = {}
    for name, given in labels.items():
        try:
            values = np.asarray(given)
        except (ValueError, OverflowError, TypeError) as error:
            raise StoreError(f"{where}: {name} labels must be one row of integers.") from error
        if values.shape == (0,):
            values = values.astype(np.int64)
        if values.ndim != 1 or values.dtype.kind not in "iu":
            raise StoreError(f"{where}: {name} labels must be one row of integers.")
        if len(values) != count:
            raise StoreError(f"{where}: there are {count} clips but {len(values)} {name} labels.")
        outside = (values < 0) | (values >= num_classes[name])
        if outside.any():
            first = int(values[outside][0])
            raise StoreError(f"{where}: {name} label {first} is outside 0 to {num_classes[name] - 1}.")
        checked[name] = values.astype(np.int64)
    return checked


def check_num_classes(num_classes: Any, where: str) -> dict[str, int]:
    """``num_classes`` itself if it maps label names to numbers of classes; StoreError otherwise."""
    if not isinstance(num_classes, dict) or not set(num_classes) <= set(LABELS):
        raise StoreError(f"{where}: num_classes may have the names {' and '.join(LABELS)} only.")
    for name, classes in num_classes.items():
        if not _whole(classes, 1, _MAX_EXTENT):
            raise StoreError(f"{where}: num_classes of {name} must be from 1 to {_MAX_EXTENT}, got {classes!r:.80}.")
    return num_classes


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is no JSON")


def load_manifest(folder: Path) -> Manifest:
    """Read and check the manifest of a store; StoreError if anything about it is wrong."""
    path = folder / MANIFEST
    where = str(path)
    try:
        state = path.stat()
        if not stat.S_ISREG(state.st_mode):
            raise StoreError(f"{where} is no ordinary file.")
        if state.st_size > _MAX_MANIFEST_BYTES:
            raise StoreError(f"{where} has {state.st_size} bytes; a manifest has at most {_MAX_MANIFEST_BYTES}.")
        data = path.read_bytes()
        document = json.loads(data.decode("utf-8"), parse_constant=_no_constant)
    except OSError as error:
        raise StoreError(f"{folder} is no feature store: {MANIFEST} cannot be read ({error.strerror}).") from error
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise StoreError(f"{where} is no JSON document ({str(error)[:80]}).") from error
    except ValueError as error:
        if isinstance(error, StoreError):
            raise
        raise StoreError(f"{where} is no JSON document ({str(error)[:80]}).") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise StoreError(f"{where} is no feature store's manifest: its format should be {FORMAT!r}.")
    found = document.get("version")
    if type(found) is not int or found != VERSION:
        raise StoreError(f"{where} has version {found!r:.40}; this m3em_fast reads version {VERSION} and no other.")
    wanted = {"format", "version", "modalities", "num_classes", "meta", "shards", "labels", "clips"}
    if set(document) != wanted:
        odd = ", ".join(sorted(str(key)[:40] for key in set(document) ^ wanted)[:5])
        raise StoreError(
            f"{where} must have exactly the entries {', '.join(sorted(wanted))}; missing or unknown: {odd}."
        )

    clips = document["clips"]
    if not isinstance(clips, list) or not all(isinstance(clip, str) and clip for clip in clips):
        raise StoreError(f"{where}: clips must be a list of non-empty strings.")
    if len(set(clips)) < len(clips):
        seen: set[str] = set()
        twice = next(clip for clip in clips if clip in seen or seen.add(clip))  # type: ignore[func-returns-value]
        raise StoreError(f"{where}: clip id {twice!r:.80} appears twice.")
    if not isinstance(document["modalities"], dict) or not document["modalities"]:
        raise StoreError(f"{where}: modalities must name at least one modality.")
    modalities = {name: check_modality(name, facts, where) for name, facts in document["modalities"].items()}
    num_classes = check_num_classes(document["num_classes"], where)
    labels = document["labels"]
    if labels is not None:
        labels = check_labels(labels, num_classes, len(clips), where)
    if not isinstance(document["meta"], dict):
        raise StoreError(f"{where}: meta must be an object.")
    shards = _check_shards(document["shards"], modalities, len(clips), where)
    fingerprint = hashlib.sha256(data).hexdigest()
    return Manifest(clips, modalities, labels, num_classes, document["meta"], shards, fingerprint)


def _check_shards(entries: Any, modalities: dict[str, Modality], count: int, where: str) -> list[Shard]:
    if not isinstance(entries, list):
        raise StoreError(f"{where}: shards must be a list.")
    shards, reached, files = [], dict.fromkeys(modalities, 0), set()
    for number, entry in enumerate(entries):
        here = f"{where}: shard {number}"
        if not isinstance(entry, dict) or set(entry) != set(Shard.__dataclass_fields__):
            raise StoreError(f"{here} must have exactly {', '.join(Shard.__dataclass_fields__)}.")
        name, file, sha = entry["modality"], entry["file"], entry["sha256"]
        if not isinstance(name, str) or name not in modalities:
            raise StoreError(f"{here} is of unknown modality {name!r:.80}; the manifest has {', '.join(modalities)}.")
        if not isinstance(file, str) or not _FILE.fullmatch(file):
            raise StoreError(f"{here}: {file!r:.80} is no plain file name that ends in .npy.")
        if file in files:
            raise StoreError(f"{here}: file {file} is listed twice.")
        files.add(file)
        if not isinstance(sha, str) or not re.fullmatch(r"[0-9a-f]{64}", sha):
            raise StoreError(f"{here}: sha256 must be 64 hexadecimal digits.")
        if not _whole(entry["clips"], 1, count) or not _whole(entry["start"], 0, count):
            raise StoreError(f"{here}: start and clips must be whole numbers within the store's {count} clips.")
        if entry["start"] != reached[name]:
            raise StoreError(f"{here}: start must be {reached[name]}, where the last shard of {name} ended.")
        reached[name] += entry["clips"]
        if not _whole(entry["bytes"], 1, MAX_SHARD_BYTES):
            raise StoreError(f"{here}: bytes must be from 1 to {MAX_SHARD_BYTES}, got {entry['bytes']!r:.80}.")
        _check_scale(entry["scale"], modalities[name], here)
        shards.append(Shard(**entry))
    for name, end in reached.items():
        if end != count:
            raise StoreError(f"{where}: the shards of {name} hold {end} clips, but the store has {count}.")
    return shards


def _check_scale(scale: Any, modality: Modality, here: str) -> None:
    if modality.dtype == "float16":
        if scale is not None:
            raise StoreError(f"{here}: a float16 shard has no scale.")
        return
    good = isinstance(scale, list) and len(scale) == modality.channels
    if not good or not all(type(step) in (int, float) and 0 < step <= MAX_STEP for step in scale):
        raise StoreError(f"{here}: scale must be {modality.channels} numbers from 0 to {MAX_STEP}, one per channel.")


def check_shard_header(folder: Path, shard: Shard, modality: Modality) -> int:
    """Compare a shard's size and .npy header with the manifest; where its data begin, in bytes.

    The header is compared as numbers, and the file's size with what they make, before anything is allocated.
    """
    path = folder / shard.file
    try:
        state = path.stat()
        if not stat.S_ISREG(state.st_mode):
            raise StoreError(f"{path} is no ordinary file.")
        with open(path, "rb") as handle:
            head = io.BytesIO(handle.read(4096))
    except OSError as error:
        raise StoreError(f"{path} cannot be read ({error.strerror}), but the manifest lists it.") from error
    if state.st_size != shard.bytes:
        raise StoreError(f"{path} has {state.st_size} bytes, the manifest says {shard.bytes}.")
    try:
        if np.lib.format.read_magic(head) != (1, 0):
            raise ValueError("version 1.0 expected")
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(head, max_header_size=2048)
    except Exception as error:  # numpy evaluates the header as a literal, which fails in many ways
        raise StoreError(f"{path} has no readable .npy header ({' '.join(str(error).split())[:80]}).") from error
    wanted = (shard.clips, *modality.shape)
    if shape != wanted or dtype != modality.numpy_dtype or fortran:
        order = "Fortran" if fortran else "C"
        raise StoreError(
            f"{path} holds {shape!s:.80} of {dtype!s:.80} in {order} order, the manifest says {wanted} of "
            f"{modality.dtype} in C order."
        )
    if head.tell() + shard.clips * modality.clip_bytes != state.st_size:
        raise StoreError(f"{path} has {state.st_size} bytes, its header asks for another number.")
    return head.tell()


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with open(path, "rb") as handle:
        whole = hashlib.sha256()
        while block := handle.read(2**22):
            whole.update(block)
    return whole.hexdigest()
