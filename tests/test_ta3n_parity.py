"""TA3N against a second, independent transcription of its published definition.

The first half of this file is that transcription: functions over a dict of weight tensors, explicit loops, float64,
nothing taken from the package. The second half gives both sides the same weights and compares what comes out. The
weights are far larger than TA3N's own initialisation (0.001), which would leave the attention constant and most
gradients below any tolerance.
"""

import itertools
import math

import pytest
import torch

from m3em_fast import uda

PLACES = ("relation", "video", "frame")  # the order of beta
TERMS = ("classification", *(f"adversarial_{place}" for place in PLACES), "attentive_entropy")
BETA = (0.75, 0.6, 0.35)  # three different values, so that no two can be swapped unnoticed
SIZES = {"in_features": 9, "num_verbs": 5, "num_nouns": 7, "num_segments": 5, "fc_dim": 8, "relation_dim": 6}
SOURCE, TARGET = 4, 6  # unequal, as in the challenge: a mean per domain differs from a mean over all rows


# ---- the transcription -----------------------------------------------------------------------------------------------


def weight_shapes(in_features, num_verbs, num_nouns, num_segments, fc_dim, relation_dim, adversarial=True):
    layers = {"fc_feature_shared_source": (fc_dim, in_features)}
    for k, scale in enumerate(range(num_segments, 1, -1)):
        layers[f"TRN.fc_fusion_scales.{k}.1"] = (relation_dim, scale * fc_dim)
    layers["fc_classifier_video_verb_source"] = (num_verbs, relation_dim)
    layers["fc_classifier_video_noun_source"] = (num_nouns, relation_dim)
    if adversarial:
        for k in range(num_segments - 1):
            layers[f"relation_domain_classifier_all.{k}.0"] = (relation_dim, relation_dim)
            layers[f"relation_domain_classifier_all.{k}.2"] = (2, relation_dim)
        layers["fc_feature_domain"] = (fc_dim, fc_dim)
        layers["fc_classifier_domain"] = (2, fc_dim)
        layers["fc_feature_domain_video"] = (relation_dim, relation_dim)
        layers["fc_classifier_domain_video"] = (2, relation_dim)
    parts = {"weight": 2, "bias": 1}
    return {f"{name}.{part}": shape[:axes] for name, shape in layers.items() for part, axes in parts.items()}


def linear(w, name, x):
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def reverse(x, beta):
    """The value is x and the slope is -beta; written without an autograd.Function."""
    return (1 + beta) * x.detach() - beta * x


def entropy(logits):
    return -(torch.softmax(logits, -1) * torch.log_softmax(logits, -1)).sum(-1)


def transcribed_forward(w, x, beta=BETA):
    """Dropout left out. Without discriminators among the weights this is the source-only network."""
    num_segments = x.shape[1]
    adversarial = "fc_classifier_domain.weight" in w
    out = dict.fromkeys(("domain_relation", "domain_video", "domain_frame", "attention"))
    frames = torch.relu(linear(w, "fc_feature_shared_source", x))
    if adversarial:
        hidden = torch.relu(linear(w, "fc_feature_domain", reverse(frames, beta[2])))
        out["domain_frame"] = linear(w, "fc_classifier_domain", hidden)
    video, domains, attention = 0, [], []
    for k, scale in enumerate(range(num_segments, 1, -1)):
        subsets = list(itertools.combinations(range(num_segments), scale))
        taken = min(3, len(subsets))
        relation = 0
        for i in range(taken):
            subset = subsets[math.ceil(i * len(subsets) / taken)]
            joined = torch.cat([frames[:, t] for t in subset], dim=1)
            relation = relation + torch.relu(linear(w, f"TRN.fc_fusion_scales.{k}.1", torch.relu(joined)))
        if adversarial:
            hidden = torch.relu(linear(w, f"relation_domain_classifier_all.{k}.0", reverse(relation, beta[0])))
            domains.append(linear(w, f"relation_domain_classifier_all.{k}.2", hidden))
            attention.append(1 - entropy(domains[-1]))
            relation = (attention[-1] + 1)[:, None] * relation
        video = video + relation
    if adversarial:
        out["domain_relation"] = torch.stack(domains, dim=1)
        out["attention"] = torch.stack(attention, dim=1)
        hidden = torch.relu(linear(w, "fc_feature_domain_video", reverse(video, beta[1])))
        out["domain_video"] = linear(w, "fc_classifier_domain_video", hidden)
    out["verb"] = linear(w, "fc_classifier_video_verb_source", video)
    out["noun"] = linear(w, "fc_classifier_video_noun_source", video)
    return out


def mean_cross_entropy(logits, labels):
    return sum(-torch.log_softmax(row, 0)[label] for row, label in zip(logits, labels, strict=True)) / len(labels)


def transcribed_adversarial(logits, num_source):
    rows = [(row, int(i >= num_source)) for i, sample in enumerate(logits) for row in sample.reshape(-1, 2)]
    return mean_cross_entropy(*zip(*rows, strict=True))


def transcribed_attentive_entropy(domain, logits):
    return sum((1 + entropy(d)) * entropy(c) for d, c in zip(domain, logits, strict=True)) / len(logits)


def transcribed_losses(out, verb, noun, num_source):
    heads = (out["verb"], verb), (out["noun"], noun)
    losses = {"classification": 0.5 * sum(mean_cross_entropy(logits[:num_source], y) for logits, y in heads)}
    if out["attention"] is not None:
        for place in PLACES:
            losses[f"adversarial_{place}"] = transcribed_adversarial(out[f"domain_{place}"], num_source)
        attentive = sum(transcribed_attentive_entropy(out["domain_video"], logits) for logits, _ in heads)
        losses["attentive_entropy"] = 0.5 * attentive
    return losses


def total(losses, gamma=0.003):
    return sum(value * (gamma if name == "attentive_entropy" else 1) for name, value in losses.items())


def transcribed_sgd_step(w, grads, velocity, lr=3e-3, momentum=0.9, decay=1e-4, clip=20.0):
    norm = math.sqrt(sum(float((g * g).sum()) for g in grads.values()))
    shrink = min(1.0, clip / (norm + 1e-6))  # the 1e-6 is that of torch's clip_grad_norm_
    for name, g in grads.items():
        step = g * shrink + decay * w[name].detach()
        velocity[name] = momentum * velocity[name] + step if name in velocity else step
        w[name] = (w[name].detach() - lr * (step + momentum * velocity[name])).requires_grad_()
    return norm


# ---- both sides on the same weights and batch ------------------------------------------------------------------------


def draw(shapes, seed):
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in shapes.items():
        # Loud enough that attention spreads over its range, not so loud that the class scores saturate.
        scale = {1: 0.3, 2: (2.5 if "relation" in name else 0.8) / math.sqrt(shape[-1]), 3: 1.0}[len(shape)]
        weights[name] = (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).requires_grad_()
    return weights


def load(weights, p_i=0.0, p_v=0.0, **options):
    model = uda.TA3N(**options, dropout_i=p_i, dropout_v=p_v).double()
    model.load_state_dict({name: value.detach().clone() for name, value in weights.items()}, strict=True)
    return model.train()


def both(num_segments=5, adversarial=True, **dropout):
    """A model, the same weights as a dict, and a batch: features, verbs and nouns."""
    sizes = SIZES | {"num_segments": num_segments, "adversarial": adversarial}
    weights = draw(weight_shapes(**sizes), seed=0)
    return load(weights, **dropout, **sizes), weights, batch(num_segments, seed=1)


def batch(num_segments, seed):
    x = draw({"x": (SOURCE + TARGET, num_segments, SIZES["in_features"])}, seed)["x"]
    generator = torch.Generator().manual_seed(seed)
    return x, *(torch.randint(SIZES[f"num_{kind}s"], (SOURCE,), generator=generator) for kind in ("verb", "noun"))


def gradients(value, tensors):
    """By name; a tensor that the value does not depend on has gradient zero."""
    found = torch.autograd.grad(value, list(tensors.values()), retain_graph=True, allow_unused=True)
    return {n: torch.zeros_like(t) if g is None else g for (n, t), g in zip(tensors.items(), found, strict=True)}


def assert_same(actual, expected, what=""):
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12, msg=lambda m: f"{what}: {m}")


def assert_same_outputs(out, expected):
    assert set(out._fields) == set(expected)
    for name, value in expected.items():
        assert (getattr(out, name) is None) == (value is None), name
        if value is not None:
            assert_same(getattr(out, name), value, name)


segments = pytest.mark.parametrize("num_segments", [5, 4, 3])
methods = pytest.mark.parametrize("adversarial", [True, False], ids=["ta3n", "source_only"])


@segments
@methods
def test_outputs_and_attention_match_the_transcription(num_segments, adversarial):
    model, weights, (x, _, _) = both(num_segments, adversarial)
    expected = transcribed_forward(weights, x)
    assert_same_outputs(model(x, beta=BETA), expected)
    if adversarial:
        assert expected["attention"].std() > 0.1  # else the comparison would say little about attention


def both_losses(model, weights, data, **beta):
    x, verb, noun = data
    found = uda.stream_losses(model(x, **beta), verb, noun, SOURCE)
    wanted = transcribed_losses(transcribed_forward(weights, x, **beta), verb, noun, SOURCE)
    return found | {"total": total(found)}, wanted | {"total": total(wanted)}


def assert_same_gradients(model, weights, x, found, wanted):
    found, wanted = gradients(found, dict(model.named_parameters()) | {"x": x}), gradients(wanted, weights | {"x": x})
    assert set(found) == set(wanted)
    for name in wanted:
        assert_same(found[name], wanted[name], name)
    return wanted


@pytest.mark.parametrize("adversarial, term", [(True, t) for t in (*TERMS, "total")] + [(False, "classification")])
def test_value_and_every_gradient_of_a_loss_term_match_the_transcription(adversarial, term):
    model, weights, data = both(adversarial=adversarial)
    found, wanted = both_losses(model, weights, data, beta=BETA)
    assert set(found) == set(wanted) == {"total", *(TERMS if adversarial else TERMS[:1])}
    assert found[term].shape == ()
    assert_same(found[term], wanted[term])
    slopes = assert_same_gradients(model, weights, data[0], found[term], wanted[term])
    if term == "total":  # a weight whose gradient vanished on this batch would be compared in vain
        assert min(value.abs().max() for value in slopes.values()) > 1e-3


def test_default_beta_is_the_challenge_setting():
    model, weights, data = both()
    found, _ = both_losses(model, weights, data)
    _, wanted = both_losses(model, weights, data, beta=(0.75, 0.75, 0.5))
    assert_same_gradients(model, weights, data[0], found["total"], wanted["total"])


def test_loss_functions_alone_match_the_transcription():
    generator = torch.Generator().manual_seed(2)
    shapes = (7, 4), (7, 9), (7, 2), (7, 3, 2)
    verbs, nouns, domains, places = (2 * torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    verb, noun = torch.arange(7) % 4, torch.arange(7) % 9
    expected = 0.5 * (mean_cross_entropy(verbs, verb) + mean_cross_entropy(nouns, noun))
    assert_same(uda.classification_loss(verbs, nouns, verb, noun), expected)
    for num_source in (2, 5):
        for logits in (domains, places):
            assert_same(uda.adversarial_loss(logits, num_source), transcribed_adversarial(logits, num_source))
    assert_same(uda.attentive_entropy(domains, nouns), transcribed_attentive_entropy(domains, nouns))
    undecided = uda.attentive_entropy(torch.zeros(3, 2).double(), torch.zeros(3, 11).double())
    assert undecided.item() == pytest.approx((1 + math.log(2)) * math.log(11), rel=1e-12)  # in nats


@pytest.mark.parametrize("beta", [0.0, 0.375, 1.0, torch.tensor(0.375, dtype=torch.float64)])
def test_reversal_is_the_identity_forward_and_minus_beta_backward(beta):
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    y, upstream = uda.grad_reverse(x, beta), torch.randn(4, 3, dtype=torch.float64)
    assert torch.equal(y, x)
    assert_same(torch.autograd.grad(y, x, upstream)[0], -float(beta) * upstream)


@pytest.mark.parametrize("place", range(3), ids=PLACES)
def test_each_place_has_its_own_beta(place):
    model, _, (x, verb, noun) = both()
    head = ("relation_domain_classifier_all.0.2", "fc_classifier_domain_video", "fc_classifier_domain")[place]
    head = model.get_parameter(f"{head}.weight")

    def slopes(beta):
        losses = uda.stream_losses(model(x, beta=tuple(beta)), verb, noun, SOURCE)
        return torch.autograd.grad(losses[f"adversarial_{PLACES[place]}"], (x, head), retain_graph=True)

    own = torch.eye(3).double()[place]
    alone, doubled, blocked = (slopes(beta.tolist()) for beta in (own, 2 * own, 1 - own))
    assert min(slope.abs().max() for slope in alone) > 1e-3
    assert_same(doubled[0], 2 * alone[0])
    assert blocked[0].abs().max() == 0
    assert_same((doubled[1], blocked[1]), (alone[1], alone[1]))  # beta does not scale what the discriminator learns


def test_classification_trains_the_relation_discriminators_through_attention():
    model, weights, data = both()
    found, wanted = both_losses(model, weights, data, beta=BETA)
    slopes = assert_same_gradients(model, weights, data[0], found["classification"], wanted["classification"])
    for k, layer in itertools.product(range(4), (0, 2)):  # zero, were the attention detached
        assert slopes[f"relation_domain_classifier_all.{k}.{layer}.weight"].abs().max() > 1e-3


DOCUMENTED_SUBSETS = {5: (0,), 4: (0, 2, 4), 3: (0, 4, 7), 2: (0, 4, 7)}  # positions in lexicographic order


@pytest.mark.parametrize("scale", DOCUMENTED_SUBSETS)
def test_a_relation_sums_the_documented_frame_subsets(scale):
    # Frame t is the unit vector e_t, and unit u of the relation fires, with value 1, for the u-th subset and no other.
    subsets = list(itertools.combinations(range(5), scale))
    units = len(subsets)
    sizes = SIZES | {"in_features": 5, "fc_dim": 5, "relation_dim": units, "num_verbs": units}
    weights = {n: torch.zeros(s).double() for n, s in weight_shapes(**sizes, adversarial=False).items()}
    weights["fc_feature_shared_source.weight"] += torch.eye(5)
    weights["fc_classifier_video_verb_source.weight"] += torch.eye(units)
    detector = f"TRN.fc_fusion_scales.{5 - scale}.1"
    weights[f"{detector}.bias"] -= scale - 1
    for unit, subset in enumerate(subsets):
        weights[f"{detector}.weight"][unit, [5 * position + t for position, t in enumerate(subset)]] = 1
    seen = load(weights, **sizes, adversarial=False)(torch.eye(5).double()[None]).verb[0]
    assert seen.tolist() == [float(u in DOCUMENTED_SUBSETS[scale]) for u in range(units)]


UNITS = 10
UNDECIDED = 2 - math.log(2)  # w + 1 where a relation discriminator with zero weights cannot tell


def constant_features(p_i, p_v):
    """Outputs where units are constant before dropout, and the first logit of each head spells the mask in binary."""
    sizes = SIZES | {"fc_dim": UNITS, "relation_dim": UNITS}
    weights = {n: torch.zeros(s).double() for n, s in weight_shapes(**sizes).items()}
    weights["fc_feature_shared_source.bias"] += 1
    weights["fc_feature_domain.weight"] += torch.eye(UNITS)
    weights["fc_feature_domain_video.weight"] += torch.eye(UNITS)
    # The first relation, which looks at all frames, repeats the middle one; the second is 1 for each of its 3 subsets.
    weights["TRN.fc_fusion_scales.0.1.weight"][:, 2 * UNITS : 3 * UNITS] += torch.eye(UNITS)
    weights["TRN.fc_fusion_scales.1.1.bias"] += 1
    for head in ("domain", "domain_video", "video_verb_source", "video_noun_source"):
        weights[f"fc_classifier_{head}.weight"][0] += 2.0 ** torch.arange(UNITS)
    return load(weights, p_i, p_v, **sizes)(torch.zeros(400, 5, SIZES["in_features"]).double())


def assert_random_mask(spelled, p):
    """The numbers, times 1 - p, are whole and their bits are independent with P(kept) = 1 - p."""
    number = (spelled * (1 - p)).round()
    assert_same(spelled * (1 - p), number)
    bits = number.reshape(-1, 1).long().bitwise_right_shift(torch.arange(UNITS)) % 2
    assert bits.sum(0).min() > 0 and bits.sum(0).max() < len(bits)
    assert abs(bits.double().mean() - (1 - p)) < 5 * math.sqrt(p * (1 - p) / bits.numel())  # five sigma
    assert bits.unique(dim=0).shape[0] > 50  # a mask per row and unit, not per row or per unit alone


def test_dropout_i_masks_the_shared_frame_feature_once_for_all_that_read_it():
    torch.manual_seed(3)
    out = constant_features(0.3, 0.0)
    frames = out.domain_frame[..., 0]
    assert_random_mask(frames, 0.3)
    assert (frames[:, 0] != frames[:, 1]).any()  # a mask per frame
    for logits in (out.verb, out.noun, out.domain_video):
        assert_same(logits[:, 0], UNDECIDED * (frames[:, 2] + 3 * (2**UNITS - 1)))


def test_dropout_v_masks_the_video_feature_before_both_heads_and_its_discriminator():
    torch.manual_seed(4)
    out = constant_features(0.0, 0.6)
    assert_random_mask(out.verb[:, 0] / (4 * UNDECIDED), 0.6)  # fails if relations were dropped one by one
    for logits in (out.noun, out.domain_video):
        assert_same(logits[:, 0], out.verb[:, 0])


def test_dropout_v_leaves_relations_attention_and_frames_alone():
    model, weights, (x, _, _) = both(p_v=0.5)
    out, expected = model(x, beta=BETA), transcribed_forward(weights, x)
    for name in ("domain_relation", "attention", "domain_frame"):
        assert_same(getattr(out, name), expected[name], name)


@methods
def test_dropout_is_idle_in_eval_mode(adversarial):
    model, weights, (x, _, _) = both(adversarial=adversarial, p_i=0.5, p_v=0.5)
    assert_same_outputs(model.eval()(x, beta=BETA), transcribed_forward(weights, x))
    assert not torch.allclose(model.train()(x, beta=BETA).verb, transcribed_forward(weights, x)["verb"])


@pytest.mark.parametrize("loudness, clipped", [(1, False), (50, True)], ids=["free", "clipped"])
def test_sgd_steps_match_the_transcription(loudness, clipped):
    model, weights, _ = both()
    optimizer = torch.optim.SGD(model.parameters(), lr=3e-3, momentum=0.9, weight_decay=1e-4, nesterov=True)
    velocity = {}
    for step in range(2):  # momentum shows in the second one
        found, wanted = both_losses(model, weights, batch(5, seed=step), beta=BETA)
        optimizer.zero_grad()
        (loudness * found["total"]).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 20)
        optimizer.step()
        expected = transcribed_sgd_step(weights, gradients(loudness * wanted["total"], weights), velocity)
        assert norm.item() == pytest.approx(expected, rel=1e-10)
        assert (expected > 20) == clipped
        for name, value in model.named_parameters():
            assert_same(value.detach(), weights[name].detach(), f"step {step}, {name}")


def test_warm_up_runs_between_the_documented_values():
    def coefficient(epoch, i, length=126, epochs=30):  # epochs count from 1, so the last batch lies just beyond 1
        return uda.warmup_coefficient((i + epoch * length) / (epochs * length))

    assert uda.warmup_coefficient(0.0) == 0
    assert coefficient(1, 0) == pytest.approx(0.0167, abs=5e-5)
    assert coefficient(30, 125) == pytest.approx(0.475, abs=5e-4)
    assert uda.warmup_coefficient(0.7) == pytest.approx(math.tanh(0.35), rel=1e-12)  # an equal form of it


@segments
@methods
def test_state_dict_has_exactly_the_live_weights(num_segments, adversarial):
    model, _, _ = both(num_segments, adversarial)
    shapes = weight_shapes(**SIZES | {"num_segments": num_segments}, adversarial=adversarial)
    assert {name: tuple(value.shape) for name, value in model.state_dict().items()} == shapes
    assert set(dict(model.named_parameters())) == set(shapes)  # all of them trainable, no buffers


def test_challenge_network_has_the_documented_number_of_parameters():
    model = uda.TA3N(in_features=3072, num_verbs=97, num_nouns=300)
    assert sum(p.numel() for p in model.parameters()) == 4_106_649
