"""The build of device code: what is packed for which NVRTC, what is said, and what is compiled a second time."""

import importlib.util
import io
import json
import os
import re
import shutil
import sys
import zipfile
from pathlib import Path

import pytest

from build_cases import ROOT, clean_tree, extension, run, said_by_the_build, version
from m3em_fast import env, nvrtc
from nvrtc_cases import compilations, fake

SPEC = importlib.util.spec_from_file_location("device_code", ROOT / "csrc/cuda/compile.py")
device_code = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(device_code)
CUBINS = ["sm_70", "sm_75", "sm_80", "sm_90", "sm_100", "sm_120"]
ALL = [*CUBINS, "compute_80", "compute_120"]
KEPT = "their sources are packed, for compilation on the machine with the card."
NO_CXX = "/nonexistent/c++"

REAL, WHY = None, ""
try:
    REAL = nvrtc.find()
except nvrtc.Missing as missing:
    WHY = str(missing)
needs_nvrtc = pytest.mark.skipif(REAL is None, reason=WHY)


def build(tree, *, expect=0, **variables):
    """Without the C++ part, which costs device code nothing."""
    settings = {"CXX": NO_CXX, "M3EM_CUDA_ARCHS": "", **variables}
    return run(sys.executable, "setup.py", "build_ext", "--inplace", cwd=tree, expect=expect, **settings)


def lines(said):
    """What the build says about device code."""
    found = [line for line in said.splitlines() if line.startswith("m3em_fast:")]
    assert "Traceback" not in said and sum(NO_CXX in line for line in found) <= 1
    return [line.removeprefix("m3em_fast: ") for line in found if NO_CXX not in line]


def packed(tree):
    with zipfile.ZipFile(tree / "m3em_fast/_cuda.zip") as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def index(tree):
    return json.loads(packed(tree)["index.json"])


def small_kernels(tree):
    """Two in the place of the real ones; the second has a header of its own."""
    for path in (tree / "csrc/cuda").glob("*.cu*"):
        path.unlink()
    (tree / "csrc/cuda/shared.cuh").write_text("#pragma once\n")
    (tree / "csrc/cuda/own.cuh").write_text("#pragma once\n")
    (tree / "csrc/cuda/one.cu").write_text(
        '#include "cuda/shared.cuh"\nextern "C" __global__ void one(int *a) { *a = 1; }\n'
    )
    two = '#include "cuda/shared.cuh"\n#include "cuda/own.cuh"\n#include <cuda_fp16.h>\n'
    (tree / "csrc/cuda/two.cu").write_text(two + 'extern "C" __global__ void two(__half *a) { *a = __half(2.0f); }\n')
    return tree


@pytest.fixture
def tree(tmp_path):
    return small_kernels(clean_tree(tmp_path / "tree"))


@pytest.fixture
def faked(tmp_path):
    return fake(tmp_path / "fake")


@pytest.mark.parametrize(
    ("words", "archs"),
    [
        ("", ALL),
        ("all", ALL),
        ("none", []),
        ("70", ["sm_70"]),
        ("7.0;8.0 10.0", ["sm_70", "sm_80", "sm_100"]),
        ("sm_70, compute_80,", ["sm_70", "compute_80"]),
        ("70,90+PTX,sm_70", ["sm_70", "sm_90", "compute_90"]),
    ],
)
def test_words_of_the_variable(words, archs):
    assert device_code.wanted(words) == archs


@pytest.mark.parametrize("words", ["70,volta", "none,70", "7", "sm_70a", "86+SASS"])
def test_another_word_fails_the_build_with_one_sentence(tree, faked, words):
    said = build(tree, expect=1, M3EM_CUDA_ARCHS=words, **faked)
    (line,) = lines(said)
    assert line.startswith(f"M3EM_CUDA_ARCHS, {words!r}, has ") and "which is no architecture; a list like" in line
    assert not (tree / "m3em_fast/_cuda.zip").exists()


def test_none_packs_the_sources_and_says_so(tree, faked):
    said = build(tree, M3EM_CUDA_ARCHS="none", **faked)
    assert lines(said) == [f"M3EM_CUDA_ARCHS=none: no CUDA kernels are compiled; {KEPT}"]
    assert list(packed(tree)) == [
        "index.json",
        *sorted(f"source/cuda/{n}" for n in ("one.cu", "two.cu", "shared.cuh", "own.cuh")),
    ]
    found = index(tree)
    assert (found["nvrtc"], found["images"], found["version"]) == (None, [], version())
    assert found["missing"] == dict.fromkeys(ALL, "M3EM_CUDA_ARCHS was none in the build.")
    assert compilations(faked) == []


def test_without_nvrtc_the_build_says_so_in_one_line(tree, tmp_path):
    said = build(tree, M3EM_NVRTC="/nonexistent/libnvrtc.so.12", M3EM_CACHE=tmp_path / "cache")
    (line,) = lines(said)
    assert line.startswith("NVRTC cannot be loaded from /nonexistent/libnvrtc.so.12 (")
    assert line.endswith(f"No CUDA kernels are compiled; {KEPT}")
    found = index(tree)
    assert (found["nvrtc"], found["images"], set(found["missing"])) == (None, [], set(ALL))
    assert "/nonexistent/libnvrtc.so.12" in found["missing"]["sm_70"]
    assert "source/cuda/one.cu" in packed(tree)


def test_without_a_package_or_a_toolkit_the_line_names_what_to_install(tmp_path, monkeypatch):
    """The search itself, with nothing to find."""
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.setattr(nvrtc, "_toolkits", list)
    for name in ("M3EM_NVRTC", "M3EM_CUDA_INCLUDE"):
        monkeypatch.delenv(name, raising=False)
    real = nvrtc.ctypes.CDLL

    def unknown(name, *arguments, **options):
        if name.startswith("libnvrtc"):
            raise OSError(f"{name}: cannot open shared object file")
        return real(name, *arguments, **options)

    monkeypatch.setattr(nvrtc.ctypes, "CDLL", unknown)
    with pytest.raises(
        nvrtc.Missing, match=r"^There is no NVRTC \(pip install nvidia-cuda-nvrtc-cu12 nvidia-cuda-run\S+\)\.$"
    ):
        nvrtc.find()


def test_headers_of_another_version_do_not_count(tmp_path, faked, monkeypatch):
    monkeypatch.setenv("M3EM_NVRTC", str(faked["M3EM_NVRTC"]))
    assert nvrtc.find().version == (13, 0)
    (tmp_path / "fake/include/cuda.h").write_text("#define CUDA_VERSION 12090\n")
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setattr(nvrtc, "_toolkits", list)
    with pytest.raises(
        nvrtc.Missing, match=r"^NVRTC 13\.0 is there and CUDA's headers of version 13 are not \(pip install "
    ):
        nvrtc.find()
    monkeypatch.setenv("M3EM_CUDA_INCLUDE", str(tmp_path))
    with pytest.raises(nvrtc.Missing, match=r"^M3EM_CUDA_INCLUDE, .* cuda_fp16\.h is not in it\.$"):
        nvrtc.find()


def test_one_line_for_every_architecture_that_this_nvrtc_cannot_make(tree, faked, monkeypatch):
    said = build(tree, M3EM_CUDA_ARCHS="70,72,80,compute_80", **faked)
    where = f"NVRTC 13.0 ({faked['M3EM_NVRTC']})"
    assert lines(said) == [f"{where} cannot make code for {arch}, which is left out." for arch in ("sm_70", "sm_72")]
    assert compilations(faked) == ["compute_80", "compute_80", "sm_80", "sm_80"]
    found = index(tree)
    assert found["images"] == ["compute_80/one.ptx", "compute_80/two.ptx", "sm_80/one.cubin", "sm_80/two.cubin"]
    assert found["nvrtc"] == "13.0" and found["missing"]["sm_70"] == "NVRTC 13.0 cannot make code for it."
    assert found["missing"]["sm_90"] == "M3EM_CUDA_ARCHS was 70,72,80,compute_80 in the build."

    # And the report of the environment.
    monkeypatch.setattr(env, "PACKAGE", tree / "m3em_fast")
    assert env.report()["device code"] == {
        "packed for": ["sm_80", "compute_80"],
        "compiled by": "NVRTC 13.0",
        "not sm_75 sm_90 sm_100 sm_120 compute_120": found["missing"]["sm_90"],
        "not sm_70 sm_72": found["missing"]["sm_70"],
    }
    (tree / "m3em_fast/_cuda.zip").unlink()
    assert env.report()["device code"]["packed for"] is None


def test_only_what_changed_is_compiled_and_nothing_twice(tree, faked, tmp_path):
    able = sorted(set(ALL) - {"sm_70"})
    build(tree, **faked)
    assert compilations(faked) == sorted(able * 2)
    first = (tree / "m3em_fast/_cuda.zip").read_bytes()
    assert "no work to do" in build(tree, **faked)

    # A header of one kernel. The other one, and a touched file with the same contents, cost nothing.
    (tree / "csrc/cuda/own.cuh").write_text("#pragma once\n// changed\n")
    said = build(tree, **faked)
    assert set(re.findall(r"compile (\S+\.cu) for", said)) == {"csrc/cuda/two.cu"}
    assert compilations(faked) == able
    (tree / "csrc/cuda/shared.cuh").touch()
    assert len(re.findall(r"compile \S+\.cu for", build(tree, **faked))) == 2 * len(able)
    assert compilations(faked) == []
    assert index(tree)["digest"] != json.loads(zipfile.ZipFile(io.BytesIO(first)).read("index.json"))["digest"]

    # What decides on the options.
    with (tree / "m3em_fast/nvrtc.py").open("a") as file:
        file.write('OPTIONS = (*OPTIONS, "-DOTHER")\n')
    build(tree, **faked)
    assert compilations(faked) == sorted(able * 2)
    assert b"-DOTHER" in packed(tree)["sm_80/one.cubin"]

    # Another checkout with the same contents, at another time and place: the same bytes, and no compilation.
    other = small_kernels(clean_tree(tmp_path / "another tree"))
    build(other, **faked)
    assert (other / "m3em_fast/_cuda.zip").read_bytes() == first
    assert compilations(faked) == []

    # A new version number is in the archive and compiles nothing.
    (other / "m3em_fast/_version.py").write_text('__version__ = "9.8.7"\n')
    assert "compile csrc" not in build(other, **faked)
    assert index(other)["version"] == "9.8.7"


def test_a_damaged_result_is_noticed_and_made_again(tree, faked):
    one = {"M3EM_CUDA_ARCHS": "80", **faked}
    build(tree, **one)
    right, kept = packed(tree), sorted(faked["M3EM_CACHE"].iterdir())
    assert compilations(faked) == ["sm_80", "sm_80"] and len(kept) == 2
    whole = kept[0].read_bytes()
    for damaged in (whole[:-1], whole[:-3] + b"xyz", whole[:20], b"", whole + b"\n"):
        kept[0].write_bytes(damaged)
        shutil.rmtree(tree / "build")
        build(tree, **one)
        assert compilations(faked) == ["sm_80"], damaged[-10:]
        assert packed(tree) == right and kept[0].read_bytes() == whole


def test_a_cache_that_cannot_be_written_costs_one_line(tree, faked, tmp_path):
    (tmp_path / "file").touch()
    said = build(tree, M3EM_CUDA_ARCHS="80,90", **faked | {"M3EM_CACHE": tmp_path / "file/cache"})
    (line,) = lines(said)
    assert line.startswith(f"Compiled device code cannot be kept in {tmp_path}/file/cache (")
    assert said.count("cannot be kept") == 1
    assert len(index(tree)["images"]) == 4


class Counted:
    """In the place of an Nvrtc."""

    identity = "fake"

    def __init__(self):
        self.made = []

    def compile(self, source, name, arch, headers):
        self.made.append(source)
        return nvrtc.Compiled(source.encode(), f"of {name}\n")


def test_at_run_time_the_line_about_the_cache_comes_once(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setenv("M3EM_CACHE", str(tmp_path / "file/cache"))
    monkeypatch.setattr(nvrtc, "_said", set())
    for source in ("a", "b", "a"):
        assert nvrtc.cached(Counted(), source, "a.cu", "sm_70", {}).image == source.encode()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"m3em_fast: Compiled device code cannot be kept in {tmp_path}/file/cache (")


def test_the_cache_keeps_what_was_used_last(tmp_path, monkeypatch):
    monkeypatch.setenv("M3EM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(nvrtc, "KEPT", 3)
    compiler = Counted()
    made = compiler.made

    def get(source):
        return nvrtc.cached(compiler, source, "a.cu", "sm_70", {"unused.cuh": str(len(made))})

    for i, source in enumerate(("a", "b", "c", "a", "d")):
        assert get(source) == (source.encode(), "of a.cu\n")
        for age, path in enumerate(sorted((tmp_path / "cache").iterdir(), key=lambda p: p.stat().st_mtime_ns)):
            os.utime(path, ns=(10**9 * (100 * i + age),) * 2)
    assert made == ["a", "b", "c", "d"]
    get("a"), get("c"), get("d")
    assert made == ["a", "b", "c", "d"]
    get("b")
    assert made == ["a", "b", "c", "d", "b"]


def test_a_kernel_that_does_not_compile_fails_the_build_with_log_and_architecture(tree, faked):
    with (tree / "csrc/cuda/one.cu").open("a") as file:
        file.write("// broken\n")
    said = build(tree, expect=1, M3EM_CUDA_ARCHS="80", **faked)
    assert "csrc/cuda/one.cu does not compile for sm_80 (NVRTC 13.0: NVRTC_ERROR_COMPILATION):" in said
    assert "line 1: a word about the source" in said
    assert lines(said)[-1] == "csrc/ did not compile; the compiler's message is above."
    assert not (tree / "m3em_fast/_cuda.zip").exists()


def test_without_ninja_the_sources_are_packed(tree, faked, tmp_path):
    (tmp_path / "hide").mkdir()
    hide = "import shutil, sys; sys.modules['ninja'] = None; shutil.which = lambda *a, **k: None"
    (tmp_path / "hide/sitecustomize.py").write_text(hide)
    said = build(tree, CXX="g++", PYTHONPATH=tmp_path / "hide", M3EM_CUDA_ARCHS="80", **faked)
    assert said_by_the_build(said).startswith("m3em_fast: ninja is missing (pip install ninja). ")
    assert index(tree)["images"] == [] and index(tree)["missing"]["sm_80"] == "ninja is missing (pip install ninja)."
    assert extension(tree) is None and "source/cuda/two.cu" in packed(tree)


@needs_nvrtc
def test_the_real_compiler(tree, tmp_path, monkeypatch):
    """Cubins of the architecture, PTX, the log of the compiler, and its words for a mistake."""
    chosen = [f"sm_{n}" for n in (70, 120) if n in REAL.architectures()]
    settings = {"M3EM_CUDA_ARCHS": " ".join([*chosen, "compute_80"]), "M3EM_CACHE": tmp_path / "cache"}
    monkeypatch.setenv("M3EM_CACHE", str(tmp_path / "cache"))
    assert lines(build(tree, **settings)) == []
    for arch in chosen:
        image = packed(tree)[f"{arch}/two.cubin"]
        # An ELF file of NVIDIA's machine, with the architecture in its flags.
        assert image[:4] == b"\x7fELF" and int.from_bytes(image[18:20], "little") == 190
        assert b"two" in image
    ptx = packed(tree)["compute_80/one.ptx"].decode()
    assert ".target sm_80" in ptx and ".entry one(" in ptx
    log = nvrtc.cached(REAL, 'extern "C" __global__ void k(int *a) { *a = 1; }', "k.cu", "sm_90", {}).log
    assert re.search(r"entry function 'k' for 'sm_90'[\s\S]*Used \d+ registers", log)

    (tree / "csrc/cuda/own.cuh").write_text("int wrong = no_such_name;\n")
    said = build(tree, expect=1, **settings)
    assert re.search(rf"csrc/cuda/two.cu does not compile for (sm_\d+|compute_80) \(NVRTC {REAL.name}: NVRTC_ERR", said)
    assert 'cuda/own.cuh(1): error: identifier "no_such_name" is undefined' in said


def test_what_this_checkout_has_packed():
    """The build of the checkout: everything, within the budget, and nothing of NVIDIA's."""
    archive = ROOT / "m3em_fast/_cuda.zip"
    assert archive.stat().st_size <= 12 << 20
    with zipfile.ZipFile(archive) as packed_here:
        names, found = packed_here.namelist(), json.loads(packed_here.read("index.json"))
        sources = {f"source/cuda/{p.name}" for p in (ROOT / "csrc/cuda").glob("*.cu*")}
        assert set(names) == {"index.json", *found["images"], *sources}
        for name in sources:
            assert packed_here.read(name) == (ROOT / "csrc/cuda" / Path(name).name).read_bytes()
    made = {name.partition("/")[0] for name in found["images"]}
    assert made | set(found["missing"]) == set(ALL) and not made & set(found["missing"])
    if REAL is not None and "M3EM_CUDA_ARCHS" not in os.environ:
        assert made == {arch for arch in ALL if int(arch.partition("_")[2]) in REAL.architectures()}
