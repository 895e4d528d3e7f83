"""Command lines: whatever is wrong with the options, the answer is one sentence and status 2; --help is tyro's own."""

import contextlib
import io
import os
import subprocess
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pytest
import tyro

import train
from bench import __main__ as bench
from bench import growth
from m3em_fast import _cli
from m3em_fast.data import store
from m3em_fast.data.digits import __main__ as digits
from m3em_fast.uda import report

ROOT = Path(__file__).resolve().parents[1]
LONG = "--" + "-".join(["on"] * 60)
METHODS = "source_only, ta3n, ta3n_smr, ta3n_cmc, m3em"


def called(monkeypatch, capsys, program, arguments):
    """Exit code, standard output and standard error."""
    monkeypatch.setattr(sys, "argv", ["x", *arguments])
    main = {"train.py": train.main, "m3em_fast.uda.report": report.main, "m3em_fast.data.store": store.main}
    main |= {"m3em_fast.data.digits": digits.main, "bench": bench.main, "bench.growth": growth.main}
    try:
        code = main[program]()
    except SystemExit as stop:
        code = stop.code
    return code, *capsys.readouterr()


@pytest.mark.parametrize("columns", ["40", "200"])
@pytest.mark.parametrize(
    ("program", "arguments", "sentence"),
    [
        ("train.py", ["--metod", "m3em"], "--metod is no option (did you mean --method?); train.py --help lists them."),
        ("train.py", ["--xyzzy"], "--xyzzy is no option; train.py --help lists them."),
        ("train.py", ["--xyzzy=3", "--epoch", "4"], "--xyzzy is no option; train.py --help lists them."),
        ("train.py", ["-x"], "-x is no option; train.py --help lists them."),
        ("train.py", [LONG, "4"], f"{LONG} is no option; train.py --help lists them."),
        ("train.py", ["--resume", "yes"], "yes belongs to no option; train.py --help lists them."),
        ("train.py", ["--method", "dann"], f"--method must be one of {METHODS}, got dann."),
        ("train.py", ["--method=a\nb"], f"--method must be one of {METHODS}, got a b."),
        ("train.py", ["--preset", "epik"], "--preset must be one of digits, epic, got epik."),
        ("train.py", ["--method"], "--method needs a value; train.py --help shows which."),
        ("train.py", ["--data"], "--data needs a value; train.py --help shows which."),
        ("train.py", ["--beta", "1", "2"], "--beta needs 3 values; train.py --help shows which."),
        ("train.py", ["--epochs", "three"], "--epochs must be a whole number, got three."),
        ("train.py", ["--epochs=0.5"], "--epochs must be a whole number, got 0.5."),
        ("train.py", ["--save_every", "x" * 99], f"--save-every must be a whole number, got {'x' * 99}."),
        ("train.py", ["--gamma", "little"], "--gamma must be a number, got little."),
        ("train.py", ["--lr", "fast"], "--lr must be a number or None, got fast."),
        ("train.py", ["--lr-steps", "4", "a", "--seed", "2"], "--lr-steps must be whole numbers, got 4 a."),
        ("train.py", ["--beta", "1", "2", "c"], "--beta must be numbers, got 1 2 c."),
        ("m3em_fast.data.digits", ["--seed", "-1"], "seed must be from 0 to 2**32 - 1, got -1."),
        (
            "m3em_fast.data.digits",
            ["--sead", "1"],
            "--sead is no option (did you mean --seed?); python -m m3em_fast.data.digits --help lists them.",
        ),
        ("m3em_fast.data.store", [], "PATH is missing; python -m m3em_fast.data.store --help shows what it is."),
        (
            "m3em_fast.data.store",
            ["--verifi", "a"],
            "PATH is missing; python -m m3em_fast.data.store --help shows what it is.",
        ),
        (
            "m3em_fast.data.store",
            ["a", "b"],
            "b belongs to no option; python -m m3em_fast.data.store --help lists them.",
        ),
        (
            "m3em_fast.uda.report",
            ["runs/a", "--refrence", "runs/b"],
            "--refrence is no option (did you mean --reference?); python -m m3em_fast.uda.report --help lists them.",
        ),
        (
            "bench",
            ["--quik"],
            "--quik is no option (did you mean --quick?); python -m bench --help lists them.",
        ),
        ("bench.growth", ["--seconds", "long"], "--seconds must be a number, got long."),
    ],
)
def test_what_tyro_refuses_is_one_sentence(monkeypatch, capsys, columns, program, arguments, sentence):
    """On a narrow terminal, in colours, and in a file."""
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: columns == "40")
    assert called(monkeypatch, capsys, program, arguments) == (2, "", f"{program}: {sentence}\n")
    assert os.environ["COLUMNS"] == columns


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--preview", "{out}/kept.png"], "preview must be a file name that ends in .gif"),
        (["--preview", "{out}/none/clips.gif"], "there is no such folder"),
        (["--out", "{out}/kept.png"], "kept.png: File exists."),
        (["--workers", "0"], "workers must be at least 1, got 0."),
        (["--target", "moon"], "moon"),
        (["--seed", "-1"], "seed must be from 0"),
        (["--sead", "1"], "m3em_fast.data.digits: --sead is no option (did you mean --seed?)"),
    ],
)
def test_the_digits_command_refuses(tmp_path, capsys, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "kept.png").write_text("kept")
    try:
        status = digits.main([argument.format(out=tmp_path) for argument in arguments])
    except SystemExit as stop:
        status = stop.code
    captured = capsys.readouterr()
    assert status == 2 and captured.out == "" and words in captured.err and captured.err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["kept.png"]
    assert (tmp_path / "kept.png").read_text() == "kept"


@dataclass(frozen=True)
class Options:
    """Of a small program."""

    side: int = 4
    """Its side."""


@pytest.mark.parametrize(
    ("program", "arguments", "words"),
    [
        ("m3em_fast.data.store", ["none"], "none is no feature store"),
        ("m3em_fast.data.digits", ["--workers", "0"], "workers must be at least 1, got 0."),
        ("m3em_fast.data.digits", ["--out", "file"], "file: File exists."),
        ("m3em_fast.uda.report", [], "name at least one run folder."),
        ("m3em_fast.uda.report", ["none"], "none"),
    ],
)
def test_what_a_program_itself_refuses_begins_with_its_name(tmp_path, monkeypatch, capsys, program, arguments, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("kept")
    code, out, said = called(monkeypatch, capsys, program, arguments)
    assert (code, out) == (2, "") and said.startswith(f"{program}: {words}") and said.count("\n") == 1


def test_interrupted_the_digits_command_says_who_was(tmp_path, monkeypatch, capsys):
    def prepare(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(digits, "prepare", prepare)
    code, out, said = called(monkeypatch, capsys, "m3em_fast.data.digits", ["--out", str(tmp_path / "x")])
    assert (code, out) == (130, "") and said.startswith("m3em_fast.data.digits: interrupted; ")


PACKAGES = ["m3em_fast", "m3em_fast.data", "m3em_fast.epic", "m3em_fast.uda"]


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_lists_its_commands(package):
    """One list has them all, and nothing else."""
    found = set()
    for file in (ROOT / "m3em_fast").rglob("*.py"):
        if '\nif __name__ == "__main__":' in file.read_text():
            found.add(".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__"))
    assert set(_cli.COMMANDS) == found - set(PACKAGES)
    command = [sys.executable, "-m", package, "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    lines = [line.split(maxsplit=3) for line in done.stdout.splitlines() if line.startswith("  python -m ")]
    assert {line[2] for line in lines} == {name for name in found - set(PACKAGES) if name.startswith(f"{package}.")}
    assert all(len(line) == 4 for line in lines)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "no command is given; python -m m3em_fast.epic --help lists them."),
        (["scores"], "scores is no command; python -m m3em_fast.epic --help lists them."),
        (["--xyzzy"], "--xyzzy is no command; python -m m3em_fast.epic --help lists them."),
        (["scoring", "--help"], "a dot belongs before scoring: python -m m3em_fast.epic.scoring."),
    ],
)
def test_a_package_runs_nothing(monkeypatch, capsys, arguments, sentence):
    monkeypatch.setattr(sys, "argv", ["x", *arguments])
    for given in (None, arguments):
        assert _cli.menu("m3em_fast.epic", given) == 2
        assert tuple(capsys.readouterr()) == ("", f"m3em_fast.epic: {sentence}\n")


def test_help_is_that_of_tyro(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "70")
    said = []
    for parse in (_cli.cli, lambda target, arguments, prog: tyro.cli(target, args=arguments, prog=prog)):
        with pytest.raises(SystemExit) as stop:
            parse(Options, ["--help"], prog="small")
        said.append((stop.value.code, *capsys.readouterr()))
    assert said[0] == said[1] and said[0][0] == 0 and "Its side." in said[0][1]


def test_a_form_that_is_not_known_loses_its_frame(monkeypatch, capsys):
    """As of another version of tyro, or of options that no program here has."""
    frame = "╭─ Odd ───╮\n│ Too odd │\n│ to do.  │\n│ ─────── │\n│ Advice  │\n╰─────────╯\n"

    def refuse(*_, **__):
        print(frame, file=sys.stderr)
        raise SystemExit(2)

    monkeypatch.setattr(tyro, "cli", refuse)
    with pytest.raises(SystemExit):
        _cli.cli(Options, [], prog="small")
    assert capsys.readouterr().err == "small: Too odd to do; small --help shows the options.\n"
    monkeypatch.undo()

    @dataclass(frozen=True)
    class Fixed:
        mode: Annotated[int, tyro.conf.Fixed] = 3

    with pytest.raises(SystemExit) as stop:
        _cli.cli(Fixed, ["--mode", "4"], prog="small")
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.startswith("small: ") and said.count("\n") == 1
    assert not set(said) & set("╭╰│─"), said


def test_what_else_is_printed_is_kept():
    """Of a function that tyro calls: its warnings, whether it ends well or not."""

    def program(good: bool = False) -> int:
        print("careful", file=sys.stderr)
        if not good:
            raise ValueError("bad")
        return 3

    for arguments in (["--good"], []):
        said = io.StringIO()
        with contextlib.redirect_stderr(said), contextlib.nullcontext() if arguments else pytest.raises(ValueError):
            assert _cli.cli(program, arguments, prog="small") == 3
        assert said.getvalue() == "careful\n"


def test_without_tyro_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "tyro", None)
    with (
        warnings.catch_warnings(),
        pytest.raises(ImportError, match=r'tyro could not .*: pip install "m3em_fast\[train'),
    ):
        _cli.cli(Options, [], prog="small")


@pytest.mark.parametrize(
    "program, start",
    [
        ("train.py", "runpy.run_path('train.py', run_name='__main__')"),
        ("m3em_fast.uda.report", "runpy.run_module('m3em_fast.uda.report', run_name='__main__')"),
        ("bench", "runpy.run_module('bench', run_name='__main__')"),
    ],
)
def test_without_the_extra_a_program_says_what_to_install(program, start):
    hide = "import importlib.util as u, runpy\nfind = u.find_spec\n"
    hide += "u.find_spec = lambda name, *a: None if name == 'rich' else find(name, *a)"
    done = subprocess.run([sys.executable, "-c", f"{hide}\n{start}"], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines()[-1] == f'{program}: rich missing: pip install "m3em_fast[train]".'
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("program", ["m3em_fast.env", "bench.gpu", "bench.gpu_measure", "bench.step_memory"])
def test_commands_without_tyro_say_one_sentence_as_well(program):
    """They have to run where the extras are missing."""
    done = subprocess.run(
        [sys.executable, "-m", program, "--xyzzy"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout) == (2, "")
    required = " the following arguments are required: dtype, --json" if program == "bench.gpu_measure" else None
    assert done.stderr == f"{program}:{required or ' unrecognized arguments: --xyzzy'}.\n"


def test_a_store_that_is_checked_may_be_interrupted(capsys, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(store, "FeatureStore", interrupted)
    assert store.main(["somewhere", "--verify"]) == 130
    assert capsys.readouterr().err == "m3em_fast.data.store: interrupted.\n"
