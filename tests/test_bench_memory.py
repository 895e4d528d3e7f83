"""bench/: whether what is measured includes the system's finding of pages, and what the records say of it."""

import json
import subprocess
import sys

import pytest

from bench import __main__ as bench_main
from bench.allocator import can_keep
from bench.core import in_turn
from bench.device import device_of
from bench_cases import case_of

HELD = """
import sys, torch
from bench.allocator import keep_freed_memory
kept = sys.argv[1] == "kept" and keep_freed_memory()
def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 >> 20
found = [resident()]
x = torch.zeros(1 << 24)  # 64 MB
found.append(resident())
del x
print(int(kept), *found, resident())
"""
needs_glibc = pytest.mark.skipif(not can_keep(), reason="the C library takes no orders about freed memory")


@needs_glibc
@pytest.mark.parametrize("memory", ["kept", "fresh"])
def test_what_is_freed_stays_with_the_process(memory):
    done = subprocess.run([sys.executable, "-c", HELD, memory], capture_output=True, text=True, check=True)
    kept, before, there, after = map(int, done.stdout.split())
    assert kept == (memory == "kept")
    assert there - before > 60
    assert (after - before > 60) == (memory == "kept")


@needs_glibc
@pytest.mark.parametrize("memory", ["kept", "fresh"])
def test_records_say_what_memory_was_measured(memory, tmp_path, capsys):
    path = tmp_path / "records.json"
    arguments = ["consensus_pool", "--quick", "--no-compile", "--sizes", "4x4", "--backends", "reference"]
    assert bench_main.main([*arguments, "--memory", memory, "--json", str(path)]) == 0
    assert {record["memory"] for record in json.loads(path.read_text())} == {memory}
    assert f"memory {memory}" in capsys.readouterr().out


def test_inputs_on_a_cpu_are_those_of_another_round():
    problem = case_of("channel_gate", "2 gates").made("cpu")
    turns = in_turn(problem, device_of("cpu").cold)
    first, second = next(turns)[0][0], next(turns)[0][0]
    assert first.data_ptr() != second.data_ptr()
    assert first.equal(second)
