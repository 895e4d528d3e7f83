"""The ops under torch.compile and torch.export."""

import io

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd

import exact
import m3em_fast
from library_cases import Saved, assert_same, forms, gradients, leaves_of, ops_of
from m3em_fast import backends
from m3em_fast.backends import BackendError
from op_cases import FULL_CALLS, Call, random_grad, random_tensors

FULL_CALL = pytest.mark.parametrize("call", FULL_CALLS, ids=str)
STRICT = pytest.mark.parametrize("strict", [True, False], ids=["strict", "non_strict"])


class Graphs:
    """A backend of torch.compile that runs what was traced as it is, and keeps it."""

    def __init__(self):
        self.forward, self.backward = [], []

    def __call__(self, module, inputs):
        def keeping(graphs):
            def compile_nothing(graph, inputs):
                graphs.append(graph)
                return make_boxed_func(graph.forward)

            return compile_nothing

        return aot_autograd(fw_compiler=keeping(self.forward), bw_compiler=keeping(self.backward))(module, inputs)


def nodes(*graphs):
    """Name and arguments of every op of this package in the graphs."""
    found = [node for graph in graphs for node in graph.graph.nodes if node.op == "call_function"]
    return [(n.target._opname, n.args) for n in found if getattr(n.target, "namespace", "") == "m3em_fast"]


# --------------------------------------------------------------------------------------------- torch.compile


# Pooling windows that overlap (5 -> 2) have been the compiler's undoing. One scale of them is enough of a wait.
COMPILED = [call for call in FULL_CALLS if call.op != "consensus_map"] + [
    Call("consensus_map", options={"num_scales": 2})
]


@pytest.mark.parametrize("call", COMPILED, ids=str)
def test_compiled(backend, call):
    """As one graph, forward and backward. Other code may be generated for the same sums, so the bits may differ."""
    torch.compiler.reset()
    tensors = random_tensors(call, 2, 8, 5, 5, torch.float32)
    compiled = torch.compile(lambda *inputs: call(*inputs), fullgraph=True)
    leaves = leaves_of(tensors, [True] * len(tensors))
    out = compiled(*leaves)
    assert forms([out]) == forms([call(*tensors)])
    expected = call.exact(tensors)
    exact.assert_close(out, expected.value, exact.bound(expected, out.dtype, out.dtype), str(call))
    grad = random_grad(out)
    found = torch.autograd.grad(out, leaves, grad)
    for gradient, expected in zip(found, call.exact_gradients(tensors, grad), strict=True):
        exact.assert_close(gradient, expected.value, exact.bound(expected, torch.float32, torch.float32), str(call))


@FULL_CALL
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_one_graph_of_single_ops_for_any_number_of_clips(kernels, call, layout):
    for needs in ([True] * len(call.names), [name not in ("x", "a") for name in call.names]):
        torch.compiler.reset()
        graphs = Graphs()
        compiled = torch.compile(lambda *inputs: call(*inputs), backend=graphs, fullgraph=True, dynamic=True)
        for n in (3, 2, 6):
            tensors = random_tensors(call, n, 8, 7, 5, torch.float32, layouts=[layout] * len(call.names))
            leaves = leaves_of(tensors, needs)
            saved = Saved(tensors)
            with torch._dynamo.config.patch(error_on_recompile=n != 3):
                out, kept = saved.of(compiled, leaves)
            wanted, kept_by_eager = saved.of(call, leaves)
            assert_same([out], [wanted])
            assert not any(now and not before for now, before in zip(kept, kept_by_eager, strict=True))
            grad = random_grad(out)
            found, wanted = gradients(out, leaves, grad), gradients(wanted, leaves, grad)
            if kernels != "cpu" and call.op == "gated_projection":
                # Torch's matrix product is in it, whose bits depend on where its operands lie.
                torch.testing.assert_close(found, wanted)
            else:
                assert_same(found, wanted)
        names = ops_of(call)
        assert [name for name, _ in nodes(*graphs.forward)] == names
        assert [name for name, _ in nodes(*graphs.backward)] == [f"{name}_backward" for name in names]


@FULL_CALL
@pytest.mark.parametrize("n", [0, 1])
def test_compiled_for_no_clip_or_one(kernels, call, n):
    compiled = torch.compile(lambda *inputs: call(*inputs), backend="aot_eager", fullgraph=True)
    leaves = leaves_of(random_tensors(call, n, 8, 7, 7, torch.float16), [True] * len(call.names))
    out, wanted = compiled(*leaves), call(*leaves)
    assert_same([out], [wanted])
    grad = random_grad(out)
    assert_same(gradients(out, leaves, grad), gradients(wanted, leaves, grad))


@FULL_CALL
@pytest.mark.parametrize("name", ["auto", "cpu", "reference"])
@pytest.mark.parametrize("how", ["block", "environment"])
def test_the_backend_is_that_of_the_trace(monkeypatch, call, name, how):
    torch.compiler.reset()
    graphs = Graphs()
    compiled = torch.compile(lambda *inputs: call(*inputs), backend=graphs, fullgraph=True)
    tensors = random_tensors(call, 2, 8, 5, 4, torch.float32)
    # As M3EM_BACKEND had set it before the import.
    monkeypatch.setattr(backends, "_default", name if how == "environment" else "reference")
    if how == "environment":
        out = compiled(*tensors)
    else:
        with m3em_fast.backend(name):
            out = compiled(*tensors)
    found = nodes(*graphs.forward)
    if name == "reference":
        assert found == []
    else:
        assert [(op, args[-1]) for op, args in found] == [(op, "cpu") for op in ops_of(call)]
    with m3em_fast.backend("cpu" if name == "reference" else "reference"):
        assert torch.equal(compiled(*tensors), out)
    assert len(graphs.forward) == 1


@FULL_CALL
def test_compiled_without_the_extension(monkeypatch, automatic, call):
    torch.compiler.reset()
    monkeypatch.setattr(backends, "native", None)
    graphs = Graphs()
    compiled = torch.compile(lambda *inputs: call(*inputs), backend=graphs, fullgraph=True)
    tensors = random_tensors(call, 2, 8, 5, 4, torch.float32)
    assert torch.equal(compiled(*tensors), call(*tensors))
    assert nodes(*graphs.forward) == []
    torch.compiler.reset()
    with m3em_fast.backend("cpu"), pytest.raises(Exception, match=r"backend cpu cannot serve this call.* not there"):
        compiled(*tensors)


@pytest.mark.parametrize("call", COMPILED, ids=str)
def test_transforms_inside_a_compiled_function(automatic, call):
    """The reference serves under the transform, and kernels after it."""
    tensors = random_tensors(call, 2, 8, 5, 4, torch.float32)
    stacked = [torch.stack([t, t.flip(0)]) for t in tensors]
    numbers = tuple(range(len(tensors)))

    def gradient(*inputs):
        return torch.func.grad(lambda *x: call(*x).pow(2).sum(), argnums=numbers)(*inputs)

    transforms = {
        "vmap": (lambda *inputs: torch.vmap(lambda *x: call(*x))(*inputs), stacked),
        "grad": (gradient, tensors),
        "vmap of grad": (lambda *inputs: torch.vmap(gradient)(*inputs), stacked),
        "jvp": (lambda *inputs: torch.func.jvp(lambda *x: call(*x), inputs, inputs), tensors),
    }
    for name, (function, inputs) in transforms.items():
        torch.compiler.reset()
        graphs = Graphs()

        def both(*inputs, function=function, mapped=inputs is stacked):
            return function(*inputs), call(*[t[0] if mapped else t for t in inputs])

        found = torch.compile(both, backend=graphs, fullgraph=True)(*inputs)
        torch.testing.assert_close(found, both(*inputs))
        assert [op for op, _ in nodes(*graphs.forward)] == ops_of(call), name


class Tagged(torch.Tensor):
    """A tensor subclass, which must stay one."""


@FULL_CALL
def test_a_backend_chosen_by_name_says_in_the_trace_why_it_cannot_serve(kernels, call):
    tensors = random_tensors(call, 2, 8, 5, 4, torch.float32)
    tagged = [tensor.as_subclass(Tagged) for tensor in tensors]
    mapped = [tensor[None] for tensor in tensors]
    for reason, function, given, fullgraph in [
        ("not Tagged", call, tagged, True),
        ("not Tagged", call, tagged, False),
        ("a transform of torch.func", lambda *inputs: torch.vmap(lambda *x: call(*x))(*inputs), mapped, True),
    ]:
        torch.compiler.reset()
        compiled = torch.compile(lambda *inputs, f=function: f(*inputs), backend="eager", fullgraph=fullgraph)
        message = rf"{call.op}: backend {kernels} cannot serve this call: .*{reason}"
        with pytest.raises(Exception if fullgraph else BackendError, match=message):
            compiled(*given)


@FULL_CALL
def test_double_backward_of_a_compiled_op_is_refused(kernels, call):
    leaves = leaves_of(random_tensors(call, 2, 8, 5, 4, torch.float32), [True] * len(call.names))
    for how in ("aot_eager", "eager"):
        torch.compiler.reset()
        out = torch.compile(lambda *inputs: call(*inputs), backend=how, fullgraph=True)(*leaves)
        first = torch.autograd.grad(out.pow(2).sum(), leaves, create_graph=True)
        with pytest.raises(RuntimeError, match="double backward"):
            sum(g.sum() for g in first).backward()


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=str)
def test_projection_under_autocast_compiled(kernels, half):
    call = FULL_CALLS[3]
    assert call.op == "gated_projection"
    compiled = torch.compile(lambda *inputs: call(*inputs), backend="aot_eager", fullgraph=True)
    leaves = leaves_of(random_tensors(call, 2, 8, 5, 4, torch.float32), [True] * len(call.names))
    with torch.autocast("cpu", dtype=half):
        out, wanted = compiled(*leaves), call(*leaves)
    assert out.dtype == half
    assert_same([out], [wanted])
    grad = random_grad(out)
    assert_same(gradients(out, leaves, grad), gradients(wanted, leaves, grad))


# ---------------------------------------------------------------------------------------------- torch.export


class Module(torch.nn.Module):
    """One call; the tensors after the first `given` are parameters."""

    def __init__(self, call, tensors):
        super().__init__()
        self.call = call
        self.parameters_ = torch.nn.ParameterList([torch.nn.Parameter(t.clone()) for t in tensors])

    def forward(self, *inputs):
        return self.call(*inputs, *self.parameters_)


@STRICT
@FULL_CALL
def test_exported(kernels, call, strict):
    """A program keeps each op as one node and any number of clips, survives a file, computes the same and trains."""
    sizes = (8, 7, 5)
    tensors = random_tensors(call, 3, *sizes, torch.float32)
    given = sum(name not in ("weight", "bias") for name in call.names)
    module = Module(call, tensors[given:])
    clips = torch.export.Dim("clips", min=1, max=100)
    program = torch.export.export(
        module,
        tuple(tensors[:given]),
        dynamic_shapes={"inputs": tuple({0: clips} for _ in range(given))},
        strict=strict,
    )
    names = ops_of(call)
    assert [(name, args[-1]) for name, args in nodes(program.graph_module)] == [(name, kernels) for name in names]
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for n in (1, 3, 6):
        leaves = leaves_of(random_tensors(call, n, *sizes, torch.float32)[:given], [True] * given)
        out, wanted = loaded(*leaves), module(*leaves)
        assert_same([out], [wanted])
        grad = random_grad(out)
        assert_same(
            gradients(out, [*leaves, *loaded.parameters()], grad),
            gradients(wanted, [*leaves, *module.parameters()], grad),
        )
    decomposed = program.run_decompositions()
    assert [name for name, _ in nodes(decomposed.graph_module)] == names


@STRICT
@FULL_CALL
def test_exported_under_the_reference(call, strict):
    """A program of torch's own operators, for places without this package."""
    tensors = random_tensors(call, 3, 8, 7, 5, torch.float32)
    with m3em_fast.backend("reference"):
        program = torch.export.export(Module(call, []), tuple(tensors), strict=strict)
        wanted = call(*tensors)
    assert nodes(program.graph_module) == []
    torch.testing.assert_close(program.module()(*tensors), wanted)
