"""Rows as records for programs, and the conditions that every record carries. Needs torch and numpy alone."""

from __future__ import annotations

import datetime
import json
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from bench.core import Row
from m3em_fast import env


def conditions(device: str = "cpu") -> dict[str, Any]:
    """Where and when: what every figure depends on and every record carries."""
    found = env.report()
    processor, package = found["processor"], found["package"]
    card = {"card": torch.cuda.get_device_name(), "cuda": torch.version.cuda} if device == "cuda" else {}
    return {
        **card,
        "cpu": processor.get("model"),
        "cores": processor.get("usable_cores"),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "version": package.get("version"),
        "commit": package.get("commit"),
        "timestamp": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def record(row: Row, where: dict[str, Any]) -> dict[str, Any]:
    """One row as plain values. Times in milliseconds, ratios above 1 for faster."""
    low, middle, high = row.percentiles or (None, None, None)
    is_ours = row.provider.backend is not None
    size = row.case.size
    return {
        "op": row.case.op,
        "variant": row.case.variant,
        "provider": "m3em_fast" if is_ours else row.provider.name,
        "backend": row.provider.backend,
        "mode": row.mode,
        "shape": {"n": size.n, "c": size.c, "d": size.d, "h": size.h, "w": size.w},
        "dtype": row.case.dtype_name,
        "requires_grad": row.case.needs,
        "layout": row.case.layout,
        "rounds": len(row.times),
        "p20_ms": scaled(low, 1e3),
        "p50_ms": scaled(middle, 1e3),
        "p80_ms": scaled(high, 1e3),
        "ratio_to_eager": row.ratio_to_eager,
        "ratio_to_compile": row.ratio_to_compile,
        "ratio_to_float32": row.ratio_to_float32,
        "loss": row.loss,
        "gb_per_s": scaled(row.bandwidth, 1e-9),
        "multiple_of_floor": row.multiple_of_floor,
        "share_of_copy": row.share_of_copy,
        "gflop_per_s": row.flops / middle / 1e9 if row.flops and middle else None,
        "copy_gb_per_s": scaled(row.copy_bandwidth, 1e-9),
        "saved_bytes": row.saved_bytes,
        "error": row.error,
        **where,
    }


def scaled(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def write_json(path: Path, rows: Iterable[Row], where: dict[str, Any]) -> None:
    """All records or, if something goes wrong on the way, the file as it was before."""
    write_records(path, [record(row, where) for row in rows])


def write_records(path: Path, found: list[dict[str, Any]]) -> None:
    """As :func:`write_json`, of records that are made already."""
    text = json.dumps(found, indent=1, allow_nan=False) + "\n"
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
