"""Label files of the challenge: what is read from them, what a training may see of it, and what is refused."""

import os
import shutil
import sys
import warnings
from contextlib import contextmanager

import numpy as np
import pandas
import pytest

from epic_cases import CLIPS, TAIL, UNSEEN, clip_row, published_folder, refused, write_annotations
from m3em_fast.epic import annotations
from m3em_fast.epic.annotations import PROTOCOLS, SPLITS, Annotations, annotations_folder
from m3em_fast.epic.scores import EpicError

# The strings of pandas 3, and the objects that pandas 2 has instead.
STRINGS = ["str", "object"] if int(pandas.__version__.split(".")[0]) >= 3 else ["object"]


@contextmanager
def texts_as(strings):
    if STRINGS == ["object"]:
        yield
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the option goes with pandas 4
        with pandas.option_context("future.infer_string", strings == "str"):
            yield


@pytest.fixture
def folder(tmp_path):
    return write_annotations(tmp_path / "labels")


@pytest.fixture(scope="module")
def published():
    return published_folder()


def edit(path, row, column, value):
    """Change one cell; the header is row 1, and column None puts whole lines."""
    lines = path.read_text(encoding="utf-8").split("\n")
    if column is None:
        lines[row - 1] = value
        path.write_text("\n".join(lines), encoding="utf-8")
        return
    table = pandas.read_csv(path, dtype=str, keep_default_na=False)
    table.loc[row - 2, column] = value
    table.to_csv(path, index=False)


@pytest.mark.parametrize("strings", STRINGS)
def test_what_is_read(folder, strings):
    with texts_as(strings):
        labels = Annotations(folder, published=False)
        assert labels.classes["verb"] == [f"verb {i}" for i in range(6)]
        assert labels.tail["verb"].tolist() == TAIL["verb"] and labels.tail["noun"].tolist() == TAIL["noun"]
        assert labels.unseen == UNSEEN
        for name, count in CLIPS.items():
            split = labels.split(name)
            rows = [clip_row(name, number, 6, 9) for number in range(count)]
            assert split.ids == [row["narration_id"] for row in rows]
            assert split.table["start_frame"].tolist() == [int(row["start_frame"]) for row in rows]
            assert (split.labels is not None) == SPLITS[name].labelled
            if split.labels:
                for kind in ("verb", "noun"):
                    assert split.labels[kind].tolist() == [int(row[f"{kind}_class"]) for row in rows]
                    assert split.labels[kind].dtype == split.table[f"{kind}_class"].dtype == np.int64
                assert set(split.table["narration"]) == {"NA"}  # text, and nothing that is missing
                assert set(split.table["narration_timestamp"]) == {""}  # is so in the published files as well


def test_protocols():
    val, test = PROTOCOLS["val"], PROTOCOLS["test"]
    assert (val.source, val.target, val.report, val.labelled) == ("source_val", "target_val", "target_val", True)
    assert (test.source, test.target, test.report) == ("source_train", "target_train", "target_test")
    assert not test.labelled
    assert SPLITS[val.source].labelled and SPLITS[test.source].labelled and not SPLITS[test.report].labelled


@pytest.mark.parametrize("protocol", ["val", "test"])
def test_a_training_sees_no_label_of_the_target(folder, protocol):
    source, target = Annotations(folder, published=False).training(protocol)
    assert (source.name, target.name) == (PROTOCOLS[protocol].source, PROTOCOLS[protocol].target)
    assert source.labels is not None and target.labels is None
    assert list(target.table.columns) == annotations.COLUMNS
    assert len(target.ids) == CLIPS[target.name]


def test_source_and_target_share_no_clip(folder):
    shutil.copy(folder / SPLITS["source_val"].file, folder / SPLITS["target_val"].file)
    with pytest.raises(EpicError, match=r"source_val.csv and .*target_val.csv share 12 clips, 'P03_01_0' is one\."):
        Annotations(folder, published=False).training("val")


CELLS = [
    ("narration_id", "P03_01", "must be its video's, _ and a number, got 'P03_01'"),
    ("narration_id", "P03_02_7", "must be its video's, _ and a number, got 'P03_02_7'"),
    ("narration_id", "P03_01_x", "must be its video's"),
    ("narration_id", "", "must be its video's, _ and a number, got ''"),
    ("participant_id", "P3", "must be P and two digits, got 'P3'"),
    ("video_id", "P03-01", "video_id must be its participant's"),
    ("video_id", "P06_01", "video_id must be its participant's"),
    ("start_timestamp", "1.5", "start_timestamp must be hours:minutes:seconds, got '1.5'"),
    ("stop_timestamp", "", "stop_timestamp must be hours:minutes:seconds"),
    ("start_frame", "0", "start_frame must be a whole number from 1 to 2147483648, got '0'"),
    ("start_frame", "1.0", "start_frame must be a whole number"),
    ("start_frame", "٣", "start_frame must be a whole number"),
    ("stop_frame", "1", "stop_frame must be at or after start_frame, got '1'"),
    ("stop_frame", "9" * 30, "stop_frame must be a whole number"),
    ("verb_class", "6", "verb_class must be a whole number from 0 to 5, got '6'"),
    ("verb_class", "-1", "verb_class must be a whole number from 0 to 5, got '-1'"),
    ("noun_class", "9", "noun_class must be a whole number from 0 to 8, got '9'"),
    ("noun_class", "", "noun_class must be a whole number from 0 to 8, got ''"),
    ("noun_class", "cup", "noun_class must be a whole number from 0 to 8, got 'cup'"),
]


@pytest.mark.parametrize("strings", STRINGS)
@pytest.mark.parametrize(("column", "value", "words"), CELLS)
def test_a_cell_that_is_wrong_is_named_with_file_and_row(folder, column, value, words, strings):
    path = folder / SPLITS["source_val"].file
    edit(path, 8, column, value)
    with texts_as(strings):
        labels = Annotations(folder, published=False)
        with pytest.raises(EpicError) as caught:
            labels.split("source_val")
        assert str(caught.value).startswith(f"{path}, row 8: ") and words in str(caught.value)
        assert len(labels.split("target_val").ids) == CLIPS["target_val"]


LISTS = [
    ("EPIC_100_verb_classes.csv", 4, "id", "3", "row 4: id must be the row's place, as ids count from 0, got '3'"),
    ("EPIC_100_noun_classes.csv", 4, "id", "x", "row 4: id must be a whole number from 0 to 8, got 'x'"),
    ("EPIC_100_noun_classes.csv", 5, "key", "", "row 5: key must be a name, got ''"),
    ("EPIC_100_tail_verbs.csv", 3, "verb", "6", "row 3: verb must be a whole number from 0 to 5, got '6'"),
    ("EPIC_100_tail_nouns.csv", 4, "noun", "5", "row 4: noun must be a class that was not there before, got '5'"),
    ("EPIC_100_unseen_participant_ids_test.csv", 2, "participant_id", "33", "row 2: participant_id must be P and two"),
]


@pytest.mark.parametrize(("file", "row", "column", "value", "words"), LISTS)
def test_classes_and_lists_are_checked(folder, file, row, column, value, words):
    edit(folder / file, row, column, value)
    with pytest.raises(EpicError) as caught:
        Annotations(folder, published=False)
    assert f"{folder / file}, {words}" in str(caught.value)


def read(folder, name="source_val"):
    with pytest.raises(EpicError) as caught:
        Annotations(folder, published=False).split(name)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_same_clip_twice(folder):
    path = folder / SPLITS["target_test"].file
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines, lines[3]]) + "\n")
    assert read(folder, "target_test") == (
        f"{path}, row {len(lines) + 1}: narration_id must be an id that was not there before, got 'P01_103_2'."
    )


@pytest.mark.parametrize("line", ["a,b", "1,2,3,4,5,6,7,8,9", ""])
def test_columns(folder, line):
    path = folder / SPLITS["target_test"].file
    edit(path, 1, None, line)
    said = read(folder, "target_test")
    assert said.startswith(str(path)) and ("must have the columns narration_id, " in said or "is no csv file" in said)


def test_columns_of_labels_where_there_should_be_none(folder):
    shutil.copy(folder / SPLITS["target_val"].file, folder / SPLITS["target_test"].file)
    assert "must have the columns" in read(folder, "target_test")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("P03_01_6,P03,P03_01", "row 8: start_timestamp must be hours:minutes:seconds, got ''"),
        (",".join("x" * 16), "is no csv file (Error tokenizing data"),
        ('"P03_01_6,P03', "row 8: narration_id must be on one line, got "),
        ("", "row 8: participant_id must be P and two digits, got ''"),
    ],
)
def test_lines_that_are_none(folder, line, words):
    edit(folder / SPLITS["source_val"].file, 8, None, line)
    assert words in read(folder)


def test_files_that_are_none(folder, monkeypatch):
    path = folder / SPLITS["source_val"].file
    content = path.read_bytes()
    path.write_bytes(b"\xef\xbb\xbf" + content)  # as a spreadsheet may save it
    assert len(Annotations(folder, published=False).split("source_val").ids) == CLIPS["source_val"]
    path.write_bytes(content.replace(b"cup", b"c\xe9p"))
    assert read(folder).startswith(f"{path} is no csv file ('utf-8' codec can't decode")
    path.write_bytes(content + b'"P03_01_12')
    assert read(folder).startswith(f"{path} is no csv file (Error tokenizing data")
    path.write_bytes(content.splitlines()[0] + b"\n")
    assert read(folder) == f"{path} has no clips."
    path.write_bytes(b"")
    assert "is no csv file" in read(folder)
    path.unlink()
    assert read(folder) == f"{path} cannot be read (No such file or directory)."
    os.mkfifo(path)
    assert read(folder) == f"{path} is no ordinary file."
    assert read(folder, "source_test2").startswith(
        "'source_test2' is no split of the challenge; there are source_train"
    )


def test_files_of_another_size_than_the_published_ones_are_refused(folder, monkeypatch):
    with pytest.raises(EpicError) as caught:
        Annotations(folder)
    words = "EPIC_100_verb_classes.csv has 6 rows, the published file has 97; --no-published reads one of your own."
    assert words in str(caught.value)
    write_annotations(folder, 97, 300)
    for kind, count in (("verb", 86), ("noun", 228)):
        numbers = "\n".join(map(str, range(count)))
        (folder / f"EPIC_100_tail_{kind}s.csv").write_text(f"{kind}\n{numbers}\n")
    for name, count in (("test", 3), ("validation", 2)):
        people = "\n".join(f"P{i:02}" for i in range(count))
        (folder / f"EPIC_100_unseen_participant_ids_{name}.csv").write_text(f"participant_id\n{people}\n")
    labels = Annotations(folder)
    with pytest.raises(EpicError, match=r"source_val.csv has 12 rows, the published file has 5002; --no-published"):
        labels.split("source_val")
    right = (12, 6, 2, 12, 12, 12)
    facts = SPLITS["source_val"]
    for place, what in enumerate(annotations.COUNTED[1:], 1):
        wrong = tuple(count + (i == place) for i, count in enumerate(right))
        monkeypatch.setitem(SPLITS, "source_val", annotations.Published(facts.file, wrong))
        with pytest.raises(EpicError, match=f"has {right[place]} {what}, the published file has {right[place] + 1};"):
            labels.split("source_val")
    monkeypatch.setitem(SPLITS, "source_val", annotations.Published(facts.file, right))
    assert len(labels.split("source_val").ids) == 12


def test_the_folder_is_named_by_option_or_variable(tmp_path, monkeypatch):
    monkeypatch.delenv("M3EM_EPIC_ANNOTATIONS", raising=False)
    with pytest.raises(EpicError, match="--annotations or M3EM_EPIC_ANNOTATIONS must name the folder"):
        annotations_folder(None)
    monkeypatch.setenv("M3EM_EPIC_ANNOTATIONS", str(tmp_path))
    assert annotations_folder(None) == tmp_path
    with pytest.raises(EpicError, match=r"--annotations: .*none is no folder"):
        annotations_folder(tmp_path / "none")
    (tmp_path / "other").mkdir()
    assert annotations_folder(tmp_path / "other") == tmp_path / "other"
    monkeypatch.setenv("M3EM_EPIC_ANNOTATIONS", str(tmp_path / "none"))
    with pytest.raises(EpicError, match=r"M3EM_EPIC_ANNOTATIONS: .*none is no folder"):
        annotations_folder(None)


def test_the_command(folder, capsys, monkeypatch):
    assert annotations.main(["--annotations", str(folder), "--no-published"]) == 0
    shown = capsys.readouterr().out
    assert all(f"│ {name} " in shown for name in SPLITS) and "│    14 │" in shown
    said = refused(capsys, annotations.main, ["--annotations", folder])
    assert said.startswith(f"{folder / 'EPIC_100_verb_classes.csv'} has 6 rows, the published file has 97")
    monkeypatch.setitem(sys.modules, "pandas", None)
    said = refused(capsys, annotations.main, ["--annotations", folder])
    assert said.startswith("pandas could not be imported") and said.endswith('pip install "m3em_fast[epic]".')


def test_ctrl_c_ends_a_command_in_a_line(folder, capsys, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(annotations, "Annotations", interrupted)
    assert annotations.main(["--annotations", str(folder)]) == 130
    assert capsys.readouterr().err == "m3em_fast.epic.annotations: interrupted; nothing was left half written.\n"


def test_the_published_files(published):
    labels = Annotations(published)
    assert (len(labels.classes["verb"]), len(labels.classes["noun"])) == (97, 300)
    assert labels.classes["verb"][0] == "take" and labels.classes["noun"][0] == "tap"
    for name, facts in SPLITS.items():
        split = labels.split(name)  # which compares all counts
        assert len(split.ids) == facts.counts[0]
        assert not set(split.table["participant_id"]) & {
            person for people in labels.unseen.values() for person in people
        }
    for protocol in PROTOCOLS:
        source, target = labels.training(protocol)
        assert set(source.table["participant_id"]) == set(target.table["participant_id"])


def test_a_published_file_that_was_shortened_or_relabelled(published, tmp_path):
    for file in published.glob("EPIC_100_*.csv"):
        (tmp_path / file.name).symlink_to(file)
    path = tmp_path / SPLITS["source_val"].file
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    path.unlink()
    path.write_text("".join(lines[:-1]), encoding="utf-8")
    labels = Annotations(tmp_path)
    with pytest.raises(EpicError, match="has 5001 rows, the published file has 5002"):
        labels.split("source_val")
    path.write_text("".join(lines), encoding="utf-8")
    rare = 96 - np.isin(np.arange(97), Annotations(published).split("source_val").labels["verb"])[::-1].argmin()
    edit(path, 5002, "verb_class", str(rare))
    with pytest.raises(EpicError, match="has 70 verb classes, the published file has 69"):
        labels.split("source_val")
