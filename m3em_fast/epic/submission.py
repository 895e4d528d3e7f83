"""The challenge's submission: ``test.json`` in its zip.

``python -m m3em_fast.epic.submission SCORES --out FILE.zip`` writes it from stored scores of target_test;
``python -m m3em_fast.epic.submission --check FILE`` checks any, a zip or the JSON itself.

Scores are written as log-softmax in float64. The public scorer takes one softmax over the array of all clips: raw
logits of one clip may make those of all others vanish, and probabilities would be ranked by their sum instead of their
product.
"""

from __future__ import annotations

import json
import os
import uuid
import zipfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

import numpy as np

from m3em_fast.data._extra import needs
from m3em_fast.epic import _program
from m3em_fast.epic._check import CHALLENGE, LEVELS, MEMBER, RESULTS, VERSION, Submission, check_submission
from m3em_fast.epic._errors import EpicError
from m3em_fast.epic.annotations import PROTOCOLS, Annotations, annotations_folder
from m3em_fast.epic.scores import KINDS, Scores, log_softmax, read_scores
from m3em_fast.epic.scoring import check_classes

__all__ = ["SUBMITTED", "Submission", "check_submission", "default_levels", "write_submission"]

SUBMITTED = PROTOCOLS["test"].report
# Hand and object boxes are spatial annotations: temporal level 4 instead of 3.
TEMPORAL = {"A": 3, "B": 4, "C": 4, "D": 3, "baseline": 3}
PRETRAINED, DATA = 2, 3


def default_levels(model: str) -> dict[str, int] | None:
    """Supervision levels of one of the models, or of an ensemble such as "A+B"; None for others.

    Backbones were trained on public images and videos (2), the model on the training set (3) with start and end times
    (3), and with object or hand boxes (4) in B and C.
    """
    parts = model.split("+")
    if not set(parts) <= set(TEMPORAL):
        return None
    return {"sls_pt": PRETRAINED, "sls_tl": max(TEMPORAL[part] for part in parts), "sls_td": DATA}


def write_submission(path: Path, scores: Scores, annotations: Annotations, levels: dict[str, int]) -> Submission:
    """Write stored scores of target_test as a submission; the file gets its name when it has passed its check.

    Args:
        path: zip file to make; it must not exist.
        scores: of all clips of target_test.
        annotations: the label files.
        levels: "sls_pt", "sls_tl" and "sls_td", each from 0 to 5.

    Raises:
        EpicError: the file exists, the scores are of other clips or classes, or the disk is full.
    """
    if os.path.lexists(path):
        raise EpicError(f"{path} already exists; a submission is never written over.")
    if scores.split != SUBMITTED:
        raise EpicError(f"{scores.path} has scores of {scores.split}; a submission is of {SUBMITTED}.")
    if scores.protocol != "test":
        raise EpicError(
            f"{scores.path} is of protocol {scores.protocol!r}; a submission is of models trained under 'test'."
        )
    for name, most in LEVELS.items():
        if type(levels.get(name)) is not int or not 0 <= levels[name] <= most:
            raise EpicError(f"{name} must be a whole number from 0 to {most}, got {levels.get(name)!r:.80}.")
    split = annotations.split(SUBMITTED)
    check_classes(scores, annotations)
    verb, noun = (log_softmax(logits) for logits in scores.ordered(split.ids, str(split.path)))
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with open(temporary, "xb") as file:
            with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
                member = zipfile.ZipInfo(MEMBER)  # of a fixed date: the same scores give the same bytes
                member.compress_type = zipfile.ZIP_DEFLATED
                with archive.open(member, "w") as stream:
                    _write(stream, split.ids, verb, noun, levels)
            file.flush()
            os.fsync(file.fileno())
        found = check_submission(temporary, split.ids, str(split.path), _counts(annotations))
        _name(temporary, path)
    except OSError as error:
        raise EpicError(f"{path} could not be written ({error.strerror or error}).") from error
    finally:
        with suppress(OSError):
            temporary.unlink()
    return found


def _name(temporary: Path, path: Path) -> None:
    """Rename without replacing what another process may have put there since."""
    try:
        os.link(temporary, path)
    except FileExistsError as error:
        raise EpicError(f"{path} already exists; a submission is never written over.") from error
    except OSError:  # a file system without hard links
        if os.path.lexists(path):
            raise EpicError(f"{path} already exists; a submission is never written over.") from None
        os.rename(temporary, path)


def _write(stream: IO[bytes], ids: Sequence[str], verb: np.ndarray, noun: np.ndarray, levels: dict[str, int]) -> None:
    """The document, clip by clip: as objects of Python all of it would take half a gigabyte."""
    head = {"version": VERSION, "challenge": CHALLENGE, **{name: levels[name] for name in LEVELS}}
    stream.write(f"{json.dumps(head)[:-1]}, {json.dumps(RESULTS)}: {{".encode())
    names = [list(map(str, range(array.shape[1]))) for array in (verb, noun)]
    clips = needs("tqdm", "epic").tqdm(ids, "write", unit="clip", leave=False, delay=1)
    for row, clip in enumerate(clips):
        rows = (verb[row].tolist(), noun[row].tolist())
        entry = {kind: dict(zip(name, row, strict=True)) for kind, name, row in zip(KINDS, names, rows, strict=True)}
        stream.write(f"{', ' * (row > 0)}{json.dumps(clip)}: {json.dumps(entry, allow_nan=False)}".encode())
    stream.write(b"}}\n")


def _counts(annotations: Annotations) -> dict[str, int]:
    return {kind: len(names) for kind, names in annotations.classes.items()}


def submit(
    scores: Path | None = None,
    /,
    out: Path | None = None,
    check: Path | None = None,
    pt: int | None = None,
    tl: int | None = None,
    td: int | None = None,
    annotations: Path | None = None,
    published: bool = True,
) -> None:
    """Write a submission to the challenge from stored scores of target_test, or check one.

    Args:
        scores: Folder of stored scores.
        out: Zip file to make.
        check: Check this file, a zip or a JSON document, and write nothing.
        pt: Supervision level of pretraining, 0 to 5. None: 2, public images and videos, for models A to D.
        tl: Level of the temporal and other labels, 0 to 5. None: 3 for A and D, 4 with boxes for B and C.
        td: Level of the training data, 0 to 5. None: 3, the training set, for models A to D.
        annotations: Folder of EPIC_100_*.csv. None: what M3EM_EPIC_ANNOTATIONS says.
        published: Refuse label files that do not hold as much as the published ones.
    """
    if check is not None:
        if scores is not None or out is not None:
            raise EpicError("--check writes nothing: give it alone, without scores and --out.")
        labels = Annotations(annotations_folder(annotations), published)
        split = labels.split(SUBMITTED)
        _say(check, check_submission(check, split.ids, str(split.path), _counts(labels)))
        return
    if scores is None or out is None:
        raise EpicError("a folder of stored scores and --out are needed, or --check alone.")
    if out.suffix != ".zip":
        raise EpicError(f"--out must end in .zip, got {out}.")
    stored = read_scores(scores)
    given = {name: value for name, value in zip(LEVELS, (pt, tl, td), strict=True) if value is not None}
    levels = (default_levels(stored.model) or {}) | given
    if set(levels) != set(LEVELS):
        raise EpicError(
            f"{scores} is of model {stored.model!r}, which has no levels by default: give --pt, --tl and --td."
        )
    _say(out, write_submission(out, stored, Annotations(annotations_folder(annotations), published), levels))


def _say(path: Path, found: Submission) -> None:
    levels = "-".join(str(found.levels[name]) for name in LEVELS)
    print(f"{path}: a submission of {found.clips} clips, supervision levels PT-TL-TD {levels}.")
    if found.form != "log-softmax":
        what = "probabilities" if found.form == "probabilities" else "no log-softmax scores"
        print(f"Its numbers are {what}: the public scorer, with one softmax over all clips, may rank them wrongly.")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line of :func:`submit`."""
    return _program.run(submit, arguments, "m3em_fast.epic.submission")


if __name__ == "__main__":
    raise SystemExit(main())
