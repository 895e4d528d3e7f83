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
from bench import gpu_measure, providers, tune
from bench.case import Size
from bench.core import Settings
from build_cases import ROOT, run
from m3em_fast.triton import _plan, _table

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(autouse=True)
def forget():
    """The table as it is on disk, before and after."""
    yield
    _table.stored.cache_clear()
    _table.config.cache_clear()
    _plan.plan.cache_clear()


@pytest.fixture
def card(monkeypatch, tmp_path):
    """A V100 that takes 1 us for candidate 3 in the forward, for candidate 5 in the backward, and 2 us for others; and
    1.25 us for the compiled forward, 0.75 us for the compiled backward."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "V100")

    def measure(case, tries, rows, settings):
        fast = {"forward": 3, "backward": 5}
        return {key: {mode: 1e-6 if key == best else 2e-6 for mode, best in fast.items()} for key in tries}

    def compare(case, rows, settings):
        compare.sizes = rows
        return {mode: {"cuda": time, "triton": 1e-6} for mode, time in (("forward", 1.25e-6), ("backward", 7.5e-7))}

    monkeypatch.setattr(tune, "measure", measure)
    monkeypatch.setattr(tune, "compare", compare)
    return tmp_path / "table.json"


def table(capabilities, microseconds=None, calculated=None):
    parts = {"capabilities": capabilities, "calculated": calculated or {}, "microseconds": microseconds or {}}
    return json.dumps({"about": "x"} | parts)


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
    found = _table.checked(json.loads(_table.PATH.read_text()))
    for capability, rows in (*found["capabilities"].items(), *found["calculated"].items()):
        assert int(capability) >= 70
        for row, sizes in rows.items():
            fits(sizes, getattr(torch, row.split("/")[1]))


def test_a_row_serves_its_bucket_on_its_card_and_nothing_else(monkeypatch, tmp_path):
    sizes = {"BLOCK_C": 4, "BLOCK_P": 64, "num_warps": 2}
    path = tmp_path / "table.json"
    path.write_text(table({"80": {"channel_gate/float16/1024x64": sizes}}))
    monkeypatch.setattr(_table, "PATH", path)
    _table.stored.cache_clear()
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
    for part in ("calculated", "capabilities"):
        monkeypatch.setitem(_table.stored()[part], "80", {row: kept})
        _table.config.cache_clear()
        assert _table.config(*shape) == kept
        with tune.trial(80, {row: tried}):
            assert _table.config(*shape) == tried
        with tune.trial(80, {row: None}):
            assert _table.config(*shape) == _table.default(*shape)
        assert _table.config(*shape) == kept


def test_what_was_measured_comes_before_what_was_calculated(monkeypatch, tmp_path):
    measured, counted = ({"BLOCK_C": c, "BLOCK_P": 64, "num_warps": 2} for c in (1, 2))
    row, other = "channel_gate/float32/8x64", "channel_gate/float32/16x64"
    path = tmp_path / "table.json"
    path.write_text(table({"80": {row: measured}}, calculated={"80": {row: counted, other: counted}}))
    monkeypatch.setattr(_table, "PATH", path)
    _table.stored.cache_clear()
    _table.config.cache_clear()
    assert _table.config("channel_gate", torch.float32, 8, 49, 80) == measured
    assert _table.config("channel_gate", torch.float32, 16, 49, 80) == counted
    shape = ("channel_gate", torch.float32, 16, 49, 90)
    assert _table.config(*shape) == _table.default(*shape)


def test_without_a_card_one_sentence_and_status_2():
    said = run(sys.executable, "-m", "bench", "tune", cwd=ROOT, expect=2, CUDA_VISIBLE_DEVICES="")
    assert said == "bench tune: torch sees no CUDA device here, and the table is measured on one.\n"


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["consensus_map", "channel_gate", "--dtype", "float16", "float64", "--seconds", "2.5"],
        ["--sizes", "7x7", "--samples", "3", "--margin", "0.1", "--calculated", "--out", "x.json"],
    ],
)
def test_options_are_read_alike_without_tyro(monkeypatch, words):
    seen = []
    monkeypatch.setattr(tune, "run", lambda options, console: seen.append(options))
    monkeypatch.setattr(tune, "calculate", tune.run)
    assert tune.main(words) == 0
    monkeypatch.setattr(tune, "Positional", None)
    assert tune.main(words) == 0
    assert seen[0] == seen[1]


def test_without_tyro_one_sentence_too():
    block = "import sys; sys.modules['tyro'] = None; sys.argv = ['tune', *sys.argv[1:]]; import runpy; "
    code = block + "runpy.run_module('bench.tune', run_name='__main__')"
    for words, said in (
        ([], "bench tune: torch sees no CUDA device here"),
        (["--dtype", "int8"], "bench tune: argument --dtype: invalid choice: 'int8'"),
        (["gated_projection"], "bench tune: there is no Triton kernel to tune for 'gated_projection'"),
    ):
        out = run(sys.executable, "-c", code, *words, cwd=ROOT, expect=2, CUDA_VISIBLE_DEVICES="")
        assert out.startswith(said) and out.count("\n") == 1, out


def test_the_fastest_of_each_mode_is_written(card, capsys):
    before = _table.PATH.read_bytes()
    arguments = ["tune", "consensus_map", "--dtype", "float16", "--sizes", "7x7", "--out", str(card)]
    assert bench.main(arguments) == 0
    found = json.loads(card.read_text())
    tries = tune.candidates(torch.float16, 512, 49)
    rows = ["consensus_map/float16/512x64", "consensus_map_backward/float16/512x64"]
    assert found["capabilities"] == {"70": dict(zip(rows, (tries[3], tries[5]), strict=True))}
    assert found["microseconds"] == {
        "70": {r: {"cuda": t, "triton": 1.0} for r, t in zip(rows, (1.25, 0.75), strict=True)}
    }
    assert tune.compare.sizes == found["capabilities"]["70"]
    said = capsys.readouterr().out
    assert f"{rows[0]}: 1.0 us with BLOCK_C" in said and f"{rows[0]}: cuda 1.2 us, triton 1.0 us" in said
    assert _table.PATH.read_bytes() == before
    assert list(card.parent.iterdir()) == [card]


def test_rows_of_other_cards_and_shapes_stay(card):
    kept = {"BLOCK_C": 1, "BLOCK_P": 64, "num_warps": 1}
    rows = {"consensus_map/float16/512x256": kept, "consensus_pool/float32/1024x64": kept}
    timed = {row: {"cuda": 3.0, "triton": 2} for row in rows}
    card.write_text(table({"70": rows, "90": rows}, {"70": timed, "90": timed}))
    assert tune.main(["consensus_pool", "--dtype", "float32", "--sizes", "7x7", "--out", str(card)]) == 0
    found = json.loads(card.read_text())
    assert found["about"] == "x" and found["capabilities"]["90"] == rows
    assert found["capabilities"]["70"]["consensus_map/float16/512x256"] == kept
    assert found["capabilities"]["70"]["consensus_pool/float32/1024x64"] != kept
    assert found["microseconds"]["90"] == timed
    assert found["microseconds"]["70"]["consensus_map/float16/512x256"] == {"cuda": 3.0, "triton": 2}
    assert found["microseconds"]["70"]["consensus_pool/float32/1024x64"] == {"cuda": 1.25, "triton": 1.0}


def test_computed_sizes_win_within_the_margin_and_overrule_what_was_there(card, monkeypatch):
    row, other = "channel_gate/float32/1024x64", {"BLOCK_C": 1, "BLOCK_P": 64, "num_warps": 1}
    card.write_text(table({"70": {row: other}}, calculated={"70": {row: other}}))
    times = {None: 1.01e-6, 0: 1e-6, 1: 3e-6}
    monkeypatch.setattr(tune, "measure", lambda *a: {k: {"forward": t, "backward": t} for k, t in times.items()})
    assert tune.main(["channel_gate", "--dtype", "float32", "--sizes", "7x7", "--out", str(card)]) == 0
    written = json.loads(card.read_text())
    assert written["capabilities"]["70"] == {
        f"{op}/float32/1024x64": _table.default(op, torch.float32, 1024, 49, 70)
        for op in ("channel_gate", "channel_gate_backward")
    }
    assert written["calculated"] == {"70": {row: other}}
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
        assert f"{card} is there already and is no table of block sizes (" in capsys.readouterr().err


SIZES, TIMES = {"BLOCK_C": 1, "BLOCK_P": 64, "num_warps": 1}, {"cuda": 2.5, "triton": 3}
ROW = "channel_gate/float16/1024x64"


@pytest.mark.parametrize(
    ("capabilities", "microseconds", "said"),
    [
        ({"70": {ROW: SIZES}, "120": {}}, {"70": {ROW: TIMES}}, None),
        ({"70": {"gate/float16/8x8": SIZES}}, {}, "capabilities, 70, gate/float16/8x8: there is no such op"),
        ({"70": {"channel_gate/int8/8x8": SIZES}}, {}, "there is no such op, dtype and shape"),
        ({"70": {"channel_gate/float16/8": SIZES}}, {}, "there is no such op, dtype and shape"),
        ({"70": {"channel_gate/float16/7x49": SIZES}}, {}, "that shape is in the row of 8x64"),
        ({"7.0": {}}, {}, "capabilities: '7.0' is no compute capability"),
        ({"70": [ROW]}, {}, "capabilities: '70' is no compute capability such as '70' with rows"),
        ([], {}, "is no compute capability"),
        ({"70": {ROW: {"BLOCK_C": 1}}}, {}, f"{ROW}: it must have BLOCK_C, BLOCK_P, num_warps"),
        ({"70": {ROW: SIZES | {"BLOCK_C": 3}}}, {}, "must be powers of two"),
        ({"70": {ROW: SIZES | {"BLOCK_C": 2.0}}}, {}, "must be powers of two"),
        ({"70": {ROW: SIZES | {"BLOCK_C": 0}}}, {}, "must be numbers above 0"),
        ({}, {"70": {ROW: TIMES | {"cpu": 1}}}, f"microseconds, 70, {ROW}: it must have cuda, triton"),
        ({}, {"70": {ROW: TIMES | {"cuda": "2"}}}, "cuda, triton must be numbers above 0"),
        ({}, {"70": {ROW: TIMES | {"cuda": float("nan")}}}, "cuda, triton must be numbers above 0"),
        ({}, {"70": {ROW: TIMES | {"cuda": True}}}, "cuda, triton must be numbers above 0"),
        ({}, None, "it must have about, capabilities, calculated, microseconds"),
    ],
)
def test_a_table_is_checked_when_it_is_read(card, monkeypatch, capsys, capabilities, microseconds, said):
    text = table(capabilities, microseconds)
    if microseconds is None:
        text = text.replace('"microseconds"', '"milliseconds"')
    card.write_text(text)
    monkeypatch.setattr(_table, "PATH", card)
    _table.stored.cache_clear()
    if said is None:
        assert _table.stored() == json.loads(text)
        return
    with pytest.raises(ValueError, match=re.escape(said)) as error:
        _table.config("channel_gate", torch.float16, 8, 8, 70)
    assert str(error.value).startswith(f"{card}: ")
    assert tune.main(["--out", str(card)]) == 2
    assert said in capsys.readouterr().err and card.read_text() == text


def test_without_compiled_kernels_sizes_are_written_and_no_times(card, monkeypatch, capsys):
    row = "channel_gate/float32/1024x64"
    card.write_text(table({}, {"70": {row: TIMES}}))

    def compare(*rest):
        raise tune.Unserved("BackendError: channel_gate: backend cuda cannot serve this call: no kernels are packed")

    monkeypatch.setattr(tune, "compare", compare)
    assert tune.main(["channel_gate", "--dtype", "float32", "--sizes", "7x7", "--out", str(card)]) == 0
    found = json.loads(card.read_text())
    assert row in found["capabilities"]["70"] and found["microseconds"]["70"] == {}
    assert "not compared with cuda (BackendError" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("op", tune.OPS)
def test_a_candidate_reaches_the_kernels_and_a_wrong_one_is_not_timed(monkeypatch, op):
    """The whole way on the CPU, where kernels are interpreted."""
    pytest.importorskip("triton", reason="Triton is not installed")
    from m3em_fast.triton import _launch

    if not _launch.INTERPRETED:
        pytest.skip("TRITON_INTERPRET was not set when triton was imported")
    module = importlib.import_module(f"m3em_fast.triton.{op}")
    monkeypatch.setattr(tune, "capability_here", lambda: 0)
    if hasattr(module, "sizes_of"):  # interpreted, it does not look into the table
        monkeypatch.setattr(module, "sizes_of", lambda kind, x, *shape: _table.config(kind, *shape, 0))
    seen, real = [], module.launch

    def launch(kernel, programs, writes, *arguments, **constants):
        real(kernel, programs, writes, *arguments, **constants)
        seen.append(constants)
        if constants.get("num_warps") == 8:  # this one computes something else
            next(t for t in writes if t is not None).fill_(3.0)

    monkeypatch.setattr(module, "launch", launch)
    size = Size(n=1, c=8, d=8, h=4, w=4)
    case = importlib.import_module(f"bench.{op}").cases(size, torch.float32, "contiguous")[0]
    rows = [_table.row_of(name, torch.float32, 8, 16) for name in (op, _table.backward_of(op))]
    good, wrong = {"BLOCK_C": 2, "BLOCK_P": 8, "num_warps": 1}, {"BLOCK_C": 4, "BLOCK_P": 4, "num_warps": 8}
    settings = Settings(seconds=0.0, min_rounds=1, max_rounds=1, warm_up=0)
    times = tune.measure(case, {None: None, 0: good, 1: wrong}, rows, settings, "cpu")
    assert set(times) == {None, 0}
    assert all(set(found) >= {"forward", "backward"} for found in times.values())
    assert any(c.get("BLOCK_P", 0) == 8 or c.get("BLOCK", 0) == 16 for c in seen)
    assert _table.stored()["capabilities"].get("0", {}) == {}
    with pytest.raises(tune.Unserved, match="wrong: "):
        tune.measure(case, {1: wrong}, rows, settings, "cpu")
    seen.clear()
    both = tune.compare(case, {rows[0]: good, rows[1]: None}, settings, "cpu", ("cpu", "triton"))
    assert set(both) == {"forward", "backward"} and all(set(found) == {"cpu", "triton"} for found in both.values())
    assert all(time > 0 for found in both.values() for time in found.values())
    assert any(c.get("BLOCK_P", 0) == 8 or c.get("BLOCK", 0) == 16 for c in seen)
    with pytest.raises(tune.Unserved, match="wrong: "):
        tune.compare(case, {rows[0]: None, rows[1]: wrong}, settings, "cpu", ("cpu", "triton"))


def test_the_records_of_make_gpu_have_triton_beside_the_compiled_kernels(monkeypatch, tmp_path):
    """With the kernels of the CPU in the place of those for a card."""
    pytest.importorskip("triton", reason="Triton is not installed")
    for module in (providers, gpu_measure):
        monkeypatch.setattr(module, "backends", lambda device="cpu": ("cpu", "triton", "reference"))
    monkeypatch.setattr(gpu_measure, "OPS", (gpu_measure.consensus_pool,))
    monkeypatch.setattr(gpu_measure, "COMPILE_SECONDS", 1e9)
    size, said = Size(n=2, c=4, d=4, h=4, w=4), []
    settings = Settings(seconds=0.0, min_rounds=1, max_rounds=1, copy_buffer=2**20, tiny_calls=1, tiny_rounds=1)
    path = tmp_path / "gpu.json"
    gpu_measure.run("float32", path, 600, {}, device="cpu", sizes=((size, size),), settings=settings, say=said.append)
    records = json.loads(path.read_text())
    timed = {(r["variant"], r["shape"]["n"], r["mode"], r["backend"]) for r in records if r["p50_ms"] is not None}
    rows = {row[:3] for row in timed if row[3] == "cpu"}
    assert len(rows) > 8 and {(*row, "triton") for row in rows} <= timed
    assert all(re.search(r"^  cpu .*\n  triton ", text, re.M) for text in said if "eager" in text)
