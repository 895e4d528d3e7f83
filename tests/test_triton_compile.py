"""Every Triton kernel compiles without a card, spills nothing, and docs/triton-resources.md says what it uses."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace

import pytest

from bench import triton_report
from bench.triton_report import SHARED, Compiled
from build_cases import ROOT, run

try:
    from triton.backends.nvidia import compiler as _  # noqa: F401

    MISSING = ""
except ImportError as error:
    MISSING = f"Triton's compiler for NVIDIA cards cannot be imported ({error})"
needs_triton = pytest.mark.skipif(bool(MISSING), reason=MISSING)
# What is compiled stays, as the libraries of simt do.
CACHE = {"TRITON_CACHE_DIR": str(ROOT / "build/triton")}


def environment():
    """Of a process in which Triton compiles: in that of the tests it interprets."""
    return {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | CACHE


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """All kernels, compiled in another process, and the version of Triton."""
    path = tmp_path_factory.mktemp("triton") / "found.json"
    command = [sys.executable, "-m", "bench.triton_report", "--json", str(path)]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(path.read_text())
    return [Compiled(**each) for each in found["kernels"]], found["triton"]


@needs_triton
def test_the_document_is_what_the_compiler_says_now(measured):
    compiled, version = measured
    said = triton_report.DOCUMENT.read_text()
    wanted = triton_report.report(compiled, version)
    if f"Triton {version}, " not in said:  # of another version the names hold, and the figures may differ
        said, wanted = (re.findall(r"^\| `(\w+)`", text, re.M) for text in (said, wanted))
    assert said == wanted, "python -m bench.triton_report writes it anew"


@needs_triton
def test_no_kernel_spills_and_each_fits_a_v100(measured):
    assert triton_report.problems(measured[0]) == []


@needs_triton
def test_every_kernel_in_every_dtype_and_shape_is_measured(measured):
    compiled, _ = measured
    launched = set()
    for path in sorted((ROOT / "m3em_fast/triton").glob("[!_]*.py")):
        found = re.findall(r"\blaunch\(\s*(_\w+),", path.read_text())
        assert found, path
        launched |= {f"{path.stem}.{name.strip('_')}" for name in found}
    assert {each.kernel for each in compiled} == launched
    for kernel in launched:
        for capability in triton_report.CAPABILITIES:
            names = {each.name for each in compiled if each.kernel == kernel and each.capability == capability}
            for dtype in ("f64", "f32", "f16") if capability < 80 else ("f64", "f32", "f16", "bf16"):
                for shape in ("7x7", "14x14"):
                    assert f"{kernel.replace('.', '_')}_{dtype}_{shape}" in names, (capability, names)


# Of each kernel: pointers for whose alignment it would be compiled anew, and arguments that are floats. No test that
# runs interpreted kernels could show either.
SPECIALISED = """
import importlib, sys
from triton.runtime.jit import JITFunction
for op in sys.argv[1:]:
    module = importlib.import_module("m3em_fast.triton." + op)
    for name, kernel in vars(module).items():
        if isinstance(kernel, JITFunction) and kernel.fn.__module__ == module.__name__:
            free = [p.name for p in kernel.params if not p.is_constexpr and not p.do_not_specialize_on_alignment]
            fixed = [p.name for p in kernel.params if not p.is_constexpr and p.do_not_specialize]
            print(op, name, ",".join(free), ",".join(fixed))
"""


@needs_triton
def test_consensus_map_is_not_compiled_anew_for_addresses_nor_for_the_stride_of_samples():
    """Either would give a clip other bits alone than in a batch: the order of a sum over lanes follows the layout."""
    command = [sys.executable, "-c", SPECIALISED, "consensus_map", "_consensus_map_backward"]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=True)
    kernels = {name: (free.split(","), fixed.split(",")) for _, name, free, fixed in
               (line.split(" ") for line in done.stdout.splitlines())}  # fmt: skip
    for name in ("_partial", "_finish", "_factors", "_backward"):
        free, fixed = kernels[name]
        numbers = {argument for argument in free if re.fullmatch(r"g?[ab]?_[ncyx]|d|chunks?", argument)}
        assert set(free) == numbers, f"{name} is specialised for the addresses of {set(free) - numbers}"
        assert {argument for argument in free if argument.endswith("_n")} <= set(fixed), name


KERNEL = Compiled("op_stage_f32_7x7", "op.stage", 70, 128, 64, 0, 1024)


@pytest.mark.parametrize(
    ("kernel", "said"),
    [
        (KERNEL, []),
        (replace(KERNEL, local=8), ["op_stage_f32_7x7 has 8 bytes of local memory on 7.0."]),
        (replace(KERNEL, local=8, capability=90), ["op_stage_f32_7x7 has 8 bytes of local memory on 9.0."]),
        (
            replace(KERNEL, shared=SHARED + 1),
            ["op_stage_f32_7x7 has 98305 bytes of shared memory on 7.0; 98304 is the limit."],
        ),
        (replace(KERNEL, shared=SHARED + 1, capability=80), []),
    ],
)
def test_what_fails_and_what_does_not(kernel, said):
    assert triton_report.problems([kernel]) == said


def test_a_row_of_the_report():
    """64 registers for 128 threads: eight programs, half of the warps; and a spill is said."""
    rows = triton_report.report([KERNEL, replace(KERNEL, capability=80, local=8)], "1.2.3")
    assert "| `op_stage_f32_7x7` | 128 | 1024 | 64 · 50% | 64 · 50% · 8 B local |  |\n" in rows
    assert "Compiled ahead of time with Triton 1.2.3, whose ptxas" in rows


def test_arguments_that_it_does_not_know_are_refused_in_one_sentence():
    before = triton_report.DOCUMENT.read_bytes()
    said = run(sys.executable, "-m", "bench.triton_report", "--what", cwd=ROOT, expect=1)
    assert said == "m3em_fast: bench.triton_report takes no arguments, or --json and a file.\n"
    assert triton_report.DOCUMENT.read_bytes() == before
