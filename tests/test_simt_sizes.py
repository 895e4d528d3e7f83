"""consensus_map's CUDA kernels for 7x7 and for 14x14 maps on the CPU (csrc/simt): which calls they serve, every kind of
tail and of chunk, what NaN, infinity and zeros reach."""

import subprocess

import numpy as np
import pytest
import torch

import exact
import simt_cases
from m3em_fast.backends import native
from m3em_fast.ops._cpu import DTYPES as NUMBERS
from op_cases import HALF, Call, check, lay_out, random_grad, random_tensors
from simt_cases import ORDERS, ROOT, form_of_consensus_map, forms, forms_of_consensus_map
from simt_cases import consensus_map_backward as backward
from simt_cases import consensus_map_forward as forward

CALL = Call("consensus_map")
ELEMENT = {torch.float32: 4, torch.float16: 2, torch.bfloat16: 2}
SINGLE = {7: (4, 60, 64, 68, 132, 256, 300, 512), 14: (1, 17, 18, 19, 37, 144, 300, 577)}
HALVES = {7: (8, 16, 120, 128, 136, 200, 256, 512, 648, 1024), 14: (2, 16, 18, 20, 36, 38, 56, 72, 288, 310, 614)}
# One chunk to four, each with a full tile of the two passes, several, a part of one, or a part behind full ones.
SERVED = [(torch.float32, side, d) for side in SINGLE for d in SINGLE[side]]
SERVED += [(dtype, side, d) for dtype in HALF for side in HALVES for d in HALVES[side]]
SOME = [(torch.float32, 7, 4), (torch.float32, 7, 300), (torch.float16, 7, 8), (torch.bfloat16, 7, 200)]
SOME += [(torch.float32, 14, 3), (torch.float32, 14, 100), (torch.float16, 14, 2), (torch.bfloat16, 14, 74)]
LARGER = [(torch.float16, 7, 648), (torch.float16, 14, 310)]


@pytest.fixture(autouse=True)
def driver():
    with simt_cases.simt() as found:
        yield found


def special(side):
    return f"{side}x{side}"


def served(driver, tensors, form=None, **options):
    """Checked results of the kernels for this size, or of those of another form."""
    driver.log()
    found = check("simt", CALL, tensors, **options)
    form = form or special(tensors[0].shape[2])
    assert forms(driver) == forms_of_consensus_map(form, form)
    return found


@pytest.mark.parametrize(("dtype", "side", "d"), SERVED, ids=str)
def test_every_tail_and_chunk(driver, dtype, side, d):
    served(driver, random_tensors(CALL, 1, d, side, side, dtype))


@pytest.mark.parametrize(
    ("dtype", "side", "d"),
    [(torch.float32, 7, 130), (torch.float32, 7, 1), (torch.float16, 7, 132), (torch.float16, 14, 37)],
    ids=str,
)
def test_channels_that_are_no_whole_packs(driver, dtype, side, d):
    served(driver, random_tensors(CALL, 1, d, side, side, dtype), "any")


@pytest.mark.parametrize(("dtype", "side", "d"), SOME, ids=str)
def test_the_gradient_of_one_map_is_that_of_both(driver, dtype, side, d):
    tensors = random_tensors(CALL, 2, d, side, side, dtype)
    _, both = served(driver, tensors)
    for name, of_both in zip(CALL.names, both, strict=True):
        _, (alone,) = served(driver, tensors, needs=[name])
        assert torch.equal(alone, of_both)


@pytest.mark.parametrize(("dtype", "side", "d"), [*SOME, *LARGER], ids=str)
def test_no_order_of_threads_changes_a_bit(driver, dtype, side, d):
    tensors, results = random_tensors(CALL, 2, d, side, side, dtype), []
    for order in ORDERS:
        driver.order(order)
        out, gradients = served(driver, tensors)
        results.append([out.detach(), *gradients])
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.parametrize(("dtype", "side", "d"), [*SOME, *LARGER], ids=str)
def test_a_clip_does_not_depend_on_the_batch(driver, dtype, side, d):
    a, b = random_tensors(CALL, 4, d, side, side, dtype)
    grad = random_grad(CALL(a, b))
    out, whole = served(driver, [a, b], grad=grad)
    for part in (slice(0, 1), slice(1, 2), slice(1, None)):
        found, alone = served(driver, [a[part], b[part].clone()], grad=grad[part])
        assert torch.equal(out[part], found)
        assert all(torch.equal(one[part], other) for one, other in zip(whole, alone, strict=True))


def moved(t, elements, pitch=0):
    """The same numbers behind a stretch of NaN, samples further apart than they are long by `pitch`."""
    n, d, h, w = t.shape
    step = d * h * w + pitch
    buffer = t.new_full([64 + elements + n * step], torch.nan)
    start = -buffer.data_ptr() % 64 // t.element_size() + elements
    view = buffer.as_strided(t.shape, (step, h * w, w, 1), start)
    view.copy_(t)
    return view


@pytest.mark.parametrize(("dtype", "side", "d"), SOME, ids=str)
@pytest.mark.parametrize("which", [0, 1], ids=["a", "b"])
def test_where_the_memory_of_a_map_begins(driver, dtype, side, d, which):
    """One map alone decides; the other one is as it should be."""
    tensors, pack = random_tensors(CALL, 2, d, side, side, dtype), 16 // ELEMENT[dtype]
    wanted = served(driver, tensors)
    for elements, pitch, form in ((1, 0, "any"), (pack - 1, 0, "any"), (pack, 0, None), (0, 1, "any")):
        one = moved(tensors[which], elements, pitch)
        both = [one, tensors[1]] if which == 0 else [tensors[0], one]
        found = served(driver, both, form)
        if form is None:
            assert torch.equal(found[0], wanted[0]) and all(map(torch.equal, found[1], wanted[1]))
    one = moved(tensors[which], pack, pack)
    served(driver, [one, tensors[1]] if which == 0 else [tensors[0], one])


@pytest.mark.parametrize(("dtype", "side", "d"), SOME, ids=str)
def test_strides_of_maps(driver, dtype, side, d):
    for layout in ("expanded", "channels_last", "transposed", "spread"):
        for layouts in ([layout] * 2, ["contiguous", layout]):
            tensors = random_tensors(CALL, 2, d, side, side, dtype, layouts=layouts)
            driver.log()
            _, gradients = check("simt", CALL, tensors)
            passes = tensors, [*tensors, *gradients]
            assert forms(driver) == forms_of_consensus_map(*(form_of_consensus_map(CALL, *maps) for maps in passes))
            for one, other in zip(gradients, tensors, strict=True):
                assert one.shape == other.shape
    wider = random_tensors(CALL, 2, 2 * d, side, side, dtype)
    served(driver, [t[:, d:] for t in wider])


@pytest.mark.parametrize(("dtype", "side", "d"), SOME, ids=str)
@pytest.mark.parametrize("layout", ["sliced", "transposed", "expanded", "spread"])
def test_strides_of_the_incoming_gradient(driver, dtype, side, d, layout):
    served(driver, random_tensors(CALL, 2, d, side, side, dtype), grad_layout=layout)


@pytest.mark.parametrize(("dtype", "side", "d"), SOME, ids=str)
@pytest.mark.parametrize(
    ("first", "second", "layouts", "fit"),
    [
        ("contiguous", "contiguous", ("transposed", "contiguous"), (True, False)),
        ("contiguous", "contiguous", ("contiguous", "sliced"), (True, False)),
        ("contiguous", "contiguous", (None, "transposed"), (True, False)),
        ("contiguous", "transposed", ("contiguous", "contiguous"), (True, False)),
        ("transposed", "contiguous", ("contiguous", "contiguous"), (False, True)),
        ("sliced", "contiguous", ("contiguous", None), (False, True)),
    ],
)
def test_each_pass_understands_the_other_form(driver, dtype, side, d, first, second, layouts, fit):
    """What the forward leaves for the backward is the same in both forms."""
    tensors = random_tensors(CALL, 2, d, side, side, dtype)
    tensors[0][1, :, 2, 3] = 0  # a cell without a norm
    grad = random_grad(torch.empty(2, 1, side, side, dtype=dtype))
    driver.log()
    out, stats = forward(*(lay_out(t, first) for t in tensors))
    gradients = backward(*(lay_out(t, second) for t in tensors), grad, stats, layouts)
    assert forms(driver) == forms_of_consensus_map(*(special(side) if fits else "any" for fits in fit))
    wanted = CALL.exact(tensors)
    exact.assert_close(out, wanted.value, exact.bound(wanted, dtype, torch.float32))
    for gradient, wanted in zip(gradients, CALL.exact_gradients(tensors, grad), strict=True):
        if gradient is not None:
            exact.assert_close(gradient, wanted.value, exact.bound(wanted, dtype, torch.float32))


# Of the cells in their order: the window, and the positions of the result that read it, with their weights.
CELLS = {
    n: [(rows, columns, exact._readers(cell, n, n, k, float)) for k, cell, rows, columns in exact._cells(n, n, 3)]
    for n in (7, 14)
}
# Corners, and positions of one window of the coarser scales, of two along either side, and of four.
PLACES = {
    7: [(0, 0), (3, 3), (2, 3), (3, 4), (2, 4), (4, 2), (6, 6), (0, 6)],
    14: [(0, 0), (3, 5), (4, 6), (7, 9), (4, 9), (9, 4), (13, 13), (0, 13)],
}


def where(side, cells):
    """The positions that these cells pool, and those of the result that read them."""
    held, read = torch.zeros(2, side, side, dtype=torch.bool)
    for rows, columns, readers in cells:
        held[slice(*rows), slice(*columns)] = True
        for y, x, _ in readers:
            read[y, x] = True
    return held, read


def holds(cell, place):
    rows, columns, _ = cell
    return rows[0] <= place[0] < rows[1] and columns[0] <= place[1] < columns[1]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize(
    ("dtype", "side", "d"),
    [(torch.float32, 7, 300), (torch.float16, 7, 136), (torch.float32, 14, 19), (torch.float16, 14, 56)],
    ids=str,
)
def test_nan_and_infinity_reach_the_cells_that_hold_them(driver, value, dtype, side, d):
    for i, place in enumerate(PLACES[side]):
        reached = torch.tensor([holds(cell, place) for cell in CELLS[side]])
        held, read = where(side, [cell for cell in CELLS[side] if holds(cell, place)])
        for which, channel in ((0, i % d), (1, d - 1 - i)):
            tensors = random_tensors(CALL, 2, d, side, side, dtype)
            plain = forward(*tensors)[1]
            tensors[which][1, channel][place] = value
            out, stats = forward(*tensors)
            for found, wrong in ((out, read), *((g, held) for g in backward(*tensors, torch.ones_like(out), stats))):
                assert found[0].isfinite().all() and torch.equal(~found[1].isfinite(), wrong.expand(found[1].shape))
            assert torch.equal(stats[0], plain[0]) and torch.equal(stats[1, ~reached], plain[1, ~reached])
            assert stats[1, reached].isnan().any(1).all()
    assert set(forms(driver)) == {*forms_of_consensus_map(special(side), special(side))}


@pytest.mark.parametrize(
    ("dtype", "side", "d"),
    [(torch.float32, 7, 20), (torch.float16, 7, 136), (torch.float32, 14, 19), (torch.float16, 14, 20)],
    ids=str,
)
def test_every_cell_goes_back_to_its_window_alone(driver, dtype, side, d):
    """One live cell at a time; the numbers that the forward leaves are chosen."""
    a, b = random_tensors(CALL, 1, d, side, side, dtype)
    grad = random_grad(torch.empty(1, 1, side, side, dtype=dtype))
    three = 0.75, 0.5, -0.25  # 1 / (|a| |b|), cos / |a|^2, cos / |b|^2
    driver.log()
    for cell, (rows, columns, readers) in enumerate(CELLS[side]):
        stats = torch.zeros(1, len(CELLS[side]), 3)
        stats[0, cell] = torch.tensor(three)
        found = backward(a, b, grad, stats)
        window = np.s_[0, :, slice(*rows), slice(*columns)]
        mean_a, mean_b = (t.double()[window].mean((1, 2)) for t in (a, b))
        area = (rows[1] - rows[0]) * (columns[1] - columns[0])
        arriving = sum(float(grad[0, 0, y, x]) * weight for y, x, weight in readers) / area
        size = sum(abs(float(grad[0, 0, y, x])) * weight for y, x, weight in readers) / area
        for gradient, own, other, ratio in zip(found, (mean_a, mean_b), (mean_b, mean_a), three[1:], strict=True):
            wanted, scale = torch.zeros(a.shape[1:]).double(), float((own.abs() + other.abs()).max()) * size
            wanted[window[1:]] = (arriving * (three[0] * other - ratio * own))[:, None, None]
            allowed = exact.bound(exact.Exact(wanted.numpy(), scale), dtype, torch.float32)
            exact.assert_close(gradient[0], wanted.numpy(), allowed, f"cell {cell}")
            gradient[window] = 0
            assert not gradient.any()
    assert set(forms(driver)) == {special(side)}


@pytest.mark.parametrize("side", CELLS)
@pytest.mark.parametrize("dtype", ELEMENT, ids=str)
def test_nan_in_the_incoming_gradient_reaches_what_it_is_read_for(driver, dtype, side):
    """Without the cells that every position reads."""
    a, b = random_tensors(CALL, 1, 16, side, side, dtype)
    _, stats = forward(a, b)
    live = [len(readers) < side * side for _, _, readers in CELLS[side]]
    stats[:, ~torch.tensor(live)] = 0
    for place in PLACES[side]:
        grad = torch.ones(1, 1, side, side, dtype=dtype)
        grad[0, 0][place] = torch.nan
        reading = [cell for cell in CELLS[side] if place in [(y, x) for y, x, _ in cell[2]]]
        reached, _ = where(side, [cell for cell in reading if len(cell[2]) < side * side])
        for gradient in backward(a, b, grad, stats):
            assert torch.equal(gradient[0].isnan(), reached.expand(16, side, side))


@pytest.mark.parametrize(("dtype", "side", "d"), SOME, ids=str)
def test_cells_without_a_norm(driver, dtype, side, d):
    """One position, a window with all of it, and a whole sample; below eps they are as if there were nothing."""
    tiny = 1e-12 if dtype != torch.float16 else 0
    rows, columns = ((0, 3), (2, 5)) if side == 7 else ((0, 5), (4, 10))  # the window in the middle of the first row
    for value in (0, tiny):
        for which in (0, 1):
            tensors = random_tensors(CALL, 3, d, side, side, dtype)
            tensors[which][0, :, 5, 1] = value
            tensors[which][1, :, slice(*rows), slice(*columns)] = value
            tensors[which][2] = value
            out, gradients = served(driver, tensors)
            stats = forward(*tensors)[1]
            dead = torch.zeros(stats.shape[:2], dtype=torch.bool)
            dead[0, 5 * side + 1], dead[2] = True, True
            dead[1] = torch.tensor(
                [
                    rows[0] <= down[0] and down[1] <= rows[1] and columns[0] <= along[0] and along[1] <= columns[1]
                    for down, along, _ in CELLS[side]
                ]
            )
            assert dead[1].sum() == (10 if side == 7 else 30 + 6 + 1)
            assert torch.equal((stats == 0).all(2), dead)
            assert not out[2].any() and not any(g[2].any() for g in gradients)
            grad = torch.full((3, 1, side, side), torch.inf, dtype=dtype)
            assert not any(g[2].any() for g in backward(*tensors, grad, stats))


@pytest.mark.parametrize(("dtype", "side", "d"), SOME, ids=str)
def test_the_ends_of_the_range(driver, dtype, side, d):
    ends = (65504, 2.0**-12) if dtype == torch.float16 else (1e17, 2.0**-20)
    for scale in ends:
        tensors = [(t.double().clamp(-1, 1) * scale).to(dtype) for t in random_tensors(CALL, 2, d, side, side, dtype)]
        out, gradients = served(driver, tensors)
        assert all(t.isfinite().all() for t in (out, *gradients))


PROGRAM = r"""
#include "cuda/consensus_map.h"
#include <cstdio>
#include <initializer_list>
int main() {
    for (int side : {7, 14})
        for (int d = 1; d <= 1100; ++d)
            for (int element : {8, 4, 2})
                for (bool special : {false, true}) {
                    m3em::ConsensusMapArguments m = {};
                    m.n = 1, m.d = d, m.h = m.w = side, m.scales = 3;
                    const auto form = special ? m3em::ConsensusMapPlan::form_of(m, element) : m3em::MapForm::any;
                    if (special && form == m3em::MapForm::any)
                        continue;
                    const m3em::ConsensusMapPlan p(m, element, form);
                    printf("%d %d %d %d %d %d %lld %lld %lld %lld %lld\n", side, d, element, special, m.chunk, m.chunks,
                           p.workspace, p.stats, p.partial_bytes, p.finish_bytes, p.backward_bytes);
                }
}
"""


def test_what_python_asks_for_is_enough_for_every_form(tmp_path):
    command = ["g++", "-std=c++17", f"-I{ROOT}/csrc", "-x", "c++", "-", "-o", str(tmp_path / "plans")]
    subprocess.run(command, input=PROGRAM, text=True, check=True)
    lines = subprocess.run([tmp_path / "plans"], text=True, capture_output=True, check=True).stdout.splitlines()
    plans = [tuple(map(int, line.split())) for line in lines]
    assert {plan[:3] for plan in plans if plan[3]} == {
        (side, d, element)
        for side in (7, 14)
        for element in (2, 4)
        for d in range(1, 1101)
        if d * side**2 * element % 16 == 0
    }
    dtypes = {dtype.itemsize: dtype for dtype in (torch.float64, torch.float32, torch.float16)}
    for side, d, element, own, chunk, chunks, workspace, stats, *shared in plans:
        assert (chunks - 1) * chunk < d <= chunks * chunk and chunks <= 4
        assert workspace == chunks * len(CELLS[side]) * 3  # what the kernels write: three sums a cell
        asked = native.cuda_consensus_map_needs(NUMBERS[dtypes[element]], d, side, side, 3, False)
        assert asked[0] >= workspace and asked[1] == stats == len(CELLS[side]) * 3, (side, d, element)
        if own:  # without asking for more, and every chunk begins on a boundary of 16 bytes
            assert chunk * side**2 * element % 16 == 0 and max(shared) <= 48 << 10
