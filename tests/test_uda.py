"""Streams, fusion, the summed loss and the scores around TA3N (TA3N itself: test_ta3n_parity.py)."""

import itertools

import numpy as np
import pytest
import torch

from m3em_fast.uda import METHODS, ActionModel, action_scores, fuse, grad_reverse, stream_losses, total_loss
from m3em_fast.uda.evaluation import accuracies, majority_floor

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


def test_float16_features_train_as_they_are():
    model = make_model()
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
    assert set(terms) == set(sums)
    for name, value in terms.items():
        torch.testing.assert_close(value, sums[name].detach())
        assert not value.requires_grad


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
