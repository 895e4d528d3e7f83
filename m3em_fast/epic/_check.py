"""What a submission must be before the challenge's server sees it.

The server refuses a file whose narration ids are not exactly those of target_test
(epic-kitchens/epic-kitchens-100-annotations, issue 9). Its code is not public; the form that is checked here is that of
jonmun/EPIC-KITCHENS-100_UDA_TA3N, test_models.py.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from m3em_fast.data._extra import needs
from m3em_fast.epic._errors import EpicError
from m3em_fast.epic.scores import KINDS, check_ids, first_twice

__all__ = ["CHALLENGE", "LEVELS", "MAX_BYTES", "MEMBER", "VERSION", "Submission", "check_submission"]

MEMBER, VERSION, CHALLENGE = "test.json", "0.2", "domain_adaptation"
RESULTS = "results_target"
LEVELS = {"sls_pt": 5, "sls_tl": 5, "sls_td": 5}
"""Entry -> its highest level (epic-kitchens/SLS)."""
# 5,909 clips of 397 numbers with 17 digits take 65 MB, and 30 MB packed.
MAX_BYTES = 2**28


@dataclass(frozen=True)
class Submission:
    """A submission that has passed every check.

    Attributes:
        clips: how many clips it has.
        levels: supervision levels, "sls_pt", "sls_tl" and "sls_td".
        form: "log-softmax", "probabilities" or "other": what the numbers are.
    """

    clips: int
    levels: dict[str, int]
    form: str


@dataclass(frozen=True)
class _Numbers:
    """An object of the document whose values are all numbers, in a few bytes each."""

    keys: tuple[str, ...]
    values: np.ndarray


def check_submission(path: Path, ids: Sequence[str], where: str, classes: dict[str, int]) -> Submission:
    """Check a submission, a zip with test.json or that file itself.

    Args:
        path: the file.
        ids: narration ids that it must have, in any order.
        where: what has these ids.
        classes: number of classes under "verb" and "noun".

    Raises:
        EpicError: it would be refused, or cannot be read; the sentence says why.
    """
    document = _parse(path, _text(path), len(ids))
    if not isinstance(document, dict):
        raise EpicError(f"{path} must hold one object, with {RESULTS}, version, challenge and {', '.join(LEVELS)}.")
    wanted = {RESULTS, "version", "challenge", *LEVELS}
    if odd := sorted(set(document) ^ wanted):
        names = ", ".join(sorted(wanted))
        raise EpicError(f"{path} must have exactly the entries {names}; missing or unknown: {', '.join(odd)!r:.200}.")
    for name, value in (("version", VERSION), ("challenge", CHALLENGE)):
        if document[name] != value:
            raise EpicError(f"{path}: {name} must be {value!r}, got {document[name]!r:.80}.")
    for name, most in LEVELS.items():
        if type(document[name]) is not int or not 0 <= document[name] <= most:
            raise EpicError(f"{path}: {name} must be a whole number from 0 to {most}, got {document[name]!r:.80}.")
    results = document[RESULTS]
    if not isinstance(results, dict):
        raise EpicError(f"{path}: {RESULTS} must be an object of clips.")
    check_ids(list(results), ids, str(path), where)
    keys = {kind: tuple(map(str, range(count))) for kind, count in classes.items()}
    forms = set()
    for clip, scores in results.items():
        if not isinstance(scores, dict) or set(scores) != set(KINDS):
            raise EpicError(f"{path}: {clip} must have exactly the entries verb and noun.")
        for kind in KINDS:
            forms.add(_form(_row(scores[kind], keys[kind], f"{path}: {kind} of {clip}")))
    form = forms.pop() if len(forms) == 1 else "other"
    return Submission(len(results), {name: document[name] for name in LEVELS}, form)


def _row(found: Any, keys: tuple[str, ...], what: str) -> np.ndarray:
    """The scores of one clip, checked."""
    if not isinstance(found, dict | _Numbers):
        raise EpicError(f"{what} must be an object of {len(keys)} numbers.")
    names = found.keys if isinstance(found, _Numbers) else tuple(found)
    if names != keys and (odd := sorted(set(names) ^ set(keys))):
        raise EpicError(
            f"{what} must have the {len(keys)} classes '0' to {keys[-1]!r}; missing or unknown: {', '.join(odd)!r:.80}."
        )
    if isinstance(found, dict):
        name = next(name for name, value in found.items() if type(value) not in (int, float))
        raise EpicError(f"{what} must be numbers; of class {name} it is {found[name]!r:.80}.")
    if not np.isfinite(found.values).all():
        name = names[int(np.isfinite(found.values).argmin())]
        raise EpicError(f"{what} must be finite; of class {name} it is not.")
    return found.values


def _form(row: np.ndarray) -> str:
    with np.errstate(over="ignore", invalid="ignore"):
        if row.max() <= 1e-6 and abs(np.exp(row).sum() - 1) < 1e-3:
            return "log-softmax"
        return "probabilities" if row.min() >= 0 and abs(row.sum() - 1) < 1e-3 else "other"


def _text(path: Path) -> bytes:
    try:
        if path.exists() and not path.is_file():
            raise EpicError(f"{path} is no ordinary file.")
        if not zipfile.is_zipfile(path):
            if path.stat().st_size > MAX_BYTES:
                raise EpicError(f"{path} has {path.stat().st_size} bytes; a submission has at most {MAX_BYTES}.")
            return path.read_bytes()
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            if [member.filename for member in members] != [MEMBER]:
                names = ", ".join(member.filename for member in members)
                raise EpicError(f"{path} must hold {MEMBER} and nothing else, got {names!r:.200}.")
            if members[0].file_size > MAX_BYTES:
                raise EpicError(f"{path}: {MEMBER} has {members[0].file_size} bytes; it may have at most {MAX_BYTES}.")
            return archive.read(members[0])  # no more than file_size, whatever is packed
    except OSError as error:
        raise EpicError(f"{path} cannot be read ({error.strerror or error}).") from error
    except EpicError:
        raise
    except Exception as error:  # a damaged or encrypted archive: zipfile and zlib have many ways to say so
        raise EpicError(f"{path} is no readable zip file ({' '.join(str(error).split())[:100]}).") from error


def _parse(path: Path, text: bytes, clips: int) -> Any:
    """The document, in which objects of numbers are :class:`_Numbers`: as floats of Python they would take 0.5 GB."""
    with needs("tqdm", "epic").tqdm(total=clips, desc="check", unit="clip", leave=False, delay=1) as bar:

        def hook(pairs: list[tuple[str, Any]]) -> Any:
            found = dict(pairs)
            if len(found) < len(pairs):
                raise EpicError(
                    f"{path}: {first_twice([name for name, _ in pairs])!r:.80} appears twice in one object."
                )
            if "noun" in found:
                bar.update()
            if not all(type(value) in (int, float) for value in found.values()):
                return found
            try:
                return _Numbers(tuple(found), np.fromiter(found.values(), np.float64, len(found)))
            except OverflowError:  # a whole number beyond the largest float
                return _Numbers(tuple(found), np.array([float(str(value)) for value in found.values()]))

        def refuse(text: str) -> Any:
            raise EpicError(f"{path} has {text} among its numbers, which must be finite.")

        try:
            return json.loads(text, object_pairs_hook=hook, parse_constant=refuse)
        except EpicError:
            raise
        except (ValueError, RecursionError) as error:
            raise EpicError(f"{path} is no JSON document ({str(error)[:80]}).") from error
