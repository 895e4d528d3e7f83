"""consensus_map's CUDA kernels for 7x7 and for 14x14 maps on channels_last memory, on the CPU (csrc/simt): which calls
they serve, and that they give what they give for contiguous maps, bit by bit."""

import itertools

import pytest
import torch

import exact
import simt_cases
from m3em_fast import backends
from op_cases import HALF, Call, check, lay_out, random_grad, random_tensors
from simt_cases import ORDERS, consensus_map_backward, consensus_map_forward, forms, forms_of_consensus_map

CALL = Call("consensus_map")
# Packs of channels, fewer than a team of threads has and a part more; tiles of either pass, full, several and a part of
# one; and chunks, one to four.
SINGLE = {7: (4, 28, 32, 36, 64, 68, 132, 300, 512), 14: (4, 16, 20, 36, 40, 144, 148, 300, 580)}
HALVES = {7: (8, 56, 64, 72, 128, 136, 264, 512, 648), 14: (8, 16, 24, 32, 40, 72, 144, 296, 312, 616)}
SIZES = [(torch.float32, side, d) for side in SINGLE for d in SINGLE[side]]
SIZES += [(dtype, side, d) for dtype in HALF for side in HALVES for d in HALVES[side]]
SOME = [(torch.float32, 7, 68), (torch.float16, 7, 136), (torch.bfloat16, 7, 72)]
SOME += [(torch.float32, 14, 40), (torch.float16, 14, 40), (torch.bfloat16, 14, 72)]


@pytest.fixture(autouse=True)
def driver():
    with simt_cases.simt() as found:
        found.log()
        yield found


def last(t):
    return lay_out(t, "channels_last")


def special(side):
    return forms_of_consensus_map(f"{side}x{side}", f"{side}x{side}")


def results(a, b, grad, layouts):
    out, stats = consensus_map_forward(a, b)
    gradients = consensus_map_backward(a, b, grad, stats, layouts)
    return [out, stats, *(g for g in gradients if g is not None)]


def same(some, others):
    return len(some) == len(others) and all(map(torch.equal, some, others))


def given(dtype, side, d, n=2):
    a, b = random_tensors(CALL, n, d, side, side, dtype)
    return a, b, random_grad(torch.empty(n, 1, side, side, dtype=dtype))


@pytest.mark.parametrize(("dtype", "side", "d"), SIZES, ids=str)
def test_the_same_as_of_contiguous_maps(driver, dtype, side, d):
    a, b, grad = given(dtype, side, d)
    wanted = results(a, b, grad, ["contiguous"] * 2)
    assert same(results(last(a), last(b), grad, ["channels_last"] * 2), wanted)
    assert forms(driver) == special(side) * 2
    check("simt", CALL, [last(a), last(b)], grad=grad)
    assert forms(driver) == special(side)


@pytest.mark.parametrize(("dtype", "side", "d"), SOME, ids=str)
def test_one_gradient_alone(driver, dtype, side, d):
    a, b, grad = given(dtype, side, d)
    out, stats, *gradients = results(a, b, grad, ["contiguous"] * 2)
    driver.log()
    for i, layouts in enumerate((("channels_last", None), (None, "channels_last"))):
        assert same(results(last(a), last(b), grad, layouts), [out, stats, gradients[i]])
        assert forms(driver) == special(side)


@pytest.mark.parametrize(("dtype", "side", "d"), SOME, ids=str)
def test_maps_of_both_layouts(driver, dtype, side, d):
    """A pass that has one of each is for the kernels for any map."""
    a, b, grad = given(dtype, side, d)
    both = "contiguous", "channels_last"
    exactly = [CALL.exact([a, b]), *CALL.exact_gradients([a, b], grad)]
    for first, second, *layouts in itertools.product(both, both, (None, *both), (None, *both)):
        if layouts == [None, None]:
            continue
        out, stats = consensus_map_forward(lay_out(a, first), lay_out(b, second))
        gradients = consensus_map_backward(lay_out(a, first), lay_out(b, second), grad, stats, layouts)
        for found, wanted in zip([out, *gradients], exactly, strict=True):
            if found is not None:
                exact.assert_close(found, wanted.value, exact.bound(wanted, dtype, torch.float32))
        forward = f"{side}x{side}" if first == second else "any"
        alike = {first, second, *layouts} - {None} in ({"contiguous"}, {"channels_last"})
        assert forms(driver) == forms_of_consensus_map(forward, f"{side}x{side}" if alike else "any")


@pytest.mark.parametrize(("dtype", "side", "d"), SOME, ids=str)
def test_no_order_of_threads_changes_a_bit(driver, dtype, side, d):
    a, b, grad = given(dtype, side, d)
    found = []
    for order in ORDERS:
        driver.order(order)
        found.append(results(last(a), last(b), grad, ["channels_last"] * 2))
    assert same(found[0], found[1]) and same(found[0], found[2])


def beside(t, channels=0, step=1, samples=0):
    """The same numbers of more channels, of a map with columns or samples between that nobody reads."""
    n, d, h, w = t.shape
    whole = t.new_full(((1 + samples) * n, h, step * w, d + channels), torch.nan)
    whole = whole[: whole.numel() // whole[0].numel() * n // n]
    view = whole[:: 1 + samples, :, ::step, :d].permute(0, 3, 1, 2)
    return view.copy_(t)


@pytest.mark.parametrize(("dtype", "side", "d"), SOME, ids=str)
@pytest.mark.parametrize("which", [0, 1], ids=["a", "b"])
def test_where_a_map_lies(driver, dtype, side, d, which):
    """One map alone decides; what is beside its numbers is NaN."""
    a, b, grad = given(dtype, side, d)
    pack = 16 // dtype.itemsize
    wanted = results(a, b, grad, ["contiguous"] * 2)
    driver.log()

    def behind(t, count):
        buffer = t.new_full((t.numel() + count,), torch.nan)
        return buffer[count:].as_strided(t.shape, last(t).stride()).copy_(t)

    places = {
        "of more channels": (lambda t: beside(t, channels=pack), True),
        "of more channels, no packs": (lambda t: beside(t, channels=1), False),
        "every other column": (lambda t: beside(t, step=2), True),
        "every other sample": (lambda t: beside(t, samples=1), True),
        "a pack on": (lambda t: behind(t, pack), True),
        "one number on": (lambda t: behind(t, 1), False),
        "rows behind columns": (lambda t: last(t.transpose(2, 3)).transpose(2, 3), False),
        "one sample for all": (lambda t: last(t[:1]).expand(t.shape), True),
    }
    for name, (place, fits) in places.items():
        maps = [last(a), last(b)]
        maps[which] = place(maps[which])
        found = results(*maps, grad, ["channels_last"] * 2)
        assert forms(driver) == (special(side) if fits else ["any"] * 3), name
        if name != "one sample for all" and fits:
            assert same(found, wanted), name
        check("simt", CALL, maps, grad=grad)
        driver.log()


@pytest.mark.parametrize(
    ("dtype", "side", "d"), [(torch.float32, 7, 6), (torch.float16, 7, 12), (torch.float16, 14, 4)], ids=str
)
def test_channels_that_are_no_whole_packs(driver, dtype, side, d):
    a, b, grad = given(dtype, side, d)
    check("simt", CALL, [last(a), last(b)], grad=grad)
    assert forms(driver) == ["any"] * 3


def test_one_channel_is_contiguous_too(driver):
    a, b, grad = given(torch.float32, 14, 1)
    check("simt", CALL, [t.as_strided(t.shape, (196, 1, 14, 1)) for t in (a, b)], grad=grad)
    assert forms(driver) == special(14)


LOAD = "T *const to = (second ? {} : {})"
# What would go wrong on a card -> the kernels' file, a place in it, and what stands there instead. Barriers that no
# order of threads shows are for ThreadSanitizer (tests/test_simt_sanitizers.py).
FAULTS = {
    "a part is taken for two": ("last", "(part / 2 * Beside", "(part * Beside"),
    "one column for all": (
        "last",
        "column * map.stride[3];\n            T *const",
        "0 * column;\n            T *const",
    ),
    "a part of a tile is left out": ("last", "part < 2 * Parts;", "part < 2 * Parts - 1;"),
    "a pack too few": ("last", "* E; c < count)", "* E; c < count - E)"),
    "lines that follow each other": ("last", "from + y * map.stride[2]", "from + y * Side * E"),
    "the other map's numbers": ("last", LOAD.format("tile_b", "tile_a"), LOAD.format("tile_a", "tile_b")),
    "the other map's gradient": ("last", "second ? m.grad_b : m.grad_a", "second ? m.grad_a : m.grad_b"),
    "7x7: a barrier is missing before others' numbers are added up": (
        "seven",
        "channels, tile_a, tile_b);\n            __syncthreads();\n",
        "channels, tile_a, tile_b);\n",
    ),
    "7x7: a barrier is missing before gradients are stored": (
        "seven",
        "            __syncthreads();\n            SevenLast",
        "            SevenLast",
    ),
    "7x7: gradients of the first tile again": (
        "seven",
        "SevenLast<T, Rows>::store(m, part.n, part.c0 + first",
        "SevenLast<T, Rows>::store(m, part.n, part.c0",
    ),
    "14x14: gradients of the first tile again": (
        "fourteen",
        "::store(m, part.n, part.c0 + first",
        "::store(m, part.n, part.c0",
    ),
}
SIDES = {"last": (7, 14), "seven": (7,), "fourteen": (14,)}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_seeded_fault_is_caught(tmp_path, monkeypatch, fault):
    name, right, wrong = FAULTS[fault]
    cases = [given(dtype, side, 312) for side in SIDES[name] for dtype in (torch.float32, torch.float16)]
    healthy = [results(*case, ["contiguous"] * 2) for case in cases]
    monkeypatch.setattr(backends, "simulated", None)
    faulty = simt_cases.with_fault(tmp_path, "consensus_map", f"cuda/consensus_map_{name}.cuh", right, wrong)
    for (a, b, grad), expected in zip(cases, healthy, strict=True):

        def run(maps=(a, b), grad=grad, expected=expected):
            assert same(results(*map(last, maps), grad, ["channels_last"] * 2), expected)

        assert simt_cases.orders_that_catch(faulty, run), (a.shape, a.dtype)
