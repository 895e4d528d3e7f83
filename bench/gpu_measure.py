"""consensus_map on a card, one dtype, within a number of seconds: the part of ``make gpu`` that measures.

    python -m bench.gpu_measure float16 --json bench/results/gpu-card-float16.json --seconds 60

N = 1675 (five frames of the 335 clips of a step of the paper), D = 512, at 7x7, 14x14 and 7x8. The copy bandwidth is
measured on the card, before and after each case. Needs torch, numpy and triton (for torch.compile) alone.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from bench import consensus_map
from bench.case import Case, Size
from bench.core import MODES, CopyBandwidth, Row, Settings, first_line, measure
from bench.device import clock
from bench.providers import Provider, select
from bench.records import conditions, write_json

DTYPES = ("float32", "float16", "bfloat16")
SIZES = tuple(Size(n=1675, d=512, h=h, w=w) for h, w in ((7, 7), (14, 14), (7, 8)))
SETTINGS = Settings(seconds=2.0, min_rounds=10, max_rounds=100)
# Of the seconds that are left: a case needs some, the compiler many more, and it must leave some to the other cases.
CASE_SECONDS, COMPILE_SECONDS, COMPILE_SHARE = 4.0, 12.0, 0.6
LEFT_OUT = "left out: the time for the benchmark was used up"


def measure_case(
    case: Case, providers: list[Provider], settings: Settings, copy: CopyBandwidth, left: float
) -> list[Row]:
    """The rows of a case in the seconds that are left; who is left out has a row that says so."""

    def error_rows(of: Sequence[Provider], reason: str) -> list[Row]:
        return [Row(case, provider, mode, error=reason) for provider in of for mode in MODES]

    if left < CASE_SECONDS:
        return error_rows(providers, LEFT_OUT)
    skipped = [p for p in providers if p.name == "compile" and left < COMPILE_SECONDS]
    chosen = [p for p in providers if p not in skipped]
    limited = Settings(**{**vars(settings), "compile_seconds": min(settings.compile_seconds, COMPILE_SHARE * left)})
    try:
        rows = measure(case, chosen, limited, copy, device=copy.device.name)
    except RuntimeError as error:  # of the card: out of memory, or worse
        rows = error_rows(chosen, first_line(error))
    return sorted(rows + error_rows(skipped, LEFT_OUT), key=lambda row: providers.index(row.provider))


def table(rows: list[Row]) -> str:
    """The rows of one case in text: a line a provider."""
    titles = "".join(f"{mode + ' ms':>21}" for mode in MODES)
    lines = [str(rows[0].case), f"  {'':9}{titles}{'x eager':>9}{'x compile':>11}{'GB/s':>8}{'of copy':>9}"]
    for provider in dict.fromkeys(row.provider for row in rows):
        own = {row.mode: row for row in rows if row.provider == provider}
        line = f"  {provider.name:9}"
        for mode in MODES:
            span = own[mode].percentiles
            line += f"{'failed' if span is None else format(span[1] * 1e3, '.3f'):>21}"
        last = own[MODES[-1]]
        line += f"{_number(last.ratio_to_eager, '.2f'):>9}{_number(last.ratio_to_compile, '.2f'):>11}"
        line += f"{_number(last.bandwidth and last.bandwidth / 1e9, '.0f'):>8}"
        lines.append(line + f"{_number(last.share_of_copy, '.0%'):>9}")
        lines += [f"  {provider.name}: {reason}" for reason in dict.fromkeys(r.error for r in own.values()) if reason]
    return "\n".join(lines)


def _number(value: float | None, digits: str) -> str:
    return "" if value is None else format(value, digits)


def run(
    dtype: str,
    path: Path,
    seconds: float,
    where: dict[str, Any],
    *,
    device: str = "cuda",
    sizes: Sequence[Size] = SIZES,
    settings: Settings = SETTINGS,
    say: Callable[[str], object] = print,
) -> list[Row]:
    """Measure one dtype, and write the records after every case."""
    end = clock() + seconds
    copy = CopyBandwidth(settings.copy_buffer, device=device)
    where = {**conditions(device), **where}
    rows: list[Row] = []
    for size in sizes:
        # No reference: its own time says nothing, and it would take memory that a small card does not have.
        providers = select((device,), True, device)
        (case,) = consensus_map.cases(size, getattr(torch, dtype), "contiguous")
        found = measure_case(case, providers, settings, copy, end - clock())
        rows += found
        write_json(path, rows, where)
        say(table(found))
        if device == "cuda":
            torch.cuda.empty_cache()
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_measure", description=__doc__.splitlines()[0])
    parser.add_argument("dtype", choices=DTYPES)
    parser.add_argument("--json", type=Path, required=True, help="where the records go")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--conditions", type=json.loads, default={}, help="more for every record, as JSON")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("bench.gpu_measure: torch sees no CUDA device here.", file=sys.stderr)
        return 2
    rows = run(options.dtype, options.json, options.seconds, options.conditions)
    return 0 if any(row.times for row in rows if row.provider.name == "cuda") else 1


if __name__ == "__main__":
    sys.exit(main())
