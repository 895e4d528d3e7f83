"""The CUDA kernels as a standalone program under sanitizers; and that faults seeded into copies of it are caught."""

import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from sanitizer_faults import SEEDED, WARPS

ROOT = Path(__file__).resolve().parents[1]
ORDERS = ("forward", "reverse", "shuffled")
# A thread of a block is a fiber for AddressSanitizer and a thread of the host for ThreadSanitizer.
KINDS = {
    "plain": [],
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"],
    "thread": ["-fsanitize=thread", "-DM3EM_SIMT_THREADS"],
}
OPS = ("consensus_map", "channel_gate", "consensus_pool")
PROGRAMS = {op: f"csrc/simt/standalone_{op}.cpp" for op in OPS}


def compiler(*arguments):
    done = subprocess.run([os.environ.get("CXX", "g++"), *arguments], capture_output=True, text=True)
    return done.stderr if done.returncode else None


def prefix():
    """Without randomized addresses, where ThreadSanitizer may find its own taken."""
    command = ["setarch", platform.machine(), "-R"]
    works = shutil.which("setarch") and subprocess.run([*command, "true"], capture_output=True).returncode == 0
    return command if works else []


class Builder:
    """Builds the program of one tree; what trees have in common is compiled once a kind."""

    def __init__(self, folder):
        self.folder = folder

    def flags(self, kind, tree):
        flags = ["-std=c++17", "-O1", "-g1", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
        return [*flags, *KINDS[kind], f"-I{tree}/csrc/simt", f"-I{tree}/csrc"]

    def common(self, kind):
        probe = self.folder / "probe.cpp"
        probe.write_text("int main() {}\n")
        error = compiler(*KINDS[kind], str(probe), "-o", str(self.folder / f"probe-{kind}"))
        if error is not None and kind != "plain":
            pytest.skip(f"the compiler has no {kind} sanitizer: {error.strip().splitlines()[-1]}")
        objects = []
        for name in ("simt", "standalone"):
            objects.append(str(self.folder / f"{name}-{kind}.o"))
            if not Path(objects[-1]).exists():
                error = compiler(*self.flags(kind, ROOT), "-c", f"{ROOT}/csrc/simt/{name}.cpp", "-o", objects[-1])
                assert error is None, error
        return objects

    def build(self, kind, *files, tree=ROOT, program=None):
        program = program or self.folder / "-".join([kind, *(Path(file).stem for file in files)])
        if not program.exists():
            sources = [str(tree / file) for file in files]
            flags = ["-pthread"] if kind == "thread" else []
            error = compiler(*self.flags(kind, tree), *self.common(kind), *sources, *flags, "-o", str(program))
            assert error is None, error
        return program


@pytest.fixture(scope="module")
def builder(tmp_path_factory):
    return Builder(tmp_path_factory.mktemp("standalone"))


def run(kind, program, *arguments):
    environment = {**os.environ, "UBSAN_OPTIONS": "print_stacktrace=1"}
    command = [*(prefix() if kind == "thread" else []), str(program), *arguments]
    return subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=150
    )


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kind", ["plain", "address"])
def test_the_kernels_are_clean(builder, kind, order):
    done = run(kind, builder.build(kind, *PROGRAMS.values(), WARPS), "--order", order)
    assert done.returncode == 0, done.stdout[-5000:]
    assert re.search(r"^\d\d cases, 0 failed$", done.stdout, re.MULTILINE)
    assert {f"ok {op} {dtype}" for op in OPS for dtype in ("float32", "float16")} <= {
        " ".join(line.split()[:3]) for line in done.stdout.splitlines()
    }


@pytest.mark.parametrize("part", [*OPS, "warps"])
def test_the_kernels_have_no_races(builder, part):
    done = run("thread", builder.build("thread", *PROGRAMS.values(), WARPS), part)
    assert done.returncode == 0, done.stdout[-5000:]
    assert re.search(r"^\d+ cases, 0 failed$", done.stdout, re.MULTILINE)


def test_bad_words_are_one_sentence(builder):
    program = builder.build("plain", WARPS)
    for words, said in ((["--order", "x"], "got 'x'"), (["--order"], "got ''"), (["nothing"], "no case has 'nothing'")):
        done = run("plain", program, *words)
        assert done.returncode == 2 and said in done.stdout and done.stdout.count("\n") == 1


@pytest.mark.parametrize(("fault", "kind"), [(fault, kind) for fault in SEEDED for kind in SEEDED[fault][-1]])
def test_a_seeded_fault_is_caught(builder, tmp_path, fault, kind):
    path, right, wrong, case, said = SEEDED[fault]
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    (tmp_path / "tests").mkdir()
    shutil.copy(ROOT / WARPS, tmp_path / "tests")
    source = (tmp_path / path).read_text()
    assert source.count(right) == 1
    (tmp_path / path).write_text(source.replace(right, wrong))
    op = next((op for op in OPS if op in path or op in case), None)
    program = WARPS if path == WARPS else PROGRAMS[op]
    done = run(kind, builder.build(kind, program, tree=tmp_path, program=tmp_path / "program"), case)
    assert done.returncode not in (0, 2), done.stdout
    for words in said[kind]:
        assert re.search(words, done.stdout), done.stdout[-5000:]
