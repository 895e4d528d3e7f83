"""Measure on a card which sizes of blocks are the fastest for the Triton kernels, and whether these then beat the
compiled ones; write both to their table.

    python -m bench tune                              every op at the size of a step of the paper (half an hour)
    python -m bench tune consensus_map --dtype float16 --sizes 7x7
    python -m bench tune --calculated                 without a card, for V100, A100 and H100 (ten minutes)
    python -m bench.tune                              the same command where there is no tyro

All candidates for an op, a dtype and a shape take turns, each is compared with the definition before it is timed, and
forward and backward choose for themselves. The computed sizes are written unless the fastest candidate is faster than
they are by more than --margin. With the sizes chosen, `triton` and `cuda` take turns, and both times are written: where
Triton is faster in the forward and in the backward by more than 2 %, the automatic choice of the backend takes it first
on such cards (m3em_fast.explain says so). Rows of other shapes and other cards stay.

--calculated asks no card. It compiles every candidate for compute capabilities 7.0, 8.0 and 9.0, runs one program of it
on the CPU, compares what it computes with the definition, counts, and calculates which share of the bandwidth in the
card's data sheet its instructions, its shared memory and its waits for memory allow (bench/triton_count.py). Candidates
that allow a tenth more than the computed sizes go to a part of the table of their own, where they serve until somebody
measures: a calculation is no measurement, and rows that were measured are left out. It takes no notice of --seconds and
--margin.

The table is a file of the package, m3em_fast/triton/table.json. To fill it for everybody: run this on a card that does
nothing else, then `make gpu`, which tests and times what the table chooses, and commit the table and those records.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Literal, get_args

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress

from bench import core, gate
from bench.case import Case, Size
from bench.core import Settings, admit, full_step, in_turn, interleaved
from bench.device import device_of
from bench.providers import Provider
from m3em_fast import _cli
from m3em_fast.triton import _plan, _table

try:
    from tyro.conf import Positional
except ImportError:  # a machine with a card need not have it
    Positional = None

Dtype = Literal["float32", "float16", "bfloat16", "float64"]
DTYPES = get_args(Dtype)
OPS = ("channel_gate", "consensus_map", "consensus_pool")
MODES = ("forward", "backward")
Sizes = dict[str, int]
RIVALS = _table.PARTS["microseconds"]
# Candidate (None: the computed sizes) -> seconds by mode; who was wrong or failed is not there.
Times = Mapping[int | None, Mapping[str, float]]


@dataclass(frozen=True)
class Options:
    op: Annotated[tuple[str, ...], Positional] = ()
    """Which ops; none named: all that have Triton kernels of their own."""
    dtype: tuple[Dtype, ...] = ("float32", "float16", "bfloat16")
    """Of the maps; what the card's Triton kernels do not serve is left out."""
    sizes: tuple[str, ...] = ("7x7", "14x14", "7x8")
    """Heights and widths of the maps."""
    samples: int = 160
    """N, clips x frames."""
    channels: int = 1024
    """C of channel_gate and consensus_pool."""
    latent: int = 512
    """D of consensus_map."""
    seconds: float = 20.0
    """How long to measure a case, after the warm-up; there are five rounds at least."""
    margin: float = 0.02
    """By which share of its time a candidate must be faster than the computed sizes to be written."""
    calculated: bool = False
    """Calculate sizes where none were measured; no card is asked."""
    out: Path = _table.PATH
    """The table: that of this checkout or installation unless named."""


class UsageError(ValueError):
    """Something the user can put right; the message is one sentence."""


def candidates(dtype: torch.dtype, channels: int, positions: int) -> list[Sizes]:
    """Sizes worth a try: tiles of 256 to 4096 numbers, which fit the shared memory of every card."""
    found = []
    widths = {min(_table.power_of_two(positions), width) for width in (32, 64, 128, 256)}
    for block_p in sorted(widths):
        for tile in (256, 512, 1024, 2048, 4096):
            block_c = tile // block_p
            if (dtype == torch.float64 and tile > 2048) or not 1 <= block_c <= _table.power_of_two(channels):
                continue
            found += [{"BLOCK_C": block_c, "BLOCK_P": block_p, "num_warps": w} for w in (2, 4, 8) if tile >= 64 * w]
    return found


@contextlib.contextmanager
def trial(capability: int, rows: Mapping[str, Sizes | None]) -> Iterator[None]:
    """While it lasts, rows of the table hold these sizes; None: no sizes, so that they are computed."""
    table, card = _table.stored(), str(capability)
    own, other = (table[part].setdefault(card, {}) for part in ("capabilities", "calculated"))
    before, behind = ({row: part.pop(row) for row in rows if row in part} for part in (own, other))
    own.update({row: sizes for row, sizes in rows.items() if sizes is not None})
    _forget()
    try:
        yield
    finally:
        for row in rows:
            own.pop(row, None)
        own.update(before)
        other.update(behind)
        _forget()


def _forget() -> None:
    _table.config.cache_clear()
    _plan.plan.cache_clear()


def measure(
    case: Case,
    tries: Mapping[int | None, Sizes | None],
    rows: Sequence[str],
    settings: Settings,
    where: str = "cuda",
) -> Times:
    """The median seconds of every candidate that computes what the definition says, on the current card."""
    capability = capability_here()
    device = device_of(where)
    problem = case.made(where)
    exact, grads = gate.exact_results(problem)
    provider, turns = Provider("triton"), in_turn(problem, device.cold)
    steps: dict[str, Callable[[], Mapping[str, float]]] = {}
    error = None
    for key, sizes in tries.items():
        with trial(capability, dict.fromkeys(rows, sizes)):
            entrant = admit(provider, problem, grads, exact, 60.0)
        if (reason := entrant.forward_error or entrant.backward_error) is not None:
            error = error or reason
            continue
        run = full_step(entrant, problem, grads, device, turns)

        def step(sizes: Sizes | None = sizes, run: Callable = run) -> Mapping[str, float]:
            with trial(capability, dict.fromkeys(rows, sizes)):
                return run()

        steps[str(key)] = step
    if not steps:
        raise Unserved(error or "no candidate")
    readings = interleaved(steps, settings)
    names = {str(key): key for key in tries}
    return {names[k]: {mode: float(np.median(t)) for mode, t in found.items()} for k, found in readings.items()}


def compare(
    case: Case,
    rows: Mapping[str, Sizes | None],
    settings: Settings,
    where: str = "cuda",
    rivals: Sequence[str] = RIVALS,
) -> dict[str, dict[str, float]]:
    """Mode of timing -> backend -> its median seconds, with these sizes in Triton. Both backends take turns."""
    with trial(capability_here(), rows):
        found = core.measure(case, [Provider(name) for name in rivals], settings, device=where)
    if (error := next((row.error for row in found if row.error is not None), None)) is not None:
        raise Unserved(error)
    return {
        mode: {row.provider.name: float(np.median(row.times)) for row in found if row.mode == mode}
        for mode in ("forward", "backward")
    }


class Unserved(Exception):
    """No candidate ran, or one of two backends did not; with the first reason."""


def capability_here() -> int:
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def best(times: Times, mode: str, margin: float) -> int | None:
    """The fastest candidate, None where the computed sizes are as fast up to the margin."""
    fastest = min(times, key=lambda key: times[key][mode])
    computed = times.get(None)
    if computed is not None and times[fastest][mode] >= (1 - margin) * computed[mode]:
        return None
    return fastest


def resolve(options: Options) -> tuple[list[str], list[tuple[int, int]]]:
    """Refuse what cannot work before anything is measured."""
    if unknown := [name for name in options.op if name not in OPS]:
        raise UsageError(f"there is no Triton kernel to tune for {unknown[0]!r}; there are {', '.join(OPS)}.")
    for name in ("samples", "channels", "latent"):
        if getattr(options, name) < 1:
            raise UsageError(f"--{name} must be at least 1, got {getattr(options, name)}.")
    for name in ("seconds", "margin"):
        if not 0 <= getattr(options, name) < float("inf"):
            raise UsageError(f"--{name} must be a number from 0 on, got {getattr(options, name)}.")
    shapes = []
    for text in options.sizes:
        match = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", text)
        if match is None or max(int(match[1]), int(match[2])) < 4:
            raise UsageError(f"--sizes must be heights and widths such as 7x7, at least 4 long or wide, got {text!r}.")
        shapes.append((int(match[1]), int(match[2])))
    if not options.calculated and not torch.cuda.is_available():
        raise UsageError("torch sees no CUDA device here, and the table is measured on one.")
    if options.out.is_dir() or not os.access(options.out.parent, os.W_OK):
        raise UsageError(f"--out: the table cannot be written to {options.out}.")
    return list(options.op or OPS), shapes


def read(path: Path) -> dict:
    """A table that is there, or an empty one."""
    if not path.exists():
        return {"about": json.loads(_table.PATH.read_text())["about"]} | {part: {} for part in _table.PARTS}
    try:
        return _table.checked(json.loads(path.read_text()))
    except ValueError as error:
        raise UsageError(f"--out: {path} is there already and is no table of block sizes ({error}).") from None


def write(path: Path, found: dict) -> None:
    """All of it or nothing."""
    new = path.with_name(path.name + ".new")
    new.write_text(json.dumps(found, indent=2, sort_keys=True) + "\n")
    os.replace(new, path)


def run(options: Options, console: Console) -> None:
    ops, shapes = resolve(options)
    found = read(options.out)
    capability = capability_here()
    own, timed = (found[part].setdefault(str(capability), {}) for part in ("capabilities", "microseconds"))
    cases = [(op, name, shape) for op in ops for name in options.dtype for shape in shapes]
    console.print(f"{torch.cuda.get_device_name()}, compute capability {capability // 10}.{capability % 10}")
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("", total=len(cases))
        for op, name, (height, width) in cases:
            progress.update(task, description=f"{op} {name} {height}x{width}")
            dtype = getattr(torch, name)
            size = Size(options.samples, options.channels, options.latent, height, width)
            channels = size.d if op == "consensus_map" else size.c
            case = importlib.import_module(f"bench.{op}").cases(size, dtype, "contiguous")[0]
            names = {"forward": op, "backward": _table.backward_of(op)}
            rows = {mode: _table.row_of(name, dtype, channels, height * width) for mode, name in names.items()}
            tries: dict[int | None, Sizes | None] = {None: None}
            tries |= enumerate(candidates(dtype, channels, height * width))
            try:
                times = measure(case, tries, list(rows.values()), Settings(seconds=options.seconds))
            except Unserved as reason:
                progress.console.print(f"{op} {name} {height}x{width}: left out ({reason})")
                progress.advance(task)
                continue
            for mode, row in rows.items():
                chosen = best(times, mode, options.margin)
                own[row] = tries[chosen] or _table.default(names[mode], dtype, channels, height * width, capability)
                said = "the computed sizes" if chosen is None else words_of(own[row])
                took = times[chosen][mode] if chosen in times else float("nan")
                progress.console.print(f"{row}: {1e6 * took:.1f} us with {said}")
                timed.pop(row, None)
            try:
                both = compare(case, {row: own.get(row) for row in rows.values()}, Settings(options.seconds / 4))
            except Unserved as reason:
                progress.console.print(f"{op} {name} {height}x{width}: not compared with cuda ({reason})")
            else:
                for mode, row in rows.items():
                    timed[row] = {rival: round(1e6 * both[mode][rival], 3) for rival in RIVALS}
                    said = ", ".join(f"{rival} {time:.1f} us" for rival, time in timed[row].items())
                    progress.console.print(f"{row}: {said}")
            write(options.out, found)  # after every case: an hour of measuring is not to be lost with its last minute
            progress.advance(task)
    console.print(f"Written to {options.out}.")


def words_of(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{key} {value}" for key, value in sizes.items())


def calculate(options: Options, console: Console) -> None:
    """Fill the calculated part of the table. Compiles: in a process that has not interpreted kernels."""
    from bench import triton_count  # which needs Triton, and this module

    ops, shapes = resolve(options)
    found = read(options.out)
    cases = [(op, mode, name, shape) for op in ops for name in options.dtype for shape in shapes for mode in MODES]
    try:
        count, rows = triton_count.Counter(options.samples), set[str]()
        with Progress(console=console, transient=True) as progress:
            task = progress.add_task("", total=len(cases))
            for op, mode, name, (height, width) in cases:
                progress.update(task, description=f"{op} {mode} {name} {height}x{width}")
                size = Size(options.samples, options.channels, options.latent, height, width)
                problem = triton_count.Problem(op, mode, getattr(torch, name), size)
                # Of several shapes in a row the first one chooses.
                for capability in triton_count.OF if problem.row not in rows else ():
                    card = str(capability)
                    if any(problem.row in found[part].get(card, {}) for part in ("capabilities", "microseconds")):
                        continue
                    found["calculated"].setdefault(card, {}).pop(problem.row, None)
                    choice = count.choose(problem, capability)
                    progress.console.print(f"{card} {problem.row}: {choice.said}", highlight=False)
                    if choice.sizes is not None:
                        found["calculated"][card][problem.row] = dict(choice.sizes)
                rows.add(problem.row)
                write(options.out, found)
                progress.advance(task)
    except triton_count.Broken as error:
        raise UsageError(f"--calculated: {error}") from None
    console.print(f"Written to {options.out}.")


def plain(arguments: Sequence[str] | None = None) -> Options:
    """The options, read without tyro."""
    parser = _cli.Parser("python -m bench tune", description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("op", nargs="*", default=())
    for field in fields(Options)[1:]:
        form: dict = {"type": type(field.default)}
        if isinstance(field.default, tuple):
            form = {"nargs": "+", "choices": DTYPES if field.name == "dtype" else None}
        elif field.default is False:
            form = {"action": "store_true"}
        parser.add_argument(f"--{field.name}", default=field.default, **form)
    given = vars(parser.parse_args(arguments))
    return Options(**{name: tuple(value) if isinstance(value, list) else value for name, value in given.items()})


def main(arguments: Sequence[str] | None = None) -> int:
    if Positional is None:
        options = plain(arguments)
    else:
        options = _cli.cli(Options, arguments, description=__doc__, prog="python -m bench tune")
    console = Console()
    try:
        (calculate if options.calculated else run)(options, console)
    except (UsageError, OSError) as error:
        print(f"bench tune: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"bench tune: interrupted. {options.out} holds the cases that were finished.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
