"""train.py killed, stopped, out of disk or out of numbers: what stays, what is said, and where --resume ends.

Each run is a process of its own, forked from a server that has imported train.py and computed nothing: that saves the
seconds that torch takes to import.
"""

import itertools
import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train
from m3em_fast.data.store import FeatureStoreWriter
from m3em_fast.uda import run as run_module
from m3em_fast.uda.checkpoint import load_checkpoint
from train_cases import CLASSES, MODALITIES, at_call, make_options, write_data

ROOT = Path(__file__).resolve().parent.parent
STEPS = 10  # of two epochs
SERVER = multiprocessing.get_context("forkserver")


@pytest.fixture(scope="module", autouse=True)
def server():
    SERVER.set_forkserver_preload(["train"])


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("stores"))


def small(data, run, **changes):
    return make_options(data, run, method="ta3n", fc_dim=8, save_every=3, **changes)


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    return train.train(small(data, tmp_path_factory.mktemp("whole") / "run"))


def send(*numbers):
    for number in numbers:
        os.kill(os.getpid(), number)


class Torn:
    """A file that takes half of what is written to it, and then the process dies."""

    def __init__(self, path, mode):
        self.file = path.open(mode)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        raise AssertionError("still alive")

    def write(self, data):
        self.file.write(data[: len(data) // 2])
        self.file.flush()
        send(signal.SIGKILL)


def tear(count):
    """Die in the middle of the ``count``-th file that the run writes."""
    calls = itertools.count(1)
    run_module.open = lambda path, mode: Torn(path, mode) if next(calls) == count else path.open(mode)


def child(options, errors, place, count, numbers):
    """What train.py's process does, with signals that come at a certain call, and its standard error in a file."""
    os.dup2(os.open(errors, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), 2)
    torch.set_num_threads(1)
    train.parse = lambda *_: options
    if place == "write":
        tear(count)
    elif place in ("file size", "event size"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (count, count))
        if place == "event size":
            train.save_checkpoint = lambda *_: None
    elif place == "wait":
        at_call(train, "total_loss", count, threading.Event().wait)
    elif place is not None:
        at_call(os if place in ("fsync", "replace") else train, place, count, lambda: send(*numbers))
    os._exit(train.main())


def wait_for_another_second(run):
    """TensorBoard reads a folder's files in the order of their names, which have the second that they were made in."""
    names = [int(path.name.split(".")[3]) for path in run.glob("events.*")]
    until(lambda: time.time() >= max(names, default=0) + 1)


def started(options, errors, place=None, count=0, numbers=(signal.SIGKILL,)):
    wait_for_another_second(options.run)
    process = SERVER.Process(target=child, args=(options, errors, place, count, numbers), daemon=True)
    process.start()
    return process


def outcome(tmp_path, *arguments, **more):
    """Exit code, and standard error without the progress bar."""
    errors = tmp_path / "errors"
    process = started(arguments[0], errors, *arguments[1:], **more)
    process.join(120)
    code = process.exitcode
    process.kill()
    return code, [line for line in errors.read_text().replace("\r", "\n").splitlines() if line and "step" not in line]


def assert_resumes_bitwise(options, whole):
    wait_for_another_second(options.run)
    resumed = train.train(small(options.data, options.run, resume=True))
    assert (resumed / "metrics.json").read_bytes() == (whole / "metrics.json").read_bytes()
    states = [load_checkpoint(run / "checkpoint.pt") for run in (whole, resumed)]
    for name, x in states[0]["model"].items():
        assert torch.equal(x, states[1]["model"][name]), name
    assert {path.name for path in resumed.glob("*.pt*")} == {"checkpoint.pt"}
    # The log has every step once as well, although its writer keeps steps in memory for minutes.
    events = EventAccumulator(str(resumed))
    events.Reload()
    assert [event.step for event in events.Scalars("loss/classification")] == list(range(STEPS))


def test_killed_at_random_steps_again_and_again(data, tmp_path, whole):
    random, options = np.random.default_rng(4), small(data, tmp_path / "run")
    deaths = []
    while (first := STEPS if (left := steps_left(options)) is None else left) > 1 and len(deaths) < 4:
        deaths.append(int(random.integers(1, first)))
        code, said = outcome(tmp_path, options, "total_loss", deaths[-1])
        assert (code, said) == (-signal.SIGKILL, []), deaths
        options = small(data, tmp_path / "run", resume=True)
    assert len(deaths) >= 3, deaths
    assert not (options.run / "metrics.json").exists()
    assert_resumes_bitwise(options, whole)


def steps_left(options):
    path = options.run / "checkpoint.pt"
    if not path.exists():
        return None
    state = load_checkpoint(path)
    return STEPS - state["epoch"] * STEPS // 2 - state["step"]


@pytest.mark.parametrize(
    ("place", "count", "saved"),
    [
        ("write", 1, None),  # half of the first checkpoint: there is nothing to go on from but the start
        ("write", 3, (0, 5)),
        ("fsync", 2, (0, 3)),  # written, and not yet flushed
        ("replace", 3, (0, 5)),  # flushed, and not yet renamed
        ("evaluate", 3, (1, 5)),
        ("write", 7, (2, 0)),  # half of run.json, after all training
    ],
)
def test_killed_while_it_saves_or_evaluates(data, tmp_path, whole, place, count, saved):
    options = small(data, tmp_path / "run")
    code, _ = outcome(tmp_path, options, place, count)
    assert code == -signal.SIGKILL
    path = options.run / "checkpoint.pt"
    state = load_checkpoint(path) if path.exists() else None
    assert (state and (state["epoch"], state["step"])) == saved
    assert place == "evaluate" or list(options.run.glob("*.tmp"))  # so it did die where it was to die
    assert_resumes_bitwise(options, whole)


@pytest.mark.parametrize(
    ("place", "count", "numbers", "saved"),
    [
        ("total_loss", 2, [signal.SIGINT], (0, 2)),  # the step is finished and saved
        ("total_loss", 7, [signal.SIGTERM, signal.SIGTERM], (1, 2)),  # twice, as timeout(1) sends it
        ("evaluate", 2, [signal.SIGINT], (0, 5)),  # no waiting: the state was saved before
        ("fsync", 1, [signal.SIGINT], (0, 3)),  # the checkpoint is finished
        ("total_loss", 4, [signal.SIGINT, signal.SIGINT], (0, 3)),  # who asks twice does not want to wait
    ],
)
def test_stopped_with_a_checkpoint_and_one_line(data, tmp_path, whole, place, count, numbers, saved):
    options = small(data, tmp_path / "run")
    code, said = outcome(tmp_path, options, place, count, numbers=numbers)
    assert code == 128 + numbers[0]
    name = signal.Signals(numbers[0]).name
    line = f"train.py: stopped by {name}; --run {options.run} --resume goes on from the last checkpoint."
    assert said == [line]
    state = load_checkpoint(options.run / "checkpoint.pt")
    assert (state["epoch"], state["step"]) == saved
    assert_resumes_bitwise(options, whole)


def test_ctrl_c_in_a_terminal(data, tmp_path):
    """The real command: while it imports, and while it trains."""
    command = [sys.executable, "train.py", "--data", data, "--run", tmp_path / "run", "--method", "ta3n"]
    command = [str(part) for part in [*command, "--epochs", "100000", "--fc-dim", "8", "--device", "cpu"]]

    def importing():  # not before: Python itself takes a tenth of a second, whose interruption is its own to report
        if not Path("/proc/self/maps").exists():
            time.sleep(1.0)
            return True
        return "libtorch" in Path(f"/proc/{process.pid}/maps").read_text()

    for reached in (importing, (tmp_path / "run" / "checkpoint.pt").exists):
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        until(reached)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
        assert out == "" and "Traceback" not in err and process.returncode in (-signal.SIGINT, 130)
    assert process.returncode == 130 and err.splitlines()[-1].startswith("train.py: stopped by SIGINT; --run ")


def until(condition):
    for _ in range(6000):
        if condition():
            return
        time.sleep(0.01)
    raise TimeoutError


def test_ctrl_c_before_the_first_step_has_a_line_too(monkeypatch, capsys):
    def interrupted(*_):
        assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "parse", interrupted)
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)  # as the command leaves it while it imports
    try:
        assert train.main() == 130
    finally:
        signal.signal(signal.SIGINT, before)
    line = "train.py: interrupted; --run with --resume goes on from the last checkpoint.\n"
    assert capsys.readouterr().err == line


def test_an_ignored_signal_stays_ignored(tmp_path):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as nohup and a script's & leave it
    try:
        with run_module.StopSignals(tmp_path):
            assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) not in (signal.SIG_IGN, signal.SIG_DFL)
    finally:
        signal.signal(signal.SIGINT, before)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_training_in_a_thread_leaves_signals_alone(data, tmp_path):
    thread = threading.Thread(target=train.train, args=(small(data, tmp_path / "run", epochs=1),))
    thread.start()
    thread.join()
    assert (tmp_path / "run" / "metrics.json").exists()


@pytest.mark.parametrize(("place", "file"), [("file size", "checkpoint.pt"), ("event size", "events.out.tfevents")])
def test_a_full_disk_keeps_the_last_checkpoint(data, tmp_path, whole, place, file):
    options = small(data, tmp_path / "run")
    code, _ = outcome(tmp_path, options, "total_loss", 5)
    path = options.run / "checkpoint.pt"
    before = path.read_bytes()
    assert code == -signal.SIGKILL and load_checkpoint(path)["step"] == 3
    limit = len(before) // 2 if place == "file size" else 500
    again = small(data, tmp_path / "run", resume=True)
    code, said = outcome(tmp_path, again, place, limit)
    wanted = "could not be written (File too large); --resume goes on from the last checkpoint, which is untouched."
    assert (code, said) == (2, [f"train.py: {options.run / file} {wanted}"])
    assert path.read_bytes() == before and not list(options.run.glob("*.tmp"))  # half a file only takes room
    assert_resumes_bitwise(options, whole)


def test_the_log_is_on_the_disk_before_the_checkpoint(data, tmp_path, monkeypatch):
    """Or a run that is killed then would never log those steps: they are not done again."""
    done = []
    for owner, name in ((train.EventLog, "flush"), (train, "save_checkpoint")):
        real = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, real=real, name=name: (done.append(name), real(*a))[1])
    train.train(small(data, tmp_path / "run", epochs=1))
    assert done[:6] == ["flush", "save_checkpoint"] * 3


def test_a_log_that_cannot_be_closed_hides_nothing(tmp_path, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_module.SummaryWriter, "close", full)
    with pytest.raises(KeyboardInterrupt), run_module.EventLog(tmp_path, purge_step=0):
        raise KeyboardInterrupt
    with pytest.raises(train.UsageError, match="No space left"), run_module.EventLog(tmp_path, purge_step=0):
        pass


def test_a_folder_in_use_is_refused_until_its_process_is_gone(data, tmp_path, whole, monkeypatch, capsys):
    options = small(data, tmp_path / "run")
    process = started(options, tmp_path / "errors", "wait", 5)
    until((options.run / "checkpoint.pt").exists)
    for resume in (False, True):
        before = files(options.run)
        monkeypatch.setattr(train, "parse", lambda *_, resume=resume: small(data, options.run, resume=resume))
        assert train.main() == 2
        assert capsys.readouterr().err == (
            f"train.py: --run {options.run} is in use: another process is training there.\n"
        )
        assert files(options.run) == before
    process.kill()
    process.join(60)
    assert_resumes_bitwise(options, whole)


def files(run):
    """Names and contents, but of what the process that is at work may still be writing."""
    return {path.name: path.name.startswith("events.") or path.read_bytes() for path in run.iterdir()}


def test_one_of_two_that_begin_at_once_is_refused(tmp_path):
    with run_module.open_run(tmp_path / "run", "any", resume=False) as run:
        (run / "events.out.tfevents").touch()
        with pytest.raises(train.UsageError, match="is in use"), run_module.open_run(run, "any", resume=False):
            pass
    with pytest.raises(train.UsageError, match="exists already"), run_module.open_run(run, "any", resume=False):
        pass


def test_a_file_system_without_locks_is_no_obstacle(tmp_path, monkeypatch):
    def none(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(run_module.fcntl, "flock", none)
    with run_module.open_run(tmp_path / "run", "any", resume=False) as run:
        assert run.is_dir()


@pytest.mark.parametrize("split", ["source_train", "target_train"])
def test_a_clip_that_is_no_number_is_named_before_it_harms_the_weights(data, tmp_path, split):
    """The store refuses to write such features, so another program must have."""
    rng = np.random.default_rng(3)
    folder = tmp_path / "data"
    folder.mkdir()
    for name in ("source_train", "source_val", "target_train", "target_test"):
        features = {kind: rng.random((9, *m.shape)).astype(np.float16) for kind, m in MODALITIES.items()}
        labels = {kind: rng.integers(0, classes, 9) for kind, classes in CLASSES.items()}
        with pytest.MonkeyPatch.context() as patch, FeatureStoreWriter(folder / name, MODALITIES, CLASSES) as writer:
            if name == split:
                features["Audio"][4, 2, 0] = np.inf
                patch.setattr(writer, "_checked", lambda _, values, count: values)
            writer.append([f"{name}\n{i}" for i in range(9)], features, labels)
    options = make_options(folder, tmp_path / "run", save_every=1, batch_source=3, batch_target=3)
    with pytest.raises(train.UsageError) as caught:
        train.train(options)
    message = str(caught.value)
    assert "\n" not in message and message.startswith("loss is nan, its gradient's norm nan, at epoch 1 step ")
    assert "(classification " in message and "attentive_entropy " in message
    assert f"1 of 6 clips have scores that are not finite: '{split}\\n4')." in message
    if (path := tmp_path / "run" / "checkpoint.pt").exists():
        assert all(x.isfinite().all() for x in load_checkpoint(path)["model"].values())


def test_a_gradient_that_is_no_number_stops_before_the_weights_are_spoiled(data, tmp_path, monkeypatch):
    """The loss may be finite where its gradient is not; a checkpoint of such weights could never be resumed."""
    options, calls = small(data, tmp_path / "run"), 0
    real = train.total_loss

    def poisoned(*arguments, **more):
        nonlocal calls
        calls += 1
        loss, terms = real(*arguments, **more)
        # The root of 0 has no finite slope.
        return (loss + (0.0 * loss).sqrt() if calls == 3 else loss), terms

    monkeypatch.setattr(train, "total_loss", poisoned)
    with pytest.raises(train.UsageError, match=r"its gradient's norm nan, at epoch 1 step 2 \(.*all scores are finite"):
        train.train(options)
    assert not (options.run / "checkpoint.pt").exists()  # that of step 3 would have been the first


def test_float16_goes_on_where_a_gradient_overflows(data, tmp_path):
    options = small(data, tmp_path / "run", precision="fp16")
    real = torch.amp.GradScaler
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.amp, "GradScaler", lambda *a, **o: real(*a, init_scale=2.0**40, **o))
        run = train.train(options)
    state = load_checkpoint(run / "checkpoint.pt")
    assert state["scaler"]["scale"] < 2.0**40  # some steps were left out, none stopped the run
    assert np.isfinite(json.loads((run / "metrics.json").read_text())["history"]["loss"]).all()
