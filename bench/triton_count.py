"""What a program of a Triton kernel does for its data, for any sizes of its block, and which sizes a card's bandwidth
would favour. No card is asked: `python -m bench tune --calculated` writes what comes out.

A launch is caught, compiled ahead of time (as bench/triton_report.py does) and one program of its grid, or those that
share channels, is run from the PTX on the CPU (bench/ptx/machine.py). What it wrote is compared with float64 before its
counts count.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from bench.cuda_count import CARDS, Card, Case, Limits, Work, limits, region
from bench.cuda_report import Usage
from bench.ptx import code as ptx
from bench.ptx.machine import Machine
from bench.ptx.memory import Fault, Region
from bench.ptx.schedule import scheduled
from bench.triton_problem import SAMPLES, Problem
from bench.triton_report import SHARED, Broken, compile_for, kernels, used
from bench.tune import Sizes, candidates, trial, words_of
from m3em_fast.triton import BEFORE, EVERY_DTYPE

__all__ = [
    "OF",
    "Broken",
    "Choice",
    "Counter",
    "Kernels",
    "Problem",
    "Program",
    "Tried",
    "Unfit",
    "Wrong",
    "chosen",
    "score",
]

# The card that stands for a compute capability.
OF = {70: CARDS["V100"], 80: CARDS["A100"], 90: CARDS["H100"]}
# Above this share of the bandwidth nothing counts as a limit: what overlaps never does without a gap.
ENOUGH = 2.0
GAIN = 0.1  # by which share of theirs sizes must pass the computed ones
KERNELS = {"forward": ("_forward", "_partial"), "backward": ("_backward",)}


class Unfit(Exception):
    """These sizes are none for a card, or nothing can be said about them. The message is one sentence."""


class Wrong(Unfit):
    """The program computes something else."""


class Given(NamedTuple):
    """An argument as a launcher hands it over."""

    name: str
    type: str
    value: Any


class Grid(NamedTuple):
    programs: int
    chunks: int  # of the channels of a sample; each has as many programs
    threads: int
    shared: int


@dataclass(frozen=True)
class Program:
    """What a program of a kernel does, or those of a chunk of channels, and how many there are for three samples."""

    work: Work
    programs: int
    registers: int
    again: int  # bytes of its sums, which a second kernel reads


@dataclass(frozen=True)
class Tried:
    """Sizes, and what they allow."""

    sizes: Mapping[str, int]
    score: float
    instructions: float  # of a lane, for every number of the maps
    limits: Limits


def score(program: Program, card: Card, samples: int, usage: Usage) -> tuple[float, Limits]:
    """The share of the card's bandwidth that the kernel can turn into numbers of the maps, up to ENOUGH.

    The least of what instructions, shared memory and latency allow (bench/cuda_count.py), with as many programs as
    there are, whole ones a multiprocessor; bytes that are no map's take their share of all of it.
    """
    work = program.work
    each = limits(work, card, usage)
    count = -(-program.programs * samples // SAMPLES)
    # Whole programs: the busiest multiprocessor has as many, and takes them in as many turns.
    most = -(-count // card.processors)
    even = count / card.processors / most
    turns = -(-most // each.blocks)
    latency = each.latency / each.blocks * (count / card.processors) / turns
    useful = work.numbers * getattr(torch, work.case.dtype).itemsize / work.moved
    traffic = work.moved / (work.moved + program.again)
    return useful * min(each.issue * even, each.shared * even, latency, ENOUGH * traffic), each


def _named(kernel: Any, signature: Mapping[str, Any], arguments: Sequence[Any]) -> Iterator[Given]:
    """What a launcher hands over: names, types, and values, without what has become a constant of the kernel."""

    def flat(name: str, type: Any, value: Any) -> Iterator[Given]:
        if isinstance(type, tuple):
            for i, (one, own) in enumerate(zip(type, value, strict=True)):
                yield from flat(f"{name}.{i}", one, own)
        elif type != "constexpr":
            yield Given(name, type, value)

    for name, value in zip(kernel.arg_names, arguments, strict=False):
        yield from flat(name, signature[name], value)


def _packed(kernel: ptx.Kernel, given: Sequence[Given]) -> bytes:
    """The memory of the parameters. Triton adds addresses of scratch memory at the end, of which there is none."""
    data = bytearray(kernel.parameter_bytes)
    places = list(kernel.parameters.values())
    if not len(given) <= len(places) <= len(given) + 2:
        raise Broken(f"{kernel.name} has {len(places)} parameters, and {len(given)} arguments are known for it.")
    for (at, size), (name, type, value) in zip(places, given, strict=False):
        whole = value.data_ptr() if isinstance(value, Tensor) else value
        if size != (8 if type[0] == "*" else int(type[1:]) // 8) or not isinstance(whole, int):
            raise Broken(f"{kernel.name} has a parameter {name} of {size} bytes, and {type} was expected.")
        data[at : at + size] = whole.to_bytes(size, "little", signed=type[0] == "i")
    return bytes(data)


def _checked(name: str, t: Tensor, wanted: Tensor, held: Region, programs: int) -> None:
    """What a program wrote to a tensor against float64. Raises Wrong."""
    step = t.element_size() // 2
    written = torch.from_numpy(held.written[: t.numel() * step : step].copy())
    count = int(written.sum())
    if 2 * count * programs < t.numel():
        raise Wrong(f"{name}: only {count} numbers were written.")
    found, exact = t.detach().flatten()[written].double(), wanted.detach().flatten()[written]
    bound = torch.finfo(t.dtype).eps * exact.abs() + 1e-5 * wanted.abs().max()
    if not bool(((found - exact).abs() <= bound).all()):
        raise Wrong(f"{name}: off by {float((found - exact).abs().max()):.2g}.")


def _run(problem: Problem, module: ptx.Module, given: Sequence[Given], grid: Grid) -> tuple[Work, int]:
    """One program of the second sample, or all that share a chunk of its channels, which differ; and the bytes of
    sums that they leave for a second kernel."""
    code = scheduled(next(iter(module.kernels.values())))
    tensors = {name: value for name, _, value in given if isinstance(value, Tensor)}
    regions = {name: region(name, t, problem.large(t)) for name, t in tensors.items()}
    machine = Machine(module, code, list(regions.values()), grid.threads, grid.shared, _packed(code, given))
    each = grid.programs // SAMPLES
    first = each + (grid.chunks - 1) // 2 * (each // grid.chunks)
    for program in range(first, first + each // grid.chunks):
        machine.run(program, grid.programs)
    for name, wanted in problem.wanted(tensors.get("partial", torch.empty(0))).items():
        _checked(name, tensors[name], wanted, regions[name], grid.programs)
    read, written = (2 * sum(int(getattr(r, way).sum()) for r in regions.values()) for way in ("read", "written"))
    maps = 2 * sum(int(r.read.sum() + r.written.sum()) for r in regions.values() if r.maps)
    again = 2 * int(regions["partial"].written.sum()) if "partial" in regions else 0
    case = Case(problem.op, problem.mode, "", str(problem.dtype).removeprefix("torch."), "")
    numbers = maps // problem.dtype.itemsize
    return Work(case, code.name, grid.threads, grid.shared, machine.tally, read, written, numbers), again


class Kernels:
    """The modules of the Triton kernels, for one capability after another. For a process of its own."""

    def __init__(self) -> None:
        self._modules = kernels()
        # By problem and PTX what came out.
        self._works: WeakKeyDictionary[Problem, dict[str, tuple[Work, int]]] = WeakKeyDictionary()

    def program(self, problem: Problem, capability: int, sizes: Sizes | None) -> Program:
        """Compiles a kernel for these sizes (None: those that are computed) and runs one program of it.

        Raises Unfit, Broken, ptx.Unknown or Fault.
        """
        compile_for(capability, self._modules)
        found = list[Program]()

        def launch(kernel: Any, programs: int, writes: Any, *arguments: Any, **constants: Any) -> None:
            if kernel.__name__ in KERNELS[problem.mode]:
                found.append(self._one(problem, capability, kernel, programs, arguments, constants))
                return
            for name, value in zip(kernel.arg_names, arguments, strict=False):
                if name in problem.filled:
                    value.copy_(problem.filled[name].view_as(value))

        module: Any = self._modules[problem.op]
        before, module.launch = module.launch, launch
        try:
            with trial(capability, {problem.row: sizes}):
                problem.call(module)
        finally:
            module.launch = before
        return found[0]

    def spills(self, problem: Problem, capability: int, sizes: Sizes) -> bool:
        """Whether a kernel for these sizes has local memory in one of the other calls that share the row."""
        compile_for(capability, self._modules)
        found = list[int]()

        def launch(kernel: Any, programs: int, writes: Any, *arguments: Any, **constants: Any) -> None:
            found.append(used(kernel.warmup(*arguments, grid=(programs,), **constants).asm["cubin"])[1])

        module: Any = self._modules[problem.op]
        before, module.launch = module.launch, launch
        try:
            with trial(capability, {problem.row: sizes}):
                for call in problem.others:
                    call(module)
        finally:
            module.launch = before
        return any(found)

    def _one(
        self, problem: Problem, capability: int, kernel: Any, programs: int, arguments: Sequence[Any], constants: Any
    ) -> Program:
        try:
            built = kernel.warmup(*arguments, grid=(programs,), **constants)
        except Exception as error:  # whatever a compiler raises
            raise Unfit(f"It cannot be compiled ({type(error).__name__}).") from error
        registers, local = used(built.asm["cubin"])
        text, shared = built.asm["ptx"], built.metadata.shared
        if local:
            raise Unfit(f"{local} bytes of local memory")
        if capability == 70 and shared > SHARED:
            raise Unfit(f"{shared} bytes of shared memory")
        # For several cards it is often the same.
        key = re.sub(r"\.(version|target) .*", "", text) + f"{programs} {shared}"
        works = self._works.setdefault(problem, {})
        work = works.get(key)
        if work is None:
            named = dict(zip(kernel.arg_names, arguments, strict=False))
            grid = Grid(programs, named.get("chunks", programs // SAMPLES), 32 * built.metadata.num_warps, shared)
            given = list(_named(kernel, built.src.signature, arguments))
            work = works[key] = _run(problem, ptx.parse(text), given, grid)
        return Program(work[0], programs, registers, work[1])


@dataclass(frozen=True)
class Choice:
    """What came out for a row of the table and a card."""

    sizes: Mapping[str, int] | None  # None: the computed ones
    said: str  # in a line


class Counter:
    """Counts all candidates for one row after another.

    Args:
        samples: N, for which the programs are spread over the multiprocessors.

    Raises:
        Broken: nothing can be compiled here.
    """

    def __init__(self, samples: int) -> None:
        self.samples, self._kernels = samples, Kernels()

    def tried(self, problem: Problem, capability: int, sizes: Sizes | None) -> Tried:
        """Raises Unfit where the sizes are none for the card; what :meth:`Kernels.program` raises."""
        program = self._kernels.program(problem, capability, sizes)
        usage = Usage(program.registers, program.work.shared, 0, 0)
        reached, each = score(program, OF[capability], self.samples, usage)
        count = program.work.each(sum(program.work.instructions.values()))
        return Tried(sizes or problem.default(capability), reached, count, each)

    def choose(self, problem: Problem, capability: int) -> Choice:
        if capability < EVERY_DTYPE and problem.dtype not in BEFORE:
            return Choice(None, "not served there")
        found, strange = list[Tried](), list[str]()
        computed: Tried | None = None
        for sizes in (None, *candidates(problem.dtype, problem.channels, problem.positions)):
            try:
                one = self.tried(problem, capability, sizes)
            except (Unfit, Fault, ptx.Unknown) as reason:
                if sizes is None:
                    return Choice(None, f"left out ({reason})")
                if isinstance(reason, (Wrong, Fault, ptx.Unknown)):  # nothing that one would expect
                    strange.append(str(reason))
                continue
            if sizes is None:
                computed = one
            else:
                found.append(one)
        assert computed is not None
        best = chosen(computed, found)
        while best is not None and self._kernels.spills(problem, capability, dict(best.sizes)):
            found.remove(best)
            best = chosen(computed, found)
        said = f"the computed sizes, {100 * computed.score:.0f}%"
        if best is not None:
            said = (
                f"{words_of(best.sizes)}, {100 * best.score:.0f}% for {100 * computed.score:.0f}% of the computed sizes"
            )
        if strange:
            said += f"; {len(strange)} candidates left out ({strange[0]})"
        return Choice(None if best is None else best.sizes, said)


def chosen(computed: Tried, others: Sequence[Tried]) -> Tried | None:
    """The best of others, of two that reach the same the one with fewer instructions; None where the computed sizes
    reach as much up to GAIN."""
    top = max(others, key=lambda each: (round(each.score, 3), -each.instructions), default=computed)
    return None if top.score <= (1 + GAIN) * computed.score else top
