"""Streams, fusion, the summed loss and the scores around TA3N (TA3N itself: test_ta3n_parity.py)."""

import itertools

import numpy as np
import pytest
import torch

from m3em_fast.data.store import FeatureStore, FeatureStoreWriter, Modality
from m3em_fast.uda import METHODS, TA3N, ActionModel, action_scores, fuse, grad_reverse, stream_losses, total_loss
from m3em_fast.uda.evaluation import METRICS, accuracies, evaluate, majority_floor, predict

SPATIAL = {"RGB": 8, "Flow": 6}
VECTOR = {"Audio": 5, "Objects": 4}


def make_model(method="m3em", spatial=SPATIAL, vector=VECTOR, **options):
    torch.manual_seed(0)
    sizes = {"latent_channels": 4, "reduction": 2, "fc_dim": 10, "relation_dim": 7, "init": "torch"}
    return ActionModel(spatial, vector, 4, 6, method=method, **{**sizes, **options})


def make_features(clips=6, frames=5, dtype=torch.float32):
    torch.manual_seed(1)
    maps = {name: torch.rand(clips, frames, c, 5, 5).to(dtype) for name, c in SPATIAL.items()}
    return {**maps, **{name: torch.rand(clips, frames, c).to(dtype) for name, c in VECTOR.items()}}


@pytest.mark.parametrize("method", METHODS)
def test_streams_of_every_method(method):
    model = make_model(method).eval()
    out = model(make_features())
    factor = 2 if METHODS[method]["smr"] else 1
    assert list(out.streams) == ["visual", "Audio", "Objects"]
    widths = {name: stream.in_features for name, stream in model.streams.items()}
    assert widths == {"visual": factor * 14, "Audio": factor * 5, "Objects": factor * 4}
    for kind, classes in (("verb", 4), ("noun", 6)):
        parts = [getattr(out.streams[name], kind) for name in out.streams]
        expected = parts[0] + 0.5 * parts[1] + 0.5 * parts[2]
        assert getattr(out, kind).shape == (6, classes)
        torch.testing.assert_close(getattr(out, kind), expected)
    assert (out.consensus is not None) == METHODS[method]["cmc"]
    if out.consensus is not None:
        assert out.consensus.shape == (6, 5, 5, 5)
    assert (out.streams["visual"].domain_video is not None) == METHODS[method]["adversarial"]


def test_a_stream_reads_its_modalities_in_order_and_every_beta():
    model = make_model(dropout_i=0.0, dropout_v=0.0)
    assert model.modalities == ("RGB", "Flow", "Audio", "Objects")
    features, beta = make_features(), (0.9, 0.5, 0.1)
    out = model(features, beta)
    vectors = model.enhancement({name: x.flatten(0, 1) for name, x in features.items()}).vectors
    joined = {"visual": torch.cat([vectors["RGB"], vectors["Flow"]], 1), **{name: vectors[name] for name in VECTOR}}
    places = ("domain_relation", "domain_video", "domain_frame")
    for name, x in joined.items():
        stream = model.streams[name]
        alone = stream(x.reshape(6, 5, -1), beta)
        for place in places:
            got, want = getattr(out.streams[name], place), getattr(alone, place)
            torch.testing.assert_close(got, want)
            # The gradient in the layer under all discriminators, which is where beta tells one place from another.
            under = stream.fc_feature_shared_source.weight
            grads = [torch.autograd.grad(logits[..., 0].sum(), under, retain_graph=True)[0] for logits in (got, want)]
            torch.testing.assert_close(*grads)
            assert grads[0].abs().max() > 1e-4


def test_options_reach_m3em_and_the_streams():
    model = make_model(num_scales=2, center=True, gate_bias=True, num_segments=3, dropout_i=0.25, dropout_v=0.75)
    assert (model.enhancement.cmc.num_scales, model.enhancement.cmc.center) == (2, True)
    assert model.enhancement.smr.self_gates["RGB"][0].bias is not None
    assert model.num_segments == 3 and model(make_features(frames=3)).verb.shape == (6, 4)
    for stream in model.streams.values():
        assert (stream.dropout_i.p, stream.dropout_v.p) == (0.25, 0.75)
    for init, small in (("ta3n", True), ("torch", False)):
        model = make_model(init=init)
        for part in (model.enhancement, model.streams["visual"].fc_feature_shared_source, model.streams["Audio"]):
            assert (next(part.parameters()).abs().max() < 0.01) == small


def test_init_touches_the_layers_that_the_public_code_initialises_and_no_others():
    touched = {
        "fc_feature_shared_source",
        "fc_feature_domain",
        "fc_classifier_domain",
        "fc_feature_domain_video",
        "fc_classifier_domain_video",
        "fc_classifier_video_verb_source",
        "fc_classifier_video_noun_source",
    }
    for init in ("ta3n", "torch"):
        torch.manual_seed(0)
        model = TA3N(80, 30, 40, fc_dim=70, relation_dim=60, init=init)
        layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear)}
        others = set(layers) - touched
        assert touched <= set(layers) and len(others) == 4 + 2 * 4  # TRN's fusion, the relation discriminators
        for name, layer in layers.items():
            if init == "ta3n" and name in touched:
                # 120 weights at least, of which the deviation is known to 7 %.
                assert 0.0007 < layer.weight.std() < 0.0013 and layer.weight.mean().abs() < 0.0004, name
                assert not layer.bias.any(), name
            else:
                bound = layer.in_features**-0.5  # torch draws from (-bound, bound)
                for drawn in (layer.weight, layer.bias):
                    assert 0 < drawn.abs().max() <= bound, (init, name)
                assert layer.weight.std() > 0.4 * bound, (init, name)
    with pytest.raises(ValueError, match="init must be 'torch' or 'ta3n', got 'zeros'"):
        TA3N(8, 3, 4, init="zeros")


def test_parameters_that_a_method_does_not_use_do_not_exist():
    names = {method: set(make_model(method).state_dict()) for method in METHODS}
    assert not any("domain" in name or name.startswith("enhancement") for name in names["source_only"])
    assert names["source_only"] < names["ta3n"] < names["ta3n_smr"] < names["m3em"]
    assert not any(".smr." in name for name in names["ta3n_cmc"])
    assert not any(".cmc." in name for name in names["ta3n_smr"])
    for method in METHODS:
        model = make_model(method)
        out = model(make_features())
        loss, _ = total_loss(out.streams, torch.zeros(3, dtype=torch.long), torch.ones(3, dtype=torch.long))
        loss.backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters()), method


def test_frames_of_a_clip_stay_together():
    model = make_model().eval()
    features = make_features()
    whole = model(features)
    alone = model({name: x[4:5] for name, x in features.items()})
    torch.testing.assert_close(alone.verb, whole.verb[4:5], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(alone.consensus, whole.consensus[4:5], rtol=1e-4, atol=1e-5)
    swapped = model({name: x.flip(1) for name, x in features.items()})
    torch.testing.assert_close(swapped.consensus, whole.consensus.flip(1), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(swapped.verb, whole.verb, atol=1e-4)  # a relation network knows the order of frames


@pytest.mark.parametrize("method", METHODS)
def test_float16_features_train_as_they_are(method):
    model = make_model(method)
    out = model(make_features(dtype=torch.float16))
    assert out.verb.dtype == torch.float32
    loss, _ = total_loss(out.streams, torch.zeros(3, dtype=torch.long), torch.ones(3, dtype=torch.long))
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_vectors_alone_and_maps_alone():
    assert list(make_model("ta3n_smr", spatial={}).streams) == ["Audio", "Objects"]
    assert list(make_model("m3em", vector={}).streams) == ["visual"]
    with pytest.raises(ValueError, match="at least two spatial modalities"):
        make_model("m3em", spatial={"RGB": 8})
    with pytest.raises(ValueError, match="at least one modality"):
        make_model("ta3n", spatial={}, vector={})
    with pytest.raises(ValueError, match=r"method must be one of source_only.*got 'dann'"):
        make_model("dann")


def test_total_loss_weighs_each_kind_of_term_over_all_streams():
    out = make_model()(make_features())
    verb, noun = torch.tensor([0, 1, 2, 3]), torch.tensor([5, 4, 3, 2])
    loss, terms = total_loss(out.streams, verb, noun, lambda_y=2.0, lambda_d=3.0, gamma=0.5)
    parts = [stream_losses(stream, verb, noun, 4) for stream in out.streams.values()]
    sums = {name: sum(part[name] for part in parts) for name in parts[0]}
    expected = 2.0 * sums["classification"] + 0.5 * sums["attentive_entropy"]
    expected = expected + 3.0 * sum(sums[f"adversarial_{place}"] for place in ("relation", "video", "frame"))
    torch.testing.assert_close(loss, expected)
    assert sums["attentive_entropy"] > 1  # else the default weight below, 0.003, would leave no trace
    torch.testing.assert_close(
        total_loss(out.streams, verb, noun)[0],
        sum(value for name, value in sums.items() if name != "attentive_entropy") + 0.003 * sums["attentive_entropy"],
        rtol=1e-6,
        atol=0,
    )
    assert set(terms) == set(sums)
    for name, value in terms.items():
        torch.testing.assert_close(value, sums[name].detach())
        assert not value.requires_grad


@pytest.mark.parametrize("method", ["source_only", "m3em"])
@pytest.mark.parametrize("cuts", [(0, 2, 3, 3, 6), (0, 0, 3, 5, 6), (0, 1, 3, 6, 6)])
def test_the_losses_of_shares_add_up_to_those_of_the_whole(method, cuts):
    """Three source clips, of which shares may be uneven or empty, then three target clips, and all gradients."""
    model, features = make_model(method, dropout_i=0.0, dropout_v=0.0), make_features()
    verb, noun = torch.tensor([0, 1, 2]), torch.tensor([5, 4, 3])
    weights = list(model.parameters())

    def losses(source, target, of):
        rows = [*source, *target]
        out = model({name: x[rows] for name, x in features.items()})
        loss, terms = total_loss(out.streams, verb[source], noun[source], gamma=0.5, lambda_y=2.0, of=of)
        return loss, terms, torch.autograd.grad(loss, weights)

    loss, terms, gradients = losses([0, 1, 2], [3, 4, 5], None)
    shares = [
        losses(list(range(*cuts[:2])), [], (3, 3)),
        losses(list(range(*cuts[1:3])), [3, 4, 5][: cuts[3] - 3], (3, 3)),
    ]
    shares.append(losses([], list(range(*cuts[3:])), (3, 3)))
    shares.append(losses([], [], (3, 3)))
    torch.testing.assert_close(sum(share[0] for share in shares), loss)
    for name, value in terms.items():
        torch.testing.assert_close(sum(share[1][name] for share in shares), value)
    for number, gradient in enumerate(gradients):
        scale = gradient.abs().max().item()
        torch.testing.assert_close(sum(share[2][number] for share in shares), gradient, rtol=0, atol=1e-5 * scale)
    assert all(not x.any() for x in shares[-1][2]) and shares[-1][0] == 0


def test_beta_scales_what_reaches_the_features_and_nothing_else():
    features = {name: x.requires_grad_() for name, x in make_features().items()}
    model = make_model(dropout_i=0.0, dropout_v=0.0)
    domain = torch.tensor([0, 0, 0, 1, 1, 1])

    def gradients(beta):
        out = model(features, beta)
        loss = torch.nn.functional.cross_entropy(out.streams["visual"].domain_video, domain)
        ta3n = model.streams["visual"]
        wanted = [ta3n.fc_feature_domain_video.weight, ta3n.fc_feature_shared_source.weight]
        return torch.autograd.grad(loss, wanted)

    one, two = gradients((0.0, 1.0, 0.0)), gradients((0.0, 2.0, 0.0))
    torch.testing.assert_close(one[0], two[0])
    torch.testing.assert_close(2 * one[1], two[1])
    assert one[1].abs().max() > 0


def test_grad_reverse_takes_a_tensor_and_has_a_second_derivative():
    x = torch.randn(3, dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad((grad_reverse(x, torch.tensor(0.5)) ** 3).sum(), x, create_graph=True)
    torch.testing.assert_close(first, -0.5 * 3 * x**2)
    (second,) = torch.autograd.grad(first.sum(), x)
    # The gradient of the reversed gradient passes the reversal once more on its way to x.
    torch.testing.assert_close(second, 0.25 * 6 * x)


def test_fuse_weighs_the_visual_stream_one_and_every_other_half():
    parts = {"visual": torch.tensor([[1.0, 2.0]]), "Audio": torch.tensor([[4.0, 8.0]])}
    torch.testing.assert_close(fuse(parts), torch.tensor([[3.0, 6.0]]))


def test_actions_are_ranked_by_the_product_of_the_softmax_scores():
    torch.manual_seed(0)
    verb, noun = 3 * torch.randn(4, 5), 3 * torch.randn(4, 7)
    scores = action_scores(verb + 200.0, noun)  # a shift of a row's logits changes nothing
    p, q = verb.double().softmax(1), noun.double().softmax(1)
    torch.testing.assert_close(scores.exp(), (p[:, :, None] * q[:, None, :]).reshape(4, 35), rtol=1e-4, atol=0)
    for row in range(4):
        pairs = sorted(itertools.product(range(5), range(7)), key=lambda vn: -(p[row, vn[0]] * q[row, vn[1]]).item())
        ranked = scores[row].argsort(descending=True).tolist()
        assert [(i // 7, i % 7) for i in ranked] == pairs


def test_accuracies_count_an_action_only_where_verb_and_noun_are_right():
    verb = torch.tensor([[5.0, 0, 0], [0, 5.0, 0], [0, 0, 5.0], [5.0, 4.9, 0]])
    noun = torch.tensor([[9.0, 0, 1, 2, 3, 4]] * 4)
    labels = torch.tensor([0, 1, 0, 1]), torch.tensor([0, 1, 0, 0])
    got = accuracies(verb, noun, *labels)
    assert got["verb_top1"] == 50.0 and got["verb_top5"] == 100.0
    assert got["noun_top1"] == 75.0
    assert got["action_top1"] == 25.0  # clip 0; clip 1 has the wrong noun, clip 3 the second-best verb
    assert got["action_top5"] == 75.0  # not clip 1: its noun is the worst of six


def test_majority_floor():
    verb, noun = np.array([0, 0, 0, 1, 2, 3, 4, 5]), np.array([1, 1, 2, 1, 1, 1, 1, 1])
    floor = majority_floor(verb, noun)
    assert floor["verb_top1"] == 37.5 and floor["verb_top5"] == 87.5
    assert floor["noun_top1"] == 87.5 and floor["noun_top5"] == 100.0
    assert floor["action_top1"] == 25.0 and floor["action_top5"] == 75.0
    # (0, 2) and (1, 0) are two actions, although 2 is the largest noun.
    assert majority_floor(np.array([0, 1]), np.array([2, 0]))["action_top1"] == 50.0


def clips(path, count=11):
    """A feature store; every clip has its features and labels of its own."""
    features = {name: x.half().numpy() for name, x in make_features(count).items()}
    labels = {"verb": np.arange(count) % 4, "noun": np.arange(count) % 6}
    kinds = {name: "map" if x.ndim == 5 else "vector" for name, x in features.items()}
    with FeatureStoreWriter(
        path, {n: Modality(kinds[n], *x.shape[1:]) for n, x in features.items()}, {"verb": 4, "noun": 6}
    ) as writer:
        writer.append([f"clip_{i}" for i in range(count)], features, labels)
    return FeatureStore(path)


@pytest.mark.parametrize("training", [True, False])
def test_prediction_is_the_model_in_eval_mode_clip_by_clip_whatever_the_batch(tmp_path, training):
    model, store = make_model(), clips(tmp_path / "clips")
    wanted = model.eval()(store.read(range(11)))
    model.train(training)
    context = {"device": torch.device("cpu"), "autocast": torch.autocast("cpu", enabled=False)}
    for batch in (1, 4, 11, 512):
        verb, noun = predict(model, store, batch=batch, **context)
        assert not verb.requires_grad and model.training == training
        torch.testing.assert_close(verb, wanted.verb.detach(), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(noun, wanted.noun.detach(), rtol=1e-4, atol=1e-6)
    got = evaluate(model, store, batch=4, **context)
    labels = [torch.from_numpy(store.labels[kind]) for kind in ("verb", "noun")]
    assert got == accuracies(wanted.verb, wanted.noun, *labels) and set(got) == set(METRICS)
    store.labels = None
    with pytest.raises(ValueError, match="store of 11 clips has no labels"):
        evaluate(model, store, batch=4, **context)


def test_prediction_takes_the_precision_it_is_given_and_returns_float32(tmp_path):
    model, store = make_model(), clips(tmp_path / "clips")
    cpu = torch.device("cpu")
    full, _ = predict(model, store, batch=8, device=cpu, autocast=torch.autocast("cpu", enabled=False))
    half, _ = predict(model, store, batch=8, device=cpu, autocast=torch.autocast("cpu", dtype=torch.bfloat16))
    assert half.dtype == full.dtype == torch.float32
    assert not torch.equal(half, full)
    torch.testing.assert_close(half, full, rtol=0.05, atol=0.05)
    # Scores of float32 are no rounded ones.
    assert not torch.equal(full, full.half().float())
