"""consensus_pool's kernels for whole packs of 16 bytes, on the CPU (csrc/simt): which calls they serve, every way in
which a pack can lie over two channels, and that no channel reaches its neighbour."""

import itertools

import pytest
import torch

import m3em_fast
import simt_cases
from op_cases import HALF, Call, check, lay_out, random_grad, random_tensors
from simt_cases import ORDERS

POOL, WEIGHTED = Call("consensus_pool"), Call("consensus_pool", cmap=True)
PACKED = pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
NAMES = {torch.float64: "f64", torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
# A few packs, rounds of steps and parts of one, two and four chunks (the last one shorter), two tiles in half and in
# float32, a step of one channel whose packs are added by sixteen threads.
SHAPES = [(2, 24, 7, 7), (1, 8, 7, 7), (1, 400, 7, 7), (1, 712, 7, 7), (2, 20, 14, 14), (1, 80, 28, 28), (1, 104, 7, 8)]
SHAPES += [(3, 16, 3, 3), (1, 480, 3, 3), (2, 8, 5, 5), (1, 41, 1, 16), (1, 300, 2, 4), (1, 3, 8, 28), (1, 3, 32, 28)]


@pytest.fixture(autouse=True)
def driver():
    """Memory that nobody has written to is NaN, and every kernel is one of those for cards."""
    found, _ = simt_cases.simulated()
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    with m3em_fast.backend("simt"):
        yield found
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
    found.order("forward")


def forms(driver):
    """Of forward and backward, as far as they were launched since the last call."""
    names = [call.subject.split()[0] for call in driver.log() if call.name == "cuLaunchKernel"]
    return [name.rsplit("_", 1)[1] for name in names if "_finish_" not in name]


def bits(call, tensors, grad=None, needs=("x", "cmap")):
    leaves = [t.detach().requires_grad_(name in needs) for name, t in zip(call.names, tensors, strict=True)]
    out = call(*leaves)
    grad = random_grad(out) if grad is None else grad
    return [out.detach(), *torch.autograd.grad(out, [leaf for leaf in leaves if leaf.requires_grad], grad)]


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@PACKED
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(driver, dtype, shape):
    driver.log()
    check("simt", POOL, random_tensors(POOL, *shape, dtype))
    assert forms(driver) == ["packs"]
    tensors = random_tensors(WEIGHTED, *shape, dtype)
    for needs in ((), ("x",), ("cmap",), ("x", "cmap")):
        check("simt", WEIGHTED, tensors, needs=needs)
        assert forms(driver) == ["packs", "packs"][: 1 + bool(needs)]


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_a_float32_map_beside_half_numbers(driver, dtype):
    driver.log()
    check("simt", WEIGHTED, random_tensors(WEIGHTED, 2, 24, 7, 7, dtype, torch.float32))
    assert forms(driver) == ["packs", "packs"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_map_of_any_length(driver, dtype):
    """Eight channels are whole packs whatever their length, and every remainder of a pack is met."""
    wide = 16 // dtype.itemsize
    for p in (*range(1, 34), 63, 127, 223, 225, 2048):
        driver.log()
        check("simt", WEIGHTED, random_tensors(WEIGHTED, 1, 8, 1, p, dtype))
        served = p >= wide and p not in (225, 2048)  # their steps of whole channels are longer than a block
        assert forms(driver) == ["packs" if served else "any"] * 2, p


def off(x, count):
    """The same numbers, `count` numbers behind an address of whole packs."""
    buffer = x.new_full((x.numel() + count,), torch.nan)
    buffer[count:] = x.flatten()
    return buffer[count:].view(x.shape)


def part_of_more(x, channels):
    """The same numbers, in a batch whose samples have more channels."""
    more = x.new_full((x.shape[0], channels, *x.shape[2:]), torch.nan)
    more[:, : x.shape[1]] = x
    return more[:, : x.shape[1]]


# What happens to x of (2,24,7,7), and what serves it.
PLACED = {
    "one number on": (lambda x: off(x, 1), "any"),
    "half a pack on": (lambda x: off(x, 8 // x.itemsize), "any"),
    "a pack on": (lambda x: off(x, 16 // x.itemsize), "packs"),
    "samples of whole packs": (lambda x: part_of_more(x, 32), "packs"),
    "samples of other lengths": (lambda x: part_of_more(x, 25), "any"),
    "the last samples": (lambda x: torch.cat([x[:1], x])[1:], "packs"),
    "one sample for all": (lambda x: lay_out(x, "expanded"), "packs"),
    "channels_last": (lambda x: lay_out(x, "channels_last"), "any"),
    "sliced": (lambda x: lay_out(x, "sliced"), "any"),
}


@PACKED
@pytest.mark.parametrize("place", PLACED)
def test_where_x_lies_decides_the_form(driver, dtype, place):
    laid, form = PLACED[place]
    x, cmap = random_tensors(WEIGHTED, 2, 24, 7, 7, dtype)
    driver.log()
    check("simt", WEIGHTED, [laid(x), cmap])
    assert forms(driver) == [form, form]


@PACKED
@pytest.mark.parametrize("shape", [(2, 25, 7, 7), (2, 3, 5, 3), (2, 5, 1, 1), (1, 3, 2, 1), (1, 2, 60, 61)], ids=str)
def test_whatever_is_no_whole_packs_is_served_too(driver, dtype, shape):
    x, cmap = random_tensors(WEIGHTED, *shape, dtype)
    driver.log()
    for each in (x, part_of_more(x, 32)):  # whose samples begin with whole packs and do not end so
        check("simt", WEIGHTED, [each, cmap])
        assert forms(driver) == ["any", "any"]


def test_float64_is_served_by_the_general_form(driver):
    driver.log()
    check("simt", WEIGHTED, random_tensors(WEIGHTED, 2, 24, 7, 7, torch.float64))
    assert forms(driver) == ["any", "any"]


@PACKED
@pytest.mark.parametrize("shape", [(1, 24, 7, 7), (1, 8, 3, 3), (1, 24, 14, 14)], ids=str)
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_no_channel_reaches_its_neighbour(dtype, shape, value):
    x, cmap = random_tensors(WEIGHTED, *shape, dtype)
    grad = random_grad(WEIGHTED(x, cmap))
    out, grad_x, grad_cmap = bits(WEIGHTED, [x, cmap], grad)
    for c in range(0, shape[1], 3):
        wrong, wrong_grad = x.clone(), grad.clone()
        wrong[:, c] = value
        wrong_grad[:, c] = value
        others = [i for i in range(shape[1]) if i != c]
        found = WEIGHTED(wrong, cmap)
        assert torch.equal(found[:, others], out[:, others])
        assert not found[:, c].isfinite().any()
        found = bits(WEIGHTED, [x, cmap], wrong_grad)[1]
        assert torch.equal(found[:, others], grad_x[:, others])
        assert not found[:, c].isfinite().any()
    # A position of one channel reaches that of the map, and no other.
    wrong = x.clone()
    wrong[0, 2, -1, -1] = value
    found = bits(WEIGHTED, [wrong, cmap], grad)[2]
    assert torch.equal(found.flatten()[:-1], grad_cmap.flatten()[:-1]) and not found.flatten()[-1].isfinite()


@PACKED
@pytest.mark.parametrize("shape", [(3, 400, 7, 7), (3, 24, 14, 14)], ids=str)
def test_a_clip_does_not_depend_on_the_batch(driver, dtype, shape):
    tensors = random_tensors(WEIGHTED, *shape, dtype)
    grad = random_grad(WEIGHTED(*tensors))
    whole = bits(WEIGHTED, tensors, grad)
    driver.log()
    for copy in (lambda t: t, torch.clone):
        alone = bits(WEIGHTED, [copy(t[1:2]) for t in tensors], copy(grad[1:2]))
        assert same(alone, [t[1:2] for t in whole])
    assert set(forms(driver)) == {"packs"}


@PACKED
@pytest.mark.parametrize("shape", [(1, 400, 7, 7), (1, 80, 28, 28), (1, 3, 32, 28)], ids=str)
def test_no_order_of_threads_changes_a_bit(driver, dtype, shape):
    tensors = random_tensors(WEIGHTED, *shape, dtype)
    results = []
    for order, needs in itertools.product(ORDERS, (("x", "cmap"), ("cmap",))):
        driver.order(order)
        out, *_, grad_cmap = bits(WEIGHTED, tensors, needs=needs)
        results.append([out, grad_cmap])
    assert all(same(results[0], other) for other in results[1:])
