"""Measure the ops against eager PyTorch and torch.compile, and print what came out.

    python -m bench                                   everything, at the size of a step of the paper (half an hour)
    python -m bench consensus_map --dtype float32 float16
    python -m bench --quick                           whether it all runs; the figures mean nothing
    python -m bench tune                              on a card: sizes of blocks for the Triton kernels (bench/tune.py)

All providers take turns, and ratios are taken within a turn, so that a busy machine is busy for all of them. Copies of
the inputs take turns too, so that none is found in a cache, and freed memory is kept, so that no time is that of the
system finding pages (--memory). Nothing is timed before its results and gradients have been compared with the
definition. Ratios say how many times faster. With float32 among the dtypes, backends run half cases in float32 too, for
that ratio. Whoever crashes loses its rows.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

from m3em_fast.data import _extra

if __name__ == "__main__":
    _extra.require("bench", "rich", "tyro")

import torch
import tyro
from rich.console import Console
from rich.progress import Progress

from bench import records, report
from bench.allocator import can_keep
from bench.case import TINY, Case, Size
from bench.core import Row, Settings
from bench.isolation import Child
from bench.providers import Provider, select
from m3em_fast import _cli

OPS = (
    "channel_gate",
    "consensus_map",
    "consensus_pool",
    "gated_projection",
    "gated_consensus_pool",
    "mutual_enhancement",
)
Dtype = Literal["float32", "float16", "bfloat16", "float64", "float16+float32", "bfloat16+float32"]


@dataclass(frozen=True)
class Options:
    """The defaults shown are those without --quick."""

    op: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Which ops; none named: all of them."""
    dtype: tuple[Dtype, ...] = ("float32",)
    """Of every input; float16+float32 is a float16 x beside float32 gates, weight, map or parameters."""
    sizes: tuple[str, ...] = ("7x7", "14x14", "7x8")
    """Heights and widths of the maps."""
    samples: int | None = None
    """N, clips x frames. None: 160, with --quick 4."""
    channels: int | None = None
    """C. None: 1024, with --quick 32."""
    latent: int | None = None
    """D. None: 512, with --quick 16."""
    layout: Literal["contiguous", "channels_last"] = "contiguous"
    """Memory format of the maps."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where the inputs are; cuda: the current card, timed by its own clock."""
    memory: Literal["kept", "fresh"] = "kept"
    """Of results on the CPU; kept: the process uses again what was freed; fresh: glibc gives much of it back to the
    system, as it does by itself. Eager PyTorch gains the most from kept memory."""
    backends: tuple[str, ...] = ()
    """Which backends of m3em_fast; none named: all that can run here."""
    compile: bool = True
    """torch.compile of the baseline too; its compiling takes most of the time of a run."""
    compile_limit: float = 180.0
    """Seconds after which a compilation is given up."""
    seconds: float = 8.0
    """How long to measure a case, after the warm-up; there are five rounds at least."""
    quick: bool = False
    """Small inputs and few rounds, to see that everything runs."""
    json: Path | None = None
    """Write the records there, one a row and mode; those worth keeping go to bench/results/."""


class UsageError(ValueError):
    """Something the user can put right; the message is one sentence."""


def sizes(options: Options) -> list[Size]:
    """The sizes that are to be measured, or what is wrong with what was asked for."""
    default = Size(n=4, c=32, d=16) if options.quick else Size()
    given = {"samples": ("n", default.n), "channels": ("c", default.c), "latent": ("d", default.d)}
    numbers = {}
    for name, (key, fallback) in given.items():
        value = getattr(options, name)
        numbers[key] = fallback if value is None else value
        if numbers[key] < 1:
            raise UsageError(f"--{name} must be at least 1, got {value}.")
    if not options.sizes:
        raise UsageError("--sizes must name at least one size of map, such as 7x7.")
    found = []
    for text in options.sizes:
        match = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", text)
        if match is None:
            raise UsageError(f"--sizes must be heights and widths such as 7x7 14x14, got {text!r}.")
        size = Size(**numbers, h=int(match[1]), w=int(match[2]))
        if max(size.h, size.w) < 4:
            raise UsageError(f"--sizes must be at least 4 long or wide, which three scales need, got {text!r}.")
        found.append(size)
    return found


def resolve(options: Options) -> tuple[list[Size], list[Provider]]:
    """Refuse what cannot work before anything is measured."""
    if unknown := [name for name in options.op if name not in OPS]:
        raise UsageError(f"there is no op {unknown[0]!r}; there are {', '.join(OPS)}.")
    if not options.dtype:
        raise UsageError("--dtype must name at least one dtype, such as float32.")
    for name in ("seconds", "compile_limit"):
        if not 0 < getattr(options, name) < float("inf"):
            flag = name.replace("_", "-")
            raise UsageError(f"--{flag} must be a positive number of seconds, got {getattr(options, name)}.")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch sees no CUDA device here; take --device cpu.")
    if options.json is not None:
        if options.json.is_dir():
            raise UsageError(f"--json must be a file, and {options.json} is a folder.")
        try:
            options.json.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"--json: the folder {options.json.parent} cannot be made ({error.strerror}).") from error
        if not os.access(options.json.parent, os.W_OK):
            raise UsageError(f"--json: nothing can be written in the folder {options.json.parent}.")
    try:
        return sizes(options), select(options.backends, options.compile, options.device)
    except ValueError as error:
        raise UsageError(str(error)) from error


def plan(options: Options, shapes: list[Size]) -> list[tuple[Case, bool, Case | None]]:
    """Every case, with whether it is the tiny one, and the float32 twin of a half case where float32 is measured."""
    found: list[tuple[Case, bool, Case | None]] = []
    for op in options.op or OPS:
        module = importlib.import_module(f"bench.{op}")
        for name in options.dtype:
            dtype, *beside = (getattr(torch, part) for part in name.split("+"))
            compared = "float32" in options.dtype and dtype in (torch.float16, torch.bfloat16)
            for size in shapes:
                twins = {case.variant: case for case in module.cases(size, torch.float32, options.layout)}
                for case in module.cases(size, dtype, options.layout, *beside):
                    found.append((case, False, twins[case.variant] if compared else None))
            found += [(case, True, None) for case in module.cases(TINY, dtype, options.layout, *beside)[:1]]
    if not found:
        raise UsageError(f"--dtype {' '.join(options.dtype)}: in {' '.join(options.op)} nothing stands beside x.")
    return found


def run(options: Options, console: Console) -> list[Row]:
    shapes, providers = resolve(options)
    settings = Settings(seconds=options.seconds, compile_seconds=options.compile_limit)
    if options.quick:
        settings = replace(
            settings, seconds=0.05, min_rounds=2, max_rounds=5, tiny_calls=5, tiny_rounds=2, copy_buffer=2**24
        )
    cases = plan(options, shapes)
    keeps = options.memory == "kept" and options.device == "cpu" and can_keep()
    where = {**records.conditions(options.device), "memory": "kept" if keeps else "fresh"}
    rows: list[Row] = []
    with (
        Child(settings.copy_buffer, options.device, keeps) as child,
        Progress(console=console, transient=True) as progress,
    ):
        console.print(report.conditions_line(where, child.copy_bandwidth()), highlight=False, soft_wrap=True)
        if options.quick:
            console.print("--quick: these figures mean nothing.")
        task = progress.add_task("", total=len(cases))
        for case, tiny, twin in cases:
            progress.update(task, description=f"{case.op} {case.dtype_name} {'tiny' if tiny else case.shape}")
            found = child.measure(case, providers, settings, tiny, twin)
            progress.console.print(report.table(found))
            rows += found
            if options.json is not None:
                # After every case: an hour of measuring is not to be lost with its last minute.
                records.write_json(options.json, rows, where)
            progress.advance(task)
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    given = sys.argv[1:] if arguments is None else arguments
    if given and given[0] == "tune":
        from bench import tune

        return tune.main(given[1:])
    options: Options = _cli.cli(Options, arguments, description=__doc__, prog="python -m bench")
    console = Console()
    if not console.is_terminal:
        # Without a terminal the width is a guess of 80, and a table that is folded cannot be read.
        console = Console(width=165)
    try:
        report.print_losses(console, run(options, console))
    except (UsageError, OSError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        kept = "" if options.json is None else f" {options.json} holds the cases that were finished."
        print(f"bench: interrupted.{kept}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
