"""Small kernels in PTX, run by bench/ptx/machine.py on arrays; and whether there is a compiler for large ones."""

import numpy as np
import pytest

from bench import cuda_report
from bench.ptx import code as ptx
from bench.ptx.machine import Machine
from bench.ptx.memory import Region
from build_cases import ROOT
from m3em_fast import nvrtc

CSRC = ROOT / "csrc"
try:
    FOUND, WHY = nvrtc.find(), ""
    if FOUND.version != cuda_report.VERSION:
        FOUND, WHY = None, f"the counts are those of NVRTC 12.9, and {FOUND.name} is installed"
except nvrtc.Missing as missing:
    FOUND, WHY = None, str(missing)
needs_nvrtc = pytest.mark.skipif(FOUND is None, reason=WHY)

TEXT = """
.version 8.0
.target sm_70
.address_size 64
.global .align 4 .b32 table[4] = {{10, 20, 30, 40}};
.extern .shared .align 16 .b8 room[];
.visible .entry kernel(
    .param .u64 kernel_param_0, .param .u64 kernel_param_1, .param .u64 kernel_param_2, .param .u64 kernel_param_3
)
.maxntid {threads}, 1, 1
{{
    .reg .pred %p<8>;
    .reg .b16 %h<8>;
    .reg .b32 %r<32>;
    .reg .b64 %d<32>;
    .reg .f32 %f<32>;
    .reg .f64 %g<8>;
    mov.u32 %r0, %tid.x;
    ld.param.u64 %d0, [kernel_param_0];
    ld.param.u64 %d1, [kernel_param_1];
    ld.param.u64 %d2, [kernel_param_2];
    ld.param.u64 %d3, [kernel_param_3];
{body}
    ret;
}}
"""


def aligned(values):
    """A copy of an array that begins on 256 bytes."""
    values = np.asarray(values)
    room = np.zeros(values.nbytes + 256, dtype=np.uint8)
    skip = -room.ctypes.data % 256
    found = room[skip : skip + values.nbytes].view(values.dtype)
    found[:] = values
    return found


def machine(body, *arrays, threads=32, shared=4096):
    """One kernel over four arrays, whose addresses are in %d0 to %d3; the number of the thread is in %r0."""
    module = ptx.parse(TEXT.format(body=body, threads=threads))
    kernel = module.kernels["kernel"]
    regions = [Region(f"array {i}", each.ctypes.data, each.view(np.uint8)) for i, each in enumerate(arrays)]
    at = [each.ctypes.data for each in arrays]
    parameters = b"".join(int(address).to_bytes(8, "little") for address in (*at, 0, 0, 0, 0)[:4])
    return Machine(module, kernel, regions, threads, shared, parameters)


def run(body, *arrays, blocks=1, **how):
    """The machine after all blocks of the grid."""
    made = machine(body, *arrays, **how)
    for block in range(blocks):
        made.run(block, blocks)
    return made


def computed(instruction, to, *sources, given):
    """What one instruction makes of columns of numbers: `to` and `sources` are types of PTX, as b32.

    In it $0 is the result and $1, $2, ... are the sources.
    """
    words = {"f32": "%f", "f64": "%g", "pred": "%p"}
    sizes = {"b16": 2, "b32": 4, "b64": 8, "f32": 4, "f64": 8}
    body, text = [], instruction
    for i, type in enumerate(sources, 1):
        name = f"{words.get(type, {2: '%h', 4: '%r', 8: '%d'}[sizes[type]])}{i + 3}"
        body += [f"mul.wide.u32 %d{20 + i}, %r0, {sizes[type]};", f"add.s64 %d{20 + i}, %d{20 + i}, %d{i};"]
        body += [f"ld.global.{type} {name}, [%d{20 + i}];"]
        text = text.replace(f"${i}", name)
    result = f"{words.get(to, {2: '%h', 4: '%r', 8: '%d'}[sizes[to]])}7"
    body += [text.replace("$0", result), f"mul.wide.u32 %d20, %r0, {sizes[to]};", "add.s64 %d20, %d20, %d0;"]
    body += [f"st.global.{to} [%d20], {result};"]
    columns = [aligned(column) for column in given]
    out = aligned(np.zeros(len(columns[0]), dtype={"f": f"f{sizes[to]}"}.get(to[0], f"u{sizes[to]}")))
    threads = len(out)
    run("\n".join(body), out, *columns, threads=threads)
    return out
