"""What the tests of the challenge share: label files like the published ones, but small and made up, and scores."""

import csv
import os
from pathlib import Path

import numpy as np
import pytest

from m3em_fast.epic.annotations import CLASS_COLUMNS, COLUMNS, LABELS, SPLITS
from m3em_fast.epic.scores import read_scores, write_scores

ROOT = Path(__file__).resolve().parent.parent
VERBS, NOUNS = 6, 9
CLIPS = {"source_train": 8, "target_train": 8, "source_test": 4, "target_test": 6, "source_val": 12, "target_val": 14}
TAIL = {"verb": [4, 5], "noun": [5, 7, 8]}
UNSEEN = {"test": ["P33"], "validation": ["P06"]}


def clip_row(split, number, verbs, nouns):
    """One clip, as a dictionary of text."""
    people = ("P03", "P06") if split.endswith("val") else ("P01", "P02")
    person = people[number % 2]
    video = f"{person}_{'1' * split.startswith('target')}0{number % 3 + 1}"
    row = {"narration_id": f"{video}_{number}", "participant_id": person, "video_id": video}
    row |= {"narration_timestamp": "", "start_timestamp": "00:00:01.00", "stop_timestamp": "00:00:02.5"}
    row |= {"start_frame": str(number + 1), "stop_frame": str(number + 40)}
    verb, noun = number * 5 % verbs, number * 7 % nouns
    row |= {"narration": "NA", "verb": "take", "verb_class": str(verb), "noun": "cup"}
    return row | {"noun_class": str(noun), "all_nouns": "['cup', 'NA']", "all_noun_classes": f"[{noun}, 1]"}


def write_csv(path, columns, rows):
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def write_annotations(folder, verbs=VERBS, nouns=NOUNS, clips=None):
    """All label files; ``clips`` says how many clips a split has."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, facts in SPLITS.items():
        count = (CLIPS | (clips or {}))[split]
        rows = [clip_row(split, number, verbs, nouns) for number in range(count)]
        write_csv(folder / facts.file, COLUMNS + LABELS * facts.labelled, rows)
    for kind, count in (("verb", verbs), ("noun", nouns)):
        rows = [{"id": i, "key": f"{kind} {i}", "instances": "['a', 'b']", "category": "c"} for i in range(count)]
        write_csv(folder / f"EPIC_100_{kind}_classes.csv", CLASS_COLUMNS, rows)
        write_csv(folder / f"EPIC_100_tail_{kind}s.csv", [kind], [{kind: i} for i in TAIL[kind]])
    for name, people in UNSEEN.items():
        file = folder / f"EPIC_100_unseen_participant_ids_{name}.csv"
        write_csv(file, ["participant_id"], [{"participant_id": person} for person in people])
    return folder


def store(path, split, ids, model="A", protocol="val", seed=0, classes=(VERBS, NOUNS), right=None, gain=0.0):
    """Random scores, read again; ``right`` are labels whose logits are raised by ``gain``."""
    draw = np.random.default_rng(seed)
    verb, noun = (draw.normal(size=(len(ids), count)) for count in classes)
    if right is not None:
        verb[np.arange(len(ids)), right["verb"]] += gain
        noun[np.arange(len(ids)), right["noun"]] += gain
    write_scores(path, ids, verb, noun, {"split": split, "protocol": protocol, "model": model, "seed": seed})
    return read_scores(path)


def published_folder():
    """The published label files, where this machine has them; they are not to be copied into the repository."""
    folder = Path(os.environ.get("M3EM_EPIC_ANNOTATIONS") or ROOT.parent / "shared" / "data" / "epic100")
    if not folder.is_dir():
        pytest.skip("M3EM_EPIC_ANNOTATIONS names no folder of the published label files")
    return folder


def refused(capsys, main, arguments):
    """The one sentence with which a command refuses, without the program's name."""
    try:
        code = main([str(argument) for argument in arguments])
    except SystemExit as stop:
        code = stop.code
    said = capsys.readouterr()
    assert code == 2 and said.err.count("\n") == 1, said.err
    return said.err.partition(": ")[2].removesuffix("\n")
