"""docs/cuda-resources.md is what the compiler says, and the report fails where a kernel is not what section 6 wants."""

import re
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest

from bench import cuda_report
from bench.cuda_report import PROCESSORS, Kernel, Usage
from build_cases import ROOT, run
from m3em_fast import nvrtc

try:
    FOUND, WHY = nvrtc.find(), ""
    if FOUND.version != cuda_report.VERSION:
        FOUND, WHY = None, f"the report is that of NVRTC 12.9, and {FOUND.name} is installed"
except nvrtc.Missing as missing:
    FOUND, WHY = None, str(missing)
needs_nvrtc = pytest.mark.skipif(FOUND is None, reason=WHY)

# 64 numbers a thread, where the launch bounds leave it 32 registers.
SPILLS = """
M3EM_KERNEL(consensus_map_partial_f32_7x7, 1024, 2, m3em::ConsensusMapArguments, m3em::spilling)
"""
SPILLING = """
__device__ void spilling(const ConsensusMapArguments &m) {
    const float *from = static_cast<const float *>(m.a.data) + threadIdx.x;
    float sums[64];
#pragma unroll
    for (int i = 0; i < 64; ++i)
        sums[i] = from[i * 1024];
    for (int k = 0; k < m.d; ++k)
#pragma unroll
        for (int i = 0; i < 64; ++i)
            sums[i] = sums[i] * sums[(i + 17) % 64] + from[k];
#pragma unroll
    for (int i = 0; i < 64; ++i)
        static_cast<float *>(m.out.data)[threadIdx.x + i * 1024] = sums[i];
}
"""


@pytest.fixture(scope="module")
def measured():
    return cuda_report.measure()


@needs_nvrtc
def test_the_document_is_what_the_compiler_says_now(measured):
    assert cuda_report.DOCUMENT.read_text() == cuda_report.report(*measured), "make cuda-report writes it anew"


@needs_nvrtc
def test_no_kernel_spills_and_each_fills_half_of_a_v100_or_says_why(measured):
    kernels, used = measured
    assert {kernel.op for kernel in kernels} == {path.stem for path in (ROOT / "csrc/cuda").glob("*.cu")}
    assert cuda_report.problems(kernels, used) == []


def a_tree(folder):
    """The headers of csrc/ without kernels."""
    shutil.copytree(ROOT / "csrc/cuda", folder / "cuda", ignore=shutil.ignore_patterns("*.cu", "*.cpp", "*.py"))
    return folder


@needs_nvrtc
def test_a_kernel_that_spills_fails(tmp_path):
    csrc = a_tree(tmp_path)
    includes = '#include "cuda/consensus_map.cuh"\n#include "cuda/device.cuh"\n'
    (csrc / "cuda/consensus_map.cu").write_text(f"{includes}namespace m3em {{ namespace {{ {SPILLING} }} }}\n{SPILLS}")
    kernels, used = cuda_report.measure(csrc)
    assert [(kernel.name, kernel.threads) for kernel in kernels] == [("consensus_map_partial_f32_7x7", 1024)]
    found = cuda_report.problems(kernels, used, {})
    assert any(re.fullmatch(r"consensus_map_partial_f32_7x7 spills \d+ bytes on sm_70\.", line) for line in found), (
        found
    )
    row = next(line for line in cuda_report.resources(kernels, used) if "partial" in line)
    assert re.search(r"\| 32 · 100% · \d+ B spilled · \d+ B local \|", row)


@needs_nvrtc
@pytest.mark.parametrize(
    ("kernel", "said"),
    [
        (
            'extern "C" __global__ void __launch_bounds__(64, 1) other_f32_7x7() {}',
            "other_f32_7x7; consensus_map_<stage>",
        ),
        (
            'extern "C" __global__ void __launch_bounds__(64, 1) consensus_map_other_f32_7x7() {}',
            "a kernel consensus_map_other_f32_7x7, and PLANS in bench/cuda_plan.py no word about other.$",
        ),
        (
            'extern "C" __global__ void consensus_map_partial_f32_7x7() {}',
            "Launch bounds are missing from consensus_map",
        ),
    ],
    ids=["another name", "another stage", "no launch bounds"],
)
def test_kernels_that_the_report_cannot_place_are_named(tmp_path, kernel, said):
    csrc = a_tree(tmp_path)
    (csrc / "cuda/consensus_map.cu").write_text(kernel)
    with pytest.raises(cuda_report.Broken, match=said):
        cuda_report.measure(csrc)


@needs_nvrtc
def test_an_op_whose_shared_memory_is_not_known_is_named(tmp_path):
    csrc = a_tree(tmp_path)
    kernel = 'extern "C" __global__ void __launch_bounds__(64, 1) new_op_all_f32_any() {}'
    (csrc / "cuda/new_op.cu").write_text(kernel)
    with pytest.raises(cuda_report.Broken, match=r"^csrc/cuda/new_op\.cu has no plan in bench/cuda_plan\.py"):
        cuda_report.measure(csrc)


def test_the_bytes_are_those_of_the_tensors():
    """Float32 at the paper's step: what is counted, against the sizes of the tensors, and never less than the floor."""
    n, c, p = 1675, 1024, 49
    x, vector, plane = 4 * n * c * p, 4 * n * c, 4 * n * p
    floors = {
        "consensus_map": {"both: forward": x + plane, "backward": 2 * x + plane},  # D is half of C, there are two maps
        "channel_gate": {
            "forward": 3 * x + 2 * vector,
            "backward": 4 * x + 4 * vector,
            "backward, x frozen": 3 * x + 2 * vector,
        },
        "consensus_pool": {
            "forward": x + plane + vector,
            "forward, no map": x + vector,
            "both: backward": 2 * x + vector + 2 * plane,
            "both: backward, x frozen": x + vector + plane,
            "backward, no map": x + vector,
        },
    }
    assert set(floors) == {path.stem for path in (ROOT / "csrc/cuda").glob("*.cu")}
    for op, wanted in floors.items():
        form = "7x7" if op == "consensus_map" else "packs"
        given = cuda_report.plan(op, form, "f32", ROOT / "csrc")
        rows = cuda_report.TRAFFIC[op][0](cuda_report.PAPER[op], given, 4, 4)
        assert {stage: floor for stage, _, floor in rows if floor is not None} == wanted
        assert all(floor is None or floor <= moved <= 1.05 * floor for _, moved, floor in rows)


KERNEL = Kernel("op_stage_f32_7x7", "op", "stage", "f32", "7x7", 256, 1024)
GOOD = Usage(64, 0, 0, 0)


@pytest.mark.parametrize(
    ("arch", "usage", "said"),
    [
        ("sm_120", replace(GOOD, spilled=8), "op_stage_f32_7x7 spills 8 bytes on sm_120."),
        ("sm_70", replace(GOOD, stack=16), "op_stage_f32_7x7 has 16 bytes of local memory on sm_70."),
        (
            "sm_70",
            replace(GOOD, registers=65),
            "op_stage_f32_7x7 fills 37.5% of a V100 and REASONS has no word about it.",
        ),
        (
            "sm_70",
            replace(GOOD, shared=32 << 10),
            "op_stage_f32_7x7 fills 25% of a V100 and REASONS has no word about it.",
        ),
        ("sm_80", replace(GOOD, registers=255), None),
        ("sm_80", replace(GOOD, stack=16), None),
    ],
)
def test_what_fails_and_what_does_not(arch, usage, said):
    used = {KERNEL.name: dict.fromkeys(PROCESSORS, GOOD) | {arch: usage}}
    assert cuda_report.problems([KERNEL], used, {}) == ([said] if said else [])


def test_a_reason_serves_low_occupancy_and_nothing_else_and_must_be_needed():
    used = {KERNEL.name: dict.fromkeys(PROCESSORS, replace(GOOD, registers=65))}
    assert cuda_report.problems([KERNEL], used, {"op_stage": "It is small."}) == []
    used[KERNEL.name]["sm_70"] = replace(GOOD, registers=65, spilled=4)
    assert len(cuda_report.problems([KERNEL], used, {"op_stage": "It is small."})) == 1
    used[KERNEL.name]["sm_70"] = GOOD
    stale = cuda_report.problems([KERNEL], used, {"op_stage": "It is small."})
    assert stale == ["op_stage needs no reason in REASONS any more."]


def test_more_kernels_than_the_budget_fail():
    kernels = [replace(KERNEL, name=f"{KERNEL.name}_{i}") for i in range(61)]
    used = {kernel.name: dict.fromkeys(PROCESSORS, GOOD) for kernel in kernels}
    assert cuda_report.problems(kernels, used, {}) == ["There are 61 kernels; 60 is the budget."]


# NVIDIA's own calculator, a header among those that kernels are compiled with.
CALCULATOR = """
#include <cuda_occupancy.h>
#include <cstdio>
int main() {
    cudaOccDeviceProp p = {};
    p.warpSize = 32, p.numSms = 1, p.regsPerBlock = p.regsPerMultiprocessor = 65536, p.maxThreadsPerBlock = 1024;
    int threads, registers, shared, dynamic, kb;
    while (scanf("%d %d %d %d %d %d %d %d", &p.computeMajor, &p.computeMinor, &p.maxThreadsPerMultiprocessor, &kb,
                 &threads, &registers, &shared, &dynamic) == 8) {
        p.reservedSharedMemPerBlock = p.computeMajor >= 8 ? 1024 : 0;
        p.sharedMemPerMultiprocessor = kb << 10, p.sharedMemPerBlock = 48 << 10;
        p.sharedMemPerBlockOptin = p.sharedMemPerMultiprocessor - p.reservedSharedMemPerBlock;
        cudaOccFuncAttributes a = {};
        a.maxThreadsPerBlock = 1024, a.numRegs = registers, a.sharedSizeBytes = shared;
        a.partitionedGCConfig = PARTITIONED_GC_OFF, a.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;
        a.maxDynamicSharedSizeBytes = p.sharedMemPerBlockOptin - shared;
        cudaOccDeviceState s = {};
        s.carveoutConfig = SHAREDMEM_CARVEOUT_MAX_SHARED;
        cudaOccResult r;
        const int failed = cudaOccMaxActiveBlocksPerMultiprocessor(&r, &p, &a, &s, threads, dynamic);
        printf("%d\\n", failed ? -failed : r.activeBlocksPerMultiprocessor);
    }
}
"""


@needs_nvrtc
def test_occupancy_is_that_of_nvidias_calculator(tmp_path):
    (tmp_path / "ask.cpp").write_text(CALCULATOR)
    command = ["g++", "-std=c++17", f"-I{FOUND.include}", str(tmp_path / "ask.cpp"), "-o", str(tmp_path / "ask")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    cases, asked = [], []
    for arch, processor in PROCESSORS.items():
        number = int(arch.removeprefix("sm_"))
        for threads in (32, 96, 256, 512, 1024):
            for registers in (16, 32, 33, 40, 56, 64, 65, 72, 80, 128, 168, 255):
                for shared, dynamic in ((0, 0), (0, 236), (32, 18192), (0, 22480), (0, 40 << 10)):
                    if registers * threads > 65536:
                        continue
                    cases.append((arch, threads, Usage(registers, shared, 0, 0), dynamic))
                    line = (number // 10, number % 10, processor.threads, processor.shared >> 10)
                    asked.append(" ".join(map(str, (*line, threads, registers, shared, dynamic))))
    said = subprocess.run(
        [str(tmp_path / "ask")], input="\n".join(asked), text=True, capture_output=True
    ).stdout.split()
    assert len(said) == len(cases) > 1000
    for (arch, threads, usage, dynamic), blocks in zip(cases, said, strict=True):
        full = cuda_report.occupancy(PROCESSORS[arch], threads, usage, dynamic)
        assert full == int(blocks) * threads / PROCESSORS[arch].threads, (arch, threads, usage, dynamic)


def test_without_nvrtc_the_command_says_so_in_one_sentence(tmp_path):
    before = cuda_report.DOCUMENT.read_bytes()
    command = (sys.executable, "-m", "bench.cuda_report")
    said = run(*command, cwd=ROOT, expect=1, M3EM_NVRTC="/nonexistent/libnvrtc.so")
    assert re.fullmatch(r"m3em_fast: NVRTC cannot be loaded from /nonexistent/libnvrtc\.so \(.*\)\.\n", said)
    assert cuda_report.DOCUMENT.read_bytes() == before
