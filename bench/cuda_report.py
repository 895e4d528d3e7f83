"""Write docs/cuda-resources.md: what the compiler says about every CUDA kernel, and what memory alone would allow.

    python -m bench.cuda_report                       or: make cuda-report

Registers, shared memory and spills are NVRTC's own figures, the dynamic shared memory is that of the host's plan, and
the rest is arithmetic; no card is asked and nothing is timed. Fails where a kernel spills, where one has local memory
or, without a reason in REASONS, less than half of the occupancy on a V100.
"""

from __future__ import annotations

import re
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.cuda_plan import ELEMENT, FORMS, FRAMES, PAPER, PLANS, Broken, Shape, plan
from m3em_fast import nvrtc

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "docs/cuda-resources.md"
VERSION = (12, 9)  # figures of another compiler would be others

# Kernels that fill less than half of a V100, and why that is right.
REASONS: dict[str, str] = {
    "channel_gate_backward": "`any`: numbers of four channels and of two gates are on their way; four blocks spill.",
    "consensus_map_partial": "7x7: what shared memory holds; a tile is on its way. 14x14: sums of 28 positions and 7 "
    "cells in registers. float64 spills in four blocks.",
    "consensus_map_backward": "7x7: as in `partial`. Other maps: three blocks spill nothing, four do.",
}
LIMIT, ENOUGH = 60, 0.5


@dataclass(frozen=True)
class Processor:
    """What one multiprocessor holds, from the table of compute capabilities in NVIDIA's programming guide."""

    threads: int
    blocks: int
    shared: int  # bytes for all blocks
    unit: int  # in which shared memory is given out
    reserved: int  # of a block's shared memory, for the system
    registers: int = 65536


PROCESSORS = {
    "sm_70": Processor(2048, 32, 96 << 10, 256, 0),
    "sm_75": Processor(1024, 16, 64 << 10, 256, 0),
    "sm_80": Processor(2048, 32, 164 << 10, 128, 1 << 10),
    "sm_90": Processor(2048, 32, 228 << 10, 128, 1 << 10),
    "sm_100": Processor(2048, 32, 228 << 10, 128, 1 << 10),
    "sm_120": Processor(1536, 24, 100 << 10, 128, 1 << 10),
}
# GB/s, from NVIDIA's data sheets.
BANDWIDTH = {"V100": 900, "A100 80 GB": 2039, "H100 SXM": 3350}


@dataclass(frozen=True)
class Kernel:
    name: str
    op: str
    stage: str
    dtype: str
    form: str
    threads: int
    dynamic: int  # bytes of shared memory that the launch asks for


@dataclass(frozen=True)
class Usage:
    """What the compiler says about one kernel for one architecture."""

    registers: int
    shared: int
    stack: int
    spilled: int


def usages(log: str) -> dict[str, Usage]:
    """By kernel, from what ptxas -v says."""
    found = {}
    for part in re.split(r"Compiling entry function ", log)[1:]:
        name = re.match(r"'(\w+)'", part)
        memory = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part)
        used = re.search(r"Used (\d+) registers(.*)", part)
        if not (name and memory and used):
            raise Broken(f"The compiler's log is not of the known form: {part.strip()[:200]}")
        shared = re.search(r"(\d+) bytes smem", used[2])
        stack, stores, loads = map(int, memory.groups())
        found[name[1]] = Usage(int(used[1]), int(shared[1]) if shared else 0, stack, stores + loads)
    return found


def measure(csrc: Path = ROOT / "csrc") -> tuple[list[Kernel], dict[str, dict[str, Usage]]]:
    """All kernels of a tree, and what each of them uses by name and architecture."""
    compiler = nvrtc.find()
    if compiler.version != VERSION:
        raise Broken(f"The report is that of NVRTC {VERSION[0]}.{VERSION[1]}, and the one found is {compiler.name}.")
    headers = {f"cuda/{path.name}": path.read_text() for path in (csrc / "cuda").glob("*.cuh")}
    kernels: list[Kernel] = []
    used: dict[str, dict[str, Usage]] = {}
    for path in sorted((csrc / "cuda").glob("*.cu")):
        op, source, name = path.stem, path.read_text(), f"csrc/cuda/{path.name}"
        if op not in PLANS:
            raise Broken(f"{name} has no plan in bench/cuda_plan.py, so its shared memory is not known.")
        ptx = nvrtc.cached(compiler, source, name, "compute_80", headers).image.decode()
        plans: dict[tuple[str, str], dict[str, int]] = {}
        for entry, threads in re.findall(r"\.entry (\w+)\([^)]*\)\s*\.maxntid (\d+)", ptx):
            parts = re.fullmatch(rf"{op}_(\w+)_(f64|f32|f16|bf16)_({'|'.join(FORMS[op])})", entry)
            if not parts:
                forms = " or ".join(FORMS[op])
                raise Broken(f"{name} has a kernel {entry}; {op}_<stage>_<dtype>_<{forms}> was expected.")
            stage, dtype, form = parts.groups()
            kind = (dtype, form)
            if kind not in plans:
                plans[kind] = plan(op, form, dtype, csrc)
            if stage not in plans[kind]:
                raise Broken(f"{name} has a kernel {entry}, and PLANS in bench/cuda_plan.py no word about {stage}.")
            kernels.append(Kernel(entry, op, stage, dtype, form, int(threads), plans[kind][stage]))
        for arch in PROCESSORS:
            for entry, usage in usages(nvrtc.cached(compiler, source, name, arch, headers).log).items():
                used.setdefault(entry, {})[arch] = usage
    if missing := [kernel.name for kernel in kernels if set(used.get(kernel.name, ())) != set(PROCESSORS)]:
        raise Broken(f"The compiler's log says nothing about {', '.join(missing)}.")
    if unbound := sorted(set(used) - {kernel.name for kernel in kernels}):
        raise Broken(f"Launch bounds are missing from {', '.join(unbound)}.")
    return kernels, used


def occupancy(processor: Processor, threads: int, usage: Usage, dynamic: int) -> float:
    """The share of a multiprocessor's warps that blocks of a kernel can fill."""

    def up(value: int, unit: int) -> int:
        return -(-value // unit) * unit

    warps = -(-threads // 32)
    by_warps = processor.threads // 32 // warps
    # Each quarter of a multiprocessor gives registers to its own warps, in units of 256.
    quarter = processor.registers // 4 // up(usage.registers * 32, 256)
    by_registers = quarter * 4 // warps
    shared = up(usage.shared + dynamic + processor.reserved, processor.unit)
    by_shared = processor.shared // shared if shared else processor.blocks
    return min(by_warps, by_registers, by_shared, processor.blocks) * warps * 32 / processor.threads


def share(part: float) -> str:
    return f"{100 * part:.3g}%"


def problems(
    kernels: Sequence[Kernel], used: Mapping[str, Mapping[str, Usage]], reasons: Mapping[str, str] = REASONS
) -> list[str]:
    """What fails the report, a sentence each."""
    found = []
    if len(kernels) > LIMIT:
        found.append(f"There are {len(kernels)} kernels; {LIMIT} is the budget.")
    low = set()
    for kernel in kernels:
        for arch, usage in used[kernel.name].items():
            if usage.spilled:
                found.append(f"{kernel.name} spills {usage.spilled} bytes on {arch}.")
            elif usage.stack and arch == "sm_70":
                found.append(f"{kernel.name} has {usage.stack} bytes of local memory on {arch}.")
        full = occupancy(PROCESSORS["sm_70"], kernel.threads, used[kernel.name]["sm_70"], kernel.dynamic)
        group = f"{kernel.op}_{kernel.stage}"
        if full < ENOUGH:
            low.add(group)
            if group not in reasons:
                found.append(f"{kernel.name} fills {share(full)} of a V100 and REASONS has no word about it.")
    found += [f"{group} needs no reason in REASONS any more." for group in reasons if group not in low]
    return found


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return [f"| {' | '.join(cells)} |" for cells in lines]


def resources(kernels: Sequence[Kernel], used: Mapping[str, Mapping[str, Usage]]) -> list[str]:
    rows = []
    for kernel in kernels:
        cells = []
        for arch, processor in PROCESSORS.items():
            usage = used[kernel.name][arch]
            cell = f"{usage.registers} · {share(occupancy(processor, kernel.threads, usage, kernel.dynamic))}"
            cell += f" · {usage.spilled} B spilled" if usage.spilled else ""
            cells.append(cell + (f" · {usage.stack} B local" if usage.stack else ""))
        static = max(usage.shared for usage in used[kernel.name].values())
        rows.append([f"`{kernel.name}`", str(kernel.threads), f"{static} + {kernel.dynamic}", *cells])
    return table(["kernel", "threads", "shared memory", *PROCESSORS], rows)


Traffic = list[tuple[str, int, int | None]]  # what runs, the bytes that it moves, and their floor


def traffic_of_consensus_map(shape: Shape, given: Mapping[str, int], element: int, accumulator: int) -> Traffic:
    maps, out = 2 * shape.n * shape.c * shape.h * shape.w * element, shape.n * shape.h * shape.w * element
    sums, stats = given["workspace"] * accumulator, shape.n * given["stats"] * accumulator
    partial, finish = maps + sums, sums + stats + out
    # Every block of a sample reads what the forward left, and its gradient, anew.
    backward = 2 * maps + given["chunks"] * (stats + out)
    return [
        ("partial", partial, None),
        ("finish", finish, None),
        ("both: forward", partial + finish, maps + out),
        ("backward", backward, 2 * maps + out),
    ]


def traffic_of_channel_gate(shape: Shape, given: Mapping[str, int], element: int, accumulator: int) -> Traffic:
    gates = shape.more * shape.n * shape.c * element
    x = shape.n * shape.c * shape.h * shape.w * element
    out = shape.more * x
    return [
        ("forward", x + gates + out, x + gates + out),
        ("backward", 2 * (x + gates) + out, 2 * (x + gates) + out),
        ("backward, x frozen", x + gates + out, x + gates + out),
    ]


def traffic_of_consensus_pool(shape: Shape, given: Mapping[str, int], element: int, accumulator: int) -> Traffic:
    x, out = shape.n * shape.c * shape.h * shape.w * element, shape.n * shape.c * element
    cmap = shape.n * shape.h * shape.w * element
    sums = shape.n * given["workspace"] * accumulator
    # Every block of a sample reads the map anew.
    again = given["chunks"] * cmap
    backward, finish = out + again + 2 * x + sums, sums + cmap
    return [
        ("forward", x + again + out, x + cmap + out),
        ("forward, no map", x + out, x + out),
        ("backward", backward, None),
        ("finish", finish, None),
        ("both: backward", backward + finish, out + 2 * cmap + 2 * x),
        ("both: backward, x frozen", backward + finish - x, out + cmap + x),
        ("backward, no map", out + x, out + x),
    ]


# By op: how its bytes are counted, and what the floor is.
TRAFFIC = {
    "consensus_map": (
        traffic_of_consensus_map,
        "Floor: reading a and b and writing the result; backwards, reading its gradient, a and b and writing both "
        "gradients.",
    ),
    "channel_gate": (
        traffic_of_channel_gate,
        "Floor: reading x and the gates and writing the gated copies; backwards, reading their gradient, x and the "
        "gates and writing the gradients of both, with x frozen those of the gates alone, without reading them.",
    ),
    "consensus_pool": (
        traffic_of_consensus_pool,
        "Floor: reading x and the map and writing the result; backwards, reading its gradient, x and the map and "
        "writing the gradients of both. With x frozen the map need not be read, and without a map x need not.",
    ),
}


def bandwidth(op: str, csrc: Path) -> list[str]:
    rows = []
    for dtype, said in (("f64", "f64"), ("f32", "f32"), ("f16", "f16, bf16")):
        element, form = ELEMENT[dtype], "any" if dtype == "f64" else "7x7" if op == "consensus_map" else "packs"
        for stage, moved, floor in TRAFFIC[op][0](PAPER[op], plan(op, form, dtype, csrc), element, max(4, element)):
            times = [f"{moved / speed / 1e6:.3f}" for speed in BANDWIDTH.values()]
            least = "" if floor is None else f"{floor / 1e6:.1f}"
            rows.append([f"{said} {stage}", f"{moved / 1e6:.1f}", least, *times])
    heads = [f"{card}, {speed} GB/s" for card, speed in BANDWIDTH.items()]
    return table([f"`{op}`", "moved, MB", "floor, MB", *heads], rows)


def report(kernels: Sequence[Kernel], used: Mapping[str, Mapping[str, Usage]], csrc: Path = ROOT / "csrc") -> str:
    shapes = "; ".join(f"`{op}`: {shape.said}" for op, shape in PAPER.items())
    lines = f"""# Resources of the CUDA kernels

Written by `make cuda-report`; do not edit. Registers and memory are the compiler's own figures (NVRTC
{VERSION[0]}.{VERSION[1]}, `ptxas -v`), the rest is arithmetic. **No card was asked: nothing here is a measurement.**

## Registers, shared memory, occupancy

Under each architecture: registers a thread · the share of a multiprocessor's warps that the kernel's blocks can fill.
Shared memory is in bytes a block, static + dynamic, the latter as the host's plan asks for it at 7x7 (`any`: 14x14)
with {shapes}.

Spilled bytes and local memory stand beside a figure where there are any. `make cuda-report` and the tests fail on a
spill for any architecture, on local memory for sm_70, and on an occupancy below {share(ENOUGH)} on sm_70 without a
reason.
""".splitlines()
    lines += ["", *resources(kernels, used), "", f"Below {share(ENOUGH)} on sm_70, and why:", ""]
    lines += [f"- `{group}`: {reason}" for group, reason in REASONS.items()] or ["- none"]
    lines += f"""
## What the bandwidth allows

At the paper's step: N = {FRAMES} frames ((128 + 207) clips of 5). Moved is what the kernels read and write, with their
workspace and with what the forward leaves for the backward, as if nothing came from a cache. The floor is what has to
be read and written whatever the kernels do. Then the milliseconds that the moved bytes take at the bandwidth of the
data sheet: **a calculation of a limit, which no kernel reaches**.
""".splitlines()
    for op, (_, floor) in TRAFFIC.items():
        lines += ["", *textwrap.wrap(f"`{op}`, {PAPER[op]}. {floor}", 120), "", *bandwidth(op, csrc)]
    return "\n".join(lines) + "\n"


def main() -> None:
    try:
        kernels, used = measure()
        text = report(kernels, used)
    except (Broken, nvrtc.Missing, nvrtc.Failed) as error:
        sys.exit(f"m3em_fast: {error}")
    DOCUMENT.write_text(text)
    print(f"{DOCUMENT.relative_to(ROOT)}: {len(kernels)} kernels, {len(PROCESSORS)} architectures")
    if found := problems(kernels, used):
        sys.exit("\n".join(f"m3em_fast: {line}" for line in found))


if __name__ == "__main__":
    main()
