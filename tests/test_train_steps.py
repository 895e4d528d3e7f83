"""train.py step by step: against the update rule written out, and what it hands to modules, scores and logs."""

import json
import math
import re
import sys

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train
from m3em_fast import backends
from m3em_fast.data.samplers import paired_batches
from m3em_fast.data.store import FeatureStore
from m3em_fast.uda import METHODS, report, total_loss
from m3em_fast.uda.evaluation import METRICS, majority_floor
from train_cases import make_options, write_data

CPU = torch.device("cpu")
# No option at its default, so that none can be left out unnoticed.
UNUSUAL = {
    "epochs": 4,
    "lr": 0.04,
    "lr_steps": (1, 2),
    "weight_decay": 0.05,
    "clip_gradient": 4.0,
    "lambda_y": 1.5,
    "lambda_d": 2.5,
    "gamma": 0.4,
    "beta": (0.9, 0.5, 0.2),
    "dropout": 0.3,
    "seed": 5,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("stores"))


def written_out(options):
    """Losses, gradient norms and final weights of SGD with Nesterov momentum as its formulas have it."""
    stores = {split: FeatureStore(options.data / split) for split in ("source_train", "target_train")}
    source, target = (stores[split].read(np.arange(len(stores[split])), frames=5) for split in stores)
    labels = {kind: torch.from_numpy(np.array(x)) for kind, x in stores["source_train"].labels.items()}
    torch.manual_seed(options.seed)
    model = train.build_model(options, stores["source_train"])
    weights = list(model.parameters())
    velocity = [torch.zeros_like(w) for w in weights]
    losses, norms = [], []
    for epoch in range(options.epochs):
        lr = options.lr / 10 ** len([s for s in options.lr_steps if s <= epoch])
        pairs = list(paired_batches(44, 50, options.batch_source, options.batch_target, seed=options.seed, epoch=epoch))
        for step, (s, t) in enumerate(pairs):
            done = (1 + epoch + step / len(pairs)) / options.epochs  # epochs are counted from 1
            warmup = (1 - math.exp(-done)) / (1 + math.exp(-done))
            out = model(
                {name: torch.cat([source[name][s], target[name][t]]) for name in source},
                [beta * warmup for beta in options.beta],
            )
            weighing = {name: getattr(options, name) for name in ("lambda_y", "lambda_d", "gamma")}
            loss, _ = total_loss(out.streams, labels["verb"][s], labels["noun"][s], **weighing)
            grads = torch.autograd.grad(loss, weights)
            losses.append(loss.item())
            norms.append(math.sqrt(sum(g.double().square().sum().item() for g in grads)))
            scale = min(1.0, options.clip_gradient / norms[-1])
            with torch.no_grad():
                for w, g, v in zip(weights, grads, velocity, strict=True):
                    g = scale * g + options.weight_decay * w
                    v.mul_(0.9).add_(g)
                    w.sub_(lr * (g + 0.9 * v))
    return losses, norms, model.state_dict()


def test_every_step_is_what_the_update_rule_says(data, tmp_path):
    options = make_options(data, tmp_path / "run", **UNUSUAL)
    losses, norms, weights = written_out(options)
    run = train.train(options)
    assert min(norms) < options.clip_gradient < max(norms)  # some steps are clipped, and some are not
    history = json.loads((run / "metrics.json").read_text())["history"]
    np.testing.assert_allclose(history["loss"], losses, rtol=1e-4)
    trained = torch.load(run / "checkpoint.pt", weights_only=True)["model"]
    for name, wanted in weights.items():
        torch.testing.assert_close(trained[name], wanted, rtol=1e-3, atol=1e-5)


def test_float16_clips_the_gradient_and_not_its_scaled_copy(data, tmp_path):
    # Scaled by 2**15 or so every gradient is longer than 5, and a step that clipped it would be next to nothing.
    moved = []
    for precision in ("fp32", "fp16"):
        options = make_options(
            data, tmp_path / precision, precision=precision, clip_gradient=5.0, epochs=1, weight_decay=0.0
        )
        trained = torch.load(train.train(options) / "checkpoint.pt", weights_only=True)["model"]
        torch.manual_seed(options.seed)
        fresh = train.build_model(options, FeatureStore(data / "source_train")).state_dict()
        moved.append(math.sqrt(sum((trained[name] - x).square().sum().item() for name, x in fresh.items())))
    assert 0.5 < moved[1] / moved[0] < 2


def test_options_reach_the_model(data, tmp_path):
    sizes = {"latent": 7, "fc_dim": 11, "relation_dim": 9, "reduction": 2, "dropout": 0.125}
    changes = {"num_scales": 2, "center": True, "gate_bias": True, "init": "ta3n"}
    store = FeatureStore(data / "source_train")
    model = train.build_model(make_options(data, tmp_path, **sizes, **changes), store)
    m3em = model.enhancement
    assert (m3em.cmc.num_scales, m3em.cmc.center, m3em.cmc.projections["RGB"].out_features) == (2, True, 7)
    assert m3em.smr.self_gates["RGB"][0].out_features == 3 and m3em.smr.self_gates["RGB"][0].bias is not None
    for stream in model.streams.values():
        assert (stream.dropout_i.p, stream.dropout_v.p) == (0.125, 0.125)
        assert stream.fc_feature_shared_source.out_features == 11 and stream.fc_feature_domain_video.in_features == 9
        assert stream.fc_feature_shared_source.weight.abs().max() < 0.01
    for method, has in METHODS.items():
        model = train.build_model(make_options(data, tmp_path, method=method), store)
        assert (model.enhancement.smr is not None, model.enhancement.cmc is not None) == (has["smr"], has["cmc"])
        assert model.streams["visual"].adversarial == has["adversarial"]
        assert model.streams["visual"].fc_feature_shared_source.weight.abs().max() > 0.1


def test_learning_rates_by_method():
    rates = {method: train.resolve(train.Options(method=method, device="cpu")).lr for method in METHODS}
    assert rates == {"source_only": 0.01, "ta3n": 0.01, "ta3n_smr": 0.03, "ta3n_cmc": 0.03, "m3em": 0.03}


@pytest.mark.parametrize(("threads", "calls"), [(1, [1]), (3, [3]), (0, [])])
def test_threads_are_set_before_anything_is_computed(data, tmp_path, monkeypatch, threads, calls):
    class Stop(Exception):
        pass

    def stop(*_):
        raise Stop

    made = []
    monkeypatch.setattr(torch, "set_num_threads", made.append)
    monkeypatch.setattr(train, "build_model", stop)
    with pytest.raises(Stop):
        train.train(make_options(data, tmp_path / "run", threads=threads))
    assert made == calls


def test_precision_reaches_training_and_evaluation(data, tmp_path, monkeypatch):
    seen = []
    real = train.ActionModel.forward

    def forward(model, features, *beta):
        on = torch.is_autocast_enabled("cpu")
        seen.append((model.training, torch.get_autocast_dtype("cpu") if on else torch.float32))
        return real(model, features, *beta)

    monkeypatch.setattr(train.ActionModel, "forward", forward)
    dtypes = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    for precision, dtype in dtypes.items():
        seen.clear()
        run = train.train(make_options(data, tmp_path / precision, epochs=1, precision=precision, method="ta3n"))
        assert seen == [(True, dtype)] * 5 + [(False, dtype)] * 2  # 5 steps, then both splits
        scaler = torch.load(run / "checkpoint.pt", weights_only=True)["scaler"]
        assert bool(scaler) == (precision == "fp16")


@pytest.mark.parametrize("method", ["ta3n", "m3em"])
def test_the_last_epoch_is_reported_whatever_the_others_reached(data, tmp_path, monkeypatch, method):
    scores = {}

    def falling(model, store, **_):
        value = scores.get(len(store), 100.0 - len(store)) - 1.0  # the number of clips tells the splits apart
        scores[len(store)] = value
        return dict.fromkeys(METRICS, value)

    drawn = []
    monkeypatch.setattr(train, "evaluate", falling)
    monkeypatch.setattr(report, "draw_consensus", lambda run, model, store, device: drawn.append(len(store)))
    run = train.train(make_options(data, tmp_path / "run", method=method, fc_dim=4))
    metrics = json.loads((run / "metrics.json").read_text())
    assert set(metrics) == {"method", "results", "floor", "history"} and metrics["method"] == method
    assert metrics["results"] == {
        "source_val": dict.fromkeys(METRICS, 78.0),
        "target_test": dict.fromkeys(METRICS, 68.0),
    }
    assert [x["verb_top1"] for x in metrics["history"]["target_test"]] == [69.0, 68.0]
    for split, floor in metrics["floor"].items():
        assert floor == majority_floor(**FeatureStore(data / split).labels)
    assert drawn == ([30] if METHODS[method]["cmc"] else [])  # over clips of target_test
    about = json.loads((run / "run.json").read_text())
    assert about["options"]["method"] == method and about["options"]["lr"] == (0.03 if method == "m3em" else 0.01)
    assert about["seconds"] > 0 and {"data", "environment"} <= set(about)


def test_a_run_on_the_kernels_is_compared_with_one_on_the_reference(data, tmp_path, monkeypatch):
    """What make train does at its end, on data of a test."""
    runs = []
    for name in (backends.available()[0], "reference"):
        with backends.backend(name):
            runs.append(train.train(make_options(data, tmp_path / f"on-{name}", method="m3em", fc_dim=4)))
    _, rows, said = report.compare_backends(runs[:1], runs[1])
    assert [row[0] for row in rows] == [backends.available()[0], "reference"]
    seconds = [json.loads((run / "run.json").read_text())["seconds"] for run in runs]
    assert f"m3em trains {seconds[1] / seconds[0]:.2f} times as fast on {backends.available()[0]} as on " in said
    difference = re.search(r"the first 10 losses differ by (\S+) of", said)
    assert float(difference[1]) < 1e-5


def test_the_log_of_an_interrupted_run_has_every_step_once(data, tmp_path, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    options = make_options(data, tmp_path / "run", method="ta3n", fc_dim=4)
    with monkeypatch.context() as patch:
        patch.setattr(train, "evaluate", interrupt)  # after step 4, the last checkpoint having been at step 3
        with pytest.raises(KeyboardInterrupt):
            train.train(options)
    run = train.train(make_options(data, tmp_path / "run", method="ta3n", fc_dim=4, resume=True))
    events = EventAccumulator(str(run))
    events.Reload()
    history = json.loads((run / "metrics.json").read_text())["history"]
    wanted = {f"loss/{name}": ([terms[name] for terms in history["terms"]], range(10)) for name in history["terms"][0]}
    for split in ("source_val", "target_test"):
        wanted |= {f"{split}/{name}": ([x[name] for x in history[split]], (5, 10)) for name in METRICS}
    assert set(events.Tags()["scalars"]) == set(wanted)
    for tag, (values, steps) in wanted.items():
        assert [event.step for event in events.Scalars(tag)] == list(steps), tag
        np.testing.assert_allclose([event.value for event in events.Scalars(tag)], values, rtol=1e-6)


def test_exit_codes_and_streams(data, tmp_path, monkeypatch, capsys):
    def call(name, *more):
        monkeypatch.setattr("sys.argv", ["train.py", "--data", str(data), "--run", str(tmp_path / name), *more])
        return train.main(), *capsys.readouterr()

    small = ("--epochs", "1", "--method", "ta3n", "--fc-dim", "4", "--device", "cpu")
    code, out, _ = call("good", *small)
    assert code == 0 and "majority class" in out and "ta3n" in out and "target test" in out
    code, out, err = call("good", *small)
    assert code == 2 and out == "" and err.startswith("train.py: --run ")

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "evaluate", interrupt)
    code, out, err = call("cut", *small)
    assert code == 130 and out == "" and "--resume goes on from the last checkpoint" in err and "Traceback" not in err


@pytest.mark.parametrize("name", ["fpga", "cpu"])
def test_a_backend_that_cannot_be_is_named(data, tmp_path, monkeypatch, capsys, name):
    monkeypatch.setattr(backends, "_default", name)  # of M3EM_BACKEND, which is read at import
    monkeypatch.setattr(backends, "native", None)
    monkeypatch.setattr(
        sys, "argv", ["train.py", "--data", str(data), "--run", str(tmp_path / "run"), "--device", "cpu"]
    )
    assert train.main() == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert ("got 'fpga'" if name == "fpga" else "backend cpu cannot serve this call") in error


def test_a_run_folder_that_cannot_be_made_is_named(data, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("mine")
    run = tmp_path / "file" / "run"
    monkeypatch.setattr(sys, "argv", ["train.py", "--data", str(data), "--run", str(run), "--device", "cpu"])
    assert train.main() == 2
    error = capsys.readouterr().err
    assert str(run) in error and "Traceback" not in error
