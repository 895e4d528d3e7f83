"""The table of block sizes, and `python -m bench tune`, which measures it on a card: here the times are made up."""

import importlib
import json
import os
import re
import sys

import pytest
import torch

# A test runs kernels, interpreted, on blocks of sizes of its own.
os.environ.setdefault("TRITON_INTERPRET", "1")

from bench import __main__ as bench
from bench import tune
from bench.case import Size
from bench.core import Settings
from build_cases import ROOT, run
from m3em_fast.triton import _plan, _table

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(autouse=True)
def forget():
    """The table as it is on disk, before and after."""
    yield
    _table.table.cache_clear()
    _table.config.cache_clear()
    _plan.plan.cache_clear()


@pytest.fixture
def card(monkeypatch, tmp_path):
    """A V100 that takes 1 us for candidate 3 in the forward, for candidate 5 in the backward, and 2 us for others."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "V100")

    def measure(case, tries, rows, settings):
        fast = {"forward": 3, "backward": 5}
        return {key: {mode: 1e-6 if key == best else 2e-6 for mode, best in fast.items()} for key in tries}

    monkeypatch.setattr(tune, "measure", measure)
    return tmp_path / "table.json"


def fits(sizes, dtype):
    """Whether a tile of accumulators, the most that a program has in shared memory at a time, leaves room for a second
    one in that of a V100, and whether Triton can take the numbers."""
    for number in sizes.values():
        assert number > 0 and number & (number - 1) == 0, sizes
    bytes_a_number = 8 if dtype == torch.float64 else 4
    assert 2 * sizes["BLOCK_C"] * sizes["BLOCK_P"] * bytes_a_number <= _table.SHARED, sizes
    assert sizes["num_warps"] <= 32


@pytest.mark.parametrize("op", _table.OPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_default_and_every_candidate_fits_a_v100(op, dtype):
    for channels in (1, 3, 64, 1000, 1024, 5000):
        for positions in (1, 5, 49, 196, 3136, 10**6):
            fits(_table.config(op, dtype, channels, positions, 70), dtype)
            for sizes in tune.candidates(dtype, channels, positions):
                fits(sizes, dtype)
    assert len(tune.candidates(dtype, 512, 49)) > 10


def test_every_row_of_the_committed_table_fits_a_v100():
    found = json.loads(_table.PATH.read_text())
    assert set(found) == {"about", "capabilities"}
    for capability, rows in found["capabilities"].items():
        assert int(capability) >= 70
        for row, sizes in rows.items():
            op, dtype, bucket = row.split("/")
            assert op in _table.OPS and set(sizes) == {"BLOCK_C", "BLOCK_P", "num_warps"}
            assert bucket == _table.bucket(*map(int, bucket.split("x")))
            fits(sizes, getattr(torch, dtype))


def test_a_row_serves_its_bucket_on_its_card_and_nothing_else(monkeypatch, tmp_path):
    sizes = {"BLOCK_C": 4, "BLOCK_P": 64, "num_warps": 2}
    path = tmp_path / "table.json"
    path.write_text(json.dumps({"about": "", "capabilities": {"80": {"channel_gate/float16/1024x64": sizes}}}))
    monkeypatch.setattr(_table, "PATH", path)
    _table.table.cache_clear()
    _table.config.cache_clear()
    half = torch.float16
    assert _table.config("channel_gate", half, 1024, 49, 80) == sizes
    assert _table.config("channel_gate", half, 600, 56, 80) == sizes
    for other in (
        ("channel_gate", half, 1024, 49, 70),
        ("channel_gate", half, 1024, 196, 80),
        ("channel_gate", half, 512, 49, 80),
        ("channel_gate", torch.float32, 1024, 49, 80),
        ("channel_gate_backward", half, 1024, 49, 80),
    ):
        assert _table.config(*other) == _table.default(*other)
    with pytest.raises(ValueError, match=r"config: op must be one of channel_gate, .*, got 'gate'"):
        _table.config("gate", half, 1, 1, 80)


def test_the_wheel_has_the_table():
    """It lies beside its module; pyproject.toml or MANIFEST.in must name it."""
    words = (ROOT / "pyproject.toml").read_text() + (ROOT / "MANIFEST.in").read_text()
    assert _table.PATH.parent == ROOT / "m3em_fast/triton"
    assert "table.json" in words or "*.json" in words


def test_a_trial_leaves_the_table_as_it_was(monkeypatch):
    kept, tried = ({"BLOCK_C": c, "BLOCK_P": 64, "num_warps": 2} for c in (1, 2))
    row, shape = "channel_gate/float32/8x64", ("channel_gate", torch.float32, 8, 49, 80)
    _table.table.cache_clear()
    monkeypatch.setitem(_table.table(), "80", {row: kept})
    _table.config.cache_clear()
    assert _table.config(*shape) == kept
    with tune.trial(80, [row], tried):
        assert _table.config(*shape) == tried
    with tune.trial(80, [row], None):
        assert _table.config(*shape) == _table.default(*shape)
    assert _table.config(*shape) == kept


def test_without_a_card_one_sentence_and_status_2():
    said = run(sys.executable, "-m", "bench", "tune", cwd=ROOT, expect=2, CUDA_VISIBLE_DEVICES="")
    assert said == "bench tune: torch sees no CUDA device here, and the table is measured on one.\n"


def test_the_fastest_of_each_mode_is_written(card, capsys):
    before = _table.PATH.read_bytes()
    arguments = ["tune", "consensus_map", "--dtype", "float16", "--sizes", "7x7", "--out", str(card)]
    assert bench.main(arguments) == 0
    found = json.loads(card.read_text())["capabilities"]
    tries = tune.candidates(torch.float16, 512, 49)
    assert found == {
        "70": {
            "consensus_map/float16/512x64": tries[3],
            "consensus_map_backward/float16/512x64": tries[5],
        }
    }
    assert "consensus_map/float16/512x64: 1.0 us with BLOCK_C" in capsys.readouterr().out
    assert _table.PATH.read_bytes() == before
    assert list(card.parent.iterdir()) == [card]


def test_rows_of_other_cards_and_shapes_stay(card):
    kept = {"BLOCK_C": 1, "BLOCK_P": 64, "num_warps": 1}
    rows = {"consensus_map/float16/512x256": kept, "consensus_pool/float32/1024x64": kept}
    card.write_text(json.dumps({"about": "x", "capabilities": {"70": rows, "90": rows}}))
    assert tune.main(["consensus_pool", "--dtype", "float32", "--sizes", "7x7", "--out", str(card)]) == 0
    found = json.loads(card.read_text())
    assert found["about"] == "x" and found["capabilities"]["90"] == rows
    assert found["capabilities"]["70"]["consensus_map/float16/512x256"] == kept
    assert found["capabilities"]["70"]["consensus_pool/float32/1024x64"] != kept


def test_computed_sizes_win_within_the_margin_and_a_stale_row_goes(card, monkeypatch):
    row = "channel_gate/float32/1024x64"
    card.write_text(json.dumps({"about": "x", "capabilities": {"70": {row: {"BLOCK_C": 1}}}}))
    times = {None: 1.01e-6, 0: 1e-6, 1: 3e-6}
    monkeypatch.setattr(tune, "measure", lambda *a: {k: {"forward": t, "backward": t} for k, t in times.items()})
    assert tune.main(["channel_gate", "--dtype", "float32", "--sizes", "7x7", "--out", str(card)]) == 0
    assert json.loads(card.read_text())["capabilities"]["70"] == {}
    assert tune.best({k: {"forward": t} for k, t in times.items()}, "forward", 0.001) == 0
    assert tune.best({0: {"forward": 2.0}, 1: {"forward": 1.0}}, "forward", 0.02) == 1  # the computed sizes failed


def test_what_the_card_does_not_serve_is_left_out(card, monkeypatch, capsys):
    def measure(case, *rest):
        raise tune.Unserved("on compute capability 7.0 it serves float32 and float16, not bfloat16")

    monkeypatch.setattr(tune, "measure", measure)
    assert tune.main(["channel_gate", "--dtype", "bfloat16", "--sizes", "7x7", "--out", str(card)]) == 0
    assert "left out (on compute capability 7.0" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["gated_projection"], "there is no Triton kernel to tune for 'gated_projection'"),
        (["--sizes", "7"], "--sizes must be heights and widths such as 7x7, .* got '7'"),
        (["--sizes", "2x3"], "--sizes must be .* at least 4 long or wide"),
        (["--samples", "0"], "--samples must be at least 1, got 0"),
        (["--seconds", "nan"], "--seconds must be a number from 0 on, got nan"),
        (["--out", "/"], "--out: the table cannot be written to /"),
    ],
)
def test_what_cannot_work_is_refused_in_one_sentence(card, capsys, arguments, said):
    assert tune.main(arguments) == 2
    found = capsys.readouterr().err
    assert found.startswith("bench tune: ") and found.count("\n") == 1
    assert re.search(said, found), found


def test_a_file_that_is_no_table_is_left_alone(card, capsys):
    for text in ("[]", "{", '{"capabilities": 3}'):
        card.write_text(text)
        assert tune.main(["--out", str(card)]) == 2
        assert card.read_text() == text
        assert f"{card} is there already and is no table of block sizes." in capsys.readouterr().err


@pytest.mark.parametrize("op", tune.OPS)
def test_a_candidate_reaches_the_kernels_and_a_wrong_one_is_not_timed(monkeypatch, op):
    """The whole way on the CPU, where kernels are interpreted."""
    pytest.importorskip("triton", reason="Triton is not installed")
    from m3em_fast.triton import _launch

    if not _launch.INTERPRETED:
        pytest.skip("TRITON_INTERPRET was not set when triton was imported")
    module = importlib.import_module(f"m3em_fast.triton.{op}")
    monkeypatch.setattr(tune, "capability_here", lambda: 0)
    if hasattr(module, "sizes"):  # interpreted, it does not look into the table
        monkeypatch.setattr(module, "sizes", lambda kind, x, *shape: _table.config(kind, *shape, 0))
    seen, real = [], module.launch

    def launch(kernel, programs, writes, *arguments, **constants):
        real(kernel, programs, writes, *arguments, **constants)
        seen.append(constants)
        if constants.get("num_warps") == 8:  # this one computes something else
            next(t for t in writes if t is not None).fill_(3.0)

    monkeypatch.setattr(module, "launch", launch)
    size = Size(n=1, c=8, d=8, h=4, w=4)
    case = importlib.import_module(f"bench.{op}").cases(size, torch.float32, "contiguous")[0]
    rows = [tune.row_of(kind, torch.float32, 8, 16) for kind in tune.modes_of(op).values()]
    good, wrong = {"BLOCK_C": 2, "BLOCK_P": 8, "num_warps": 1}, {"BLOCK_C": 4, "BLOCK_P": 4, "num_warps": 8}
    settings = Settings(seconds=0.0, min_rounds=1, max_rounds=1, warm_up=0)
    times = tune.measure(case, {None: None, 0: good, 1: wrong}, rows, settings, "cpu")
    assert set(times) == {None, 0}
    assert all(set(found) >= {"forward", "backward"} for found in times.values())
    assert any(c.get("BLOCK_P", 0) == 8 or c.get("BLOCK", 0) == 16 for c in seen)
    assert _table.table().get("0", {}) == {}
    with pytest.raises(tune.Unserved, match="wrong: "):
        tune.measure(case, {1: wrong}, rows, settings, "cpu")
