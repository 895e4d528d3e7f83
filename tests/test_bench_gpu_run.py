"""How ``make gpu`` runs its commands (bench/gpu_run.py) and what it makes of their records (bench/gpu_summary.py)."""

import json
import sys
import time
from pathlib import Path

import pytest

from bench import gpu_run, gpu_summary
from bench.gpu_run import Done

ROOT = Path(__file__).resolve().parents[1]

# ------------------------------------------------------------------------------------------------------ commands


def test_a_command_ends_with_all_that_it_has_started(tmp_path):
    note = tmp_path / "pid"
    child = f"import os, time; open({str(note)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    code = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"
    start = time.monotonic()
    assert gpu_run.call([sys.executable, "-c", code], 3).code is None
    assert time.monotonic() - start < 50
    pid, deadline = note.read_text(), time.monotonic() + 10
    while state(pid) not in (None, "Z"):
        assert time.monotonic() < deadline, "the child goes on"
        time.sleep(0.1)


def state(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return None


def test_a_command_sees_this_checkout_and_no_choice_of_backend(monkeypatch):
    monkeypatch.setenv("M3EM_BACKEND", "reference")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    words = "os.environ.get('M3EM_BACKEND'), os.environ['TRITON_INTERPRET'], os.environ['WORD'], m3em_fast.__file__"
    code = f"import os, m3em_fast; print({words})"
    done = gpu_run.call([sys.executable, "-c", code], 60, WORD="word")
    assert done == Done(0, f"None 0 word {ROOT / 'm3em_fast/__init__.py'}\n")


def test_commands_run_at_once_and_say_what_they_know_when_interrupted():
    late = "import time\ntry:\n    time.sleep(60)\nexcept KeyboardInterrupt:\n    print('two of three passed')"
    deaf = "import signal, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\nprint('deaf')\ntime.sleep(60)"
    codes = {"quick": "print('at once'); raise SystemExit(3)", "late": late, "deaf": deaf}
    start = time.monotonic()
    found = gpu_run.call_all({name: [sys.executable, "-c", code] for name, code in codes.items()}, 8, grace=3)
    assert time.monotonic() - start < 50
    wanted = {"quick": (3, "at once\n"), "late": (None, "two of three passed\n"), "deaf": (None, "deaf\n")}
    assert {name: (done.code, done.text) for name, done in found.items()} == wanted


def test_what_is_said_is_in_the_log_at_once(tmp_path, capsys):
    log = tmp_path / "log"
    with gpu_run.logged(log):
        gpu_run.say("one")
        assert log.read_text() == "one\n"
        gpu_run.call([sys.executable, "-c", "print('two')"], 60)
        gpu_run.call([sys.executable, "-c", "print('three')"], 60, show=True)
    gpu_run.say("four")
    assert log.read_text() == "one\ncommand: two\nthree\n"
    assert capsys.readouterr().out == "one\nthree\nfour\n"


# -------------------------------------------------------------------------------------------------------- summary


def record(op="consensus_pool", backend="cuda", mode="forward+backward", p50=1.0, floor=2.0, **more):
    found = {
        "op": op,
        "variant": "cmap",
        "provider": "m3em_fast",
        "backend": backend,
        "mode": mode,
        "shape": {"n": 1675, "c": 1024, "d": 512, "h": 7, "w": 7},
        "dtype": "float16",
        "p50_ms": p50,
        "multiple_of_floor": floor,
        "ratio_to_eager": 3.0,
        "ratio_to_compile": None,
        "loss": False,
        "gflop_per_s": None,
        "error": None,
    }
    return {**found, **more}


def test_the_largest_gap_of_every_op_and_backend():
    records = [
        record(mode="forward", floor=1.25),
        record(mode="backward", floor=2.5, p50=0.75),
        record(backend="triton", floor=1.5),
        record(op="channel_gate", floor=4.0),
        record(backend=None, floor=50.0, provider="eager"),
        record(backend="reference", floor=60.0),
        record(p50=None, floor=None, error="left out: no time"),
    ]
    lines = gpu_summary.summary(records)
    end = next(i for i, line in enumerate(lines[1:], 1) if not line.startswith("  "))
    assert [line.split(" x floor")[0].split() for line in lines[1:end]] == [
        ["cuda", "4.00"],
        ["cuda", "2.50"],
        ["triton", "1.50"],
    ]
    assert "0.750 ms, 3.00 x eager, - x compile: consensus_pool [cmap], float16, N=1675 7x7, backward" in lines[2]
    assert lines[end] == "At N = 1675 and 7x7 in float16, forward+backward:"
    assert not any("Failed" in line for line in lines)


def test_the_floor_of_a_matrix_product_is_its_operations():
    product = record(op="gated_projection", p50=2.0, floor=20.0, gflop_per_s=100e3, product_gflop_per_s=400e3)
    assert gpu_summary.times_floor(product) == pytest.approx(4.0)
    moved = {**product, "multiple_of_floor": 3.0}
    assert gpu_summary.times_floor(moved) == pytest.approx(3.0)
    assert gpu_summary.times_floor({**product, "product_gflop_per_s": None}) == pytest.approx(20.0)


def test_what_went_wrong_is_in_the_summary():
    tiny = "tiny, no gradient"
    records = [
        record(ratio_to_eager=0.8, loss=True),
        record(mode=tiny, p50=0.031, floor=None),
        record(mode=tiny, p50=0.005, floor=None),
    ]
    broken = {"p50": None, "floor": None, "error": "wrong: 3 of 9 elements are wrong"}
    records += [
        record(op="channel_gate", backend=backend, mode=m, **broken) for backend in (None, "cuda") for m in "ab"
    ]
    text = "\n".join(gpu_summary.summary(records))
    assert "Slower than eager: 1 rows" in text and "0.80 x eager" in text
    assert "31.0 us, cuda: consensus_pool" in text and "5.0 us" not in text
    # A line a case, ours first.
    what = "wrong: 3 of 9 elements are wrong: channel_gate [cmap], float16, N=1675 7x7"
    assert text.endswith(f"Failed, in 2 cases:\n  cuda: {what}\n  m3em_fast: {what}")
    assert "nothing was timed" in "\n".join(gpu_summary.summary([]))


def test_the_summary_of_files(tmp_path, capsys):
    good, broken, train = (tmp_path / name for name in ("a.json", "b.json", "train.json"))
    good.write_text(json.dumps([record()]))
    broken.write_text('[{"op": ')
    train.write_text(json.dumps([{"backend": "cuda", "loss": [1.0]}]))
    assert gpu_summary.main([str(good), str(broken), str(train)]) == 0
    assert "2.00 x floor" in capsys.readouterr().out
    assert gpu_summary.main([str(tmp_path / "none")]) == 2 == gpu_summary.main([])
    assert capsys.readouterr().err.count("usage: ") == 2
