"""The build and the installed package, each in a copy of the tree, so that nothing here touches the checkout."""

import importlib
import importlib.metadata
import json
import os
import re
import sys
import zipfile
from pathlib import Path

import pytest

from build_cases import ROOT, build_info, clean_tree, extension, run, said_by_the_build, version
from m3em_fast import env


def build(tree, *, expect=0, **variables):
    return run(sys.executable, "setup.py", "build_ext", "--inplace", cwd=tree, expect=expect, **variables)


def compiled(said):
    return set(re.findall(r"^\[\d+/\d+\] compile (\S+)$", said, re.MULTILINE))


def python_in(tree, module, *arguments):
    """Runs a module of this tree alone: setuptools' finder for editable installs would add the checkout's extension."""
    program = """
import runpy, sys
sys.meta_path = [finder for finder in sys.meta_path if "Editable" not in getattr(finder, "__name__", "")]
sys.argv = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""
    return run(sys.executable, "-c", program, module, *arguments, cwd=tree)


@pytest.fixture
def tree(tmp_path):
    return clean_tree(tmp_path / "tree")


def test_build_requirements_are_few():
    toml = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    project = toml.loads((ROOT / "pyproject.toml").read_text())
    names = {re.match(r"[\w-]+", requirement)[0] for requirement in project["build-system"]["requires"]}
    assert names == {"setuptools", "pybind11", "ninja", "nvidia-cuda-nvrtc-cu12", "nvidia-cuda-runtime-cu12"}
    # They exist for one platform, and pip must not look for them on another.
    x86 = "; sys_platform == 'linux' and platform_machine == 'x86_64'"
    assert all(line.endswith(f"==12.9.*{x86}") for line in project["build-system"]["requires"] if "nvidia" in line)


def test_build_in_place_compiles_only_what_changed(tree):
    (tree / "csrc/small.h").write_text("int small();\n")
    (tree / "csrc/small.cpp").write_text('#include "small.h"\nint small() { return 1; }\n')
    fast = {"CXXFLAGS": "-O0"}
    # csrc/simt is built by its tests alone.
    folders = ("csrc", "csrc/cpu", "csrc/cuda")
    every = {p.relative_to(tree).as_posix() for d in folders for p in (tree / d).glob("*.cpp")}
    assert every > {"csrc/bindings.cpp", "csrc/small.cpp", "csrc/cpu/consensus_map.cpp"}
    assert compiled(build(tree, **fast)) == every
    info = build_info(extension(tree))
    assert info["version"] == version()
    assert info["cplusplus"] == 201703
    assert "-O0" in info["flags"]

    said = build(tree, **fast)
    assert compiled(said) == set() and "no work to do" in said
    for touched in ("csrc/small.cpp", "csrc/small.h"):
        (tree / touched).touch()
        assert compiled(build(tree, **fast)) == {"csrc/small.cpp"}, touched

    # A new version number reaches the library, although no source has changed, and costs no other file.
    (tree / "m3em_fast/_version.py").write_text('__version__ = "9.8.7"\n')
    assert compiled(build(tree, **fast)) == {"csrc/bindings.cpp"}
    assert build_info(extension(tree))["version"] == "9.8.7"


def test_compile_error_fails_with_the_compilers_message(tree):
    (tree / "csrc/bindings.cpp").write_text("int broken() { return no_such_name; }\n")
    said = build(tree, expect=1, CXXFLAGS="-O0")
    assert "csrc/bindings.cpp:1:" in said
    assert "no_such_name" in said
    assert "m3em_fast: csrc/ did not compile; the compiler's message is above." in said
    assert "Traceback" not in said


def test_without_a_compiler_the_package_works_and_says_so_in_one_line(tree):
    (tree / "csrc/bindings.cpp").write_text("int nothing() { return 0; }\n")
    # A library from an earlier build, in both places, must not pass for the result of this one.
    build(tree, CXXFLAGS="-O0")
    assert extension(tree) and list((tree / "build").glob("lib*/m3em_fast/_C.*"))
    said = build(tree, CXX="/nonexistent/c++")
    line = said_by_the_build(said)
    assert "/nonexistent/c++" in line and "g++" in line and "slower" in line
    assert "Traceback" not in said
    assert extension(tree) is None and not list((tree / "build").glob("lib*/m3em_fast/_C.*"))

    found = json.loads(python_in(tree, "m3em_fast.env", "--json"))
    assert found["extension"]["built"] is False
    assert "/nonexistent/c++" in found["extension"]["reason"]
    assert found["package"] | {"commit": None} == {
        "version": version(),
        "from": str(tree / "m3em_fast"),
        "commit": None,
    }

    # The reason goes when its cause has gone.
    build(tree, CXXFLAGS="-O0")
    assert extension(tree) and not (tree / "m3em_fast/_C_missing.txt").exists()


# What is hidden -> how, inside every process of the install, and what the one line then says.
HIDDEN = {
    "compiler": ("", "There is no C++ compiler (on Debian: apt install g++)."),
    "Python.h": (
        "import sysconfig; real = sysconfig.get_path\n"
        "sysconfig.get_path = lambda name, *a, **k: '/nonexistent' if name == 'include' else real(name, *a, **k)",
        "Python.h is missing (on Debian: apt install python3-dev).",
    ),
    "pybind11": ("import sys; sys.modules['pybind11'] = None", "pybind11 is missing (pip install pybind11)."),
    "ninja": (
        "import shutil, sys; sys.modules['ninja'] = None; real = shutil.which\n"
        "shutil.which = lambda name, *a, **k: None if name == 'ninja' else real(name, *a, **k)",
        "ninja is missing (pip install ninja).",
    ),
}

# Every op, forward and backward, in the installed package alone: setuptools' finder for editable installs would add the
# checkout's extension.
OPS = """
import sys
sys.meta_path = [finder for finder in sys.meta_path if "Editable" not in getattr(finder, "__name__", "")]
sys.path.insert(0, sys.argv[1])
import torch
from m3em_fast import env, ops
x = torch.ones(2, 4, 3, 3, requires_grad=True)
gate, weight = torch.full((2, 4), 0.5), torch.ones(5, 4)
cmap = ops.consensus_map(x, 2 * x, num_scales=1)
outs = [ops.channel_gate(x, gate), ops.consensus_pool(x, cmap), ops.gated_projection(x, [gate], weight)]
outs += [cmap, ops.gated_consensus_pool(x, [gate], cmap)]
sum(out.sum() for out in outs).backward()
print([round(out.mean().item(), 4) for out in outs], bool(x.grad.isfinite().all()), env.PACKAGE)
print(env.report()["extension"]["reason"])
"""


@pytest.mark.parametrize("hidden", HIDDEN)
def test_install_without_a_tool_succeeds_and_everything_runs_on_what_is_left(tree, tmp_path, hidden):
    how, missing = HIDDEN[hidden]
    (tmp_path / "hide").mkdir()
    (tmp_path / "hide/sitecustomize.py").write_text(how)
    variables = {"PYTHONPATH": tmp_path / "hide"}
    if hidden == "compiler":
        variables["PATH"] = "/nonexistent"
    options = ("-v", "--no-index", "--no-deps", "--no-build-isolation", "--target", tmp_path / "installed")
    said = run(sys.executable, "-m", "pip", "install", *options, tree, cwd=tmp_path, **variables)
    line = said_by_the_build(said)
    assert missing in line and "every op works, in plain PyTorch, which is slower" in line

    ran, reason = run(sys.executable, "-I", "-c", OPS, tmp_path / "installed", cwd="/").splitlines()[-2:]
    home = (tmp_path / "installed/m3em_fast").resolve()
    # Maps that are twice each other agree: 1, and the pooling weight is 2.
    assert ran == f"[0.5, 2.0, 2.0, 1.0, 1.0] True {home}"
    assert reason == f"{missing} Every op works, in plain PyTorch, which is slower."


def test_compiler_that_cannot_compile_counts_as_missing(tree):
    assert "false cannot build a shared library" in said_by_the_build(build(tree, CXX="false"))
    assert extension(tree) is None


def compiler(path, script):
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def test_compiler_without_the_standard_librarys_headers_counts_as_missing(tree, tmp_path):
    bare = compiler(tmp_path / "c++", 'exec g++ -nostdinc++ "$@"')
    line = said_by_the_build(build(tree, CXX=bare))
    assert "cannot build a shared library" in line and "vector" in line
    assert extension(tree) is None


def test_compiler_without_openmp_builds_for_one_thread(tree, tmp_path):
    refuse = 'case " $* " in *" -fopenmp "*) echo "error: no OpenMP" >&2; exit 1;; esac'
    said = build(tree, CXX=compiler(tmp_path / "c++", f'{refuse}\nexec g++ "$@"'), CXXFLAGS="-O0")
    assert "has no OpenMP that goes with torch's: the kernels will run on one thread" in said_by_the_build(said)
    assert build_info(extension(tree))["openmp"] is None
    found = json.loads(python_in(tree, "m3em_fast.env", "--json"))
    assert found["extension"]["threads"] == "one, for the build had no OpenMP"


def test_openmp_of_clang_is_not_put_beside_that_of_torch(tree, tmp_path):
    as_clang = 'case " $* " in *" -fopenmp "*) exec g++ -D__clang__ "$@";; esac'
    said = build(tree, CXX=compiler(tmp_path / "c++", f'{as_clang}\nexec g++ "$@"'), CXXFLAGS="-O0")
    assert "has no OpenMP that goes with torch's" in said_by_the_build(said)
    assert build_info(extension(tree))["openmp"] is None


def test_environment_report_of_this_checkout():
    found = json.loads(run(sys.executable, "-m", "m3em_fast.env", "--json", cwd=ROOT, M3EM_BACKEND="reference"))
    assert list(found) == list(env.PROBES)
    assert not [name for name, value in found.items() if isinstance(value, dict) and "failed" in value]
    assert found["package"]["version"] == version()
    assert found["extension"]["built"] is True
    assert found["extension"]["from"] == found["package"]["from"]
    assert found["extension"]["version"] == version()
    assert found["extension"]["compiler"].split()[0] in ("gcc", "clang")
    assert re.match(r"those of \S+|one, for", found["extension"]["threads"])
    with zipfile.ZipFile(ROOT / "m3em_fast/_cuda.zip") as archive:
        packed = {name.partition("/")[0] for name in archive.namelist() if name.endswith((".cubin", ".ptx"))}
    assert set(found["device code"]["packed for"]) == packed
    assert found["torch"]["version"] == importlib.metadata.version("torch")
    assert found["libraries"]["numpy"] == importlib.metadata.version("numpy")
    assert found["variables"]["M3EM_BACKEND"] == "reference"
    assert found["backends"]["serves cpu tensors"] == "reference"

    text = run(sys.executable, "-m", "m3em_fast.env", cwd=ROOT, LD_LIBRARY_PATH=Path.home() / "lib")
    assert re.search(rf"^  version +{re.escape(version())}$", text, re.MULTILINE)
    assert re.search(r"^  serves cpu tensors +cpu$", text, re.MULTILINE)
    assert re.search(r"^  LD_LIBRARY_PATH +~/lib$", text, re.MULTILINE)
    assert str(Path.home()) + os.sep not in text


def test_environment_report_survives_a_failing_probe(monkeypatch):
    def broken():
        raise RuntimeError("no such driver")

    monkeypatch.setitem(env.PROBES, "devices", broken)
    found = env.report()
    assert found["devices"] == {"failed": "RuntimeError: no such driver"}
    assert found["package"]["version"] == version()
    assert any("no such driver" in line for line in env._lines(found))
