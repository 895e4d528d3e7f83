"""Features made elsewhere into a feature store: the challenge's pickles, and folders of feature maps.

    python -m m3em_fast.data.importer data/source_val --pickle source_val.pkl --annotations labels --split source_val
    python -m m3em_fast.data.importer data/source_val --maps RGB=maps/rgb Flow=maps/flow --pickle source_val.pkl ...

A pickle is read without running it (:mod:`m3em_fast.data._unpickle`), and mapped: an import takes some 100 MB of
memory beside Python and its libraries, whatever the size. Protocols 0 to 2, which write numbers as text, take the size
of their arrays in addition. A killed import goes on where it was when the same command is given again; the store has
its name when it is complete.
"""

from __future__ import annotations

import errno
import hashlib
import json
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from .. import _cli
from ._extra import needs
from ._import_sources import MapFolder, PickledFeatures, Source, read_pickle
from ._manifest import Modality, StoreError
from ._unpickle import UnpickleError
from ._writer import FeatureStoreWriter

__all__ = ["import_features"]

CHUNK_BYTES = 2**24  # of features that are held at a time, in float32
SYNC_SECONDS = 10.0  # so much of the work is lost when the process is killed
CLASSES = {"verb": 97, "noun": 300}


@dataclass(frozen=True)
class _Labels:
    """Of one split: where they are from, its clips, its labels if it has any, and how many classes there are."""

    where: str
    clips: list[str]
    labels: dict[str, np.ndarray] | None
    num_classes: dict[str, int]


def _read_labels(annotations: Path | None, split: str, published: bool) -> _Labels:
    from ..epic.annotations import Annotations, annotations_folder

    found = Annotations(annotations_folder(annotations), published)
    part = found.split(split)
    return _Labels(str(part.path), part.ids, part.labels, {kind: len(names) for kind, names in found.classes.items()})


def import_features(
    out: Path,
    /,
    pickle: Path | None = None,
    maps: tuple[str, ...] = (),
    modalities: tuple[str, ...] = (),
    annotations: Path | None = None,
    split: str | None = None,
    published: bool = True,
    leave_others: bool = False,
    dtype: Literal["float16", "uint8"] = "float16",
) -> None:
    """Make a feature store of features that were extracted elsewhere.

    Clips are matched by their narration ids, and every modality must have all of them.

    Args:
        out: The store's folder; it must not exist.
        pickle: A pickle of pooled features, {'features': {'RGB': array (clips, frames, channels), ...},
            'narration_ids': [...]}.
        maps: NAME=FOLDER for each modality with a .npy file a clip, named by its narration id: maps (frames, channels,
            height, width) or vectors (frames, channels). They take the place of the pickle's features of that name.
        modalities: Which of the pickle's modalities to take; none named: all.
        annotations: Folder of the challenge's label files, EPIC_100_*.csv. None: what M3EM_EPIC_ANNOTATIONS says.
        split: Which of them: source_train, target_train, source_test, target_test, source_val or target_val. The store
            has the clips in its order. None: a store without labels, and the clips in the order of the features.
        published: Refuse label files that do not hold as much as the published ones.
        leave_others: Leave out clips that the label file does not have; else they are refused.
        dtype: How maps are stored; uint8 (a scale a channel) takes half the room, and no negative value. Vectors are
            stored as float16.

    Raises:
        StoreError: the features are not what they should be, or out cannot be written.
        UnpickleError: the pickle asks for more than data.
        EpicError: the label files are not what they should be.
    """
    if out.exists():
        raise StoreError(f"{out} already exists; a store is never written over.")
    sources = _sources(pickle, maps, modalities)
    if annotations is not None and split is None:
        raise StoreError("--annotations needs --split, which of the label files the clips belong to.")
    labels = None if split is None else _read_labels(annotations, split, published)
    first = sources[0]
    clips = list(first.clips) if labels is None else labels.clips
    for source in sources:
        _match(source, clips, labels.where if labels else str(first.path), leave_others and labels is not None)
    if not clips:
        raise StoreError(f"{first.path} holds no clips.")
    found: dict[str, Modality] = {}
    meta: dict[str, Any] = {"split": split, "imported": {}}
    for source in sources:
        found[source.name], kind = source.modality(_shown(clips, f"checking {source.name}"), dtype)
        meta["imported"][source.name] = {"from": source.path.name, "dtype": kind}
    if dtype == "uint8" and not any(modality.kind == "map" for modality in found.values()):
        raise StoreError("--dtype uint8 is for maps, and there are only vectors.")
    _write(out, sources, found, clips, labels, meta)


def _sources(pickle: Path | None, maps: Sequence[str], modalities: Sequence[str]) -> list[Source]:
    """What to read, a modality each."""
    if pickle is None and (modalities or not maps):
        raise StoreError("--pickle must name a file of features, or --maps folders of them.")
    folders: dict[str, Path] = {}
    for text in maps:
        name, equals, folder = text.partition("=")
        if not (name and equals and folder):
            raise StoreError(f"--maps must be NAME=FOLDER, such as RGB=maps/rgb, got {text}.")
        if name in folders:
            raise StoreError(f"--maps names {name} twice.")
        folders[name] = Path(folder).expanduser()  # a shell leaves the ~ of NAME=~/maps as it is
    pickled: dict[str, PickledFeatures] = {}
    if pickle is not None:
        pickled = read_pickle(pickle)
        for name in modalities:
            if name not in pickled:
                raise StoreError(f"{pickle} has no modality {name!r:.80}; it has {', '.join(map(str, pickled))}.")
        pickled = {name: pickled[name] for name in modalities or pickled}
    names = [*(name for name in pickled if name not in folders), *folders]
    # The pickle's order, as far as it has one: RGB and Flow stay before Audio whether they are maps or not.
    names.sort(key=lambda name: [*pickled].index(name) if name in pickled else -1)
    sources: list[Source] = []
    for name in names:
        sources.append(MapFolder(name, folders[name]) if name in folders else pickled[name])
    return sources


def _match(source: Source, clips: Sequence[str], where: str, leave_others: bool) -> None:
    there, wanted = set(source.clips), set(clips)
    if missing := [clip for clip in clips if clip not in there]:
        raise StoreError(
            f"{source.path} lacks {len(missing)} of the {len(clips)} clips of {where}, {missing[0]!r:.80} is one."
        )
    others = [clip for clip in source.clips if clip not in wanted]
    if others and not leave_others:
        raise StoreError(
            f"{source.path} has {len(others)} clips that {where} has not, {others[0]!r:.80} is one; "
            "--leave-others leaves such out."
        )


def _shown(clips: Iterable[str], what: str) -> Iterator[str]:
    # delay: no bar for what takes no time anyway.
    yield from needs("tqdm").tqdm(clips, desc=what, unit=" clips", file=sys.stderr, delay=1)


def _write(
    out: Path,
    sources: Sequence[Source],
    modalities: dict[str, Modality],
    clips: Sequence[str],
    labels: _Labels | None,
    meta: dict[str, Any],
) -> None:
    facts = {"clips": clips, "labels": _plain(labels), "modalities": {n: asdict(m) for n, m in modalities.items()}}
    whole = {source.name: _size_and_time(source.path) for source in sources if isinstance(source, PickledFeatures)}
    key = {"data": _digest(facts | meta), "files": whole}
    num_classes = labels.num_classes if labels else CLASSES
    clip_bytes = 4 * sum(int(np.prod(modality.shape)) for modality in modalities.values())
    step = max(1, CHUNK_BYTES // clip_bytes)
    writer = FeatureStoreWriter(out, modalities, num_classes, meta, resume=key)
    try:
        with writer:
            imported = hashlib.sha256()

            def note(clip: str) -> None:
                imported.update(json.dumps([source.state(clip) for source in sources]).encode())

            known = writer.note or {"clips": 0, "sha256": None}
            for clip in clips[: known["clips"]]:
                note(clip)
            if known["sha256"] not in (None, imported.hexdigest()):
                raise StoreError(
                    f"{writer.folder} holds clips whose files have changed since; delete it to begin anew."
                )
            synced = time.monotonic()
            with needs("tqdm").tqdm(
                total=len(clips), initial=writer.done, desc=f"importing {out.name}", unit=" clips", file=sys.stderr
            ) as bar:
                for start in range(writer.done, len(clips), step):
                    part = clips[start : start + step]
                    features = {source.name: source.read(part) for source in sources}
                    given = None
                    if labels is not None and labels.labels is not None:
                        given = {kind: values[start : start + step] for kind, values in labels.labels.items()}
                    writer.append(part, features, given)
                    for clip in clips[known["clips"] : start + len(part)]:
                        note(clip)
                    known = writer.note = {"clips": start + len(part), "sha256": imported.hexdigest()}
                    for source in sources:
                        source.release()
                    bar.update(len(part))
                    if time.monotonic() - synced >= SYNC_SECONDS:
                        writer.sync()
                        synced = time.monotonic()
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
            raise StoreError(f"{writer.folder} could not be written ({error.strerror}).") from error
        raise StoreError(
            f"{writer.folder} could not be written ({error.strerror}); the same command goes on from there."
        ) from error


def _plain(labels: _Labels | None) -> Any:
    if labels is None or labels.labels is None:
        return None
    return {kind: values.tolist() for kind, values in labels.labels.items()}


def _digest(facts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _size_and_time(path: Path) -> list[int]:
    facts = path.stat()
    return [facts.st_size, facts.st_mtime_ns]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line of :func:`import_features`; one sentence and status 2 where something is refused."""
    from ..epic._errors import EpicError

    prog = "m3em_fast.data.importer"
    try:
        _cli.cli(import_features, arguments, prog=f"python -m {prog}")
    except (StoreError, UnpickleError, EpicError, ImportError) as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{prog}: interrupted; the same command goes on where it was.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
