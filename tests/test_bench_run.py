"""bench/: how times become rows, what becomes of compilations that fail, and the command line."""

import io
import json
import time
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from bench import core, eager, providers, report
from bench.__main__ import OPS, Options, UsageError, main, plan, resolve
from bench.case import Size
from bench.core import Row, Settings
from bench.isolation import Child
from bench.providers import Provider
from bench_cases import QUICK, SMALL, case_of, rendered, with_problem


@pytest.fixture(autouse=True)
def one_thread():
    """Inputs are tiny here, and on a busy machine threads mostly wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_percentiles():
    assert core.percentiles([5.0, 1.0, 3.0, 2.0, 4.0, 6.0]) == (2.0, 3.5, 5.0)
    assert core.percentiles([7.0]) == (7.0, 7.0, 7.0)


def test_ratios_are_taken_within_a_round():
    # The machine was ten times slower in the second half; the ratio of the medians would be anything.
    assert core.times_faster([1.0, 1.0, 10.0, 10.0, 10.0], [2.0, 2.0, 20.0, 20.0, 20.0]) == 2.0
    assert core.times_faster([2.0, 4.0, 1.0], [1.0, 1.0, 1.0]) == 0.5
    assert core.times_faster([1.0, 2.0, 10.0], [4.0, 2.0, 30.0]) == 3.0  # of 4, 1 and 3; the medians would give 2
    assert core.times_faster([], [1.0]) is None
    assert core.times_faster([1.0], []) is None


def test_providers_take_turns():
    order, now = [], [0.0]

    def step(name, seconds):
        def run():
            order.append(name)
            now[0] += seconds
            return {"forward": seconds}

        return run

    steps = {"a": step("a", 1.0), "b": step("b", 2.0), "c": step("c", 4.0)}
    found = core.interleaved(steps, Settings(seconds=0.0, min_rounds=3, max_rounds=9, warm_up=2))
    assert order == ["a", "b", "c"] * 5
    assert found == {"a": {"forward": [1.0] * 3}, "b": {"forward": [2.0] * 3}, "c": {"forward": [4.0] * 3}}


def test_rounds_end_with_the_time_or_the_number(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(core, "clock", lambda: now[0])

    def step():
        now[0] += 1.0
        return {"forward": 1.0}

    def rounds(**settings):
        return len(core.interleaved({"a": step}, Settings(warm_up=0, **settings))["a"]["forward"])

    assert rounds(seconds=7.0, min_rounds=2, max_rounds=100) == 7
    assert rounds(seconds=7.0, min_rounds=2, max_rounds=4) == 4
    assert rounds(seconds=7.0, min_rounds=9, max_rounds=100) == 9


def fake_row(provider, times, ratio=None, mode="forward"):
    case = case_of("channel_gate", "2 gates")
    return Row(case, Provider(provider), mode, times, None, ratio, None, copy_bandwidth=10e9, bytes_moved=5 * 10**9)


def test_bandwidth_and_multiple_of_the_floor():
    row = fake_row("cpu", [2.0, 1.0, 4.0])
    assert row.bandwidth == 2.5e9  # 5 GB in 2 s
    assert row.multiple_of_floor == 4.0  # a copy would move them in half a second
    assert fake_row("cpu", []).bandwidth is None and fake_row("cpu", []).multiple_of_floor is None


def test_only_a_fast_backend_can_lose():
    assert fake_row("cpu", [1.0], 0.9).loss
    assert not fake_row("cpu", [1.0], 1.1).loss
    assert not fake_row("cpu", [1.0]).loss
    assert not fake_row("reference", [1.0], 0.5).loss
    assert not fake_row("compile", [1.0], 0.5).loss


def test_a_loss_is_marked():
    assert "0.90 loss" in rendered([fake_row("cpu", [1.0], 0.9)])
    assert "0.998 loss" in rendered([fake_row("cpu", [1.0], 0.998)])
    assert "loss" not in rendered([fake_row("cpu", [1.0], 1.1), fake_row("reference", [1.0], 0.9)])
    console = Console(width=200, file=io.StringIO())
    report.print_losses(console, [fake_row("cpu", [1.0], 0.9), fake_row("cpu", [1.0], 2.0)])
    lines = console.file.getvalue().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("loss: cpu at 0.90 x eager, forward: channel_gate, 2 gates: x 3x8x7x8 float32")


def half_row(provider, ratio, flops=None):
    case = case_of("channel_gate", "2 gates", dtype=torch.float16)
    return Row(case, Provider(provider), "forward", [1.0], ratio_to_float32=ratio, flops=flops)


def test_half_is_compared_with_float32_within_rounds(monkeypatch):
    """The ratio is of one round, whatever the machine did in the others; and only backends have one."""
    seconds = {torch.float16: [9.0, 2.0, 20.0, 4.0], torch.float32: [3.0, 30.0, 6.0]}  # half: a first call, then rounds
    turns, told = [], []

    def step(entrant, problem, grads, device, inputs):
        dtype = problem.inputs["x"].dtype
        turns.append((entrant.provider.name, dtype))
        times = iter(seconds[dtype])
        return lambda: {"forward": next(times)}

    monkeypatch.setattr(core, "full_step", step)
    monkeypatch.setattr(core, "saved_bytes", lambda function: 0)
    half, twin = (case_of("channel_gate", "2 gates", dtype=dtype) for dtype in (torch.float16, torch.float32))
    settings = Settings(seconds=0.0, min_rounds=3, max_rounds=3, warm_up=0)
    rows = core.measure(half, [Provider("eager"), Provider("reference")], settings, None, False, told.append, twin)
    assert turns == [(name, torch.float16) for name in ("eager", "reference")] + [("reference", torch.float32)]
    assert {(row.provider.name, row.ratio_to_float32) for row in rows if row.mode == "forward"} == {
        ("eager", None),
        ("reference", 1.5),
    }
    assert set(told) == {"eager", "reference", None} and told[-1] is None


def test_a_backend_that_is_wrong_in_float32_has_no_ratio(monkeypatch):
    half, twin = (case_of("channel_gate", "2 gates", dtype=dtype) for dtype in (torch.float16, torch.float32))
    problem = twin.setup()
    problem.exact, problem.fast = problem.fast, lambda x, *gates: problem.eager(1.1 * x, *gates)
    rows = core.measure(half, [Provider("reference")], QUICK, twin=with_problem(twin, problem))
    assert {(row.error, row.ratio_to_float32) for row in rows} == {(None, None)}
    assert all(row.times for row in rows)


@pytest.mark.parametrize(
    "provider, flops, ratio, slow",
    [
        ("cpu", None, 0.99, True),
        ("cpu", None, 1.01, False),
        ("cpu", 10, 0.88, False),
        ("cpu", 10, 0.86, True),
        ("reference", None, 0.3, False),
    ],
)
def test_a_matrix_product_may_take_a_little_longer_in_half(provider, flops, ratio, slow):
    row = half_row(provider, ratio, flops)
    assert row.half_loss == slow
    console = Console(width=200, file=io.StringIO())
    report.print_losses(console, [row])
    lines = console.file.getvalue().splitlines()
    text = rendered([row])
    assert "x float32" in text and f"{ratio:.2f}" in text
    assert (" slow" in text) == slow and len(lines) == slow
    if slow:
        said = f"slow: cpu at {ratio:.2f} x float32, forward: channel_gate, 2 gates: x 3x8x7x8 float16"
        assert lines[0].startswith(said)


def test_without_float32_there_is_no_such_column():
    assert "x float32" not in rendered([half_row("cpu", None)])


def test_no_ratio_is_taken_to_the_reference():
    rows = core.measure(case_of("channel_gate", "2 gates"), [Provider("eager"), Provider("reference")], QUICK)
    for row in rows:
        assert row.ratio_to_compile is None
        assert (row.ratio_to_eager is None) == (row.provider.name == "eager")


def test_ratios_to_the_compiler_are_those_of_the_backends(monkeypatch):
    monkeypatch.setattr(Provider, "function", lambda self, problem: problem.fast)
    names = ("eager", "compile", "reference")
    rows = core.measure(case_of("channel_gate", "2 gates"), [Provider(name) for name in names], QUICK)
    for row in rows:
        assert (row.ratio_to_compile is None) == (row.provider.name != "reference")
        assert (row.ratio_to_eager is None) == (row.provider.name == "eager")


def test_the_modes_are_of_one_call():
    rows = core.measure(case_of("consensus_map", "3 scales"), [Provider("eager")], QUICK)
    times = {row.mode: row.times for row in rows}
    for forward, backward, both in zip(*(times[mode] for mode in core.MODES), strict=True):
        assert forward + backward == pytest.approx(both)
    rows = core.measure(case_of("consensus_pool", "without cmap, x frozen"), [Provider("eager")], QUICK)
    assert [row.mode for row in rows] == ["forward"]
    assert rows[0].saved_bytes is None


def test_copy_bandwidth_counts_what_is_read_and_what_is_written():
    copy = core.CopyBandwidth(2**20)
    assert copy.of([1.0, 3.0, 2.0]) == 2 * 2**20 / 2.0
    assert len(copy(4)) == 4 and min(copy(4)) > 0
    assert core.CopyBandwidth.__init__.__defaults__ == (256 * 2**20,)


# -------------------------------------------------------------------------------------------------- torch.compile


def failing(case, monkeypatch, how):
    monkeypatch.setattr(Provider, "function", lambda self, problem: how if self.name == "compile" else problem.fast)
    return core.measure(case, [Provider("compile"), Provider("reference")], QUICK)


def test_a_compilation_that_fails_is_shown_as_a_failure(monkeypatch):
    def refuses(*tensors):
        raise RuntimeError("\n the lowering gave up\nand a page of details")

    rows = failing(case_of("channel_gate", "2 gates"), monkeypatch, refuses)
    assert {row.error for row in rows if row.provider.name == "compile"} == {"RuntimeError: the lowering gave up"}
    assert all(row.times for row in rows if row.provider.name == "reference")
    assert "compile failed: RuntimeError: the lowering gave up" in rendered(rows)


def test_a_backward_that_fails_leaves_the_forward_its_time(monkeypatch):
    class Refuses(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            raise RuntimeError("atomic_add")

    rows = failing(
        case_of("channel_gate", "2 gates"), monkeypatch, lambda x, *gates: Refuses.apply(eager.channel_gate(x, *gates))
    )
    errors = {row.mode: row.error for row in rows if row.provider.name == "compile"}
    assert errors == {"forward": None, **dict.fromkeys(core.MODES[1:], "RuntimeError: atomic_add")}
    assert {row.mode for row in rows if row.provider.name == "compile" and row.times} == {"forward"}


def test_a_compilation_that_takes_too_long_is_given_up(monkeypatch):
    def endless(*tensors):
        try:
            time.sleep(20)
        except Exception:  # as compilers do
            return None

    monkeypatch.setattr(Provider, "function", lambda self, problem: endless)
    start = time.perf_counter()
    settings = Settings(compile_seconds=0.2, seconds=0.0, min_rounds=1)
    rows = core.measure(case_of("channel_gate", "2 gates"), [Provider("compile")], settings)
    assert time.perf_counter() - start < 10
    assert {row.error for row in rows} == {"TookTooLong: compile: first call took longer than 0.2 s"}


def test_the_real_compiler_gives_times_or_a_reason():
    rows = core.measure(case_of("consensus_pool", "without cmap"), [Provider("eager"), Provider("compile")], QUICK)
    for row in rows:
        assert (row.error is None) == bool(row.times)


# ------------------------------------------------------------------------------------------------ the command line


def test_quick_run_writes_valid_records(tmp_path, capsys):
    path = tmp_path / "new" / "records.json"
    assert main(["channel_gate", "consensus_pool", "--quick", "--no-compile", "--json", str(path)]) == 0
    records = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert [file.name for file in path.parent.iterdir()] == ["records.json"]
    assert {record["op"] for record in records} == {"channel_gate", "consensus_pool"}
    shapes = {(record["shape"]["h"], record["shape"]["w"]) for record in records}
    assert shapes == {(7, 7), (14, 14), (7, 8), (4, 4)}
    assert {record["mode"] for record in records} == {*core.MODES, *core.TINY_MODES}
    rows = {(r["op"], r["variant"], *r["shape"].values(), r["provider"], r["backend"], r["mode"]) for r in records}
    assert len(rows) == len(records)
    for record in records:
        assert record["provider"] in ("eager", "m3em_fast")
        assert (record["backend"] is None) == (record["provider"] == "eager")
        if record["error"] is None:
            assert 0 < record["p20_ms"] <= record["p50_ms"] <= record["p80_ms"]
            assert (record["ratio_to_eager"] is None) == (record["provider"] == "eager")
        assert record["threads"] == torch.get_num_threads() and record["torch"] == torch.__version__
        for key in ("cpu", "commit", "version", "timestamp", "dtype", "layout", "requires_grad"):
            assert key in record
    printed = capsys.readouterr().out
    assert "these figures mean nothing" in printed and "copy" in printed.splitlines()[0]


def test_a_run_in_two_dtypes_compares_them(tmp_path, capsys):
    path = tmp_path / "records.json"
    arguments = ["channel_gate", "--quick", "--no-compile", "--sizes", "7x7", "--json", str(path)]
    assert main([*arguments, "--dtype", "float16+float32", "float32"]) == 0
    for record in json.loads(path.read_text()):
        compared = record["dtype"] != "float32" and record["backend"] is not None and record["mode"] in core.MODES
        assert (record["ratio_to_float32"] is not None) == compared
        assert not compared or record["ratio_to_float32"] > 0
    assert "x float32" in capsys.readouterr().out


def test_an_interruption_keeps_what_was_finished(tmp_path, capsys, monkeypatch):
    path, calls, right = tmp_path / "records.json", [], Child.measure

    def measure(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return right(*arguments)

    monkeypatch.setattr(Child, "measure", measure)
    arguments = ["channel_gate", "--quick", "--no-compile", "--backends", "reference", "--json", str(path)]
    assert main(arguments) == 130
    assert len({record["variant"] for record in json.loads(path.read_text())}) == 2
    assert capsys.readouterr().err == f"bench: interrupted. {path} holds the cases that were finished.\n"


def test_every_op_runs_in_every_dtype_and_layout(capsys):
    arguments = ["--quick", "--no-compile", "--sizes", "7x8", "--backends", "reference", "--layout", "channels_last"]
    dtypes = ("float16", "bfloat16", "float64", "float16+float32", "bfloat16+float32")
    assert main([*arguments, "--dtype", *dtypes]) == 0
    printed = capsys.readouterr().out
    assert "failed" not in printed
    for op in OPS:
        for dtype in dtypes:
            assert (f"{op}, " in printed and f" {dtype} channels_last" in printed) or "+" in dtype
            titles = [line for line in printed.splitlines() if line.startswith(op) and f" {dtype} channels" in line]
            assert bool(titles) == (op != "consensus_map" or "+" not in dtype), (op, dtype)


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["gate"], "there is no op 'gate'; there are channel_gate, "),
        (["--sizes", "7"], "--sizes must be heights and widths such as 7x7 14x14, got '7'."),
        (["--sizes", "3x3"], "--sizes must be at least 4 long or wide"),
        (["--samples", "0"], "--samples must be at least 1, got 0."),
        (["--latent", "-1"], "--latent must be at least 1, got -1."),
        (["--backends", "abacus"], "--backends: 'abacus' cannot run here; there is "),
        (["--seconds", "nan"], "--seconds must be a positive number of seconds, got nan."),
        (["--compile-limit", "0"], "--compile-limit must be a positive number of seconds, got 0.0."),
        (["consensus_map", "--dtype", "float16+float32"], "--dtype float16+float32: in consensus_map nothing stands "),
        (["--json", "."], "--json must be a file, and . is a folder."),
    ],
)
def test_bad_input_is_one_sentence(arguments, said, capsys):
    assert main([*arguments, "--quick"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(f"bench: {said}") and printed.err.count("\n") == 1


def test_an_unknown_option_is_refused(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--dtype", "int8"])
    assert stopped.value.code == 2


def test_by_default_a_7x7_case_has_its_twins_at_the_size_of_the_paper():
    shapes, _ = resolve(Options())
    assert shapes == [Size(160, 1024, 512, h, w) for h, w in ((7, 7), (14, 14), (7, 8))]
    with pytest.raises(UsageError):
        resolve(Options(dtype=()))


def test_half_cases_have_a_twin_where_float32_is_measured():
    def planned(*dtypes):
        options = Options(op=("consensus_pool",), dtype=dtypes, layout="channels_last")
        return plan(options, [SMALL, replace(SMALL, h=14)])

    names = ("float16+float32", "float64", "bfloat16", "float32")
    for case, tiny, twin in planned(*names):
        if tiny or case.dtype_name in ("float32", "float64"):
            assert twin is None
        else:
            assert (twin.op, twin.variant, twin.size, twin.layout) == (case.op, case.variant, case.size, case.layout)
            assert twin.dtype_name == "float32"
    assert [sum(case.dtype_name == name for case, _, _ in planned(*names)) for name in names] == [5, 9, 9, 9]
    assert {twin for _, _, twin in planned("float16", "float64")} == {None}


def test_the_providers(monkeypatch):
    monkeypatch.setattr(providers, "backends", lambda device: (device, "reference"))
    assert [p.name for p in providers.select((), True)] == ["eager", "compile", "cpu", "reference"]
    assert [p.name for p in providers.select(("reference",), False)] == ["eager", "reference"]
    assert [p.name for p in providers.select((), False, "cuda")] == ["eager", "cuda", "reference"]
