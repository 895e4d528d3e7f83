"""The CUDA kernels as a standalone program under sanitizers; and that faults seeded into copies of it are caught."""

import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ORDERS = ("forward", "reverse", "shuffled")
# A thread of a block is a fiber for AddressSanitizer and a thread of the host for ThreadSanitizer.
KINDS = {
    "plain": [],
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"],
    "thread": ["-fsanitize=thread", "-DM3EM_SIMT_THREADS"],
}
OPS, WARPS = ("consensus_map", "channel_gate", "consensus_pool"), "tests/simt_warps.cpp"
PROGRAMS = {op: f"csrc/simt/standalone_{op}.cpp" for op in OPS}
KERNEL, TILE, SEVEN = (f"csrc/cuda/consensus_map{part}" for part in (".cu", "_tile.cuh", "_seven.cuh"))
SLAB, PACKS = "csrc/cuda/slab.cuh", "csrc/cuda/pool_packs.cuh"


def compiler(*arguments):
    done = subprocess.run([os.environ.get("CXX", "g++"), *arguments], capture_output=True, text=True)
    return done.stderr if done.returncode else None


def prefix():
    """Without randomized addresses, where ThreadSanitizer may find its own taken."""
    command = ["setarch", platform.machine(), "-R"]
    works = shutil.which("setarch") and subprocess.run([*command, "true"], capture_output=True).returncode == 0
    return command if works else []


class Builder:
    """Builds the program of one tree; what trees have in common is compiled once a kind."""

    def __init__(self, folder):
        self.folder = folder

    def flags(self, kind, tree):
        flags = ["-std=c++17", "-O1", "-g1", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
        return [*flags, *KINDS[kind], f"-I{tree}/csrc/simt", f"-I{tree}/csrc"]

    def common(self, kind):
        probe = self.folder / "probe.cpp"
        probe.write_text("int main() {}\n")
        error = compiler(*KINDS[kind], str(probe), "-o", str(self.folder / f"probe-{kind}"))
        if error is not None and kind != "plain":
            pytest.skip(f"the compiler has no {kind} sanitizer: {error.strip().splitlines()[-1]}")
        objects = []
        for name in ("simt", "standalone"):
            objects.append(str(self.folder / f"{name}-{kind}.o"))
            if not Path(objects[-1]).exists():
                error = compiler(*self.flags(kind, ROOT), "-c", f"{ROOT}/csrc/simt/{name}.cpp", "-o", objects[-1])
                assert error is None, error
        return objects

    def build(self, kind, *files, tree=ROOT, program=None):
        program = program or self.folder / "-".join([kind, *(Path(file).stem for file in files)])
        if not program.exists():
            sources = [str(tree / file) for file in files]
            flags = ["-pthread"] if kind == "thread" else []
            error = compiler(*self.flags(kind, tree), *self.common(kind), *sources, *flags, "-o", str(program))
            assert error is None, error
        return program


@pytest.fixture(scope="module")
def builder(tmp_path_factory):
    return Builder(tmp_path_factory.mktemp("standalone"))


def run(kind, program, *arguments):
    environment = {**os.environ, "UBSAN_OPTIONS": "print_stacktrace=1"}
    command = [*(prefix() if kind == "thread" else []), str(program), *arguments]
    return subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=150
    )


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kind", ["plain", "address"])
def test_the_kernels_are_clean(builder, kind, order):
    done = run(kind, builder.build(kind, *PROGRAMS.values(), WARPS), "--order", order)
    assert done.returncode == 0, done.stdout[-5000:]
    assert re.search(r"^\d\d cases, 0 failed$", done.stdout, re.MULTILINE)
    assert {f"ok {op} {dtype}" for op in OPS for dtype in ("float32", "float16")} <= {
        " ".join(line.split()[:3]) for line in done.stdout.splitlines()
    }


@pytest.mark.parametrize("part", [*OPS, "warps"])
def test_the_kernels_have_no_races(builder, part):
    done = run("thread", builder.build("thread", *PROGRAMS.values(), WARPS), part)
    assert done.returncode == 0, done.stdout[-5000:]
    assert re.search(r"^\d+ cases, 0 failed$", done.stdout, re.MULTILINE)


def test_bad_words_are_one_sentence(builder):
    program = builder.build("plain", WARPS)
    for words, said in ((["--order", "x"], "got 'x'"), (["--order"], "got ''"), (["nothing"], "no case has 'nothing'")):
        done = run("plain", program, *words)
        assert done.returncode == 2 and said in done.stdout and done.stdout.count("\n") == 1


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
        "        await_copies();\n        each_pack",
        "        each_pack",
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
    "a barrier is missing before the sums of the gates' gradients": (
        "csrc/cuda/channel_gate.cu",
        "gates, products, pitch);\n                __syncthreads();\n",
        "gates, products, pitch);\n",
        "channel_gate float32 7x7, kernels for every shape",
        {"thread": [RACE, "channel_gate.cu"]},
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


@pytest.mark.parametrize(("fault", "kind"), [(fault, kind) for fault in SEEDED for kind in SEEDED[fault][-1]])
def test_a_seeded_fault_is_caught(builder, tmp_path, fault, kind):
    path, right, wrong, case, said = SEEDED[fault]
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    (tmp_path / "tests").mkdir()
    shutil.copy(ROOT / WARPS, tmp_path / "tests")
    source = (tmp_path / path).read_text()
    assert source.count(right) == 1
    (tmp_path / path).write_text(source.replace(right, wrong))
    op = next((op for op in OPS if op in path or op in case), None)
    program = WARPS if path == WARPS else PROGRAMS[op]
    done = run(kind, builder.build(kind, program, tree=tmp_path, program=tmp_path / "program"), case)
    assert done.returncode not in (0, 2), done.stdout
    for words in said[kind]:
        assert re.search(words, done.stdout), done.stdout[-5000:]
