"""Bad input: docs/errors.md has every sentence and its test; and data that are refused, whatever they hold."""

import ast
import json
import os
import re
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import train
from m3em_fast.data.store import FeatureStore, FeatureStoreWriter, Modality, StoreError
from train_cases import MODALITIES, make_options, mutated, write_data, write_store

ROOT = Path(__file__).resolve().parent.parent
SAYING = ["train.py", "m3em_fast/data/_manifest.py", "m3em_fast/data/store.py", "m3em_fast/data/digits/prepare.py"]
SAYING += [f"m3em_fast/uda/{name}.py" for name in ("checkpoint", "options", "run", "splits")]
SAYING += [
    f"m3em_fast/epic/{name}.py"
    for name in ("_check", "annotations", "ensemble", "generate", "scores", "scoring", "submission")
]
REFUSALS = ("UsageError", "StoreError", "CheckpointError", "EpicError", "UnpickleError")
SAYING += [f"m3em_fast/data/{name}.py" for name in ("importer", "_import_sources", "_unpickle")]
HELPING = [
    *SAYING,
    "m3em_fast/data/_writer.py",
    "m3em_fast/_cli.py",
    "m3em_fast/uda/_pulse.py",
    "m3em_fast/uda/distributed.py",
    "m3em_fast/uda/losses.py",
    "m3em_fast/backends.py",
]


def rows():
    """What went wrong, the sentence with {} for what changes, and the test's file and name."""
    for line in (ROOT / "docs" / "errors.md").read_text().splitlines():
        cells = [cell.strip() for cell in re.split(r"\s\|(?=\s|$)", line.removeprefix("|"))][:-1]
        if len(cells) == 4 and cells[3].startswith("`"):
            sentence = re.search(r"``+ (.*?) ``+|`(.*?)`", cells[1])
            file, name = cells[3].strip("` ").split("::")
            yield cells[0], re.sub(r"\{[^}]*\}", "{}", sentence[1] or sentence[2]), file, name


ROWS = list(rows())


def template(node):
    """A literal of the source, an f-string with {} for each of its fields."""
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


def nodes(*files):
    for file in files:
        yield from ast.walk(ast.parse(Path(file).read_text()))


def test_each_sentence_of_the_table_is_one_of_the_source():
    ours = {template(node) for node in nodes(*(ROOT / file for file in HELPING))} - {None}
    assert len(ROWS) > 90
    for _, sentence, *_ in ROWS:
        assert sentence in ours, sentence


def test_each_sentence_of_the_source_is_in_the_table():
    listed, found = {sentence for _, sentence, *_ in ROWS}, set()
    for node in nodes(*(ROOT / file for file in SAYING)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in REFUSALS:
            found.add(template(node.args[0]))
    for node in nodes(ROOT / "m3em_fast/_cli.py"):
        if isinstance(node, ast.Return) and isinstance(node.value, ast.JoinedStr):
            found.add(template(node.value))
    found.discard("{}.")  # what another module has to say
    assert len(found) > 80 and None not in found
    assert not found - listed


def test_each_test_of_the_table_exists_and_asks_for_the_sentence():
    for _, sentence, file, name in ROWS:
        source = (ROOT / "tests" / file).read_text()
        assert f"\ndef {name}(" in source, name
        # Any two words of it in a row, or the one where there are no two.
        parts = [[word.strip(".,;:`") for word in part.split()] for part in sentence.split("{}")]
        pairs = {" ".join(words[i : i + 2]) for words in parts for i in range(len(words) - 1)}
        assert any(pair in source for pair in pairs or {words[0] for words in parts if words}), (sentence, file)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("stores"))


def main(monkeypatch, capsys, options):
    """Exit code, and what a user reads."""
    monkeypatch.setattr(train, "parse", lambda *_: options)
    code = train.main()
    said = capsys.readouterr().err
    assert said.startswith("train.py: ") and said.count("\n") == 1, said
    return code, said


def same(**changes):
    return dict.fromkeys(("source_train", "source_val", "target_train", "target_test"), (20, MODALITIES | changes))


def maps(side):
    return replace(MODALITIES["Flow"], height=side, width=side)


@pytest.mark.parametrize(
    ("stores", "words"),
    [
        (same() | {"source_train": (0, MODALITIES)}, "source_train holds no clips, and training needs some"),
        (same() | {"source_val": (0, MODALITIES)}, "source_val holds no clips"),
        (same() | {"target_train": (0, MODALITIES)}, "target_train holds no clips"),
        (same() | {"target_test": (0, MODALITIES)}, "target_test holds no clips"),
        (same() | {"target_test": (9, {"RGB": MODALITIES["RGB"]})}, "Audio is none, not a vector of 5 x 5 in float16"),
        (same(Flow=maps(3)), ": CMC compares maps of one size, got {'RGB': (4, 4), 'Flow': (3, 3)}."),
        (same(Audio=Modality("vector", 3, 5)), ": a clip needs 5 frames, Audio has 3."),
        (same(training=MODALITIES["Audio"]), ": attribute 'training' already exists."),
        ({split: (9, {"RGB": MODALITIES["RGB"]}) for split in same()}, ": CrossModalityConsensus: needs at least two"),
    ],
    ids=range(9),
)
def test_data_that_cannot_be_trained_on_is_named(tmp_path, monkeypatch, capsys, stores, words):
    for split, (clips, modalities) in stores.items():
        write_store(tmp_path / "data" / split, clips, 0, modalities)
    code, said = main(monkeypatch, capsys, make_options(tmp_path / "data", tmp_path / "run"))
    where = f"--method m3em does not fit the data in {tmp_path / 'data'}" if words[0] == ":" else str(tmp_path / "data")
    assert code == 2 and words in said and where in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("classes", "words"), [({}, "nothing"), ({"verb": 3}, "verb")])
def test_classes_that_are_missing_are_named(tmp_path, monkeypatch, capsys, classes, words):
    for split in same():
        with FeatureStoreWriter(tmp_path / "data" / split, MODALITIES, classes) as writer:
            labels = {name: np.zeros(2, int) for name in classes}
            writer.append(["a", "b"], {name: np.ones((2, *m.shape)) for name, m in MODALITIES.items()}, labels)
    code, said = main(monkeypatch, capsys, make_options(tmp_path / "data", tmp_path / "run"))
    assert code == 2 and f"source_train has classes of {words}, not of verb and noun." in said


def test_a_run_folder_that_cannot_be_is_named(data, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("mine")
    code, said = main(monkeypatch, capsys, make_options(data, tmp_path / "file" / "run"))
    assert code == 2 and said.endswith(f"--run {tmp_path / 'file' / 'run'} cannot be made (Not a directory).\n")
    (tmp_path / "run" / ".lock").mkdir(parents=True)  # the administrator may write anywhere but there
    code, said = main(monkeypatch, capsys, make_options(data, tmp_path / "run", resume=True))
    assert code == 2 and said.endswith(f"--run {tmp_path / 'run'}: nothing can be written there (Is a directory).\n")


@pytest.mark.parametrize("file", ["thesis.tex", "metrics.json"])
def test_a_folder_of_other_things_is_no_run_to_go_on_with(data, tmp_path, monkeypatch, capsys, file):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / file).write_text("mine")
    code, said = main(monkeypatch, capsys, make_options(data, tmp_path / "run", resume=True))
    assert code == 2 and f"{tmp_path / 'run'} holds '{file}' and no checkpoint.pt: it is no run to go on with." in said
    assert [path.read_text() for path in (tmp_path / "run").iterdir()] == ["mine"]


def test_what_is_no_file_is_not_waited_for(data, tmp_path, monkeypatch, capsys):
    for split in ("source_train", "source_val", "target_train", "target_test"):
        shutil.copytree(data / split, tmp_path / "data" / split)
    options = make_options(tmp_path / "data", tmp_path / "run", resume=True)
    options.run.mkdir()
    for path in (options.run / "checkpoint.pt", tmp_path / "data" / "source_val" / "manifest.json"):
        path.unlink(missing_ok=True)
        os.mkfifo(path)
        code, said = main(monkeypatch, capsys, options)
        assert code == 2 and said == f"train.py: {path} is no ordinary file.\n"


# The store: what test_store.py leaves out.


@pytest.fixture
def store(tmp_path):
    write_store(tmp_path / "store", 7, 0)
    return tmp_path / "store"


def refused(store):
    with pytest.raises(StoreError) as caught:
        FeatureStore(store)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda d: d["shards"][0].pop("scale"),
            "shard 0 must have exactly modality, file, start, clips, bytes, sha256",
        ),
        (lambda d: d["modalities"]["RGB"].pop("kind"), "modality RGB must have kind, frames, channels, height, width"),
        (lambda d: d.update(modalities={}), "modalities must name at least one modality"),
        (lambda d: d["modalities"].update({"../x": {}}), "at most 64, got '../x'"),
        (lambda d: d["modalities"]["RGB"].update(channels=2**20), "one clip of RGB would take 167772160 bytes"),
        (lambda d: d["labels"].update(verb=[[1]] * 7), "verb labels must be one row of integers"),
        (lambda d: d["labels"].update(verb=[[1], 2]), "verb labels must be one row of integers"),
        (lambda d: d["labels"].update(verb=[0.5] * 7), "verb labels must be one row of integers"),
        (lambda d: d["num_classes"].update(colour=3), "num_classes may have the names verb and noun only"),
        (lambda d: d.update(meta=[]), "meta must be an object"),
        (lambda d: d.update(shards={}), "shards must be a list"),
    ],
    ids=range(11),
)
def test_more_manifests_refused(store, change, words):
    document = json.loads((store / "manifest.json").read_text())
    if "167772160" in words:
        document["modalities"]["RGB"].update(height=2**10)
        words = words.replace("167772160", str(5 * 2**20 * 2**10 * 4 * 2))
    change(document)
    (store / "manifest.json").write_text(json.dumps(document))
    assert words in refused(store)


def test_a_manifest_too_large_to_be_one(store):
    os.truncate(store / "manifest.json", 2**28 + 1)  # a hole on the disk
    assert f"has {2**28 + 1} bytes; a manifest has at most {2**28}." in refused(store)


def test_a_header_of_another_length(store):
    """Its shape is right, and so is the file's size: but the numbers begin where the manifest's sizes do not allow."""
    file, document = store / "RGB-00000.npy", json.loads((store / "manifest.json").read_text())
    data = file.read_bytes()
    assert data[8:10] == (118).to_bytes(2, "little")
    file.write_bytes(data[:8] + (118 + 64).to_bytes(2, "little") + data[10:127] + b" " * 64 + data[127 : -64 - 16])
    next(shard for shard in document["shards"] if shard["file"] == file.name)["bytes"] = file.stat().st_size
    (store / "manifest.json").write_text(json.dumps(document))
    assert f"{file} has {file.stat().st_size} bytes, its header asks for another number." in refused(store)


@given(st.data())
def test_any_bytes_are_a_store_or_refused(store, data):
    """Of the manifest and of a header, at any place; test_store.py does it with values and near the header's start."""
    name = data.draw(st.sampled_from(["manifest.json", "RGB-00000.npy"]))
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "store"
        shutil.copytree(store, target)
        original = (store / name).read_bytes()
        (target / name).write_bytes(mutated(data, original, 300 if name.endswith("npy") else len(original)))
        try:
            for values in FeatureStore(target, verify=True).read([0, 6]).values():
                assert values.shape[0] == 2
        except StoreError as error:
            assert "\n" not in str(error) and str(target) in str(error)
