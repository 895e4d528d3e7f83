"""train.py: what a run leaves, that it repeats and resumes bitwise, and what it says to bad input.

What its steps compute and what it tells the modules: test_train_steps.py.
"""

import contextlib
import hashlib
import json
import os
import pickle
import re
import shutil
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

import train
from m3em_fast.data.digits import DigitsConfig, prepare
from m3em_fast.data.store import FeatureStore, Modality
from m3em_fast.uda import METHODS
from m3em_fast.uda.checkpoint import KEYS, CheckpointError, load_checkpoint, save_checkpoint
from m3em_fast.uda.splits import SPLITS
from train_cases import CLASSES, MODALITIES, make_options, write_data, write_store


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("stores"))


def copied(data, folder, *, without=()):
    shutil.copytree(data, folder)
    for split in without:
        shutil.rmtree(folder / split)
    return folder


def call(monkeypatch, capsys, *arguments):
    """Exit code, and standard error as a user sees it."""
    monkeypatch.setattr("sys.argv", ["train.py", *map(str, arguments)])
    try:
        code = train.main()
    except SystemExit as stop:
        code = stop.code
    return code, capsys.readouterr().err


def test_a_run_leaves_everything_and_repeats_bitwise(data, tmp_path):
    runs = [train.train(make_options(data, tmp_path / name)) for name in "ab"]
    names = {path.name for path in runs[0].iterdir()}
    assert {"checkpoint.pt", "metrics.json", "run.json", "curves.png"} <= names
    assert "consensus.png" not in names  # these stores hold no frames to draw on
    assert any(name.startswith("events.out.tfevents") for name in names)
    assert (runs[0] / "metrics.json").read_bytes() == (runs[1] / "metrics.json").read_bytes()
    other = train.train(make_options(data, tmp_path / "c", seed=2))
    assert (runs[0] / "metrics.json").read_bytes() != (other / "metrics.json").read_bytes()

    metrics = json.loads((runs[0] / "metrics.json").read_text())
    assert metrics["results"]["target_test"] == metrics["history"]["target_test"][-1]
    assert len(metrics["history"]["loss"]) == 2 * 5  # 44 / 10 clips, the partial batch counts; target has as many
    assert set(metrics["floor"]["source_val"]) == set(metrics["results"]["source_val"])
    state = torch.load(runs[0] / "checkpoint.pt", weights_only=True)
    assert state["epoch"] == 2 and state["optimizer"]["param_groups"][0]["lr"] == pytest.approx(0.003)


def assert_same(a, b):
    """Equal to the last bit, through dicts, lists and tensors."""
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list | tuple):
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b


@pytest.mark.parametrize("saves", [1, 3, 5])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_resumed_run_ends_bitwise_where_an_undisturbed_one_does(data, tmp_path, monkeypatch, saves, precision):
    whole = train.train(make_options(data, tmp_path / "whole", precision=precision))
    real, count = train.save_checkpoint, 0

    def save_and_stop(*arguments):
        nonlocal count
        real(*arguments)
        count += 1
        if count == saves:
            raise KeyboardInterrupt

    options = make_options(data, tmp_path / "cut", precision=precision)
    monkeypatch.setattr(train, "save_checkpoint", save_and_stop)
    with pytest.raises(KeyboardInterrupt):
        train.train(options)
    monkeypatch.setattr(train, "save_checkpoint", real)
    assert not (tmp_path / "cut" / "metrics.json").exists()
    torch.rand(7)  # whatever state the generator is in, the checkpoint's must win
    (tmp_path / "cut").rename(tmp_path / "moved")  # a run folder says nowhere where it lies
    resumed = train.train(make_options(data, tmp_path / "moved", precision=precision, resume=True))
    assert (resumed / "metrics.json").read_bytes() == (whole / "metrics.json").read_bytes()
    # What metrics do not show, or not yet: the optimizer's momentum, the scaler's count of steps, the generator.
    states = [torch.load(run / "checkpoint.pt", weights_only=True) for run in (whole, resumed)]
    assert_same(*states)
    assert bool(states[0]["scaler"]) == (precision == "fp16")  # without loss scaling there is no state
    assert {path.name for path in resumed.glob("checkpoint*")} == {"checkpoint.pt"}


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_trains_close_to_float32(data, tmp_path, precision):
    losses = {}
    for name in ("fp32", precision):
        run = train.train(make_options(data, tmp_path / name, precision=name, dropout=0.0, epochs=1))
        losses[name] = json.loads((run / "metrics.json").read_text())["history"]["loss"]
    assert np.isfinite(losses[precision]).all()
    assert losses[precision] != losses["fp32"]
    np.testing.assert_allclose(losses[precision][:2], losses["fp32"][:2], rtol=0.02)


def test_target_labels_belong_in_no_loss(data, tmp_path):
    other = copied(data, tmp_path / "data", without=["target_train"])
    write_store(other / "target_train", 50, 2, flip=True)
    runs = [train.train(make_options(d, tmp_path / n, epochs=1)) for n, d in (("a", data), ("b", other))]
    assert (runs[0] / "metrics.json").read_bytes() == (runs[1] / "metrics.json").read_bytes()


def test_source_only_never_reads_the_target(data, tmp_path):
    other = copied(data, tmp_path / "data", without=["target_train"])
    write_store(other / "target_train", 13, 77)
    runs = [
        train.train(make_options(d, tmp_path / n, epochs=1, method="source_only"))
        for n, d in (("a", data), ("b", other))
    ]
    assert (runs[0] / "metrics.json").read_bytes() == (runs[1] / "metrics.json").read_bytes()


def test_gradients_are_clipped(data, tmp_path):
    options = make_options(data, tmp_path / "run", clip_gradient=1e-12, weight_decay=0.0, epochs=1)
    run = train.train(options)
    torch.manual_seed(options.seed)
    fresh = train.build_model(train.resolve(options), train.open_stores(data)["source_train"])
    trained = torch.load(run / "checkpoint.pt", weights_only=True)["model"]
    for name, x in fresh.state_dict().items():
        torch.testing.assert_close(trained[name], x, rtol=0, atol=1e-10)


def test_the_presets_are_what_the_command_line_gives():
    digits, epic = (train.resolve(train.parse(x)) for x in ([], ["--preset", "epic", "--protocol", "test"]))
    assert (epic.batch_source, epic.batch_target, epic.epochs, epic.lr_steps) == (128, 207, 30, (9, 19))
    assert (epic.latent, epic.reduction, epic.fc_dim, epic.relation_dim) == (512, 16, 512, 256)
    assert (epic.init, epic.lr, digits.init, digits.lr, digits.latent) == ("ta3n", 0.003, "torch", 0.03, 16)
    assert train.resolve(train.parse(["--method", "ta3n"])).lr == 0.01
    assert train.resolve(train.parse(["--lr", "0.5", "--preset", "epic", "--latent", "8"])).lr == 0.5
    assert train.parse(["--latent", "8", "--preset", "epic"]).latent == 8


def test_devices_and_card_generations(monkeypatch):
    for cards, device in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda cards=cards: cards)
        assert train.resolve(train.Options()).device == device
        assert train.resolve(train.Options(device="cpu")).device == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capability, refused in (((7, 5), True), ((8, 0), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_, c=capability: c)
        assert train.resolve(train.Options(precision="bf16", device="cpu")).precision == "bf16"
        with pytest.raises(train.UsageError, match="--precision fp16") if refused else contextlib.nullcontext():
            train.resolve(train.Options(precision="bf16"))


def test_a_run_without_a_name_takes_the_first_free_number(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    names = []
    for method in ("digits-ta3n", "digits-ta3n", "digits-m3em"):
        with train.open_run(None, method, resume=False) as run:
            names.append(run.name)
    assert names == ["digits-ta3n-1", "digits-ta3n-2", "digits-m3em-1"]
    # A folder of nothing but the lock holds nothing that could be lost.
    with train.open_run(tmp_path / "runs" / names[0], "any", resume=False) as run:
        assert run.is_dir()
    (tmp_path / "file").touch()
    with pytest.raises(train.UsageError, match="exists already"), train.open_run(tmp_path / "file", "any", False):
        pass


BAD_OPTIONS = [
    (["--epoch", "3"], "--epoch is no option (did you mean --epochs?)"),
    (["--method", "dann"], "m3em, got dann."),
    (["--precision", "fp8"], "--precision must be one of fp32, fp16, bf16, got fp8."),
    (["--epochs", "0"], "--epochs must be positive, got 0"),
    (["--batch-source", "-1"], "--batch-source must be positive, got -1"),
    (["--lr", "-0.1"], "--lr must be positive, got -0.1"),
    (["--threads", "-1"], "--threads must be from 0 to 1024, got -1"),
    (["--weight-decay", "-0.1"], "--weight-decay must be 0 or more, got -0.1"),
    (["--lr", "inf"], "--lr must be finite, got inf"),
    (["--gamma", "nan"], "--gamma must be finite, got nan"),
    (["--beta", "1", "inf", "1"], "--beta must be finite, got (1.0, inf, 1.0)"),
    (["--fc-dim", "1000000000000"], "does not fit the data in"),
    (["--seed", "4294967296"], "--seed must be from 0 to 2**32 - 1, got 4294967296"),
    (["--dropout", "1.5"], "--dropout must be from 0 to below 1, got 1.5"),
    (["--device", "cuda"], "--device cuda: torch sees no CUDA device"),
    (["--resume"], "--resume needs --run"),
    (["--resume", "--run", "nowhere"], "there is no run folder nowhere"),
    (["--data", "nowhere"], "--data nowhere is no folder"),
    (["--data", __file__], "is a file, and no folder of feature stores."),
    (["--num-scales", "9"], "num_scales must be from 1 to 3"),
]


@pytest.mark.parametrize(
    ("arguments", "message"), BAD_OPTIONS, ids=lambda x: " ".join(x) if isinstance(x, list) else ""
)
def test_bad_options_end_with_code_2_and_a_sentence(data, tmp_path, monkeypatch, capsys, arguments, message):
    if arguments == ["--device", "cuda"] and torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    monkeypatch.chdir(tmp_path)
    given = arguments if "--data" in arguments else ["--data", data, *arguments]
    code, err = call(monkeypatch, capsys, *given)
    assert code == 2
    assert message in err and err.startswith("train.py: ") and err.count("\n") == 1
    assert not list(tmp_path.iterdir())  # not even the folder of a run that never began


def test_an_existing_run_is_never_overwritten(data, tmp_path, monkeypatch, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.json").write_text("mine")
    code, err = call(monkeypatch, capsys, "--data", data, "--run", tmp_path / "run")
    assert code == 2 and "exists already" in err and err.count("\n") == 1
    assert (tmp_path / "run" / "metrics.json").read_text() == "mine"
    assert len(list((tmp_path / "run").iterdir())) == 1


def test_bad_data_is_named(data, tmp_path, monkeypatch, capsys):
    cases = {}
    cases["missing"] = copied(data, tmp_path / "missing", without=["target_test"])
    cases["labels"] = copied(data, tmp_path / "labels", without=["source_val"])
    write_store(cases["labels"] / "source_val", 10, 0, labelled=False)
    cases["shapes"] = copied(data, tmp_path / "shapes", without=["target_train"])
    write_store(
        cases["shapes"] / "target_train",
        10,
        0,
        {**MODALITIES, "Audio": Modality("vector", 5, 7, None, None, "float16")},
    )
    cases["classes"] = copied(data, tmp_path / "classes", without=["target_train"])
    write_store(cases["classes"] / "target_train", 10, 0, classes={**CLASSES, "noun": 5})
    messages = {
        "classes": "target_train has other classes than source_train",
        "missing": "target_test",
        "labels": "source_val has no labels",
        "shapes": "target_train has other modalities than source_train: Audio is a vector of 5 x 7 in float16, not a ",
    }
    for name, folder in cases.items():
        code, err = call(monkeypatch, capsys, "--data", folder, "--run", tmp_path / f"run-{name}", "--device", "cpu")
        assert code == 2 and messages[name] in err and "Traceback" not in err, (name, err)


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_place(data, tmp_path, monkeypatch, capsys):
    code, err = call(monkeypatch, capsys, "--data", data, "--run", tmp_path / "run", "--lr", "1e30", "--device", "cpu")
    assert code == 2 and "Traceback" not in err
    message = err.splitlines()[-1]
    assert re.search(r"loss is (nan|inf), its gradient.s norm nan, at epoch 1 step 1 \(classification ", message)
    assert "'source_train_" in message


class Hostile:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (open, (str(self.marker), "w"))


def test_bad_checkpoints_are_refused(data, tmp_path, monkeypatch, capsys):
    good = train.train(make_options(data, tmp_path / "good", epochs=1)) / "checkpoint.pt"
    marker = tmp_path / "ran"
    later = torch.load(good, weights_only=True)
    later["format"] = 99
    older = {name: x for name, x in later.items() if name != "data"} | {"format": 1}
    wrong = {"cut": good.read_bytes()[:1000], "pickle": pickle.dumps(Hostile(marker)), "empty": b""}
    for name, message in [
        ("cut", "no readable checkpoint"),
        ("pickle", "no readable checkpoint"),
        ("empty", "no readable checkpoint"),
        ("hostile", "no readable checkpoint"),
        ("foreign", "is a file of torch, but no checkpoint of train.py"),
        ("later", "has checkpoint format 99, this version reads format 2"),
        ("older", "has checkpoint format 1, this version reads format 2"),
        ("options", "was started with --batch-source 10, not 32"),
    ]:
        run = tmp_path / name
        run.mkdir()
        path = run / "checkpoint.pt"
        if name in wrong:
            path.write_bytes(wrong[name])
        elif name == "options":
            shutil.copy(good, path)
        else:
            foreign = {"weights": torch.ones(2)}
            states = {"hostile": Hostile(marker), "foreign": foreign, "later": later, "older": older}
            torch.save(states[name], path)
        before = path.read_bytes()
        with warnings.catch_warnings(record=True) as shown:
            warnings.simplefilter("always")
            code, err = call(monkeypatch, capsys, "--data", data, "--run", run, "--resume", "--device", "cpu")
        assert code == 2 and message in err and "Traceback" not in err, (name, err)
        assert not any("pickle" in str(w.message) for w in shown)  # the sentence says it all
        assert path.read_bytes() == before
    assert not marker.exists()


def test_a_checkpoint_of_another_shape_is_refused(data, tmp_path):
    options = make_options(data, tmp_path / "run", epochs=1)
    path = train.train(options) / "checkpoint.pt"
    state = torch.load(path, weights_only=True)
    state["model"] = {name: x[..., :1].clone() for name, x in state["model"].items()}
    torch.save(state, path)
    with pytest.raises(CheckpointError, match="does not fit this model"):
        train.train(replace(options, resume=True))


def test_a_run_is_resumed_with_its_own_options_or_not_at_all(data, tmp_path):
    options = make_options(data, tmp_path / "run", epochs=1, lr=0.03)  # given, or another method changes it too
    train.train(options)
    changes = {"seed": 9, "lr": 0.5, "epochs": 5, "gamma": 0.1, "beta": (0.1, 0.2, 0.3), "dropout": 0.1}
    for name, value in {**changes, "precision": "bf16", "method": "ta3n", "lr_steps": (2,)}.items():
        with pytest.raises(train.UsageError, match=f"was started with --{name.replace('_', '-')} "):
            train.train(replace(options, resume=True, **{name: value}))


@pytest.mark.parametrize("split", SPLITS)
def test_a_run_is_resumed_on_its_own_data_or_not_at_all(data, tmp_path, monkeypatch, capsys, split):
    """Made again with the same number of clips: every shape fits, and the run would go on with other numbers."""
    folder, options = copied(data, tmp_path / "data"), make_options(tmp_path / "data", tmp_path / "run", epochs=1)
    before = (train.train(options) / "checkpoint.pt").read_bytes()
    train.train(replace(options, resume=True))
    old, clips = FeatureStore(folder / split), len(FeatureStore(folder / split))
    shutil.rmtree(folder / split)
    write_store(folder / split, clips, 99, labelled=split != "target_train")
    monkeypatch.setattr(train, "parse", lambda *_: replace(options, resume=True))
    capsys.readouterr()
    assert train.main() == 2
    new = FeatureStore(folder / split).fingerprint
    assert new == hashlib.sha256((folder / split / "manifest.json").read_bytes()).hexdigest()
    assert capsys.readouterr().err == (
        f"train.py: --resume: {options.run} was started on a {split} whose manifest's SHA-256 begins with "
        f"{old.fingerprint[:12]}, not {new[:12]}; were the data made again?\n"
    )
    assert (options.run / "checkpoint.pt").read_bytes() == before


def test_a_checkpoint_is_whole_or_the_one_before(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    state = dict.fromkeys(KEYS - {"format"}, 1)
    save_checkpoint(path, state)
    done = []
    real = {name: getattr(os, name) for name in ("fsync", "replace")}
    for name in real:
        monkeypatch.setattr(os, name, lambda *a, name=name: (done.append(name), real[name](*a))[1])
    save_checkpoint(path, {**state, "epoch": 2})
    assert done == ["fsync", "replace"]  # renamed earlier, it could be empty after a power cut
    assert load_checkpoint(path)["epoch"] == 2


def test_bf16_is_refused_on_a_v100_and_fp16_named(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 0))
    code, err = call(monkeypatch, capsys, "--data", data, "--run", tmp_path / "run", "--precision", "bf16")
    assert code == 2 and "compute capability 8.0" in err and "--precision fp16" in err


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    folders = prepare(tmp_path_factory.mktemp("digits"), DigitsConfig.reduced(), progress=False)
    return folders["source_train"].parent


@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns_actions_of_the_target(digits, tmp_path, method):
    run = train.train(train.Options(data=digits, run=tmp_path / "run", method=method, device="cpu"))
    metrics = json.loads((run / "metrics.json").read_text())
    reached = metrics["results"]["target_test"]["action_top1"]
    floor = metrics["floor"]["target_test"]["action_top1"]
    assert reached >= floor + 10, (method, reached, floor)
    assert (run / "consensus.png").exists() == METHODS[method]["cmc"]
