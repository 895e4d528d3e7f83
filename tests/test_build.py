"""The build and the installed package, each in a copy of the tree, so that nothing here touches the checkout."""

import importlib
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from m3em_fast import env

ROOT = Path(__file__).resolve().parents[1]

LOAD = """
import importlib.util, json, sys
spec = importlib.util.spec_from_file_location("m3em_fast._C", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
print(json.dumps(module.build_info()))
"""


def run(*command, cwd, expect=0, **variables):
    """Standard output and error as one text; the build's own variables come from the test only."""
    clean = {k: v for k, v in os.environ.items() if k not in ("CXX", "CXXFLAGS", "LDFLAGS", "PYTHONPATH")}
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=clean | {name: str(value) for name, value in variables.items()},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert done.returncode == expect, done.stdout
    return done.stdout


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


def extension(tree):
    found = [p for p in (tree / "m3em_fast").glob("_C.*") if p.suffix != ".pyi"]
    assert len(found) <= 1, found
    return found[0] if found else None


def build_info(library):
    # -S leaves out site-packages: what loads here needs neither torch nor anything else that is installed.
    return json.loads(run(sys.executable, "-I", "-S", "-c", LOAD, library, cwd="/"))


def version():
    return re.search(r'__version__ = "(.+)"', (ROOT / "m3em_fast/_version.py").read_text())[1]


@pytest.fixture
def tree(tmp_path):
    """What a clean checkout holds, as far as the build is concerned."""
    target = tmp_path / "tree"
    unbuilt = shutil.ignore_patterns("__pycache__", "_C.*", "_C_missing.txt")
    for name in ("csrc", "m3em_fast", "tests"):
        shutil.copytree(ROOT / name, target / name, ignore=unbuilt)
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, target)
    return target


def test_build_requirements_are_few():
    toml = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    project = toml.loads((ROOT / "pyproject.toml").read_text())
    names = {re.match(r"[\w-]+", requirement)[0] for requirement in project["build-system"]["requires"]}
    assert names == {"setuptools", "pybind11", "ninja"}


def test_source_archive_builds_a_whole_wheel_in_isolation(tree, tmp_path):
    run(sys.executable, "setup.py", "-q", "sdist", cwd=tree)
    (archive,) = (tree / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        inside = {name.partition("/")[2] for name in packed.getnames()}
    assert inside >= {"Makefile", "constraints.txt", "train.py", "csrc/bindings.cpp", "tests/test_build.py", "LICENSE"}

    # Old and new versions of pip take the constraints for build requirements from one or the other.
    exact = {"PIP_CONSTRAINT": tree / "constraints.txt", "PIP_BUILD_CONSTRAINT": tree / "constraints.txt"}
    run(sys.executable, "-m", "pip", "wheel", archive, "--no-deps", "-w", tmp_path / "wheel", cwd=tmp_path, **exact)
    (wheel,) = (tmp_path / "wheel").glob("*.whl")
    installed = tmp_path / "installed"
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall(installed)
    assert build_info(extension(installed))["version"] == version()

    files = {p.relative_to(installed).as_posix() for p in installed.rglob("*") if p.is_file()}
    package = {p.relative_to(tree).as_posix() for p in (tree / "m3em_fast").rglob("*.py")}
    info = f"m3em_fast-{version()}.dist-info"
    binary = extension(installed).relative_to(installed).as_posix()
    assert {name for name in files if not name.startswith(info)} == package | {binary}
    assert f"{info}/licenses/LICENSE" in files
    metadata = (installed / info / "METADATA").read_text()
    core = {line for line in metadata.splitlines() if line.startswith("Requires-Dist:") and "extra ==" not in line}
    assert {re.match(r"Requires-Dist: (\w+)", line)[1] for line in core} == {"torch", "numpy"}

    program = "import sys; sys.path.insert(0, sys.argv[1]); import m3em_fast; from m3em_fast import _C, env; "
    program += "print(m3em_fast.__file__, _C.build_info()['version'] == m3em_fast.__version__, env.PACKAGE)"
    home = (installed / "m3em_fast").resolve()
    said = run(sys.executable, "-I", "-c", program, installed, cwd="/").splitlines()[-1]
    assert said == f"{home / '__init__.py'} True {home}"


def test_build_in_place_compiles_only_what_changed(tree):
    (tree / "csrc/small.h").write_text("int small();\n")
    (tree / "csrc/small.cpp").write_text('#include "small.h"\nint small() { return 1; }\n')
    fast = {"CXXFLAGS": "-O0"}
    every = {p.relative_to(tree).as_posix() for p in (tree / "csrc").rglob("*.cpp")}
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
    said = build(tree, expect=1)
    assert "csrc/bindings.cpp:1:" in said
    assert "no_such_name" in said
    assert "m3em_fast: csrc/ did not compile; the compiler's message is above." in said
    assert "Traceback" not in said


def test_without_a_compiler_the_package_works_and_says_so_in_one_line(tree):
    (tree / "csrc/bindings.cpp").write_text("int nothing() { return 0; }\n")
    # A library from an earlier build, in both places, must not pass for the result of this one.
    build(tree)
    assert extension(tree) and list((tree / "build").glob("lib*/m3em_fast/_C.*"))
    said = build(tree, CXX="/nonexistent/c++")
    (line,) = [line for line in said.splitlines() if line.startswith("m3em_fast:")]
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
    build(tree)
    assert extension(tree) and not (tree / "m3em_fast/_C_missing.txt").exists()


def test_compiler_that_cannot_compile_counts_as_missing(tree):
    said = build(tree, CXX="false")
    (line,) = [line for line in said.splitlines() if line.startswith("m3em_fast:")]
    assert "false cannot build a shared library" in line
    assert extension(tree) is None


def test_compiler_without_openmp_builds_for_one_thread(tree, tmp_path):
    compiler = tmp_path / "c++"
    compiler.write_text(
        '#!/bin/sh\ncase " $* " in *" -fopenmp "*) echo "error: no OpenMP" >&2; exit 1;; esac\nexec g++ "$@"\n'
    )
    compiler.chmod(0o755)
    said = build(tree, CXX=compiler, CXXFLAGS="-O0")
    assert "has no OpenMP, so the kernels will run on one thread" in said
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
    assert found["torch"]["version"] == importlib.metadata.version("torch")
    assert found["libraries"]["numpy"] == importlib.metadata.version("numpy")
    assert found["variables"]["M3EM_BACKEND"] == "reference"
    assert found["backends"]["serves cpu tensors"] == "reference"

    text = run(sys.executable, "-m", "m3em_fast.env", cwd=ROOT)
    assert re.search(rf"^  version +{re.escape(version())}$", text, re.MULTILINE)
    assert re.search(r"^  serves cpu tensors +cpu$", text, re.MULTILINE)
    assert str(Path.home()) + os.sep not in text


def test_environment_report_survives_a_failing_probe(monkeypatch):
    def broken():
        raise RuntimeError("no such driver")

    monkeypatch.setitem(env.PROBES, "devices", broken)
    found = env.report()
    assert found["devices"] == {"failed": "RuntimeError: no such driver"}
    assert found["package"]["version"] == version()
    assert any("no such driver" in line for line in env._lines(found))
