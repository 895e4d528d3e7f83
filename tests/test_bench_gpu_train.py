"""``python -m bench.gpu_train``, the epoch of train.py in ``make gpu``, at a small size and with the CPU for a card."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import m3em_fast
from bench import gpu_train
from m3em_fast.data.store import FeatureStore, Modality

ROOT = Path(__file__).resolve().parents[1]
SMALL = {
    "RGB": Modality("map", 5, 16, 4, 4),
    "Flow": Modality("map", 5, 16, 4, 4),
    "Audio": Modality("vector", 5, 16),
}
SIZES = {"latent": 8, "reduction": 2, "fc_dim": 32, "relation_dim": 16, "batch_source": 10, "batch_target": 12}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpu_train")
    gpu_train.write_stores(folder / "data", SMALL, 3, {"source": 10, "target": 12})
    gpu_train.write_stores(folder / "first", SMALL, 1, {"source": 10, "target": 12})
    return folder


@pytest.fixture(scope="module")
def found(data, tmp_path_factory):
    runs = tmp_path_factory.mktemp("runs")
    chosen = ("cpu", "reference")
    return list(gpu_train.measure(chosen, data / "data", data / "first", runs, "cpu", **SIZES)), runs


def test_the_stores_hold_whole_batches(data):
    assert {split.name: len(FeatureStore(split)) for split in (data / "data").iterdir()} == {
        "source_train": 30,
        "target_train": 36,
        "source_val": gpu_train.EVALUATED,
        "target_test": gpu_train.EVALUATED,
    }


def test_an_epoch_of_every_backend(found):
    """The reference comes second: what it takes to judge is there before other kernels have their turn."""
    epochs, runs = found
    assert [(each["backend"], each["precision"]) for each in epochs] == [
        ("cpu", "fp16"),
        ("reference", "fp16"),
        ("reference", "fp32"),
    ]
    assert all(each["seconds"] > 0 and each["steps"] == 3 for each in epochs)
    assert gpu_train.disagreement(epochs) is None
    options = json.loads((runs / "cpu" / "run.json").read_text())["options"]
    assert options["precision"] == "fp16" and options["method"] == "m3em" and options["epochs"] == 1
    assert len(json.loads((runs / "cpu-first" / "metrics.json").read_text())["history"]["loss"]) == 1
    # Each ran on what it is called after.
    losses = [each["loss"] for each in epochs]
    assert all(one != other for one, other in itertools.pairwise(losses))
    assert m3em_fast.backends.current() != "reference"


def test_kernels_before_and_after_the_reference(monkeypatch):
    asked = []
    monkeypatch.setattr(gpu_train, "epoch", lambda backend, data, run, device, **o: asked.append((backend, data, o)))
    list(gpu_train.measure(("cuda", "triton", "reference"), "data", "first", ROOT, "cuda"))
    assert [(backend, data) for backend, data, _ in asked] == [
        ("cuda", "first"),
        ("cuda", "data"),
        ("reference", "first"),
        ("reference", "data"),
        ("reference", "data"),
        ("triton", "first"),
        ("triton", "data"),
    ]
    assert [o for *_, o in asked if o] == [{"precision": "fp32"}]


def wrong_map(right):
    """Every map is 2 % too large."""

    def forward(options, tensors, saves):
        out, saved = right(options, tensors, saves)
        return out * 1.02, saved

    return forward


def wrong_pool(right):
    """The last channel of a modality is left out."""

    def forward(options, tensors, saves):
        out, saved = right(options, tensors, saves)
        out[:, -1] = 0
        return out, saved

    return forward


def wrong_gradient(right):
    """The gradient of the map has the wrong sign."""

    def backward(options, grad, tensors, saved, needs):
        grad_x, grad_cmap = right(options, grad, tensors, saved, needs)
        return grad_x, None if grad_cmap is None else -grad_cmap

    return backward


@pytest.mark.parametrize(
    ("op", "which", "wrong"),
    [
        ("consensus_map", "forward", wrong_map),
        ("consensus_pool", "forward", wrong_pool),
        ("consensus_pool", "backward", wrong_gradient),
    ],
    ids=["map", "pool", "gradient"],
)
def test_kernels_that_are_wrong_are_told(found, data, tmp_path, op, which, wrong):
    """Half a per cent of a loss, for one, would let the first two through."""
    kernels = m3em_fast.backends.KERNELS[op]["cpu"]
    right = getattr(kernels, which)
    object.__setattr__(kernels, which, wrong(right))
    try:
        each = gpu_train.epoch("cpu", data / "data", tmp_path / "run", "cpu", **SIZES)
    finally:
        object.__setattr__(kernels, which, right)
    said = gpu_train.disagreement([each, *found[0][1:]])
    assert said is not None and said.startswith("cpu: loss ") and said.endswith(" is allowed")


def losses(*values):
    """Those of kernels, of the float16 reference and of its float32."""
    names = [("cuda", "fp16"), ("reference", "fp16"), ("reference", "fp32")]
    return [{"backend": b, "precision": p, "loss": loss} for (b, p), loss in zip(names, values, strict=True)]


def test_the_bound_is_what_float16_costs_in_this_run():
    assert gpu_train.ROUNDOFFS == 8
    reference, single = [10.0, 9.0], [10.001, 9.0]
    assert gpu_train.allowed(losses(reference, reference, single)) == pytest.approx(8 * 1e-3 / 10.001)
    assert gpu_train.disagreement(losses([10.007, 9.007], reference, single)) is None
    assert "at step 1, the reference has 9.000000" in gpu_train.disagreement(losses([10.0, 9.008], reference, single))
    assert "cuda: loss nan at step 0" in gpu_train.disagreement(losses([torch.nan, 9.0], reference, single))
    # Losses that are the same to the last bit leave room for the last bit.
    assert gpu_train.disagreement(losses([10.000001, 9.0], reference, reference)) is None


def test_the_measurement_behind_the_bound(monkeypatch):
    monkeypatch.setattr(gpu_train, "SEEDS", range(1))
    monkeypatch.setattr(gpu_train, "SMALL", SMALL)
    monkeypatch.setattr(gpu_train, "SMALL_STEPS", 2)
    monkeypatch.setattr(gpu_train, "SMALL_BATCHES", {"source": 6, "target": 8})
    said = []
    gpu_train.survey(said.append)
    assert said[0].split() == ["seed", "float16", "bfloat16", "kernels"]
    seed, half, brain, kernels = map(float, said[1].split())
    assert seed == 0 and 0 < half < 1e-3 and brain > 0 and kernels < gpu_train.ROUNDOFFS


def test_without_tyro():
    """Which a machine with a card need not have; nor does an epoch need any command line."""
    code = "import sys; sys.modules['tyro'] = None; from bench import gpu_train; print(gpu_train.train.train.__name__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "train\n", done.stderr


def test_without_a_card(tmp_path, capsys):
    assert gpu_train.main(["--json", str(tmp_path / "out.json")]) == 2
    assert capsys.readouterr().err == "bench.gpu_train: torch sees no CUDA device here.\n"
    with pytest.raises(SystemExit):
        gpu_train.main([])
