"""The feature store: what goes in comes out, and what was tampered with is refused with one sentence."""

import json
import os
import pickle
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from m3em_fast.data import store as store_module
from m3em_fast.data.store import FeatureStore, FeatureStoreWriter, Modality, StoreError, frame_offsets, main

MODALITIES = {
    "RGB": Modality("map", 5, 4, 3, 2, "float16"),
    "Crop": Modality("map", 5, 4, 3, 2, "uint8"),
    "Audio": Modality("vector", 25, 6, None, None, "float16"),
}
CLASSES = {"verb": 8, "noun": 10}


def make_features(count, seed=0):
    rng = np.random.default_rng(seed)
    features = {name: rng.normal(size=(count, *m.shape)).astype(np.float32) for name, m in MODALITIES.items()}
    features["Crop"] = np.abs(features["Crop"]) * np.arange(4).reshape(4, 1, 1)  # channel 0 is all zero
    return features


def write(path, count=7, step=3, labelled=True, **options):
    features = make_features(count)
    labels = {"verb": np.arange(count) % 8, "noun": np.arange(count) % 10}
    with FeatureStoreWriter(path, MODALITIES, CLASSES, {"note": "test"}, **options) as writer:
        for start in range(0, count, step):
            part = slice(start, start + step)
            names = [f"P01_01_{i}" for i in range(count)][part]
            chunk = {name: values[part] for name, values in features.items()}
            writer.append(names, chunk, {k: v[part] for k, v in labels.items()} if labelled else None)
    return features


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "store", shard_bytes=128 + 3 * 240)
    return tmp_path / "store"


def edit(folder, change):
    document = json.loads((folder / "manifest.json").read_text())
    change(document)
    (folder / "manifest.json").write_text(json.dumps(document))


def refused(folder, *words, **options):
    with pytest.raises(StoreError) as caught:
        FeatureStore(folder, **options)
    message = str(caught.value)
    assert "\n" not in message and message.endswith(".")
    for word in words:
        assert word in message, message


@pytest.mark.parametrize("shard_bytes", [256 * 2**20, 128 + 3 * 240, 1])
def test_round_trip(tmp_path, shard_bytes):
    features = write(tmp_path / "store", shard_bytes=shard_bytes)
    store = FeatureStore(tmp_path / "store", verify=True)
    shards = len(list((tmp_path / "store").glob("RGB-*.npy")))
    assert shards == {256 * 2**20: 1, 128 + 3 * 240: 3, 1: 7}[shard_bytes]
    assert len(store) == 7 and store.clips[6] == "P01_01_6" and store.meta == {"note": "test"}
    assert store.modalities == MODALITIES and store.num_classes == CLASSES
    assert store.labels["verb"].dtype == np.int64 and store.labels["noun"].tolist() == list(range(7))
    where = [6, 0, 3, 3, 2]
    got = store.read(where)
    for name in ("RGB", "Audio"):
        assert torch.equal(got[name], torch.from_numpy(features[name][where]).half()), name
    assert got["Crop"].dtype == torch.float16 and got["Crop"].shape == (5, 5, 4, 3, 2)
    step = features["Crop"].max(axis=(0, 1, 3, 4)).reshape(4, 1, 1) / 255
    assert (np.abs(got["Crop"].numpy() - features["Crop"][where]) <= 0.51 * step + 2e-3).all()
    assert np.load(tmp_path / "store" / "RGB-00000.npy", allow_pickle=False).dtype == np.float16


def test_given_scale(tmp_path):
    values = np.tile(np.array([0.0, 1.0, 2.0, 600.0], np.float32).reshape(1, 1, 4, 1, 1), (2, 5, 1, 3, 2))
    modalities = {"Crop": MODALITIES["Crop"]}
    with FeatureStoreWriter(tmp_path / "s", modalities, scales={"Crop": np.array([1, 0.5, 0.25, 2])}) as writer:
        writer.append(["a", "b"], {"Crop": values})
    got = FeatureStore(tmp_path / "s").read([1])["Crop"]
    assert got[0, 0, :, 0, 0].tolist() == [0.0, 1.0, 2.0, 510.0]


def test_frames(folder):
    assert frame_offsets(25, 5) == [2, 7, 12, 17, 22]
    assert frame_offsets(5, 5) == [0, 1, 2, 3, 4] and frame_offsets(5, 1) == [2] and frame_offsets(5, 3) == [0, 2, 4]
    store = FeatureStore(folder)
    whole, some = store.read([1, 6]), store.read([1, 6], frames=5)
    assert torch.equal(some["Audio"], whole["Audio"][:, [2, 7, 12, 17, 22]])
    assert torch.equal(some["RGB"], whole["RGB"])
    assert torch.equal(store.read([1, 6], ["Crop"], frames=3)["Crop"], whole["Crop"][:, [0, 2, 4]])
    with pytest.raises(StoreError, match="from 1 to the 5 stored ones, got 6"):
        store.read([0], frames=6)


def test_indices(folder):
    store = FeatureStore(folder)
    by_list = store.read([2, 4], ["RGB"])["RGB"]
    for same in (np.array([2, 4], np.int32), torch.tensor([2, 4])):
        assert torch.equal(by_list, store.read(same, ["RGB"])["RGB"])
    assert store.read([])["RGB"].shape == (0, 5, 4, 3, 2)
    for bad, words in (
        ([7], "clips 0 to 6, got index 7"),
        ([-1], "got index -1"),
        ([[1]], "one row"),
        ([0.5], "row of"),
    ):
        with pytest.raises(StoreError, match=words):
            store.read(bad)
    with pytest.raises(StoreError, match="no modality 'Depth'; it has RGB, Crop, Audio"):
        store.read([0], ["Depth"])


def test_pickled_as_a_path(folder):
    store = FeatureStore(folder)
    store.read([0])
    data = pickle.dumps(store)
    assert len(data) < 1000 and torch.equal(pickle.loads(data).read([3])["RGB"], store.read([3])["RGB"])


def test_without_labels_and_without_clips(tmp_path):
    write(tmp_path / "a", labelled=False)
    assert FeatureStore(tmp_path / "a").labels is None
    write(tmp_path / "b", count=0)
    assert len(FeatureStore(tmp_path / "b", verify=True)) == 0


def test_a_failed_writer_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), FeatureStoreWriter(tmp_path / "store", MODALITIES) as writer:
        writer.append(["a"], make_features(1))
        assert not (tmp_path / "store").exists()
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_never_writes_over(folder):
    with pytest.raises(StoreError, match="already exists"):
        write(folder, count=1)
    assert len(FeatureStore(folder)) == 7


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda a: a | {"clips": ["a", "a"]}, "clip id 'a' is given twice"),
        (lambda a: a | {"clips": ["a", ""]}, "non-empty string, got ''"),
        (lambda a: a | {"features": {"RGB": a["features"]["RGB"]}}, "must be given for Audio, Crop, RGB, got RGB"),
        (lambda a: a | {"clips": ["a", "b", "c"]}, "RGB must have shape (3, 5, 4, 3, 2), got (2, 5, 4, 3, 2)"),
        (lambda a: a["features"]["RGB"].fill(np.nan) or a, "RGB holds values that are not finite"),
        (lambda a: a["features"]["RGB"].fill(1e6) or a, "RGB holds values that are not finite in float16"),
        (lambda a: a["features"]["Crop"].fill(-1) or a, "uint8, which holds no negative value, got -1.0"),
        (
            lambda a: a | {"features": a["features"] | {"RGB": np.ones((2, 5, 4, 3, 2), int)}},
            "floating point, got int64",
        ),
        (lambda a: a | {"labels": {"verb": [0, 8], "noun": [0, 0]}}, "verb label 8 is outside 0 to 7"),
        (lambda a: a | {"labels": {"verb": [0, -1], "noun": [0, 0]}}, "verb label -1 is outside"),
        (lambda a: a | {"labels": {"verb": [0], "noun": [0, 0]}}, "there are 2 clips but 1 verb labels"),
        (lambda a: a | {"labels": {"verb": [0, 0.5], "noun": [0, 0]}}, "verb labels must be one row of integers"),
        (lambda a: a | {"labels": {"verb": [0, 0]}}, "labels must be given for verb and noun"),
    ],
)
def test_writer_refuses(tmp_path, change, words):
    arguments = change({"clips": ["a", "b"], "features": make_features(2), "labels": None})
    with FeatureStoreWriter(tmp_path / "store", MODALITIES, CLASSES) as writer:
        with pytest.raises(StoreError) as caught:
            writer.append(**arguments)
        writer.append(["a"], make_features(1), {"verb": [1], "noun": [1]})
        with pytest.raises(StoreError, match="clip id 'a' is given twice"):
            writer.append(["a"], make_features(1), {"verb": [1], "noun": [1]})
        with pytest.raises(StoreError, match="with every append or with none"):
            writer.append(["z"], make_features(1))
    assert words in str(caught.value)
    assert len(FeatureStore(tmp_path / "store", verify=True)) == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"modalities": {}}, "at least one modality"),
        ({"modalities": {"../x": MODALITIES["RGB"]}}, "letters, digits"),
        ({"modalities": {"RGB": Modality("map", 5, 4)}}, "height of RGB must be from 1"),
        ({"modalities": {"RGB": Modality("vector", 0, 4)}}, "frames of RGB must be from 1"),
        ({"modalities": {"RGB": Modality("map", 5, 2**20, 20, 20)}}, "more than a shard may hold"),
        ({"num_classes": {"colour": 3}}, "verb and noun only"),
        ({"shard_bytes": 2**40}, "shard_bytes must be from 1 to 268435456"),
        ({"scales": {"RGB": np.ones(4)}}, "'RGB' is no uint8 modality"),
        ({"scales": {"Crop": np.zeros(4)}}, "Crop needs 4 steps above 0"),
    ],
)
def test_writer_refuses_at_once(tmp_path, options, words):
    with pytest.raises(StoreError, match=words):
        FeatureStoreWriter(**{"path": tmp_path / "s", "modalities": MODALITIES} | options)
    assert list(tmp_path.iterdir()) == []


def shard(document, name="RGB", number=0):
    return [entry for entry in document["shards"] if entry["modality"] == name][number]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d.update(format="zip"), "format should be 'm3em-feature-store'"),
        (lambda d: d.update(version=2), "has version 2; this m3em_fast reads version 1"),
        (lambda d: d.update(version=True), "has version True"),
        (lambda d: d.update(extra=1), "missing or unknown: extra"),
        (lambda d: d.pop("labels"), "missing or unknown: labels"),
        (lambda d: d["clips"].__setitem__(1, d["clips"][0]), "clip id 'P01_01_0' appears twice"),
        (lambda d: d["clips"].append(3), "list of non-empty strings"),
        (lambda d: d["clips"].pop(), "there are 6 clips but 7 verb labels"),
        (lambda d: d["labels"]["noun"].__setitem__(0, 10), "noun label 10 is outside 0 to 9"),
        (lambda d: d["labels"]["noun"].__setitem__(0, 10**30), "noun label"),
        (lambda d: d["labels"].pop("noun"), "labels must be given for verb and noun"),
        (lambda d: d["num_classes"].update(verb=0), "num_classes of verb must be from 1"),
        (lambda d: d["modalities"]["RGB"].update(kind="cube"), "must be a map or a vector, got kind 'cube'"),
        (lambda d: d["modalities"]["RGB"].update(dtype="object"), "must be float16 or uint8, got dtype 'object'"),
        (lambda d: d["modalities"]["RGB"].update(channels=10**9), "channels of RGB must be from 1 to 1048576"),
        (lambda d: d["modalities"]["RGB"].update(channels=5), "holds (3, 5, 4, 3, 2) of float16"),
        (lambda d: d["modalities"]["Audio"].update(height=1), "height and width must be None"),
        (lambda d: shard(d).update(modality="Depth"), "unknown modality 'Depth'"),
        (lambda d: shard(d).update(file="../RGB-00000.npy"), "'../RGB-00000.npy' is no plain file name"),
        (lambda d: shard(d).update(file="/etc/passwd.npy"), "is no plain file name"),
        (lambda d: shard(d).update(file="RGB-00001.npy"), "file RGB-00001.npy is listed twice"),
        (lambda d: shard(d).update(file="gone.npy"), "gone.npy cannot be read (No such file or directory)"),
        (lambda d: shard(d).update(sha256="x"), "64 hexadecimal digits"),
        (lambda d: shard(d).update(start=1), "start must be 0"),
        (lambda d: shard(d).update(bytes=7), "has 848 bytes, the manifest says 7"),
        (lambda d: shard(d).update(bytes=10**12), "bytes must be from 1 to 268435456"),
        (lambda d: shard(d).update(clips=10**12), "within the store's 7 clips"),
        (lambda d: shard(d).update(scale=[1.0] * 4), "a float16 shard has no scale"),
        (lambda d: shard(d, "Crop").update(scale=[0.0] * 4), "scale must be 4 numbers"),
        (lambda d: d["shards"].remove(shard(d, number=2)), "the shards of RGB hold 6 clips, but the store has 7"),
    ],
)
def test_manifest_refused(folder, change, words):
    edit(folder, change)
    refused(folder, words, str(folder))


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '"x"', "[" * 100_000, '{"format": NaN}', "1" * 5000, "\x00", "{}"], ids=range(9)
)
def test_no_manifest(folder, text):
    (folder / "manifest.json").write_text(text)
    refused(folder, str(folder))


def test_no_store(tmp_path):
    refused(tmp_path / "nothing", "is no feature store: manifest.json cannot be read (No such file or directory)")
    (tmp_path / "manifest.json").write_bytes(b"\xff\xfe")
    refused(tmp_path, "is no JSON document")


def header(text, magic=b"\x93NUMPY\x01\x00"):
    return magic + (118).to_bytes(2, "little") + text.encode().ljust(117) + b"\n"


@pytest.mark.parametrize(
    ("head", "words"),
    [
        (header("{'descr': '<f2', 'fortran_order': False, 'shape': (3, 5, 4, 2, 3), }"), "holds (3, 5, 4, 2, 3)"),
        (header("{'descr': '<f2', 'fortran_order': True, 'shape': (3, 5, 4, 3, 2), }"), "in Fortran order"),
        (header("{'descr': '>f2', 'fortran_order': False, 'shape': (3, 5, 4, 3, 2), }"), "of >f2"),
        (header("{'descr': '|O', 'fortran_order': False, 'shape': (3, 5, 4, 3, 2), }"), "of object"),
        (header("{'descr': '<f2', 'fortran_order': False, 'shape': (9999999999999999999999,), }"), "holds (9999"),
        (header("{'descr': '<f2', 'fortran_order': False, 'shape': (-3, 5, 4, 3, 2), }"), "holds (-3"),
        (header("__import__('os').abort()"), "no readable .npy header"),
        (header("(" * 100), "no readable .npy header"),
        (header("{}", magic=b"\x93NUMPY\x03\x00"), "no readable .npy header (version 1.0 expected)"),
        (b"PK\x03\x04".ljust(128), "no readable .npy header"),
        (b"\x93NUMPY\x01\x00\xff\xff".ljust(128), "no readable .npy header"),
    ],
    ids=range(11),
)
def test_header_refused(folder, head, words):
    file = folder / "RGB-00000.npy"
    assert len(head) == 128
    file.write_bytes(head + file.read_bytes()[128:])
    refused(folder, words, str(file))


def test_truncated_missing_and_special_files(folder):
    file = folder / "RGB-00001.npy"
    data = file.read_bytes()
    file.write_bytes(data[:-1])
    refused(folder, f"{file} has {len(data) - 1} bytes, the manifest says {len(data)}")
    file.unlink()
    os.mkfifo(file)
    refused(folder, f"{file} is no ordinary file")


def test_altered_shard(folder):
    file = folder / "RGB-00001.npy"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    store = FeatureStore(folder)
    with pytest.raises(StoreError, match=r"RGB-00001\.npy was altered: its SHA-256 is [0-9a-f]{64}, the manifest says"):
        store.read([4])
    refused(folder, "was altered", verify=True)


def test_checksum_is_remembered_by_size_and_time(folder, monkeypatch):
    checked = []
    monkeypatch.setattr(
        store_module, "sha256", lambda path, real=store_module.sha256: checked.append(path.name) or real(path)
    )
    store = FeatureStore(folder)
    store.read([0], ["RGB"]), store.read([1], ["RGB"])
    assert checked == ["RGB-00000.npy"]
    FeatureStore(folder).read([0, 3], ["RGB"])
    assert checked == ["RGB-00000.npy", "RGB-00001.npy"]
    state = (folder / "RGB-00000.npy").stat()
    os.utime(folder / "RGB-00000.npy", ns=(state.st_atime_ns, state.st_mtime_ns + 1))
    FeatureStore(folder).read([0], ["RGB"])
    assert checked[2:] == ["RGB-00000.npy"]
    (folder / ".verified.json").write_text("[")
    FeatureStore(folder).read([0], ["RGB"])
    assert len(checked) == 4


def test_checksum_in_memory_where_it_cannot_be_written(folder):
    (folder / ".verified.json").mkdir()
    before = sorted(folder.iterdir())
    FeatureStore(folder).read([0])
    assert sorted(folder.iterdir()) == before


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
FUZZ = settings(
    max_examples=50, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def open_and_read(folder):
    """Any store either opens and reads, or is refused; nothing else may come out."""
    try:
        store = FeatureStore(folder, verify=True)
        for values in store.read(range(len(store))).values():
            assert values.dtype == torch.float16
    except StoreError as error:
        assert "\n" not in str(error)


@FUZZ
@given(data=st.data(), value=JSON)
def test_any_manifest_is_read_or_refused(folder, data, value):
    with tempfile.TemporaryDirectory() as copy:
        target = Path(copy) / "store"
        shutil.copytree(folder, target)
        document = json.loads((target / "manifest.json").read_text())
        here, depth = document, data.draw(st.integers(1, 4))
        for level in range(depth):
            keys = list(here) if isinstance(here, dict) else list(range(len(here)))
            key = data.draw(st.sampled_from(keys))
            if level == depth - 1 or not isinstance(here[key], dict | list) or not here[key]:
                here[key] = value
                break
            here = here[key]
        (target / "manifest.json").write_text(json.dumps(document))
        open_and_read(target)


@FUZZ
@given(position=st.integers(0, 127), junk=st.binary(min_size=1, max_size=20))
def test_any_header_is_read_or_refused(folder, position, junk):
    with tempfile.TemporaryDirectory() as copy:
        target = Path(copy) / "store"
        shutil.copytree(folder, target)
        file = target / "RGB-00000.npy"
        data = bytearray(file.read_bytes())
        data[position : position + len(junk)] = junk
        file.write_bytes(data)
        open_and_read(target)


def test_command(folder, capsys):
    assert main([str(folder), "--verify"]) == 0
    out = capsys.readouterr().out
    assert "7 clips" in out and "every checksum is right" in out and "5 x 4 x 3 x 2" in out
    (folder / "RGB-00000.npy").unlink()
    assert main([str(folder)]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and "RGB-00000.npy cannot be read" in captured.err
