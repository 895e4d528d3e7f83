"""bench/cuda_work.py: what it says of the kernels of csrc/cuda, and that they do no more than they did."""

import re
import sys

import pytest

from bench import cuda_count, cuda_report, cuda_work
from bench.cuda_count import CARDS, Compiled, Limits, limits, measure_each
from bench.cuda_host import Failed, Host
from bench.ptx.cost import KINDS
from build_cases import ROOT, run
from ptx_cases import CSRC, needs_nvrtc


@pytest.fixture(scope="module")
def compiled():
    return Compiled(CSRC)


@pytest.fixture(scope="module")
def host():
    return Host(CSRC)


@pytest.fixture(scope="module")
def found(compiled, host):
    return {case: measure_each(compiled, host, case, cuda_work.ARCHS) for case in cuda_work.cases()}


@pytest.fixture(scope="module")
def works(found):
    return {str(case): by["compute_70"] for case, by in found.items()}


# ------------------------------------------------------------------------------------------------- what it says


@needs_nvrtc
def test_the_document_is_what_the_kernels_do_now(found, compiled):
    text = cuda_work.report([(by, compiled) for by in found.values()])
    assert cuda_work.DOCUMENT.read_text() == text, "make cuda-work writes it anew"


@needs_nvrtc
def test_every_op_and_stage_that_moves_maps_is_in_it(compiled):
    stages = {f"{op}_{stage}" for op, stage, _ in cuda_count.WAYS}
    for path in (CSRC / "cuda").glob("*.cu"):
        for name in compiled.module(path.stem).kernels:
            stage = re.fullmatch(rf"({path.stem}_\w+)_(f64|f32|f16|bf16)_\w+", name)[1]
            assert stage in stages or stage.endswith("_finish")


@needs_nvrtc
def test_a_block_moves_what_the_tensors_hold(works):
    """A block of channel_gate has whole channels of a sample: x once, and every copy once."""
    work = works["channel_gate_forward f16 14x14"]
    channels, rest = divmod(work.numbers, 3 * 196)
    assert rest == 0 and 0 < channels <= 1024
    gates = work.read + work.written - 2 * work.numbers
    assert gates == 2 * 2 * channels
    assert work.tally.barriers >= 0 and work.loaded >= work.read


class Counts:
    """As much of a Work as the limits are made of."""

    moved, threads, shared, wavefronts = 90_000, 256, 8192, 1000
    instructions = dict.fromkeys(KINDS, 1000.0)


def test_limits_are_arithmetic():
    counts = Counts()
    counts.tally = type("Tally", (), {"rounds": 10})
    found = limits(counts, CARDS["V100"], cuda_report.Usage(64, 0, 0, 0))
    time = 90_000 / (900 / 80)  # ns
    assert found.blocks == 4
    assert found.issue == pytest.approx(time / (6000 / 4 / 1.53))
    assert found.shared == pytest.approx(time / (1000 / 1.53))
    assert found.latency == pytest.approx(4 * time / (10 * 450))
    assert found.binding == "latency"
    counts.tally.rounds = counts.wavefronts = 0
    assert limits(counts, CARDS["V100"], cuda_report.Usage(64, 0, 0, 0)).binding == "issue"
    assert Limits(4, 2.0, 0.5, 1.0).binding == "shared"


@needs_nvrtc
def test_one_kernel_on_the_terminal(capsys):
    cuda_work.main(
        ["--kernel", "consensus_pool_forward, no map", "--dtype", "f16", "--shape", "7x7", "--card", "A100", "--lines"]
    )
    out, err = capsys.readouterr()
    assert err == ""
    *lines, head, row = out.splitlines()
    assert head.split()[:4] == ["the", "limits:", "A100", "instr"]
    assert row.startswith("consensus_pool_forward, no map f16 7x7 ")
    assert row.count("%") >= 1
    assert lines[0].startswith("consensus_pool_forward_f16_packs, ")
    assert any(re.search(r"\d+ of \d+ sectors +ld\.global", line) for line in lines)
    assert any(re.search(r"\d+ of \d+ wavefronts +ld\.shared", line) for line in lines)


def test_a_name_is_that_kernel_and_a_part_of_one_is_all_that_have_it():
    names = {case.name for case in cuda_work.cases("consensus_map_partial")}
    assert names == {"consensus_map_partial"}
    parts = {case.name for case in cuda_work.cases("map_partial")}
    assert parts == {"consensus_map_partial", *(f"consensus_map_partial, {how}" for how in ("channels_last", "center"))}
    assert {case.dtype for case in cuda_work.cases("channels_last")} == {"f32", "f16"}


@needs_nvrtc
def test_maps_lie_as_a_case_says(host):
    """Neighbours in memory are positions, or channels; and it is the Pearson coefficient where that is asked for."""
    seen = {}
    for said in ("", "channels_last", "center"):
        case = cuda_count.Case("consensus_map", "partial", said, "f16", "7x7")
        cuda_count.launch(host, case, lambda each, _, said=said: seen.setdefault(said, each.kernel))
    forms = {"": "7x7", "channels_last": "7x7", "center": "any"}
    assert seen == {said: f"consensus_map_partial_f16_{form}" for said, form in forms.items()}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--kernel", "none"], "--kernel must match one of these: channel_gate_forward, .*; 'none' does not."),
        (["--source", "/nowhere"], "--source must be the folder csrc of a tree; /nowhere has no folder cuda."),
        (["--write", "--dtype", "f16"], "--write is about all kernels of this tree, and goes with no other choice."),
        (["--shape", "8x8"], "argument --shape: invalid choice: .*"),
    ],
)
def test_bad_options_are_one_sentence(capsys, words, said):
    with pytest.raises(SystemExit) as stopped:
        cuda_work.main(words)
    assert stopped.value.code == 2
    assert re.fullmatch(rf"bench\.cuda_work: {said}\n", capsys.readouterr().err)


@needs_nvrtc
def test_a_tree_that_lacks_something(tmp_path):
    for folder in ("cuda", "cpu"):
        (tmp_path / folder).mkdir()
    with pytest.raises(
        SystemExit, match=rf"^m3em_fast: {tmp_path}/\S+ cannot be read \(No such file or directory\)\.$"
    ):
        cuda_work.main(["--source", str(tmp_path), "--kernel", "pool_forward", "--dtype", "f16"])


@needs_nvrtc
def test_a_stage_that_nobody_launches_is_named(compiled, host):
    with pytest.raises(Failed, match=r"launches no kernel consensus_pool_before; WAYS in bench/cuda_count\.py has it"):
        measure_each(compiled, host, cuda_count.Case("consensus_pool", "before", "", "f16", "7x7"), ["compute_70"])


def test_without_nvrtc_the_command_says_so_in_one_sentence():
    before = cuda_work.DOCUMENT.read_bytes()
    command = (sys.executable, "-m", "bench.cuda_work", "--write")
    said = run(*command, cwd=ROOT, expect=1, M3EM_NVRTC="/nonexistent/libnvrtc.so")
    assert re.fullmatch(r"m3em_fast: NVRTC cannot be loaded from /nonexistent/libnvrtc\.so \(.*\)\.\n", said)
    assert cuda_work.DOCUMENT.read_bytes() == before


# ------------------------------------------------------------------------------------------------------- limits

# The most that a kernel may take: a lane's instructions and wavefronts for a number, sectors against those that its
# bytes fill; of any dtype. Whoever makes a kernel better makes its limits tighter.
CEILINGS = {
    ("channel_gate_forward", "7x7"): (15.2, 0.39, 1.05),
    ("channel_gate_forward", "14x14"): (14.4, 0.37, 1.04),
    ("channel_gate_backward", "7x7"): (13.8, 0.86, 1.05),
    ("channel_gate_backward", "14x14"): (11.5, 0.7, 1.04),
    ("channel_gate_backward, x frozen", "7x7"): (13.7, 0.76, 1.05),
    ("channel_gate_backward, x frozen", "14x14"): (11, 0.56, 1.04),
    ("consensus_map_partial", "7x7"): (12.4, 4.1, 1.06),
    ("consensus_map_partial", "14x14"): (9, 3.2, 1.04),
    ("consensus_map_backward", "7x7"): (19.9, 3.9, 1.04),
    ("consensus_map_backward", "14x14"): (14.6, 3.85, 1.05),
    ("consensus_pool_forward", "7x7"): (17.3, 1.23, 1.01),
    ("consensus_pool_forward", "14x14"): (13, 0.85, 1.01),
    ("consensus_pool_forward, no map", "7x7"): (17, 1.23, 1.01),
    ("consensus_pool_forward, no map", "14x14"): (12.8, 0.85, 1.01),
    ("consensus_pool_backward", "7x7"): (12.6, 0.57, 1.01),
    ("consensus_pool_backward", "14x14"): (11.8, 0.42, 1.01),
    ("consensus_pool_backward, x frozen", "7x7"): (13.3, 0.99, 1.01),
    ("consensus_pool_backward, x frozen", "14x14"): (9.3, 0.7, 1.01),
    ("consensus_pool_backward, no map", "7x7"): (21.1, 0.77, 1.01),
    ("consensus_pool_backward, no map", "14x14"): (20, 0.68, 1.01),
    ("channel_gate_forward, channels_last", "7x7"): (5.6, 0.48, 1.01),
    ("channel_gate_forward, channels_last", "14x14"): (5.2, 0.47, 1.01),
    ("channel_gate_backward, channels_last", "7x7"): (9.7, 2.34, 1.01),
    ("channel_gate_backward, channels_last", "14x14"): (9.1, 2.33, 1.01),
    ("channel_gate_backward, x frozen, channels_last", "7x7"): (10.4, 1.74, 1.01),
    ("channel_gate_backward, x frozen, channels_last", "14x14"): (9.6, 1.72, 1.01),
    ("channel_gate_forward, columns", "7x7"): (16.4, 0.47, 1.65),
    ("channel_gate_forward, columns", "14x14"): (15.9, 0.46, 1.57),
    ("channel_gate_backward, columns", "7x7"): (20, 0.95, 1.64),
    ("channel_gate_backward, columns", "14x14"): (19.5, 0.99, 1.58),
    ("channel_gate_backward, x frozen, columns", "7x7"): (21.4, 1.26, 1.64),
    ("channel_gate_backward, x frozen, columns", "14x14"): (21.2, 1.33, 1.62),
    ("consensus_map_partial, channels_last", "7x7"): (15.1, 4.5, 1.06),
    ("consensus_map_partial, channels_last", "14x14"): (13.2, 5.3, 1.97),
    ("consensus_map_backward, channels_last", "7x7"): (16.1, 5.4, 1.04),
    ("consensus_map_backward, channels_last", "14x14"): (14.8, 5.9, 1.98),
    ("consensus_pool_forward, channels_last", "7x7"): (11.4, 0.65, 1.01),
    ("consensus_pool_forward, channels_last", "14x14"): (7.8, 0.32, 1.01),
    ("consensus_pool_forward, no map, channels_last", "7x7"): (11.2, 0.65, 1.01),
    ("consensus_pool_forward, no map, channels_last", "14x14"): (7.6, 0.32, 1.01),
    ("consensus_pool_backward, channels_last", "7x7"): (11, 0.85, 1.04),
    ("consensus_pool_backward, channels_last", "14x14"): (9.3, 0.69, 1.04),
    ("consensus_pool_backward, x frozen, channels_last", "7x7"): (15.5, 1.55, 1.06),
    ("consensus_pool_backward, x frozen, channels_last", "14x14"): (12.5, 1.25, 1.07),
    ("consensus_pool_backward, no map, channels_last", "7x7"): (11.9, 0.84, 1.01),
    ("consensus_pool_backward, no map, channels_last", "14x14"): (9.6, 0.71, 1.01),
    ("consensus_map_partial, center", "7x7"): (91.4, 11.93, 1.19),
    ("consensus_map_partial, center", "14x14"): (79.8, 13.88, 1.21),
    ("consensus_map_backward, center", "7x7"): (99.2, 9.65, 1.89),
    ("consensus_map_backward, center", "14x14"): (91.3, 10.39, 2.01),
}


@needs_nvrtc
@pytest.mark.parametrize("name", dict.fromkeys(case.name for case in cuda_work.cases()))
@pytest.mark.parametrize("shape", cuda_count.SHAPES)
def test_no_kernel_does_more_than_it_did(works, name, shape):
    found = [work for work in works.values() if (work.case.name, work.case.shape) == (name, shape)]
    others = {cuda_count.Case(*way, "", "").name for way in cuda_count.OTHER_WAYS}
    assert len(found) == (2 if name in others else 3)
    for work in found:
        each = (sum(work.instructions.values()), work.wavefronts)
        did = (*(work.each(count) for count in each), work.sectors / work.least)
        most = CEILINGS[name, shape]
        assert all(d <= m for d, m in zip(did, most, strict=True)), (work.case, did, most)
