"""Stored scores: what a model says of every clip of one split, before any softmax.

A folder with ``verb.npy`` and ``noun.npy``, float32 logits (clips, classes), and ``scores.json``: narration ids, where
the scores come from, and SHA-256 of all three. Nothing in it is ever unpickled, and what was altered is refused.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import io
import json
import os
import shutil
import stat
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from m3em_fast.epic._errors import EpicError

__all__ = ["FORMAT", "KINDS", "Scores", "check_ids", "first_twice", "log_softmax", "read_scores", "write_scores"]

KINDS = ("verb", "noun")
FORMAT, VERSION, DOCUMENT = "m3em-epic-scores", 1, "scores.json"
SAID = ("split", "protocol", "model")
_ENTRIES = {"format", "version", *SAID, "about", "classes", "ids", "sha256"}
_MAX_DOCUMENT_BYTES, _MAX_CLASSES = 2**26, 2**16


@dataclass(frozen=True)
class Scores:
    """Scores of one model.

    Attributes:
        path: the folder they were read from.
        ids: narration ids, in the order of the rows.
        verb: float32 logits (clips, verbs).
        noun: float32 logits (clips, nouns).
        split: of which clips, such as "target_val".
        protocol: how the model was trained, "val" or "test".
        model: its name: "A" to "D" as in the report, "A+B" of an ensemble, or any other.
        about: whatever else was said of them.
    """

    path: Path
    ids: tuple[str, ...]
    verb: np.ndarray
    noun: np.ndarray
    split: str
    protocol: str
    model: str
    about: dict[str, Any]

    def ordered(self, ids: Sequence[str], where: str) -> tuple[np.ndarray, np.ndarray]:
        """Logits of verb and noun with one row for each of ``ids``, in their order.

        Raises:
            EpicError: these scores are of other clips than ``ids``, which ``where`` has.
        """
        check_ids(self.ids, ids, str(self.path), where)
        rows = {clip: row for row, clip in enumerate(self.ids)}
        order = np.array([rows[clip] for clip in ids])
        return self.verb[order], self.noun[order]


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Logarithm of the softmax over the last axis, in float64."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def check_ids(found: Sequence[str], wanted: Sequence[str], what: str, where: str) -> None:
    """Whether ``what`` has exactly the clips of ``where``, in any order; EpicError that counts and names otherwise."""
    missing, unexpected = _without(wanted, found), _without(found, wanted)
    if missing:
        raise EpicError(f"{what} lacks {len(missing)} of the {len(wanted)} clips of {where}, the first {missing[0]!r}.")
    if unexpected:
        raise EpicError(
            f"{what} has {len(unexpected)} clips that {where} does not have, the first {unexpected[0]!r:.80}."
        )


def first_twice(names: Sequence[str]) -> str | None:
    """The first name that was there before."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None


def _without(ids: Sequence[str], others: Sequence[str]) -> list[str]:
    known = set(others)
    return [clip for clip in ids if clip not in known]


def _before(path: Path) -> Path:
    """Where scores are that others are about to replace."""
    return path.with_name(f".{path.name}.before")


def _standing(path: Path) -> Path | None:
    """Where the scores of a name are now: elsewhere where their writer was killed between two renames."""
    if os.path.lexists(path):
        return path
    return _before(path) if os.path.lexists(_before(path)) else None


def write_scores(
    path: str | os.PathLike[str],
    ids: Sequence[str],
    verb: Any,
    noun: Any,
    about: Mapping[str, Any],
    *,
    replace: bool = False,
) -> None:
    """Store what a model says of every clip of a split.

    The folder gets its name when everything in it is on the disk: half of it is never found there. With ``replace`` the
    old scores stand beside it, as ``.NAME.before``, until the new ones have the name, and :func:`read_scores` takes
    them from there: wherever the process is killed, it finds the ones or the others whole.

    Args:
        path: folder to make; without ``replace`` it must not exist.
        ids: narration ids (clips,), each once.
        verb: logits (clips, verbs), an array or a tensor on the CPU; kept in float32.
        noun: logits (clips, nouns).
        about: "split" (such as "target_val"), "protocol" ("val" or "test") and "model" ("A", ...), which must be there,
            and anything else that JSON can hold: method, seed, epochs, the features' fingerprint.
        replace: take the place of scores that are there, and clear away what writers that were killed have left there.

    Raises:
        EpicError: the path exists (with ``replace``: and holds no scores), an argument is not what it should be, or the
            disk is full.
    """
    path = Path(path)
    if not replace and (standing := _standing(path)) is not None:
        raise EpicError(f"{standing} already exists; scores are never written over.")
    if os.path.lexists(path) and (path.is_symlink() or not (path / DOCUMENT).is_file()):
        raise EpicError(f"{path} is no folder of stored scores; nothing else is written over.")
    ids = list(ids)
    _check_clips(ids, str(path))
    extra = dict(about)
    said = {name: extra.pop(name, None) for name in SAID}
    _check_said(said, str(path))
    arrays = {kind: _checked(kind, given, len(ids), path) for kind, given in (("verb", verb), ("noun", noun))}
    document = {"format": FORMAT, "version": VERSION, **said, "about": extra, "ids": ids}
    document["classes"] = {kind: array.shape[1] for kind, array in arrays.items()}
    files = {f"{kind}.npy": _npy(array) for kind, array in arrays.items()}
    try:
        digests = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
        document["sha256"] = {**digests, DOCUMENT: _digest(document)}
        files[DOCUMENT] = json.dumps(document, allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise EpicError(f"{path}: about must be what JSON can hold ({str(error)[:80]}).") from error
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    if replace:
        for left in path.parent.glob(f"{glob.escape(path.name)}.{'[0-9a-f]' * 8}.tmp"):
            shutil.rmtree(left, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        for name, data in files.items():
            with open(temporary / name, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        with _out_of_the_way(path) if replace else contextlib.nullcontext():
            os.rename(temporary, path)
    except OSError as error:
        raise EpicError(f"{path} could not be written ({error.strerror or error}).") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def _out_of_the_way(path: Path) -> Iterator[None]:
    """Scores that are there make room for others, and go when those are in place; else they come back."""
    before = _before(path)
    if os.path.lexists(path):
        # What stands beside whole scores is what a writer was killed over deleting.
        shutil.rmtree(before, ignore_errors=True)
        os.rename(path, before)
    try:
        yield
    except BaseException:
        if os.path.lexists(before) and not os.path.lexists(path):
            os.rename(before, path)
        raise
    shutil.rmtree(before, ignore_errors=True)


def _digest(document: Mapping[str, Any]) -> str:
    rest = {name: value for name, value in document.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, allow_nan=False).encode()).hexdigest()


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, version=(1, 0), allow_pickle=False)
    return buffer.getvalue()


def _check_clips(ids: list[Any], where: str) -> None:
    if not ids or not all(isinstance(clip, str) and clip for clip in ids):
        raise EpicError(f"{where}: ids must be narration ids, at least one of them.")
    if (twice := first_twice(ids)) is not None:
        raise EpicError(f"{where}: narration id {twice!r:.80} appears twice.")


def _check_said(said: Mapping[str, Any], where: str) -> None:
    for name, value in said.items():
        if not isinstance(value, str) or not value or len(value) > 200:
            raise EpicError(f"{where}: {name} must be a word, got {value!r:.80}.")


def _checked(kind: str, given: Any, count: int, path: Path) -> np.ndarray:
    try:
        values = np.asarray(given)
        if values.dtype.kind not in "fiu":
            raise TypeError(f"of {values.dtype}")
    except (TypeError, ValueError, RuntimeError) as error:
        raise EpicError(f"{path}: {kind} scores must be numbers ({' '.join(str(error).split())[:80]}).") from error
    if values.ndim != 2 or len(values) != count or not 1 <= values.shape[1] <= _MAX_CLASSES:
        raise EpicError(f"{path}: {kind} scores must be {count} clips x classes, got shape {values.shape!s:.80}.")
    with np.errstate(over="ignore"):
        values = np.ascontiguousarray(values, "<f4")
    _check_finite(values, f"{path}: {kind} scores")
    return values


def _check_finite(values: np.ndarray, what: str) -> None:
    bad = ~np.isfinite(values).all(1)
    if bad.any():
        count, first = int(bad.sum()), int(bad.argmax())
        raise EpicError(
            f"{what} must be finite in float32; in {count} of {len(bad)} rows they are not, first in {first}."
        )


def read_scores(path: str | os.PathLike[str]) -> Scores:
    """Read stored scores, all of them checked.

    Raises:
        EpicError: there are none, or they are not as :func:`write_scores` left them.
    """
    path = Path(path)
    folder = _standing(path) or path
    where = str(folder / DOCUMENT)
    document = _load_document(folder)
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise EpicError(f"{where} is no document of stored scores: its format should be {FORMAT!r}.")
    found = document.get("version")
    if type(found) is not int or found != VERSION:
        raise EpicError(f"{where} has version {found!r:.40}; this m3em_fast reads version {VERSION} and no other.")
    names = {*(f"{kind}.npy" for kind in KINDS), DOCUMENT}
    sums: Any = document.get("sha256")
    classes: Any = document.get("classes")
    named = isinstance(sums, dict) and set(sums) == names and isinstance(classes, dict) and set(classes) == set(KINDS)
    if set(document) != _ENTRIES or not named:
        raise EpicError(f"{where} must have exactly {', '.join(sorted(_ENTRIES))}, with sums and classes of all files.")
    if sums[DOCUMENT] != _digest(document):
        raise EpicError(f"{where} was altered: its entries do not have the SHA-256 that it gives.")
    if not isinstance(document["ids"], list) or not isinstance(document["about"], dict):
        raise EpicError(f"{where}: ids must be a list and about an object.")
    ids = document["ids"]
    _check_clips(ids, where)
    _check_said({name: document[name] for name in SAID}, where)
    verb, noun = (_load_array(folder / f"{kind}.npy", len(ids), classes[kind], sums[f"{kind}.npy"]) for kind in KINDS)
    said = {name: document[name] for name in SAID}
    return Scores(path=path, ids=tuple(ids), verb=verb, noun=noun, about=document["about"], **said)


def _bytes(path: Path, limit: int) -> bytes:
    """A file's bytes, which are at most ``limit``; nothing that is no file is waited for."""
    state = path.stat()
    if not stat.S_ISREG(state.st_mode):
        raise EpicError(f"{path} is no ordinary file.")
    if state.st_size > limit:
        raise EpicError(f"{path} has {state.st_size} bytes; it may have at most {limit}.")
    return path.read_bytes()


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is no JSON")


def _load_document(path: Path) -> Any:
    try:
        return json.loads(_bytes(path / DOCUMENT, _MAX_DOCUMENT_BYTES).decode(), parse_constant=_no_constant)
    except EpicError:
        raise
    except OSError as error:
        # Such as a run, whose scores of one split are wanted.
        found = sorted(other.parent for part in ("*", "scores/*") for other in path.glob(f"{part}/{DOCUMENT}"))
        others = [str(other) for other in found if other.name[0] != "." and other.suffix != ".tmp"]
        there = f"; there are some in {', '.join(others[:3])}" if others else ""
        raise EpicError(
            f"{path} holds no stored scores: {DOCUMENT} cannot be read ({error.strerror}){there}."
        ) from error
    except (ValueError, RecursionError) as error:
        raise EpicError(f"{path / DOCUMENT} is no JSON document ({str(error)[:80]}).") from error


def _load_array(path: Path, count: int, classes: Any, digest: Any) -> np.ndarray:
    if type(classes) is not int or not 1 <= classes <= _MAX_CLASSES:
        raise EpicError(f"{path}: its number of classes must be from 1 to {_MAX_CLASSES}, got {classes!r:.80}.")
    try:
        data = _bytes(path, count * classes * 4 + 4096)
    except OSError as error:
        raise EpicError(f"{path} cannot be read ({error.strerror}).") from error
    found = hashlib.sha256(data).hexdigest()
    if found != digest:
        raise EpicError(f"{path} was altered: its SHA-256 is {found}, {DOCUMENT} says {digest!r:.80}.")
    try:
        values = np.lib.format.read_array(io.BytesIO(data), allow_pickle=False, max_header_size=2048)
    except Exception as error:  # numpy evaluates the header as a literal, which fails in many ways
        raise EpicError(f"{path} is no readable .npy file ({' '.join(str(error).split())[:80]}).") from error
    if values.shape != (count, classes) or values.dtype != np.dtype("<f4"):
        raise EpicError(
            f"{path} holds {values.shape!s:.80} of {values.dtype!s:.80}, {DOCUMENT} says {(count, classes)} of float32."
        )
    _check_finite(values, str(path))
    return values
