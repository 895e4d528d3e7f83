"""A run of train.py under the challenge's preset against the transcription of TA3N in test_ta3n_parity.py.

What that file leaves to the run: which stored frames a clip is made of, which modalities a stream joins, source before
target, warm-up, learning rates, the sum of the loss over streams with lambda_d, clipping over all of them, and the
fused scores. All written out here once more in float64, from the formulas; of the package only who is in which batch.
"""

import json
import math

import numpy as np
import pytest
import torch

import train
from m3em_fast.data.samplers import paired_batches
from m3em_fast.data.store import FeatureStoreWriter, Modality
from test_ta3n_parity import (
    PLACES,
    draw,
    gradients,
    linear,
    transcribed_forward,
    transcribed_losses,
    transcribed_sgd_step,
    weight_shapes,
)

CLASSES = {"verb": 5, "noun": 7}
CHANNELS = {"RGB": 6, "Flow": 5, "Audio": 4, "Objects": 8}
WIDTH, FC, RELATION, EPOCHS, RATE, CLIP = 3, 8, 6, 4, 0.02, 14.0
CLIPS = {"source_val": 17, "target_val": 15}
FRAMES = [2, 7, 12, 17, 22]
# Model -> its streams in the order of their weights: 1.0, then 0.5 each.
STREAMS = {
    "baseline": {"visual": ("RGB", "Flow", "Audio")},
    "B": {"visual": ("RGB", "Flow"), "Audio": ("Audio",), "Objects": ("Objects",)},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Pooled features as the challenge has them, 25 frames of every modality, and their stores."""
    folder, rng, features = tmp_path_factory.mktemp("stores"), np.random.default_rng(0), {}
    forms = {name: Modality("vector", 25, count) for name, count in CHANNELS.items()}
    for split, clips in CLIPS.items():
        labels = {kind: rng.integers(0, count, clips) for kind, count in CLASSES.items()}
        features[split] = {n: rng.normal(size=(clips, 25, c)).astype(np.float16) for n, c in CHANNELS.items()}
        with FeatureStoreWriter(folder / split, forms, CLASSES) as writer:
            writer.append([f"{split}_{i}" for i in range(clips)], features[split], labels)
        features[split] |= labels
    return folder, features


def hand_weights(model):
    shapes = {}
    for stream, names in STREAMS[model].items():
        width = sum(WIDTH if name == "Objects" else CHANNELS[name] for name in names)
        layers = weight_shapes(width, CLASSES["verb"], CLASSES["noun"], 5, FC, RELATION)
        shapes |= {f"streams.{stream}.{name}": shape for name, shape in layers.items()}
    if model == "B":
        shapes |= {"projections.Objects.weight": (WIDTH, CHANNELS["Objects"]), "projections.Objects.bias": (WIDTH,)}
    return draw(shapes, seed=3)


def outputs(weights, model, features, rows, beta=(0.0, 0.0, 0.0)):
    """Stream -> the transcription's outputs; ``rows`` are pairs of a split and its clips, in the batch's order."""
    found = {}
    for stream, names in STREAMS[model].items():
        parts = []
        for name in names:
            x = np.concatenate([features[split][name][clips][:, FRAMES] for split, clips in rows])
            x = torch.from_numpy(x).double()
            parts.append(linear(weights, "projections.Objects", x) if name == "Objects" else x)
        own = {
            n.removeprefix(f"streams.{stream}."): w for n, w in weights.items() if n.startswith(f"streams.{stream}.")
        }
        found[stream] = transcribed_forward(own, torch.cat(parts, dim=2), beta)
    return found


def transcribed_run(weights, model, features, lambda_d):
    """Losses, terms and gradient norms of every step; ``weights`` are trained."""
    source, target = features["source_val"], features["target_val"]
    losses, terms, norms, velocity, rate = [], [], [], {}, RATE
    for epoch in range(1, EPOCHS + 1):
        if epoch in (2, 4):  # as the public code has it, before the epoch of that number
            rate /= 10
        pairs = list(paired_batches(CLIPS["source_val"], CLIPS["target_val"], 6, 5, seed=1, epoch=epoch - 1))
        for i, (s, t) in enumerate(pairs):
            p = (i + epoch * len(pairs)) / (EPOCHS * len(pairs))
            beta = [b * (2 / (1 + math.exp(-p)) - 1) for b in (0.75, 0.75, 0.5)]
            labels = [torch.from_numpy(source[kind][s]) for kind in CLASSES]
            found = outputs(weights, model, features, [("source_val", s), ("target_val", t)], beta)
            parts = [transcribed_losses(out, *labels, len(s)) for out in found.values()]
            sums = {name: sum(part[name] for part in parts) for name in parts[0]}
            loss = sums["classification"] + 0.003 * sums["attentive_entropy"]
            loss = loss + lambda_d * sum(sums[f"adversarial_{place}"] for place in PLACES)
            losses.append(loss.item())
            terms.append({name: value.item() for name, value in sums.items()})
            slopes = gradients(loss, weights)
            norms.append(transcribed_sgd_step(weights, slopes, velocity, lr=rate, clip=CLIP))
    assert set(target) >= set(CHANNELS)
    return losses, terms, norms


@pytest.mark.parametrize(("model", "lambda_d"), [("baseline", 1.0), ("B", 3.0)])
def test_a_run_is_the_transcription(data, tmp_path, monkeypatch, model, lambda_d):
    folder, features = data
    weights = hand_weights(model)
    start = {name: value.detach().float() for name, value in weights.items()}
    real = train.build_model

    def build(*arguments):
        made = real(*arguments)
        made.load_state_dict(start, strict=True)
        return made

    monkeypatch.setattr(train, "build_model", build)
    given = {"model": model, "protocol": "val", "method": "ta3n", "data": folder, "run": tmp_path / "run"}
    given |= {
        "device": "cpu",
        "lambda-d": lambda_d,
        "object-dim": WIDTH,
        "fc-dim": FC,
        "relation-dim": RELATION,
        "epochs": EPOCHS,
    }
    given |= {"lr": RATE, "clip-gradient": CLIP, "dropout": 0, "batch-source": 6, "batch-target": 5, "threads": 1}
    words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    run = train.train(train.parse(["--preset", "epic", *words, "--lr-steps", "1", "3"]))

    losses, terms, norms = transcribed_run(weights, model, features, lambda_d)
    assert min(norms) < CLIP < max(norms)  # some steps are clipped, and some are not
    history = json.loads((run / "metrics.json").read_text())["history"]
    assert len(losses) == EPOCHS * 3
    np.testing.assert_allclose(history["loss"], losses, rtol=1e-5)
    for found, wanted in zip(history["terms"], terms, strict=True):
        assert found == pytest.approx(wanted, rel=1e-4)
    trained = torch.load(run / "checkpoint.pt", weights_only=True)["model"]
    assert set(trained) == set(weights)
    for name, wanted in weights.items():
        torch.testing.assert_close(trained[name].double(), wanted.detach(), rtol=1e-4, atol=1e-5)
    assert min((trained[name] - value).abs().max() for name, value in start.items()) > 1e-4  # all of them have moved

    out = list(outputs(weights, model, features, [("target_val", np.arange(CLIPS["target_val"]))]).values())
    for kind in CLASSES:
        fused = out[0][kind] + 0.5 * sum(stream[kind] for stream in out[1:])
        stored = np.load(run / "scores" / "target_val" / f"{kind}.npy", allow_pickle=False)
        np.testing.assert_allclose(stored, fused.detach().numpy(), rtol=1e-4, atol=1e-4)
