"""Ensembles of stored scores: A+B, A+B+C, A+B+C+D of the report, or any others.

``python -m m3em_fast.epic.ensemble SCORES SCORES ... --out FOLDER`` stores the weighted mean of several models' scores:
with equal weights, with ``--weights``, or with those that rank labelled source clips best (``--search``). Labels of the
target are never read.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from m3em_fast.data._extra import needs
from m3em_fast.epic import _program
from m3em_fast.epic._errors import EpicError
from m3em_fast.epic.annotations import PROTOCOLS, Annotations, annotations_folder
from m3em_fast.epic.scores import KINDS, Scores, first_twice, log_softmax, read_scores, write_scores
from m3em_fast.epic.scoring import check_classes

__all__ = ["AVERAGES", "fuse_scores", "grid", "search_weights"]

Average = Literal["log-softmax", "softmax"]
AVERAGES: tuple[Average, ...] = ("log-softmax", "softmax")
SEARCHED = PROTOCOLS["val"].source
TENTHS, MOST = 10, 6


def fuse_scores(
    scores: Sequence[Scores], weights: Sequence[float] | np.ndarray, average: Average = "log-softmax"
) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Weighted mean of what several models say of the same clips.

    Args:
        scores: of one split; each in an order of its own.
        weights: one for each, 0 or more; only their ratios count.
        average: "log-softmax" adds logarithms (up to a constant for each clip that is the weighted sum of logits with
            which the report fuses streams), "softmax" adds probabilities.

    Returns:
        narration ids in the order of the first, and log-softmax scores in float64, verb (clips, verbs) and noun.

    Raises:
        EpicError: clips, splits or classes differ, or the weights are none.
    """
    shares = _shares(weights, len(scores))
    ids = _agree(scores)
    where = str(scores[0].path)
    logs = [[log_softmax(logits) for logits in one.ordered(ids, where)] for one in scores]
    verb, noun = (_mean([pair[i] for pair in logs], shares, average) for i in range(len(KINDS)))
    return ids, verb, noun


def _mean(logs: Sequence[np.ndarray], shares: np.ndarray, average: Average) -> np.ndarray:
    kept = [(log, share) for log, share in zip(logs, shares, strict=True) if share]
    if average == "log-softmax":
        return log_softmax(sum(share * log for log, share in kept))
    # In logarithms: a probability too small for a float would be minus infinity.
    total = np.logaddexp.reduce([log + np.log(share) for log, share in kept])
    return log_softmax(total)


def _shares(weights: Sequence[float] | np.ndarray, count: int) -> np.ndarray:
    shares = np.array(weights, np.float64)
    if len(shares) != count:
        raise EpicError(f"--weights must be one for each of the {count} models, got {len(shares)}.")
    if not np.isfinite(shares).all() or (shares < 0).any() or not shares.any():
        raise EpicError(f"--weights must be 0 or more, and one of them positive, got {' '.join(map(str, weights))}.")
    shares /= shares.max()  # the sum of large ones may be infinite
    return shares / shares.sum()


def _agree(scores: Sequence[Scores]) -> list[str]:
    if len(scores) < 2:
        raise EpicError("an ensemble needs the scores of at least two models.")
    first = scores[0]
    for other in scores[1:]:
        for what in ("split", "protocol"):
            mine, its = getattr(first, what), getattr(other, what)
            if mine != its:
                raise EpicError(f"{other.path} is of {what} {its!r}, {first.path} of {mine!r}.")
        for kind in KINDS:
            count, its_count = (getattr(one, kind).shape[1] for one in (first, other))
            if count != its_count:
                raise EpicError(f"{other.path} has {its_count} {kind} classes, {first.path} has {count}.")
    return list(first.ids)


def grid(models: int) -> np.ndarray:
    """All weights in steps of a tenth that add up to 1, (number, models), in lexicographic order."""
    bars = itertools.combinations(range(TENTHS + models - 1), models - 1)
    ends = np.array([(-1, *bar, TENTHS + models - 1) for bar in bars])
    return (np.diff(ends, axis=1) - 1) / TENTHS


def search_weights(
    scores: Sequence[Scores], annotations: Annotations, average: Average = "log-softmax"
) -> tuple[np.ndarray, float, float]:
    """The weights with the best action top-1 on labelled clips of the source; of several, those nearest to equal ones.

    Only ``source_val`` is accepted, by name and by ids, and no other split of ``annotations`` is asked for: what the
    target's labels say cannot matter.

    Args:
        scores: one of each model, of clips of source_val; all of them or the same part.

    Returns:
        weights (models,) that add up to 1; action top-1 in percent with them, and with equal ones.

    Raises:
        EpicError: scores of another split, clips that source_val does not have, or too many models.
    """
    for one in scores:
        if one.split != SEARCHED:
            raise EpicError(f"--search: {one.path} has scores of {one.split}; weights are searched on {SEARCHED} only.")
        check_classes(one, annotations)
    ids = _agree(scores)
    if len(scores) > MOST:
        raise EpicError(f"--search: weights are searched for at most {MOST} models, got {len(scores)}.")
    split = annotations.split(SEARCHED)
    assert split.labels is not None
    place = {clip: row for row, clip in enumerate(split.ids)}
    foreign = [clip for clip in ids if clip not in place]
    if foreign:
        raise EpicError(f"--search: {scores[0].path} has clips that {split.path} has not, such as {foreign[0]!r:.80}.")
    rows = np.array([place[clip] for clip in ids])
    where = str(scores[0].path)
    # Higher ids first, so that argmax prefers them where scores are equal, as the accuracies do.
    logs = [[log_softmax(logits)[:, ::-1] for logits in one.ordered(ids, where)] for one in scores]
    stacks = [np.stack([pair[i] for pair in logs]) for i in range(len(KINDS))]
    if average == "softmax":
        stacks = [np.exp(stack) for stack in stacks]  # the logarithm of the mean has the mean's order
    wanted = [stack.shape[2] - 1 - split.labels[kind][rows] for kind, stack in zip(KINDS, stacks, strict=True)]

    def right(shares: np.ndarray) -> int:
        hits = [np.tensordot(shares, stack, 1).argmax(1) == want for stack, want in zip(stacks, wanted, strict=True)]
        return int((hits[0] & hits[1]).sum())

    candidates = grid(len(scores))
    bar = needs("tqdm", "epic").tqdm(candidates, "search weights", leave=False, delay=1)
    counts = np.array([right(shares) for shares in bar])
    equal = np.full(len(scores), 1.0 / len(scores))
    same = right(equal)
    if same >= counts.max():
        return equal, 100.0 * same / len(ids), 100.0 * same / len(ids)
    far = ((candidates - equal) ** 2).sum(1).round(9)  # equal distances are to be equal
    best = candidates[np.lexsort((far, -counts))[0]]
    return best, 100.0 * float(counts.max()) / len(ids), 100.0 * same / len(ids)


def build(
    scores: tuple[Path, ...],
    /,
    out: Path,
    weights: tuple[float, ...] = (),
    search: tuple[Path, ...] = (),
    average: Average = "log-softmax",
    annotations: Path | None = None,
    published: bool = True,
) -> None:
    """Store the weighted mean of several models' scores, to be scored or submitted like those of one.

    Args:
        scores: Folders of stored scores, one of each model, of the same clips.
        out: Folder to make.
        weights: One for each model. Without them, and without --search, all are equal.
        search: The same models' scores of source_val, in the same order: take the weights that rank its actions best.
            Where the models were trained on source_val they know these labels, and the best weights favour the one that
            learnt them by heart: take scores of models that were trained on source_train.
        average: What the weights multiply: logarithms or probabilities.
        annotations: For --search: folder of EPIC_100_*.csv. None: what M3EM_EPIC_ANNOTATIONS says.
        published: Refuse label files that do not hold as much as the published ones.
    """
    if out.exists():
        raise EpicError(f"{out} already exists; scores are never written over.")
    if weights and search:
        raise EpicError("give --weights or --search, not both.")
    for what, folders in (("scores", scores), ("--search", search)):
        if (twice := first_twice([os.path.realpath(folder) for folder in folders])) is not None:
            raise EpicError(f"{what}: {twice} is given twice; --weights makes a model count more.")
    models = [read_scores(path) for path in scores]
    _agree(models)
    shares, origin = _shares(weights or [1.0] * len(models), len(models)), "given" if weights else "equal"
    if search:
        labels = Annotations(annotations_folder(annotations), published)
        known = [read_scores(path) for path in search]
        names, its_names = ([one.model for one in some] for some in (models, known))
        if names != its_names:
            raise EpicError(f"--search is of the models {', '.join(its_names)}, the ensemble of {', '.join(names)}.")
        shares, found, equal = search_weights(known, labels, average)
        origin = f"searched on {len(known[0].ids)} clips of {SEARCHED}"
        print(f"action top-1 on {SEARCHED}: {found:.2f} %, with equal weights {equal:.2f} %")
        if any(one.protocol == "val" for one in known):
            print(f"these models were trained on {SEARCHED}: the weights favour the one that knows it by heart")
    ids, verb, noun = fuse_scores(models, shares, average)
    parts = [
        {"model": one.model, "weight": float(w), "about": one.about} for one, w in zip(models, shares, strict=True)
    ]
    about: dict[str, Any] = {"split": models[0].split, "protocol": models[0].protocol, "average": average}
    about |= {"model": "+".join(one.model for one in models), "weights": origin, "ensemble": parts}
    write_scores(out, ids, verb, noun, about)
    table = needs("rich.table", "epic").Table(title=f"{about['model']}, {about['split']}: {out}", header_style="bold")
    table.add_column("model")
    table.add_column(f"weight ({origin})", justify="right")
    for part in parts:
        table.add_row(str(part["model"]), f"{part['weight']:.3f}")
    _program.console().print(table)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line of :func:`build`."""
    return _program.run(build, arguments, "m3em_fast.epic.ensemble")


if __name__ == "__main__":
    raise SystemExit(main())
