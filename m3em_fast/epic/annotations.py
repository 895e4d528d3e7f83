"""The challenge's label files: six splits, verb and noun classes, tail classes and unseen participants.

They are not part of this package (CC BY-NC 4.0, epic-kitchens/epic-kitchens-100-annotations). A folder holds them, and
``--annotations`` or the environment variable M3EM_EPIC_ANNOTATIONS says which.

``python -m m3em_fast.epic.annotations`` checks all of them and shows what they hold.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from m3em_fast.data._extra import needs
from m3em_fast.epic import _program
from m3em_fast.epic._errors import EpicError

__all__ = ["PROTOCOLS", "SPLITS", "Annotations", "Protocol", "Split", "annotations_folder"]

VARIABLE = "M3EM_EPIC_ANNOTATIONS"
COLUMNS = ["narration_id", "participant_id", "video_id", "narration_timestamp", "start_timestamp", "stop_timestamp"]
COLUMNS += ["start_frame", "stop_frame"]
LABELS = ["narration", "verb", "verb_class", "noun", "noun_class", "all_nouns", "all_noun_classes"]
CLASS_COLUMNS = ["id", "key", "instances", "category"]


@dataclass(frozen=True)
class Published:
    """What the published file of a split holds; without labels no verbs, nouns and actions.

    Attributes:
        file: its name.
        counts: rows, videos, participants, and where it has labels different verbs, nouns and actions.
    """

    file: str
    counts: tuple[int, ...]

    @property
    def labelled(self) -> bool:
        """Whether there are labels."""
        return len(self.counts) == 6


COUNTED = ("rows", "videos", "participants", "verb classes", "noun classes", "actions")
SPLITS = {
    "source_train": Published("EPIC_100_uda_source_train.csv", (16115, 148, 12, 86, 219, 1663)),
    "target_train": Published("EPIC_100_uda_target_train_timestamps.csv", (26115, 136, 12)),
    "source_test": Published("EPIC_100_uda_source_test_timestamps.csv", (4298, 59, 12)),
    "target_test": Published("EPIC_100_uda_target_test_timestamps.csv", (5909, 26, 12)),
    "source_val": Published("EPIC_100_uda_source_val.csv", (5002, 50, 4, 69, 147, 821)),
    "target_val": Published("EPIC_100_uda_target_val.csv", (7906, 55, 4, 77, 170, 1089)),
}
# File, its columns, and how many rows the published one has.
CLASSES = {"verb": ("EPIC_100_verb_classes.csv", 97), "noun": ("EPIC_100_noun_classes.csv", 300)}
TAIL = {"verb": ("EPIC_100_tail_verbs.csv", 86), "noun": ("EPIC_100_tail_nouns.csv", 228)}
UNSEEN = {
    "test": ("EPIC_100_unseen_participant_ids_test.csv", 3),
    "validation": ("EPIC_100_unseen_participant_ids_validation.csv", 2),
}


@dataclass(frozen=True)
class Protocol:
    """Which splits one training uses.

    Attributes:
        source: trained on with its labels.
        target: trained on without labels, whether it has any or not.
        report: what the figures, or the submission, are of.
        labelled: whether ``report`` has public labels.
    """

    source: str
    target: str
    report: str
    labelled: bool


PROTOCOLS: dict[str, Protocol] = {
    # The only honest figure without the challenge's server, and where every choice is made.
    "val": Protocol("source_val", "target_val", "target_val", labelled=True),
    "test": Protocol("source_train", "target_train", "target_test", labelled=False),
}


@dataclass(frozen=True)
class Split:
    """One split.

    Attributes:
        name: "source_val" and so on.
        path: the file.
        table: a pandas DataFrame with the file's columns in the file's order; ``start_frame``, ``stop_frame`` and the
            classes are int64, all else is text. Frames count from 1, and both ends belong to the clip.
        labels: "verb" and "noun" -> int64 array (clips,); None where there are none, or where they are not to be seen.
    """

    name: str
    path: Path
    table: Any
    labels: dict[str, np.ndarray] | None

    @property
    def ids(self) -> list[str]:
        """Narration ids, in the file's order."""
        return list(self.table["narration_id"])

    def unlabelled(self) -> Split:
        """The same clips without a trace of their labels."""
        return Split(self.name, self.path, self.table[COLUMNS], None)


def annotations_folder(given: Path | None) -> Path:
    """The folder of the label files: ``given``, or what M3EM_EPIC_ANNOTATIONS says.

    Raises:
        EpicError: neither is given, or it is no folder.
    """
    named = str(given or os.environ.get(VARIABLE, ""))
    if not named:
        raise EpicError(f"--annotations or {VARIABLE} must name the folder of the label files, EPIC_100_*.csv.")
    if not Path(named).is_dir():
        raise EpicError(f"{'--annotations' if given else VARIABLE}: {named} is no folder.")
    return Path(named)


class Annotations:
    """The label files of one folder. A split's file is read, and checked, when it is first asked for.

    Args:
        folder: where the files are.
        published: refuse files that do not hold as much as the published ones; False for labels of your own, which
            may have other classes too.

    Attributes:
        classes: "verb" and "noun" -> names of the classes, by id.
        tail: "verb" and "noun" -> ids of the tail classes, int64.
        unseen: "validation" and "test" -> participants that no training split has.

    Raises:
        EpicError: a file is missing or not as it should be; the sentence names file and row, the header being row 1.
        ImportError: pandas is missing; the message names the extra.
    """

    def __init__(self, folder: str | os.PathLike[str], published: bool = True) -> None:
        self.folder, self.published = Path(folder), published
        self.classes = {kind: self._class_names(*CLASSES[kind]) for kind in CLASSES}
        self.tail = {kind: self._tail(kind, *TAIL[kind]) for kind in TAIL}
        self.unseen = {name: self._unseen(*UNSEEN[name]) for name in UNSEEN}
        self._splits: dict[str, Split] = {}

    def split(self, name: str) -> Split:
        """One of ``SPLITS``, with its labels where it has any."""
        if name not in SPLITS:
            raise EpicError(f"{name!r:.80} is no split of the challenge; there are {', '.join(SPLITS)}.")
        if name not in self._splits:
            self._splits[name] = self._read_split(name)
        return self._splits[name]

    def training(self, protocol: Literal["val", "test"]) -> tuple[Split, Split]:
        """Source with labels, and target without: what a training may see."""
        plan = PROTOCOLS[protocol]
        source, target = self.split(plan.source), self.split(plan.target).unlabelled()
        if shared := set(source.ids) & set(target.ids):
            raise EpicError(f"{source.path} and {target.path} share {len(shared)} clips, {min(shared)!r:.80} is one.")
        return source, target

    def _rows(self, file: str, columns: list[str], count: int) -> tuple[Path, Any]:
        path = self.folder / file
        table = _read_csv(path, columns)
        if self.published and len(table) != count:
            raise EpicError(
                f"{path} has {len(table)} rows, the published file has {count}; --no-published reads one of your own."
            )
        return path, table

    def _class_names(self, file: str, count: int) -> list[str]:
        path, table = self._rows(file, CLASS_COLUMNS, count)
        ids = _integers(path, table, "id", 0, len(table) - 1)
        _refuse(path, table["id"], ids != np.arange(len(table)), "the row's place, as ids count from 0")
        _refuse(path, table["key"], table["key"] == "", "a name")
        return list(table["key"])

    def _tail(self, kind: str, file: str, count: int) -> np.ndarray:
        path, table = self._rows(file, [kind], count)
        values = _integers(path, table, kind, 0, len(self.classes[kind]) - 1)
        _refuse(path, table[kind], table[kind].duplicated(), "a class that was not there before")
        return values

    def _unseen(self, file: str, count: int) -> list[str]:
        path, table = self._rows(file, ["participant_id"], count)
        _refuse(path, table["participant_id"], ~table["participant_id"].str.fullmatch(r"P\d\d"), "P and two digits")
        return list(table["participant_id"])

    def _read_split(self, name: str) -> Split:
        facts = SPLITS[name]
        path, table = self._rows(facts.file, COLUMNS + LABELS * facts.labelled, facts.counts[0])
        if not len(table):
            raise EpicError(f"{path} has no clips.")
        ids, videos, people = table["narration_id"], table["video_id"], table["participant_id"]
        _refuse(path, people, ~people.str.fullmatch(r"P\d\d"), "P and two digits")
        _refuse(path, videos, ~videos.str.fullmatch(r"P\d\d_\d{2,3}") | (videos.str[:3] != people), "its participant's")
        number = ids.str.rpartition("_")
        _refuse(path, ids, ~number[2].str.fullmatch(r"\d+") | (number[0] != videos), "its video's, _ and a number")
        _refuse(path, ids, ids.duplicated(), "an id that was not there before")
        for column in ("start_timestamp", "stop_timestamp"):
            bad = ~table[column].str.fullmatch(r"\d\d:\d\d:\d\d(\.\d+)?")
            _refuse(path, table[column], bad, "hours:minutes:seconds")
        frames = [_integers(path, table, column, 1, 2**31) for column in ("start_frame", "stop_frame")]
        _refuse(path, table["stop_frame"], frames[1] < frames[0], "at or after start_frame")
        numbers = dict(zip(("start_frame", "stop_frame"), frames, strict=True))
        labels = None
        if facts.labelled:
            last = {kind: len(names) - 1 for kind, names in self.classes.items()}
            labels = {kind: _integers(path, table, f"{kind}_class", 0, last[kind]) for kind in last}
            numbers |= {f"{kind}_class": values for kind, values in labels.items()}
        split = Split(name, path, table.assign(**numbers), labels)
        if self.published and (found := _counts(split)) != facts.counts:
            place = next(i for i, count in enumerate(facts.counts) if found[i] != count)
            raise EpicError(
                f"{path} has {found[place]} {COUNTED[place]}, the published file has {facts.counts[place]}; "
                "--no-published reads one of your own."
            )
        return split


def _counts(split: Split) -> tuple[int, ...]:
    table = split.table
    found = (len(table), table["video_id"].nunique(), table["participant_id"].nunique())
    if split.labels is None:
        return found
    verb, noun = split.labels["verb"], split.labels["noun"]
    return (*found, *(len(np.unique(labels)) for labels in (verb, noun, verb * 2**31 + noun)))


def _read_csv(path: Path, columns: list[str]) -> Any:
    """A DataFrame of text, in which nothing stands for a number or for "missing" yet."""
    pandas = needs("pandas", "epic")
    if path.exists() and not path.is_file():
        raise EpicError(f"{path} is no ordinary file.")
    try:
        # Without a header of its own the first row says how many fields a row may have.
        table = pandas.read_csv(path, header=None, dtype=str, na_filter=False, skip_blank_lines=False, encoding="utf-8")
    except OSError as error:
        raise EpicError(f"{path} cannot be read ({error.strerror}).") from error
    except ValueError as error:  # pandas' own errors are such, too
        raise EpicError(f"{path} is no csv file ({' '.join(str(error).split())[:100]}).") from error
    table = table.fillna("")
    found = [str(name).removeprefix("\ufeff") for name in table.iloc[0]]
    if found != columns:
        raise EpicError(f"{path} must have the columns {', '.join(columns)}, got {', '.join(found)!r:.200}.")
    table = table.iloc[1:].reset_index(drop=True)
    table.columns = columns
    for name in columns:
        _refuse(path, table[name], table[name].str.contains("\n", regex=False), "on one line")
    return table


def _refuse(path: Path, column: Any, bad: Any, wanted: str) -> None:
    """EpicError about the first row that is ``bad``, if one is."""
    bad = np.asarray(bad, bool)
    if bad.any():
        row = int(bad.argmax())
        raise EpicError(f"{path}, row {row + 2}: {column.name} must be {wanted}, got {column.iloc[row]!r:.80}.")


def _integers(path: Path, table: Any, name: str, low: int, high: int) -> np.ndarray:
    column = table[name]
    whole = np.asarray(column.str.fullmatch(r"[0-9]{1,10}"), bool)
    values = column.where(whole, "-1").astype(np.int64).to_numpy(copy=True)
    _refuse(path, column, ~whole | (values < low) | (values > high), f"a whole number from {low} to {high}")
    return values


def show(annotations: Path | None = None, published: bool = True) -> None:
    """Check all label files of the challenge, and show what they hold.

    Args:
        annotations: Folder of EPIC_100_*.csv. None: what M3EM_EPIC_ANNOTATIONS says.
        published: Refuse files that do not hold as much as the published ones.
    """
    labels = Annotations(annotations_folder(annotations), published)
    table = needs("rich.table", "epic").Table(title=f"Labels in {labels.folder}", header_style="bold")
    table.add_column("split", no_wrap=True)
    for name in ("clips", *COUNTED[1:]):
        table.add_column(name, justify="right")
    for name in SPLITS:
        counts = _counts(labels.split(name))
        table.add_row(name, *(str(count) for count in counts), *["–"] * (len(COUNTED) - len(counts)))
    for protocol in PROTOCOLS:
        labels.training(protocol)  # type: ignore[arg-type]
    _program.console().print(table)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line of :func:`show`."""
    return _program.run(show, arguments, "m3em_fast.epic.annotations")


if __name__ == "__main__":
    raise SystemExit(main())
