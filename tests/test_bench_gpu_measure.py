"""``python -m bench.gpu_measure``, the measuring of ``make gpu``, with the CPU in the place of a card."""

import contextlib
import json
import time

import pytest
import torch

from bench import core, device, gpu, gpu_measure
from bench.case import Size
from bench.core import CopyBandwidth, Settings
from bench.providers import TookTooLong, time_limit

SMALL = ((Size(n=3, c=4, d=4, h=7, w=7), Size(n=2, c=4, d=4, h=7, w=7)), (Size(n=2, c=4, d=4, h=7, w=8),) * 2)
QUICK = Settings(seconds=0.0, min_rounds=2, max_rounds=2, copy_buffer=2**20, tiny_calls=2, tiny_rounds=2)


def no_compiler(monkeypatch):
    monkeypatch.setattr(gpu_measure, "COMPILE_SECONDS", 1e9)


def test_the_sizes_are_those_of_a_step():
    assert [(size.n, size.c, size.d, size.h, size.w) for sizes in gpu_measure.SIZES for size in sizes] == [
        (n, 1024, 512, h, w) for h, w in ((7, 7), (14, 14), (7, 8)) for n in (1675, 160)
    ]
    assert sorted(gpu_measure.DTYPES) == sorted(["float16", *gpu.OTHERS]) and "float16" in gpu.PARTS


def test_what_tells_most_comes_first():
    cases = gpu_measure.ordered(gpu_measure.SIZES, torch.float16)
    first = [(case.op, case.size.n) for case in cases[:12]]
    assert first == [(op.OP, n) for op in gpu_measure.OPS for n in (1675, 160)]
    assert all("frozen" in case.variant for case in cases[:12] if case.op != "consensus_map")
    assert {case.size for case in cases[12:18]} == {gpu_measure.TINY}
    # Every variant of every op at every size, once.
    wanted = {str(c) for sizes in gpu_measure.SIZES for s in sizes for op in gpu_measure.OPS for c in made(op, s)}
    rest = [str(case) for case in cases if case.size != gpu_measure.TINY]
    assert len(rest) == len(wanted) and set(rest) == wanted


def made(op, size):
    return op.cases(size, torch.float16, "contiguous")


@pytest.mark.parametrize("dtype", gpu_measure.DTYPES)
def test_the_records(monkeypatch, tmp_path, dtype):
    """With the CPU in the place of the card; of all ops in the dtype that comes first."""
    no_compiler(monkeypatch)
    if dtype != "float16":
        monkeypatch.setattr(gpu_measure, "OPS", (gpu_measure.consensus_map, gpu_measure.channel_gate))
    count = len(gpu_measure.OPS)
    path, said = tmp_path / "gpu.json", []
    where = {"card": "A Card", "kernels": "packed", "tests": "passed"}
    gpu_measure.run(dtype, path, 600, where, device="cpu", sizes=SMALL[:1], settings=QUICK, say=said.append)
    records = json.loads(path.read_text())
    assert {r["op"] for r in records} == {op.OP for op in gpu_measure.OPS}
    assert {(r["provider"], r["backend"]) for r in records} == {
        ("eager", None),
        ("compile", None),
        ("m3em_fast", "cpu"),
    }
    tiny = [r for r in records if r["mode"].startswith("tiny")]
    assert len(tiny) == count * 2 * 3
    for r in records:
        assert r["dtype"] == dtype and r["card"] == "A Card" and r["tests"] == "passed" and r["torch"]
        if r["provider"] == "compile":
            assert r["error"] in (gpu_measure.LEFT_OUT, gpu_measure.NOT_COMPILED) and r["p50_ms"] is None
            continue
        assert r["error"] is None and r["p50_ms"] > 0, r
        if r not in tiny:
            assert r["copy_gb_per_s"] > 0
            assert r["share_of_copy"] == pytest.approx(r["gb_per_s"] / r["copy_gb_per_s"])
    # Of the first case of every op alone it is said that there was no time for the compiler.
    assert sum(r["error"] == gpu_measure.LEFT_OUT for r in records) == count * 3
    assert "of copy" in said[0] and " 3x4x7x7" in said[0] and f"compile: {gpu_measure.LEFT_OUT}" in said[0]
    assert any("gradient us" in text for text in said)


def test_when_the_time_is_used_up(monkeypatch, tmp_path):
    path, said = tmp_path / "gpu.json", []
    rows = gpu_measure.run("float32", path, 0, {}, device="cpu", sizes=SMALL, settings=QUICK, say=said.append)
    assert {row.error for row in rows} == {gpu_measure.LEFT_OUT, gpu_measure.NOT_COMPILED}
    assert len(json.loads(path.read_text())) == len(rows) and not any(row.times for row in rows)
    assert len(said) == 1 and said[0].startswith(
        "Not measured:\n  mutual_enhancement, RGB, flow, audio; features frozen"
    )


def test_a_case_that_would_take_too_long_leaves_the_time_to_others(monkeypatch):
    monkeypatch.setattr(gpu_measure, "measure", lambda case, p, settings, copy, tiny, device: [])
    large, small = (
        gpu_measure.mutual_enhancement.cases(s, torch.float16, "contiguous")[0] for s in gpu_measure.SIZES[0]
    )
    assert gpu_measure.seconds_for(small) < 10 < gpu_measure.seconds_for(large)
    eager, copy = [core.Provider("eager")], CopyBandwidth(2**20)
    assert {row.error for row in gpu_measure.measure_case(large, eager, QUICK, copy, 10)} == {gpu_measure.LEFT_OUT}
    assert gpu_measure.measure_case(small, eager, QUICK, copy, 10) == []


def test_a_card_that_has_too_little_memory(monkeypatch, tmp_path):
    no_compiler(monkeypatch)
    monkeypatch.setattr(gpu_measure, "OPS", (gpu_measure.consensus_map,))
    real, said = gpu_measure.measure, []

    def measure(case, *rest, **options):
        if case.size == SMALL[0][0]:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
        return real(case, *rest, **options)

    monkeypatch.setattr(gpu_measure, "measure", measure)
    path = tmp_path / "gpu.json"
    rows = gpu_measure.run("float32", path, 60, {}, device="cpu", sizes=SMALL[:1], settings=QUICK, say=said.append)
    first, second = rows[:9], rows[9:18]
    assert all("out of memory" in row.error for row in first if row.provider.name != "compile")
    assert all(row.times for row in second if row.provider.name != "compile")
    assert "CUDA out of memory" in said[-1]


def test_a_limit_that_is_lost_comes_again():
    """As in a weak reference's callback, where Python prints an exception and goes on."""
    with pytest.raises(TookTooLong, match=r"x took longer than 0\.1 s"), time_limit(0.1, "x"):
        with contextlib.suppress(TookTooLong):
            time.sleep(30)
        time.sleep(30)
    time.sleep(1.2)  # and not afterwards


def test_the_compiler_gets_a_share_of_what_is_left(monkeypatch):
    asked = []
    monkeypatch.setattr(
        gpu_measure, "measure", lambda case, p, settings, copy, tiny, device: asked.append(settings) or []
    )
    case = gpu_measure.consensus_map.cases(SMALL[0][0], torch.float32, "contiguous")[0]
    copy = CopyBandwidth(2**20)
    gpu_measure.measure_case(case, [core.Provider("compile")], QUICK, copy, 50.0)
    assert asked[0].compile_seconds == 50.0 * gpu_measure.COMPILE_SHARE and asked[0].copy_buffer == QUICK.copy_buffer


class Event:
    """In the place of torch.cuda.Event: every record is a millisecond after the one before."""

    log: list = []  # noqa: RUF012

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        Event.log.append("record")
        self.at = Event.log.count("record")

    def synchronize(self):
        Event.log.append("wait")

    def elapsed_time(self, end):
        return float(end.at - self.at)


def test_a_card_is_timed_by_its_own_clock(monkeypatch):
    """One wait a call, after the last event; the card waits for the host before the first."""
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(Event, "log", [])
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: Event.log.append("sleep"))
    card = device.Card()
    case = gpu_measure.consensus_map.cases(SMALL[0][0], torch.float32, "contiguous")[0]
    problem = case.made()
    found = core.full_step(
        core.Entrant(core.Provider("eager"), problem.eager), problem, [torch.ones(3, 1, 7, 7)], card
    )()
    assert found == {"forward": 1e-3, "backward": 1e-3, "forward+backward": 2e-3}
    assert Event.log == ["sleep", *["record"] * 3, "wait"]


@pytest.mark.parametrize("op", [gpu_measure.consensus_map, gpu_measure.mutual_enhancement], ids=lambda op: op.OP)
def test_inputs_are_cold_on_a_card(op):
    problem = op.cases(SMALL[0][0], torch.float16, "contiguous")[-1].made()
    size = sum(t.numel() * t.element_size() for name, t in problem.inputs.items() if name not in problem.shared)
    turns = core.in_turn(problem, 3 * size - 1)
    sets = [next(turns) for _ in range(5)]
    seen = [{t.data_ptr() for t in inputs} for inputs, _ in sets]
    shared = {problem.inputs[name].data_ptr() for name in problem.shared}
    # Three others before the same again, which is the first of all.
    assert seen[0] == seen[4] == {t.data_ptr() for t in problem.inputs.values()}
    assert all(seen[i] & seen[k] == shared for i in range(4) for k in range(i))
    for inputs, wanted in sets:
        named = dict(zip(problem.inputs, inputs, strict=True))
        assert all(named[name] is leaf and leaf.is_leaf for name, leaf in zip(problem.needs, wanted, strict=True))
        assert all(torch.equal(named[name], t) for name, t in problem.inputs.items())
    one = core.in_turn(problem, 0)
    assert next(one)[0][0] is next(one)[0][0] is next(iter(problem.inputs.values()))


def test_everybody_takes_the_same_turns(monkeypatch):
    """Two who are timed in the same rounds: nobody finds in a cache what the other has just read."""
    case = gpu_measure.consensus_map.cases(SMALL[0][0], torch.float32, "contiguous")[0]
    where = type("Where", (device.Device,), {"cold": 2**30})()
    monkeypatch.setattr(core, "device_of", lambda name: where)
    read = []
    real = core.Provider.function

    def function(provider, problem):
        called = real(provider, problem)
        return lambda *inputs: (read.append(inputs[0].data_ptr()), called(*inputs))[1]

    monkeypatch.setattr(core.Provider, "function", function)
    core.measure(case, [core.Provider("eager"), core.Provider("cpu")], QUICK)
    timed = read[-4:]
    assert len(set(timed)) == 4


def test_a_case_is_made_where_it_is_measured():
    """With the same numbers; torch's meta device stands for a card."""
    case = gpu_measure.consensus_map.cases(SMALL[0][0], torch.float32, "contiguous")[0]
    made = case.made("meta")
    assert {t.device.type for t in made.inputs.values()} == {"meta"} and all(t.is_leaf for t in made.wanted)
    assert {t.device.type for t in case.made().inputs.values()} == {"cpu"}


# ------------------------------------------------------------------------------------------------ a card that is lost


def two_ops(monkeypatch):
    no_compiler(monkeypatch)
    monkeypatch.setattr(gpu_measure, "OPS", (gpu_measure.consensus_map, gpu_measure.channel_gate))


def cases_in(path):
    found = [(r["op"], r["variant"], str(r["shape"])) for r in json.loads(path.read_text())]
    return list(dict.fromkeys(found))


def test_behind_a_case_that_loses_the_card_another_process_goes_on(monkeypatch, tmp_path):
    """With the records that are there, of which none is measured twice."""
    two_ops(monkeypatch)
    path, said = tmp_path / "gpu.json", []
    common = {"device": "cpu", "sizes": SMALL[:1], "settings": QUICK, "say": said.append}
    answers = iter([True, False])
    monkeypatch.setattr(gpu_measure, "usable", lambda device: next(answers))
    with pytest.raises(gpu_measure.CardLost) as lost:
        gpu_measure.run("float32", path, 60, {}, **common)
    assert lost.value.after == 1 and len(cases_in(path)) == 2 and "of no use any more" in said[-1]
    monkeypatch.undo()
    two_ops(monkeypatch)
    gpu_measure.run("float32", path, 60, {}, first=2, **common)
    whole = tmp_path / "whole.json"
    gpu_measure.run("float32", whole, 60, {}, **common)
    assert cases_in(path) == cases_in(whole)
    assert len(json.loads(path.read_text())) == len(json.loads(whole.read_text()))


def test_the_command_begins_anew_where_the_card_is_lost(monkeypatch, tmp_path):
    path, begun = tmp_path / "gpu.json", []
    path.write_text(json.dumps([{"backend": "cuda", "p50_ms": 1.0}]))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_measure.os, "execv", lambda program, words: begun.append(words[3:]))

    def run(dtype, to, seconds, where, first):
        if first < 5:
            raise gpu_measure.CardLost(4)

    monkeypatch.setattr(gpu_measure, "run", run)
    words = ["float16", "--json", str(path), "--seconds"]
    assert gpu_measure.main([*words, "100"]) == 1
    assert begun == [[*words, "100", "--first", "5", "--seconds", "88"]]
    assert gpu_measure.main([*words, "5"]) == 1 and len(begun) == 1  # no time is left for it
    assert gpu_measure.main(begun[0]) == 1  # its figures are there, and so is what went wrong
    assert gpu_measure.main([*words, "100", "--first", "0"]) == 1
    monkeypatch.setattr(gpu_measure, "run", lambda *a, **k: None)
    assert gpu_measure.main([*words, "100"]) == 0


def test_whether_a_card_answers(monkeypatch):
    assert gpu_measure.usable("cpu")
    broken = torch.AcceleratorError if hasattr(torch, "AcceleratorError") else RuntimeError
    assert issubclass(broken, RuntimeError)

    def ones(*sizes, device):
        raise RuntimeError("CUDA error: misaligned address")

    monkeypatch.setattr(torch, "ones", ones)
    assert not gpu_measure.usable("cpu")


def test_the_ceilings_are_measured_behind_a_lead(monkeypatch):
    """Else the first event would wait for the host, and not the copy for the memory."""
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(Event, "log", [])
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: Event.log.append("sleep"))
    monkeypatch.setattr(device, "device_of", lambda name: device.Card())
    copy = CopyBandwidth(2**10)
    assert copy(2) == [1e-3, 1e-3]
    assert device.product_rate(torch.float32, size=8, repeats=3) == pytest.approx(2 * 8**3 / 1e-3)
    assert Event.log == ["sleep", "record", "record", "wait"] * 5


def test_float32_is_float32_for_everybody(monkeypatch, tmp_path):
    """cuDNN would take TF32 for eager's convolutions, whose results would then be refused."""
    seen = []
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    monkeypatch.setattr(
        gpu_measure,
        "CopyBandwidth",
        lambda size, device: type("", (), {"of": lambda *_: 1.0, "__call__": lambda *_: []})(),
    )
    monkeypatch.setattr(gpu_measure, "conditions", lambda device: {})
    monkeypatch.setattr(gpu_measure, "backends", lambda device: ())
    monkeypatch.setattr(gpu_measure, "select", lambda *_: [core.Provider("eager"), core.Provider("compile")])
    monkeypatch.setattr(gpu_measure, "usable", lambda device: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(gpu_measure, "product_rate", lambda dtype, device: 5e12)
    monkeypatch.setattr(
        gpu_measure,
        "measure_case",
        lambda case, p, *_: seen.append(torch.backends.cudnn.allow_tf32) or [core.Row(case, p[0], "forward")],
    )
    monkeypatch.setattr(gpu_measure, "OPS", (gpu_measure.consensus_map,))
    path, said = tmp_path / "x.json", []
    gpu_measure.run("float32", path, 60, {}, sizes=SMALL[:1], say=said.append)
    assert seen and not any(seen) and said[0] == "float32: copy 0 GB/s, 5.0 TFLOP/s a large product"
    assert {r["product_gflop_per_s"] for r in json.loads(path.read_text())} == {5e3}
