"""Generated features under the challenge's ids and labels: the same wherever and with whatever they are drawn, and with
a signal in them that survives the change of domain."""

import json
import re

import numpy as np
import pytest

from epic_cases import NOUNS, VERBS, published_folder, refused, write_annotations
from m3em_fast.data.store import FeatureStore
from m3em_fast.epic import generate as module
from m3em_fast.epic.annotations import Annotations
from m3em_fast.epic.generate import LOUD, OBJECT_CLASSES, Sizes, features_of, main
from m3em_fast.epic.models import MODELS

SMALL = ("--side", "4", "--map-channels", "6", "--vector-channels", "5", "--no-published")
COUNTS = {"source_val": 60, "target_val": 50, "source_train": 40, "target_train": 30, "target_test": 20}
VAL, TEST = ("source_val", "target_val"), ("source_train", "source_val", "target_train", "target_test")


@pytest.fixture(scope="module")
def labels(tmp_path_factory):
    return write_annotations(tmp_path_factory.mktemp("labels") / "csv", clips=COUNTS)


def make(labels, out, *more):
    assert main(["--annotations", str(labels), "--out", str(out), *SMALL, *more]) == 0
    return {path.name: FeatureStore(path, verify=True) for path in out.iterdir() if path.name != "annotations"}


@pytest.fixture(scope="module")
def both(labels, tmp_path_factory):
    out = tmp_path_factory.mktemp("both") / "out"
    return out, make(labels, out, "--clips", "25", "--protocols", "val", "test")


def test_the_stores_have_all_that_the_models_read(both):
    _, stores = both
    assert set(stores) == {*VAL, *TEST}
    read = {name for model in MODELS.values() for name in model.modalities}
    for name, store in stores.items():
        assert set(store.modalities) == read
        forms = {n: (m.kind, m.shape) for n, m in store.modalities.items()}
        assert forms["Audio"] == ("vector", (25, 5)) and forms["Objects"] == ("vector", (25, OBJECT_CLASSES))
        assert {forms[n] for n in read - {"Audio", "Objects"}} == {("map", (5, 6, 4, 4))}
        assert store.num_classes == {"verb": VERBS, "noun": NOUNS}
        assert (store.labels is None) == (name in ("target_train", "target_test"))
        assert (store.meta["benchmark"], store.meta["split"]) == ("epic-generated", name)


def test_ids_and_labels_are_those_of_the_files(labels, both):
    out, stores = both
    whole, cut = Annotations(labels, published=False), Annotations(out / "annotations", published=False)
    for name, store in stores.items():
        split, part = whole.split(name), cut.split(name)
        assert store.clips == part.ids and len(store.clips) == min(25, COUNTS[name])
        rows = [split.ids.index(clip) for clip in store.clips]
        assert rows == sorted(rows)
        assert part.table.equals(split.table.iloc[rows].reset_index(drop=True))
        for kind, values in (store.labels or {}).items():
            assert values.tolist() == split.labels[kind][rows].tolist() == part.labels[kind].tolist()
    assert stores["source_val"].clips != whole.split("source_val").ids[:25]  # drawn, and not the first


def test_the_same_seed_gives_the_same_bytes_and_more_clips_change_none(labels, both, tmp_path):
    _, stores = both
    again = make(labels, tmp_path / "again", "--clips", "25", "--protocols", "test", "val")
    assert {n: s.fingerprint for n, s in again.items()} == {n: s.fingerprint for n, s in stores.items()}
    other = make(labels, tmp_path / "other", "--clips", "25", "--seed", "1")
    assert set(other) == set(VAL)
    assert other["source_val"].clips != stores["source_val"].clips
    every = make(labels, tmp_path / "every", "--clips", "1000", "--protocols", "val", "test")
    assert {n: len(s) for n, s in every.items()} == COUNTS
    for name in COUNTS:
        rows = [every[name].clips.index(clip) for clip in stores[name].clips]
        few, many = stores[name].read(range(len(rows))), every[name].read(rows)
        assert all((few[n] == many[n]).all() for n in few)


def nearest(features, labels, codes):
    """Share of clips whose own class's code is the one that their features agree with best."""
    x = features - features.mean(0)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    known = codes - codes.mean(0)
    known /= np.linalg.norm(known, axis=1, keepdims=True)
    return ((x @ known.T).argmax(1) == labels).mean()


@pytest.mark.parametrize("modality", LOUD)
def test_classes_are_in_the_features_and_the_domains_differ(modality):
    """By the source's codes: well above chance on the source, above it on the target, where they are turned."""
    sizes, classes = Sizes(5, 32, 32), {"verb": 5, "noun": 8}
    rng = np.random.default_rng(0)
    verb, noun = rng.integers(0, 5, 300), rng.integers(0, 8, 300)
    means, reached = {}, {}
    for split in ("source_val", "target_val"):
        codes = {n: module._codes(0, n, classes, 32, split.startswith("target")) for n in LOUD}
        pooled = []
        for row in range(300):
            x = features_of(0, split, row, int(verb[row]), int(noun[row]), codes, sizes)[modality]
            assert x.dtype == np.float16 and x.min() >= 0 and np.isfinite(x).all()
            pooled.append(x.astype(np.float64).mean(axis=(0, *range(2, x.ndim))))
        means[split] = np.stack(pooled)
        own = module._codes(0, modality, classes, 32, False)
        reached[split] = nearest(means[split], verb, own["verb"]), nearest(means[split], noun, own["noun"])
    louder = int(LOUD[modality][1] > LOUD[modality][0])
    chance = (1 / 5, 1 / 8)[louder]
    assert reached["source_val"][louder] > 3 * chance and reached["target_val"][louder] > 1.5 * chance, reached
    assert min(reached["source_val"]) > 1 / 8
    apart = np.abs(means["source_val"].mean(0) - means["target_val"].mean(0))
    assert apart.max() > 5 * means["source_val"].std(0).mean() / 300**0.5  # far beyond what 300 clips leave to chance


def test_objects_are_sums_of_confidences_with_the_nouns_own_class_most_often(both):
    for name in VAL:
        store = both[1][name]
        seen = store.read(range(len(store)))["Objects"].float()
        assert seen.min() >= 0 and (seen > 0).sum(2).max() <= 4
        own = seen[range(len(store)), :, store.labels["noun"]]
        assert 0.5 < (own > 0).float().mean() < 0.75
        assert (seen.sum(2) - own).mean() > own.mean() / 2  # other things are seen, too


def test_pooled_features_come_as_the_public_ones_do(labels, tmp_path):
    store = make(labels, tmp_path / "out", "--clips", "3", "--pooled")["source_val"]
    assert {m.kind for m in store.modalities.values()} == {"vector"}
    assert store.modalities["RGB"].shape == (25, 6) and store.modalities["Audio"].shape == (25, 5)


def test_the_coverage_is_said(labels, tmp_path, capsys):
    make(labels, tmp_path / "out", "--clips", "4", "--protocols", "test")
    said = capsys.readouterr().out
    cut, whole = (Annotations(folder, published=False) for folder in (tmp_path / "out" / "annotations", labels))
    for split in ("source_train", "source_val"):
        few, all_ = cut.split(split).labels, whole.split(split).labels
        cells = [f"4 of {COUNTS[split]}"]
        cells += [f"{len(set(few[k].tolist()))} of {len(set(all_[k].tolist()))}" for k in ("verb", "noun")]
        pairs = [len(set(zip(x["verb"].tolist(), x["noun"].tolist(), strict=True))) for x in (few, all_)]
        line = next(line for line in said.splitlines() if f" {split} " in line)
        assert [cell.strip() for cell in re.split("[│|]", line)[2:6]] == [*cells, "{} of {}".format(*pairs)]
    assert re.search(r"target_test .* 4 of 20 .* no labels", said)


def test_what_is_refused(labels, tmp_path, capsys):
    given = ["--annotations", labels, "--no-published"]
    (tmp_path / "there").mkdir()
    for arguments, sentence in [
        ([*given, "--out", tmp_path / "there"], f"{tmp_path / 'there'} already exists; nothing is written over."),
        ([*given, "--out", tmp_path / "x", "--clips", "0"], "--clips must be positive, got 0."),
        ([*given, "--out", tmp_path / "x", "--side", "-1"], "--side must be positive, got -1."),
        ([*given, "--out", tmp_path / "x", "--map-channels", "0"], "--map-channels must be positive, got 0."),
        ([*given, "--out", tmp_path / "x", "--seed", "-1"], "--seed must be from 0 to 2**32 - 1, got -1."),
        ([*given, "--out", tmp_path / "x", "--protocols"], "--protocols must be val, test or both."),
        ([*given, "--out", labels / "EPIC_100_tail_nouns.csv" / "x"], "could not be made (Not a directory)."),
        (
            ["--annotations", tmp_path / "no", "--out", tmp_path / "x"],
            f"--annotations: {tmp_path / 'no'} is no folder.",
        ),
        ([*given[:2], "--out", tmp_path / "x"], "--no-published reads one of your own."),
        (given, "--out is missing; python -m m3em_fast.epic.generate --help shows what it is."),
    ]:
        assert refused(capsys, main, arguments).endswith(sentence)
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_what_is_interrupted_leaves_nothing(labels, tmp_path, monkeypatch, capsys):
    real, calls = module.features_of, []

    def stop(*arguments):
        calls.append(arguments)
        if len(calls) == 30:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(module, "features_of", stop)
    arguments = ["--annotations", str(labels), "--out", str(tmp_path / "out"), *SMALL, "--clips", "25"]
    assert main(arguments) == 130 and capsys.readouterr().err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_the_published_files(tmp_path):
    out = tmp_path / "out"
    small = ("--side", "1", "--map-channels", "1", "--vector-channels", "1", "--clips", "40")
    assert main(["--annotations", str(published_folder()), "--out", str(out), *small]) == 0
    store = FeatureStore(out / "target_val")
    assert len(store) == 40 and store.num_classes == {"verb": 97, "noun": 300}
    cut = Annotations(out / "annotations", published=False).split("target_val")
    assert cut.ids == store.clips and cut.labels["noun"].tolist() == store.labels["noun"].tolist()
    assert json.loads((out / "target_val" / "manifest.json").read_text())["meta"]["clips_of_split"] == 7906
