"""Rows as a table for people; ``records.py`` has them for programs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bench.core import MODES, TINY_MODES, Row
from bench.records import scaled


def conditions_line(where: dict[str, Any], copy_bandwidth: float) -> str:
    commit = where["commit"] or "unknown"
    commit = commit.replace(commit.split()[0], commit.split()[0][:12])
    card = f"{where['card']}, CUDA {where['cuda']} · " if "card" in where else ""
    memory = f" · memory {where['memory']}" if "memory" in where and not card else ""
    return (
        f"{card}{where['cpu']}, {where['threads']} threads on {where['cores']} cores · torch {where['torch']} · "
        f"m3em_fast {where['version']}, commit {commit} · {where['timestamp']} · "
        f"copy {copy_bandwidth / 1e9:.1f} GB/s{memory}"
    )


def _cell(value: float | None, digits: str = ".3g") -> str:
    return "" if value is None else format(value, digits)


def _time(seconds: float, unit: float) -> str:
    value = seconds * unit
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _times(row: Row | None, unit: float) -> list[Text | str]:
    """Median and ratio to eager."""
    if row is None:
        return ["", ""]
    if row.percentiles is None:
        return [Text("failed" if row.error else "", style="red"), ""]
    ratio = _ratio(row.ratio_to_eager)
    return [_time(row.percentiles[1], unit), Text(f"{ratio} loss", style="bold red") if row.loss else ratio]


def _ratio(value: float | None) -> str:
    """Two digits, and a third where two would make 1.00 of less."""
    return _cell(value, ".3f" if value is not None and 0.995 <= value < 1 else ".2f")


def table(rows: Sequence[Row]) -> Table:
    """The rows of one case, a line a provider. What stands behind the modes belongs to the last of them."""
    modes = TINY_MODES if rows[0].mode in TINY_MODES else MODES
    tiny = modes is TINY_MODES
    unit, name = (1e6, "µs") if tiny else (1e3, "ms")
    found = Table(title=str(rows[0].case), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    found.add_column("", min_width=9)
    for mode in modes:
        found.add_column(mode.removeprefix("tiny, ").replace("+", "\n+ ") + f"\n{name}", justify="right")
        found.add_column("x eager", justify="right", min_width=9)
    found.add_column(f"20-80 %\n{name}", justify="right")
    found.add_column("x com-\npile", justify="right")
    if not tiny:
        has_products = any(row.flops for row in rows)
        has_twin = any(row.ratio_to_float32 for row in rows)
        if has_twin:
            found.add_column("x float32", justify="right", min_width=9)
        for column in ("GB/s", "x floor", *(("GFLOP/s",) if has_products else ()), "saved\nMB"):
            found.add_column(column, justify="right")
    errors = []
    for provider in dict.fromkeys(row.provider for row in rows):
        own = {row.mode: row for row in rows if row.provider == provider}
        last = own[max(own, key=modes.index)]  # of which the columns at the end are
        line: list[Text | str] = [provider.name]
        for mode in modes:
            line += _times(own.get(mode), unit)
        span = last.percentiles
        line.append(f"{_time(span[0], unit)}-{_time(span[2], unit)}" if span else "")
        line.append(_cell(last.ratio_to_compile, ".2f"))
        if not tiny:
            if has_twin:
                ratio = _ratio(last.ratio_to_float32)
                line.append(Text(f"{ratio} slow", style="bold red") if last.half_loss else ratio)
            line += [_cell(scaled(last.bandwidth, 1e-9), ".2f"), _cell(last.multiple_of_floor, ".2f")]
            if has_products:
                line.append(_cell(last.flops / span[1] / 1e9 if last.flops and span else None, ".1f"))
            line.append(_cell(scaled(last.saved_bytes, 1e-6), ".1f"))
        found.add_row(*line)
        reasons = dict.fromkeys(row.error for row in own.values() if row.error)
        errors += [f"{provider.name} failed: {reason}" for reason in reasons]
    found.caption = Text("\n".join(errors), style="red") if errors else None
    found.caption_justify = "left"
    return found


def print_losses(console: Console, rows: Sequence[Row]) -> None:
    """Where somebody would be better served by eager PyTorch, or by float32."""
    lost = [row for row in rows if row.loss]
    for row in lost:
        text = f"loss: {row.provider.name} at {_ratio(row.ratio_to_eager)} x eager, {row.mode}: {row.case}"
        console.print(Text(text, style="red"), soft_wrap=True)
    for row in rows:
        if row.half_loss:
            text = f"slow: {row.provider.name} at {_ratio(row.ratio_to_float32)} x float32, {row.mode}: {row.case}"
            console.print(Text(text, style="red"), soft_wrap=True)
