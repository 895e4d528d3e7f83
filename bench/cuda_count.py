"""One block of a CUDA kernel, run from its PTX: which ones, with what, and what the counts allow on a card."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bench.cuda_host import Failed, Host, Launch
from bench.cuda_plan import PAPER
from bench.cuda_report import PROCESSORS, Usage, occupancy, usages
from bench.ptx import code as ptx
from bench.ptx.cost import KINDS, cost, kind
from bench.ptx.machine import Machine
from bench.ptx.memory import Region
from bench.ptx.schedule import scheduled
from bench.ptx.tally import Access, Tally
from m3em_fast import nvrtc

__all__ = [
    "CARDS",
    "DTYPES",
    "ISSUED",
    "OTHER_DTYPES",
    "OTHER_WAYS",
    "SHAPES",
    "WAYS",
    "Card",
    "Case",
    "Compiled",
    "Limits",
    "Work",
    "limits",
    "measure_each",
]

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
SHAPES = {"7x7": (7, 7), "14x14": (14, 14)}
SAMPLES = 3  # blocks are alike
# The stages that move the maps, and what is asked of them where there is more than one way.
WAYS = (
    ("channel_gate", "forward", ""),
    ("channel_gate", "backward", ""),
    ("channel_gate", "backward", "x frozen"),
    ("consensus_map", "partial", ""),
    ("consensus_map", "backward", ""),
    ("consensus_pool", "forward", ""),
    ("consensus_pool", "forward", "no map"),
    ("consensus_pool", "backward", ""),
    ("consensus_pool", "backward", "x frozen"),
    ("consensus_pool", "backward", "no map"),
)
# The same of maps in channels_last memory; gated copies as the columns of one matrix, as gated_projection wants them;
# and the Pearson coefficient: other kernels, or other ways through them, which fewer calls need.
OTHER_WAYS = (
    *((op, stage, f"{said}, channels_last".removeprefix(", ")) for op, stage, said in WAYS),
    ("channel_gate", "forward", "columns"),
    ("channel_gate", "backward", "columns"),
    ("channel_gate", "backward", "x frozen, columns"),
    ("consensus_map", "partial", "center"),
    ("consensus_map", "backward", "center"),
)
OTHER_DTYPES = ("f32", "f16")


@dataclass(frozen=True)
class Case:
    op: str
    stage: str
    said: str
    dtype: str
    shape: str

    @property
    def name(self) -> str:
        return f"{self.op}_{self.stage}{', ' + self.said if self.said else ''}"

    def __str__(self) -> str:
        return f"{self.name} {self.dtype} {self.shape}"


@dataclass(frozen=True)
class Card:
    arch: str
    ptx: str  # whose instructions it runs
    processors: int
    clock: float  # GHz
    bandwidth: float  # GB/s
    latency: float  # ns of a load under way to memory; an assumption, the rest is from data sheets


CARDS = {
    "V100": Card("sm_70", "compute_70", 80, 1.53, 900, 450),
    "A100": Card("sm_80", "compute_80", 108, 1.41, 2039, 550),
    "H100": Card("sm_90", "compute_80", 132, 1.755, 3350, 650),
    "H200": Card("sm_90", "compute_80", 132, 1.755, 4800, 650),
}
ISSUED = 4  # instructions of warps that a multiprocessor starts in a clock


class Compiled:
    """The kernels of a tree `csrc`, as PTX and as what the compiler says about them.

    Raises nvrtc.Missing and nvrtc.Failed.
    """

    def __init__(self, csrc: Path) -> None:
        self._csrc, self._nvrtc = csrc, nvrtc.find()
        self._headers = {f"cuda/{path.name}": path.read_text() for path in (csrc / "cuda").glob("*.cuh")}
        self._modules: dict[tuple[str, str], ptx.Module] = {}

    def _made(self, op: str, arch: str) -> nvrtc.Compiled:
        name = f"csrc/cuda/{op}.cu"
        source = (self._csrc / f"cuda/{op}.cu").read_text()
        return nvrtc.cached(self._nvrtc, source, name, arch, self._headers)

    def module(self, op: str, arch: str = "compute_70") -> ptx.Module:
        if (op, arch) not in self._modules:
            self._modules[op, arch] = ptx.parse(self._made(op, arch).image.decode())
        return self._modules[op, arch]

    def usage(self, op: str, kernel: str, arch: str) -> Usage:
        return usages(self._made(op, arch).log)[kernel]


def region(name: str, t: Tensor, maps: bool = False) -> Region:
    """The memory of a tensor, for kernels; it has to live as long."""
    storage = t.untyped_storage()
    memory = (ctypes.c_uint8 * storage.nbytes()).from_address(storage.data_ptr())
    return Region(name, storage.data_ptr(), np.ctypeslib.as_array(memory), maps)


def aligned(*shape: int, dtype: torch.dtype) -> Tensor:
    """Random numbers that begin on 256 bytes, as memory of a card does."""
    count, size = int(np.prod(shape)), dtype.itemsize
    room = torch.empty(count + 256 // size, dtype=dtype)
    skip = -room.data_ptr() % 256 // size
    return room[skip : skip + count].copy_(torch.randn(count, generator=torch.Generator().manual_seed(1))).view(shape)


Seen = Callable[[Launch, list[Region]], None]


def launch(host: Host, case: Case, run: Seen) -> None:
    """Calls an op at the paper's size; `run` gets each launch, and the memory that it may touch."""
    dtype, (h, w) = DTYPES[case.dtype], SHAPES[case.shape]
    n, c, more = SAMPLES, PAPER[case.op].c, PAPER[case.op].more
    options = case.said.split(", ")
    regions: list[Region] = []

    def memory(name: str, *sizes: int, of: torch.dtype = dtype) -> Tensor:
        maps = len(sizes) == 4 and sizes[1] > 1
        if maps and "channels_last" in options:
            t = aligned(n, h, w, sizes[1], dtype=of).permute(0, 3, 1, 2)
        elif name == "out" and "columns" in options:
            count = n * h * w
            matrix = aligned(sizes[1], -(-count // 8) * 8, dtype=of)
            t = matrix[:, :count].unflatten(1, (n, h, w)).transpose(0, 1)
        else:
            t = aligned(*sizes, dtype=of)
        regions.append(region(name, t, maps))
        return t

    def seen(each: Launch) -> None:
        run(each, regions)

    backward, frozen, center = case.stage == "backward", "x frozen" in options, "center" in options
    if case.op == "channel_gate":
        x, out = memory("x", n, c, h, w), memory("out", n, more * c, h, w)
        gates = [memory(f"gate {g}", n, c) for g in range(more)]
        if not backward:
            return host.channel_gate_forward(seen, x, gates, out)
        grads = [memory(f"gradient of gate {g}", n, c) for g in range(more)]
        return host.channel_gate_backward(seen, x, gates, out, None if frozen else memory("grad_x", n, c, h, w), grads)
    if case.op == "consensus_map":
        a, b, out = memory("a", n, c, h, w), memory("b", n, c, h, w), memory("out", n, 1, h, w)
        needs = host.consensus_map_needs(a, more, center)
        work, stats = (memory("sums", n * number, of=torch.float32) for number in needs)
        if not backward:
            return host.consensus_map_forward(seen, a, b, out, stats, work, more, center)
        grads = [memory(f"grad_{name}", n, c, h, w) for name in "ab"]
        return host.consensus_map_backward(seen, a, b, out, grads[0], grads[1], stats, more, center)
    x, out = memory("x", n, c, h, w), memory("out", n, c)
    cmap = None if "no map" in options else memory("cmap", n, 1, h, w)
    if not backward:
        return host.consensus_pool_forward(seen, x, cmap, out)
    work = memory("sums", n * host.consensus_pool_workspace(x), of=torch.float32)
    grad_x = None if frozen else memory("grad_x", n, c, h, w)
    grad_cmap = None if cmap is None else memory("grad_cmap", n, 1, h, w)
    return host.consensus_pool_backward(seen, x, cmap, out, grad_x, grad_cmap, work)


@dataclass
class Work:
    """What one block did."""

    case: Case
    kernel: str
    threads: int
    shared: int  # bytes that the launch asks for
    tally: Tally
    read: int  # bytes of global memory, each once
    written: int
    numbers: int  # of the maps, each once where it is read and once where it is written

    def __post_init__(self) -> None:
        code = self.tally.kernel.instructions
        executed = list(zip(code, self.tally.executed, strict=True))
        self.instructions = dict.fromkeys(KINDS, 0.0)  # of the card, by kind
        for i, count in executed:
            self.instructions[kind(i)] += cost(i) * count
        # A shuffle takes the way of shared memory, without a conflict.
        shuffles = sum(count for i, count in executed if i.op == "shfl")
        near, far = list(self.tally.near.values()), list(self.tally.far.values())
        self.wavefronts = _sum(near, "wavefronts") + shuffles
        self.ideal = _sum(near, "ideal") + shuffles
        self.requests, self.sectors = _sum(far, "requests"), _sum(far, "sectors")
        loads = [access for at, access in self.tally.far.items() if code[at].op != "st"]
        self.loaded = 32 * _sum(loads, "sectors")  # bytes that came

    @property
    def moved(self) -> int:
        return self.read + self.written

    @property
    def least(self) -> int:
        """Sectors that its bytes fill."""
        return -(-self.moved // 32)

    def each(self, count: float) -> float:
        """Of a warp's instructions, those of a lane for every number of the maps."""
        return count * 32 / self.numbers


def _sum(accesses: list[Access], name: str) -> int:
    return sum(getattr(access, name) for access in accesses)


def measure(compiled: Compiled, host: Host, case: Case, arch: str = "compute_70") -> Work:
    """Runs a block in the middle of the grid, from the PTX for an architecture."""
    found: list[Work] = []

    def run(each: Launch, regions: list[Region]) -> None:
        if not each.kernel.startswith(f"{case.op}_{case.stage}_"):
            return
        module = compiled.module(case.op, arch)
        kernel = scheduled(module.kernels[each.kernel])
        given = ctypes.string_at(each.arguments, kernel.parameter_bytes)
        machine = Machine(module, kernel, regions, each.threads, each.shared, given)
        machine.run(each.blocks // 2, each.blocks)
        read, written = (2 * sum(int(getattr(r, way).sum()) for r in regions) for way in ("read", "written"))
        maps = sum(2 * int(r.read.sum() + r.written.sum()) for r in regions if r.maps)
        numbers = maps // DTYPES[case.dtype].itemsize
        found.append(
            Work(case, each.kernel, each.threads, module.static + each.shared, machine.tally, read, written, numbers)
        )

    launch(host, case, run)
    if not found:
        raise Failed(f"The host launches no kernel {case.op}_{case.stage}; WAYS in bench/cuda_count.py has it.")
    return found[0]


def measure_each(compiled: Compiled, host: Host, case: Case, archs: Sequence[str]) -> dict[str, Work]:
    """By architecture; where its PTX is that of another one, it does the same."""
    found: dict[str, Work] = {}
    for arch in archs:
        for other, work in found.items():
            kernels = (compiled.module(case.op, each).kernels[work.kernel] for each in (arch, other))
            if len({str(kernel.instructions) for kernel in kernels}) == 1:
                found[arch] = work
                break
        else:
            found[arch] = measure(compiled, host, case, arch)
    return found


@dataclass(frozen=True)
class Limits:
    """What a card's bandwidth would be used to if one thing alone held a kernel back, as a share; above 1 it does not.

    issue: the instructions of its warps; shared: their wavefronts of shared memory; latency: the blocks that fit on a
    multiprocessor wait for memory as often as they do, and between two waits each loads and stores what it has to.
    """

    blocks: int  # on a multiprocessor
    issue: float
    shared: float
    latency: float

    @property
    def binding(self) -> str:
        return min(("issue", "shared", "latency"), key=lambda name: getattr(self, name))


def limits(work: Work, card: Card, usage: Usage) -> Limits:
    processor = PROCESSORS[card.arch]
    full = occupancy(processor, work.threads, usage, work.shared - usage.shared)
    blocks = round(full * processor.threads / (-(-work.threads // 32) * 32))
    time = work.moved / (card.bandwidth / card.processors)  # ns that a block's bytes take, as bandwidth is shared out
    issue = sum(work.instructions.values()) / ISSUED / card.clock
    return Limits(
        blocks,
        time / issue,
        time * card.clock / work.wavefronts if work.wavefronts else float("inf"),
        time * blocks / (work.tally.rounds * card.latency) if work.tally.rounds else float("inf"),
    )
