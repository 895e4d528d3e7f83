"""The modules against the report's equations written out in plain torch, and against what torch does to modules."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F

from m3em_fast import nn as mnn
from m3em_fast.nn import CrossModalityConsensus, MutualEnhancement, SemanticMutualRefinement
from m3em_fast.ops import consensus_pool

SPATIAL = {"RGB": 12, "Flow": 8}
VECTOR = {"Audio": 10}


def make_features(n=3, height=7, width=7, dtype=torch.float64, spatial=SPATIAL, vector=VECTOR):
    generator = torch.Generator().manual_seed(n)
    maps = {k: torch.randn(n, c, height, width, generator=generator, dtype=torch.float64) for k, c in spatial.items()}
    vectors = {k: torch.randn(n, c, generator=generator, dtype=torch.float64) for k, c in vector.items()}
    return {k: x.to(dtype) for k, x in {**maps, **vectors}.items()}


def make_module(seed=0, spatial=SPATIAL, vector=VECTOR, dtype=torch.float64, **options):
    torch.manual_seed(seed)
    options = {"latent_channels": 6, "reduction": 2, **options}
    return MutualEnhancement(spatial, vector, **options).to(dtype)


def written_out(module, features):
    """Equations 1 to 5 and the residual pooling, with the refined maps made in full; features as they are without SMR.

    The modalities come in the order of ``features``, which is the one that the module was made with.
    """
    weights = module.state_dict()
    pooled = {k: x.mean((2, 3)) if x.dim() == 4 else x for k, x in features.items()}

    def linear(name, x):
        return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0)

    def gate(kind, name, x):
        return torch.sigmoid(linear(f"smr.{kind}.{name}.2", torch.relu(linear(f"smr.{kind}.{name}.0", x))))

    refined = dict(features)
    for name, x in features.items() if module.smr is not None else ():
        others = torch.cat([pooled[k] for k in features if k != name], 1)
        both = (gate("self_gates", name, pooled[name]), gate("cross_gates", name, others))
        shape = (..., None, None) if x.dim() == 4 else (...,)
        refined[name] = torch.cat([x * t[shape] for t in both], 1)
    spatial = [k for k, x in features.items() if x.dim() == 4]
    latent = {k: linear(f"cmc.projections.{k}", refined[k].movedim(1, -1)).movedim(-1, 1) for k in spatial}
    height, width = features[spatial[0]].shape[2:]
    consensus = 0
    for a, b in itertools.combinations(spatial, 2):
        for k in range(min(3, max(height, width).bit_length())):
            size = (max(1, height >> k), max(1, width >> k))
            cosine = F.cosine_similarity(*(F.adaptive_avg_pool2d(latent[m], size) for m in (a, b)))
            consensus = consensus + F.interpolate(cosine[:, None], (height, width), mode="bilinear")
    vectors = {k: ((1 + consensus) * x).mean((2, 3)) if x.dim() == 4 else x for k, x in refined.items()}
    return vectors, consensus


@pytest.mark.parametrize("size", [(7, 7), (14, 6), (1, 1)], ids=str)
@pytest.mark.parametrize(
    ("spatial", "options"),
    [
        (SPATIAL, {}),
        ({**SPATIAL, "Depth": 4}, {}),
        ({"RGB": 8, "Flow": 8}, {}),  # of one width, where the layers of one modality would fit the other
        (SPATIAL, {"gate_bias": True, "projection_bias": True}),
        (SPATIAL, {"smr": False, "projection_bias": True}),
    ],
    ids=["pair", "three", "equal", "biases", "cmc alone"],
)
def test_m3em_is_what_the_equations_say(spatial, options, size):
    module = make_module(spatial=spatial, **options)
    features = make_features(height=size[0], width=size[1], spatial=spatial)
    out = module(features)
    vectors, consensus = written_out(module, features)
    torch.testing.assert_close(out.consensus, consensus, rtol=1e-11, atol=1e-12)
    assert set(out.vectors) == set(vectors)
    for name, expected in vectors.items():
        assert out.vectors[name].shape == (3, module.out_channels[name])
        torch.testing.assert_close(out.vectors[name], expected, rtol=1e-11, atol=1e-12)


def test_gradients_of_every_parameter_and_input_agree_with_the_equations():
    module = make_module()
    features = {k: x.requires_grad_() for k, x in make_features().items()}
    leaves = [*module.parameters(), *features.values()]

    def loss(vectors, consensus):
        return sum(x.square().sum() for x in vectors.values()) + consensus.square().sum()

    expected = None
    # The written-out form reads the state_dict, which is detached; here it must be the parameters themselves.
    named = dict(module.named_parameters())
    module.state_dict = lambda: named
    expected = torch.autograd.grad(loss(*written_out(module, features)), leaves)
    for got, want in zip(torch.autograd.grad(loss(*module(features)), leaves), expected, strict=True):
        assert want.abs().max() > 0
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("options", [{}, {"cmc": False}, {"smr": False}], ids=str)
def test_the_order_in_which_modalities_are_given_changes_nothing(options):
    # Of one width, so that nothing but the result can tell that two modalities were mistaken for each other.
    spatial, vector = {"RGB": 8, "Flow": 8}, {"Audio": 8}
    module = make_module(spatial=spatial, vector=vector, **options)
    features = make_features(spatial=spatial, vector=vector)
    out, turned = module(features), module(dict(reversed(features.items())))
    assert list(turned.vectors) == list(module.out_channels)
    for name, x in out.vectors.items():
        assert torch.equal(turned.vectors[name], x)
    assert out.consensus is None or torch.equal(turned.consensus, out.consensus)


def test_consensus_of_refined_maps_equals_consensus_with_gates():
    module = make_module()
    features = make_features()
    refined = module.smr(features)
    assert refined["RGB"].shape == (3, 24, 7, 7) and refined["Audio"].shape == (3, 20)
    plain = CrossModalityConsensus({"RGB": 24, "Flow": 16}, 6).double()
    plain.load_state_dict(module.cmc.state_dict())
    pooled, consensus = plain({k: refined[k] for k in SPATIAL})
    out = module(features)
    torch.testing.assert_close(consensus, out.consensus, rtol=1e-11, atol=1e-12)
    for name in SPATIAL:
        torch.testing.assert_close(pooled[name], out.vectors[name], rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(refined["Audio"], out.vectors["Audio"], rtol=0, atol=0)


def test_modules_can_be_left_out_and_then_have_no_parameters():
    features = make_features()
    neither = make_module(smr=False, cmc=False)
    assert not list(neither.parameters())
    out = neither(features)
    assert out.consensus is None
    torch.testing.assert_close(out.vectors["RGB"], features["RGB"].mean((2, 3)))
    assert out.vectors["Audio"] is features["Audio"]

    smr = make_module(cmc=False)
    assert all(name.startswith("smr.") for name in smr.state_dict())
    full = make_module()
    full.load_state_dict(smr.state_dict(), strict=False)
    gates = full.smr.gates({k: x.mean((2, 3)) if x.dim() == 4 else x for k, x in features.items()})
    pooled = features["Flow"].mean((2, 3))
    torch.testing.assert_close(smr(features).vectors["Flow"], torch.cat([pooled * g for g in gates["Flow"]], 1))

    cmc = make_module(smr=False)
    assert all(name.startswith("cmc.") for name in cmc.state_dict())
    out = cmc(features)
    torch.testing.assert_close(out.vectors["RGB"], consensus_pool(features["RGB"], out.consensus))
    assert cmc.out_channels == {"RGB": 12, "Flow": 8, "Audio": 10}


def test_parameter_counts_of_the_report():
    smr = SemanticMutualRefinement({"RGB": 1024, "Flow": 1024, "Audio": 1024})
    count = {k: sum(p.numel() for p in m.parameters()) for k, m in smr.self_gates.items()}
    assert set(count.values()) == {131_072}
    assert sum(p.numel() for p in smr.cross_gates["RGB"].parameters()) == 196_608
    assert sum(p.numel() for p in smr.parameters()) == 983_040


def test_options_reach_the_ops():
    features = make_features()
    base = make_module()
    assert not torch.equal(make_module(num_scales=1)(features).consensus, base(features).consensus)
    assert not torch.equal(make_module(center=True)(features).consensus, base(features).consensus)
    biased = make_module(gate_bias=True, projection_bias=True)
    added = set(biased.state_dict()) - set(base.state_dict())
    assert all(name.endswith(".bias") for name in added)
    assert len(added) == 2 * 2 * 3 + 2  # both layers of both gates of three modalities, and two projections
    small = make_module(init="ta3n", gate_bias=True)
    weights = torch.cat([p.flatten() for n, p in small.named_parameters() if n.endswith("weight")])
    assert 0.0008 < weights.std() < 0.0012
    assert all(not p.any() for n, p in small.named_parameters() if n.endswith("bias"))
    mnn.initialize(small, "torch")
    for layer in small.modules():
        if isinstance(layer, torch.nn.Linear):  # torch draws from (-bound, bound)
            bound = layer.in_features**-0.5
            assert 0.7 * bound < layer.weight.abs().max() <= bound
            assert layer.bias is None or (layer.bias.any() and layer.bias.abs().max() <= bound)


def test_one_modality_has_no_other_to_ask():
    smr = SemanticMutualRefinement({"RGB": 8}, reduction=100)
    assert smr.num_gates == 1 and smr.self_gates["RGB"][0].out_features == 1
    x = torch.rand(2, 8, 3, 3)
    assert smr({"RGB": x})["RGB"].shape == (2, 8, 3, 3)


def test_state_dict_deepcopy_and_load():
    module = make_module()
    names = set(module.state_dict())
    assert {"smr.self_gates.RGB.0.weight", "smr.cross_gates.Audio.2.weight", "cmc.projections.Flow.weight"} <= names
    assert len(names) == 2 * 2 * 3 + 2
    features = make_features()
    twin = copy.deepcopy(module)
    other = make_module(seed=1)
    assert not torch.equal(other(features).consensus, module(features).consensus)
    other.load_state_dict(module.state_dict())
    for copied in (twin, other):
        assert torch.equal(copied(features).consensus, module(features).consensus)
    with torch.no_grad():
        next(module.parameters()).add_(1.0)
    assert not torch.equal(twin(features).vectors["RGB"], module(features).vectors["RGB"])


@pytest.mark.parametrize("smr", [True, False], ids=["m3em", "cmc alone"])
@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=str)
def test_half_features_beside_float32_parameters_are_read_as_they_are(half, smr):
    module = make_module(dtype=torch.float32, smr=smr)
    features = make_features(dtype=half)
    out = module(features)
    exact = make_module(smr=smr)({k: x.double() for k, x in features.items()})
    assert out.consensus.dtype == torch.float32
    torch.testing.assert_close(out.consensus.double(), exact.consensus, rtol=0, atol=0.01)
    for name, x in out.vectors.items():
        assert x.dtype == (torch.float32 if smr or name in SPATIAL else half)  # Audio passes through ungated
        torch.testing.assert_close(x.double(), exact.vectors[name], rtol=0.02, atol=0.01)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("inputs", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_autocast(half, inputs):
    module = make_module(dtype=torch.float32)
    features = make_features(dtype=inputs)
    exact = make_module()({k: x.double() for k, x in features.items()})
    with torch.autocast("cpu", dtype=half):
        out = module(features)
    assert out.consensus.dtype == half  # float32 on CUDA
    torch.testing.assert_close(out.consensus.double(), exact.consensus, rtol=0, atol=0.06)
    sum(x.float().sum() for x in out.vectors.values()).backward()
    for p in module.parameters():
        assert p.grad is not None and p.grad.dtype == torch.float32 and p.grad.isfinite().all()


def test_a_clip_does_not_depend_on_the_others():
    module = make_module()
    features = make_features(n=5)
    whole = module(features)
    alone = module({k: x[3:4] for k, x in features.items()})
    torch.testing.assert_close(alone.consensus, whole.consensus[3:4], rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(alone.vectors["Audio"], whole.vectors["Audio"][3:4], rtol=1e-12, atol=1e-13)


def test_an_exported_program_is_written_and_read_again(tmp_path):
    module, features = make_module(dtype=torch.float32).eval(), make_features(dtype=torch.float32)
    torch.export.save(torch.export.export(module, (features,)), tmp_path / "m3em.pt2")
    out = torch.export.load(tmp_path / "m3em.pt2").module()(features)
    assert type(out) is mnn.Enhanced
    assert torch.equal(out.consensus, module(features).consensus)


class Quantized(torch.nn.Module):
    """As torch.ao makes them in the place of linear layers: no parameters, float32 in and out."""

    def __init__(self, layer):
        super().__init__()
        self.packed = layer

    def forward(self, x):
        return F.linear(x, self.packed)


def quantize(module):
    for name, layer in list(module.named_children()):
        if isinstance(layer, torch.nn.Linear):
            setattr(module, name, Quantized(layer.weight.detach()))
        else:
            quantize(layer)


def test_gates_without_parameters_take_float32_and_projections_are_refused():
    module, features = make_module(dtype=torch.float32), make_features(dtype=torch.float16)
    pooled = {name: x.mean((2, 3)) if x.dim() == 4 else x for name, x in features.items()}
    before = module.smr.gates(pooled)
    quantize(module)
    after = module.smr.gates(pooled)
    for name, gates in before.items():
        for a, b in zip(gates, after[name], strict=True):
            assert torch.equal(a, b) and b.dtype == torch.float32
    with pytest.raises(TypeError, match=r"projections\['RGB'\] must be a torch\.nn\.Linear, got \S+\.Quantized$"):
        module(features)


def test_errors_name_what_where_and_what_was_expected():
    module, plain = make_module(), make_module(smr=False)
    features = make_features()
    maps = {k: features[k] for k in SPATIAL}
    gates = module.smr.gates({k: x.mean((2, 3)) if x.dim() == 4 else x for k, x in features.items()})
    cases = [
        (lambda: module({"RGB": features["RGB"]}), r"modalities \['Audio', 'Flow', 'RGB'\], got \['RGB'\]"),
        (lambda: module({**features, "Depth": features["RGB"]}), r"modalities \['Audio', .*got \['Audio', 'Depth',"),
        (lambda: module({**features, "RGB": features["Flow"]}), r"features\['RGB'\] must have 12 channels.*\(3, 8"),
        (lambda: module({**features, "RGB": features["RGB"][:2]}), r"must have N = 2|must have N = 3"),
        (lambda: module({**features, "Audio": features["RGB"][:, :10]}), r"features\['Audio'\] must be \(N,C\), got"),
        (lambda: module({**features, "Audio": features["Audio"][:, None]}), r"features\['Audio'\] must be"),
        # Without SMR nothing after the module's own check would notice: a vector passes through unread.
        (lambda: plain({**features, "Audio": features["RGB"][:, :10]}), r"features\['Audio'\] must be \(N,C\), got"),
        (
            lambda: module({**features, "Flow": features["Flow"][..., :6]}),
            r"'Flow'\] must have the map size of 'RGB' \(7, 7\), got",
        ),
        (lambda: CrossModalityConsensus({"RGB": 4}), r"at least two spatial modalities.*\['RGB'\]"),
        (lambda: MutualEnhancement({"RGB": 4}, {"RGB": 4}), r"either spatial or vector.*\['RGB'\]"),
        (lambda: MutualEnhancement({"R.G": 4, "B": 4}), r"without dots, got 'R.G'"),
        (lambda: MutualEnhancement({"A": 0, "B": 4}), r"channels of modality 'A' must be at least 1, got 0"),
        (lambda: MutualEnhancement({}), r"at least one modality, got none"),
        (lambda: MutualEnhancement(SPATIAL, latent_channels=0), r"latent_channels must be at least 1, got 0"),
        (lambda: MutualEnhancement(SPATIAL, num_scales=0), r"num_scales must be at least 1, got 0"),
        (lambda: SemanticMutualRefinement({}), r"at least one modality"),
        (lambda: SemanticMutualRefinement({"A": 4}, reduction=0), r"reduction must be at least 1, got 0"),
        (lambda: MutualEnhancement(SPATIAL, init="zeros"), r"init must be 'torch' or 'ta3n', got 'zeros'"),
        (lambda: module.cmc(maps), r"made for 2 gates a modality, got gates=None"),
        (lambda: plain.cmc(maps, {k: gates[k] for k in SPATIAL}), r"made for no gates, got gates=some"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
    wrapped = make_module()
    wrapped.cmc.projections["RGB"] = torch.nn.Sequential(wrapped.cmc.projections["RGB"])
    cases = [
        (lambda: module(list(features.values())), r"features must be tensors by modality, got list"),
        (lambda: module({**features, "RGB": [1, 2]}), r"features\['RGB'\] must be a tensor, got list"),
        (lambda: MutualEnhancement(list(SPATIAL)), r"modality names with numbers of channels.*\['RGB', 'Flow'\]"),
        (lambda: MutualEnhancement({"A": "4", "B": 4}), r"channels of modality 'A' must be an integer, got '4'"),
        (lambda: MutualEnhancement(SPATIAL, latent_channels=8.0), r"latent_channels must be an integer, got 8.0"),
        (lambda: SemanticMutualRefinement({"A": 4}, reduction=True), r"reduction must be an integer, got True"),
        (
            lambda: wrapped(features),
            r"projections\['RGB'\] must be a torch.nn.Linear, got torch.nn.modules.container.Sequential",
        ),
    ]
    for call, message in cases:
        with pytest.raises(TypeError, match=message):
            call()
    assert mnn.__all__
