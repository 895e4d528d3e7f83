"""The ops as torch.library has them: registration, derivatives, meta and fake tensors."""

import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from library_cases import Saved, assert_same, forms, gradients, leaves_of, ops_of
from m3em_fast import backends
from m3em_fast.backends import BackendError
from op_cases import FULL_CALLS, Call, random_grad, random_tensors

# One call for every way to fill the schema of a registered op.
REGISTERED = (
    Call("channel_gate", gates=1),
    Call("channel_gate", gates=2),
    Call("consensus_map"),
    Call("consensus_map", options={"center": True, "num_scales": 2, "eps": 1e-3}),
    Call("consensus_pool"),
    Call("consensus_pool", cmap=True),
    Call("gated_projection", gates=1),
    Call("gated_projection", gates=2, bias=True),
)
REGISTERED_CALL = pytest.mark.parametrize("call", REGISTERED, ids=str)
FULL_CALL = pytest.mark.parametrize("call", FULL_CALLS, ids=str)
# dtype of the feature maps, dtype of everything else, layout.
FORMS = (
    (torch.float32, torch.float32, "contiguous"),
    (torch.float32, torch.float32, "channels_last"),
    (torch.float16, torch.float32, "channels_last"),
    (torch.float64, torch.float64, "sliced"),
    (torch.bfloat16, torch.bfloat16, "expanded"),
)


class Seen(TorchDispatchMode):
    """The calls of registered ops of this package."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "m3em_fast":
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


def arguments(call, tensors, backend):
    """What the registered op of a call takes, said once more."""
    named, gates = call._split(tensors)
    if call.op == "channel_gate":
        given = (named["x"], gates)
    elif call.op == "consensus_map":
        scales, center, eps = call._exact_options(tensors[0].shape)
        given = (*tensors, scales, center, eps, str(tensors[0].dtype).removeprefix("torch."))
    elif call.op == "consensus_pool":
        given = (named["x"], named.get("cmap"), str(tensors[-1].dtype).removeprefix("torch."))
    else:
        given = (named["x"], gates, named["weight"], named.get("bias"))
    return (*given, backend)


def registered(call, tensors, backend):
    out = getattr(torch.ops.m3em_fast, f"_{call.op}")(*arguments(call, tensors, backend))
    if call.op == "consensus_map":
        out, statistics = out
        assert not statistics.requires_grad
    return out


def patterns(count):
    """Which inputs need a gradient: all of them, each alone, all but each."""
    alone = [tuple(i == k for k in range(count)) for i in range(count)]
    found = [(True,) * count, *alone, *[tuple(not need for need in needs) for needs in alone]]
    return [needs for needs in dict.fromkeys(found) if any(needs)]


# ------------------------------------------------------------------------------------------------ registration


@REGISTERED_CALL
@pytest.mark.parametrize("form", FORMS[::2], ids=str)
def test_opcheck(kernels, call, form):
    """Schema, registration, fake kernels and the traced derivative, of the op and of its backward."""
    dtype, companion, layout = form
    tensors = random_tensors(call, 2, 3, 5, 4, dtype, companion, [layout] * len(call.names))
    op = getattr(torch.ops.m3em_fast, f"_{call.op}").default
    count = len(tensors)
    every = patterns(count)[: count + 1 if form == FORMS[0] else 1]
    for needs in [[False] * count, *every]:
        torch.library.opcheck(op, arguments(call, leaves_of(tensors, needs), kernels))
        if not any(needs):
            continue
        with Seen() as seen:
            registered(call, leaves_of(tensors, needs), kernels).sum().backward()
        backward, given = seen.calls[-1]
        assert backward is getattr(torch.ops.m3em_fast, f"_{call.op}_backward").default
        assert given[0].stride() == (0,) * given[0].dim()
        # Its own formula raises, so only without gradients.
        torch.library.opcheck(backward, torch.utils._pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, given))


@REGISTERED_CALL
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_the_registered_op_is_the_eager_one(kernels, call, form):
    """Value, gradients by any of the inputs, and what is kept for them."""
    dtype, companion, layout = form
    tensors = random_tensors(call, 2, 3, 5, 4, dtype, companion, [layout] * len(call.names))
    saved = Saved(tensors)
    for needs in patterns(len(tensors)):
        leaves = leaves_of(tensors, needs)
        found, kept = saved.of(lambda *inputs: registered(call, inputs, kernels), leaves)
        wanted, kept_by_eager = saved.of(call, leaves)
        assert_same([found], [wanted])
        assert kept == kept_by_eager
        ones = torch.ones((), dtype=wanted.dtype).expand(wanted.shape)
        for grad in (random_grad(wanted), ones, torch._efficientzerotensor(wanted.shape, dtype=wanted.dtype)):
            with Seen() as seen:
                results = gradients(found, leaves, grad, retain_graph=True)
            expected = gradients(wanted, leaves, grad, retain_graph=True)
            assert_same(results, expected)
            backward, given = seen.calls[-1]
            assert forms(backward(*given)) == forms(expected)  # autograd would cast one of another dtype


class Undefined(torch.autograd.Function):
    """Passes no gradient on, not even one of zeros."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return None


@REGISTERED_CALL
def test_an_undefined_gradient_stays_one(kernels, call):
    leaves = leaves_of(random_tensors(call, 2, 3, 5, 4, torch.float32), [True] * len(call.names))
    with Seen() as seen:
        Undefined.apply(registered(call, leaves, kernels)).sum().backward()
    assert [name._opname for name, _ in seen.calls] == [f"_{call.op}"]
    assert all(leaf.grad is None for leaf in leaves)


@REGISTERED_CALL
def test_only_double_backward_is_refused(kernels, call):
    leaves = leaves_of(random_tensors(call, 2, 3, 5, 4, torch.float32), [True] * len(call.names))
    out = registered(call, leaves, kernels)
    first = torch.autograd.grad(out.pow(2).sum(), leaves, create_graph=True)
    with pytest.raises(RuntimeError, match=rf"^{call.op}: double backward works in eager mode only, not under torch\."):
        sum(g.sum() for g in first).backward()


def test_schemas_can_be_read():
    assert str(torch.ops.m3em_fast._consensus_map.default._schema) == (
        "m3em_fast::_consensus_map(Tensor a, Tensor b, int num_scales, bool center, float eps, str out_dtype, "
        "str backend) -> (Tensor, Tensor)"
    )
    assert str(torch.ops.m3em_fast._gated_projection_backward.default._schema) == (
        "m3em_fast::_gated_projection_backward(Tensor grad, Tensor? x, Tensor?[] gates, Tensor? weight, Tensor? bias, "
        "Tensor[] saved, SymInt[] forms, bool[] needs, str backend) -> Tensor[]"
    )


@REGISTERED_CALL
def test_a_program_may_meet_a_machine_without_its_backend(monkeypatch, call):
    tensors = random_tensors(call, 2, 3, 5, 4, torch.float32)
    on_meta = [tensor.to("meta") for tensor in tensors]
    for inputs in (tensors, on_meta):
        with pytest.raises(BackendError, match=rf"{call.op}: backend fpga .*: it has no kernel for {call.op}"):
            registered(call, inputs, "fpga")
    monkeypatch.setattr(backends, "native", None)
    monkeypatch.setattr(backends, "_MISSING", "There is no C++ compiler.")
    for inputs in (tensors, on_meta):
        with pytest.raises(BackendError, match=r"cpu cannot serve .* not there: There is no C\+\+ compiler"):
            registered(call, inputs, "cpu")


def test_the_package_imports_no_compiler():
    code = (
        "import sys, m3em_fast; print([name for name in ('torch._dynamo', 'torch._inductor') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


# ----------------------------------------------------------------------------------------- meta and fake tensors


def on_meta(tensor):
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


@FULL_CALL
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_gradients_of_meta_and_fake_tensors_have_the_form_of_real_ones(kernels, call, form):
    dtype, companion, layout = form
    tensors = random_tensors(call, 2, 3, 5, 4, dtype, companion, [layout] * len(call.names))

    def run(inputs, needs):
        leaves = leaves_of(inputs, needs)
        out = call(*leaves)
        return forms([out, *gradients(out, leaves, torch.ones_like(out))])

    for needs in patterns(len(tensors)):
        wanted = run(tensors, needs)
        assert run([on_meta(tensor) for tensor in tensors], needs) == wanted
        with FakeTensorMode() as mode:
            fakes = [mode.from_tensor(tensor) for tensor in tensors]
            assert run(fakes, needs) == wanted
        assert run(fakes, needs) == wanted  # the mode is not active any more


@FULL_CALL
def test_meta_and_fake_tensors_go_through_the_registered_op(kernels, call):
    tensors = random_tensors(call, 2, 3, 5, 4, torch.float32)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(tensor) for tensor in tensors]
    for inputs in (list(map(on_meta, tensors)), fakes):
        out = call(*leaves_of(inputs, [True] * len(tensors)))  # kept: torch 2.7 frees its nodes with it
        waiting, names = [out.grad_fn], []
        while waiting:
            node = waiting.pop()
            names.append(node.name())
            waiting += [following for following, _ in node.next_functions if following is not None]
        for name in ops_of(call):
            assert any(f"m3em_fast_{name}" in found for found in names)
