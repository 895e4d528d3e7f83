"""The CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer: the op tests on a build of their own."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLAGS = "-O1 -g1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=undefined"
# Derivatives of second order are the reference's, and so are they slow here; clips of 4 GiB leave no room for shadows.
CHOSEN = "cpu and not more_elements"
OPS = ["tests/test_ops.py", "tests/test_ops_edges.py"]


def library(name):
    """A runtime library of the compiler, or None."""
    found = subprocess.run([os.environ.get("CXX", "g++"), f"-print-file-name={name}"], capture_output=True, text=True)
    path = Path(found.stdout.strip())
    return path if found.returncode == 0 and path.is_absolute() and path.exists() else None


# libstdc++ too: the sanitizer looks for what throws exceptions as soon as it is loaded, before torch brings it.
RUNTIME = [library("libasan.so"), library("libstdc++.so.6")]
pytestmark = pytest.mark.skipif(None in RUNTIME, reason="the compiler has no AddressSanitizer for preloading")


def build(tree):
    environment = {**os.environ, "CXXFLAGS": FLAGS}
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return tree


def run_tests(tree, *arguments):
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    environment |= {
        "PYTHONPATH": str(tree),
        "LD_PRELOAD": " ".join(str(path) for path in RUNTIME),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python keeps memory until the end
        "UBSAN_OPTIONS": "print_stacktrace=1",  # said on standard error, which pytest must not keep (-s)
    }
    command = [sys.executable, "-m", "pytest", "-q", "-s", "-x", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(
        command, cwd=tree, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    tree = tmp_path_factory.mktemp("sanitized") / "tree"
    tree.mkdir()
    for name in ("csrc", "m3em_fast", "tests"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("_C*", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    return build(tree)


def test_the_op_tests_are_clean(tree):
    done = run_tests(tree, *OPS, "-k", CHOSEN)
    assert done.returncode == 0, done.stdout[-5000:]
    assert "op tests passed on backend cpu" in done.stdout


# Report -> file, what is right, and what is one step too far in it.
SEEDED = {
    "AddressSanitizer: heap-buffer-overflow": (
        "csrc/cpu/channel_gate.cpp",
        "load_matrix(o.gates[g], n, o.c, gates",
        "load_matrix(o.gates[g], n, o.c + 1, gates",
    ),
    "runtime error: left shift": (
        "csrc/cpu/consensus_pool.cpp",
        "const int64_t p = o.h * o.w",
        "const int64_t p = o.h * o.w + 0 * (int(o.h) << 31)",
    ),
}


@pytest.mark.parametrize("report", SEEDED)
def test_a_seeded_bug_is_caught(tree, report, tmp_path):
    path, right, wrong = SEEDED[report]
    copy = Path(shutil.copytree(tree, tmp_path / "tree"))
    source = (copy / path).read_text()
    assert right in source
    (copy / path).write_text(source.replace(right, wrong))
    build(copy)
    op = Path(path).stem
    done = run_tests(copy, "tests/test_ops.py", "-k", f"cpu and test_values_and_gradients and {op}")
    assert done.returncode != 0
    assert report in done.stdout, done.stdout[-3000:]
