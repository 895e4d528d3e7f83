"""Submissions: what is written, how the public scorer ranks it, and what a check says of any file."""

import json
import os
import random
import tempfile
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from epic_cases import CLIPS, NOUNS, VERBS, published_folder, refused, store, write_annotations
from m3em_fast.epic import _check, submission
from m3em_fast.epic.annotations import Annotations
from m3em_fast.epic.scores import EpicError, log_softmax
from m3em_fast.epic.scoring import top_actions
from m3em_fast.epic.submission import check_submission, default_levels, write_submission
from train_cases import mutated

LEVELS = {"sls_pt": 2, "sls_tl": 3, "sls_td": 3}
CLASSES = {"verb": VERBS, "noun": NOUNS}


@pytest.fixture(scope="module")
def labels(tmp_path_factory):
    return Annotations(write_annotations(tmp_path_factory.mktemp("epic") / "labels"), published=False)


def scores(path, labels, model="A", **options):
    """Of target_test, in another order than the csv has."""
    ids = labels.split("target_test").ids
    random.Random(0).shuffle(ids)
    return store(path, "target_test", ids, model, "test", **options)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, labels):
    """A submission."""
    folder = tmp_path_factory.mktemp("whole")
    write_submission(folder / "a.zip", scores(folder / "scores", labels), labels, LEVELS)
    return folder / "a.zip"


def unpacked(path):
    with zipfile.ZipFile(path) as archive:
        assert archive.namelist() == ["test.json"] and archive.infolist()[0].compress_type == zipfile.ZIP_DEFLATED
        return json.loads(archive.read("test.json"))


def test_what_is_written(labels, tmp_path):
    stored = scores(tmp_path / "scores", labels)
    found = write_submission(tmp_path / "a.zip", stored, labels, LEVELS)
    assert (found.clips, found.levels, found.form) == (CLIPS["target_test"], LEVELS, "log-softmax")
    document = unpacked(tmp_path / "a.zip")
    results = document.pop("results_target")
    assert document == {"version": "0.2", "challenge": "domain_adaptation", **LEVELS}
    assert list(results) == labels.split("target_test").ids
    for clip, entry in results.items():
        row = stored.ids.index(clip)
        assert list(entry) == ["verb", "noun"]
        for kind in entry:
            logits = getattr(stored, kind)[row].astype(np.float64)
            wanted = log_softmax(logits[None])[0]
            assert entry[kind] == {str(i): value for i, value in enumerate(wanted)}  # every bit of a float64
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.zip", "scores"]
    write_submission(tmp_path / "b.zip", stored, labels, LEVELS)
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()


def test_the_public_scorer_ranks_it_as_we_do(labels, tmp_path):
    """It takes one softmax over the array of all clips, where raw logits of one clip can make the others vanish."""
    stored = scores(tmp_path / "scores", labels, seed=3)
    stored.verb[2] += 800  # a constant of a clip means nothing
    stored.noun[4] -= 800
    write_submission(tmp_path / "a.zip", stored, labels, LEVELS)
    results = unpacked(tmp_path / "a.zip")["results_target"]
    arrays = [np.array([list(results[clip][kind].values()) for clip in stored.ids]) for kind in ("verb", "noun")]

    def ranked(verb, noun):
        verb, noun = (np.exp(x - x.max()) / np.exp(x - x.max()).sum() for x in (verb, noun))
        product = (verb[:, :, None] * noun[:, None, :]).reshape(len(verb), -1)
        return np.argsort(product, 1, kind="stable")[:, ::-1][:, :5]

    mine = top_actions(log_softmax(stored.verb), log_softmax(stored.noun), 5)
    assert np.array_equal(ranked(*arrays), mine[0] * NOUNS + mine[1])
    raw = stored.verb.astype(float), stored.noun.astype(float)
    assert not np.array_equal(ranked(*raw), mine[0] * NOUNS + mine[1])


def test_levels():
    assert default_levels("A") == default_levels("D") == default_levels("baseline") == LEVELS
    assert default_levels("B") == default_levels("C") == {"sls_pt": 2, "sls_tl": 4, "sls_td": 3}
    assert default_levels("A+D")["sls_tl"] == 3 and default_levels("A+B+C+D")["sls_tl"] == 4
    assert default_levels("mine") is None and default_levels("A+mine") is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"split": "target_val"}, "has scores of target_val; a submission is of target_test."),
        ({"protocol": "val"}, "is of protocol 'val'; a submission is of models trained under 'test'."),
        ({"ids": tuple("abcdef")}, "lacks 6 of the 6 clips of"),
        ({"verb": np.zeros((6, 5), np.float32)}, "has scores of 5 verb classes, the challenge has 6."),
    ],
)
def test_scores_that_cannot_be_submitted(labels, tmp_path, change, words):
    stored = replace(scores(tmp_path / "scores", labels), **change)
    with pytest.raises(EpicError) as caught:
        write_submission(tmp_path / "a.zip", stored, labels, LEVELS)
    assert words in str(caught.value) and not (tmp_path / "a.zip").exists()


@pytest.mark.parametrize("value", [-1, 6, 2.0, None])
def test_levels_that_are_none(labels, tmp_path, value):
    with pytest.raises(EpicError, match="sls_tl must be a whole number from 0 to 5, got"):
        write_submission(tmp_path / "a.zip", scores(tmp_path / "scores", labels), labels, LEVELS | {"sls_tl": value})


@pytest.mark.parametrize("links", [True, False])
def test_nothing_is_written_over(labels, tmp_path, monkeypatch, links):
    stored = scores(tmp_path / "scores", labels)
    if not links:

        def no_links(*_):
            raise PermissionError(1, "Operation not permitted")

        monkeypatch.setattr(os, "link", no_links)
    write_submission(tmp_path / "a.zip", stored, labels, LEVELS)
    assert len(unpacked(tmp_path / "a.zip")["results_target"]) == 6
    (tmp_path / "b.zip").write_text("mine")
    check = submission.check_submission

    def meanwhile(*arguments):
        (tmp_path / "c.zip").write_text("mine")
        return check(*arguments)

    monkeypatch.setattr(submission, "check_submission", meanwhile)
    for name in ("b.zip", "c.zip"):
        with pytest.raises(EpicError, match=f"{name} already exists; a submission is never written over"):
            write_submission(tmp_path / name, stored, labels, LEVELS)
        assert (tmp_path / name).read_text() == "mine"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.zip", "b.zip", "c.zip", "scores"]


def test_a_full_disk_leaves_nothing_behind(labels, tmp_path, monkeypatch):
    stored = scores(tmp_path / "scores", labels)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(EpicError, match=r"a.zip could not be written \(No space left on device\)\."):
        write_submission(tmp_path / "a.zip", stored, labels, LEVELS)
    with pytest.raises(EpicError, match=r"a.zip could not be written \(No such file or directory\)\."):
        write_submission(tmp_path / "none" / "a.zip", stored, labels, LEVELS)
    assert [file.name for file in tmp_path.iterdir()] == ["scores"]


def checked(path, labels):
    split = labels.split("target_test")
    try:
        return check_submission(path, split.ids, str(split.path), CLASSES)
    except EpicError as error:
        assert "\n" not in str(error) and str(path) in str(error)
        return str(error)


def first(document):
    return document["results_target"]["P01_101_0"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda d: d.pop("version"),
            "must have exactly the entries challenge, results_target, sls_pt, sls_td, sls_tl, ver",
        ),
        (lambda d: d.update(results={}), "; missing or unknown: 'results'."),
        (lambda d: d.update(version="0.1"), "version must be '0.2', got '0.1'."),
        (lambda d: d.update(version=0.2), "version must be '0.2', got 0.2."),
        (
            lambda d: d.update(challenge="action_recognition"),
            "challenge must be 'domain_adaptation', got 'action_recog",
        ),
        (lambda d: d.update(sls_pt=6), "sls_pt must be a whole number from 0 to 5, got 6."),
        (lambda d: d.update(sls_tl=-1), "sls_tl must be a whole number from 0 to 5, got -1."),
        (lambda d: d.update(sls_td=True), "sls_td must be a whole number from 0 to 5, got True."),
        (lambda d: d.update(sls_td="3"), "sls_td must be a whole number from 0 to 5, got '3'."),
        (lambda d: d.update(results_target=[]), "results_target must be an object of clips."),
        (lambda d: d.update(results_target={}), "results_target must be an object of clips."),
        (lambda d: d["results_target"].pop("P01_101_0"), "lacks 1 of the 6 clips of"),
        (lambda d: d["results_target"].update(P12_03_112={}), "has 1 clips that"),
        (lambda d: d["results_target"].update(P01_101_0=3), "P01_101_0 must have exactly the entries verb and noun."),
        (lambda d: first(d).pop("noun"), "P01_101_0 must have exactly the entries verb and noun."),
        (lambda d: first(d).update(action={}), "P01_101_0 must have exactly the entries verb and noun."),
        (lambda d: first(d).update(verb=[0.5] * 6), "verb of P01_101_0 must be an object of 6 numbers."),
        (lambda d: first(d)["verb"].pop("5"), "must have the 6 classes '0' to '5'; missing or unknown: '5'."),
        (
            lambda d: first(d)["noun"].update({"9": 0.5}),
            "noun of P01_101_0 must have the 9 classes '0' to '8'; missing or unknown: '9'.",
        ),
        (
            lambda d: first(d).update(verb={}),
            "verb of P01_101_0 must have the 6 classes '0' to '5'; missing or unknown: '0, 1, 2, 3, 4, 5'.",
        ),
        (lambda d: first(d)["noun"].update({"3": "0.5"}), "noun of P01_101_0 must be numbers; of class 3 it is '0.5'."),
        (lambda d: first(d)["noun"].update({"3": None}), "noun of P01_101_0 must be numbers; of class 3 it is None."),
        (lambda d: first(d)["noun"].update({"3": True}), "noun of P01_101_0 must be numbers; of class 3 it is True."),
        (lambda d: first(d)["noun"].update({"3": [1]}), "noun of P01_101_0 must be numbers; of class 3 it is [1]."),
        (lambda d: first(d)["noun"].update({"3": float("nan")}), "has NaN among its numbers, which must be finite."),
        (
            lambda d: first(d)["noun"].update({"3": float("inf")}),
            "has Infinity among its numbers, which must be finite.",
        ),
        (lambda d: first(d)["noun"].update({"3": 10**400}), "noun of P01_101_0 must be finite; of class 3 it is not."),
        (
            lambda d: d.clear(),
            "must hold one object, with results_target, version, challenge and sls_pt, sls_tl, sls_td.",
        ),
    ],
    ids=range(28),
)
def test_submissions_refused(whole, labels, tmp_path, change, words):
    document = unpacked(whole)
    change(document)
    (tmp_path / "test.json").write_text(json.dumps(document))
    assert words in checked(tmp_path / "test.json", labels)
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.write(tmp_path / "test.json", "test.json")
    assert words in checked(tmp_path / "a.zip", labels)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('"P01_101_0": {', '"P02_102_1": {}, "P01_101_0": {', "'P02_102_1' appears twice in one object."),
        ('"verb": {"0": ', '"verb": {"0": 1, "0": ', "'0' appears twice in one object."),
        ('"sls_pt": 2', '"sls_pt": 2, "sls_pt": 3', "'sls_pt' appears twice in one object."),
        ('"verb": {"0": -', '"verb": {"0": 1e999, "x": -', "verb of P01_101_0 must have the 6 classes"),
        ('"verb": {"0": ', '"verb": {"0": 1e999', "must be finite; of class 0 it is not."),
        ("{", "[" * 10**5, "is no JSON document ("),
        ("}", "", "is no JSON document ("),
        ('"sls_pt": 2', '"sls_pt": ' + "9" * 5000, "is no JSON document ("),
        ("test", "test", None),
    ],
    ids=range(9),
)
def test_texts_refused(whole, labels, tmp_path, old, new, words):
    text = json.dumps(unpacked(whole))
    if new == '"verb": {"0": 1e999':
        at = text.index(old) + len(old)
        text = text[:at] + "1e999" + text[text.index(",", at) :]
    else:
        text = text.replace(old, new, 1)
    (tmp_path / "test.json").write_text(text)
    found = checked(tmp_path / "test.json", labels)
    assert words in found if words else found.form == "log-softmax"


def test_the_same_numbers_in_another_order(whole, labels, tmp_path):
    document = unpacked(whole)
    document = dict(reversed(document.items()))
    results = document["results_target"]
    for entry in results.values():
        for kind in entry:
            entry[kind] = dict(reversed(entry[kind].items()))
    document["results_target"] = dict(reversed(results.items()))
    (tmp_path / "test.json").write_text(json.dumps(document, indent=1))
    assert checked(tmp_path / "test.json", labels).clips == 6


@pytest.mark.parametrize("form", ["probabilities", "other", "mixed"])
def test_what_the_numbers_are(whole, labels, tmp_path, form, capsys):
    document = unpacked(whole)
    for entry in document["results_target"].values():
        for kind, row in entry.items():
            if form == "mixed" and kind == "verb":
                continue
            entry[kind] = {i: 2 * value if form == "other" else np.exp(value) for i, value in row.items()}
    (tmp_path / "test.json").write_text(json.dumps(document))
    assert checked(tmp_path / "test.json", labels).form == form.replace("mixed", "other")
    options = ["--annotations", str(labels.folder), "--no-published"]
    assert submission.main(["--check", str(tmp_path / "test.json"), *options]) == 0
    what = "probabilities" if form == "probabilities" else "no log-softmax scores"
    assert f"Its numbers are {what}: the public scorer" in capsys.readouterr().out


def test_files_that_are_none(whole, labels, tmp_path, monkeypatch):
    path = tmp_path / "a.zip"
    assert checked(path, labels) == f"{path} cannot be read (No such file or directory)."
    text = json.dumps(unpacked(whole))
    for names, words in [
        ([], "must hold test.json and nothing else, got ''."),
        (["results.json"], "must hold test.json and nothing else, got 'results.json'."),
        (["test.json\n"], r"must hold test.json and nothing else, got 'test.json\n'."),
        (["a/test.json"], "must hold test.json and nothing else, got 'a/test.json'."),
        (["test.json", "more.txt"], "must hold test.json and nothing else, got 'test.json, more.txt'."),
    ]:
        with zipfile.ZipFile(path, "w") as archive:
            for name in names:
                archive.writestr(name, text)
        assert checked(path, labels) == f"{path} {words}"
    data = whole.read_bytes()
    path.write_bytes(data[:200] + bytes(20) + data[220:])
    assert checked(path, labels).startswith(f"{path} is no readable zip file (")
    entry = data.index(b"PK\1\2")  # the flag of an encrypted member
    path.write_bytes(data[:6] + b"\1" + data[7 : entry + 8] + b"\1" + data[entry + 9 :])
    assert checked(path, labels).startswith(f"{path} is no readable zip file (")
    path.write_bytes(data)
    (tmp_path / "test.json").write_text(text)
    monkeypatch.setattr(_check, "MAX_BYTES", len(text) - 1)
    assert checked(path, labels) == f"{path}: test.json has {len(text) + 1} bytes; it may have at most {len(text) - 1}."
    assert checked(tmp_path / "test.json", labels).endswith(f"a submission has at most {len(text) - 1}.")
    path.unlink()
    os.mkfifo(path)
    assert checked(path, labels) == f"{path} is no ordinary file."


def test_a_member_that_unpacks_to_more_than_it_says(labels, whole, tmp_path):
    """The size in the directory is the limit: what is packed beyond it is not unpacked."""
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("test.json", b" " * 10**7)
    data = path.read_bytes()
    entry = data.index(b"PK\1\2")
    path.write_bytes(data[: entry + 24] + (10).to_bytes(4, "little") + data[entry + 28 :])
    assert checked(path, labels).startswith(f"{path} is no readable zip file (")


@given(st.data())
def test_any_bytes_are_a_submission_or_refused(whole, labels, data):
    packed = data.draw(st.booleans())
    original = whole.read_bytes() if packed else json.dumps(unpacked(whole)).encode()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a"
        path.write_bytes(mutated(data, original, len(original)))
        checked(path, labels)


def test_the_command(labels, tmp_path, capsys):
    options = ["--annotations", str(labels.folder), "--no-published"]
    path = scores(tmp_path / "scores", labels, "A+C").path
    assert submission.main([str(path), "--out", str(tmp_path / "a.zip"), *options]) == 0
    said = f"{tmp_path / 'a.zip'}: a submission of 6 clips, supervision levels PT-TL-TD 2-4-3.\n"
    assert capsys.readouterr().out == said
    assert submission.main(["--check", str(tmp_path / "a.zip"), *options]) == 0
    assert capsys.readouterr().out == said
    levels = ["--pt", "0", "--tl", "5", "--td", "4"]
    assert submission.main([str(path), "--out", str(tmp_path / "b.zip"), *levels, *options]) == 0
    assert {name: unpacked(tmp_path / "b.zip")[name] for name in LEVELS} == {"sls_pt": 0, "sls_tl": 5, "sls_td": 4}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "a folder of stored scores and --out are needed, or --check alone."),
        (["{A}"], "a folder of stored scores and --out are needed, or --check alone."),
        (["{A}", "--out", "{new}.json"], "--out must end in .zip, got "),
        (["{A}", "--check", "{new}.zip"], "--check writes nothing: give it alone, without scores and --out."),
        (["{A}", "--out", "{new}.zip", "--tl", "7"], "sls_tl must be a whole number from 0 to 5, got 7."),
        (["{A}", "--out", "{new}.zip", "--tl", "x"], "--tl must be a whole number or None, got x."),
        (
            ["{mine}", "--out", "{new}.zip"],
            "is of model 'mine', which has no levels by default: give --pt, --tl and --td.",
        ),
        (["{mine}", "--out", "{new}.zip", "--pt", "1"], "which has no levels by default"),
        (["--check", "{new}.zip"], "new.zip cannot be read (No such file or directory)."),
        (["{new}", "--out", "{new}.zip"], "new holds no stored scores: scores.json cannot be read"),
    ],
)
def test_what_the_command_refuses(labels, tmp_path, capsys, arguments, words):
    names = {model: scores(tmp_path / model, labels, model).path for model in ("A", "mine")} | {"new": tmp_path / "new"}
    options = ["--annotations", labels.folder, "--no-published"]
    assert words in refused(capsys, submission.main, [word.format(**names) for word in arguments] + options)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["A", "mine"]


def test_the_published_split(tmp_path, capsys):
    """All of it, as a user would, with 5,909 clips of 97 and 300 classes."""
    folder = published_folder()
    ids = Annotations(folder).split("target_test").ids
    path = store(tmp_path / "scores", "target_test", ids[::-1], "D", "test", classes=(97, 300)).path
    options = ["--annotations", str(folder)]
    assert submission.main([str(path), "--out", str(tmp_path / "a.zip"), *options]) == 0
    said = f"{tmp_path / 'a.zip'}: a submission of 5909 clips, supervision levels PT-TL-TD 2-3-3.\n"
    assert capsys.readouterr().out == said
    results = unpacked(tmp_path / "a.zip")["results_target"]
    assert list(results) == ids and len(results[ids[0]]["noun"]) == 300
