"""What a block of a CUDA kernel does for its data: instructions, bank conflicts, sectors, waits. No card is asked.

    python -m bench.cuda_work                                   a table of all kernels
    python -m bench.cuda_work --kernel consensus_map_partial --dtype f16 --shape 7x7 --lines
    python -m bench.cuda_work --source other/csrc --card A100
    python -m bench.cuda_work --write                           docs/cuda-work.md, or: make cuda-work

Runs the PTX of one block on the CPU (bench/ptx/machine.py) with the arguments that the host's half launches it with,
counts, and calculates which share of a card's bandwidth the counts allow.
"""

from __future__ import annotations

import fnmatch
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from m3em_fast.data import _extra

if __name__ == "__main__":
    _extra.require("bench.cuda_work", "tqdm")

from tqdm import tqdm

from bench import cuda_report
from bench.cuda_count import (
    CARDS,
    DTYPES,
    ISSUED,
    OTHER_DTYPES,
    OTHER_WAYS,
    SHAPES,
    WAYS,
    Card,
    Case,
    Compiled,
    Limits,
    Work,
    limits,
    measure_each,
)
from bench.cuda_host import Failed, Host
from bench.cuda_plan import PAPER
from bench.cuda_report import ROOT
from bench.ptx import code as ptx
from bench.ptx.cost import KINDS, cost
from bench.ptx.memory import Fault
from m3em_fast import nvrtc
from m3em_fast._cli import Parser

DOCUMENT = ROOT / "docs/cuda-work.md"
# The first words of a column are those of the document, the others those of the terminal.
COLUMNS = (
    ("instructions", "instr"),
    ("integer", "int"),
    ("float", "float"),
    ("conversion", "conv"),
    ("shared", "shrd"),
    ("global", "glob"),
    ("control", "ctrl"),
    ("wavefronts", "wavefr"),
    ("conflicts", "x ideal"),
    ("sectors", "sectors"),
    ("bytes a request", "B/req"),
    ("waits", "waits"),
    ("bytes a wait", "B/wait"),
    ("barriers", "barriers"),
)
ARCHS = tuple(dict.fromkeys(card.ptx for card in CARDS.values()))
LIMITS = ("issue", "shared", "latency")
TEXT = """# Work of the CUDA kernels

Written by `make cuda-work`; do not edit. What a block of each kernel does for its data: counted while its PTX (NVRTC
{version}, `compute_70`) ran on a CPU, with the arguments that the host launches it with. **No card was asked: nothing
here is a measurement.** Registers and occupancy are in [cuda-resources.md](cuda-resources.md).

7x7 and 14x14 with {shapes}.
One block from the middle of the grid. The small second kernels (`finish`) are left out.

## Counts

For every number of the maps that the block reads or writes:

- instructions of a lane, and of which kind: integer (addresses, and the rounding of bfloat16), float, conversion,
  shared memory and shuffles, global memory, control. A card does not run PTX: ptxas makes about 25 instructions of a
  division and none of a copy. `bench/ptx/cost.py` has these weights; a loop that ptxas unrolls costs less.
- wavefronts: passes over the banks of shared memory, times 32. One serves 128 bytes; a shuffle is one.

And of the block:

- conflicts: its wavefronts against those that the same words would take without bank conflicts;
- sectors: the pieces of 32 bytes that its requests to global memory ask for, against those that its bytes fill;
- bytes a request: what a warp moves in one instruction, 512 at best;
- waits: how often a warp waits for global memory. A load goes on until what it loads is first used; then all loads of
  the warp have come. Between any two barriers those of the warp with the most. Loads of a stretch without a branch,
  a store or a barrier start before the rest of it, as ptxas has them.
- bytes a wait: what a warp has under way when it waits;
- barriers.

{counts}

Of maps in channels_last memory, of gated copies as the columns of one matrix (for `gated_projection`), and of the
Pearson coefficient (`center`), which the kernels for any map serve:

{others}

## What they allow

The share of a card's bandwidth that one thing alone would allow, the least of them in bold:

instructions ({issued} of warps a clock and multiprocessor) · shared memory (one wavefront a clock and multiprocessor) ·
latency (as many blocks as fit on a multiprocessor move their bytes in their waits, each as long as one latency).

Above 100% it is no limit by itself; but nothing overlaps without a gap, so a kernel needs more. Nobody waits for
stores, and nothing comes from a cache. From data sheets, but for the latencies, which are assumptions:

{cards}

Those of the V100 are of the counts above, those of the others of PTX for `compute_80`, which rounds to bfloat16 in one
instruction and may copy to shared memory without a register between.

{allowed}

Of channels_last, of columns and of the Pearson coefficient:

{others_allowed}
"""


def counts(work: Work) -> list[str]:
    """The cells of a row, but for its name and the limits."""
    each = work.instructions
    return [
        f"{work.each(sum(each.values())):.1f}",
        *(f"{work.each(each[name]):.1f}" for name in KINDS),
        f"{work.each(work.wavefronts):.2f}",
        f"{work.wavefronts / work.ideal:.2f}" if work.ideal else "",
        f"{work.sectors / work.least:.2f}",
        f"{work.moved / work.requests:.0f}",
        str(work.tally.rounds),
        f"{work.loaded / work.tally.waits:.0f}" if work.tally.waits else "",
        str(work.tally.barriers),
    ]


def reached(limit: Limits) -> list[str]:
    """The three limits."""
    shares = [getattr(limit, name) for name in LIMITS]
    return [f"{100 * part:.0f}%" if part < 10 else ">10x" for part in shares]


def lines(work: Work) -> Iterator[str]:
    """Every instruction that ran: how often in warps, its instructions for a number, its accesses, its text."""
    kernel = work.tally.kernel
    yield f"{'warps':>8} {'/number':>8} {'accesses':>22}"
    for at, (i, count) in enumerate(zip(kernel.instructions, work.tally.executed, strict=True)):
        yield from (f"{name}:" for name, place in kernel.labels.items() if place == at)
        if not count:
            continue
        said = ""
        if (far := work.tally.far.get(at)) is not None:
            said = f"{far.sectors} of {-(-far.bytes // 32)} sectors"
        if (near := work.tally.near.get(at)) is not None:
            said += f" {near.wavefronts} of {near.ideal} wavefronts"
        yield f"{count:8d} {work.each(cost(i) * count):8.3f} {said:>22}  {i.text}"


def cases(kernel: str = "", dtypes: Sequence[str] = tuple(DTYPES), shapes: Sequence[str] = tuple(SHAPES)) -> list[Case]:
    """Those whose name is `kernel`, or else those whose name has it in it, or matches it as a pattern."""
    found = [Case(*way, dtype, shape) for way in WAYS for dtype in dtypes for shape in shapes]
    fewer = [dtype for dtype in dtypes if dtype in OTHER_DTYPES]
    found += [Case(*way, dtype, shape) for way in OTHER_WAYS for dtype in fewer for shape in shapes]
    named = [case for case in found if case.name == kernel]
    return named or [case for case in found if fnmatch.fnmatchcase(case.name, f"*{kernel}*")]


Found = tuple[dict[str, Work], Compiled]  # by the architecture of the PTX


def measured(chosen: Sequence[Case], csrc: Path, archs: Sequence[str]) -> Iterator[Found]:
    compiled, host = Compiled(csrc), Host(csrc)
    for case in tqdm(chosen, unit="kernel", leave=False, delay=2):
        yield measure_each(compiled, host, case, archs), compiled


def main(arguments: Sequence[str] | None = None) -> None:
    assert __doc__ is not None
    parser = Parser(prog="python -m bench.cuda_work", description=__doc__.partition("\n")[0])
    parser.add_argument("--kernel", default="", help="a name, a part of one, or a pattern such as pool_*frozen")
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="all of them unless given")
    parser.add_argument("--shape", choices=tuple(SHAPES), help="all of them unless given")
    parser.add_argument("--card", choices=tuple(CARDS), default="V100", help="whose limits are shown (V100)")
    parser.add_argument("--source", type=Path, default=ROOT / "csrc", help="the folder csrc of a tree (this one's)")
    parser.add_argument("--lines", action="store_true", help="each instruction that ran, too")
    parser.add_argument("--write", action="store_true", help=f"write {DOCUMENT.relative_to(ROOT)}: all kernels")
    given = parser.parse_args(arguments)
    dtypes, shapes = ([one] if one else [*every] for one, every in ((given.dtype, DTYPES), (given.shape, SHAPES)))
    chosen = cases(given.kernel, dtypes, shapes)
    if not (given.source / "cuda").is_dir():
        parser.error(f"--source must be the folder csrc of a tree; {given.source} has no folder cuda")
    if not chosen:
        names = ", ".join(dict.fromkeys(case.name for case in cases()))
        parser.error(f"--kernel must match one of these: {names}; {given.kernel!r} does not")
    if given.write and (chosen != cases() or given.source != ROOT / "csrc"):
        parser.error("--write is about all kernels of this tree, and goes with no other choice")
    try:
        if given.write:
            if (found := nvrtc.find()).version != cuda_report.VERSION:
                version = ".".join(map(str, cuda_report.VERSION))
                raise Failed(f"The counts are those of NVRTC {version}, and the one found is {found.name}.")
            DOCUMENT.write_text(report([*measured(cases(), given.source, ARCHS)]))
            print(f"{DOCUMENT.relative_to(ROOT)}: {len(chosen)} kernels")
        else:
            show(chosen, given.source, given.card, given.lines)
    except (Failed, Fault, ptx.Unknown, nvrtc.Missing, nvrtc.Failed, cuda_report.Broken) as error:
        sys.exit(f"m3em_fast: {error}")
    except OSError as error:
        sys.exit(f"m3em_fast: {error.filename} cannot be read ({error.strerror}).")


def show(chosen: Sequence[Case], csrc: Path, card: str, every: bool) -> None:
    rows = [[f"the limits: {card}", *(short for _, short in COLUMNS), "blocks", *LIMITS]]
    of = CARDS[card]
    for works, compiled in measured(chosen, csrc, [of.ptx]):
        work = works[of.ptx]
        limit = limits(work, of, compiled.usage(work.case.op, work.kernel, of.arch))
        cells = [cell + "*" * (name == limit.binding) for name, cell in zip(LIMITS, reached(limit), strict=True)]
        rows.append([f"{work.case}", *counts(work), str(limit.blocks), *cells])
        if every:
            print(f"{work.kernel}, {work.threads} threads", *lines(work), sep="\n")
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        print("  ".join([row[0].ljust(widths[0]), *cells[1:]]).rstrip())


def report(found: Sequence[Found]) -> str:
    head = ["kernel", *(name for name, _ in COLUMNS)]
    rows: dict[bool, list[list[str]]] = {False: [], True: []}  # of the others
    allowed: dict[bool, list[list[str]]] = {False: [], True: []}
    for works, compiled in found:
        work = works[ARCHS[0]]
        other = (work.case.op, work.case.stage, work.case.said) in OTHER_WAYS
        rows[other].append([f"`{work.case}`", *counts(work)])
        reach = (_reach(works[card.ptx], compiled, card) for card in CARDS.values())
        allowed[other].append([f"`{work.case}`", *reach])
    names = ["kernel", *CARDS]
    said = {
        "version": ".".join(map(str, cuda_report.VERSION)),
        "shapes": "; ".join(f"`{op}`: {shape.said}" for op, shape in PAPER.items()),
        "issued": ISSUED,
        "counts": "\n".join(cuda_report.table(head, rows[False])),
        "others": "\n".join(cuda_report.table(head, rows[True])),
        "allowed": "\n".join(cuda_report.table(names, allowed[False])),
        "others_allowed": "\n".join(cuda_report.table(names, allowed[True])),
        "cards": "\n".join(
            f"- {name}: {card.processors} multiprocessors, {card.clock} GHz, {card.bandwidth:.0f} GB/s, "
            f"{card.latency:.0f} ns"
            for name, card in CARDS.items()
        ),
    }
    return TEXT.format(**said)


def _reach(work: Work, compiled: Compiled, card: Card) -> str:
    limit = limits(work, card, compiled.usage(work.case.op, work.kernel, card.arch))
    cells = zip(LIMITS, reached(limit), strict=True)
    return " · ".join(f"**{cell}**" if name == limit.binding else cell for name, cell in cells)


if __name__ == "__main__":
    main()
