"""Models A to D and the public baseline: what each reads, which streams it makes of it, and its training's defaults."""

import math
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import train
from m3em_fast.data.prefetch import BatchReader
from m3em_fast.data.store import FeatureStore, FeatureStoreWriter, Modality
from m3em_fast.epic.models import MODELS, without_consensus
from m3em_fast.uda import ActionModel, total_loss
from m3em_fast.uda.distributed import ALONE
from m3em_fast.uda.options import PRESETS
from m3em_fast.uda.splits import PROTOCOLS

CLASSES = {"verb": 5, "noun": 7}
# Weights of 0.001 would leave every output below any tolerance.
WIDE = {"latent": 8, "fc_dim": 12, "relation_dim": 10, "reduction": 2, "object_dim": 6, "init": "torch"}
CHANNELS = {"RGB": 8, "Flow": 6, "RGB-crop": 8, "Flow-crop": 6, "RGB-I3D": 4, "Flow-I3D": 4}
CHANNELS |= {"Audio": 10, "Objects": 352}
MAPS = tuple(CHANNELS)[:6]
# Stream -> its modalities, as section 3.4 of the report has them.
STREAMS = {
    "A": {"visual": ("RGB", "Flow"), "Audio": ("Audio",)},
    "B": {"visual": ("RGB", "Flow"), "Audio": ("Audio",), "Objects": ("Objects",)},
    "C": {"visual": ("RGB-crop", "Flow-crop"), "Audio": ("Audio",)},
    "D": {"visual": ("RGB-I3D", "Flow-I3D")},
    "baseline": {"visual": ("RGB", "Flow", "Audio")},
}


def make_store(path, maps=MAPS, clips=3, channels=CHANNELS):
    """Everything that a model reads, 25 frames of vectors and 5 of maps, and one modality that none reads."""
    forms = {"Depth": Modality("vector", 1, 3)}
    for name, count in channels.items():
        forms[name] = Modality("map", 5, count, 4, 4) if name in maps else Modality("vector", 25, count)
    rng = np.random.default_rng(0)
    labels = {kind: np.arange(clips) % count for kind, count in CLASSES.items()}
    with FeatureStoreWriter(path, forms, CLASSES) as writer:
        features = {name: rng.random((clips, *form.shape)) for name, form in forms.items()}
        writer.append([f"P01_01_{i}" for i in range(clips)], features, labels)
    return FeatureStore(path)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("store") / "all")


@pytest.fixture(scope="module")
def pooled(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("store") / "pooled", maps=())


def options(model, **changes):
    return replace(PRESETS["epic"], model=model, **{**WIDE, **changes})


def layers(model):
    return {name: stream.fc_feature_shared_source.in_features for name, stream in model.streams.items()}


@pytest.mark.parametrize("name", MODELS)
def test_what_a_model_reads_and_which_streams_it_makes(store, name):
    model = train.build_model(options(name), store)
    assert model.members == STREAMS[name]
    assert sorted(model.modalities) == sorted(n for names in STREAMS[name].values() for n in names)
    width = CHANNELS | {"Objects": WIDE["object_dim"]}  # SMR doubles it
    assert layers(model) == {s: 2 * sum(width[n] for n in names) for s, names in STREAMS[name].items()}
    assert set(model.enhancement.cmc.channels) == {n for n in STREAMS[name]["visual"] if n in MAPS}
    features = store.read([0, 2], model.modalities, frames=model.num_segments)
    out = model.eval()(features)
    assert out.verb.shape == (2, CLASSES["verb"]) and out.consensus.shape == (2, 5, 4, 4)
    fused = sum((1.0 if s == "visual" else 0.5) * stream.noun for s, stream in out.streams.items())
    torch.testing.assert_close(out.noun, fused)


def test_a_model_reads_the_middle_frames_of_five_segments(store):
    model = train.build_model(options("B"), store)
    ((pair, own, read),) = train.batches(
        [(np.array([1]), np.array([2]))], BatchReader([store, store], model.modalities, model.num_segments), ALONE
    )
    assert pair == own
    every = store.read([1, 2])
    for name in ("Audio", "Objects"):
        assert torch.equal(read[name], every[name][:, [2, 7, 12, 17, 22]])
    assert torch.equal(read["RGB"], every["RGB"]) and set(read) == {"RGB", "Flow", "Audio", "Objects"}


def test_the_baseline_is_the_challenges_network(tmp_path):
    wide = make_store(tmp_path / "wide", (), 1, {"RGB": 1024, "Flow": 1024, "Audio": 1024})
    classes = {"verb": 97, "noun": 300}
    wide.num_classes.update(classes)
    model = train.build_model(train.parse(["--preset", "epic", "--model", "baseline"]), wide)
    assert sum(p.numel() for p in model.parameters()) == 4_106_649
    assert layers(model) == {"visual": 3072}


@pytest.mark.parametrize(("method", "served"), [("m3em", "ta3n_smr"), ("ta3n_cmc", "ta3n"), ("ta3n_smr", "ta3n_smr")])
def test_pooled_features_leave_cmc_out_and_nothing_else(pooled, method, served):
    torch.manual_seed(0)
    model = train.build_model(options("A", method=method), pooled)
    torch.manual_seed(0)
    wanted = train.build_model(options("A", method=served), pooled)
    assert model.members == STREAMS["A"]
    assert model.enhancement.cmc is None and (model.enhancement.smr is None) == (served == "ta3n")
    assert model.streams["visual"].adversarial
    assert {n: x.shape for n, x in model.state_dict().items()} == {n: x.shape for n, x in wanted.state_dict().items()}
    for name, value in wanted.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    said = train.left_out(options("A", method=method), pooled)
    assert (said is None) == (method == served)
    if said:
        assert said.startswith("CMC is left out: the features of RGB and Flow are vectors") and "\n" not in said


def test_smr_gives_pooled_features_what_it_gives_their_maps(store, tmp_path):
    """The very same weights and scores, since pooling commutes with gating."""
    maps = store.read([0, 1, 2])
    flat = {name: maps[name].float().mean((3, 4)) if name in MAPS else maps[name] for name in CHANNELS}
    model = train.build_model(options("C", method="ta3n_smr"), store).eval()
    vectors = train.build_model(options("C", method="ta3n_smr"), make_store(tmp_path / "flat", maps=())).eval()
    vectors.load_state_dict(model.state_dict(), strict=True)
    frames = {"RGB-crop": maps, "Flow-crop": maps, "Audio": maps}
    inputs = {name: maps[name][:, :5].float() for name in frames}
    out, other = model(inputs), vectors(inputs | {name: flat[name][:, :5] for name in ("RGB-crop", "Flow-crop")})
    assert out.verb.std() > 0.05
    torch.testing.assert_close(other.verb, out.verb)
    torch.testing.assert_close(other.noun, out.noun)


def test_one_map_alone_has_nothing_to_be_compared_with(tmp_path):
    mixed = make_store(tmp_path / "mixed", maps=("Flow",))
    model = train.build_model(options("A"), mixed)
    assert model.enhancement.cmc is None and model.members["visual"] == ("RGB", "Flow")
    assert "the features of RGB are vectors" in train.left_out(options("A"), mixed)
    assert without_consensus("A", ["Flow", "RGB"]) is None and without_consensus("A", ["Flow", "RGB-crop"])


def test_without_a_model_maps_are_visual_and_vectors_have_their_own_streams(store):
    model = train.build_model(options("all", method="ta3n"), store_without(store, "Depth"))
    assert model.members["visual"] == MAPS
    assert set(model.streams) == {"visual", "Audio", "Objects"}
    assert not model.projections


def store_without(store, name):
    others = {n: m for n, m in store.modalities.items() if n != name}
    return SimpleNamespace(path=store.path, num_classes=store.num_classes, modalities=others)


def test_objects_pass_a_linear_layer_that_every_loss_trains(store):
    model = train.build_model(options("B", dropout=0.0), store)
    (layer,) = model.projections.values()
    assert (layer.in_features, layer.out_features) == (352, WIDE["object_dim"]) and layer.bias is not None
    fresh = train.build_model(options("B", init="ta3n"), store)
    assert fresh.streams["Objects"].fc_feature_shared_source.weight.abs().max() < 0.01
    # torch's own uniform(-1 / sqrt(352), 1 / sqrt(352)), and not 0.001 as the layers behind it have.
    assert 0.9 * 352**-0.5 < fresh.projections["Objects"].weight.abs().max() <= 352**-0.5

    features = store.read([0, 1, 2], model.modalities, frames=5)
    projected = features["Objects"].float() @ layer.weight.T + layer.bias
    torch.manual_seed(1)
    spatial, vector = {n: CHANNELS[n] for n in ("RGB", "Flow")}, {"Audio": 10, "Objects": WIDE["object_dim"]}
    sizes = {"latent_channels": 8, "reduction": 2, "fc_dim": 12, "relation_dim": 10, "dropout_i": 0.0, "dropout_v": 0.0}
    plain = ActionModel(spatial, vector, CLASSES["verb"], CLASSES["noun"], **sizes)
    plain.load_state_dict({n: x for n, x in model.state_dict().items() if not n.startswith("projections.")})
    found, wanted = model(features).verb, plain(features | {"Objects": projected}).verb
    assert wanted.std() > 0.05
    torch.testing.assert_close(found, wanted)

    out = model(features, [1.0, 1.0, 1.0])
    labels = torch.tensor([1]), torch.tensor([2])
    for chosen in ("lambda_y", "lambda_d", "gamma"):
        weights = dict.fromkeys(("lambda_y", "lambda_d", "gamma"), 0.0) | {chosen: 1.0}
        loss, _ = total_loss(out.streams, *labels, **weights)
        (slope,) = torch.autograd.grad(loss, layer.weight, retain_graph=True)
        assert slope.abs().max() > 1e-6, chosen


@pytest.mark.parametrize(
    "names", [{"visual": ("RGB", "Depth")}, {"projected": {"RGB": 4}}, {"projected": {"Depth": 4}}], ids=range(3)
)
def test_names_that_are_not_given_are_refused(names):
    with pytest.raises(ValueError, match="name modalities that are not given: "):
        ActionModel({"RGB": 4, "Flow": 4}, {"Audio": 4}, 3, 4, **names)


def parse(*arguments):
    return train.resolve(train.parse(["--preset", "epic", "--device", "cpu", *arguments]))


def test_defaults_of_the_models():
    for name in MODELS:
        found = parse("--model", name)
        assert found.lambda_d == (3.0 if name == "D" else 1.0)
        assert found.method == ("ta3n" if name == "baseline" else "m3em")
        assert (found.lambda_y, found.gamma, found.beta) == (1.0, 0.003, (0.75, 0.75, 0.5))
        assert (found.reduction, found.object_dim, found.dropout, found.init) == (16, 1024, 0.5, "ta3n")
        assert (found.epochs, found.lr, found.weight_decay, found.clip_gradient) == (30, 0.003, 1e-4, 20.0)
    assert parse().model == "A" and parse().protocol == "val"
    told = parse("--model", "D", "--lambda-d", "2", "--method", "ta3n")
    assert (told.lambda_d, told.method, told.model) == (2.0, "ta3n", "D")
    plain = train.parse(["--model", "D"])
    assert (plain.preset, plain.lambda_d, plain.protocol) == ("digits", 1.0, "digits")


@pytest.mark.parametrize(("protocol", "source", "target"), [("test", 16115, 26115), ("val", 5002, 7906)])
def test_batches_and_epochs_are_those_of_the_public_baseline(protocol, source, target):
    found = parse("--protocol", protocol)
    assert found.batch_source == 128 and found.batch_target == 128 * target // source
    assert parse("--protocol", protocol, "--batch-target", "9").batch_target == 9
    # The baseline divides its warm-up by the source's batches, train.py by the steps: they have to be the same number.
    steps = train.num_batches(source, target, found.batch_source, found.batch_target)
    assert steps == math.ceil(source / 128) == {"test": 126, "val": 40}[protocol]


def test_the_learning_rate_falls_when_the_public_baselines_does():
    found, rate, rates = parse(), 0.003, []
    for epoch in range(1, 31):
        if epoch in (10, 20):
            rate /= 10
        rates.append(rate)
    own = [found.lr * 0.1 ** sum(epoch >= s for s in found.lr_steps) for epoch in range(found.epochs)]
    np.testing.assert_allclose(own, rates, rtol=1e-12)


def test_the_protocols_are_those_of_the_label_files():
    from m3em_fast.epic import annotations

    for name, facts in annotations.PROTOCOLS.items():
        plan = PROTOCOLS[name]
        assert (plan.source, plan.target, plan.evaluated) == (facts.source, facts.target, facts.report)
        assert (plan.evaluated in plan.reported) == facts.labelled and plan.evaluated in plan.scored
        assert set(plan.reported) <= {split for split, file in annotations.SPLITS.items() if file.labelled}


def test_the_commands_of_the_document_are_those_of_the_rows():
    text = (Path(__file__).resolve().parent.parent / "docs" / "reproduce.md").read_text()
    commands = re.findall(r"python train\.py ([^`;\n]+)", text)
    assert len(commands) >= 4
    for command in commands:
        told = train.resolve(train.parse(command.replace("$m", "D").split()))
        assert told.preset == "epic" and told.protocol in ("val", "test")
        assert told.lambda_d == MODELS[told.model].lambda_d and told.run.name == f"{told.protocol}-{told.model}"
    for row in ("TA3N", "TA3N + Ours", "A+B", "A+B+C", "A+B+C+D"):
        assert text.count(f"\n| {row} | ") == 1
