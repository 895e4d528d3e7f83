"""channel_gate's kernels for cards, run on the CPU (csrc/simt): those for maps of whole packs of 16 bytes (`packs`), in
which a thread meets the same positions in every step, and which calls are left to those for any memory (`any`)."""

import math

import pytest
import torch

import m3em_fast
import simt_cases
from op_cases import HALF, Call, check, lay_out, random_grad, random_tensors
from simt_cases import ORDERS

# Every pack in one channel, every channel in one pack, and splits at every place; one pack a step and one channel a
# step; a channel's sums by one thread and by several; C of less than a step, of several chunks and with a last step and
# chunk that are not full.
SHAPES = [(2, 8, 7, 7), (1, 40, 7, 7), (1, 328, 7, 7), (1, 1000, 7, 7), (2, 2, 14, 14), (1, 66, 14, 14), (2, 1, 7, 8)]
SHAPES += [(1, 131, 7, 8), (1, 24, 3, 3), (1, 200, 5, 5), (2, 3, 1, 16), (1, 8, 1, 9), (1, 5, 16, 16), (1, 16, 15, 17)]
SHAPES += [(1, 5, 32, 32), (1, 24, 2, 6)]
DTYPES = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
EVERY_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(autouse=True)
def driver():
    """Memory that nobody has written to is NaN, and every kernel is one of those for cards."""
    found, _ = simt_cases.simulated()
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    with m3em_fast.backend("simt"):
        found.log()
        yield found
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
    found.order("forward")


def launched(driver):
    """The form of every kernel of channel_gate, by stage, and its blocks."""
    subjects = [call.subject.split() for call in driver.log() if call.name == "cuLaunchKernel"]
    assert all(name.startswith("channel_gate_") for name, *_ in subjects)
    stages = [name.removeprefix("channel_gate_").split("_") for name, *_ in subjects]
    blocks = {stage: int(words[1].removeprefix("blocks=")) for (stage, *_), words in zip(stages, subjects, strict=True)}
    return {stage: form for stage, _, form in stages}, blocks


def forms(driver):
    return launched(driver)[0]


def both(form):
    return {"forward": form, "backward": form}


@EVERY_DTYPE
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("gates", [1, 2, 3, 8])
def test_values_and_gradients(driver, dtype, shape, gates):
    call = Call("channel_gate", gates=gates)
    check("simt", call, random_tensors(call, *shape, dtype))
    assert forms(driver) == both("packs")


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("gates", [1, 2, 5])
def test_float32_gates_beside_half_maps(driver, dtype, gates):
    call = Call("channel_gate", gates=gates)
    check("simt", call, random_tensors(call, 2, 88, 7, 7, dtype, torch.float32))
    assert forms(driver) == both("packs")


@EVERY_DTYPE
@pytest.mark.parametrize("gates", [1, 2, 3])
def test_gradients_of_some_alone(driver, dtype, gates):
    call = Call("channel_gate", gates=gates)
    tensors = random_tensors(call, 2, 48, 7, 7, dtype)
    every = call.names
    for needs in ([name] for name in every):
        check("simt", call, tensors, needs=needs)
    for frozen in every:
        check("simt", call, tensors, needs=[name for name in every if name != frozen] or every)
    assert forms(driver) == both("packs")


@EVERY_DTYPE
@pytest.mark.parametrize("shape", [(1, 48, 7, 7), (1, 6, 14, 14), (1, 8, 15, 17)], ids=str)
@pytest.mark.parametrize("gates", [1, 2])
@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_channel_that_is_not_finite_spares_its_neighbours(driver, dtype, shape, gates, bad):
    """Bit by bit: a number times 0 would be NaN."""
    call, middle = Call("channel_gate", gates=gates), shape[1] // 2
    grad = random_grad(torch.empty(1, gates * shape[1], *shape[2:], dtype=dtype))
    others = torch.arange(shape[1]) != middle

    def run(tensors, grad):
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        out = call(*leaves)
        found = [out.detach().unflatten(1, (gates, -1)), *torch.autograd.grad(out, leaves, grad)]
        return [found[0][:, :, others], *(tensor[:, others] for tensor in found[1:])], found

    tensors = random_tensors(call, *shape, dtype)
    clean, _ = run(tensors, grad)
    spoilt = [[tensor.clone() for tensor in tensors] for _ in tensors]
    for index, changed in enumerate(spoilt):
        changed[index][:, middle] = bad
    bad_grad = grad.clone()
    bad_grad[:, middle] = bad
    for changed, incoming in [*((changed, grad) for changed in spoilt), (tensors, bad_grad)]:
        found, whole = run(changed, incoming)
        assert all(map(torch.equal, clean, found))
        assert not all(tensor.isfinite().all() for tensor in whole)
    assert forms(driver) == both("packs")


def shifted(tensor):
    """The same numbers, where no pack is aligned."""
    buffer = tensor.new_empty(tensor.numel() + 1)
    return buffer[1:].view(tensor.shape).copy_(tensor)


def cut(tensor, more):
    """The same numbers in a map of more channels, and so with longer steps from sample to sample."""
    n, c, h, w = tensor.shape
    return tensor.new_full((n, c + more, h, w), torch.nan)[:, :c].copy_(tensor)


@EVERY_DTYPE
@pytest.mark.parametrize(
    ("change", "forward", "backward"),
    [
        (lambda x, grad: (shifted(x), grad), "any", "any"),
        (lambda x, grad: (x, shifted(grad)), "packs", "any"),
        (lambda x, grad: (cut(x, 1), grad), "any", "any"),
        (lambda x, grad: (x, cut(grad, 1)), "packs", "any"),
        (lambda x, grad: (cut(x, 8), cut(grad, 8)), "packs", "packs"),
        (lambda x, grad: (lay_out(x, "channels_last"), lay_out(grad, "channels_last")), "any", "any"),
        (lambda x, grad: (x, lay_out(grad, "channels_last")), "packs", "any"),
        (lambda x, grad: (x, lay_out(grad, "spread")), "packs", "any"),
        (lambda x, grad: (lay_out(x, "expanded"), lay_out(grad, "expanded")), "packs", "packs"),
    ],
    ids=[
        "x shifted",
        "gradient shifted",
        "x cut",
        "gradient cut",
        "both cut in packs",
        "channels_last",
        "gradient channels_last",
        "gradient spread",
        "expanded over the batch",
    ],
)
def test_memory_decides_between_the_kernels(driver, dtype, change, forward, backward):
    call = Call("channel_gate", gates=2)
    x, *gates = random_tensors(call, 2, 16, 7, 7, dtype)
    x, grad = change(x, random_grad(torch.empty(2, 32, 7, 7, dtype=dtype)))
    check("simt", call, [x, *gates], grad=grad)
    assert forms(driver) == {"forward": forward, "backward": backward}


@EVERY_DTYPE
def test_gated_copies_that_begin_within_a_pack(driver, dtype):
    """Samples of x and of the result begin with whole packs, the second copy in a sample does not."""
    call, wide = Call("channel_gate", gates=2), 16 // dtype.itemsize
    x, *gates = random_tensors(call, 2, wide + wide // 2, 7, 7, dtype)
    check("simt", call, [cut(x, wide // 2), *gates])
    assert forms(driver) == both("any")


# Half a pack too many; positions that fill no pack; more of them than threads can walk over together.
@pytest.mark.parametrize(
    ("dtype", "shape"),
    [
        (torch.float16, (1, 12, 7, 7)),
        (torch.float32, (1, 3, 7, 7)),
        (torch.float16, (1, 8, 1, 7)),
        (torch.float32, (1, 4, 1, 3)),
        (torch.bfloat16, (1, 4, 56, 56)),
        (torch.float32, (1, 1, 40, 40)),
        (torch.float64, (1, 16, 7, 7)),
    ],
    ids=str,
)
def test_shapes_that_are_left_to_the_kernels_for_any_memory(driver, dtype, shape):
    call = Call("channel_gate", gates=2)
    check("simt", call, random_tensors(call, *shape, dtype))
    assert forms(driver) == both("any")


def results(call, tensors, grad):
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    out = call(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


@EVERY_DTYPE
@pytest.mark.parametrize("shape", [(3, 648, 7, 7), (3, 10, 14, 14)], ids=str)
@pytest.mark.parametrize("gates", [2, 3])
def test_a_sample_does_not_depend_on_the_batch(driver, dtype, shape, gates):
    call = Call("channel_gate", gates=gates)
    tensors = random_tensors(call, *shape, dtype)
    grad = random_grad(torch.empty(3, gates * shape[1], *shape[2:], dtype=dtype))
    whole = results(call, tensors, grad)
    found, blocks = launched(driver)
    alone = results(call, [tensor[1:2] for tensor in tensors], grad[1:2])
    assert all(torch.equal(one[1:2], other) for one, other in zip(whole, alone, strict=True))
    assert (found, {stage: count // 3 for stage, count in blocks.items()}) == launched(driver)


@EVERY_DTYPE
@pytest.mark.parametrize("shape", [(1, 328, 7, 7), (1, 4, 32, 32)], ids=str)
@pytest.mark.parametrize("gates", [2, 3])
def test_no_order_of_threads_changes_a_bit(driver, dtype, shape, gates):
    call = Call("channel_gate", gates=gates)
    tensors = random_tensors(call, *shape, dtype)
    grad = random_grad(torch.empty(1, gates * shape[1], *shape[2:], dtype=dtype))
    found = []
    for order in ORDERS:
        driver.order(order)
        found.append(results(call, tensors, grad))
    assert all(torch.equal(one, other) for more in found[1:] for one, other in zip(found[0], more, strict=True))
    assert forms(driver) == both("packs")
