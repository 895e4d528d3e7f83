"""The kernels for cards on channels_last maps, run on the CPU (csrc/simt): those of whole packs of 16 bytes, in which a
thread has a pack of channels, and those that are left to one number at a time."""

import itertools

import pytest
import torch

import m3em_fast
import simt_cases
from op_cases import HALF, Call, check, lay_out, random_grad, random_tensors
from simt_cases import ORDERS, forms, forms_of_consensus_map

GATED, POOL, WEIGHTED, MAP = (
    Call("channel_gate", gates=2),
    Call("consensus_pool"),
    Call("consensus_pool", cmap=True),
    Call("consensus_map"),
)
CENTERED = Call("consensus_map", options={"center": True})
CALLS = (GATED, POOL, WEIGHTED, MAP, CENTERED)
EVERY_CALL = pytest.mark.parametrize("call", CALLS, ids=str)
PACKED = pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
# One pack; several, of which a block's threads have no whole number; a last chunk of fewer channels; positions that are
# less than a step of a block, one, and several steps; one row and one column.
SHAPES = [(2, 8, 7, 7), (1, 72, 7, 7), (2, 328, 7, 7), (1, 96, 14, 14), (1, 24, 3, 5), (2, 16, 1, 9), (2, 16, 9, 1)]
SHAPES += [(1, 40, 28, 28)]


@pytest.fixture(autouse=True)
def driver():
    """Memory that nobody has written to is NaN, and every kernel is one of those for cards."""
    with simt_cases.simt() as found:
        found.log()
        yield found


def last(tensors):
    """The same numbers, maps in channels_last memory."""
    return [lay_out(t, "channels_last") if t.dim() == 4 and t.shape[1] > 1 else t for t in tensors]


def gradient(call, tensors, layout="channels_last"):
    n, c, h, w = tensors[0].shape
    shape = {"channel_gate": (n, call.gates * c, h, w), "consensus_pool": (n, c)}.get(call.op, (n, 1, h, w))
    grad = random_grad(torch.empty(shape, dtype=tensors[0].dtype))
    return lay_out(grad, layout) if call.op == "channel_gate" else grad


def results(call, tensors, grad):
    leaves = [t.detach().requires_grad_() for t in tensors]
    out = call(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def same(one, other):
    return all(map(torch.equal, one, other))


@PACKED
@EVERY_CALL
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(driver, call, dtype, shape):
    tensors = last(random_tensors(call, *shape, dtype))
    check("simt", call, tensors, grad=gradient(call, tensors))
    form = f"{shape[2]}x{shape[3]}" if call is MAP and shape[2:] in ((7, 7), (14, 14)) else "any"
    assert set(forms(driver)) == set(forms_of_consensus_map(form, form))


@PACKED
@pytest.mark.parametrize("call", [GATED, POOL, WEIGHTED], ids=str)
def test_more_positions_than_are_weighed_at_a_time(call, dtype):
    tensors = last(random_tensors(call, 1, 8, 65, 64, dtype))
    check("simt", call, tensors, grad=gradient(call, tensors))


@PACKED
@pytest.mark.parametrize("gates", [1, 3, 4, 5, 8])
@pytest.mark.parametrize("shape", [(2, 72, 7, 7), (1, 8, 14, 14)], ids=str)
def test_any_number_of_gates(dtype, gates, shape):
    call = Call("channel_gate", gates=gates)
    tensors = last(random_tensors(call, *shape, dtype))
    check("simt", call, tensors, grad=gradient(call, tensors))


@PACKED
@pytest.mark.parametrize("call", [GATED, Call("channel_gate", gates=3), WEIGHTED, MAP], ids=str)
def test_gradients_of_some_alone(call, dtype):
    tensors = last(random_tensors(call, 2, 48, 7, 7, dtype))
    for count in range(1, len(call.names)):
        for needs in itertools.combinations(call.names, count):
            check("simt", call, tensors, needs=list(needs), grad=gradient(call, tensors))


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("call", [GATED, WEIGHTED], ids=str)
def test_float32_beside_half_maps(call, dtype):
    tensors = last(random_tensors(call, 2, 48, 7, 7, dtype, torch.float32))
    grad = gradient(call, tensors)
    check("simt", call, tensors, grad=grad.float() if call.op == "consensus_pool" else grad)


def off(t, count):
    """The same numbers and strides, so many numbers behind an address of whole packs."""
    buffer = t.new_full((t.numel() + count,), torch.nan)
    return buffer[count:].as_strided(t.shape, t.stride()).copy_(t)


def cut(t, more):
    """The same numbers, of positions that have more channels."""
    whole = lay_out(t.new_full((t.shape[0], t.shape[1] + more, *t.shape[2:]), torch.nan), "channels_last")
    return whole[:, : t.shape[1]].copy_(t)


def every_other(t, axis):
    """The same numbers, with a row or a column that nobody reads beside each."""
    shape = [size * (1 + (i == axis)) for i, size in enumerate(t.shape)]
    whole = lay_out(t.new_full(shape, torch.nan), "channels_last")
    return whole[(slice(None),) * axis + (slice(None, None, 2),)].copy_(t)


PLACES = {
    "one number on": lambda t: off(t, 1),
    "half a pack on": lambda t: off(t, 8 // t.itemsize),
    "a pack on": lambda t: off(t, 16 // t.itemsize),
    "of more channels, in packs": lambda t: cut(t, 8),
    "of more channels": lambda t: cut(t, 1),
    "every other row": lambda t: every_other(t, 2),
    "every other column": lambda t: every_other(t, 3),
    "one sample for all": lambda t: lay_out(t[:1], "channels_last").expand(t.shape),
    "contiguous": lambda t: t.contiguous(),
    "sliced": lambda t: lay_out(t, "sliced"),
    "one position for all": lambda t: lay_out(t, "spread"),
}


@PACKED
@EVERY_CALL
@pytest.mark.parametrize("place", PLACES)
def test_wherever_a_map_lies(call, dtype, place):
    """The first tensor alone, all maps, and the gradient alone."""
    tensors = last(random_tensors(call, 2, 24, 6, 4, dtype))
    grad = gradient(call, tensors)
    laid = [PLACES[place](t) if t.dim() == 4 and t.shape[1] > 1 else t for t in tensors]
    check("simt", call, [laid[0], *tensors[1:]], grad=grad)
    check("simt", call, laid, grad=PLACES[place](grad) if grad.dim() == 4 and grad.shape[1] > 1 else grad)
    if call.op == "channel_gate":
        check("simt", call, tensors, grad=PLACES[place](grad))


@PACKED
@EVERY_CALL
@pytest.mark.parametrize("axis", [2, 3], ids=["row", "column"])
def test_one_row_or_column_of_more(call, dtype, axis):
    shape = [2, 24, 5, 5]
    shape[axis] = 1

    def part(t):
        whole = [size * (1 + 3 * (i == axis)) for i, size in enumerate(t.shape)]
        return lay_out(t.new_full(whole, torch.nan), "channels_last").narrow(axis, 1, 1).copy_(t)

    tensors = [part(t) if t.dim() == 4 and t.shape[1] > 1 else t for t in random_tensors(call, *shape, dtype)]
    grad = gradient(call, tensors)
    check("simt", call, tensors, grad=part(grad) if call.op == "channel_gate" else grad)


@EVERY_CALL
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("channels", [2, 3, 12, 37])
def test_channels_that_are_no_whole_packs(call, dtype, channels):
    tensors = last(random_tensors(call, 2, channels, 7, 7, dtype))
    check("simt", call, tensors, grad=gradient(call, tensors))


@PACKED
@EVERY_CALL
@pytest.mark.parametrize("shape", [(3, 328, 7, 7), (3, 72, 14, 14)], ids=str)
def test_a_sample_does_not_depend_on_the_batch(call, dtype, shape):
    tensors = last(random_tensors(call, *shape, dtype))
    grad = gradient(call, tensors)
    whole = results(call, tensors, grad)
    alone = results(call, [t[1:2] for t in tensors], grad[1:2])
    assert same(alone, [t[1:2] for t in whole])


@PACKED
@EVERY_CALL
def test_no_order_of_threads_changes_a_bit(driver, call, dtype):
    tensors = last(random_tensors(call, 1, 136, 7, 7, dtype))
    found = []
    for order in ORDERS:
        driver.order(order)
        found.append(results(call, tensors, gradient(call, tensors)))
    assert same(found[0], found[1]) and same(found[0], found[2])


@PACKED
@pytest.mark.parametrize("call", [GATED, Call("channel_gate", gates=3), WEIGHTED], ids=str)
@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_no_channel_reaches_its_neighbour(call, dtype, value):
    """Bit by bit: a number times 0 would be NaN."""
    tensors = last(random_tensors(call, 1, 24, 7, 7, dtype))
    grad = gradient(call, tensors)
    of_channels = [t.dim() == 2 or t.shape[1] > 1 for t in tensors]  # but the gradient of the map, a sum over channels

    def others(tensors, channel):
        out, *grads = tensors
        kept = [out, *(g for g, has in zip(grads, of_channels, strict=True) if has)]
        rest = [i for i in range(24) if i != channel]
        return [t.unflatten(1, (-1, 24))[:, :, rest] for t in kept]

    clean = results(call, tensors, grad)
    for channel in (0, 7, 8, 23):
        wrong, wrong_grad = tensors[0].clone(), grad.clone()
        wrong[:, channel] = value
        wrong_grad[:, channel] = value
        for x, incoming in ((wrong, grad), (tensors[0], wrong_grad)):
            found = results(call, [x, *tensors[1:]], incoming)
            assert same(others(found, channel), others(clean, channel))
            assert not all(t.isfinite().all() for t in found)


def test_the_results_are_channels_last_too():
    x, *gates = last(random_tensors(GATED, 2, 16, 7, 7, torch.float16))
    with m3em_fast.backend("simt"):
        out, grad_x, *_ = results(GATED, [x, *gates], gradient(GATED, [x]))
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert grad_x.is_contiguous(memory_format=torch.channels_last)
