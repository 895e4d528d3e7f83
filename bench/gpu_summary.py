"""What the records of ``make gpu`` say, in a page: ``python -m bench.gpu_summary bench/results/gpu-*.json``.

Of every op and backend the mode that is furthest from its floor, and where somebody would be better served by eager
PyTorch. The floor is the longer of two times: in which a copy, as measured beside it, moves the bytes that have to be
moved, and in which the largest product that was measured does the operations of the matrix products.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

Record = dict[str, Any]
BOTH, TINY = "forward+backward", "tiny"
HOST_AIM = 15.0  # microseconds a call
MOST = 12  # lines of one kind
NO_TIME = "left out"


def read(paths: Iterable[Path]) -> list[Record]:
    """The records of those files that are there and whole."""
    found: list[Record] = []
    for path in paths:
        try:
            read = json.loads(path.read_text())
        except (OSError, ValueError):
            continue
        found += [r for r in read if "op" in r] if isinstance(read, list) else []
    return found


def times_floor(record: Record) -> float | None:
    """How many times its floor a row takes; None where it has no time or no floor."""
    if record.get("p50_ms") is None or not record.get("multiple_of_floor"):
        return None
    longest = record["p50_ms"] / record["multiple_of_floor"]
    if record.get("gflop_per_s") and record.get("product_gflop_per_s"):
        longest = max(longest, record["p50_ms"] * record["gflop_per_s"] / record["product_gflop_per_s"])
    return record["p50_ms"] / longest


def _of(record: Record) -> str:
    return f"{_case(record)}, {record['mode']}"


def _case(record: Record) -> str:
    size = record["shape"]
    return f"{record['op']} [{record['variant']}], {record['dtype']}, N={size['n']} {size['h']}x{size['w']}"


def _times(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _line(record: Record) -> str:
    return (
        f"  {record['backend']:9} {_times(times_floor(record)):>6} x floor, {record['p50_ms']:.3f} ms, "
        f"{_times(record.get('ratio_to_eager'))} x eager, {_times(record.get('ratio_to_compile'))} x compile: "
        f"{_of(record)}"
    )


def summary(records: Sequence[Record]) -> list[str]:
    """Lines, the largest gap first."""
    ours = [r for r in records if r.get("backend") not in (None, "reference")]
    timed = [r for r in ours if times_floor(r) is not None]
    lines = ["Largest gap to the floor, of every op and backend (1 is the floor):"]
    widest: dict[tuple[str, str], Record] = {}
    for record in timed:
        key = record["op"], record["backend"]
        if key not in widest or times_floor(record) > times_floor(widest[key]):  # type: ignore[operator]
            widest[key] = record
    lines += [_line(r) for r in sorted(widest.values(), key=times_floor, reverse=True)]  # type: ignore[arg-type]
    if not widest:
        lines.append("  nothing was timed")
    largest = max((r["shape"]["n"] for r in timed), default=0)
    paper = [r for r in timed if r["mode"] == BOTH and r["shape"]["n"] == largest and r["shape"]["h"] == 7]
    paper = [r for r in paper if r["shape"]["w"] == 7 and r["dtype"] == "float16"]
    if paper:
        lines.append(f"At N = {largest} and 7x7 in float16, {BOTH}:")
        lines += [_line(r) for r in paper][: 2 * MOST]
    lines += _losses(ours)
    slow = [r for r in ours if r["mode"].startswith(TINY) and (r.get("p50_ms") or 0) * 1e3 > HOST_AIM]
    if slow:
        lines.append(f"Calls of more than {HOST_AIM:.0f} us where there is hardly anything to compute:")
        lines += [f"  {r['p50_ms'] * 1e3:.1f} us, {r['backend']}: {_of(r)}" for r in slow[:MOST]]
    wrong = [r for r in records if r.get("error") and NO_TIME not in r["error"]]
    if wrong:
        wrong.sort(key=lambda r: r["backend"] is None)  # ours first
        failed = dict.fromkeys(f"  {r['backend'] or r['provider']}: {r['error']}: {_case(r)}" for r in wrong)
        lines += [f"Failed, in {len(failed)} cases:", *list(failed)[:MOST]]
    return lines


def _losses(ours: Sequence[Record]) -> list[str]:
    lost = sorted((r for r in ours if r.get("loss")), key=lambda r: r["ratio_to_eager"])
    if not lost:
        return []
    return [f"Slower than eager: {len(lost)} rows", *(_line(r) for r in lost[:MOST] if r.get("p50_ms") is not None)]


def main(arguments: Sequence[str] | None = None) -> int:
    paths = [Path(word) for word in (sys.argv[1:] if arguments is None else arguments)]
    if not paths or not all(path.is_file() for path in paths):
        print("usage: python -m bench.gpu_summary FILE.json [FILE.json ...]", file=sys.stderr)
        return 2
    print("\n".join(summary(read(paths))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
