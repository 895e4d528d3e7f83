"""Every op and the module on a card, one dtype, within a number of seconds: the part of ``make gpu`` that measures.

    python -m bench.gpu_measure float16 --json bench/results/gpu-card-float16.json --seconds 60

N = 1675 (five frames of the 335 clips of a step of the paper) and 160, C = 1024, D = 512, at 7x7, 14x14 and 7x8, and
microseconds a call where there is hardly anything to compute. The cases come in the order of what they tell: at 7x7
every op once for both N, with frozen features as in training, the module first. Those for which no time is left have
rows that say so. torch.compile is measured where an op comes first. Inputs come from memory: calls take turns with
copies of them, more than the caches hold. The copy bandwidth is measured on the card, before and after each case, and
the rate of a large matrix product once. float32 means float32 for everybody: cuDNN's convolutions, of which eager is
made, would else take TF32, and their results would be refused as wrong. Where a case leaves the card unusable, its
error is recorded and a new process goes on behind it. Needs torch, numpy and triton (for torch.compile) alone.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from bench import (
    channel_gate,
    consensus_map,
    consensus_pool,
    gated_consensus_pool,
    gated_projection,
    mutual_enhancement,
)
from bench.case import TINY, Case, Size
from bench.core import CopyBandwidth, Row, Settings, first_line, measure, modes_of
from bench.device import clock, product_rate
from bench.providers import Provider, backends, select
from bench.records import conditions, record, write_records
from m3em_fast import _cli

DTYPES = ("float32", "float16", "bfloat16")
MAPS, SAMPLES = ((7, 7), (14, 14), (7, 8)), (1675, 160)
SIZES = tuple(tuple(Size(n=n, h=h, w=w) for n in SAMPLES) for h, w in MAPS)
OPS = (mutual_enhancement, consensus_map, gated_projection, consensus_pool, channel_gate, gated_consensus_pool)
SETTINGS = Settings(seconds=1.0, min_rounds=10, max_rounds=100, tiny_calls=100, tiny_rounds=10)
# Of the seconds that are left: a case needs some, and more for what is drawn on the CPU and computed in float64; the
# compiler needs many, and must leave some to the other cases.
CASE_SECONDS, VALUE_SECONDS, COMPILE_SECONDS, COMPILE_SHARE = 3.0, 4e-8, 12.0, 0.35
RESTART = 12.0  # seconds in which a new process is where it can measure
LEFT_OUT = "left out: the time for the benchmark was used up"
NOT_COMPILED = "left out: torch.compile is measured in the first case of an op alone"


def ordered(sizes: Sequence[Sequence[Size]], dtype: torch.dtype) -> list[Case]:
    """All cases, those first that tell most: ``sizes`` holds, map by map, one size for each N."""

    def of(size: Size, first: bool) -> list[list[Case]]:
        found = [op.cases(size, dtype, "contiguous") for op in OPS]
        by_use = [sorted(cases, key=lambda case: "frozen" not in case.variant) for cases in found]
        return [cases[:1] if first else cases[1:] for cases in by_use]

    chosen = []
    for one_map in sizes:
        for first in (True, False):
            for same_op in zip(*(of(size, first) for size in one_map), strict=True):
                chosen += [case for cases in same_op for case in cases]
            if first and one_map is sizes[0]:
                chosen += [case for cases in of(TINY, True) for case in cases]
    return chosen


def seconds_for(case: Case) -> float:
    """What a case may take, by the values of its maps."""
    size = case.size
    maps = {"consensus_map": 2 * size.d, "mutual_enhancement": 4 * size.c}.get(case.op, 2 * size.c)
    return CASE_SECONDS + VALUE_SECONDS * size.n * size.h * size.w * maps


def measure_case(
    case: Case, providers: list[Provider], settings: Settings, copy: CopyBandwidth, left: float
) -> list[Row]:
    """The rows of a case in the seconds that are left; who is left out has a row that says so."""

    tiny = case.size == TINY

    def error_rows(of: Sequence[Provider], reason: str) -> list[Row]:
        return [
            Row(case, provider, mode, error=reason) for provider in of for mode in modes_of(case, case.size == TINY)
        ]

    if left < seconds_for(case):
        return error_rows(providers, LEFT_OUT)
    skipped = [p for p in providers if p.name == "compile" and left < seconds_for(case) + COMPILE_SECONDS]
    chosen = [p for p in providers if p not in skipped]
    limited = Settings(**{**vars(settings), "compile_seconds": min(settings.compile_seconds, COMPILE_SHARE * left)})
    try:
        rows = measure(case, chosen, limited, copy, tiny, device=copy.device.name)
    except Exception as error:  # of the card: out of memory, or worse
        rows = error_rows(chosen, first_line(error))
    return sorted(rows + error_rows(skipped, LEFT_OUT), key=lambda row: providers.index(row.provider))


def table(rows: list[Row]) -> str:
    """The rows of one case in text: a line a provider."""
    modes = modes_of(rows[0].case, rows[0].case.size == TINY)
    unit, factor = ("us", 1e6) if rows[0].case.size == TINY else ("ms", 1e3)
    titles = "".join(f"{mode + ' ' + unit:>26}" for mode in modes)
    lines = [str(rows[0].case), f"  {'':9}{titles}{'x eager':>9}{'x compile':>11}{'GB/s':>8}{'of copy':>9}"]
    for provider in dict.fromkeys(row.provider for row in rows):
        own = {row.mode: row for row in rows if row.provider == provider}
        line = f"  {provider.name:9}"
        for mode in modes:
            span = own[mode].percentiles
            line += f"{'failed' if span is None else format(span[1] * factor, '.3f'):>26}"
        last = own[modes[-1]]
        line += f"{_number(last.ratio_to_eager, '.2f'):>9}{_number(last.ratio_to_compile, '.2f'):>11}"
        line += f"{_number(last.bandwidth and last.bandwidth / 1e9, '.0f'):>8}"
        lines.append(line + f"{_number(last.share_of_copy, '.0%'):>9}")
        lines += [f"  {provider.name}: {reason}" for reason in dict.fromkeys(r.error for r in own.values()) if reason]
    return "\n".join(lines)


def _number(value: float | None, digits: str) -> str:
    return "" if value is None else format(value, digits)


class CardLost(Exception):
    """No more can be computed on the card in this process. ``after`` is the number of the case that did it."""

    def __init__(self, after: int) -> None:
        super().__init__(after)
        self.after = after


def usable(device: str) -> bool:
    """Whether the card still answers: an address out of bounds, for one, ends that for the whole process."""
    try:
        torch.ones(1, device=device).add(1).item()
    except RuntimeError:
        return False
    return True


def run(
    dtype: str,
    path: Path,
    seconds: float,
    where: dict[str, Any],
    *,
    device: str = "cuda",
    sizes: Sequence[Sequence[Size]] = SIZES,
    settings: Settings = SETTINGS,
    say: Callable[[str], object] = print,
    first: int = 0,
) -> list[Row]:
    """Measure one dtype, and write the records after every case.

    With ``first`` the cases from that one on, behind the records that are there.

    Raises:
        CardLost: the card is of no use any more; the records are written.
    """
    end = clock() + seconds
    earlier = json.loads(path.read_text()) if first else []
    copy = CopyBandwidth(settings.copy_buffer, device=device)
    where = {**conditions(device), **where}
    if device == "cuda":
        torch.backends.cudnn.allow_tf32 = False
        where["product_gflop_per_s"] = product_rate(getattr(torch, dtype), device=device) / 1e9
        rate = f"{where['product_gflop_per_s'] / 1e3:.1f} TFLOP/s a large product"
        say(f"{dtype}: copy {copy.of(copy()) / 1e9:.0f} GB/s, {rate}")
    # No reference: its own time says nothing, and it would take memory that a small card does not have.
    kernels = [name for name in backends(device) if name != "reference"]
    compiler, *others = sorted(select(kernels, True, device), key=lambda provider: provider.name != "compile")
    rows: list[Row] = []
    left_out, compiled = [], {r["op"] for r in earlier}
    for number, case in enumerate(ordered(sizes, getattr(torch, dtype))):
        if number < first:
            continue
        providers = others if case.op in compiled else [others[0], compiler, *others[1:]]
        found = measure_case(case, providers, settings, copy, end - clock())
        if case.op in compiled:
            found += [Row(case, compiler, mode, error=NOT_COMPILED) for mode in modes_of(case, case.size == TINY)]
        compiled.add(case.op)
        rows += found
        write_records(path, earlier + [record(row, where) for row in rows])
        if any(row.times for row in found):
            say(table([row for row in found if row.error != NOT_COMPILED]))
        else:
            left_out.append(f"  {case}: {found[0].error}")
        if not usable(device):
            say(f"The card is of no use any more after {case}: {found[0].error}")
            raise CardLost(number)
        if device == "cuda":
            torch.cuda.empty_cache()
    if left_out:
        say("\n".join(["Not measured:", *left_out]))
    return rows


def again(arguments: Sequence[str], after: int, seconds: float) -> None:
    """This command in a new process in the place of this one, behind a case."""
    words = [sys.executable, "-m", "bench.gpu_measure", *arguments]
    sys.stdout.flush()
    os.execv(sys.executable, [*words, "--first", str(after + 1), "--seconds", f"{seconds:.0f}"])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _cli.Parser(prog="python -m bench.gpu_measure", description=__doc__.splitlines()[0])
    parser.add_argument("dtype", choices=DTYPES)
    parser.add_argument("--json", type=Path, required=True, help="where the records go")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--conditions", type=json.loads, default={}, help="more for every record, as JSON")
    parser.add_argument(
        "--first", type=int, default=0, help="the case to go on with, behind the records that are there"
    )
    given = list(sys.argv[1:] if arguments is None else arguments)
    options, end = parser.parse_args(given), clock()
    end += options.seconds
    if not torch.cuda.is_available():
        print("bench.gpu_measure: torch sees no CUDA device here.", file=sys.stderr)
        return 2
    lost = options.first > 0
    try:
        run(options.dtype, options.json, options.seconds, options.conditions, first=options.first)
    except CardLost as error:
        lost = True
        if (left := end - clock() - RESTART) > 0:
            again(given, error.after, left)
    timed = [r for r in json.loads(options.json.read_text()) if r["backend"] == "cuda" and r["p50_ms"]]
    return 0 if timed and not lost else 1


if __name__ == "__main__":
    sys.exit(main())
