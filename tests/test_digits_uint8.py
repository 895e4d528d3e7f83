"""The digits benchmark with its maps in uint8: what that costs in accuracy is rounding, and nothing else."""

import dataclasses

import numpy as np
import pytest
import torch

import train
from m3em_fast.data.digits import SPLITS, DigitsConfig, load_backbone, load_frames
from m3em_fast.data.digits import prepare as prepare_digits
from m3em_fast.data.digits.__main__ import main
from m3em_fast.data.prefetch import BatchReader, Prefetch
from m3em_fast.data.store import FeatureStore, StoreError
from m3em_fast.uda.distributed import Team

SMALL = DigitsConfig(
    seed=100,
    source_train=40,
    source_val=20,
    target_train=20,
    target_test=20,
    channels=8,
    rgb_epochs=1,
    flow_epochs=1,
    audio_epochs=1,
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """By the command, with one option more for the second."""
    roots = {dtype: tmp_path_factory.mktemp("digits") / dtype for dtype in ("float16", "uint8")}
    settings = {**dataclasses.asdict(SMALL)}
    del settings["dtype"]
    for dtype, root in roots.items():
        arguments = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
        more = ["--dtype=uint8"] if dtype == "uint8" else []
        assert main([f"--out={root}", "--workers=1", *arguments, *more]) == 0
    return roots


@pytest.mark.parametrize("split", SPLITS)
def test_the_same_features_in_half_the_room(made, split):
    half, byte = (FeatureStore(made[dtype] / split, verify=True) for dtype in ("float16", "uint8"))
    assert byte.clips == half.clips and "dtype" not in half.meta["config"] and byte.meta["config"]["dtype"] == "uint8"
    assert all(np.array_equal(byte.labels[kind], half.labels[kind]) for kind in ("verb", "noun"))
    assert byte.modalities["Audio"] == half.modalities["Audio"]
    wanted, got = half.read(range(len(half))), byte.read(range(len(byte)))
    assert torch.equal(got["Audio"], wanted["Audio"])
    for name in ("RGB", "Flow"):
        assert (byte.modalities[name].dtype, half.modalities[name].dtype) == ("uint8", "float16")
        assert byte.modalities[name].clip_bytes * 2 == half.modalities[name].clip_bytes
        exact = wanted[name].double()
        step = exact.amax(dim=(0, 1, 3, 4), keepdim=True) / 255  # there is one shard
        off = (got[name].double() - exact).abs()
        assert (off <= 0.5001 * step + 2**-11 * (exact + step)).all() and off.max() > 0, name


def test_reading_bytes_ahead_takes_a_second_thread(made, monkeypatch):
    seen = []

    class Noted(Prefetch):
        def __init__(self, items, read, *, workers):
            seen.append(workers)
            super().__init__(items, read, workers=workers)

    monkeypatch.setattr(train, "Prefetch", Noted)
    for root in made.values():
        stores = [FeatureStore(root / split) for split in ("source_train", "target_train")]
        reader = BatchReader(stores, ["RGB"], 5)
        (_, _, features), *_ = train.batches([(np.arange(3), np.arange(2))], reader, Team())
        assert len(features["RGB"]) == 5
        assert not BatchReader(stores, ["Audio"], 5).widens
        assert BatchReader(stores, ["RGB", "Audio"], 5).widens == reader.widens  # one of several is enough
    assert list(made) == ["float16", "uint8"] and seen == [1, 2]


def test_the_same_backbones(made):
    names = [sorted(path.name for path in root.glob("backbone-*.pt")) for root in made.values()]
    assert names[0] == names[1] and len(names[0]) == 3
    for name in names[0]:
        modality = name.split("-")[1]
        states = [load_backbone(root / name, modality)[1] for root in made.values()]
        assert all(torch.equal(states[0]["weights"][key], states[1]["weights"][key]) for key in states[0]["weights"])
    pictures = [load_frames(root / "target_test", "target_test", [3]) for root in made.values()]
    assert all(np.array_equal(a, b) for a, b in zip(*pictures, strict=True))


def test_a_folder_holds_one_dtype(made):
    for dtype, other in (("float16", "uint8"), ("uint8", "float16")):
        with pytest.raises(StoreError, match=f"was made with dtype {other} and not {dtype}; choose another folder"):
            prepare_digits(made[other], dataclasses.replace(SMALL, dtype=dtype), progress=False)
