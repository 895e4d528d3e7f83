"""However one of several processes ends, all end within a minute, and one sentence says why."""

import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import train
from distributed_cases import ended, impatient, run_main, signal_at, started, together
from m3em_fast.data.prefetch import BatchReader
from m3em_fast.data.store import FeatureStore, FeatureStoreWriter
from m3em_fast.uda import _pulse, distributed
from m3em_fast.uda.checkpoint import load_checkpoint
from train_cases import CLASSES, MODALITIES, at_call, make_options, write_data, write_store

ROOT = Path(__file__).resolve().parent.parent
HOST = socket.gethostname()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("stores"))


def small(data, run, **changes):
    return make_options(data, run, method="ta3n", fc_dim=8, save_every=3, **changes)


def all_of(said):
    return [line for lines in said for line in lines]


def gone(rank, size):
    why = "killed, or its machine is; --resume goes on from the last checkpoint."
    return f"rank {rank} of {size} on {HOST} is gone: {why}"


def position(run):
    state = load_checkpoint(run / "checkpoint.pt")
    return state["epoch"], state["step"]


def test_what_all_are_refused_is_said_once(tmp_path):
    codes, said = together(3, tmp_path / "said", run_main, small(tmp_path / "nowhere", tmp_path / "run"))
    assert codes == [2] * 3
    (line,) = all_of(said)
    assert line.startswith(f"train.py: --data {tmp_path / 'nowhere'} is no folder; ")
    assert not (tmp_path / "run").exists()


def test_on_two_machines_it_is_said_on_each(tmp_path):
    arguments = (run_main, small(tmp_path / "nowhere", tmp_path / "run"))
    codes, said = together(4, tmp_path / "said", *arguments, machines=2)
    assert codes == [2] * 4
    for machine in (said[:2], said[2:]):
        assert sum(map(len, machine)) == 1


def test_what_only_the_first_can_see_ends_all(data, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.json").write_text("mine")
    codes, said = together(2, tmp_path / "said", run_main, small(data, tmp_path / "run"))
    assert codes == [2, 2]
    sentence = (
        f"train.py: --run {tmp_path / 'run'} exists already: name a new folder, or add --resume to go on with it."
    )
    assert all_of(said) == [sentence]
    assert (tmp_path / "run" / "metrics.json").read_text() == "mine"


def other_options(rank, options):
    if rank == 1:
        options = replace(options, seed=7)
    return run_main(rank, options)


def other_data(rank, options, folder):
    return run_main(rank, replace(options, data=folder) if rank == 1 else options)


def test_other_options_or_data_in_one_of_them_are_refused(data, tmp_path):
    options = small(data, tmp_path / "run")
    codes, said = together(2, tmp_path / "said", other_options, options)
    assert codes == [2, 2]
    named = f"train.py: rank 1 of 2 on {HOST}: "
    assert all_of(said) == [f"{named}--seed is 7 here and 1 in rank 0; all ranks need the same."]
    shutil.copytree(data, tmp_path / "data")
    shutil.rmtree(tmp_path / "data" / "target_test")
    write_store(tmp_path / "data" / "target_test", 30, 99)
    codes, said = together(2, tmp_path / "said", other_data, options, tmp_path / "data")
    assert codes == [2, 2]
    sums = [FeatureStore(folder / "target_test").fingerprint[:12] for folder in (tmp_path / "data", data)]
    assert all_of(said) == [
        f"{named}the SHA-256 of the manifest of target_test begins with {sums[0]} here and {sums[1]} in rank 0; "
        "all ranks need the same data."
    ]
    assert not (tmp_path / "run").exists()


def unreadable(rank, who, error):
    def fail():
        raise error

    if rank == who:
        at_call(BatchReader, "__call__", 4, fail)


def test_an_error_of_one_ends_all_and_names_it(data, tmp_path):
    error = OSError(5, "Input/output error", "shard.npy")
    codes, said = together(2, tmp_path / "said", run_main, small(data, tmp_path / "run"), unreadable, 1, error)
    assert codes == [2, 2]
    assert all_of(said) == [f"train.py: rank 1 of 2 on {HOST}: [Errno 5] Input/output error: 'shard.npy'"]


def test_a_bug_has_one_traceback(data, tmp_path):
    arguments = (run_main, small(data, tmp_path / "run"), unreadable, 1, ZeroDivisionError("of a test"))
    codes, said = together(2, tmp_path / "said", *arguments)
    lines = all_of(said)
    assert codes == [1, 1]
    assert lines[0] == f"train.py: rank 1 of 2 on {HOST}: ZeroDivisionError: of a test"
    assert sum(line.startswith("Traceback") for line in lines) <= 1


def test_a_clip_that_is_no_number_is_named_whoever_has_it(tmp_path):
    rng, folder = np.random.default_rng(3), tmp_path / "data"
    folder.mkdir()
    for name in ("source_train", "source_val", "target_train", "target_test"):
        features = {kind: rng.random((9, *m.shape)).astype(np.float16) for kind, m in MODALITIES.items()}
        labels = {kind: rng.integers(0, classes, 9) for kind, classes in CLASSES.items()}
        with pytest.MonkeyPatch.context() as patch, FeatureStoreWriter(folder / name, MODALITIES, CLASSES) as writer:
            if name == "target_train":
                features["Audio"][[2, 4, 5], 2, 0] = np.inf
                patch.setattr(writer, "_checked", lambda _, values, count: values)
            writer.append([f"{name}_{i}" for i in range(9)], features, labels)
    options = small(folder, tmp_path / "run", batch_source=9, batch_target=9)
    codes, said = together(3, tmp_path / "said", run_main, options)
    assert codes == [2] * 3
    (line,) = all_of(said)
    assert line.startswith("train.py: loss is nan, its gradient's norm nan, at epoch 1 step 0 (classification ")
    assert "3 of 18 clips have scores that are not finite: " in line
    assert set(re.findall(r"'(\w+)'", line.split("finite: ")[1])) == {f"target_train_{i}" for i in (2, 4, 5)}


def full(rank, limit):
    if rank == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


def test_a_full_disk_ends_all(data, tmp_path):
    codes, said = together(2, tmp_path / "said", run_main, small(data, tmp_path / "run"), full, 20000)
    assert codes == [2, 2]
    assert all_of(said) == [
        f"train.py: {tmp_path / 'run' / 'checkpoint.pt'} could not be written (File too large); --resume goes on from "
        "the last checkpoint, which is untouched."
    ]


@pytest.mark.parametrize(
    ("who", "place", "count", "numbers", "saved"),
    [
        (1, "total_loss", 7, [signal.SIGTERM], (1, 2)),
        (0, "total_loss", 2, [signal.SIGINT, signal.SIGINT], (0, 2)),  # twice, as under torchrun in a terminal
        (1, "evaluate", 2, [signal.SIGTERM], (0, 5)),
    ],
)
def test_one_that_is_asked_to_stop_stops_all_at_the_same_step(data, tmp_path, who, place, count, numbers, saved):
    run = tmp_path / "run"
    codes, said = together(2, tmp_path / "said", run_main, small(data, run), signal_at, who, place, count, *numbers)
    assert codes == [128 + numbers[0]] * 2
    name = signal.Signals(numbers[0]).name
    assert all_of(said) == [f"train.py: stopped by {name}; --run {run} --resume goes on from the last checkpoint."]
    assert position(run) == saved


@pytest.mark.parametrize(("place", "count", "saved"), [("total_loss", 5, (0, 3)), ("evaluate", 1, (0, 5))])
def test_one_that_is_killed_is_named(data, tmp_path, place, count, saved):
    begun = time.monotonic()
    arguments = (run_main, small(data, tmp_path / "run"), signal_at, 1, place, count, signal.SIGKILL)
    codes, said = together(3, tmp_path / "said", *arguments)
    assert codes == [2, -signal.SIGKILL, 2] and time.monotonic() - begun < 60
    assert all_of(said) == [f"train.py: {gone(1, 3)}"]
    assert position(tmp_path / "run") == saved


def as_torchrun_does(rank):
    signal_at(rank, 1, "evaluate", 1, signal.SIGKILL)
    signal_at(rank, 0, "evaluate", 1, signal.SIGTERM)


def test_the_signal_that_torchrun_sends_then_does_not_pass_for_the_reason(data, tmp_path):
    codes, said = together(2, tmp_path / "said", run_main, small(data, tmp_path / "run"), as_torchrun_does)
    assert codes == [2, -signal.SIGKILL]
    assert all_of(said) == [f"train.py: {gone(1, 2)}"]


def test_where_the_first_is_killed_the_others_say_so(data, tmp_path):
    """It holds the store where they meet, so not even the store is left."""
    arguments = (run_main, small(data, tmp_path / "run"), signal_at, 0, "total_loss", 5, signal.SIGKILL)
    codes, said = together(2, tmp_path / "said", *arguments, machines=2)
    assert codes == [-signal.SIGKILL, 2]
    (line,) = said[1]
    assert re.search(r"rank 0 of 2 on .* is gone|where all ranks met, is gone", line)


def frozen(rank, who):
    impatient()
    if rank == who:
        at_call(train, "total_loss", 3, lambda: os.kill(os.getpid(), signal.SIGSTOP))


def test_one_that_does_not_answer_is_named_although_its_connections_are_whole(data, tmp_path):
    """As where a machine is without current: nothing tells the others, who wait in a sum."""
    members = started(2, tmp_path / "said", run_main, small(data, tmp_path / "run"), frozen, 1)
    members[0].join(50)
    codes, said = ended(members, tmp_path / "said", timeout=1)
    assert codes[0] == 2
    assert all_of(said) == [f"train.py: {gone(1, 2)}"]


def stuck(rank, who):
    distributed.STALLED /= 600
    if rank == who:
        at_call(train, "total_loss", 3, lambda: time.sleep(100))


def test_one_that_hangs_ends_the_run_in_the_end(data, tmp_path):
    codes, said = together(2, tmp_path / "said", run_main, small(data, tmp_path / "run"), stuck, 1)
    assert codes == [2, 2]
    goes_on = "--resume goes on from the last checkpoint."
    assert all_of(said) == [f"train.py: no rank has finished a step for 0 minutes; {goes_on}"]


def test_a_connection_that_breaks_between_two_that_live(data, tmp_path):
    error = RuntimeError("gloo: Connection closed by peer")
    codes, said = together(2, tmp_path / "said", run_main, small(data, tmp_path / "run"), unreadable, 1, error)
    assert codes == [2, 2]
    (line,) = all_of(said)
    assert line.startswith("train.py: the connection to another rank broke (RuntimeError: gloo: Connection closed")


def cardless(_):
    torch.cuda.is_available = lambda: True
    torch.cuda.device_count = lambda: 0


def test_more_processes_than_cards_are_refused(data, tmp_path):
    options = small(data, tmp_path / "run", device="cuda")
    codes, said = together(2, tmp_path / "said", run_main, options, cardless)
    assert codes == [2, 2]
    (line,) = all_of(said)
    assert re.fullmatch(r"train.py: --nproc-per-node \d: this machine has 0 cards; start one process a card\.", line)


def test_nobody_to_meet(monkeypatch, capsys):
    monkeypatch.setattr(_pulse, "COMING", 0.1)
    for name, value in {"RANK": 1, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_PORT", "1")
    monkeypatch.setenv("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1")
    with pytest.raises(SystemExit) as stop, distributed.joined("cpu", ()):
        pass
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("train.py: no other rank could be met at 127.0.0.1:1 (")


@pytest.mark.parametrize("local", [0, 1])
def test_only_the_first_of_a_machine_refuses_a_command_line(monkeypatch, capsys, local):
    names = {"RANK": local, "WORLD_SIZE": 2, "LOCAL_RANK": local, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1}
    for name, value in names.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(sys, "argv", ["train.py", "--epoch", "3"])
    with pytest.raises(SystemExit) as stop:
        train.main()
    assert stop.value.code == 2
    assert capsys.readouterr().err.count("--epoch is no option") == 1 - local


def workers(torchrun):
    children = Path(f"/proc/{torchrun}/task/{torchrun}/children").read_text().split()
    return [int(child) for child in children if b"train.py" in Path(f"/proc/{child}/cmdline").read_bytes()]


def test_torchrun_with_a_process_that_is_killed(data, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--", "train.py"]
    command += ["--data", data, "--run", tmp_path / "run", "--method", "ta3n", "--epochs", "100000", "--fc-dim", "8"]
    command = [*map(str, command), "--device", "cpu"]
    running = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        while not (tmp_path / "run" / "checkpoint.pt").exists() and running.poll() is None:
            time.sleep(0.05)
        members = workers(running.pid)
        os.kill(members[1], signal.SIGKILL)
        out, err = running.communicate(timeout=60)
    finally:
        running.kill()
    assert running.returncode != 0 and out == ""
    assert err.replace("\r", "\n").splitlines().count(f"train.py: {gone(1, 2)}") == 1
    assert err.count("Traceback") == 1 and f"traceback : {gone(1, 2)}" in err  # torchrun's own, whose report repeats it
    assert not any(Path(f"/proc/{member}").exists() for member in members)
    assert json.dumps(position(tmp_path / "run"))
