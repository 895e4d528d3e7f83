"""Several processes train as one: the same weights, scores and files, and a resumed run is the whole one."""

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import train
from distributed_cases import run_main, signal_at, together
from m3em_fast.data.store import FeatureStore
from m3em_fast.uda import METHODS, distributed, report
from m3em_fast.uda.checkpoint import load_checkpoint, restore_random_state
from m3em_fast.uda.distributed import Team, joined
from m3em_fast.uda.evaluation import predict
from train_cases import make_options, write_data, write_store

ROOT = Path(__file__).resolve().parent.parent
SMALL = {"fc_dim": 8, "save_every": 3}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("stores"))


def state_of(run):
    return load_checkpoint(run / "checkpoint.pt")


def assert_close(run, other):
    """Weights and losses within 64 roundings of float32, of a weight's largest element."""
    a, b = state_of(run), state_of(other)
    tolerance = 64 * 2.0**-24
    for name, x in a["model"].items():
        assert (b["model"][name] - x).abs().max() <= tolerance * x.abs().max(), name
    for kind, names in (("loss", [None]), ("terms", a["history"]["terms"][0])):
        for name in names:
            found = [[x if name is None else x[name] for x in state["history"][kind]] for state in (a, b)]
            np.testing.assert_allclose(found[1], found[0], rtol=tolerance)


def trained(size, folder, options, *change):
    codes, said = together(size, folder, run_main, options, *change)
    assert codes == [0] * size, said
    return options.run


def test_ten_steps_of_torchrun_are_those_of_one_process(data, tmp_path):
    options = make_options(data, tmp_path / "one", dropout=0.0)
    one = train.train(options)
    sizes = {name.replace("_", "-"): getattr(options, name) for name in ("epochs", "batch_source", "batch_target")}
    sizes |= {"lr-steps": 1, "save-every": 2, "latent": 4, "fc-dim": 16, "relation-dim": 8, "dropout": 0.0}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--", "train.py"]
    command += ["--data", data, "--run", tmp_path / "two", "--device", "cpu"]
    command += [part for name, value in sizes.items() for part in (f"--{name}", value)]
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("majority class") == 1 and "Traceback" not in done.stderr
    assert len(state_of(one)["history"]["loss"]) == 10
    assert_close(one, tmp_path / "two")
    metrics = [json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("one", "two")]
    assert metrics[0]["results"] == metrics[1]["results"] and metrics[0]["floor"] == metrics[1]["floor"]
    names = [{path.name.split(".")[0] for path in (tmp_path / name).iterdir()} for name in ("one", "two")]
    assert names[0] == names[1]  # and one log alone: the others' would have other names
    assert len(list((tmp_path / "two").glob("events.*"))) == 1
    assert json.loads((tmp_path / "two" / "run.json").read_text())["processes"] == 2


@pytest.mark.parametrize("method", METHODS)
def test_uneven_and_empty_shares(data, tmp_path, method):
    """Two source clips among three processes, of whom one has none; one target clip, so one has nothing at all."""
    options = make_options(data, tmp_path / "one", method=method, dropout=0.0, batch_source=2, batch_target=1, **SMALL)
    options = replace(options, epochs=1, save_every=100)
    small = tmp_path / "data"
    small.mkdir()
    for name, clips in (("source_train", 17), ("source_val", 2), ("target_train", 9), ("target_test", 1)):
        write_store(small / name, clips, clips, labelled=name != "target_train")
    options = replace(options, data=small)
    one = train.train(options)
    assert_close(one, trained(3, tmp_path / "said", replace(options, run=tmp_path / "three")))
    scores = [json.loads((run / "metrics.json").read_text())["results"] for run in (one, tmp_path / "three")]
    assert scores[0] == scores[1]


def test_clipping_and_loss_scaling_see_the_sum(data, tmp_path):
    changes = {"precision": "fp16", "dropout": 0.0, "clip_gradient": 0.05, "weight_decay": 0.0, "lr": 0.5}
    options = make_options(data, tmp_path / "one", **changes, **SMALL)
    one = train.train(options)
    two = trained(2, tmp_path / "said", replace(options, run=tmp_path / "two"))
    states = [state_of(run) for run in (one, two)]
    assert states[0]["scaler"] == states[1]["scaler"]
    for name, x in states[0]["model"].items():  # float16 rounds a share's gradients apart from each other
        torch.testing.assert_close(states[1]["model"][name], x, rtol=0, atol=0.01 * x.abs().max().item())
    full = train.train(replace(options, run=tmp_path / "full", clip_gradient=20.0))
    moved = max((state_of(full)["model"][n] - x).abs().max().item() for n, x in states[0]["model"].items())
    assert moved > 0.1  # so it was clipped


def overflow(rank):
    """Loss scaling that begins too high, and the weights at the end in a file of each rank."""
    real = torch.amp.GradScaler
    torch.amp.GradScaler = lambda *a, **o: real(*a, init_scale=2.0**40, **o)
    leave_weights(rank)


def leave_weights(rank):
    built = train.build_model

    def build_model(*arguments):
        model = built(*arguments)
        leave = train.fit

        def fit(*more):
            history = leave(*more)
            content = b"".join(x.numpy().tobytes() for x in model.state_dict().values())
            print(hashlib.sha256(content).hexdigest(), json.dumps(history), flush=True)
            return history

        train.fit = fit
        return model

    train.build_model = build_model


@pytest.mark.parametrize(("precision", "change"), [("fp32", leave_weights), ("fp16", overflow)])
def test_every_process_ends_with_the_same_weights_and_history(data, tmp_path, precision, change):
    options = make_options(data, tmp_path / "run", precision=precision, **SMALL)
    trained(3, tmp_path / "said", options, change)
    lines = [(tmp_path / "said" / f"out{rank}").read_text().splitlines()[0] for rank in range(3)]
    assert len(set(lines)) == 1
    state = state_of(options.run)
    assert np.isfinite(state["history"]["loss"]).all()
    assert precision == "fp32" or state["scaler"]["scale"] < 2.0**40  # some steps were left out, by all


def test_every_process_draws_dropout_of_its_own_and_a_run_repeats(data, tmp_path):
    options = make_options(data, tmp_path / "run", epochs=1, **SMALL)
    random = state_of(trained(2, tmp_path / "said", options))["random"]["cpu"]
    assert random.shape == (2, len(torch.get_rng_state())) and not torch.equal(*random)
    again = trained(2, tmp_path / "said", replace(options, run=tmp_path / "again"))
    assert (options.run / "metrics.json").read_bytes() == (again / "metrics.json").read_bytes()


def test_a_state_of_random_numbers_is_read_where_it_lies():
    """torch reads the beginning of its storage, which for all but the first process is another's."""
    states = []
    for seed in range(3):
        torch.manual_seed(seed)
        states.append(torch.get_rng_state())
    wanted = torch.rand(3)
    assert restore_random_state({"cpu": torch.stack(states)}, torch.device("cpu"), Team(2, 3)) == 3
    assert torch.equal(torch.rand(3), wanted)
    for bad in (torch.zeros(7, dtype=torch.uint8), torch.zeros(3, 7, dtype=torch.uint8), torch.stack(states).int()):
        with pytest.raises(ValueError, match="no state of a generator: cpu"):
            restore_random_state({"cpu": bad}, torch.device("cpu"), Team(2, 3))


def test_dropout_is_not_the_same_in_two_processes():
    draws = []
    for rank in range(2):
        Team(rank, 2).seed(1)
        draws.append(torch.rand(4))
    assert not torch.equal(*draws)


def test_resumed_by_as_many_processes_it_is_the_whole_run(data, tmp_path):
    """Three, whose sums depend on the order."""
    options = make_options(data, tmp_path / "whole", **SMALL)
    whole = trained(3, tmp_path / "said", options)
    cut = replace(options, run=tmp_path / "cut")
    codes, said = together(3, tmp_path / "said", run_main, cut, signal_at, 1, "total_loss", 7, 15)
    assert codes == [143] * 3, said
    assert (state_of(cut.run)["epoch"], state_of(cut.run)["step"]) == (1, 2)
    trained(3, tmp_path / "said", replace(cut, resume=True))
    assert (whole / "metrics.json").read_bytes() == (cut.run / "metrics.json").read_bytes()
    a, b = state_of(whole), state_of(cut.run)
    assert torch.equal(a["random"]["cpu"], b["random"]["cpu"])
    for name, x in a["model"].items():
        assert torch.equal(x, b["model"][name]), name


def show_buckets(rank):
    real = distributed._sum_of_gradients

    def shown(state, bucket):
        print([tuple(x.shape) for x in bucket.parameters()], flush=True)
        return real(state, bucket)

    distributed._sum_of_gradients = shown


def test_gradients_lie_in_the_same_buckets_in_every_step(data, tmp_path):
    """Of three processes' gradients each is summed in an order that depends on its place."""
    trained(2, tmp_path / "said", make_options(data, tmp_path / "run", epochs=1, **SMALL), show_buckets)
    first, *steps = [line for line in (tmp_path / "said" / "out1").read_text().splitlines() if line.startswith("[(")]
    assert len(steps) == 5 and len(set(steps)) == 1 and steps[0] != first  # else there would be nothing to be done


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (3, 2)])
def test_resumed_by_another_number_of_processes_it_says_so_and_goes_on(data, tmp_path, before, after):
    options = make_options(data, tmp_path / "run", dropout=0.0, **SMALL)
    whole = train.train(replace(options, run=tmp_path / "whole"))
    codes, said = together(before, tmp_path / "said", run_main, options, signal_at, 0, "total_loss", 4, 15)
    assert codes == [143] * before, said
    codes, said = together(after, tmp_path / "said", run_main, replace(options, resume=True))
    assert codes == [0] * after, said
    sentence = f"train.py: {options.run} was trained in {before} processes and goes on in {after}, with other dropout."
    assert [sentence in lines for lines in said] == [True] + [False] * (after - 1)
    assert_close(whole, options.run)


def compare_predictions(rank, data):
    store = FeatureStore(data / "target_test")
    with joined("cpu", ()) as team:
        model = train.build_model(make_options(data, None, **SMALL), store)
        with torch.no_grad():
            for weights in model.parameters():
                weights.uniform_(-1, 1, generator=torch.Generator().manual_seed(len(weights)))
        how = {"device": torch.device("cpu"), "autocast": torch.autocast("cpu", enabled=False)}
        alone = predict(model, store, batch=512, **how)
        for batch in (3, 512):
            shared = predict(model, store, batch=batch, team=team, **how)
            for x, y in zip(alone, shared, strict=True):
                torch.testing.assert_close(y, x, rtol=1e-4, atol=1e-5)
        print(len(store), [len(range(len(store))[team.share(len(store))])], flush=True)


@pytest.mark.parametrize("clips", [2, 7, 30])
def test_the_clips_of_an_evaluation_are_shared_and_their_scores_in_the_stores_order(tmp_path, clips):
    write_store(tmp_path / "target_test", clips, 5)
    codes, said = together(3, tmp_path / "said", compare_predictions, tmp_path)
    assert codes == [0] * 3, said
    parts = [json.loads((tmp_path / "said" / f"out{rank}").read_text().split(" ", 1)[1])[0] for rank in range(3)]
    assert sum(parts) == clips and max(parts) - min(parts) <= 1


def test_one_process_names_the_folder(data, tmp_path):
    options = make_options(data, None, epochs=1, method="ta3n", **SMALL)
    codes, said = together(2, tmp_path / "said", run_in, tmp_path, options)
    assert codes == [0, 0], said
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["digits-ta3n-1"]
    assert report.load_metrics(tmp_path / "runs" / "digits-ta3n-1")["method"] == "ta3n"


def run_in(rank, folder, options):
    os.chdir(folder)
    return run_main(rank, options)
