"""``python -m bench.gpu_train``, the epoch of train.py in ``make gpu``, at a small size and with the CPU for a card."""

import json

import pytest

import m3em_fast
from bench import gpu_train
from m3em_fast.data.store import FeatureStore, Modality

SMALL = {
    "RGB": Modality("map", 5, 6, 4, 4),
    "Flow": Modality("map", 5, 6, 4, 4),
    "Audio": Modality("vector", 5, 6),
}
SIZES = {"latent": 4, "reduction": 2, "fc_dim": 16, "relation_dim": 8, "batch_source": 10, "batch_target": 12}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpu_train")
    gpu_train.write_stores(folder, SMALL, 3, {"source": 10, "target": 12})
    return folder


def test_the_stores_hold_whole_batches(data):
    assert {split.name: len(FeatureStore(split)) for split in data.iterdir()} == {
        "source_train": 30,
        "target_train": 36,
        "source_val": gpu_train.EVALUATED,
        "target_test": gpu_train.EVALUATED,
    }


def test_an_epoch_of_every_backend(data, tmp_path):
    found = gpu_train.measure(("cpu", "reference"), data, tmp_path, "cpu", **SIZES)
    assert [(each["backend"], each["steps"]) for each in found] == [("cpu", 3), ("reference", 3)]
    assert all(each["seconds"] > 0 for each in found) and gpu_train.disagreement(found) is None
    options = json.loads((tmp_path / "cpu" / "run.json").read_text())["options"]
    assert options["precision"] == "fp16" and options["method"] == "m3em" and options["epochs"] == 1
    # Both ran on what they are called after.
    assert found[0]["loss"] != found[1]["loss"]
    assert m3em_fast.backends.current() != "reference"


def test_losses_that_disagree_are_told():
    right = {"backend": "reference", "loss": [10.0, 9.0]}
    assert gpu_train.disagreement([{"backend": "cuda", "loss": [10.04, 8.96]}, right]) is None
    for wrong in (8.0, float("nan")):
        said = gpu_train.disagreement([{"backend": "cuda", "loss": [10.0, wrong]}, right])
        assert said == f"cuda: loss {wrong:.4f} at step 1, reference has 9.0000"


def test_without_a_card(tmp_path, capsys):
    assert gpu_train.main(["--json", str(tmp_path / "out.json")]) == 2
    assert capsys.readouterr().err == "bench.gpu_train: torch sees no CUDA device here.\n"
