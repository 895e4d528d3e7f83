"""Faults for copies of the device code, and what the simulator and the sanitizers have to say of each."""

WARPS = "tests/simt_warps.cpp"
KERNEL, TILE, SEVEN, FOURTEEN, LINES, LAST = (
    f"csrc/cuda/consensus_map{part}"
    for part in (".cu", "_tile.cuh", "_seven.cuh", "_fourteen.cuh", "_lines.cuh", "_last.cuh")
)
SLAB, PACKS = "csrc/cuda/slab.cuh", "csrc/cuda/pool_packs.cuh"
GATE_LAST, POOL_LAST = "csrc/cuda/gate_last.cuh", "csrc/cuda/pool_last.cuh"
RACE, OVERFLOW = "WARNING: ThreadSanitizer: data race", "ERROR: AddressSanitizer: heap-buffer-overflow"
DIVERGENT = r"divergent barrier in block 0: thread 0 waits at the barrier of \S+{file}:\d+, thread {thread} {state}"
DIFFER = (
    r"lanes that differ in block 0: lane 0 of warp 0 waits at \S+simt_warps.cpp:\d+ with the mask {mask}, lane {lane} "
)
UNWAITED = r"thread \d+ of block 0 leaves the kernel with copies that it has not waited for"


def both(said):
    """The same sentence from fibers and from threads."""
    return {"plain": [said], "thread": [said]}


# Fault -> file, what is right, what is wrong, the program's case, and by kind what has to be said. A file that several
# ops share is broken for the op that the case names.
SEEDED = {
    "a barrier is missing": (
        KERNEL,
        "(nullptr));\n        __syncthreads();\n",
        "(nullptr));\n",
        "float32 7x7",
        {"thread": [RACE, "consensus_map.cu"]},
    ),
    "a barrier is missing before the next tile": (
        KERNEL,
        "c1 - c : m.tile;\n        __syncthreads();\n",
        "c1 - c : m.tile;\n        if (c == c0)\n            __syncthreads();\n",
        "float32 7x7",
        {"thread": [RACE, "consensus_map.cu"]},
    ),
    "a read behind the end of a map": (
        TILE,
        "[&](int to, int from) { tile[to] = sample[from]; }",
        "[&](int to, int from) { tile[to] = sample[from + 1]; }",
        "float16 7x7",
        {"address": [OVERFLOW, "READ of size 2", "load_tile"]},
    ),
    "a write behind the end of a gradient": (
        TILE,
        "{ sample[to] = tile[from]; }",
        "{ sample[to + 1] = tile[from]; }",
        "float32 7x7",
        {"address": [OVERFLOW, "WRITE of size 4", "store_tile"]},
    ),
    "a write behind the end of shared memory": (
        KERNEL,
        "        cosine[cell] = value;",
        "        cosine[cell + 1] = value;",
        "float32 7x7",
        {"address": [OVERFLOW, "WRITE of size 4", "finish", "simt::launch"]},
    ),
    "an element is not written": (
        KERNEL,
        "    for (int q = tid; q < g.positions; q += Threads) {\n        const int y",
        "    for (int q = tid; q < g.positions - 1; q += Threads) {\n        const int y",
        "float32 7x7",
        {"plain": ["result 48 of 49 is -?nan where .* is right .not written"]},
    ),
    "7x7: a barrier is missing after the copies of the forward": (
        SEVEN,
        "        });\n        __syncthreads();\n        // The rows",
        "        });\n        // The rows",
        "float32 seven few",
        {"thread": [RACE, "consensus_map_seven.cuh"], "plain": ["result 0 of 49 is -?nan"]},
    ),
    "7x7: a barrier is missing after the copies of the backward": (
        SEVEN,
        "        await_copies();\n        __syncthreads();\n        if (tid",
        "        await_copies();\n        if (tid",
        "float16 seven part of a tile",
        {"thread": [RACE, "consensus_map_seven.cuh"], "plain": ["gradient by a .* is -?nan"]},
    ),
    "7x7: a barrier is missing before the pooled values are read": (
        SEVEN,
        "cells[c][i];\n        __syncthreads();\n#pragma unroll\n        for (int turn",
        "cells[c][i];\n#pragma unroll\n        for (int turn",
        "float32 seven few",
        {"thread": [RACE, "consensus_map_seven.cuh"]},
    ),
    "7x7: a barrier is missing before the next tile is copied": (
        SEVEN,
        "        if (first)\n            __syncthreads();\n",
        "",
        "float16 seven several tiles",
        {"thread": [RACE, "simt::copy_later"]},
    ),
    "7x7: a barrier is missing before the sums of positions take the place of a tile": (
        SEVEN,
        "S::Active * S::Wide;\n    __syncthreads();\n",
        "S::Active * S::Wide;\n",
        "float32 seven few",
        {"thread": [RACE, "consensus_map_seven.cuh"]},
    ),
    "7x7: a barrier is missing before the tile of the backward is pooled anew": (
        SEVEN,
        "row * Pitch + c * Spread);\n        }\n        __syncthreads();\n",
        "row * Pitch + c * Spread);\n        }\n",
        "float32 seven several tiles",
        {"thread": [RACE, "consensus_map_seven.cuh"]},
    ),
    "7x7: nobody waits for the copies": (
        SEVEN,
        "            await_copies();\n",
        "",
        "float32 seven few",
        both(UNWAITED),
    ),
    "7x7: a read behind the end of a map": (
        SEVEN,
        "* S::Active < packs; ++s)",
        "* S::Active <= packs; ++s)",
        "float32 seven few",
        {"address": [OVERFLOW, "READ of size 16", "simt::await_copies"]},
    ),
    "7x7: a write behind the end of shared memory": (
        SEVEN,
        "Rows * Pitch, *const grad",
        "Rows * Pitch + 32, *const grad",
        "float16 seven few",
        {"address": [OVERFLOW, "WRITE of size 4", "make_seven_factors", "simt::launch"]},
    ),
    "14x14: a barrier is missing before windows are added up": (
        FOURTEEN,
        "        }\n        __syncthreads();\n        if (tid < FourteenThird",
        "        }\n        if (tid < FourteenThird",
        "float32 fourteen few",
        {"thread": [RACE, "consensus_map_fourteen.cuh"]},
    ),
    "14x14: a barrier is missing before the next tile is copied": (
        FOURTEEN,
        "        if (first)\n            __syncthreads();\n",
        "",
        "float16 fourteen several tiles",
        {"thread": [RACE, "simt::copy_later"]},
    ),
    "14x14: a barrier is missing before gradients take the place of what the windows pass on": (
        FOURTEEN,
        "        __syncthreads();\n        if (there) {\n            Few",
        "        if (there) {\n            Few",
        "float16 fourteen part of a tile",
        {"thread": [RACE, "consensus_map_fourteen.cuh"]},
    ),
    "14x14: nobody waits for the copies": (
        FOURTEEN,
        "        await_copies();\n        __syncthreads();\n        Lines",
        "        __syncthreads();\n        Lines",
        "float32 fourteen few",
        both(UNWAITED),
    ),
    "14x14: a read behind the end of a map": (
        LINES,
        "i < packs; i += Active",
        "i <= packs; i += Active",
        "float32 fourteen few",
        {"address": [OVERFLOW, "READ of size 16", "simt::await_copies"]},
    ),
    "14x14: a write behind the end of shared memory": (
        FOURTEEN,
        "grad = factors + 3 * FourteenCells;",
        "grad = factors + 3 * FourteenCells + 1;",
        "float16 fourteen few",
        {"address": [OVERFLOW, "WRITE of size 4", "make_fourteen_factors", "simt::launch"]},
    ),
    "7x7: a barrier is missing after a channels_last tile": (
        SEVEN,
        "channels, tile_a, tile_b);\n            __syncthreads();\n",
        "channels, tile_a, tile_b);\n",
        "float16 seven part of a channels_last tile",
        {"thread": [RACE, "consensus_map_seven.cuh"]},
    ),
    "14x14: a barrier is missing after a channels_last tile": (
        FOURTEEN,
        "        await_copies();\n        __syncthreads();\n        Lines",
        "        await_copies();\n        Lines",
        "float16 fourteen several channels_last tiles",
        {"thread": [RACE, "consensus_map_last.cuh"]},
    ),
    "a column behind the last one": (
        LAST,
        "column = at / Beside;",
        "column = at / Beside + 1;",
        "float16 seven part of a channels_last tile",
        {"address": [OVERFLOW, "READ of size 2", "consensus_map_last.cuh"]},
    ),
    "a pack of channels behind the last one": (
        LAST,
        "* E; c < count)",
        "* E; c < count + E)",
        "float32 fourteen part of a channels_last tile",
        {"address": [OVERFLOW, "READ of size 4", "consensus_map_last.cuh"]},
    ),
    "one channel is taken for several": (
        LAST,
        "m.d > 1 && ",
        "m.d > 0 && ",
        "float32 fourteen one channel",
        {"address": ["misaligned address", "consensus_map_last.cuh"]},
    ),
    "a barrier is missing before the sums of the gates' gradients": (
        "csrc/cuda/gate_lines.cuh",
        "    });\n    __syncthreads();\n",
        "    });\n",
        "channel_gate float32 7x7, kernels for every shape",
        {"thread": [RACE, "gate_lines.cuh"]},
    ),
    "a read behind the end of a line": (
        "csrc/cuda/gate_lines.cuh",
        "(second ? other : last) - place",
        "other - place",
        "channel_gate float32 7x7, kernels for every shape",
        {"address": [OVERFLOW, "READ of size 4", "gate_lines.cuh"]},
    ),
    "a barrier is missing before the sums of packs are added": (
        "csrc/cuda/gate_packs.cuh",
        "(m, part, gates, sums);\n    __syncthreads();\n",
        "(m, part, gates, sums);\n",
        "channel_gate float16 7x7, several chunks",
        {"thread": [RACE, "add_packs"]},
    ),
    "a pack behind the end of a chunk": (
        "csrc/cuda/gate_packs.cuh",
        "        if (k < packs)\n            to = load_words(go",
        "        if (k <= packs)\n            to = load_words(go",
        "channel_gate float16 16x16",
        {"address": [OVERFLOW, "READ of size", "backward_walk"]},
    ),
    "a pack that begins in a map and ends behind it": (
        SLAB,
        "positions >= Wide ? count / Wide : 0;",
        "positions >= Wide ? (count + Wide - 1) / Wide : 0;",
        "consensus_pool float16 7x7 without a map",
        {"address": [OVERFLOW, "READ of size", "consensus_pool.cu"]},
    ),
    "a pack behind the last one is asked for": (
        PACKS,
        "(Whole || left > U * walkers)",
        "(Whole || left > (U - 1) * walkers)",
        "consensus_pool float16 7x7, two chunks",
        {"address": [OVERFLOW, "READ of size", "pool_packs.cuh"]},
    ),
    "a barrier is missing before the sums of packs": (
        PACKS,
        "        __syncthreads();\n        add_slots",
        "        add_slots",
        "consensus_pool float16 7x7, two chunks",
        {"thread": [RACE, "pool_packs.cuh"]},
    ),
    "groups of positions are added before all are there": (
        GATE_LAST,
        "    __syncthreads();\n    // The groups",
        "    // The groups",
        "channel_gate float16 packs of channels_last",
        {"thread": [RACE, "gate_last.cuh"]},
    ),
    "a thread beyond the last pack of channels reads": (
        POOL_LAST,
        "across.walks ? count - across.group : 0;",
        "count - across.group + across.groups;",
        "consensus_pool float32 packs of channels_last",
        {"address": [OVERFLOW, "READ of size", "pool_last.cuh"]},
    ),
    "some threads leave out a barrier": (
        KERNEL,
        "(nullptr));\n        __syncthreads();\n",
        "(nullptr));\n        if (tid < 64)\n            __syncthreads();\n",
        "float32 7x7",
        both(DIVERGENT.format(file="consensus_map.cu", thread=64, state="waits at the")),
    ),
    "a warp leaves out a barrier": (
        WARPS,
        "    __syncthreads();",
        "    if (warp != 1)\n        __syncthreads();",
        "",
        both(DIVERGENT.format(file="simt_warps.cpp", thread=32, state="has left the")),
    ),
    "two barriers on one line": (
        WARPS,
        "    __syncthreads();",
        "    tid < 32 ? __syncthreads() : __syncthreads();",
        "",
        {"plain": [DIVERGENT.format(file="simt_warps.cpp", thread=32, state=".* another one on that line")]},
    ),
    "a shuffle from a lane that left": (
        WARPS,
        "    float scan = value;",
        "    if (tid == 5)\n        return;\n    float scan = value;",
        "",
        both(r"shuffle at \S+simt_warps.cpp:\d+ in block 0: lane 6 of warp 0 reads lane 5, which has left the kernel"),
    ),
    "lanes with another mask": (
        WARPS,
        "lane < 16 ? 0xffff : 0xffff0000",
        "lane == 15 ? Whole : lane < 16 ? 0xffff : 0xffff0000",
        "",
        both(DIFFER.format(mask="0xffff", lane=15) + "waits at .* 0xffffffff"),
    ),
    "a lane that waits elsewhere": (
        WARPS,
        "    __syncwarp(present);",
        "    if (lane == 3)\n        __syncthreads();\n    else\n        __syncwarp(present);",
        "",
        {"plain": [DIFFER.format(mask="0xffffffff", lane=3) + "waits at the barrier"]},
    ),
    "lanes that come from two places": (
        WARPS,
        "    __syncwarp(present);",
        "    lane < 4 ? __syncwarp(present) : __syncwarp(present);",
        "",
        {"plain": [DIFFER.format(mask="0xffffffff", lane=4)]},
    ),
    "a mask without the lane itself": (
        WARPS,
        "__ballot_sync(present, value > 0)",
        "__ballot_sync(present & ~4u, value > 0)",
        "",
        {"plain": [r"lane 2 of warp \d in block 0 comes to .* with the mask 0x(ffff)?fffb, which does not name it"]},
    ),
    "a shuffle from a lane outside the mask": (
        WARPS,
        "__shfl_xor_sync(half, double(value), 3)",
        "__shfl_xor_sync(half, double(value), 16)",
        "",
        {"plain": [r"lane 0 of warp \d reads lane 16, which its mask does not name"]},
    ),
    "a shuffle from a lane that the block does not have": (
        WARPS,
        "__shfl_xor_sync(half, double(value), 3)",
        "__shfl_xor_sync(Whole, double(value), 16)",
        "",
        {"plain": ["lane 0 of warp 2 reads lane 16, which the block does not have"]},
    ),
    "a width that is none": (
        WARPS,
        "scan, step, 8)",
        "scan, step, 12)",
        "",
        {"plain": ["the width 12 is no power of two"]},
    ),
    "__syncwarp is missing": (
        WARPS,
        "    __syncwarp(present);\n",
        "",
        "",
        {"plain": ["number .* is -?nan"], "thread": [RACE, "simt_warps.cpp"]},
    ),
    "nobody waits for the copies": (WARPS, "    m3em::await_copies();\n", "", "", both(UNWAITED)),
    "copies are waited for after the barrier": (
        WARPS,
        "    m3em::await_copies();\n    __syncthreads();\n",
        "    __syncthreads();\n    m3em::await_copies();\n",
        "",
        {"plain": ["number 4 of .* is -?nan"], "thread": [RACE, "simt::await_copies"]},
    ),
    "a copy that begins between two packs": (
        WARPS,
        "blockIdx.x * Threads + 4 * tid);",
        "blockIdx.x * Threads + 4 * tid + 2);",
        "",
        {"plain": ["thread 0 of block 0 copies 16 bytes between addresses that are no multiples of it"]},
    ),
    "a copy is read while it is on its way": (
        WARPS,
        "    m3em::await_copies();\n    __syncthreads();\n",
        "    g.scan[all] = copies[tid];\n    m3em::await_copies();\n    __syncthreads();\n",
        "",
        {"thread": [RACE, "simt::copy_later"]},
    ),
    "a vote in the place of __syncwarp": (
        WARPS,
        "    __syncwarp(present);\n",
        "    (void)__ballot_sync(present, true);\n",
        "",
        {"thread": [RACE, "simt_warps.cpp"]},
    ),
}
