"""A run under the challenge's protocols, and all that comes after it: scores, accuracies, ensembles, the submission.

Everything here runs on made-up label files and generated features; `make epic-dry-run` does it on the real labels.
"""

import json
import math
import shutil

import numpy as np
import pytest
import torch

import train
from epic_cases import write_annotations
from m3em_fast.data.store import FeatureStore, FeatureStoreWriter
from m3em_fast.epic import ensemble, generate, scoring, submission
from m3em_fast.epic.annotations import Annotations
from m3em_fast.epic.scores import read_scores
from m3em_fast.uda import report
from m3em_fast.uda.evaluation import METRICS, accuracies, challenge_accuracies, majority_floor
from train_cases import make_options

COUNTS = {"source_val": 48, "target_val": 40, "source_train": 44, "target_train": 36, "target_test": 18}
MODELS = "ABCD"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Stores of every split with all of its clips, and the label files beside them."""
    folder = tmp_path_factory.mktemp("epic")
    labels = write_annotations(folder / "csv", clips=COUNTS)
    sizes = ("--side", "3", "--map-channels", "8", "--vector-channels", "6", "--no-published", "--clips", "99")
    made = ["--annotations", str(labels), "--out", str(folder / "data"), "--protocols", "val", "test", *sizes]
    assert generate.main(made) == 0
    return folder / "data"


def options(data, run, **changes):
    small = {"preset": "epic", "model": "A", "protocol": "val", "lr": 0.03, "object_dim": 8, "fc_dim": 24, "epochs": 8}
    return make_options(data, run, **{**small, "lr_steps": (6,), **changes})


def metrics_of(run):
    return json.loads((run / "metrics.json").read_text())


def own_labels(data):
    return ["--annotations", str(data / "annotations"), "--no-published"]


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    """Models A to D under both protocols."""
    folder = tmp_path_factory.mktemp("runs")
    return {
        (model, protocol): train.train(options(data, folder / f"{model}-{protocol}", model=model, protocol=protocol))
        for model in MODELS
        for protocol in ("val", "test")
    }


@pytest.mark.parametrize("model", MODELS)
def test_accuracies_of_a_run_are_those_of_its_stored_scores(data, runs, model):
    run = runs[model, "val"]
    metrics = metrics_of(run)
    assert set(metrics) == {"method", "model", "protocol", "results", "floor", "history"}
    assert (metrics["model"], metrics["protocol"], metrics["method"]) == (model, "val", "m3em")
    assert set(metrics["results"]) == set(metrics["floor"]) == {"target_val"}
    assert len(metrics["history"]["target_val"]) == 8
    labels = Annotations(data / "annotations", published=False)
    scores = read_scores(run / "scores" / "target_val")
    found = scoring.score(scores, labels)["all"]
    wanted = {f"{k}_top{n}": getattr(found[k], f"top{n}") for k in ("verb", "noun", "action") for n in (1, 5)}
    assert metrics["results"]["target_val"] == pytest.approx(wanted, rel=1e-12)
    floor = scoring.majority(labels.split("target_val"))
    assert metrics["floor"]["target_val"]["action_top1"] == pytest.approx(floor["action"].top1)
    # The features have a signal, and the run finds it in clips of the other domain.
    assert metrics["results"]["target_val"]["verb_top1"] > floor["verb"].top1 + 15


@pytest.mark.parametrize("protocol", ["val", "test"])
def test_scores_say_whose_they_are(data, runs, protocol):
    run = runs["B", protocol]
    target = {"val": "target_val", "test": "target_test"}[protocol]
    assert {path.name for path in (run / "scores").iterdir()} == {"source_val", target}
    for split in ("source_val", target):
        store, scores = FeatureStore(data / split), read_scores(run / "scores" / split)
        assert list(scores.ids) == store.clips
        assert (scores.split, scores.protocol, scores.model) == (split, protocol, "B")
        said = {"method": "m3em", "seed": 1, "epochs": 8, "features": store.fingerprint}
        assert scores.about == said
    # The checkpoint's weights give the very same scores.
    told = options(data, run, model="B", protocol=protocol)
    model = train.build_model(told, FeatureStore(data / "source_val"))
    model.load_state_dict(torch.load(run / "checkpoint.pt", weights_only=True)["model"])
    features = FeatureStore(data / target).read([3, 5], model.modalities, frames=5)
    with torch.no_grad():
        out = model.eval()(features)
    stored = read_scores(run / "scores" / target)
    np.testing.assert_allclose(stored.noun[[3, 5]], out.noun.numpy(), rtol=1e-4, atol=1e-5)


def test_the_test_protocol_reports_on_source_val_and_on_no_target(data, runs):
    run = runs["A", "test"]
    metrics = metrics_of(run)
    assert set(metrics["results"]) == {"source_val"}
    assert set(metrics["history"]) == {"loss", "terms", "source_val"}
    found = scoring.score(read_scores(run / "scores" / "source_val"), Annotations(data / "annotations", False))
    assert metrics["results"]["source_val"]["noun_top5"] == pytest.approx(found["all"]["noun"].top5)
    assert metrics["results"]["source_val"]["verb_top1"] > metrics["floor"]["source_val"]["verb_top1"] + 15


def test_from_the_runs_to_a_checked_submission(data, runs, tmp_path, capsys):
    scores = {key: {path.name: str(path) for path in (run / "scores").iterdir()} for key, run in runs.items()}
    for size in (2, 3, 4):
        given = [scores[model, "val"]["target_val"] for model in MODELS[:size]]
        assert ensemble.main([*given, "--out", str(tmp_path / f"val-{size}")]) == 0
    capsys.readouterr()
    given = [str(tmp_path / f"val-{size}") for size in (2, 3, 4)]
    assert scoring.main([*given, *own_labels(data)]) == 0
    assert all(name in capsys.readouterr().out for name in ("A+B, target_val",))
    found = scoring.score(read_scores(tmp_path / "val-4"), Annotations(data / "annotations", False))["all"]
    assert found["verb"].top1 > metrics_of(runs["A", "val"])["floor"]["target_val"]["verb_top1"] + 15
    out, search = ([scores[model, "test"][split] for model in MODELS] for split in ("target_test", "source_val"))
    made = [*out, "--out", str(tmp_path / "test"), "--search", *search, *own_labels(data)]
    assert ensemble.main(made) == 0
    file = tmp_path / "A+B+C+D.zip"
    assert submission.main([str(tmp_path / "test"), "--out", str(file), *own_labels(data)]) == 0
    capsys.readouterr()
    assert submission.main(["--check", str(file), *own_labels(data)]) == 0
    assert "a submission of 18 clips, supervision levels PT-TL-TD 2-4-3" in capsys.readouterr().out


def copied(data, folder, *splits):
    for split in splits:
        shutil.copytree(data / split, folder / split)
    return folder


def rewritten(store, path, *, without=(), labels="same"):
    """The same store with fewer modalities, or other labels."""
    forms = {n: m for n, m in store.modalities.items() if n not in without}
    labels = store.labels if isinstance(labels, str) else labels
    with FeatureStoreWriter(path, forms, store.num_classes, store.meta) as writer:
        features = {n: x.numpy() for n, x in store.read(range(len(store)), forms).items()}
        writer.append(store.clips, features, labels)


def test_without_source_val_the_test_protocol_has_scores_alone(data, tmp_path, capsys, monkeypatch):
    folder = copied(data, tmp_path / "data", "source_train", "target_train", "target_test")
    run = train.train(options(folder, tmp_path / "run", protocol="test", epochs=1))
    metrics = metrics_of(run)
    assert metrics["results"] == metrics["floor"] == {} and set(metrics["history"]) == {"loss", "terms"}
    assert (run / "curves.png").exists() and {x.name for x in (run / "scores").iterdir()} == {"target_test"}
    report.print_table([run])
    assert f"{run}: the target has no labels to compare with; its scores are in {run / 'scores'}." in " ".join(
        capsys.readouterr().out.split()
    )
    other = train.train(options(data, tmp_path / "other", protocol="test", epochs=1))
    with pytest.raises(report.ReportError, match="reports no accuracies to compare"):
        report.compare_backends([run], run)
    with pytest.raises(report.ReportError, match="runs that report on no split and source_val do not stand in one"):
        report.compare([metrics, metrics_of(other)])


def test_labels_of_the_target_change_nothing_but_its_accuracies(data, tmp_path):
    """Under val the target that is trained on has labels, for the report alone."""
    folder = copied(data, tmp_path / "data", "source_val")
    store = FeatureStore(data / "target_val")
    rewritten(store, folder / "target_val", labels={kind: x[::-1].copy() for kind, x in store.labels.items()})
    runs = [train.train(options(d, tmp_path / n, epochs=2)) for n, d in (("a", data), ("b", folder))]
    first, second = map(metrics_of, runs)
    assert first["history"]["loss"] == second["history"]["loss"] and first["results"] != second["results"]
    for kind in ("verb", "noun"):
        files = [(run / "scores" / "target_val" / f"{kind}.npy").read_bytes() for run in runs]
        assert files[0] == files[1]


def test_an_interrupted_run_ends_with_the_same_scores(data, tmp_path, monkeypatch):
    whole = train.train(options(data, tmp_path / "whole", model="B", epochs=2))
    real, count = train.save_checkpoint, []

    def save_and_stop(*arguments):
        real(*arguments)
        count.append(1)
        if len(count) == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train, "save_checkpoint", save_and_stop)
        with pytest.raises(KeyboardInterrupt):
            train.train(options(data, tmp_path / "cut", model="B", epochs=2))
    assert not (tmp_path / "cut" / "scores").exists()
    scores = tmp_path / "cut" / "scores"
    for number in range(3):  # from the second time on a run that has ended
        if number == 2:  # and was killed while it put its scores in the place of the old ones
            (scores / "source_val").rename(scores / ".source_val.before")
            shutil.copytree(scores / "target_val", scores / "source_val.0123abcd.tmp")
        cut = train.train(options(data, tmp_path / "cut", model="B", epochs=2, resume=True))
        assert (cut / "metrics.json").read_bytes() == (whole / "metrics.json").read_bytes()
        for split in ("source_val", "target_val"):
            for name in ("verb.npy", "noun.npy", "scores.json"):
                assert (cut / "scores" / split / name).read_bytes() == (whole / "scores" / split / name).read_bytes()
        assert sorted(path.name for path in scores.iterdir()) == ["source_val", "target_val"]


def test_warm_up_and_learning_rates_are_the_public_baselines(data, tmp_path, monkeypatch):
    """p = (i + epoch * len) / (30 * len), with epochs from 1 and len the source's batches."""
    seen, rates, real = [], [], torch.optim.SGD.step

    def step(optimizer, *arguments):
        rates.append(optimizer.param_groups[0]["lr"])
        return real(optimizer, *arguments)

    monkeypatch.setattr(train, "warmup_coefficient", lambda p: seen.append(p) or 0.1)
    monkeypatch.setattr(torch.optim.SGD, "step", step)
    given = ["--preset", "epic", "--model", "baseline", "--batch-source", "16", "--batch-target", "13"]
    given += ["--fc-dim", "4", "--relation-dim", "4", "--device", "cpu", "--threads", "1"]
    train.train(train.parse([*given, "--data", str(data), "--run", str(tmp_path / "run")]))
    length = 3
    assert seen == [(i + epoch * length) / (30 * length) for epoch in range(1, 31) for i in range(length)]
    wanted = [0.003 / 10 ** ((epoch >= 10) + (epoch >= 20)) for epoch in range(1, 31) for _ in range(length)]
    np.testing.assert_allclose(rates, wanted, rtol=1e-12)


def test_pooled_features_train_without_cmc_and_say_so_once(data, tmp_path, capsys):
    sizes = ["--no-published", "--clips", "30", "--map-channels", "6", "--vector-channels", "6", "--pooled"]
    made = ["--annotations", str(data / "annotations"), "--out", str(tmp_path / "data"), *sizes]
    assert generate.main(made) == 0
    capsys.readouterr()
    run = train.train(options(tmp_path / "data", tmp_path / "run", epochs=2))
    sentence = "CMC is left out: the features of RGB and Flow are vectors, pooled over positions"
    assert capsys.readouterr().err.count(sentence) == 1
    assert json.loads((run / "run.json").read_text())["left_out"].startswith(sentence)
    state = torch.load(run / "checkpoint.pt", weights_only=True)["model"]
    assert {name.split(".")[1] for name in state if name.startswith("streams.")} == {"visual", "Audio"}
    assert any(".smr." in name for name in state) and not any(".cmc." in name for name in state)
    assert not (run / "consensus.png").exists()


def test_with_maps_nothing_is_left_out(runs, capsys):
    assert json.loads((runs["A", "val"] / "run.json").read_text())["left_out"] is None
    state = torch.load(runs["D", "val"] / "checkpoint.pt", weights_only=True)["model"]
    assert any(".cmc." in name for name in state) and not any("Audio" in name for name in state)


def call(monkeypatch, capsys, *arguments):
    monkeypatch.setattr("sys.argv", ["train.py", "--preset", "epic", "--device", "cpu", *map(str, arguments)])
    code = train.main()
    return code, capsys.readouterr().err


def test_what_is_missing_is_named(data, tmp_path, monkeypatch, capsys):
    folder = copied(data, tmp_path / "data", "source_val")
    rewritten(FeatureStore(data / "target_val"), folder / "target_val", without=("Objects", "RGB-crop"))
    told = ("--data", folder, "--run", tmp_path / "run")
    code, said = call(monkeypatch, capsys, *told, "--model", "B")
    there = "RGB, Flow, Flow-crop, RGB-I3D, Flow-I3D, Audio"
    where = folder / "target_val"
    assert (code, said) == (2, f"train.py: {where} has no modality Objects, which --model B reads; it has {there}.\n")
    code, said = call(monkeypatch, capsys, *told, "--model", "C")
    assert code == 2 and "has no modality RGB-crop, which --model C reads" in said
    code, said = call(monkeypatch, capsys, "--data", tmp_path / "no")
    assert code == 2 and said.endswith("is no folder; docs/reproduce.md says what makes feature stores there.\n")
    code, said = call(monkeypatch, capsys, *told, "--protocol", "test")
    assert code == 2 and f"{folder / 'source_train'} is no feature store" in said
    shutil.rmtree(folder / "source_val")
    rewritten(FeatureStore(data / "source_val"), folder / "source_val", labels=None)
    code, said = call(monkeypatch, capsys, *told)
    assert code == 2 and "source_val has no labels, and the source_val split needs them." in said
    assert not (tmp_path / "run").exists()
    # A model that reads none of what is missing trains.
    shutil.rmtree(folder / "source_val")
    copied(data, folder, "source_val")
    run = train.train(options(folder, tmp_path / "run", model="D", epochs=1))
    assert set(metrics_of(run)["results"]) == {"target_val"}


def test_scores_that_cannot_be_written_are_one_sentence(data, tmp_path, monkeypatch, capsys):
    told = options(data, tmp_path / "run", epochs=1, method="ta3n", resume=True)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").touch()
    real = train.fit

    def fit(*arguments):
        (tmp_path / "run" / "scores").write_text("in the way")
        return real(*arguments)

    monkeypatch.setattr(train, "fit", fit)
    monkeypatch.setattr(train, "parse", lambda *_: told)
    assert train.main() == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == f"train.py: {tmp_path / 'run' / 'scores' / 'source_val'} could not be written (Not a directory)."
    assert (tmp_path / "run" / "scores").read_text() == "in the way"
    (tmp_path / "run" / "scores").unlink()
    monkeypatch.setattr(train, "fit", real)
    assert train.main() == 0 and (tmp_path / "run" / "scores" / "target_val").is_dir()


def test_a_run_is_resumed_with_its_own_model_and_protocol(data, tmp_path):
    train.train(options(data, tmp_path / "run", epochs=1))
    for name, value, old in (("model", "C", "A"), ("protocol", "test", "val"), ("object_dim", 9, 8)):
        with pytest.raises(train.UsageError, match=f"started with --{name.replace('_', '-')} {old}, not {value}"):
            train.train(options(data, tmp_path / "run", epochs=1, resume=True, **{name: value}))


def test_runs_are_named_after_model_and_protocol(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = train.train(options(data, None, model="D", epochs=1, method="ta3n"))
    assert str(run) == "runs/epic-D-val-ta3n-1"
    header, rows = report.compare([metrics_of(run)])
    assert [row[0] for row in rows] == ["majority class", "D, ta3n"]
    assert header == ["method", *(f"target validation: {kind}" for kind in ("verb", "noun", "action"))]


def test_both_counts_of_accuracy_agree_and_ties_do_not_favour_the_majority():
    rng = np.random.default_rng(0)
    verb, noun = (torch.from_numpy(rng.normal(size=(300, n)).astype(np.float32)) for n in (97, 300))
    labels = torch.from_numpy(rng.integers(0, 97, 300)), torch.from_numpy(rng.integers(0, 300, 300))
    for scores, label in ((verb, labels[0]), (noun, labels[1])):
        scores[torch.arange(300), label] += 2.0
    found = challenge_accuracies(verb, noun, *labels)
    assert list(found) == list(METRICS)
    assert found == pytest.approx(accuracies(verb, noun, *labels), rel=1e-6)
    assert 5 < found["action_top1"] < found["action_top5"] < 90
    # A model that has learnt nothing answers the rarest class, and not the most frequent one.
    constant = challenge_accuracies(torch.zeros(4, 9), torch.zeros(4, 9), torch.zeros(4).long(), torch.zeros(4).long())
    assert not any(constant.values())
    floor = majority_floor(np.zeros(4, int), np.zeros(4, int))
    assert math.isclose(floor["action_top1"], 100.0)
