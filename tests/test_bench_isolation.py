"""bench/: a provider that kills its process loses its own times and nobody else's; and nothing outlives the end."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench import core
from bench.isolation import Child
from bench.providers import Provider
from bench_cases import QUICK, Kills, case_of

ROOT = Path(__file__).resolve().parent.parent
EAGER, REFERENCE = Provider("eager"), Provider("reference")


@pytest.fixture
def child():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with Child(2**20) as found:
        yield found
        process = found.process
    assert process is None or not process.is_alive()
    torch.set_num_threads(before)


def measured(rows, provider):
    own = [row for row in rows if row.provider == provider]
    assert own and all(row.error is None and row.times for row in own)
    return own


def crashed(rows, provider, error, modes=core.MODES):
    own = [row for row in rows if row.provider == provider]
    assert [row.mode for row in own] == list(modes)
    assert {(row.error, row.percentiles, row.ratio_to_eager) for row in own} == {(error, None, None)}


@pytest.mark.parametrize("name", ["SIGSEGV", "SIGABRT", "SIGKILL"])
def test_whoever_kills_the_process_loses_its_own_times(child, name):
    case, kills = case_of("channel_gate", "2 gates"), Kills("cpu", signal=signal.Signals[name])
    rows = child.measure(case, [EAGER, kills, REFERENCE], QUICK)
    assert list(dict.fromkeys(row.provider.name for row in rows)) == ["eager", "cpu", "reference"]
    crashed(rows, kills, f"crashed: {name}")
    measured(rows, EAGER)
    assert all(row.ratio_to_eager for row in measured(rows, REFERENCE))
    assert {str(row.case) for row in rows} == {str(case)}


# After the gate; or after the first call, the one that counts what is saved, and the warm-up: in the first round.
@pytest.mark.parametrize("calls", [1, 4])
def test_a_crash_after_the_gate_and_a_crash_of_the_baseline(child, calls):
    case = case_of("channel_gate", "2 gates")
    late = Kills("cpu", signal=signal.SIGSEGV, calls=calls)
    first = Kills("eager", signal=signal.SIGABRT)
    rows = child.measure(case, [first, late, REFERENCE], QUICK)
    crashed(rows, late, "crashed: SIGSEGV")
    crashed(rows, first, "crashed: SIGABRT")
    assert {row.ratio_to_eager for row in measured(rows, REFERENCE)} == {None}
    again = child.measure(case, [first, replace(late, calls=100), REFERENCE], QUICK)
    measured(again, replace(late, calls=100))


def test_a_crash_in_the_float32_of_a_half_case(child):
    half, twin = (case_of("channel_gate", "2 gates", dtype=dtype) for dtype in (torch.float16, torch.float32))
    for calls in (0, 2):  # at the gate, and in the first round
        kills = Kills("cpu", signal=signal.SIGSEGV, dtype=torch.float32, calls=calls)
        rows = child.measure(half, [EAGER, kills, REFERENCE], QUICK, False, twin)
        crashed(rows, kills, "crashed: SIGSEGV")
        assert all(row.ratio_to_float32 and row.ratio_to_eager for row in measured(rows, REFERENCE))


def test_a_crash_in_a_tiny_case_and_one_without_a_signal(child):
    kills = Kills("cpu", code=3)
    rows = child.measure(case_of("channel_gate", "2 gates"), [EAGER, kills], QUICK, True)
    crashed(rows, kills, "crashed: exit code 3", core.TINY_MODES)
    assert [row.mode for row in measured(rows, EAGER)] == list(core.TINY_MODES)
    rows = child.measure(case_of("consensus_pool", "without cmap, x frozen"), [EAGER, kills], QUICK)
    crashed(rows, kills, "crashed: exit code 3", ["forward"])


def dies():
    os.kill(os.getpid(), signal.SIGSEGV)


def raises():
    raise LookupError("no such tensor")


def test_what_nobody_is_to_blame_for(child):
    case = case_of("channel_gate", "2 gates")
    rows = child.measure(replace(case, setup=dies), [EAGER, REFERENCE], QUICK)
    for provider in (EAGER, REFERENCE):
        crashed(rows, provider, "crashed: SIGSEGV, before anybody's turn")
    with pytest.raises(RuntimeError, match=r"(?s)in raises\n.*LookupError: no such tensor"):
        child.measure(replace(case, setup=raises), [EAGER], QUICK)
    measured(child.measure(case, [EAGER, REFERENCE], QUICK), REFERENCE)


def compiles():
    """As a compiler does: in a process of its own."""
    subprocess.Popen(["sleep", "600"])
    return case_of("channel_gate", "2 gates").setup()


def test_what_the_process_has_started_ends_with_it():
    with Child(2**20) as child:
        measured(child.measure(replace(case_of("channel_gate", "2 gates"), setup=compiles), [EAGER], QUICK), EAGER)
        group = child.process.pid
        os.killpg(group, 0)
        child.process.kill()
        child.process.join()
        os.killpg(group, 0)  # the compiler is still there
        child.end()
        for _ in range(100):
            try:
                os.killpg(group, 0)
            except ProcessLookupError:
                return
            time.sleep(0.05)
        pytest.fail("a process of the group is still there")


def test_one_process_measures_all_cases_on_the_threads_of_this_one(child):
    torch.set_num_threads(3)
    assert 0 < child.copy_bandwidth() < 1e13
    process = child.process
    measured(child.measure(case_of("consensus_pool", "with cmap"), [EAGER, REFERENCE], QUICK), REFERENCE)
    measured(child.measure(replace(case_of("channel_gate", "2 gates"), setup=three_threads), [EAGER], QUICK), EAGER)
    assert child.process is process and process.pid != os.getpid()
    assert child.copy_bandwidth() > 0


def three_threads():
    assert torch.get_num_threads() == 3
    return case_of("channel_gate", "2 gates").setup()


# -------------------------------------------------------------------------------------------------- from outside

PATCH = """
import os, signal
from bench.providers import Provider
right = Provider.function
def function(self, problem):
    if self.name == "reference" and "gate0" in problem.inputs:
        return lambda *tensors: os.kill(os.getpid(), signal.SIGSEGV)
    return right(self, problem)
Provider.function = function
"""


def bench(folder, *arguments, **options):
    """``python -m bench`` as a process, all of whose processes can be told by their environment."""
    path = os.pathsep.join([str(folder), str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
    environment["M3EM_TEST_RUN"] = str(folder)
    command = [sys.executable, "-m", "bench", *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True, **options)


def processes(folder):
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if f"M3EM_TEST_RUN={folder}\0".encode() in (path / "environ").read_bytes():
                found.append(int(path.name))
        except OSError:
            continue
    return found


def command_line(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:  # it has ended since
        return b""


def test_the_command_goes_on_after_a_crash(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(PATCH)
    options = ["--quick", "--no-compile", "--sizes", "7x7", "--json", str(tmp_path / "records.json")]
    process = bench(tmp_path, "channel_gate", "consensus_pool", *options)
    out, err = process.communicate(timeout=300)
    assert (process.returncode, err) == (0, "")
    assert out.count("reference failed: crashed: SIGSEGV") == 3  # two variants and the tiny one
    records = json.loads((tmp_path / "records.json").read_text())
    for record in records:
        fails = (record["op"], record["backend"]) == ("channel_gate", "reference")
        assert record["error"] == ("crashed: SIGSEGV" if fails else None)
        assert (record["p50_ms"] is None) == fails
    assert {record["op"] for record in records} == {"channel_gate", "consensus_pool"}


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc to see what a process blocks")
def test_no_ctrl_c_reaches_the_child_while_it_imports(child):
    def blocked(pid):
        return int(re.search(r"SigBlk:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())[1], 16)

    child.copy_bandwidth()
    assert blocked(child.process.pid) >> signal.SIGINT - 1 & 1
    assert not blocked(os.getpid()) >> signal.SIGINT - 1 & 1


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc to find processes")
@pytest.mark.parametrize("how", ["Ctrl-C at the start", "Ctrl-C in a terminal", "SIGINT", "SIGTERM", "SIGKILL"])
def test_the_end_comes_at_once_and_for_all_processes(tmp_path, how):
    options = ["--sizes", "14x14", "--seconds", "500", "--no-compile", "--backends", "reference"]
    process = bench(tmp_path, "consensus_map", *options, start_new_session=True)
    try:
        if how == "Ctrl-C at the start":
            while not any(b"spawn_main" in command_line(pid) for pid in processes(tmp_path)):
                assert process.poll() is None
                time.sleep(0.01)
            time.sleep(0.2)  # the child imports torch
        else:
            assert "copy" in process.stdout.readline()
            time.sleep(1.0)
        assert len(processes(tmp_path)) >= 2
        start = time.monotonic()
        if how.startswith("Ctrl-C"):
            os.killpg(process.pid, signal.SIGINT)
        else:
            process.send_signal(signal.Signals[how])
        _, err = process.communicate(timeout=20)
        while processes(tmp_path) and time.monotonic() < start + 20:  # the case would take some minutes more
            time.sleep(0.05)
        assert not processes(tmp_path)
        if how.startswith("Ctrl-C") or how == "SIGINT":
            assert (process.returncode, err) == (130, "bench: interrupted.\n")
    finally:
        for pid in processes(tmp_path):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
