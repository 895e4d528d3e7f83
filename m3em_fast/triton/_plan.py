"""How consensus_map's Triton kernels split their work. Arithmetic alone: nothing here needs Triton."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from m3em_fast.triton._table import config, power_of_two

__all__ = ["Plan", "plan", "stats_size"]

# Bytes of a and b that a program of the forward reads again for every scale: with a few programs at a time on one
# processor they are still in its first cache (128 KB on a V100) when it does.
PORTION = 32 << 10
LEAST = 32  # channels of a chunk at least: below, what chunks leave for the last kernel would cost more than it saves
# Registers a thread at most. More than the kernels need: without a limit of ours ptxas sets one of its own and spills
# the last few bytes for it.
REGISTERS = {"maxnreg": 168}
ACROSS = 16  # positions of a row that a program of the backward takes at most


@dataclass(frozen=True)
class Plan:
    """By D, H, W, the scales, the dtype and the card alone."""

    cells: int
    sums: int  # numbers a sample between the kernels of the forward
    stats: int  # numbers a sample that the forward leaves for the backward
    chunk: int  # channels of a program of the forward
    chunks: int
    partial_programs: int  # a sample
    finish_programs: int
    backward_chunks: int
    backward_programs: int
    partial: dict[str, Any]  # the constants of each kernel
    finish: dict[str, Any]
    factors: dict[str, Any]
    backward: dict[str, Any]


def shapes_of(height: int, width: int, scales: int) -> list[tuple[int, int]]:
    """Rows and columns of every scale."""
    return [(max(1, height >> k), max(1, width >> k)) for k in range(scales)]


def stats_size(height: int, width: int, scales: int, center: bool) -> int:
    """Numbers a sample that the forward leaves for the backward: three for every cell, with ``center`` both means."""
    cells = sum(rows * columns for rows, columns in shapes_of(height, width, scales))
    return 3 * cells + (2 * height * width if center else 0)


def _log(count: int, most: int) -> int:
    """log2 of the power of two that holds so many, up to ``most``."""
    return min(power_of_two(count), most).bit_length() - 1


def _packed(sizes: list[int]) -> int:
    """Numbers below 16 in one, four bits a scale: a kernel takes no list of constants."""
    return sum(size << 4 * k for k, size in enumerate(sizes))


@lru_cache(maxsize=1024)
def plan(dtype: torch.dtype, d: int, h: int, w: int, scales: int, center: bool, eps: float, capability: int) -> Plan:
    shapes = shapes_of(h, w, scales)
    counts = [rows * columns for rows, columns in shapes]
    windows = [(h // rows + (h % rows > 0)) * (w // columns + (w % columns > 0)) for rows, columns in shapes]
    cells, positions = sum(counts), h * w
    bytes_a_channel = 2 * positions * dtype.itemsize
    chunk = LEAST
    while chunk < d and 2 * chunk * bytes_a_channel <= PORTION:
        chunk *= 2
    chunk = min(chunk, d)
    chunks = -(-d // chunk)
    # A large map in bands of rows, but a coarse scale has few rows.
    bands = max(1, min(chunk * bytes_a_channel // PORTION, shapes[min(2, scales - 1)][0]))
    tile = dict(config("consensus_map", dtype, d, positions, capability))
    tile["BLOCK_C"] = min(tile["BLOCK_C"], power_of_two(chunk))
    lanes = tile["BLOCK_P"]
    # Where a scale has more cells than a window has positions, lanes take cells, else the positions of one window.
    many = [count >= window for count, window in zip(counts, windows, strict=True)]
    in_band = [-(-rows // bands) * columns for rows, columns in shapes]
    log_cells = [_log(count, lanes) if wide else 0 for count, wide in zip(in_band, many, strict=True)]
    back = config("consensus_map_backward", dtype, d, positions, capability)
    span = min(w, ACROSS, back["BLOCK_P"])
    parts = -(-w // span) * -(-h // (back["BLOCK_P"] // span))
    block = min(power_of_two(cells), 32 if capability else 1024)
    # The positions of up to four windows read a cell.
    read_cells, readers = [_log(x, 8 if capability else 64) for x in counts], [_log(4 * x, 64) for x in windows]
    shape = {"H": h, "W": w, "SCALES": scales, "CELLS": cells, "CENTER": center}
    return Plan(
        cells=cells,
        sums=(5 if center else 3) * cells * chunks,
        stats=stats_size(h, w, scales, center),
        chunk=chunk,
        chunks=chunks,
        partial_programs=chunks * bands,
        finish_programs=-(-cells // block),
        backward_chunks=-(-d // back["BLOCK_C"]),
        backward_programs=parts * -(-d // back["BLOCK_C"]),
        partial=shape
        | {"BANDS": bands, "LOG_Q": _packed(log_cells), "LOG_T": _packed([_log(x, lanes) for x in windows])}
        | tile
        | REGISTERS,
        finish=shape | {"EPS": eps, "BLOCK": block, "num_warps": 1} | REGISTERS,
        factors=shape | {"LOG_Q": _packed(read_cells), "LOG_T": _packed(readers), "num_warps": 4} | REGISTERS,
        backward=shape
        | {"SPAN": span, "LOG_T": _packed([_log(x, back["BLOCK_P"]) for x in windows])}
        | back
        | REGISTERS,
    )
