"""``make gpu`` as far as a machine without a card can show it: sentences, time limits, records, what it imports."""

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import gpu, gpu_card, gpu_measure
from bench.__main__ import main as bench_main
from bench.gpu import Done

ROOT = Path(__file__).resolve().parents[1]
WITHOUT_CARD = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a card")
FOUND = {"card": "A Card 80GB", "capability": "9.0", "driver": "1.2", "torch": "2", "cuda": "13", "python": "3.12"}
KERNELS = {"kernels": "packed sm_90/consensus_map.cubin", "nvrtc": "12.9"}
# Of the extras train and dev, what a machine with a card need not have; torch itself brings mpmath.
NOT_NEEDED = "cv2 matplotlib PIL pytest_benchmark rich skimage sklearn tensorboard torchmetrics tqdm tyro xdist"


# --------------------------------------------------------------------------------------- machines that cannot run it


@WITHOUT_CARD
def test_without_a_card_it_says_so():
    done = subprocess.run([sys.executable, "-m", "bench.gpu"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("make gpu: torch ") and done.stderr.count("\n") == 1
    assert "built without CUDA" in done.stderr or "sees no CUDA device" in done.stderr


@WITHOUT_CARD
@pytest.mark.parametrize("command", [gpu_measure.main, bench_main])
def test_measuring_without_a_card_is_one_sentence(command, tmp_path, capsys):
    words = ["float32"] if command is gpu_measure.main else ["consensus_map", "--device", "cuda"]
    assert command([*words, "--json", str(tmp_path / "x.json")]) == 2
    assert "sees no CUDA device here" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_missing_package_is_named(monkeypatch, capsys):
    monkeypatch.setattr(gpu, "NEEDED", ("torch", "no_such_one", "nor_this"))
    assert gpu.main([]) == 2
    assert "has no no_such_one and no nor_this." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("done", "said"),
    [
        (Done(1, "Traceback\nOSError: libcuda.\n"), "failed (OSError: libcuda)."),
        (Done(None), "took longer than 5 s."),
        (Done(0, "no answer"), "failed (no answer)."),
        (Done(0, '{"card": "x", "problem": "a reason."}\n'), "a reason."),
        (Done(0, '{"kernel_problem": "another one."}\nlate words\n'), "another one."),
    ],
)
def test_what_is_wrong_with_the_card_is_said(monkeypatch, done, said):
    monkeypatch.setattr(gpu, "call", lambda *arguments, **options: done)
    with pytest.raises(gpu.CannotRun) as caught:
        gpu.look(5)
    assert str(caught.value).endswith(said)


def test_cards_that_cannot_be_served(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "sees no CUDA device here." in gpu_card.card()["problem"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(gpu_card, "driver_version", lambda: "580.1")
    for major, said in ((6, "A Card has compute capability 6.1; 7.0 is needed."), (9, "cannot compute on A Card (")):
        card = SimpleNamespace(name="A Card", major=major, minor=1)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index, card=card: card)
        monkeypatch.setattr(torch, "ones", lambda *a, **k: (_ for _ in ()).throw(RuntimeError("no kernel image.\nx")))
        assert said in gpu_card.card()["problem"]


def test_what_a_card_s_machine_need_not_have(tmp_path):
    """The modules of ``make gpu`` and its tests are imported, and run on the CPU's backend, without the extras."""
    block = f"import sys\nsys.modules.update(dict.fromkeys({NOT_NEEDED.split()!r}))\n"
    code = block + "from bench import gpu, gpu_card, gpu_measure\nassert 'torch' in sys.modules\n"
    code += "import pytest\nsys.exit(pytest.main(sys.argv[1:]))"
    words = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:benchmark", *gpu.TESTS]
    kept_out = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment = {
        **kept_out,
        "M3EM_GPU_STAND_IN": "cpu",
        "PYTHONPATH": str(ROOT),
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
    }
    command = [sys.executable, "-c", code, *words, "-k", "handful or second or definition"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "15 passed" in done.stdout


def test_the_command_itself_needs_the_standard_library_alone():
    code = "import sys; from bench import gpu; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


# ---------------------------------------------------------------------------------------------------------- time


def test_the_shares_fit():
    assert gpu.LIMIT == 480 and sum(gpu.PARTS.values()) <= gpu.LIMIT - 15
    assert gpu.PARTS["benchmark"] <= 180


class Machine:
    """Stands for a machine on which every command takes a given share of its limit."""

    def __init__(self, monkeypatch, share, code=0, text=""):
        self.now, self.commands = 100.0, []
        self.share, self.code, self.text = share, code, text
        monkeypatch.setattr(gpu, "time", SimpleNamespace(monotonic=lambda: self.now))
        monkeypatch.setattr(gpu, "call", self.call)
        monkeypatch.setattr(gpu, "find_sanitizer", lambda: "sanitizer")
        monkeypatch.setattr(gpu, "packed_for", lambda capability: False)

    def call(self, command, limit, keep=False, **variables):
        self.commands.append((command, limit, variables))
        self.now += limit * self.share
        if "bench.gpu_card" in command:
            return Done(0, json.dumps(FOUND | (KERNELS if "--kernels" in command else {})))
        return Done(None if self.share == 1 else self.code, self.text)


def test_whatever_its_commands_do_it_ends_in_time(monkeypatch, tmp_path, capsys):
    machine = Machine(monkeypatch, share=1)
    assert gpu.main(["--results", str(tmp_path)]) == 1
    assert machine.now - 100 <= gpu.LIMIT
    said = capsys.readouterr().out
    assert "The tests took longer than 95 s and were stopped." in said
    assert "compute-sanitizer memcheck: stopped" in said
    assert "The benchmark in bfloat16 took longer than" in said
    assert "The tests took longer than 50 s and were stopped." in said
    assert (
        "build stopped, tests stopped, triton stopped, sanitizer stopped, training stopped, benchmark stopped; 480 s"
        in said
    )


def test_a_run_in_which_nothing_is_wrong(monkeypatch, tmp_path, capsys):
    machine = Machine(monkeypatch, share=0.5, text="x\n== ERROR SUMMARY: 0 errors\nm3em_fast: a line of the build\n")
    assert gpu.main(["--results", str(tmp_path / "new")]) == 0
    said = capsys.readouterr().out
    assert "A Card 80GB, compute capability 9.0, driver 1.2" in said and "m3em_fast: a line of the build" in said
    assert "\nkernels packed sm_90/consensus_map.cubin, NVRTC 12.9" in said
    assert "compute-sanitizer racecheck: ERROR SUMMARY: 0 errors" in said
    assert "build done, tests passed, triton passed, sanitizer passed, training done, benchmark done" in said
    chosen = [command[command.index("-k") + 1] for command, _, _ in machine.commands if "-k" in command]
    assert chosen == ["not triton", "triton", *["handful and not triton"] * len(gpu.TOOLS)]
    assert machine.commands[1][2] == {"M3EM_CUDA_ARCHS": "9.0"}
    measured = [command for command, _, _ in machine.commands if "bench.gpu_measure" in command]
    names = [Path(command[command.index("--json") + 1]).name for command in measured]
    assert names == [f"gpu-a-card-80gb-{dtype}.json" for dtype in ("float16", "float32", "bfloat16")]
    given = json.loads(measured[0][measured[0].index("--conditions") + 1])
    passed = dict.fromkeys(("tests", "triton", "sanitizer"), "passed")
    assert given == {**FOUND, **KERNELS, "build": "done", **passed, "training": "done"}
    (epoch,) = [command for command, _, _ in machine.commands if "bench.gpu_train" in command]
    assert Path(epoch[epoch.index("--json") + 1]).name == "gpu-a-card-80gb-train.json"
    assert json.loads(epoch[epoch.index("--conditions") + 1]) == {**FOUND, **KERNELS, "build": "done", **passed}


def test_what_fails_is_the_exit_code_and_stops_nothing_else(monkeypatch, tmp_path, capsys):
    machine = Machine(monkeypatch, share=0.1, code=9, text="== ERROR SUMMARY: 3 errors")
    assert gpu.main(["--results", str(tmp_path)]) == 1
    said = capsys.readouterr().out
    assert "build failed, tests failed, triton failed, sanitizer failed, training failed, benchmark failed" in said
    assert "compute-sanitizer memcheck: ERROR SUMMARY: 3 errors" in said
    assert len(machine.commands) == 11


def test_without_the_libraries_of_training_no_epoch_is_run(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu, "TRAINING", ("tqdm", "no_such_module"))
    assert gpu.training(1, tmp_path, FOUND) == "not found"
    assert capsys.readouterr().out == "no_such_module missing, so no epoch of train.py is run.\n"


def test_where_triton_serves_nothing_its_tests_are_left_out(monkeypatch, capsys):
    monkeypatch.setattr(gpu, "call", lambda *_: Done(gpu.NO_TESTS))
    assert (gpu.tests(1, "triton"), gpu.tests(1)) == ("not found", "failed")
    assert "Triton serves nothing here" in capsys.readouterr().out


def test_a_command_ends_with_all_that_it_has_started(tmp_path):
    note = tmp_path / "pid"
    child = f"import os, time; open({str(note)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    code = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"
    start = time.monotonic()
    assert gpu.call([sys.executable, "-c", code], 3, keep=True).code is None
    assert time.monotonic() - start < 20
    for _ in range(100):
        state = Path(f"/proc/{note.read_text()}/stat")
        if not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z":
            break
        time.sleep(0.1)
    else:
        pytest.fail("the child goes on")


def test_a_command_sees_this_checkout_and_no_choice_of_backend(monkeypatch):
    monkeypatch.setenv("M3EM_BACKEND", "reference")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    words = "os.environ.get('M3EM_BACKEND'), os.environ['TRITON_INTERPRET'], os.environ['WORD'], m3em_fast.__file__"
    code = f"import os, m3em_fast; print({words})"
    done = gpu.call([sys.executable, "-c", code], 60, keep=True, WORD="word")
    assert done == Done(0, f"None 0 word {ROOT / 'm3em_fast/__init__.py'}\n")


def test_without_compute_sanitizer(monkeypatch, capsys):
    monkeypatch.setattr(gpu, "find_sanitizer", lambda: None)
    assert gpu.sanitizer(10) == "not found"
    assert "is not found" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------- packed or compiled


def pack(output, *images):
    """As the build does."""
    spec = importlib.util.spec_from_file_location("compile_for_test", ROOT / "csrc/cuda/compile.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    paths = [output.parent / image for image in images]
    for path in paths:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"code")
    plan = output.parent / "plan.json"
    plan.write_text(json.dumps({"images": list(images), "missing": {}, "nvrtc": "12.9", "version": "0"}))
    script.pack(plan, output, *map(str, paths))


def test_which_cards_the_archive_serves(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "ARCHIVE", tmp_path / "_cuda.zip")
    assert not gpu.packed_for("9.0")
    pack(gpu.ARCHIVE, "sm_80/consensus_map.cubin", "compute_90/consensus_map.ptx")
    assert not gpu.packed_for("8.0")  # the other ops are missing
    images = [("sm_80", "cubin"), ("compute_90", "ptx")]
    pack(gpu.ARCHIVE, *(f"{arch}/{op}.{suffix}" for arch, suffix in images for op in gpu.OPS))
    expected = {"7.0": False, "7.5": False, "8.0": True, "8.6": True, "9.0": True, "12.0": True}
    assert {capability: gpu.packed_for(capability) for capability in expected} == expected
    monkeypatch.setattr(gpu, "ROOT", tmp_path)  # where the sources are others
    assert not gpu.packed_for("8.0")
    gpu.ARCHIVE.write_bytes(b"no archive")
    assert not gpu.packed_for("8.0")


@pytest.mark.parametrize("ready", [True, False])
def test_a_build_leaves_packed_kernels_as_they_are(monkeypatch, tmp_path, ready):
    monkeypatch.setattr(gpu, "ARCHIVE", tmp_path / "_cuda.zip")
    gpu.ARCHIVE.write_bytes(b"packed before")
    monkeypatch.setattr(gpu, "packed_for", lambda capability: ready)
    asked = []

    def call(command, limit, keep, **variables):
        asked.append(variables["M3EM_CUDA_ARCHS"])
        gpu.ARCHIVE.write_bytes(b"packed now")
        return Done(0)

    monkeypatch.setattr(gpu, "call", call)
    assert gpu.build(10, "7.0") == "done"
    assert asked == ["none" if ready else "7.0"]
    assert gpu.ARCHIVE.read_bytes() == (b"packed before" if ready else b"packed now")
