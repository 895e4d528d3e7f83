"""The ops under what PyTorch can put around a function: autocast, vmap, torch.func, the meta device, modes that watch
every operator. What a compiler does with them is in test_ops_compile.py."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import exact
import m3em_fast
from m3em_fast import ops
from m3em_fast.backends import BackendError
from op_cases import CALLS, DTYPES, FULL_CALLS, HALF, Call, check, random_grad, random_tensors

EVERY_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)
EVERY_CALL = pytest.mark.parametrize("call", CALLS, ids=str)
FULL_CALL = pytest.mark.parametrize("call", FULL_CALLS, ids=str)
AUTOCAST = pytest.mark.parametrize("half", HALF, ids=str)
# The checks of arguments are in no recording, which torch says of every one.
RECORDED = pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.trace:DeprecationWarning")
PROJECTION = Call("gated_projection", gates=2, bias=True)


# -------------------------------------------------------------------------------------------------- autocast


def assert_projection_in_half(backend, half, tensors):
    """The result and gradients of a projection whose x, weight and bias were rounded to `half` first."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    with torch.autocast("cpu", dtype=half):
        out = PROJECTION(*leaves)
    assert out.dtype == half
    rounded = [
        tensor.to(half) if name in ("x", "weight", "bias") else tensor
        for name, tensor in zip(PROJECTION.names, tensors, strict=True)
    ]
    expected = PROJECTION.exact(rounded)
    once_more = PROJECTION.rounded("out", half, rounded, backend)
    exact.assert_close(out, expected.value, exact.bound(expected, half, torch.float32, once_more))
    grad = random_grad(out)
    found = torch.autograd.grad(out, leaves, grad)
    wanted = PROJECTION.exact_gradients(rounded, grad)
    for name, leaf, cast, gradient, expected in zip(PROJECTION.names, leaves, rounded, found, wanted, strict=True):
        assert gradient.dtype == leaf.dtype
        # The gradient of a tensor that was cast comes back through the cast: it has been a number of that dtype first.
        allowed = exact.bound(
            expected, cast.dtype, torch.float32, PROJECTION.rounded(name, cast.dtype, rounded, backend)
        )
        if leaf.dtype != cast.dtype:
            allowed = allowed + exact.unit_roundoff(leaf.dtype) * abs(expected.value)
        exact.assert_close(gradient, expected.value, allowed, f"gradient by {name}")


@AUTOCAST
def test_projection_under_autocast(backend, half):
    assert_projection_in_half(backend, half, random_tensors(PROJECTION, 2, 64, 7, 7, torch.float32))


@AUTOCAST
@pytest.mark.parametrize("store", HALF, ids=str)
def test_projection_of_stored_features_under_autocast(backend, half, store):
    """x in a half dtype, which need not be that of autocast, and parameters in float32."""
    assert_projection_in_half(backend, half, random_tensors(PROJECTION, 2, 64, 7, 7, store, torch.float32))


@AUTOCAST
@EVERY_DTYPE
@pytest.mark.parametrize("weight_dtype", DTYPES, ids=str)
def test_projection_casts_as_conv2d_does(backend, half, dtype, weight_dtype):
    """Every pair of dtypes that conv2d takes under autocast, this takes too, with a result in the same dtype."""
    x, weight = torch.ones(2, 3, 4, 4, dtype=dtype), torch.ones(5, 3, dtype=weight_dtype)
    gate = torch.ones(2, 3, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    with torch.autocast("cpu", dtype=half):
        try:
            wanted = F.conv2d(x, weight[:, :, None, None]).dtype
        except RuntimeError:  # float64 is not cast, and has no place beside another dtype
            with pytest.raises(TypeError, match=r"weight must be .*, got b?float"):
                ops.gated_projection(x, [gate], weight)
        else:
            assert ops.gated_projection(x, [gate], weight).dtype == wanted


@AUTOCAST
def test_gates_of_autocast_beside_float32_features(backend, half):
    """Gates that a linear layer made under autocast, in its half dtype; x, which is cast, in float32."""
    x, gate0, gate1, weight, bias = random_tensors(PROJECTION, 2, 8, 5, 4, torch.float32)
    gates = [gate0.to(half), gate1.to(half)]
    with torch.autocast("cpu", dtype=half):
        out = ops.gated_projection(x, gates, weight, bias)
        with torch.autocast("cpu", enabled=False):
            assert ops.gated_projection(x, [gate0, gate1], weight, bias).dtype == torch.float32
    rounded = [x.to(half), *gates, weight.to(half), bias.to(half)]
    expected = PROJECTION.exact(rounded)
    once_more = PROJECTION.rounded("out", half, rounded, backend)
    exact.assert_close(out, expected.value, exact.bound(expected, half, torch.float32, once_more))


@AUTOCAST
@EVERY_DTYPE
@pytest.mark.parametrize("call", [call for call in CALLS if call.op != "gated_projection"], ids=str)
def test_other_ops_take_what_they_are_given(backend, call, half, dtype):
    """The same bits as without autocast, forward and backward."""
    tensors = random_tensors(call, 2, 8, 7, 5, dtype)
    results = []
    for enabled in (False, True):
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        with torch.autocast("cpu", dtype=half, enabled=enabled):
            out = call(*leaves)
        results.append([out, *torch.autograd.grad(out, leaves, random_grad(out))])
    for one, other in zip(*results, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


# ------------------------------------------------------------------------------------------- vmap, torch.func


def assert_exact(call, out, tensors):
    expected = call.exact(tensors)
    exact.assert_close(out, expected.value, exact.bound(expected, out.dtype, out.dtype), str(call))


@EVERY_CALL
def test_vmap(automatic, call):
    """Over every input, and over each input alone while the others are shared."""
    clips = [random_tensors(call, 2, 3, 5, 4, torch.float32, key=(i,)) for i in range(3)]
    stacked = [torch.stack(tensors) for tensors in zip(*clips, strict=True)]
    out = torch.vmap(call)(*stacked)
    for i, tensors in enumerate(clips):
        assert_exact(call, out[i], tensors)
    for mapped in range(len(stacked)):
        inputs = [stacked[i] if i == mapped else clips[0][i] for i in range(len(stacked))]
        dims = tuple(0 if i == mapped else None for i in range(len(stacked)))
        out = torch.vmap(call, in_dims=dims)(*inputs)
        for i in range(3):
            assert_exact(call, out[i], [clips[i][k] if k == mapped else clips[0][k] for k in range(len(stacked))])


@FULL_CALL
def test_vmap_over_channels_last(automatic, call):
    """Under vmap torch does not answer questions about memory formats."""
    clips = [random_tensors(call, 2, 3, 5, 4, torch.float32, key=(i,)) for i in range(3)]
    stacked = [torch.stack(tensors) for tensors in zip(*clips, strict=True)]
    last = [t.movedim(2, 4).contiguous().movedim(4, 2) if t.dim() == 5 else t for t in stacked]
    out = torch.vmap(call)(*last)
    for i, tensors in enumerate(clips):
        assert_exact(call, out[i], tensors)


@EVERY_CALL
def test_func_grad(automatic, call):
    tensors = random_tensors(call, 2, 3, 5, 4, torch.float64)
    weights = random_grad(call(*tensors))
    found = torch.func.grad(lambda *inputs: (call(*inputs) * weights).sum(), argnums=tuple(range(len(tensors))))(
        *tensors
    )
    for gradient, expected in zip(found, call.exact_gradients(tensors, weights), strict=True):
        exact.assert_close(gradient, expected.value, exact.bound(expected, torch.float64, torch.float64), str(call))


@EVERY_CALL
def test_gradients_per_clip(automatic, call):
    """vmap over torch.func.grad."""
    clips = [random_tensors(call, 1, 3, 5, 4, torch.float64, key=(i,)) for i in range(3)]
    stacked = [torch.stack(tensors) for tensors in zip(*clips, strict=True)]
    numbers = tuple(range(len(stacked)))
    found = torch.vmap(torch.func.grad(lambda *inputs: call(*inputs).sum(), argnums=numbers))(*stacked)
    for i, tensors in enumerate(clips):
        ones = torch.ones(call.exact(tensors).value.shape, dtype=torch.float64)
        for gradient, expected in zip(found, call.exact_gradients(tensors, ones), strict=True):
            allowed = exact.bound(expected, torch.float64, torch.float64)
            exact.assert_close(gradient[i], expected.value, allowed, str(call))


@EVERY_CALL
@pytest.mark.parametrize("mode", ["func", "dual"])
def test_forward_mode(automatic, call, mode):
    """The derivative along one direction, against the difference of two exact values."""
    tensors = random_tensors(call, 2, 3, 5, 4, torch.float64)
    tangents = random_tensors(call, 2, 3, 5, 4, torch.float64, key=("tangent",))
    if mode == "func":
        out, found = torch.func.jvp(call, tuple(tensors), tuple(tangents))
    else:
        with torch.autograd.forward_ad.dual_level():
            duals = [torch.autograd.forward_ad.make_dual(*pair) for pair in zip(tensors, tangents, strict=True)]
            out, found = torch.autograd.forward_ad.unpack_dual(call(*duals))
    assert_exact(call, out, tensors)
    arrays, directions = [exact.array(t) for t in tensors], [exact.array(t) for t in tangents]
    step = np.longdouble(2) ** -20
    ends = [
        call.exact([array + sign * step * direction for array, direction in zip(arrays, directions, strict=True)]).value
        for sign in (1, -1)
    ]
    # Errors: the third derivative times step^2 / 6, and longdouble's rounding divided by the step.
    wanted = ((ends[0] - ends[1]) / (2 * step)).astype(float)
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-9, atol=1e-10)


@EVERY_CALL
def test_many_gradients_at_once(automatic, call):
    """``is_grads_batched``, as of ``jacobian(vectorize=True)``: the backward is handed a batch that has no memory."""
    tensors = random_tensors(call, 2, 3, 5, 4, torch.float64)
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    out = call(*leaves)
    grads = [random_grad(out, key=(i,)) for i in range(3)]
    found = torch.autograd.grad(out, leaves, torch.stack(grads), is_grads_batched=True)
    for i, grad in enumerate(grads):
        for gradient, expected in zip(found, call.exact_gradients(tensors, grad), strict=True):
            assert not gradient.requires_grad
            allowed = exact.bound(expected, torch.float64, torch.float64)
            exact.assert_close(gradient[i], expected.value, allowed, str(call))


@EVERY_CALL
def test_tangent_of_the_gradient(automatic, call):
    """Forward mode around the backward alone: the gradients are linear in the one that comes in."""
    leaves = [t.requires_grad_() for t in random_tensors(call, 2, 3, 5, 4, torch.float64)]
    out = call(*leaves)
    grad, tangent = random_grad(out), random_grad(out, key=("tangent",))
    wanted = call.exact_gradients([leaf.detach() for leaf in leaves], tangent)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(grad, tangent)
        found = torch.autograd.grad(out, leaves, dual, retain_graph=True)
        for gradient, expected in zip(found, wanted, strict=True):
            along = torch.autograd.forward_ad.unpack_dual(gradient).tangent
            assert along is not None
            exact.assert_close(along, expected.value, exact.bound(expected, torch.float64, torch.float64), str(call))


# --------------------------------------------------------------------------------- meta and fake tensors, modes


@EVERY_CALL
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_another_default_device_moves_no_memory(backend, call, dtype, layout):
    """``with torch.device(...)`` is how models are made without memory; kernels must not be handed such."""
    tensors = random_tensors(call, 2, 3, 5, 4, dtype, layouts=[layout] * len(call.names))
    leaves = [tensor.requires_grad_() for tensor in tensors]
    wanted = call(*leaves)
    grad = random_grad(wanted)
    gradients = torch.autograd.grad(wanted, leaves, grad)
    with torch.device("meta"):
        out = call(*leaves)
        found = torch.autograd.grad(out, leaves, grad)
    for one, other in zip([out, *found], [wanted, *gradients], strict=True):
        assert one.device == other.device
        assert torch.equal(one, other)


@EVERY_CALL
@RECORDED
def test_a_recording_holds_the_op(automatic, call):
    """What torch.jit.trace records (TensorBoard's add_graph does it) is the op, and not its result."""
    recorded = torch.jit.trace(lambda *inputs: call(*inputs), tuple(random_tensors(call, 2, 3, 5, 4, torch.float32)))
    tensors = random_tensors(call, 2, 3, 5, 4, torch.float32, key=("others",))
    assert_exact(call, recorded(*tensors), tensors)


def on_meta(tensor):
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def assert_same_form(one, other):
    assert (one.shape, one.dtype, one.stride()) == (other.shape, other.dtype, other.stride())


@EVERY_CALL
@EVERY_DTYPE
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced", "expanded"])
@pytest.mark.parametrize("shape", [(2, 3, 5, 4), (0, 3, 7, 7), (1, 1, 1, 1)], ids=str)
def test_meta_and_fake_tensors_have_the_form_of_the_result(automatic, call, dtype, layout, shape):
    tensors = random_tensors(call, *shape, dtype, layouts=[layout] * len(call.names))
    wanted = call(*tensors)
    assert_same_form(call(*map(on_meta, tensors)), wanted)
    with FakeTensorMode() as mode:
        assert_same_form(call(*[mode.from_tensor(tensor) for tensor in tensors]), wanted)


@EVERY_CALL
def test_gradients_on_the_meta_device(automatic, call):
    leaves = [on_meta(tensor).requires_grad_() for tensor in random_tensors(call, 2, 3, 5, 4, torch.float16)]
    call(*leaves).sum().backward()
    for leaf in leaves:
        assert (leaf.grad.shape, leaf.grad.dtype, leaf.grad.device) == (leaf.shape, leaf.dtype, leaf.device)


@EVERY_CALL
def test_under_a_mode_that_watches_every_operator(automatic, call):
    tensors = random_tensors(call, 2, 3, 5, 4, torch.float32)
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    with FlopCounterMode(display=False) as counter:
        check(automatic, call, tensors)
        forward = counter.get_total_flops()
        call(*leaves).sum().backward()
    if call.op == "gated_projection":
        product = 2 * 2 * 5 * 4 * 3 * call.gates * tensors[call.names.index("weight")].shape[0]
        assert forward >= product / call.gates


class Tagged(torch.Tensor):
    """A tensor subclass, which must stay one."""


@EVERY_CALL
def test_tensor_subclasses(automatic, call):
    tensors = random_tensors(call, 2, 3, 5, 4, torch.float32)
    out = call(*[tensor.as_subclass(Tagged) for tensor in tensors])
    assert type(out) is Tagged
    assert_exact(call, out.as_subclass(torch.Tensor), tensors)


@EVERY_CALL
@RECORDED
def test_a_backend_chosen_by_name_says_why_it_cannot_serve_a_call(kernels, call):
    tensors = random_tensors(call, 2, 3, 5, 4, torch.float32)
    tagged = [tensor.as_subclass(Tagged) for tensor in tensors]
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    transform = "a transform of torch.func|forward-mode"
    with m3em_fast.backend(kernels):
        for reason, attempt in [
            (transform, lambda: torch.vmap(call)(*[tensor[None] for tensor in tensors])),
            (transform, lambda: torch.func.grad(lambda *inputs: call(*inputs).sum())(*tensors)),
            (transform, lambda: torch.func.jvp(call, tuple(tensors), tuple(tensors))),
            ("torch.jit.trace is recording", lambda: torch.jit.trace(lambda *inputs: call(*inputs), tuple(tensors))),
            ("not Tagged", lambda: call(*tagged)),
        ]:
            with pytest.raises(
                BackendError, match=rf"{call.op}: backend {kernels} cannot serve this call: .*({reason})"
            ):
                attempt()
        with FlopCounterMode(display=False), pytest.raises(BackendError, match="dispatch mode"):
            call(*tensors)
        out, inner = call(*leaves), call.op.removeprefix("gated_") if "pool" in call.op else call.op
        with pytest.raises(BackendError, match=f"gradient of {inner}: backend {kernels} .*{transform}"):
            torch.autograd.grad(out, leaves, torch.ones(3, *out.shape), is_grads_batched=True)
