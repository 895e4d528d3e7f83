"""Stored scores: what is written comes back, and what is no such folder, or was altered, is refused."""

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from m3em_fast.epic import scores as stored
from m3em_fast.epic.scores import EpicError, log_softmax, read_scores, write_scores
from train_cases import mutated

ABOUT = {"split": "target_val", "protocol": "val", "model": "A", "method": "m3em", "seed": 3}
IDS = ["P03_101_0", "P03_101_1", "P06_102_2"]


@pytest.fixture(scope="module")
def arrays():
    draw = np.random.default_rng(0)
    return draw.normal(size=(3, 97)).astype(np.float32), draw.normal(size=(3, 300)).astype(np.float32)


@pytest.fixture
def folder(tmp_path, arrays):
    write_scores(tmp_path / "scores", IDS, *arrays, ABOUT)
    return tmp_path / "scores"


def test_what_is_written_comes_back(tmp_path, arrays):
    forms = [arrays, [a.astype(np.float64) for a in arrays], [torch.from_numpy(a) for a in arrays]]
    forms += [[np.asfortranarray(a) for a in arrays], [a.astype(">f4") for a in arrays]]
    for number, form in enumerate(forms):
        path = tmp_path / "deep" / str(number)
        write_scores(str(path), tuple(IDS), *form, ABOUT)
        found = read_scores(path)
        assert (found.ids, found.split, found.protocol, found.model) == (tuple(IDS), "target_val", "val", "A")
        assert found.about == {"method": "m3em", "seed": 3} and found.path == path
        for kind, array in zip(("verb", "noun"), arrays, strict=True):
            values = getattr(found, kind)
            assert values.dtype == np.float32 and np.array_equal(values, array)
        assert sorted(file.name for file in path.iterdir()) == ["noun.npy", "scores.json", "verb.npy"]
    assert len(list((tmp_path / "deep").iterdir())) == len(forms)  # no temporary folder stays


def test_rows_come_in_the_order_that_is_asked_for(folder, arrays):
    verb, noun = read_scores(folder).ordered([IDS[2], IDS[0], IDS[1]], "labels.csv")
    assert np.array_equal(verb, arrays[0][[2, 0, 1]]) and np.array_equal(noun, arrays[1][[2, 0, 1]])


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        ([*IDS, "P30_101_9"], "lacks 1 of the 4 clips of labels.csv, the first 'P30_101_9'."),
        (IDS[:1], "has 2 clips that labels.csv does not have, the first 'P03_101_1'."),
        (["a", *IDS[:2]], "lacks 1 of the 3 clips of labels.csv, the first 'a'."),
    ],
)
def test_other_clips_are_refused(folder, ids, words):
    with pytest.raises(EpicError) as caught:
        read_scores(folder).ordered(ids, "labels.csv")
    assert str(caught.value) == f"{folder} {words}"


def test_log_softmax():
    logits = np.array([[0.0, 0.0], [1e4, -1e4], [3e38, 0.0], [-200.0, -200.0]], np.float32)
    found = log_softmax(logits)
    assert found.dtype == np.float64 and np.isfinite(found).all()
    assert np.array_equal(found[:2], [[-np.log(2), -np.log(2)], [0.0, -2e4]]) and np.array_equal(found[3], found[0])
    random = np.random.default_rng(0).normal(size=(5, 300), scale=9).astype(np.float32)
    wanted = torch.log_softmax(torch.from_numpy(random).double(), -1).numpy()
    assert abs(log_softmax(random) - wanted).max() < 1e-13


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"ids": []}, "ids must be narration ids, at least one of them."),
        ({"ids": ["a", "b", 3]}, "ids must be narration ids, at least one of them."),
        ({"ids": ["a", "b", "a"]}, "narration id 'a' appears twice."),
        ({"ids": ["a", "b"]}, "verb scores must be 2 clips x classes, got shape (3, 97)."),
        ({"verb": np.zeros((3, 0))}, "verb scores must be 3 clips x classes, got shape (3, 0)."),
        ({"noun": np.zeros((3, 4, 5))}, "noun scores must be 3 clips x classes, got shape (3, 4, 5)."),
        ({"noun": np.full((3, 4), "a")}, "noun scores must be numbers (of <U1)."),
        ({"noun": np.zeros((3, 4), complex)}, "noun scores must be numbers (of complex128)."),
        ({"noun": [[1, 2], [3]]}, "noun scores must be numbers ("),
        (
            {"noun": np.array([[1.0], [np.nan], [np.inf]])},
            "noun scores must be finite in float32; in 2 of 3 rows they are not, first in 1.",
        ),
        (
            {"verb": np.array([[1.0], [2.0], [1e39]])},
            "verb scores must be finite in float32; in 1 of 3 rows they are not, first in 2.",
        ),
        ({"noun": torch.zeros(3, 4, requires_grad=True)}, "noun scores must be numbers ("),
        ({"about": {"split": "a", "protocol": "b"}}, "model must be a word, got None."),
        ({"about": {"split": "", "protocol": "b", "model": "A"}}, "split must be a word, got ''."),
        ({"about": {**ABOUT, "seed": np.float32(3)}}, "about must be what JSON can hold (Object of type float32"),
        ({"about": {**ABOUT, "loss": float("nan")}}, "about must be what JSON can hold (Out of range"),
    ],
    ids=range(16),
)
def test_what_cannot_be_stored(tmp_path, arrays, change, words):
    given_ = {"ids": IDS, "verb": arrays[0], "noun": arrays[1], "about": ABOUT} | change
    with pytest.raises(EpicError) as caught:
        write_scores(tmp_path / "scores", **given_)
    assert str(caught.value).startswith(f"{tmp_path / 'scores'}: ") and words in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_written_over(folder, arrays):
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    with pytest.raises(EpicError, match="already exists; scores are never written over"):
        write_scores(folder, IDS, *arrays, ABOUT)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    (folder.parent / "link").symlink_to("nowhere")
    with pytest.raises(EpicError, match="already exists"):
        write_scores(folder.parent / "link", IDS, *arrays, ABOUT)


# A child that dies at the n-th thing that it does to the file system, for every n until it ends by itself; and the same
# where one before it had died between the two renames.
REPLACING = """
import os, shutil, sys
from pathlib import Path
import numpy as np
from m3em_fast.epic.scores import read_scores, write_scores
folder, ids, said = Path(sys.argv[1]), ["a", "b"], {"split": "s", "protocol": "p", "model": "A"}
place, before = folder / "s[1]", folder / ".s[1].before"
def write(value, replace):
    write_scores(place, ids, np.full((2, 97), value), np.full((2, 300), value), said, replace=replace)
def stands():
    found = read_scores(place)
    values = np.unique(np.concatenate([found.verb.ravel(), found.noun.ravel()]))
    assert len(values) == 1, values
    return int(values[0])
def dies(steps):
    def hook(event, arguments):
        nonlocal steps
        if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"):
            steps -= 1
            if steps < 0:
                os._exit(9)
    sys.addaudithook(hook)
write(0, False)
value, found = 0, []
for waits in (False, True):
    for steps in range(1000):
        if waits and place.exists():
            shutil.rmtree(before, ignore_errors=True)
            place.rename(before)
        child = os.fork()
        if not child:
            dies(steps)
            write(value + 1, True)
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code in (0, 9), code
        found.append(stands() - value)
        assert found[-1] in (0, 1)
        value += found[-1]
        if not code:
            break
        if steps % 2:  # else the next child finds what this one has left
            value += 5
            write(value, True)
            assert stands() == value and [path.name for path in folder.iterdir()] == ["s[1]"]
    assert [path.name for path in folder.iterdir()] == ["s[1]"]
    assert found.count(0) >= 6 and found.count(1) >= 4, found
    found.clear()
"""


def test_killed_at_any_step_the_old_scores_or_the_new_ones_stand(tmp_path):
    done = subprocess.run([sys.executable, "-c", REPLACING, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("after", [1, 2])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_what_could_not_be_replaced_keeps_its_name(folder, arrays, monkeypatch, after, error):
    real, calls = os.rename, []

    def fails(*arguments):
        calls.append(arguments)
        if len(calls) == after:
            raise error
        real(*arguments)

    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    monkeypatch.setattr(os, "rename", fails)
    with pytest.raises(KeyboardInterrupt if error is KeyboardInterrupt else EpicError):
        write_scores(folder, IDS, *arrays, {**ABOUT, "model": "B"}, replace=True)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert list(folder.parent.iterdir()) == [folder]
    write_scores(folder, IDS, *arrays, {**ABOUT, "model": "B"}, replace=True)
    assert read_scores(folder).model == "B" and list(folder.parent.iterdir()) == [folder]


def test_only_scores_are_replaced(folder, arrays):
    whole = shutil.copytree(folder, folder.parent / "deep" / "whole")
    (folder / "scores.json").unlink()
    others = [folder, folder.parent / "link", folder.parent / "file"]
    others[1].symlink_to(whole)
    others[2].write_text("x")
    for path in others:
        with pytest.raises(EpicError, match=r"is no folder of stored scores; nothing else is written over\."):
            write_scores(path, IDS, *arrays, ABOUT, replace=True)
    assert sorted(file.name for file in folder.iterdir()) == ["noun.npy", "verb.npy"]
    assert sorted(folder.parent.iterdir()) == sorted([*others, whole.parent]) and len(list(whole.iterdir())) == 3


def test_what_waits_for_its_replacement_is_read_and_not_written_over(folder, arrays, monkeypatch):
    waits = folder.with_name(".scores.before")
    folder.rename(waits)
    found = read_scores(folder)
    assert found.path == folder and np.array_equal(found.verb, arrays[0])
    with pytest.raises(EpicError, match=r"\.scores\.before already exists; scores are never written over"):
        write_scores(folder, IDS, *arrays, ABOUT)
    shutil.copytree(waits, folder)
    (waits / "verb.npy").unlink()  # beside scores it is a rest, and not looked at
    monkeypatch.chdir(folder)
    for path in (folder, "."):
        assert np.array_equal(read_scores(path).verb, arrays[0])


@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_a_full_disk_leaves_nothing_behind(tmp_path, arrays, monkeypatch, call):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, call, full)
    with pytest.raises(EpicError, match=r"scores could not be written \(No space left on device\)\."):
        write_scores(tmp_path / "scores", IDS, *arrays, ABOUT)
    assert list(tmp_path.iterdir()) == []


def read(folder):
    with pytest.raises(EpicError) as caught:
        read_scores(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def rewrite(folder, change, digest=True):
    """Alter the document; its own checksum is made right again, so that what is looked for is what was altered."""
    document = json.loads((folder / "scores.json").read_text())
    change(document)
    if digest and isinstance(document.get("sha256"), dict):
        rest = {name: value for name, value in document.items() if name != "sha256"}
        document["sha256"]["scores.json"] = hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
    (folder / "scores.json").write_text(json.dumps(document))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d.update(format="x"), "is no document of stored scores: its format should be 'm3em-epic-scores'."),
        (lambda d: d.update(version=2), "has version 2; this m3em_fast reads version 1 and no other."),
        (lambda d: d.update(version=True), "has version True;"),
        (
            lambda d: d.pop("model"),
            "must have exactly about, classes, format, ids, model, protocol, sha256, split, version",
        ),
        (lambda d: d.update(more=1), "must have exactly about, classes"),
        (lambda d: d["sha256"].pop("verb.npy"), "must have exactly about, classes"),
        (lambda d: d.update(sha256=[]), "must have exactly about, classes"),
        (lambda d: d["classes"].update(action=4), "must have exactly about, classes"),
        (lambda d: d.update(ids={}), "ids must be a list and about an object."),
        (lambda d: d.update(about=[]), "ids must be a list and about an object."),
        (lambda d: d.update(ids=["a", "a", "b"]), "narration id 'a' appears twice."),
        (lambda d: d.update(ids=["a", "b"]), "verb.npy holds (3, 97) of float32, scores.json says (2, 97) of float32."),
        (lambda d: d.update(ids=["a", "b", 3]), "ids must be narration ids, at least one of them."),
        (lambda d: d.update(split=3), "split must be a word, got 3."),
        (
            lambda d: d["classes"].update(verb=96),
            "verb.npy holds (3, 97) of float32, scores.json says (3, 96) of float32.",
        ),
        (lambda d: d["classes"].update(verb=True), "its number of classes must be from 1 to 65536, got True."),
        (lambda d: d["classes"].update(noun=10**9), "its number of classes must be from 1 to 65536, got 1000000000."),
        (lambda d: d["sha256"].update({"noun.npy": 3}), "noun.npy was altered: its SHA-256 is "),
    ],
    ids=range(18),
)
def test_documents_refused(folder, change, words):
    rewrite(folder, change)
    assert words in read(folder)


@pytest.mark.parametrize("name", ["ids", "split", "protocol", "model", "about", "classes"])
def test_an_altered_document(folder, name):
    changes = {"ids": [IDS[1], IDS[0], IDS[2]], "about": {}, "classes": {"verb": 97, "noun": 299}}
    rewrite(folder, lambda d: d.update({name: changes.get(name, "other")}), digest=False)
    assert read(folder) == f"{folder / 'scores.json'} was altered: its entries do not have the SHA-256 that it gives."


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"\xff", b"NaN", b"[" * 10**5])
def test_documents_that_are_none(folder, data):
    if data == b"NaN":
        data = (folder / "scores.json").read_bytes().replace(b'"seed": 3', b'"seed": NaN')
    (folder / "scores.json").write_bytes(data)
    assert "is no JSON document (" in read(folder) or "is no document of stored scores" in read(folder)


def exchange(folder, data):
    """Another verb.npy, with its checksum."""
    (folder / "verb.npy").write_bytes(data)
    rewrite(folder, lambda d: d["sha256"].update({"verb.npy": hashlib.sha256(data).hexdigest()}))


def npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


def test_arrays_refused(folder, arrays):
    path = folder / "verb.npy"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert read(folder).startswith(f"{path} was altered: its SHA-256 is ")
    for array in (arrays[0][:2], arrays[0].astype(np.float64)[:, :48], arrays[0].astype(">f4"), arrays[0].T):
        exchange(folder, npy(array))
        assert f"{path} holds " in read(folder)
    spoilt = arrays[0].copy()
    spoilt[1, 5] = np.nan
    exchange(folder, npy(spoilt))
    assert read(folder) == f"{path} must be finite in float32; in 1 of 3 rows they are not, first in 1."
    exchange(folder, npy(np.array([os.getcwd], object)))
    assert read(folder).startswith(f"{path} is no readable .npy file (Object arrays cannot be loaded")
    exchange(folder, npy(arrays[0])[:200])
    assert read(folder).startswith(f"{path} is no readable .npy file (")
    path.unlink()
    assert read(folder) == f"{path} cannot be read (No such file or directory)."
    os.mkfifo(path)
    assert read(folder) == f"{path} is no ordinary file."


def test_no_scores(tmp_path, monkeypatch):
    assert read(tmp_path / "none").endswith(
        "holds no stored scores: scores.json cannot be read (No such file or directory)."
    )
    for name in ("target_val", "source_val", ".source_val.before", "target_val.0123abcd.tmp"):
        (tmp_path / "run" / "scores" / name).mkdir(parents=True)
        (tmp_path / "run" / "scores" / name / "scores.json").touch()
    for path in (tmp_path / "run", tmp_path / "run" / "scores"):
        there = ", ".join(str(tmp_path / "run" / "scores" / name) for name in ("source_val", "target_val"))
        wanted = f"(No such file or directory); there are some in {there}."
        assert read(path) == f"{path} holds no stored scores: scores.json cannot be read {wanted}"
    (tmp_path / "scores.json").write_text(" " * 50)
    monkeypatch.setattr(stored, "_MAX_DOCUMENT_BYTES", 49)
    assert read(tmp_path) == f"{tmp_path / 'scores.json'} has 50 bytes; it may have at most 49."


@given(st.data())
def test_any_bytes_are_scores_or_refused(folder, data):
    name = data.draw(st.sampled_from(["scores.json", "verb.npy"]))
    with tempfile.TemporaryDirectory() as temporary:
        target = Path(temporary) / "scores"
        shutil.copytree(folder, target)
        (target / name).write_bytes(mutated(data, (folder / name).read_bytes(), 300))
        try:
            found = read_scores(target)
        except EpicError as error:
            assert "\n" not in str(error) and str(target) in str(error)
        else:
            assert (found.verb.shape, found.noun.shape) == ((3, 97), (3, 300))
