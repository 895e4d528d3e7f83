"""``make gpu`` as far as a machine without a card can show it: sentences, time limits, records, what it imports."""

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import m3em_fast
from bench import gpu, gpu_card, gpu_measure, gpu_run
from bench.__main__ import main as bench_main
from bench.gpu_run import Done

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


@pytest.mark.parametrize("wrong", [None, "numbers", "launch"])
def test_every_op_is_tried_before_anything_else(monkeypatch, wrong):
    """With the CPU's kernels in the place of a card's."""
    kernels = m3em_fast.backends.KERNELS["consensus_pool"]["cpu"]

    def forward(options, tensors, saves):
        if wrong == "launch":
            raise RuntimeError("CUDA error: an illegal memory access was encountered\nsome advice.")
        out, saved = kernels.forward(options, tensors, saves)
        return out + 1, saved

    if wrong:
        monkeypatch.setitem(m3em_fast.backends.KERNELS["consensus_pool"], "cpu", replace(kernels, forward=forward))
    said = gpu_card.trial("cpu", "cpu")
    start = "consensus_pool on backend cpu: "
    assert said is None if wrong is None else said.startswith(start) and said.endswith(".") and "\n" not in said
    assert wrong != "launch" or said == f"{start}CUDA error: an illegal memory access was encountered some advice."


def test_what_a_card_s_machine_need_not_have(tmp_path):
    """The modules of ``make gpu`` and its tests are imported, and run on the CPU's backend, without the extras."""
    block = f"import sys\nsys.modules.update(dict.fromkeys({NOT_NEEDED.split()!r}))\n"
    code = block + "from bench import gpu, gpu_card, gpu_measure, gpu_summary\nassert 'torch' in sys.modules\n"
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
    assert list(gpu.PARTS)[:3] == ["build", "tests", "float16"]


class Machine:
    """Stands for a machine on which every command takes a given share of its limit."""

    def __init__(self, monkeypatch, share, code=0, text="", kernels=KERNELS, code_of=None):
        self.now, self.commands, self.kernels = 100.0, [], kernels
        self.share, self.code, self.text, self.code_of = share, code, text, code_of or {}
        monkeypatch.setattr(gpu, "time", SimpleNamespace(monotonic=lambda: self.now, time=lambda: 0.0))
        monkeypatch.setattr(gpu, "call", self.call)
        monkeypatch.setattr(gpu, "call_all", self.call_all)
        monkeypatch.setattr(gpu, "find_sanitizer", lambda: "sanitizer")
        monkeypatch.setattr(gpu, "packed_for", lambda capability: False)

    def call(self, command, limit, show=False, **variables):
        self.commands.append((command, limit, variables))
        if "bench.gpu_card" in command:
            self.now += 5
            return Done(0, json.dumps(FOUND | (self.kernels if "--kernels" in command else {})))
        self.now += limit * self.share
        return Done(None if self.share == 1 else self.code, self.text)

    def call_all(self, commands, limit, grace=0.0, **variables):
        self.now += limit * self.share
        self.commands += [(command, limit, variables) for command in commands.values()]
        return {
            name: Done(None if self.share == 1 else self.code_of.get(name, self.code), self.text) for name in commands
        }

    def limits(self, word):
        return [limit for command, limit, _ in self.commands if word in command]


def state(folder):
    return json.loads((folder / "gpu-a-card-80gb.json").read_text())


def test_whatever_its_commands_do_it_ends_in_time(monkeypatch, tmp_path, capsys):
    machine = Machine(monkeypatch, share=1)
    assert gpu.main(["--results", str(tmp_path)]) == 1
    assert machine.now - 100 <= gpu.LIMIT
    said = capsys.readouterr().out
    assert "tests of consensus_map: took longer than 95 s and were stopped (no word)" in said
    assert "compute-sanitizer memcheck: stopped" in said
    assert "The benchmark in bfloat16 took longer than" in said
    assert all(each["outcome"] == "stopped" for each in state(tmp_path)["parts"].values())
    assert "build stopped, tests stopped, float16 stopped, training stopped, sanitizer stopped, others stopped" in said


def test_what_is_left_over_goes_to_the_measuring(monkeypatch, tmp_path):
    machine = Machine(monkeypatch, share=0.25)
    gpu.main(["--results", str(tmp_path)])
    (half,), (single,), (brain,) = (machine.limits(dtype) for dtype in ("float16", "float32", "bfloat16"))
    assert half > gpu.PARTS["float16"] + 60 and single + brain > gpu.PARTS["others"] + 60
    assert machine.limits("bench.gpu_train") == [gpu.PARTS["training"]]
    assert machine.now - 100 <= gpu.LIMIT


def test_a_run_in_which_nothing_is_wrong(monkeypatch, tmp_path, capsys):
    machine = Machine(monkeypatch, share=0.5, text="x\n== ERROR SUMMARY: 0 errors\nm3em_fast: a line of the build\n")
    assert gpu.main(["--results", str(tmp_path / "new")]) == 0
    said = capsys.readouterr().out
    assert "A Card 80GB, compute capability 9.0, driver 1.2" in said and "m3em_fast: a line of the build" in said
    assert "\nkernels packed sm_90/consensus_map.cubin, NVRTC 12.9" in said
    assert "compute-sanitizer racecheck: ERROR SUMMARY: 0 errors" in said
    assert "build done, tests passed, float16 done, training done, sanitizer passed, others done" in said
    chosen = [command[command.index("-k") + 1] for command, _, _ in machine.commands if "-k" in command]
    assert chosen == [*(k for _, k in gpu.CUDA_TESTS.values()), "triton", *["handful and not triton"] * len(gpu.TOOLS)]
    assert machine.commands[1][2] == {"M3EM_CUDA_ARCHS": "9.0"}
    measured = [command for command, _, _ in machine.commands if "bench.gpu_measure" in command]
    names = [Path(command[command.index("--json") + 1]).name for command in measured]
    assert names == [f"gpu-a-card-80gb-{dtype}.json" for dtype in ("float16", "float32", "bfloat16")]
    given = json.loads(measured[-1][measured[-1].index("--conditions") + 1])
    before = {"build": "done", "tests": "passed", "float16": "done", "training": "done", "sanitizer": "passed"}
    assert given == {**FOUND, **KERNELS, **before}
    (epoch,) = [command for command, _, _ in machine.commands if "bench.gpu_train" in command]
    assert Path(epoch[epoch.index("--json") + 1]).name == "gpu-a-card-80gb-train.json"
    assert (tmp_path / "new/gpu-a-card-80gb.log").read_text() == said


def test_what_fails_is_the_exit_code_and_stops_nothing_else(monkeypatch, tmp_path, capsys):
    machine = Machine(monkeypatch, share=0.1, code=9, text="== ERROR SUMMARY: 3 errors")
    assert gpu.main(["--results", str(tmp_path)]) == 1
    said = capsys.readouterr().out
    assert "build failed, tests failed, float16 failed, training failed, sanitizer failed, others failed" in said
    assert "compute-sanitizer memcheck: ERROR SUMMARY: 3 errors" in said
    assert len(machine.commands) == 3 + len(gpu.CUDA_TESTS) + 1 + len(gpu.TOOLS) + 4


def test_one_op_that_fails_leaves_the_others_their_word(monkeypatch, tmp_path, capsys):
    Machine(monkeypatch, share=0.1, text="12 passed in 3 s", code_of={"channel_gate": 1})
    assert gpu.main(["--results", str(tmp_path)]) == 1
    said = capsys.readouterr().out
    assert "tests of consensus_map: 12 passed in 3 s" in said
    parts = state(tmp_path)["parts"]
    assert (parts["tests"]["outcome"], parts["sanitizer"]["outcome"]) == ("failed", "passed")


@pytest.mark.parametrize("exclusive", [False, True])
def test_a_card_for_one_process_at_a_time(monkeypatch, tmp_path, exclusive):
    """As the compute mode of many a cluster has it: the tests then share their time one after another."""
    machine = Machine(monkeypatch, share=0.5, kernels={**KERNELS, "exclusive": exclusive}, text="4 passed")
    assert gpu.main(["--results", str(tmp_path)]) == 0
    limits = machine.limits("tests/test_gpu.py")[:2]  # of consensus_map, and of Triton, which is the last one
    assert (limits[0] > 2 * limits[1]) == exclusive
    assert machine.now - 100 <= gpu.LIMIT


def test_what_the_card_s_own_tool_says(monkeypatch, tmp_path):
    tool = tmp_path / "nvidia-smi"
    cases = "*driver_version*) echo 580.1; echo 580.1;; *compute_mode*) echo Exclusive_Process;; *) exit 1;;"
    tool.write_text(f'#!/bin/sh\ncase "$1" in {cases} esac\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert gpu_card.ask("driver_version") == "580.1" and gpu_card.ask("compute_mode") == "Exclusive_Process"
    assert gpu_card.ask("something") is None
    tool.unlink()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu_card.ask("driver_version") is None


def test_without_kernels_of_ours_the_rest_is_done(monkeypatch, tmp_path, capsys):
    """Triton and the baselines have figures all the same."""
    machine = Machine(monkeypatch, share=0.1, kernels={"kernel_problem": "no kernels for a reason."})
    assert gpu.main(["--results", str(tmp_path)]) == 1
    said = capsys.readouterr().out
    assert said.count("NO KERNELS OF OURS: no kernels for a reason.") == 2
    assert [c[c.index("-k") + 1] for c, _, _ in machine.commands if "-k" in c] == ["triton"]
    assert len(machine.limits("bench.gpu_measure")) == 3 and not any("sanitizer" in c for c, _, _ in machine.commands)


def test_what_was_found_is_there_after_every_part(monkeypatch, tmp_path):
    """Whatever ends it, and whichever part was running."""
    machine = Machine(monkeypatch, share=0.1)
    seen = []

    def call(command, limit, **options):
        seen.append(list(state(tmp_path)["parts"]) if (tmp_path / "gpu-a-card-80gb.json").exists() else [])
        if "bench.gpu_train" in command:
            raise KeyboardInterrupt
        return machine.call(command, limit)

    monkeypatch.setattr(gpu, "call", call)
    assert gpu.main(["--results", str(tmp_path)]) == 130
    assert seen == [[], [], ["build"], ["build", "tests"], ["build", "tests", "float16"]]
    assert "== training" in (tmp_path / "gpu-a-card-80gb.log").read_text()


def test_figures_of_an_earlier_run_are_not_this_ones(monkeypatch, tmp_path, capsys):
    Machine(monkeypatch, share=0.1)
    old = tmp_path / "gpu-a-card-80gb-float16.json"
    old.write_text(json.dumps([{"op": "of an earlier run", "error": "broken"}]))
    monkeypatch.setattr(gpu.time, "time", lambda: old.stat().st_mtime + 10)
    gpu.main(["--results", str(tmp_path)])
    assert "of an earlier run" not in capsys.readouterr().out and old.exists()


def test_every_test_is_in_one_process():
    """Of the groups that run at once: none is left out, and none is in two."""

    words = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"]
    commands = {name: [*words, *files, "-k", chosen] for name, (files, chosen) in gpu.CUDA_TESTS.items()}
    commands["all"] = [*words, *gpu.TESTS]
    found = gpu_run.call_all(commands, 120, M3EM_GPU_STAND_IN="cpu")
    names = {name: [line for line in done.text.splitlines() if "::" in line] for name, done in found.items()}
    every = sorted(names.pop("all"))
    assert len(every) > 800 and all(names.values())
    assert sorted(name for group in names.values() for name in group) == every


def test_without_the_libraries_of_training_no_epoch_is_run(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu, "TRAINING", ("tqdm", "no_such_module"))
    assert gpu.training(1, tmp_path / "x.json", FOUND) == "not found"
    assert capsys.readouterr().out == "no_such_module missing, so no epoch of train.py is run.\n"


def test_where_triton_serves_nothing_its_tests_are_left_out(monkeypatch, capsys):
    monkeypatch.setattr(gpu, "call_all", lambda commands, *_, **__: dict.fromkeys(commands, Done(gpu.NO_TESTS)))
    assert (gpu.tests(1, ours=False), gpu.tests(1)) == ("not found", "failed")
    assert "Triton serves nothing here" in capsys.readouterr().out


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

    def call(command, limit, **variables):
        asked.append(variables["M3EM_CUDA_ARCHS"])
        gpu.ARCHIVE.write_bytes(b"packed now")
        return Done(0)

    monkeypatch.setattr(gpu, "call", call)
    assert gpu.build(10, "7.0") == "done"
    assert asked == ["none" if ready else "7.0"]
    assert gpu.ARCHIVE.read_bytes() == (b"packed before" if ready else b"packed now")


@pytest.mark.parametrize("made", [True, False])
def test_an_extension_that_is_there_serves_where_none_can_be_built(monkeypatch, tmp_path, made):
    """setup.py removes the old one where, say, the compiler is missing."""
    for name in ("ARCHIVE", "EXTENSION"):
        monkeypatch.setattr(gpu, name, tmp_path / name)
    gpu.EXTENSION.write_bytes(b"built before")

    def call(command, limit, **variables):
        gpu.EXTENSION.unlink()
        if made:
            gpu.EXTENSION.write_bytes(b"built now")
        return Done(0, "m3em_fast: There is no C++ compiler.\n")

    monkeypatch.setattr(gpu, "call", call)
    assert gpu.build(10, "9.0") == "done"
    assert gpu.EXTENSION.read_bytes() == (b"built now" if made else b"built before")
