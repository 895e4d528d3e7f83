"""Faults seeded into copies of consensus_map's CUDA kernels for 7x7 and for 14x14 maps: each is caught on the CPU."""

import pytest
import torch

import simt_cases
from m3em_fast import backends
from op_cases import Call, check, random_tensors

CALL = Call("consensus_map")


@pytest.fixture(autouse=True)
def driver():
    with simt_cases.simt() as found:
        yield found


# What would go wrong on a card -> a step too few or too many in a copy of the kernels. A barrier that is missing where
# no order of threads shows it is for ThreadSanitizer (tests/test_simt_sanitizers.py).
SEVEN = {
    "forward: a barrier is missing after the copies": (
        "        });\n        __syncthreads();\n        // The rows",
        "        });\n        // The rows",
    ),
    "backward: a barrier is missing after the copies": (
        "        await_copies();\n        __syncthreads();\n        if (tid",
        "        await_copies();\n        if (tid",
    ),
    "forward: nobody waits for the copies": ("            await_copies();\n", ""),
    "backward: nobody waits for the copies": (
        "        await_copies();\n        __syncthreads();\n        if (tid",
        "        __syncthreads();\n        if (tid",
    ),
    "the forward waits for the copies of its first tile alone": (
        "            await_copies();\n",
        "            if (first == 0)\n                await_copies();\n",
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
        "SevenThreads, grad);\n    __syncthreads();\n",
        "SevenThreads, grad);\n",
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
FOURTEEN = {
    "forward: a barrier is missing after the copies": (
        "        await_copies();\n        __syncthreads();\n#pragma",
        "        await_copies();\n#pragma",
    ),
    "backward: a barrier is missing after the copies": (
        "        await_copies();\n        __syncthreads();\n        Lines",
        "        await_copies();\n        Lines",
    ),
    "forward: nobody waits for the copies": (
        "        await_copies();\n        __syncthreads();\n#pragma",
        "        __syncthreads();\n#pragma",
    ),
    "backward: nobody waits for the copies": (
        "        await_copies();\n        __syncthreads();\n        Lines",
        "        __syncthreads();\n        Lines",
    ),
    "the forward waits for the copies of its first tile alone": (
        "        await_copies();\n        __syncthreads();\n#pragma",
        "        if (first == 0)\n            await_copies();\n        __syncthreads();\n#pragma",
    ),
    "forward: a barrier is missing before windows are added up": (
        "        }\n        __syncthreads();\n        if (tid < FourteenThird",
        "        }\n        if (tid < FourteenThird",
    ),
    "a barrier is missing before the next tile is copied": ("        if (first)\n            __syncthreads();\n", ""),
    "a barrier is missing before sums are read": (
        "of_third.bb;\n        __syncthreads();\n",
        "of_third.bb;\n",
    ),
    "a barrier is missing before sums are stored": (
        "    }\n    __syncthreads();\n    float *const to",
        "    }\n    float *const to",
    ),
    "a barrier is missing before the next sums take the place": (
        "        __syncthreads();\n        if (tid < FourteenActive)",
        "        if (e == 0)\n            __syncthreads();\n        if (tid < FourteenActive)",
    ),
    "a barrier is missing before the incoming gradient is read": (
        "factors[i] = stats[i];\n    __syncthreads();\n",
        "factors[i] = stats[i];\n",
    ),
    "backward: a barrier is missing before windows are added up": (
        "        __syncthreads();\n        float *const words_a",
        "        float *const words_a",
    ),
    "a barrier is missing before what the windows pass on is read": (
        "        __syncthreads();\n        Arriving",
        "        Arriving",
    ),
    "a barrier is missing before gradients take the place of what the windows pass on": (
        "        __syncthreads();\n        if (there) {\n            Few",
        "        if (there) {\n            Few",
    ),
    "a barrier is missing before gradients are copied": (
        "        __syncthreads();\n        // The next tile is copied",
        "        // The next tile is copied",
    ),
    "some threads leave out a barrier": (
        "        }\n        __syncthreads();\n        if (tid < FourteenThird",
        "        }\n        if (tid < FourteenActive)\n            __syncthreads();\n        if (tid < FourteenThird",
    ),
    "a tile has a pack too few": ("i < packs; i += Active", "i < packs - 1; i += Active"),
    "a channel is left out of the sums": ("c < FourteenStep; ++c", "c < FourteenStep - 1; ++c"),
    "a lane is left out of the third scale": ("lane < FourteenLanes; ++lane", "lane < FourteenLanes - 1; ++lane"),
    "a window that is not torch's": ("if (k <= 2)", "if (k < 2)"),
    "the line of no other window": ("pair == 2 ? upper[j] : lower[j]", "pair == 4 ? upper[j] : lower[j]"),
    "a window with a line too many": ("            at[2] += 3;\n", "            at[2] += 0;\n"),
    "a result where a sum is still wanted": ("to = i * Words + FourteenLeft + j;", "to = i * Words + j;"),
    "one weight of the upsampling": ("0.75f * (from", "0.5f * (from"),
    "a position behind the end": ("cell < 6 ? 2 * cell + 2 : 13", "2 * cell + 2"),
    "the upsampling of the second scale the wrong way round": ("second + i % 7, 7, i / 7", "second + i / 7, 7, i % 7"),
    "the upsampling of the third scale the wrong way round": ("third + j % 3, 3, j / 3", "third + j / 3, 3, j % 3"),
    "the other map's ratio": ("second_a[k] = f[0] * vb - f[1] * va", "second_a[k] = f[0] * vb - f[2] * va"),
    "a neighbour is left out": ("of(i, x / 4 - 1) + of(i, x / 4)", "of(i, x / 4)"),
    "the other line of a pair": ("(i < 14 ? above : below)", "(i < 14 ? below : above)"),
    "a pack of one gradient is not written": ("        else if (to)\n", "        else if (to && (!second || first))\n"),
}
# By the maps' side: the kernels' files, and channels of which one chunk has several tiles and a part of one.
CASES = {
    7: (SEVEN, ["seven"], ((torch.float32, 300), (torch.float16, 648))),
    14: (FOURTEEN, ["fourteen", "lines"], ((torch.float32, 100), (torch.float16, 100))),
}


@pytest.mark.parametrize(("side", "fault"), [(side, fault) for side in CASES for fault in CASES[side][0]])
def test_a_seeded_fault_is_caught(tmp_path, monkeypatch, side, fault):
    monkeypatch.setattr(backends, "simulated", None)
    seeded, names, sizes = CASES[side]
    right, wrong = seeded[fault]
    files = [f"cuda/consensus_map_{name}.cuh" for name in names]
    (path,) = [file for file in files if right in (simt_cases.ROOT / "csrc" / file).read_text()]
    broken = simt_cases.with_fault(tmp_path, "consensus_map", path, right, wrong)
    for dtype, d in sizes:
        tensors = random_tensors(CALL, 1, d, side, side, dtype)
        assert simt_cases.orders_that_catch(broken, lambda given=tensors: check("simt", CALL, given)), dtype
