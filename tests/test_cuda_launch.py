"""What no card forgives and the emulation does not show: the layout of a kernel's argument, code that is loaded too
late, and more shared memory than a block may have."""

import os
import struct
import subprocess
import zipfile
from io import BytesIO

import pytest
import torch

import m3em_fast
import simt_cases
from driver_cases import assert_right, inputs, large, names, result
from m3em_fast import backends, cuda, ops
from m3em_fast.backends import native
from simt_cases import RELAXED, ROOT

# Of .nv.info.<kernel>: where its parameters are, and how many bytes all of them take.
PLACE, BYTES = 0x17, 0x19
STRUCTS = {
    "channel_gate": "ChannelGateArguments",
    "consensus_map": "ConsensusMapArguments",
    "consensus_pool": "ConsensusPoolArguments",
}


def attributes(section):
    """Number -> what stands behind it, once for every time that it is there."""
    found, at = {}, 0
    while at < len(section):
        form, number, value = struct.unpack_from("<BBH", section, at)
        at += 4
        if form == 4:  # the value is a number of bytes
            value, at = section[at : at + value], at + value
        found.setdefault(number, []).append(value)
    return found


def test_the_host_and_the_kernels_lay_out_arguments_alike(tmp_path):
    """Every packed kernel has one parameter, as large as the struct that the host's compiler makes."""
    elffile = pytest.importorskip("elftools.elf.elffile")
    includes = "".join(f'#include "cuda/{op}.cuh"\n' for op in STRUCTS)
    sizes = ", ".join(f"sizeof(m3em::{name})" for name in STRUCTS.values())
    code = f'#include <cstdio>\n{includes}int main() {{ std::printf("%zu %zu %zu", {sizes}); }}\n'
    compiler, program = os.environ.get("CXX", "g++"), tmp_path / "sizes"
    command = [compiler, "-std=c++17", f"-I{ROOT / 'csrc'}", "-x", "c++", "-", "-o", str(program)]
    subprocess.run(command, input=code, text=True, check=True)
    printed = subprocess.run([program], capture_output=True, text=True, check=True).stdout
    wanted, kernels = dict(zip(STRUCTS, map(int, printed.split()), strict=True)), 0
    with zipfile.ZipFile(cuda.ARCHIVE) as packed:
        cubins = [name for name in packed.namelist() if name.endswith(".cubin")]
        if not cubins:
            pytest.skip("this build has packed no cubin")
        for name in cubins:
            for section in elffile.ELFFile(BytesIO(packed.read(name))).iter_sections():
                if section.name.startswith(".nv.info."):
                    kernels, found = kernels + 1, attributes(section.data())
                    (place,) = found[PLACE]
                    assert struct.unpack_from("<HH", place, 4) == (0, 0)  # the first one, at the beginning
                    assert found[BYTES] == [wanted[name.partition("/")[2].removesuffix(".cubin")]], section.name
    assert kernels >= len(cubins)


def test_code_is_on_the_card_before_it_is_launched(fresh):
    """A lazily loaded kernel would come there in its first launch, which may be captured. Once a kernel."""
    driver, _ = fresh
    for first in (True, False):
        driver.log()
        result(*large())
        calls = [c for c in driver.log() if c.name in ("cuFuncLoad", "cuLaunchKernel")]
        assert names(calls) == (["cuFuncLoad", "cuLaunchKernel"] if first else ["cuLaunchKernel"]) * 3
        assert {c.mode for c in calls if c.name == "cuFuncLoad"} <= {RELAXED}


def test_a_driver_that_cannot_load_ahead(tmp_path, monkeypatch):
    """Those before CUDA 12.4 have no such function."""
    monkeypatch.setattr(backends, "simulated", None)
    older = tmp_path / "older.so"
    data = simt_cases.build().read_bytes()
    assert b"\0cuFuncLoad\0" in data
    older.write_bytes(data.replace(b"\0cuFuncLoad\0", b"\0cuFuncNone\0"))
    driver, _ = simt_cases.opened(tmp_path, library=older)
    with m3em_fast.backend("simt"):
        assert_right(result(*inputs()), *inputs())
    assert "cuFuncLoad" not in names(driver.log())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_a_pool_of_very_many_channels(tmp_path, monkeypatch, dtype):
    """The gradients of a chunk's channels fit beside the rest into the 64 KB of the card that has the least."""
    monkeypatch.setattr(backends, "simulated", None)
    simt_cases.opened(tmp_path, archs=("sm_75",), capability=75, shared=64 << 10)
    x, cmap = torch.randn(1, 70_000, 1, 2, dtype=dtype), torch.randn(1, 1, 1, 2, dtype=dtype)
    found = []
    for name in ("simt", "reference"):
        leaves = [t.clone().requires_grad_() for t in (x, cmap)]
        with m3em_fast.backend(name):
            out = ops.consensus_pool(*leaves)
            found.append([out.detach(), *torch.autograd.grad(out.sum(), leaves)])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("channels", [1024, 2048, 4096])
def test_chunks_of_the_usual_sizes_are_four(channels):
    """What docs/cuda-resources.md counts, and the order of sums, follow from it."""
    assert native.cuda_consensus_pool_workspace(2, channels, 7, 7) == 4 * 49
