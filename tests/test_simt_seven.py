"""consensus_map's CUDA kernels for 7x7 maps on the CPU (csrc/simt): which calls they serve, every kind of tail and of
chunk, what NaN, infinity and zeros reach, and that faults seeded into copies of them are caught."""

import subprocess

import numpy as np
import pytest
import torch

import exact
import simt_cases
from m3em_fast import backends
from m3em_fast.backends import native
from m3em_fast.ops import _cuda
from m3em_fast.ops._cpu import DTYPES as NUMBERS
from op_cases import HALF, Call, check, lay_out, random_grad, random_tensors
from simt_cases import ORDERS, ROOT, launched

CALL = Call("consensus_map")
ELEMENT = {torch.float32: 4, torch.float16: 2, torch.bfloat16: 2}
SINGLE = (4, 60, 64, 68, 132, 256, 300, 512)
HALVES = (8, 16, 120, 128, 136, 200, 256, 512, 648, 1024)
# One chunk to four, each with a full tile of the two passes, several, a part of one, or a part behind full ones.
SERVED = [(torch.float32, d) for d in SINGLE] + [(dtype, d) for dtype in HALF for d in HALVES]
SOME = [(torch.float32, 4), (torch.float32, 300), (torch.float16, 8), (torch.bfloat16, 200)]


@pytest.fixture(autouse=True)
def driver():
    with simt_cases.simt() as found:
        yield found


def forms(driver):
    """Of the kernels since the last time, one after the other."""
    return [name.rsplit("_", 1)[1] for name in launched(driver)]


def served(driver, tensors, forward="7x7", backward="7x7", **options):
    driver.log()
    found = check("simt", CALL, tensors, **options)
    assert forms(driver) == [forward, forward, backward]
    return found


@pytest.mark.parametrize(("dtype", "d"), SERVED, ids=str)
def test_every_tail_and_chunk(driver, dtype, d):
    served(driver, random_tensors(CALL, 1, d, 7, 7, dtype))


@pytest.mark.parametrize(("dtype", "d"), [(torch.float32, 130), (torch.float32, 1), (torch.float16, 132)], ids=str)
def test_channels_that_are_no_whole_packs(driver, dtype, d):
    served(driver, random_tensors(CALL, 1, d, 7, 7, dtype), "any", "any")


@pytest.mark.parametrize(("dtype", "d"), SOME, ids=str)
def test_the_gradient_of_one_map_is_that_of_both(driver, dtype, d):
    tensors = random_tensors(CALL, 2, d, 7, 7, dtype)
    _, both = served(driver, tensors)
    for name, of_both in zip(CALL.names, both, strict=True):
        _, (alone,) = served(driver, tensors, needs=[name])
        assert torch.equal(alone, of_both)


@pytest.mark.parametrize(("dtype", "d"), [*SOME, (torch.float16, 648)], ids=str)
def test_no_order_of_threads_changes_a_bit(driver, dtype, d):
    tensors, results = random_tensors(CALL, 2, d, 7, 7, dtype), []
    for order in ORDERS:
        driver.order(order)
        out, gradients = served(driver, tensors)
        results.append([out.detach(), *gradients])
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.parametrize(("dtype", "d"), [*SOME, (torch.float16, 648)], ids=str)
def test_a_clip_does_not_depend_on_the_batch(driver, dtype, d):
    a, b = random_tensors(CALL, 4, d, 7, 7, dtype)
    grad = random_grad(CALL(a, b))
    out, whole = served(driver, [a, b], grad=grad)
    for part in (slice(0, 1), slice(1, 2), slice(1, None)):
        found, alone = served(driver, [a[part], b[part].clone()], grad=grad[part])
        assert torch.equal(out[part], found)
        assert all(torch.equal(one[part], other) for one, other in zip(whole, alone, strict=True))


def moved(t, elements, pitch=0):
    """The same numbers behind a stretch of NaN, samples further apart than they are long by `pitch`."""
    n, d = t.shape[:2]
    step = d * 49 + pitch
    buffer = t.new_full([64 + elements + n * step], torch.nan)
    start = -buffer.data_ptr() % 64 // t.element_size() + elements
    view = buffer.as_strided(t.shape, (step, 49, 7, 1), start)
    view.copy_(t)
    return view


@pytest.mark.parametrize(("dtype", "d"), SOME, ids=str)
@pytest.mark.parametrize("which", [0, 1], ids=["a", "b"])
def test_where_the_memory_of_a_map_begins(driver, dtype, d, which):
    """One map alone decides; the other one is as it should be."""
    tensors, pack = random_tensors(CALL, 2, d, 7, 7, dtype), 16 // ELEMENT[dtype]
    wanted = served(driver, tensors)
    for elements, pitch, form in ((1, 0, "any"), (pack - 1, 0, "any"), (pack, 0, "7x7"), (0, 1, "any")):
        one = moved(tensors[which], elements, pitch)
        both = [one, tensors[1]] if which == 0 else [tensors[0], one]
        found = served(driver, both, form, form)
        if form == "7x7":
            assert torch.equal(found[0], wanted[0]) and all(map(torch.equal, found[1], wanted[1]))
    one = moved(tensors[which], pack, pack)
    served(driver, [one, tensors[1]] if which == 0 else [tensors[0], one])


@pytest.mark.parametrize(("dtype", "d"), SOME, ids=str)
def test_strides_of_maps(driver, dtype, d):
    for layout, form in (("expanded", "7x7"), ("channels_last", "any"), ("transposed", "any"), ("spread", "any")):
        for layouts in ([layout] * 2, ["contiguous", layout]):
            tensors = random_tensors(CALL, 2, d, 7, 7, dtype, layouts=layouts)
            _, gradients = served(driver, tensors, form, form)
            for one, other in zip(gradients, tensors, strict=True):
                assert one.shape == other.shape
    wider = random_tensors(CALL, 2, 2 * d, 7, 7, dtype)
    served(driver, [t[:, d:] for t in wider])


@pytest.mark.parametrize(("dtype", "d"), SOME, ids=str)
@pytest.mark.parametrize("layout", ["sliced", "transposed", "expanded", "spread"])
def test_strides_of_the_incoming_gradient(driver, dtype, d, layout):
    served(driver, random_tensors(CALL, 2, d, 7, 7, dtype), grad_layout=layout)


def forward(a, b):
    """The result and what the backward is left with: (N, cells, 3), the cells of the finest scale first."""
    n, d, h, w = shape = a.shape
    workspace, size, _ = native.cuda_consensus_map_needs(NUMBERS[a.dtype], d, h, w, 3, False)
    module, stream = _cuda.loaded("consensus_map", a)
    out, stats, partial = a.new_empty((n, 1, h, w)), torch.empty(n, size // 3, 3), torch.empty(n * workspace)
    ends = stats.data_ptr(), partial.data_ptr(), shape, 3, False, 1e-8
    native.cuda_consensus_map_forward(module, stream, a, b, out, *ends)
    return out, stats


def backward(a, b, grad, stats, layouts=("contiguous", "contiguous")):
    """Gradients in these layouts; None for one that is not wanted."""
    module, stream = _cuda.loaded("consensus_map", a)
    found = [layout and lay_out(torch.full(a.shape, torch.nan, dtype=a.dtype), layout) for layout in layouts]
    ends = stats.data_ptr(), a.shape, 3, False, 1e-8
    native.cuda_consensus_map_backward(module, stream, a, b, grad, *found, *ends)
    return found


@pytest.mark.parametrize(("dtype", "d"), SOME, ids=str)
@pytest.mark.parametrize(
    ("first", "second", "layouts", "found"),
    [
        ("contiguous", "contiguous", ("channels_last", "contiguous"), ["7x7", "7x7", "any"]),
        ("contiguous", "contiguous", ("contiguous", "sliced"), ["7x7", "7x7", "any"]),
        ("contiguous", "contiguous", (None, "channels_last"), ["7x7", "7x7", "any"]),
        ("contiguous", "channels_last", ("contiguous", "contiguous"), ["7x7", "7x7", "any"]),
        ("channels_last", "contiguous", ("contiguous", "contiguous"), ["any", "any", "7x7"]),
        ("sliced", "contiguous", ("contiguous", None), ["any", "any", "7x7"]),
    ],
)
def test_each_pass_understands_the_other_form(driver, dtype, d, first, second, layouts, found):
    """What the forward leaves for the backward is the same in both forms."""
    tensors = random_tensors(CALL, 2, d, 7, 7, dtype)
    tensors[0][1, :, 2, 3] = 0  # a cell without a norm
    grad = random_grad(torch.empty(2, 1, 7, 7, dtype=dtype))
    driver.log()
    out, stats = forward(*(lay_out(t, first) for t in tensors))
    gradients = backward(*(lay_out(t, second) for t in tensors), grad, stats, layouts)
    assert forms(driver) == found
    wanted = CALL.exact(tensors)
    exact.assert_close(out, wanted.value, exact.bound(wanted, dtype, torch.float32))
    for gradient, wanted in zip(gradients, CALL.exact_gradients(tensors, grad), strict=True):
        if gradient is not None:
            exact.assert_close(gradient, wanted.value, exact.bound(wanted, dtype, torch.float32))


# Of the cells in their order: the window, and the positions of the result that read it, with their weights.
CELLS = [(rows, columns, exact._readers(cell, 7, 7, k, float)) for k, cell, rows, columns in exact._cells(7, 7, 3)]
# Corners, and positions of one window of the second scale, of two along either side, and of four.
PLACES = [(0, 0), (3, 3), (2, 3), (3, 4), (2, 4), (4, 2), (6, 6), (0, 6)]


def holds(cell, place):
    rows, columns, _ = CELLS[cell]
    return rows[0] <= place[0] < rows[1] and columns[0] <= place[1] < columns[1]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize(("dtype", "d"), [(torch.float32, 300), (torch.float16, 136)], ids=str)
def test_nan_and_infinity_reach_the_cells_that_hold_them(driver, value, dtype, d):
    for i, place in enumerate(PLACES):
        for which, channel in ((0, i % d), (1, d - 1 - i)):
            tensors = random_tensors(CALL, 2, d, 7, 7, dtype)
            plain = forward(*tensors)[1]
            tensors[which][1, channel][place] = value
            out, stats = forward(*tensors)
            # The last cell holds every position, so that nothing in the sample stays right.
            for found in (out, *backward(*tensors, torch.ones_like(out), stats)):
                assert found[0].isfinite().all() and not found[1].isfinite().any()
            reached = torch.tensor([holds(cell, place) for cell in range(59)])
            assert torch.equal(stats[0], plain[0]) and torch.equal(stats[1, ~reached], plain[1, ~reached])
            assert stats[1, reached].isnan().any(1).all()
    assert set(forms(driver)) == {"7x7"}


@pytest.mark.parametrize(("dtype", "d"), [(torch.float32, 20), (torch.float16, 136)], ids=str)
def test_every_cell_goes_back_to_its_window_alone(driver, dtype, d):
    """One live cell at a time; the numbers that the forward leaves are chosen."""
    a, b = random_tensors(CALL, 1, d, 7, 7, dtype)
    grad = random_grad(torch.empty(1, 1, 7, 7, dtype=dtype))
    three = 0.75, 0.5, -0.25  # 1 / (|a| |b|), cos / |a|^2, cos / |b|^2
    driver.log()
    for cell, (rows, columns, readers) in enumerate(CELLS):
        stats = torch.zeros(1, 59, 3)
        stats[0, cell] = torch.tensor(three)
        found = backward(a, b, grad, stats)
        window = np.s_[0, :, slice(*rows), slice(*columns)]
        mean_a, mean_b = (t.double()[window].mean((1, 2)) for t in (a, b))
        area = (rows[1] - rows[0]) * (columns[1] - columns[0])
        arriving = sum(float(grad[0, 0, y, x]) * weight for y, x, weight in readers) / area
        size = sum(abs(float(grad[0, 0, y, x])) * weight for y, x, weight in readers) / area
        for gradient, own, other, ratio in zip(found, (mean_a, mean_b), (mean_b, mean_a), three[1:], strict=True):
            wanted, scale = torch.zeros(d, 7, 7, dtype=torch.float64), float((own.abs() + other.abs()).max()) * size
            wanted[window[1:]] = (arriving * (three[0] * other - ratio * own))[:, None, None]
            allowed = exact.bound(exact.Exact(wanted.numpy(), scale), dtype, torch.float32)
            exact.assert_close(gradient[0], wanted.numpy(), allowed, f"cell {cell}")
            gradient[window] = 0
            assert not gradient.any()
    assert set(forms(driver)) == {"7x7"}


@pytest.mark.parametrize("dtype", ELEMENT, ids=str)
def test_nan_in_the_incoming_gradient_reaches_what_it_is_read_for(driver, dtype):
    """Without the last cell, which every position reads."""
    a, b = random_tensors(CALL, 1, 16, 7, 7, dtype)
    _, stats = forward(a, b)
    stats[:, -1] = 0
    for place in PLACES:
        grad = torch.ones(1, 1, 7, 7, dtype=dtype)
        grad[0, 0][place] = torch.nan
        reached = torch.zeros(7, 7, dtype=torch.bool)
        for rows, columns, readers in CELLS[:-1]:
            if place in [(y, x) for y, x, _ in readers]:
                reached[slice(*rows), slice(*columns)] = True
        for gradient in backward(a, b, grad, stats):
            assert torch.equal(gradient[0].isnan(), reached.expand(16, 7, 7))


@pytest.mark.parametrize(("dtype", "d"), SOME, ids=str)
def test_cells_without_a_norm(driver, dtype, d):
    """One position, a window with all of it, and a whole sample; below eps they are as if there were nothing."""
    tiny = 1e-12 if dtype != torch.float16 else 0
    for value in (0, tiny):
        for which in (0, 1):
            tensors = random_tensors(CALL, 3, d, 7, 7, dtype)
            tensors[which][0, :, 5, 1] = value
            tensors[which][1, :, :3, 2:5] = value
            tensors[which][2] = value
            out, gradients = served(driver, tensors)
            stats = forward(*tensors)[1]
            dead = torch.zeros(3, 59, dtype=torch.bool)
            dead[0, 36], dead[2] = True, True
            dead[1, [y * 7 + x for y in range(3) for x in (2, 3, 4)] + [49 + 1]] = True
            assert torch.equal((stats == 0).all(2), dead)
            assert not out[2].any() and not any(g[2].any() for g in gradients)
            grad = torch.full((3, 1, 7, 7), torch.inf, dtype=dtype)
            assert not any(g[2].any() for g in backward(*tensors, grad, stats))


@pytest.mark.parametrize(("dtype", "d"), SOME, ids=str)
def test_the_ends_of_the_range(driver, dtype, d):
    ends = (65504, 2.0**-12) if dtype == torch.float16 else (1e17, 2.0**-20)
    for scale in ends:
        tensors = [(t.double().clamp(-1, 1) * scale).to(dtype) for t in random_tensors(CALL, 2, d, 7, 7, dtype)]
        out, gradients = served(driver, tensors)
        assert all(t.isfinite().all() for t in (out, *gradients))


PROGRAM = r"""
#include "cuda/consensus_map.h"
#include <cstdio>
#include <initializer_list>
int main() {
    for (int d = 1; d <= 1100; ++d)
        for (int element : {8, 4, 2})
            for (bool seven : {false, true}) {
                m3em::ConsensusMapArguments m = {};
                m.n = 1, m.d = d, m.h = m.w = 7, m.scales = 3;
                if (seven && !m3em::ConsensusMapPlan::seven_fits(m, element))
                    continue;
                const m3em::ConsensusMapPlan p(m, element, seven);
                printf("%d %d %d %d %d %lld %lld %lld %lld %lld\n", d, element, seven, m.chunk, m.chunks, p.workspace,
                       p.stats, p.partial_bytes, p.finish_bytes, p.backward_bytes);
            }
}
"""


def test_what_python_asks_for_is_enough_for_both_forms(tmp_path):
    command = ["g++", "-std=c++17", f"-I{ROOT}/csrc", "-x", "c++", "-", "-o", str(tmp_path / "plans")]
    subprocess.run(command, input=PROGRAM, text=True, check=True)
    lines = subprocess.run([tmp_path / "plans"], text=True, capture_output=True, check=True).stdout.splitlines()
    plans = [tuple(map(int, line.split())) for line in lines]
    assert {(d, element) for d, element, seven, *_ in plans if seven} == {
        (d, element) for element in (2, 4) for d in range(1, 1101) if d * element % 16 == 0
    }
    dtypes = {dtype.itemsize: dtype for dtype in (torch.float64, torch.float32, torch.float16)}
    for d, element, seven, chunk, chunks, workspace, stats, *shared in plans:
        assert (chunks - 1) * chunk < d <= chunks * chunk and chunks <= 4
        assert workspace == chunks * 59 * 3  # what the kernels write: three sums a cell
        asked = native.cuda_consensus_map_needs(NUMBERS[dtypes[element]], d, 7, 7, 3, False)
        assert asked[0] >= workspace and asked[1] == stats == 177, (d, element)
        if seven:  # without asking for more, and every chunk begins on a boundary of 16 bytes
            assert chunk * 49 * element % 16 == 0 and max(shared) <= 48 << 10


# What would go wrong on a card -> a step too few or too many in a copy of the kernels. A barrier that is missing where
# no order of threads shows it is for ThreadSanitizer (tests/test_simt_sanitizers.py).
SEEDED = {
    "forward: a barrier is missing after the copies": (
        "        });\n        __syncthreads();\n        // The rows",
        "        });\n        // The rows",
    ),
    "backward: a barrier is missing after the copies": (
        "        await_copies();\n        __syncthreads();\n        if (tid",
        "        await_copies();\n        if (tid",
    ),
    "forward: nobody waits for the copies": ("        await_copies();\n        each_pack", "        each_pack"),
    "backward: nobody waits for the copies": (
        "        await_copies();\n        __syncthreads();\n        if (tid",
        "        __syncthreads();\n        if (tid",
    ),
    "the forward waits for the copies of its first tile alone": (
        "        await_copies();\n        each_pack",
        "        if (first == 0)\n            await_copies();\n        each_pack",
    ),
    "a barrier is missing before the pooled values are read": (
        "cells[c][i];\n        __syncthreads();\n#pragma unroll\n        for (int turn",
        "cells[c][i];\n#pragma unroll\n        for (int turn",
    ),
    "a barrier is missing before the next tile is copied": ("        if (first)\n            __syncthreads();\n", ""),
    "a barrier is missing before the sums of positions are read": (
        "        }\n    __syncthreads();\n    float *const to",
        "        }\n    float *const to",
    ),
    "a barrier is missing before the incoming gradient is read": (
        "m.wide);\n    }\n    __syncthreads();\n",
        "m.wide);\n    }\n",
    ),
    "a barrier is missing before what the pooling passes on is read": (
        "row * Pitch + c * Spread);\n        }\n        __syncthreads();\n",
        "row * Pitch + c * Spread);\n        }\n",
    ),
    "some threads leave out a barrier": (
        "        });\n        __syncthreads();\n        // The rows",
        "        });\n        if (tid < S::Active)\n            __syncthreads();\n        // The rows",
    ),
    "a row is left out of the pooled sums": ("r < rows; r += 32", "r + 1 < rows; r += 32"),
    "a channel is left out of the sums of positions": ("c < S::Step; ++c", "c < S::Step - 1; ++c"),
    "a tile has a pack too few": ("* S::Active < packs; ++s", "* S::Active < packs - 1; ++s"),
    "a window that is not torch's": ("at[2 * j + 1] + at[2 * j + 2];", "at[2 * j + 1] + at[2 * j + 1];"),
    "a window with a line too few": ("y < window_stop(i, 7, 3))", "y + 1 < window_stop(i, 7, 3))"),
    "the way of another position": ("holder_last(p, 7, 3) - 1; }", "holder_last(p, 7, 3) - (p != 2); }"),
    "a neighbour is left out": ("(way % 2 ? cells[3 * i + j + 1] : 0.0f)", "0.0f"),
    "the upsampling the wrong way round": ("across + cell % 3, 3, cell / 3)", "across + cell / 3, 3, cell % 3)"),
    "the other map's ratio": ("f[1 + second] * cells[c][i]", "f[2 - second] * cells[c][i]"),
    "a pack of one gradient is not written": ("            if (grad_b)\n", "            if (grad_b && i)\n"),
}


@pytest.mark.parametrize("fault", SEEDED)
def test_a_seeded_fault_is_caught(tmp_path, monkeypatch, fault):
    monkeypatch.setattr(backends, "simulated", None)
    broken = simt_cases.with_fault(tmp_path, "consensus_map", "cuda/consensus_map_seven.cuh", *SEEDED[fault])
    for dtype, d in ((torch.float32, 300), (torch.float16, 648)):
        tensors = random_tensors(CALL, 1, d, 7, 7, dtype)
        assert simt_cases.orders_that_catch(broken, lambda given=tensors: check("simt", CALL, given)), dtype
