"""The digits benchmark: drawn from its seed alone, made once, and continued where it was interrupted."""

import dataclasses
import hashlib
import itertools
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from m3em_fast.data.digits import (
    NOUNS,
    SPLITS,
    VERBS,
    DigitsConfig,
    backbone_path,
    load_backbone,
    load_frames,
    preview,
    render,
    workers,
)
from m3em_fast.data.digits import prepare as prepare_digits
from m3em_fast.data.digits.__main__ import main
from m3em_fast.data.digits.backbones import extract
from m3em_fast.data.store import FeatureStore, FeatureStoreWriter, StoreError

stages = sys.modules["m3em_fast.data.digits.prepare"]
PIL_Image = pytest.importorskip("PIL.Image")

TINY = DigitsConfig(
    seed=100,
    source_train=60,
    source_val=30,
    target_train=40,
    target_test=20,
    channels=8,
    rgb_epochs=2,
    flow_epochs=1,
    audio_epochs=1,
)


def contents(root):
    """Every byte under a root that a run is to give again."""
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted(Path(root).rglob("*"))
        if path.name == "manifest.json" or path.suffix == ".npy"
    }


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("digits") / "made"
    return root, prepare_digits(root, TINY, progress=False, workers=1)


def never(*arguments, **options):
    raise AssertionError("this stage was done already")


def test_stores(made):
    root, paths = made
    assert tuple(paths) == SPLITS
    for split, path in paths.items():
        store = FeatureStore(path, verify=True)
        assert len(store) == TINY.size(split) and store.clips[3] == f"{split}_00003"
        assert store.num_classes == {"verb": len(VERBS), "noun": len(NOUNS)}
        assert store.meta["verbs"] == list(VERBS) and store.meta["split"] == split
        assert sorted(np.bincount(store.labels["noun"], minlength=10))[0] >= len(store) // 10
        features = store.read(range(len(store)))
        assert features["RGB"].shape == features["Flow"].shape == (len(store), 5, 8, 7, 7)
        assert features["Audio"].shape == (len(store), 5, 8)
        assert all((values >= 0).all() for values in features.values())
        if split == "source_train":
            for name, values in features.items():
                assert abs(values.double().square().mean().sqrt() - 1) < 1e-3, name
    kept = {path.name.split("-")[0] for path in root.iterdir()}
    assert kept == {".lock", "backbone", *SPLITS} and paths["source_val"] == root / "source_val", (
        "frames are kept only while they are needed"
    )


def test_same_bytes_with_two_workers(made, tmp_path):
    threads = torch.get_num_threads()
    state = torch.get_rng_state()
    torch.manual_seed(5)
    prepare_digits(tmp_path, TINY, progress=False, workers=2)
    torch.set_rng_state(state)
    assert torch.get_num_threads() == threads
    ours, theirs = contents(tmp_path), contents(made[0])
    assert ours.keys() == theirs.keys() and len(ours) == 4 * 4
    assert [name for name in ours if ours[name] != theirs[name]] == []


def test_second_run_makes_nothing(made, monkeypatch):
    for name in ("train", "render_clips", "plan", "extract"):
        monkeypatch.setattr(stages, name, never)
    assert prepare_digits(made[0], TINY, progress=False) == made[1]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"target": "hard"}, "target_train was made with target dist and not hard; choose another folder"),
        ({"seed": 101, "channels": 9}, "source_train was made with seed 100 and not 101, channels 8 and not 9;"),
        ({"target_test": 21}, "target_test was made with target_test 20 and not 21;"),
    ],
)
def test_a_folder_holds_one_configuration(made, change, words):
    before = contents(made[0])
    with pytest.raises(StoreError, match=words):
        prepare_digits(made[0], dataclasses.replace(TINY, **change), progress=False)
    assert contents(made[0]) == before


def test_another_target_may_reuse_the_source(made, tmp_path, monkeypatch):
    shutil.copytree(made[0], tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "target_train")
    shutil.rmtree(tmp_path / "target_test")
    monkeypatch.setattr(stages, "train", never)
    other = prepare_digits(tmp_path, dataclasses.replace(TINY, target="hard"), progress=False, workers=1)
    first, second = (
        FeatureStore(path).read(range(20))["RGB"] for path in (other["target_test"], made[1]["target_test"])
    )
    assert not torch.equal(first, second)


@pytest.mark.parametrize(
    "change",
    [{"seed": 101}, {"source_train": 61}, {"rgb_epochs": 3}, {"channels": 9}, {"source": "A"}, {"dtype": "uint8"}],
)
def test_every_setting_names_another_stage(change):
    other = dataclasses.replace(TINY, **change)
    for split in SPLITS:
        assert stages._store_key(TINY, split) != stages._store_key(other, split)


@pytest.mark.parametrize("stage", ["between", "rendering", "training", "extraction"])
def test_resumes(made, tmp_path, monkeypatch, stage):
    count = {"calls": 0}

    def breaks(real, after):
        def call(*arguments, **options):
            count["calls"] += 1
            if count["calls"] > after:
                raise KeyboardInterrupt
            return real(*arguments, **options)

        return call

    with monkeypatch.context() as patch:
        if stage == "between":
            patch.setattr(stages._Stages, "extract", breaks(stages._Stages.extract, 2))
        elif stage == "rendering":
            patch.setattr(stages, "render_clips", breaks(stages.render_clips, 2))
        elif stage == "training":
            patch.setattr(stages, "tick", breaks(stages.tick, 3))
        else:
            patch.setattr(FeatureStoreWriter, "append", breaks(FeatureStoreWriter.append, 4))
        with pytest.raises(KeyboardInterrupt):
            prepare_digits(tmp_path, TINY, progress=False, workers=1)
    finished = {path: path.stat().st_mtime_ns for path in tmp_path.glob("[a-z]*")}
    kinds = {path.name.split("-")[0] for path in finished}
    assert (
        kinds
        == {
            "between": {"raw", "backbone", "source_train", "source_val"},
            "rendering": set(),
            "training": {"raw", "backbone"},
            "extraction": {"raw", "backbone", "source_train"},
        }[stage]
    )
    prepare_digits(tmp_path, TINY, progress=False, workers=1)
    assert contents(tmp_path) == contents(made[0])
    for path, when in finished.items():
        assert "raw" in path.name or path.stat().st_mtime_ns == when, f"{path.name} was made again"


def test_resumes_after_a_kill(made, tmp_path):
    arguments = [f"--{k.replace('_', '-')}={v}" for k, v in dataclasses.asdict(TINY).items()]
    command = [sys.executable, "-m", "m3em_fast.data.digits", f"--out={tmp_path}", "--workers=1", *arguments]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        while not list(tmp_path.glob("backbone-*")):
            assert process.poll() is None
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
    assert not (tmp_path / "target_test").exists()
    again = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "backbones on source_val: RGB noun" in again.stdout and "Traceback" not in again.stderr
    assert contents(tmp_path) == contents(made[0])
    assert not list(tmp_path.glob(".*.partial"))


def test_truncated_store_is_refused_with_what_to_do(made, tmp_path):
    paths = prepare_digits(tmp_path, TINY, progress=False, workers=1)
    with open(paths["target_test"] / "RGB-00000.npy", "r+b") as file:
        file.truncate(1000)
    with pytest.raises(StoreError, match=f"has 1000 bytes.*; delete {paths['target_test']} to have it made again"):
        prepare_digits(tmp_path, TINY, progress=False)


@pytest.mark.parametrize("harm", ["truncated", "altered", "no checksum", "no number"])
def test_a_backbone_that_was_altered_is_refused(made, tmp_path, capsys, harm):
    shutil.copytree(made[0], tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "target_test")
    path = backbone_path(tmp_path, TINY, "Flow")
    beside, data = path.with_name(f"{path.name}.sha256"), bytearray(path.read_bytes())
    digest = hashlib.sha256(data).hexdigest()
    assert beside.read_text() == f"{digest}  {path.name}\n"
    if harm == "truncated":
        path.write_bytes(data[:-1])
    elif harm == "altered":
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    elif harm == "no checksum":
        beside.unlink()
    else:
        beside.write_bytes(b"\xff\xfe")
    said = digest if harm in ("truncated", "altered") else "nothing"
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    words = f"{path} was altered: its SHA-256 is {found}, {beside.name} says {said}; delete it to have it made again."
    with pytest.raises(StoreError) as caught:
        load_backbone(path, "Flow")
    assert str(caught.value) == words
    arguments = [f"--{k.replace('_', '-')}={v}" for k, v in dataclasses.asdict(TINY).items()]
    assert main([f"--out={tmp_path}", "--workers=1", *arguments]) == 2
    assert f"{words}\n" in capsys.readouterr().err and not (tmp_path / "target_test").exists()


class Hostile:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (open, (str(self.marker), "w"))


@pytest.mark.parametrize("state", ["hostile", [], {"channels": 8}, {"channels": 8, "weights": {}}, b"text"], ids=str)
def test_what_is_no_backbone_is_refused_and_not_run(tmp_path, state):
    """The checksum is right here: somebody has made both files."""
    path = tmp_path / "backbone.pt"
    if isinstance(state, bytes):
        path.write_bytes(state)
    else:
        torch.save(Hostile(tmp_path / "ran") if state == "hostile" else state, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    path.with_name("backbone.pt.sha256").write_text(f"{digest}  backbone.pt\n")
    with pytest.raises(StoreError) as caught:
        load_backbone(path, "Flow")
    assert str(caught.value).startswith(f"{path} is no backbone of Flow (") and "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("split", ["source_train", "target_test"])
def test_frames_drawn_again_give_the_stored_features(made, split):
    root, paths = made
    indices = range(min(25, TINY.size(split)))
    clips = dict(zip(("RGB", "Flow", "Audio"), load_frames(TINY, split, indices), strict=True))
    stored = FeatureStore(paths[split]).read(indices)
    for modality, frames in clips.items():
        net, state = load_backbone(backbone_path(root, TINY, modality), modality)
        with workers.one_thread():
            assert torch.equal((extract(net, modality, frames) / state["rms"]).half(), stored[modality]), modality


def test_load_frames(made, tmp_path):
    root, paths = made
    rgb, flow, sound = load_frames(TINY, "target_test", [3, 0])
    assert rgb.shape == (2, 5, 56, 56, 3) and rgb.dtype == np.uint8
    assert flow.shape == (2, 5, 56, 56, 2) and flow.dtype == np.float16
    assert sound.shape == (2, 5, 32, 16) and sound.dtype == np.float32
    for again in (load_frames(TINY, "target_test", [0]), load_frames(paths["target_test"], "target_test", [0])):
        assert all(np.array_equal(a[0], b[1]) for a, b in zip(again, (rgb, flow, sound), strict=True))
    assert np.array_equal(load_frames(root, "source_val", [0])[0], load_frames(TINY, "source_val", [0])[0])
    with pytest.raises(IndexError, match="target_test has clips 0 to 19, got index 20"):
        load_frames(TINY, "target_test", [20])
    with pytest.raises(StoreError, match="is no feature store"):
        load_frames(tmp_path, "target_test", [0])
    with pytest.raises(StoreError, match="holds target_test, not source_val"):
        load_frames(paths["target_test"], "source_val", [0])


def test_domains_and_blocks_are_apart():
    specs = {split: render.plan(TINY, split) for split in SPLITS}
    backgrounds = {split: {spec.background for spec in specs[split]} for split in SPLITS}
    sides = [
        backgrounds["source_train"] | backgrounds["source_val"],
        backgrounds["target_train"] | backgrounds["target_test"],
    ]
    assert not sides[0] & sides[1]
    assert all(len(side & set(pair)) <= 1 for side in sides for pair in render._PAIRS)
    strokes = [{image.tobytes() for spec in specs[s] for image in (spec.digit, spec.other)} for s in SPLITS]
    for i in range(4):
        for j in range(i):
            assert not strokes[i] & strokes[j], (SPLITS[i], SPLITS[j])
    assert len({spec.entropy for split in SPLITS for spec in specs[split]}) == 150
    images, targets = render._handwriting()
    written = {image.tobytes(): int(noun) for image, noun in zip(images, targets, strict=True)}
    for spec in specs["source_train"]:
        assert written[spec.digit.tobytes()] == spec.noun != written[spec.other.tobytes()]


@pytest.mark.parametrize("verb", VERBS)
def test_motions_look_like_their_names(verb):
    calm = dataclasses.replace(TINY.domain("source_train"), shake=0.0, p_move=0.0, p_static=0.0, noise=0.0)
    specs = [
        dataclasses.replace(spec, verb=VERBS.index(verb), domain=calm) for spec in render.plan(TINY, "source_train")
    ]
    flow = render.render_clips(specs[:12])[1].astype(np.float64)
    weight = np.linalg.norm(flow, axis=-1)
    rows, columns = np.mgrid[:56, :56]
    total = weight.sum(axis=(2, 3), keepdims=True) + 1e-9
    x = columns - (weight * columns).sum(axis=(2, 3), keepdims=True) / total
    y = rows - (weight * rows).sum(axis=(2, 3), keepdims=True) / total
    u, v = flow[..., 0], flow[..., 1]
    # Picture coordinates: y grows downwards, so a positive curl turns clockwise.
    seen = {"right": u, "down": v, "clockwise": x * v - y * u, "grow": x * u + y * v}
    scores = {name: float(values.mean()) for name, values in seen.items()}
    opposite = {"left": "right", "up": "down", "counter-clockwise": "clockwise", "shrink": "grow"}
    score = -scores[opposite[verb]] if verb in opposite else scores[verb]
    assert score > 0.01, (verb, scores)


def test_no_network(monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("the network was used")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    for name in ("getaddrinfo", "create_connection", "gethostbyname"):
        monkeypatch.setattr(socket, name, refuse)
    render._background.cache_clear()
    render._handwriting.cache_clear()
    assert len({render._background(name).shape for pair in render._PAIRS for name in pair}) > 4
    render.render_clips(render.plan(TINY, "target_test")[:2])


def test_missing_picture_is_named(monkeypatch, tmp_path):
    render._background.cache_clear()
    monkeypatch.setattr(render.importlib.resources, "files", lambda package: tmp_path)
    with pytest.raises(FileNotFoundError, match=r"grass\.png is not among the pictures of the installed scikit-image"):
        render._background("grass.png")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"target": "moon"}, "target must be one of mid, hard, calm, dist, easy, got 'moon'"),
        ({"source": "C"}, "source must be one of A, B, got 'C'"),
        ({"seed": -1}, "seed must be from 0"),
        ({"source_val": 0}, "source_val must be from 1 to 1000000, got 0"),
        ({"rgb_epochs": 0}, "rgb_epochs must be from 1"),
        ({"dtype": "int8"}, "dtype must be one of float16, uint8, got 'int8'"),
    ],
)
def test_config_refused(change, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(TINY, **change)


def test_workers_that_cannot_start():
    with workers.Workers(2) as pool, pytest.warns(RuntimeWarning, match="going on in this process"):
        parent = os.getpid()
        assert list(pool.map(_dies_in_a_child, [(parent, i) for i in range(4)])) == [0, 1, 2, 3]


def _dies_in_a_child(item):
    parent, value = item
    if os.getpid() != parent:
        os._exit(3)
    return value


def test_preview(tmp_path):
    preview.write_preview(tmp_path / "clips.gif", TINY)
    assert [path.name for path in tmp_path.iterdir()] == ["clips.gif"]
    with PIL_Image.open(tmp_path / "clips.gif") as picture:
        assert picture.n_frames == 5 and picture.info["loop"] == 0
        pages = []
        for number in range(5):
            picture.seek(number)
            pages.append(np.asarray(picture.convert("RGB")).astype(int))
    half = pages[0].shape[0] // 2
    for before, after in itertools.pairwise(pages):
        for top in (0, half):
            for slot, what in enumerate(("frames", "flow", "sound")):
                left = preview.EDGE + slot * (preview.TILE + preview.GAP)
                tiles = np.s_[top + preview.HEADING : top + half, left : left + preview.TILE]
                assert np.abs(before[tiles] - after[tiles]).mean() > 0.5, f"{what} stand still"
