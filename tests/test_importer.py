"""Features into a store: what the challenge hands out and folders of maps, and matched with the
labels."""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from epic_cases import write_annotations
from m3em_fast.data import importer
from m3em_fast.data.store import FeatureStore, Modality
from m3em_fast.epic.annotations import Annotations

ROOT = Path(__file__).resolve().parents[1]
SPLIT = "source_val"


@pytest.fixture(scope="module")
def labels(tmp_path_factory):
    folder = write_annotations(tmp_path_factory.mktemp("labels"))
    return folder, Annotations(folder, published=False)


def make(ids, seed=0, dtype="f4"):
    """A pickle's dict, of clips in another order than ``ids``."""
    rng = np.random.default_rng(seed)
    ids = list(rng.permutation(ids))
    shapes = {"RGB": (25, 12), "Flow": (25, 10), "Audio": (25, 8)}
    features = {name: rng.random((len(ids), *shape)).astype(dtype) for name, shape in shapes.items()}
    return {"features": features, "narration_ids": [str(clip) for clip in ids]}


def dump(path, value, protocol=4):
    path.write_bytes(pickle.dumps(value, protocol))
    return path


def write_maps(folder, ids, channels=4, seed=0, dtype="f4"):
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    maps = {clip: rng.random((5, channels, 3, 2)).astype(dtype) for clip in ids}
    for clip, values in maps.items():
        np.save(folder / f"{clip}.npy", values)
    return maps


def run(capsys, *arguments):
    code = importer.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.err.splitlines()[-1] if captured.err else ""


def refused(capsys, out, *arguments):
    code, said = run(capsys, out, *arguments)
    assert code == 2 and said.startswith("m3em_fast.data.importer: ") and said.endswith(".")
    assert not out.exists() and not list(out.parent.glob(".*.partial"))
    return said.removeprefix("m3em_fast.data.importer: ")


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("dtype", ["f2", "f4", ">f8"])
def test_a_pickle_becomes_a_store_in_the_order_of_the_labels(tmp_path, capsys, monkeypatch, labels, protocol, dtype):
    monkeypatch.setattr(importer, "CHUNK_BYTES", 5 * 4 * 25 * 30)  # five of the twelve clips
    folder, found = labels
    split = found.split(SPLIT)
    value = make(split.ids, dtype=dtype)
    file = dump(tmp_path / "x.pkl", value, protocol)
    command = ["--pickle", file, "--annotations", folder, "--split", SPLIT, "--no-published"]
    assert run(capsys, tmp_path / "store", *command)[0] == 0
    store = FeatureStore(tmp_path / "store", verify=True)
    assert store.clips == split.ids and list(store.modalities) == ["RGB", "Flow", "Audio"]
    assert store.modalities["RGB"] == Modality("vector", 25, 12)
    assert store.num_classes == {kind: len(names) for kind, names in found.classes.items()}
    for kind, wanted in split.labels.items():
        assert store.labels[kind].tolist() == wanted.tolist()
    rows = [value["narration_ids"].index(clip) for clip in split.ids]
    for name, got in store.read(range(len(store))).items():
        assert torch.equal(got, torch.from_numpy(value["features"][name][rows].astype(np.float16))), name
    assert store.meta["split"] == SPLIT and store.meta["imported"]["Flow"] == {
        "from": "x.pkl",
        "dtype": np.dtype(dtype).name,
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["store", "x.pkl"]


def test_without_labels_the_order_is_that_of_the_pickle(tmp_path, capsys):
    value = make([f"P01_01_{i}" for i in range(9)])
    value["narration_ids"] = np.array(value["narration_ids"], object)
    file = dump(tmp_path / "x.pkl", value, 2)
    assert run(capsys, tmp_path / "store", "--pickle", file, "--modalities", "Audio", "RGB")[0] == 0
    store = FeatureStore(tmp_path / "store")
    assert store.clips == value["narration_ids"].tolist() and store.labels is None
    assert list(store.modalities) == ["RGB", "Audio"] or list(store.modalities) == ["Audio", "RGB"]
    assert store.num_classes == {"verb": 97, "noun": 300}


def test_a_split_without_labels_is_matched_too(tmp_path, capsys, labels):
    folder, found = labels
    split = found.split("target_train")
    file = dump(tmp_path / "x.pkl", make(split.ids))
    command = ["--pickle", file, "--annotations", folder, "--split", "target_train", "--no-published"]
    assert run(capsys, tmp_path / "store", *command)[0] == 0
    store = FeatureStore(tmp_path / "store")
    assert store.clips == split.ids and store.labels is None and set(store.num_classes) == {"verb", "noun"}


@pytest.mark.parametrize("dtype", ["float16", "uint8"])
def test_maps_take_the_place_of_pooled_features(tmp_path, capsys, labels, dtype):
    folder, found = labels
    ids = found.split(SPLIT).ids
    maps = {name: write_maps(tmp_path / name, ids, channels, channels) for name, channels in (("RGB", 4), ("Flow", 6))}
    file = dump(tmp_path / "x.pkl", make(ids))
    command = ["--pickle", file, "--maps", f"Flow={tmp_path / 'Flow'}", f"RGB={tmp_path / 'RGB'}", "--dtype", dtype]
    command += ["--annotations", folder, "--split", SPLIT, "--no-published"]
    assert run(capsys, tmp_path / "store", *command)[0] == 0
    store = FeatureStore(tmp_path / "store", verify=True)
    assert list(store.modalities) == ["RGB", "Flow", "Audio"]
    assert store.modalities["Flow"] == Modality("map", 5, 6, 3, 2, dtype)
    assert store.modalities["Audio"].dtype == "float16"
    got = store.read(range(len(ids)))
    for name, wanted in maps.items():
        half = np.stack([wanted[clip] for clip in ids]).astype(np.float16)
        off = np.abs(got[name].numpy().astype(np.float32) - half)
        assert off.max() <= (0 if dtype == "float16" else 0.6 / 255)


def test_clips_that_do_not_match_are_named(tmp_path, capsys, labels):
    folder, found = labels
    split = found.split(SPLIT)
    out, where = tmp_path / "store", f"of {split.path}"
    command = ["--annotations", folder, "--split", SPLIT, "--no-published"]
    value, first = make(split.ids), split.ids[0]
    lacks = {name: array[1:] for name, array in value["features"].items()}
    file = dump(tmp_path / "x.pkl", {"features": lacks, "narration_ids": value["narration_ids"][1:]})
    gone = value["narration_ids"][0]
    count = len(split.ids)
    said = refused(capsys, out, "--pickle", file, *command)
    assert said == f"{file} lacks 1 of the {count} clips {where}, {gone!r} is one."

    more = make([*split.ids, "P99_01_1", "P99_01_2"])
    file = dump(tmp_path / "x.pkl", more)
    said = refused(capsys, out, "--pickle", file, *command)
    other = next(clip for clip in more["narration_ids"] if clip.startswith("P99"))
    words = f"{file} has 2 clips that {split.path} has not, {other!r} is one; --leave-others leaves such out."
    assert said == words
    assert run(capsys, tmp_path / "left", "--pickle", file, *command, "--leave-others")[0] == 0
    assert FeatureStore(tmp_path / "left").clips == split.ids

    value["narration_ids"][3] = value["narration_ids"][1]
    file = dump(tmp_path / "x.pkl", value)
    said = refused(capsys, out, "--pickle", file, *command)
    assert said == f"{file}: clip {value['narration_ids'][1]!r} is there twice, as entry 1 and 3."

    write_maps(tmp_path / "maps", split.ids)
    (tmp_path / "maps" / f"{first}.npy").unlink()
    said = refused(capsys, out, "--maps", f"RGB={tmp_path / 'maps'}", *command)
    assert said == f"{tmp_path / 'maps'} lacks 1 of the {count} clips {where}, {first!r} is one."


def changed(**changes):
    return make(["a", "b", "c"]) | changes


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ([1], "must hold a dict with 'features' and 'narration_ids', got a list."),
        ({"RGB": 1}, "must hold a dict with 'features' and 'narration_ids', got 'RGB'."),
        ({}, "must hold a dict with 'features' and 'narration_ids', got an empty one."),
        (changed(narration_ids="abc"), "narration_ids must be a list of strings."),
        (changed(narration_ids=["a", 3, "c"]), "narration_ids must be non-empty strings, got int as entry 1."),
        (changed(narration_ids=["a", "", "c"]), "narration_ids must be non-empty strings, got str as entry 1."),
        (changed(narration_ids=["a", "b"]), "there are 2 narration_ids but 3 clips of 'RGB'."),
        (changed(features=[]), "features must be a dict with an array for each modality."),
        (changed(features={"RGB": [1]}), "'RGB' must be a floating-point array (clips, frames, channels), got a list."),
        (changed(features={"RGB": np.ones((3, 4))}), "(clips, frames, channels), got (3, 4) of float64."),
        (changed(features={"RGB": np.ones((3, 4, 5), int)}), "(clips, frames, channels), got (3, 4, 5) of int64."),
        (changed(features={"R B": np.ones((3, 4, 5))}), "a modality's name must be letters, digits, _ and -"),
        (changed(features={3: np.ones((3, 4, 5))}), "a modality's name must be letters, digits, _ and -"),
        (
            changed(features={"RGB": np.full((3, 4, 5), 1e9)}),
            "RGB holds values that are not finite in float16, in",
        ),
        (changed(features={"RGB": np.ones((3, 4, 5)), "x": {1, 2}}), "asks for a set"),
        ({"features": {"RGB": np.ones((0, 4, 5))}, "narration_ids": []}, "holds no clips."),
    ],
    ids=range(16),
)
def test_what_a_pickle_may_not_hold(tmp_path, capsys, value, words):
    file = dump(tmp_path / "x.pkl", value)
    code, said = run(capsys, tmp_path / "store", "--pickle", file)
    assert code == 2 and words in said and str(tmp_path) in said and not (tmp_path / "store").exists()


def save(values):
    return lambda path: np.save(path, values)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (save(np.ones((5, 4, 3, 3), "f4")), "must have shape (5, 4, 3, 2), which is that of a, got (5, 4, 3, 3)."),
        (save(np.ones((5, 4, 3, 2), int)), "must be floating point, got int64."),
        (save(np.full((5, 4, 3, 2), None)), "is no readable .npy file (Array can't be memory-mapped"),
        (lambda path: np.savez(path.open("wb"), np.ones(2)), "is an archive of arrays, not one .npy array."),
        (lambda path: path.write_bytes(b"hello"), "is no readable .npy file"),
        (lambda path: path.write_bytes(b""), "is no readable .npy file"),
        (lambda path: os.truncate(path, 200), "is no readable .npy file (mmap length is greater than file size"),
        (lambda path: (path.unlink(), os.mkfifo(path)), "is no ordinary file."),
        (lambda path: (path.unlink(), path.symlink_to("nothing")), "cannot be read (No such file or directory)."),
        (lambda path: path.write_bytes(pickle.dumps(np.ones(3))), "is no readable .npy file"),
    ],
    ids=range(10),
)
def test_a_map_that_is_none(tmp_path, capsys, spoil, words):
    write_maps(tmp_path / "maps", ["a", "b", "c"])
    spoil(tmp_path / "maps" / "b.npy")
    said = refused(capsys, tmp_path / "store", "--maps", f"RGB={tmp_path / 'maps'}")
    assert said.startswith(f"{tmp_path / 'maps' / 'b.npy'} {words}")


def test_options_that_cannot_be(tmp_path, capsys, monkeypatch, labels):
    monkeypatch.delenv("M3EM_EPIC_ANNOTATIONS", raising=False)
    out, file = tmp_path / "store", dump(tmp_path / "x.pkl", make(["a", "b"]))
    write_maps(tmp_path / "maps", ["a", "b"])
    np.save((tmp_path / "flat").mkdir() or tmp_path / "flat" / "a.npy", np.ones((5, 4, 3)))
    (tmp_path / "empty").mkdir()
    maps = f"RGB={tmp_path / 'maps'}"
    for arguments, words in (
        ([], "--pickle must name a file of features, or --maps folders of them."),
        (["--maps", maps, "--modalities", "RGB"], "--pickle must name a file of features"),
        (["--maps", "RGB"], "--maps must be NAME=FOLDER, such as RGB=maps/rgb, got RGB."),
        (["--maps", maps, maps], "--maps names RGB twice."),
        (["--maps", f"RGB={tmp_path / 'none'}"], "none cannot be read (No such file or directory)."),
        (["--maps", f"RGB={tmp_path / 'empty'}"], "empty holds no .npy file; there must be one a clip"),
        (["--maps", f"RGB={tmp_path / 'flat'}"], "must hold a map (frames, channels, height, width) or a vector"),
        (["--pickle", tmp_path / "none"], "none cannot be read (No such file or directory)."),
        (["--pickle", file, "--modalities", "Depth"], "has no modality 'Depth'; it has RGB, Flow, Audio."),
        (["--pickle", file, "--annotations", labels[0]], "--annotations needs --split"),
        (["--pickle", file, "--split", SPLIT], "--annotations or M3EM_EPIC_ANNOTATIONS must name the folder"),
        (["--pickle", file, "--annotations", labels[0], "--split", "x"], "the published file has"),
        (["--pickle", file, "--annotations", labels[0], "--split", "x", "--no-published"], "'x' is no split"),
        (["--pickle", file, "--dtype", "uint8"], "--dtype uint8 is for maps, and there are only vectors."),
    ):
        assert words in refused(capsys, out, *arguments), words
    out.mkdir()
    assert run(capsys, out, "--pickle", file)[0] == 2 and not list(out.iterdir())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "PATH is missing; python -m m3em_fast.data.importer --help shows what it is."),
        (["out", "--pikle", "x"], "--pikle is no option (did you mean --pickle?)"),
        (["out", "--dtype", "int8"], "--dtype must be one of float16, uint8, got int8."),
    ],
)
def test_what_tyro_refuses(capsys, arguments, words):
    with pytest.raises(SystemExit) as stop:
        importer.main(arguments)
    said = capsys.readouterr()
    assert stop.value.code == 2 and said.out == "" and said.err.startswith(f"m3em_fast.data.importer: {words}")
    assert said.err.count("\n") == 1


def test_a_home_folder_is_found(tmp_path, monkeypatch, capsys):
    """A shell puts no folder in the place of the ~ of NAME=~/maps."""
    monkeypatch.setenv("HOME", str(tmp_path))
    write_maps(tmp_path / "maps", ["a", "b"])
    assert run(capsys, tmp_path / "store", "--maps", "RGB=~/maps")[0] == 0


def test_ctrl_c_says_how_to_go_on(monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(importer._cli, "cli", interrupted)
    assert run(capsys) == (130, "m3em_fast.data.importer: interrupted; the same command goes on where it was.")


def test_uint8_holds_nothing_negative(tmp_path, capsys):
    maps = write_maps(tmp_path / "maps", ["a", "b", "c"])
    np.save(tmp_path / "maps" / "b.npy", -maps["b"])
    code, said = run(capsys, tmp_path / "store", "--maps", f"RGB={tmp_path / 'maps'}", "--dtype", "uint8")
    assert (
        code == 2
        and "RGB is stored as uint8, which holds no negative value, got -" in said
        and said.endswith("in clip 'b'.")
    )
