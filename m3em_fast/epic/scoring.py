"""Accuracies of stored scores as the challenge counts them: verb, noun and action, top-1 and top-5.

``python -m m3em_fast.epic.scoring SCORES --annotations DIR`` prints them for all clips, for those of tail classes and
for those of unseen participants.

Actions are ranked by the sum of the log-softmax scores of verb and noun over all pairs (epic-kitchens/
C1-Action-Recognition, utils/scoring.py, ranks by the product of the softmax scores). The public scorer leaves open who
comes first between equal scores. Here it is the class of the higher id: ids are sorted by how frequent classes are, so
the lower one would hand a constant answer the majority class. Between equal sums it is the pair whose verb, then whose
noun, ranks higher.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from m3em_fast.data._extra import needs
from m3em_fast.epic import _program
from m3em_fast.epic._errors import EpicError
from m3em_fast.epic.annotations import Annotations, Split, annotations_folder
from m3em_fast.epic.scores import Scores, log_softmax, read_scores

__all__ = ["TOP", "Accuracy", "accuracies", "check_classes", "majority", "score", "top_actions", "top_classes"]

TOP = (1, 5)
GROUPS = {"all": "all clips", "tail": "tail classes", "unseen": "unseen participants"}


@dataclass(frozen=True)
class Accuracy:
    """Of one kind, in one group of clips.

    Attributes:
        clips: how many clips the group has.
        top1: percent of them whose class comes first; None where there are no clips.
        top5: percent of them whose class is among the first five.
    """

    clips: int
    top1: float | None
    top5: float | None


def top_classes(scores: np.ndarray, k: int) -> np.ndarray:
    """Classes (clips, k) of the k highest ``scores`` (clips, classes), best first; equal ones by id, higher first."""
    return np.argsort(scores, axis=1, kind="stable")[:, ::-1][:, :k]


def top_actions(verb: np.ndarray, noun: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Verb and noun, each (clips, k), of the k best pairs of scores ``verb`` (clips, verbs) and ``noun``, best first.

    Only the k x k pairs of the k best verbs and nouns are looked at. None of the k best is missed: rounding keeps the
    order of sums, so for a pair with another verb each of the k best verbs gives, with the same noun, a sum that is no
    lower, and where it is equal the better verb comes first; likewise for nouns.
    """
    verbs, nouns = top_classes(verb, k), top_classes(noun, k)
    sums = np.take_along_axis(verb, verbs, 1)[:, :, None] + np.take_along_axis(noun, nouns, 1)[:, None, :]
    # Stable: equal sums stay in the order of their verbs' ranks, then of their nouns'.
    best = np.argsort(-sums.reshape(len(sums), -1), axis=1, kind="stable")[:, :k]
    across = nouns.shape[1]
    return np.take_along_axis(verbs, best // across, 1), np.take_along_axis(nouns, best % across, 1)


def _accuracy(hits: np.ndarray, group: np.ndarray) -> Accuracy:
    """``hits`` (clips, k): whether the answer of that rank is right; ``group`` (clips,): whether the clip counts."""
    clips = int(group.sum())
    if not clips:
        return Accuracy(0, None, None)
    values = [100.0 * float(hits[group, :k].any(1).sum()) / clips for k in TOP]
    return Accuracy(clips, *values)


def score(scores: Scores, annotations: Annotations) -> dict[str, dict[str, Accuracy]]:
    """Accuracies of stored scores of a split that has public labels.

    A clip's action is in a tail class when its verb or its noun is.

    Returns:
        "all", "tail" and "unseen" -> "verb", "noun" and "action" -> :class:`Accuracy`.

    Raises:
        EpicError: the split has no labels, or the scores are not of its clips and classes.
    """
    split = annotations.split(scores.split)
    if split.labels is None:
        raise EpicError(f"{scores.path} has scores of {scores.split}, whose labels are not public.")
    check_classes(scores, annotations)
    verb, noun = (log_softmax(logits) for logits in scores.ordered(split.ids, str(split.path)))
    return accuracies(verb, noun, split, annotations)


def check_classes(scores: Scores, annotations: Annotations) -> None:
    """Whether scores are of as many verbs and nouns as there are; EpicError otherwise."""
    for kind, names in annotations.classes.items():
        found = getattr(scores, kind).shape[1]
        if found != len(names):
            raise EpicError(f"{scores.path} has scores of {found} {kind} classes, the challenge has {len(names)}.")


def accuracies(
    verb: np.ndarray, noun: np.ndarray, split: Split, annotations: Annotations
) -> dict[str, dict[str, Accuracy]]:
    """What :func:`score` returns, of float64 log-softmax scores (clips, classes) in the order of a labelled split."""
    assert split.labels is not None
    labels = split.labels
    verbs, nouns = top_actions(verb, noun, max(TOP))
    right = {kind: labels[kind][:, None] for kind in labels}
    hits = {
        "verb": top_classes(verb, max(TOP)) == right["verb"],
        "noun": top_classes(noun, max(TOP)) == right["noun"],
        "action": (verbs == right["verb"]) & (nouns == right["noun"]),
    }
    tail = {kind: np.isin(labels[kind], annotations.tail[kind]) for kind in labels}
    tail["action"] = tail["verb"] | tail["noun"]
    everyone = [people for list_ in annotations.unseen.values() for people in list_]
    unseen = np.asarray(split.table["participant_id"].isin(everyone), bool)
    groups = {"all": dict.fromkeys(hits, np.ones(len(unseen), bool)), "tail": tail}
    groups["unseen"] = dict.fromkeys(hits, unseen)
    return {name: {kind: _accuracy(hits[kind], group[kind]) for kind in hits} for name, group in groups.items()}


def majority(split: Split) -> dict[str, Accuracy]:
    """What the most frequent class, and for top-5 the five most frequent, of these very labels would reach."""
    assert split.labels is not None
    verb, noun = split.labels["verb"], split.labels["noun"]
    found = {}
    for kind, labels in {"verb": verb, "noun": noun, "action": verb * 2**31 + noun}.items():
        counts = np.sort(np.unique(labels, return_counts=True)[1])[::-1]
        found[kind] = Accuracy(len(labels), *(100.0 * float(counts[:k].sum()) / len(labels) for k in TOP))
    return found


def _cells(row: dict[str, Accuracy]) -> list[str]:
    cells = []
    for found in row.values():
        empty = found.top1 is None
        cells.append("–" if empty else f"{found.top1:.2f} / {found.top5:.2f}")
        cells.append(str(found.clips))
    return cells


def show(scores: tuple[Path, ...], /, annotations: Path | None = None, published: bool = True) -> None:
    """Accuracies of stored scores in percent, top-1 / top-5, each with the number of clips it is of.

    Args:
        scores: Folders of stored scores, of splits with public labels.
        annotations: Folder of EPIC_100_*.csv. None: what M3EM_EPIC_ANNOTATIONS says.
        published: Refuse label files that do not hold as much as the published ones.
    """
    if not scores:
        raise EpicError("name at least one folder of stored scores.")
    labels = Annotations(annotations_folder(annotations), published)
    table: Any = needs("rich.table", "epic").Table(title="Accuracy in percent, top-1 / top-5", header_style="bold")
    for name in ("scores of", "clips"):
        table.add_column(name)
    for kind in ("verb", "noun", "action"):
        table.add_column(kind, justify="right", no_wrap=True)
        table.add_column("of", justify="right", style="dim")
    for path in scores:
        stored = read_scores(path)
        for number, (name, row) in enumerate(score(stored, labels).items()):
            table.add_row(f"{stored.model}, {stored.split}" if number == 0 else "", GROUPS[name], *_cells(row))
        table.add_row(
            "", "majority class", *_cells(majority(labels.split(stored.split))), style="dim", end_section=True
        )
    _program.console().print(table)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line of :func:`show`."""
    return _program.run(show, arguments, "m3em_fast.epic.scoring")


if __name__ == "__main__":
    raise SystemExit(main())
