"""How the ops behave in autograd: which gradients are computed, what is kept for them, and second derivatives."""

import itertools

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from op_cases import CALLS, FULL_CALLS, HALF, Call, check, random_grad, random_tensors

EVERY_CALL = pytest.mark.parametrize("call", CALLS, ids=str)
FULL_CALL = pytest.mark.parametrize("call", FULL_CALLS, ids=str)


def subsets(names):
    return itertools.chain.from_iterable(itertools.combinations(names, size) for size in range(len(names) + 1))


@FULL_CALL
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_every_subset_of_inputs_that_need_gradients(backend, call, dtype):
    """Those get the right gradient, the others none; and without any the result needs none."""
    tensors = random_tensors(call, 2, 3, 5, 4, dtype)
    for needs in subsets(call.names):
        check(backend, call, tensors, needs=needs)
        leaves = [t.detach().requires_grad_(name in needs) for name, t in zip(call.names, tensors, strict=True)]
        out = call(*leaves)
        if needs:
            out.sum().backward()
        assert [leaf.grad is not None for leaf in leaves] == [name in needs for name in call.names]


@FULL_CALL
def test_half_beside_float32_for_every_subset(backend, call):
    """The gradient has the dtype of its own input, whoever else needs one."""
    tensors = random_tensors(call, 2, 3, 5, 4, torch.bfloat16, None if call.op == "consensus_map" else torch.float32)
    for needs in subsets(call.names):
        check(backend, call, tensors, needs=needs)


@EVERY_CALL
def test_without_gradients(backend, call):
    tensors = random_tensors(call, 2, 3, 5, 4, torch.float32)
    wanted = call(*tensors)
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    with torch.no_grad():
        out = call(*leaves)
        assert not out.requires_grad
        assert torch.equal(out, wanted)
    with torch.inference_mode():
        out = call(*leaves)
        assert out.is_inference()
        assert torch.equal(out, wanted)


def saved_storages(call, tensors, needs):
    """The memory that the graph of one call holds on to."""
    held = set()

    def pack(tensor):
        held.add(tensor.untyped_storage().data_ptr())
        return tensor

    leaves = [t.detach().requires_grad_(name in needs) for name, t in zip(call.names, tensors, strict=True)]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = call(*leaves)
    return held, out


@EVERY_CALL
def test_nothing_is_kept_for_frozen_inputs(backend, call):
    tensors = random_tensors(call, 2, 3, 5, 4, torch.float32)
    held, _ = saved_storages(call, tensors, ())
    assert not held


# An op that is linear in its one input that needs a gradient has no use for that input's values.
LINEAR = [(call, name) for call in CALLS for name in call.names if call.op != "consensus_map"]


@pytest.mark.parametrize(("call", "name"), LINEAR, ids=[f"{call}-{name}" for call, name in LINEAR])
def test_an_input_is_not_kept_for_its_own_gradient(backend, call, name):
    tensors = random_tensors(call, 2, 3, 5, 4, torch.float32)
    held, out = saved_storages(call, tensors, [name])
    assert out.requires_grad
    if (backend, name) == ("reference", "weight"):
        return  # conv2d keeps both operands, whichever gradient is asked for
    assert tensors[call.names.index(name)].untyped_storage().data_ptr() not in held


def gradients(call, leaves, grad, edit=lambda out: None):
    out = call(*leaves)
    edit(out)
    return torch.autograd.grad(out, leaves, grad)


def must_notice(backend, call, name, dtype):
    """Is an error the only right answer to an edit of this input? A compiled backend keeps the input itself wherever it
    needs it. `reference` may work on a copy, but not of a map that is already in the accumulation dtype."""
    if name == "bias" or (name == "x" and "pool" in call.op and not call.cmap):
        return False
    if call.op == "gated_consensus_pool" and name.startswith("gate"):
        return dtype != torch.float16  # gated in plain torch on every backend, half gates as copies
    if backend != "reference":
        return True
    return dtype != torch.float16 and name in ("x", "a", "b") and not call.options.get("center")


@EVERY_CALL
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
def test_an_edit_in_place_is_never_silent(backend, call, dtype):
    """An input that is changed between forward and backward: an error, or the gradient at the values that went in."""
    tensors = random_tensors(call, 2, 3, 5, 4, dtype)
    for name in call.names:
        leaves = [tensor.clone().requires_grad_() for tensor in tensors]
        edited = leaves[call.names.index(name)]
        grad = random_grad(call(*leaves))
        wanted = gradients(call, leaves, grad)

        def edit(_, edited=edited):
            with torch.no_grad():
                edited.add_(1)

        try:
            found = gradients(call, leaves, grad, edit)
        except RuntimeError as error:
            assert "modified by an inplace operation" in str(error)
        else:
            assert not must_notice(backend, call, name, dtype), name
            assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True)), name


@EVERY_CALL
def test_the_result_may_be_edited_in_place(backend, call):
    """As `relu(inplace=True)` after a projection does."""
    leaves = [tensor.requires_grad_() for tensor in random_tensors(call, 2, 3, 5, 4, torch.float32)]
    grad = random_grad(call(*leaves))
    wanted = gradients(call, leaves, 2 * grad)
    found = gradients(call, leaves, grad, lambda out: out.mul_(2))
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


@EVERY_CALL
def test_a_graph_that_is_retained(backend, call):
    leaves = [tensor.requires_grad_() for tensor in random_tensors(call, 2, 3, 5, 4, torch.float32)]
    out = call(*leaves)
    grad = random_grad(out)
    first, second = (torch.autograd.grad(out, leaves, grad, retain_graph=True) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


# The interpreter takes 20 ms a call: along one direction, and not along every axis.
SLOW = ("triton",)
# Small maps with overlapping windows (5 -> 2), and every scale that they have.
CHECKED = [
    *[call for call in CALLS if not call.positive],
    Call("consensus_map", options={"num_scales": 1}),
    Call("consensus_map", options={"num_scales": 3, "center": True}),
]


@pytest.mark.parametrize("call", CHECKED, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
def test_first_and_second_derivatives(backend, call, layout):
    """Numerically, in float64; the second ones by the inputs and by the incoming gradient."""
    layouts = [layout] * len(call.names)
    tensors = random_tensors(call, 1, 3, 5, 2, torch.float64, layouts=layouts, key=("numerical",), d=2)
    leaves = [tensor.requires_grad_() for tensor in tensors]
    assert gradcheck(call, leaves, fast_mode=backend in SLOW)
    assert gradgradcheck(call, leaves, fast_mode=backend in SLOW)


@FULL_CALL
def test_second_derivatives_of_some_inputs(backend, call):
    """With one input frozen in turn."""
    for frozen in range(len(call.names)):
        tensors = random_tensors(call, 2, 2, 3, 2, torch.float64, key=("some",), d=2)
        leaves = [tensor.requires_grad_(i != frozen) for i, tensor in enumerate(tensors)]
        assert gradgradcheck(call, leaves, fast_mode=backend in SLOW)


@pytest.mark.op("consensus_map")
def test_second_derivative_at_a_dead_position(backend):
    """A gradient penalty on features that are 0 somewhere, as after a ReLU: nothing there, and no NaN anywhere."""
    a, b = random_tensors(Call("consensus_map"), 2, 3, 4, 4, torch.float32)
    a[0, :, 1, 2] = 0
    a[1] = 0
    a, b = a.requires_grad_(), b.requires_grad_()
    first = torch.autograd.grad(Call("consensus_map", options={"num_scales": 1})(a, b).sum(), [a, b], create_graph=True)
    penalty = sum(gradient.square().sum() for gradient in first)
    for second in torch.autograd.grad(penalty, [a, b]):
        assert second.isfinite().all()
        assert not second[0, :, 1, 2].any()
        assert not second[1].any()
        assert second[0].any()


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_second_derivatives_in_half_have_the_dtype_of_the_input(backend, dtype):
    for call in FULL_CALLS:
        leaves = [tensor.requires_grad_() for tensor in random_tensors(call, 2, 3, 5, 4, dtype)]
        first = torch.autograd.grad(call(*leaves).sum(), leaves, create_graph=True)
        penalty = sum(gradient.float().square().sum() for gradient in first if gradient.requires_grad)
        second = torch.autograd.grad(penalty, leaves, allow_unused=True)
        assert all(gradient is None or gradient.dtype == dtype for gradient in second)
        assert all(gradient is None or gradient.isfinite().all() for gradient in second)
