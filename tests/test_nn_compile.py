"""The whole module under what PyTorch puts around a model: compiled, exported, checkpointed, packaged ahead of time."""

import ast
import copy
import io
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import m3em_fast
from m3em_fast import backends
from m3em_fast.nn import MutualEnhancement

COMPILED = [name for name in backends.available() if name != "reference"]
SPATIAL, VECTOR = {"RGB": 8, "Flow": 8}, {"Audio": 6}
# How often each op stands in the module with two spatial modalities: a plain pool and a weighted one for both.
NODES = {"_consensus_pool": 4, "_gated_projection": 2, "_consensus_map": 1}


@pytest.fixture(autouse=True)
def clean():
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()


def make():
    torch.manual_seed(0)
    return MutualEnhancement(SPATIAL, VECTOR, latent_channels=4, reduction=2, num_scales=2)


def draw(n, size=(4, 4)):
    source = torch.Generator().manual_seed(n)
    maps = {name: torch.rand(n, channels, *size, generator=source) for name, channels in SPATIAL.items()}
    return maps | {name: torch.rand(n, channels, generator=source) for name, channels in VECTOR.items()}


class Flat(torch.nn.Module):
    """Tensors in, tensors out, as an exported program is called most simply."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, rgb, flow, audio):
        out = self.module({"RGB": rgb, "Flow": flow, "Audio": audio})
        return out.consensus, out.vectors["RGB"], out.vectors["Flow"], out.vectors["Audio"]


def results_and_gradients(function, module, features):
    """By parameters and by features."""
    leaves = [x.detach().requires_grad_() for x in features.values()]
    outputs = function(*leaves)
    loss = sum((x.float().square() * (i + 1)).sum() for i, x in enumerate(outputs))
    return [*outputs, *torch.autograd.grad(loss, [*leaves, *module.parameters()])]


def assert_close(found, wanted, half=None):
    """Within 64 roundings of float32 of the largest value, as the benchmark's gate has it (bench/gate.py); where the
    compiler may leave out a rounding to half that eager mode does between two layers, four roundings to half."""
    allowed = 64 * 2**-24 if half is None else 4 * torch.finfo(half).eps / 2
    for got, want in zip(found, wanted, strict=True):
        assert got.dtype == want.dtype
        torch.testing.assert_close(got, want, rtol=0, atol=allowed * want.abs().max().item())


def assert_equal(found, wanted):
    """The same functions ran in the same order."""
    assert all(map(torch.equal, found, wanted))


@pytest.mark.parametrize("name", COMPILED)
@pytest.mark.parametrize("half", [None, torch.bfloat16], ids=str)
def test_compiled_whole_equals_eager_for_any_number_of_clips(name, half):
    module = Flat(make())
    compiled = torch.compile(module, fullgraph=True, dynamic=True)
    with m3em_fast.backend(name):
        for n in (
            5,
            3,
            7,
        ):  # the first equal to no other size: equal ones become one symbol, and the next n a new graph
            with torch.autocast("cpu", dtype=half or torch.bfloat16, enabled=half is not None):
                found = results_and_gradients(compiled, module, draw(n))
                wanted = results_and_gradients(module, module, draw(n))
            assert_close(found, wanted, half)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def export(module):
    n = torch.export.Dim("n")
    return torch.export.export(module, tuple(draw(3).values()), dynamic_shapes=({0: n}, {0: n}, {0: n}))


def nodes(program):
    found = Counter(str(node.target) for node in program.graph.nodes if "m3em_fast" in str(node.target))
    return {name.removeprefix("m3em_fast.").removesuffix(".default"): count for name, count in found.items()}


@pytest.mark.parametrize("name", COMPILED)
def test_exported_whole_saved_loaded_and_trained(name):
    module = Flat(make())
    with m3em_fast.backend(name):
        program = export(module)
        file = io.BytesIO()
        torch.export.save(program, file)
        file.seek(0)
        loaded = torch.export.load(file)
        assert nodes(program) == nodes(loaded) == NODES
        again = loaded.module()
        for n in (3, 7):
            assert_equal(again(*draw(n).values()), module(*draw(n).values()))
        steps = []
        for model in (copy.deepcopy(module), again):
            optimizer = torch.optim.SGD(model.parameters(), 0.1)
            losses = []
            for _ in range(3):
                optimizer.zero_grad()
                loss = sum(x.square().mean() for x in model(*draw(5).values()))
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
            steps.append(losses)
        assert steps[0][-1] < steps[0][0]
        assert steps[0] == steps[1]


@pytest.mark.parametrize("name", backends.available())
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_activation_checkpointing(name, compiled):
    module = Flat(make())

    def function(*inputs):
        return checkpoint(module, *inputs, use_reentrant=False)

    chosen = torch.compile(function, fullgraph=True, backend="aot_eager") if compiled else function
    with m3em_fast.backend(name):
        found = results_and_gradients(chosen, module, draw(3))
        assert_equal(found, results_and_gradients(module, module, draw(3)))


@pytest.mark.parametrize("name", COMPILED)
def test_packaged_ahead_of_time(name, tmp_path):
    """AOTInductor: compiled, packaged and loaded, without gradients, in a process that imports m3em_fast."""
    module = Flat(make()).requires_grad_(False)
    with m3em_fast.backend(name), torch.no_grad():
        path = torch._inductor.aoti_compile_and_package(export(module), package_path=str(tmp_path / "m3em.pt2"))
        packaged = torch._inductor.aoti_load_package(path)
        for n in (3, 6):
            assert_close(packaged(*draw(n).values()), module(*draw(n).values()))


@pytest.mark.parametrize("name", ["nn", "reference", *(f"ops/{op}" for op in m3em_fast.ops.__all__)])
def test_nothing_that_is_traced_is_beyond_the_oldest_dynamo(name):
    """next() with a default fails under torch 2.7; `make test-oldest` runs there, this test everywhere."""
    path = Path(m3em_fast.__file__).parent / f"{name}.py"
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    lines = [node.lineno for node in calls if getattr(node.func, "id", "") == "next" and len(node.args) > 1]
    assert calls and not lines, f"{path.name}: next() with a default in lines {lines}"
