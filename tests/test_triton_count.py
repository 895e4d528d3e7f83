"""Sizes of blocks that are calculated: one program of each Triton kernel runs on the CPU, is checked and counted, and
`python -m bench tune --calculated` chooses by what that allows on a card."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

os.environ.setdefault("TRITON_INTERPRET", "1")

from bench import triton_count, triton_report, tune
from bench.case import Size
from bench.cuda_count import CARDS, Limits
from bench.cuda_report import Usage
from bench.triton_count import Choice, Program, Tried, chosen, score
from build_cases import ROOT
from m3em_fast.triton import _table
from test_triton_compile import environment, needs_triton
from test_tune import table

SCRIPT = """
import json, sys, torch
from bench.case import Size
from bench.triton_count import Kernels, Problem, Unfit
from m3em_fast.triton import _table
kernels, found = Kernels(), {}
for op, c in (("channel_gate", 32), ("consensus_map", 64), ("consensus_pool", 72)):
    for mode in ("forward", "backward"):
        for dtype, on in ((torch.float32, (70, 80)), (torch.float16, (80,)), (torch.bfloat16, (90,))):
            problem = Problem(op, mode, dtype, Size(3, c, c, 7, 7))
            for capability in on:
                for sizes in (None, {"BLOCK_C": 8, "BLOCK_P": 32, "num_warps": 2}):
                    of = kernels.program(problem, capability, sizes)
                    key = f"{op} {mode} {str(dtype)[6:]} {capability} {0 if sizes is None else 8}"
                    found[key] = [of.programs, of.work.threads, of.work.numbers, of.work.read, of.work.written,
                                  of.again, of.registers, len(kernels._works[problem])]
wrong = []
for op, name in (("channel_gate", "out"), ("consensus_map", "partial"), ("consensus_pool", "out")):
    problem = Problem(op, "forward", torch.float32, Size(3, 64, 64, 7, 7))
    right = problem.wanted
    problem.wanted = lambda t: {k: v * 1.001 if k == name else v for k, v in right(t).items()}
    try:
        kernels.program(problem, 80, None)
    except Unfit as reason:
        wrong.append(str(reason))
json.dump([found, wrong], sys.stdout)
"""


@pytest.fixture(scope="module")
def counted():
    done = subprocess.run([sys.executable, "-c", SCRIPT], cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@needs_triton
def test_a_program_of_every_kernel_moves_what_its_tensors_hold(counted):
    found, _ = counted
    assert len(found) == 6 * 4 * 2
    for key, (programs, threads, numbers, read, written, again, registers, _) in found.items():
        op, mode, dtype, _, block = key.split()
        size = 4 if dtype == "float32" else 2
        assert 0 < registers <= 255 and read and written, key
        if block != "8":
            continue
        assert threads == 64
        maps = {"channel_gate forward": 3, "consensus_pool forward": 1, "consensus_map backward": 4}
        maps |= {"channel_gate backward": 4, "consensus_pool backward": 2, "consensus_map forward": 2}
        many = maps[f"{op} {mode}"]
        if f"{op} {mode}" == "channel_gate forward":
            assert (programs, numbers) == (3 * 7, many * 256), key  # 1568 numbers in blocks of 256
        elif f"{op} {mode}" == "consensus_pool backward":
            assert (programs, numbers) == (3 * 3, many * 32 * 49), key  # four blocks of 8 channels
            assert again == 4 * 49
        elif f"{op} {mode}" == "consensus_map forward":
            # A chunk of 64 channels whatever the block.
            assert (programs, numbers, written) == (3, many * 64 * 49, 4 * 3 * 59), key
        elif f"{op} {mode}" == "consensus_map backward":
            # 4 rows of 7 at a time, and the last three.
            assert programs == 3 * 8 * 2 and written == 2 * 8 * 49 * size, key
            assert numbers == 4 * 8 * 49, key
        else:
            assert (programs, numbers) == (3 * {"channel_gate": 4, "consensus_pool": 9}[op], many * 8 * 49), key


@needs_triton
def test_the_same_ptx_is_run_once(counted):
    found, _ = counted
    gate = [row[-1] for key, row in found.items() if key.startswith("channel_gate forward float32")]
    assert gate == [1, 2, 2, 2]  # two sizes; on the second card nothing is new


@needs_triton
def test_a_program_that_computes_something_else_does_not_count(counted):
    _, wrong = counted
    assert len(wrong) == 3 and all(": off by " in reason for reason in wrong)


class Work:
    """Counts of 90000 bytes, all of maps."""

    threads, shared, moved, wavefronts, numbers = 128, 0, 90_000, 1000, 45_000

    def __init__(self):
        self.case = type("Case", (), {"dtype": "float16"})
        self.instructions = {"float": 2000.0, "integer": 4000.0}
        self.tally = type("Tally", (), {"rounds": 10})


def test_the_score_is_arithmetic():
    card, usage = CARDS["V100"], Usage(64, 0, 0, 0)
    work = Work()
    program = Program(work, 3 * 4, 64, 0)
    work.tally.rounds = 200
    reached, each = score(program, card, 160, usage)
    # 640 programs are 8 for each of 80 multiprocessors, which hold 8 of 128 threads with 64 registers.
    assert each.blocks == 8 and each.latency < min(each.issue, each.shared, 2.0)
    assert reached == pytest.approx(each.latency)
    # 480 programs: 6 each, of which none waits for the others; in the same time, so the waits move less.
    fewer, _ = score(program, card, 120, usage)
    assert fewer == pytest.approx(each.latency * 6 / 8)
    # 800: 10 each, in two turns, of which the second is a short one.
    more, _ = score(program, card, 200, usage)
    assert more == pytest.approx(each.latency * 10 / 16)
    # 641 programs: one multiprocessor has 9, in two turns.
    work = Work()
    work.tally.rounds, work.instructions = 0.0001, {"integer": 40_000.0}
    even, each = score(Program(work, 3, 64, 0), card, 640, usage)
    odd, _ = score(Program(work, 3, 64, 0), card, 641, usage)
    assert even == pytest.approx(each.issue) and odd == pytest.approx(each.issue * 641 / 720)
    # What is no map's, and what is read again, costs its share.
    work.instructions = {"float": 1.0}
    work.wavefronts = 0
    assert score(Program(work, 3, 64, 0), card, 640, usage)[0] == triton_count.ENOUGH
    assert score(Program(work, 3, 64, 30_000), card, 640, usage)[0] == pytest.approx(0.75 * triton_count.ENOUGH)
    work.numbers = 22_500
    assert score(Program(work, 3, 64, 0), card, 640, usage)[0] == pytest.approx(0.5 * triton_count.ENOUGH)


def test_what_is_chosen():
    one = Tried({"BLOCK_C": 1}, 1.0, 10.0, Limits(1, 1.0, 1.0, 1.0))
    better, same, cheap = replace(one, score=1.2), replace(one, score=1.1), replace(one, score=1.2, instructions=9.0)
    assert chosen(one, [same, better, cheap]) is cheap
    assert chosen(one, [same]) is None and chosen(one, []) is None


SMALL = ["consensus_pool", "--dtype", "float16", "--sizes", "7x7"]
ROWS = ["consensus_pool/float16/1024x64", "consensus_pool_backward/float16/1024x64"]
SIZES = {"BLOCK_C": 2, "BLOCK_P": 64, "num_warps": 2}
OTHER = {"BLOCK_C": 4, "BLOCK_P": 64, "num_warps": 2}


@pytest.fixture
def counts(monkeypatch):
    """What would be counted, and for which rows: better sizes for the forward alone."""
    seen = []

    class Counter:
        def __init__(self, samples):
            self.samples = samples

        def choose(self, problem, capability):
            seen.append((problem.row, capability))
            forward = problem.mode == "forward"
            return Choice(SIZES, "BLOCK_C 2, 90%") if forward else Choice(None, "the computed sizes")

    monkeypatch.setattr(triton_count, "Counter", Counter)
    return seen


def test_a_calculation_asks_no_card_and_stays_apart(counts, tmp_path, capsys):
    path = tmp_path / "table.json"
    assert tune.main([*SMALL, "--calculated", "--out", str(path)]) == 0
    found = json.loads(path.read_text())
    assert found["calculated"] == {card: {ROWS[0]: SIZES} for card in ("70", "80", "90")}
    assert found["capabilities"] == found["microseconds"] == {}
    assert counts == [(row, capability) for row in ROWS for capability in (70, 80, 90)]
    assert f"80 {ROWS[0]}: BLOCK_C 2, 90%" in capsys.readouterr().out
    assert _table.checked(found) == found


def test_a_calculation_leaves_out_what_was_measured_and_replaces_what_was_calculated(counts, tmp_path):
    path, times = tmp_path / "table.json", {"cuda": 1.0, "triton": 2.0}
    path.write_text(table({"70": {ROWS[0]: OTHER}}, {"80": {ROWS[1]: times}}, {"90": dict.fromkeys(ROWS, OTHER)}))
    assert tune.main([*SMALL, "7x8", "--calculated", "--out", str(path)]) == 0
    found = json.loads(path.read_text())
    assert found["capabilities"] == {"70": {ROWS[0]: OTHER}} and found["microseconds"] == {"80": {ROWS[1]: times}}
    assert found["calculated"] == {"70": {}, "80": {ROWS[0]: SIZES}, "90": {ROWS[0]: SIZES}}
    # 7x8 has the same row.
    assert sorted(counts) == [(ROWS[0], 80), (ROWS[0], 90), (ROWS[1], 70), (ROWS[1], 90)]


def test_in_a_process_that_interprets_one_sentence(monkeypatch, tmp_path, capsys):
    pytest.importorskip("triton", reason="Triton is not installed")
    from m3em_fast.triton import _launch

    if not _launch.INTERPRETED:
        pytest.skip("TRITON_INTERPRET was not set when triton was imported")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert tune.main([*SMALL, "--calculated", "--out", str(tmp_path / "table.json")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("bench tune: --calculated: Triton has been imported with") and said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


class Fitting:
    """Kernels of which those for some sizes spill in another call of their row."""

    def __init__(self, *spilling):
        self.spilling = spilling

    def spills(self, problem, capability, sizes):
        return sizes in self.spilling


def test_sizes_that_spill_in_another_call_are_not_chosen(monkeypatch):
    monkeypatch.setattr(triton_count, "Kernels", lambda: Fitting(SIZES))
    counter = triton_count.Counter(160)
    problem = triton_count.Problem("consensus_map", "forward", torch.float32, Size(3, 8, 8, 7, 7))
    limits = Limits(1, 2.0, 2.0, 2.0)
    reached = {None: Tried({}, 0.5, 1.0, limits), 2: Tried(SIZES, 1.5, 1.0, limits), 4: Tried(OTHER, 1.0, 1.0, limits)}
    monkeypatch.setattr(triton_count, "candidates", lambda *shape: [SIZES, OTHER])
    monkeypatch.setattr(counter, "tried", lambda p, c, sizes: reached[sizes and sizes["BLOCK_C"]])
    assert counter.choose(problem, 80).sizes == OTHER
    monkeypatch.setattr(counter, "_kernels", Fitting(SIZES, OTHER))
    assert counter.choose(problem, 80).sizes is None


@needs_triton
def test_the_pearson_coefficient_and_channels_last_share_a_row():
    """With these sizes they spill, and the plain call does not."""
    code = (
        "import torch; from bench.case import Size; from bench.triton_count import Kernels, Problem; "
        "kernels = Kernels(); "
        "problem = Problem('consensus_map', 'forward', torch.float32, Size(3, 8, 512, 14, 14)); "
        "sizes = {'BLOCK_C': 8, 'BLOCK_P': 256, 'num_warps': 2}; "
        "print(kernels.spills(problem, 70, sizes), kernels.spills(problem, 70, problem.default(70)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=environment())
    assert done.stdout.split() == ["True", "False"], done.stderr[-2000:]


def test_what_cannot_be_served_or_run_is_said(monkeypatch):
    monkeypatch.setattr(triton_count, "Kernels", Fitting)
    counter = triton_count.Counter(160)
    problem = triton_count.Problem("channel_gate", "forward", torch.bfloat16, Size(3, 8, 8, 7, 7))
    assert counter.choose(problem, 70) == Choice(None, "not served there")

    def tried(problem, capability, sizes):
        raise triton_count.ptx.Unknown("The PTX instruction brkpt is not known here (brkpt).")

    monkeypatch.setattr(counter, "tried", tried)
    said = counter.choose(problem, 80)
    assert said == Choice(None, "left out (The PTX instruction brkpt is not known here (brkpt).)")
    best = Tried(SIZES, 1.5, 1.0, Limits(1, 2.0, 2.0, 2.0))
    monkeypatch.setattr(counter, "tried", lambda p, c, sizes: best if sizes else replace(best, score=0.5))
    assert counter.choose(problem, 80) == Choice(
        SIZES, "BLOCK_C 2, BLOCK_P 64, num_warps 2, 150% for 50% of the computed sizes"
    )

    def some(problem, capability, sizes):
        if sizes and sizes["num_warps"] == 4:
            raise triton_count.Unfit("8 bytes of local memory")
        if sizes:
            raise triton_count.Wrong("out: off by 3.")
        return best

    monkeypatch.setattr(counter, "tried", some)
    many = sum(sizes["num_warps"] != 4 for sizes in tune.candidates(torch.bfloat16, 8, 49))
    assert many > 2
    said = counter.choose(problem, 80)
    assert said == Choice(None, f"the computed sizes, 150%; {many} candidates left out (out: off by 3.)")


def test_sizes_that_spill_or_do_not_fit_are_none(monkeypatch):
    """Before anything of them is run."""
    all_of = object.__new__(triton_count.Kernels)
    metadata = type("Metadata", (), {"shared": triton_report.SHARED + 1, "num_warps": 4})
    built = type("Built", (), {"asm": {"cubin": b"", "ptx": "no PTX"}, "metadata": metadata})
    kernel = type("Kernel", (), {"warmup": staticmethod(lambda *a, grid, **c: built)})
    monkeypatch.setattr(triton_count, "used", lambda cubin: (64, 0))
    with pytest.raises(triton_count.Unfit, match="98305 bytes of shared memory"):
        all_of._one(None, 70, kernel, 3, (), {})
    monkeypatch.setattr(triton_count, "used", lambda cubin: (64, 8))
    with pytest.raises(triton_count.Unfit, match="8 bytes of local memory"):
        all_of._one(None, 80, kernel, 3, (), {})

    def warmup(*arguments, **options):
        raise ValueError("numel exceeds triton maximum tensor numel")

    with pytest.raises(triton_count.Unfit, match=r"cannot be compiled \(ValueError\)"):
        all_of._one(None, 80, type("Kernel", (), {"warmup": staticmethod(warmup)}), 3, (), {})
