"""Sizes of blocks for the Triton kernels, and where these were faster than the compiled ones (table.json).

``python -m bench tune`` measures both on a card and writes them to the table. Where nobody has measured, the table has
sizes that ``python -m bench tune --calculated`` chose by counting what a program does: no card was asked for them, and
a measurement overrules them. What is in neither part is computed from the shape (:func:`default`). Nothing here depends
on the number of samples, so a sample's sums have one order, and are made by one backend, whatever else is in the batch.
"""

from __future__ import annotations

import json
import math
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

PATH = Path(__file__).with_name("table.json")
SHARED = 96 << 10  # bytes of shared memory that a block may have on compute capability 7.0
OPS = (
    "channel_gate",
    "channel_gate_backward",
    "consensus_map",
    "consensus_map_backward",
    "consensus_pool",
    "consensus_pool_backward",
)
SIZES = ("BLOCK_C", "BLOCK_P", "num_warps")
# The parts of the table, and what their rows hold: sizes of blocks that were measured, sizes that were only calculated,
# and the measured times of both backends.
PARTS = {"capabilities": SIZES, "calculated": SIZES, "microseconds": ("cuda", "triton")}
DTYPES = ("float64", "float32", "float16", "bfloat16")
# By which share of its time the compiled kernel must be slower before auto takes the other one: less is noise.
MARGIN = 0.02
# Numbers in a tile, of which a forward has one in its registers and a backward two or three, and positions at most.
TILE, BACKWARD_TILE, POSITIONS = 2048, 1024, 128
# consensus_map has several tiles in its registers at a time. The interpreter has none, and takes the time of a step for
# each operation of a program, however large its tiles are.
MAP_TILE, MAP_POSITIONS = 512, 64
INTERPRETED_TILE, INTERPRETED_POSITIONS = 1 << 14, 256


def power_of_two(count: int) -> int:
    """The smallest power of two that is not below ``count`` (at least 1)."""
    return 1 << max(count - 1, 0).bit_length()


def bucket(channels: int, positions: int) -> str:
    """The row of the table for a shape: both numbers rounded up to powers of two."""
    return f"{power_of_two(channels)}x{power_of_two(positions)}"


def row_of(op: str, dtype: torch.dtype, channels: int, positions: int) -> str:
    return f"{op}/{str(dtype).removeprefix('torch.')}/{bucket(channels, positions)}"


def backward_of(op: str) -> str:
    """The name of an op's backward in the table."""
    return f"{op}_backward"


def default(op: str, dtype: torch.dtype, channels: int, positions: int, capability: int) -> dict[str, int]:
    """Sizes that fit every card, from the shape alone."""
    is_map = op.startswith("consensus_map")
    tile, widest = BACKWARD_TILE if op.endswith("_backward") else TILE, POSITIONS
    if is_map:
        tile, widest = (MAP_TILE, MAP_POSITIONS) if capability else (INTERPRETED_TILE, INTERPRETED_POSITIONS)
    if dtype == torch.float64:
        tile //= 4 if is_map and capability else 2
    block_p = min(power_of_two(positions), widest)
    block_c = min(power_of_two(channels), max(1, tile // block_p))
    # Fewer numbers than threads would leave some of them without work.
    warps = max(1, min(4, block_c * block_p // 32))
    return {"BLOCK_C": block_c, "BLOCK_P": block_p, "num_warps": warps}


def checked(found: Any) -> dict[str, Any]:
    """A table as its file holds it: ``about``, and the ``PARTS``, each capability -> ``op/dtype/bucket`` -> row.

    Raises:
        ValueError: it is none, with the place in it.
    """
    if not isinstance(found, dict) or set(found) != {"about", *PARTS}:
        raise ValueError(f"it must have about, {', '.join(PARTS)}")
    for part in PARTS:
        cards = found[part] if isinstance(found[part], dict) else {str(found[part]): None}
        for card, rows in cards.items():
            if not re.fullmatch(r"[1-9]\d{1,2}", card) or not isinstance(rows, dict):
                raise ValueError(f"{part}: {card!r} is no compute capability such as '70' with rows")
            for row, numbers in rows.items():
                if (flaw := _flaw(part, row, numbers)) is not None:
                    raise ValueError(f"{part}, {card}, {row}: {flaw}")
    return found


def _flaw(part: str, row: str, numbers: Any) -> str | None:
    """What is wrong with a row of the table."""
    found = re.fullmatch(r"(\w+)/(\w+)/([1-9]\d*)x([1-9]\d*)", row)
    if found is None or found[1] not in OPS or found[2] not in DTYPES:
        return f"there is no such op, dtype and shape (one is {OPS[0]}/float16/1024x64)"
    if (known := bucket(int(found[3]), int(found[4]))) != f"{found[3]}x{found[4]}":
        return f"that shape is in the row of {known}"
    names, whole = ", ".join(PARTS[part]), PARTS[part] == SIZES
    if not isinstance(numbers, dict) or set(numbers) != set(PARTS[part]):
        return f"it must have {names}"
    for number in numbers.values():
        if isinstance(number, bool) or not isinstance(number, (int, float)) or not 0 < number < math.inf:
            return f"{names} must be numbers above 0"
        if whole and (not isinstance(number, int) or number & (number - 1)):
            return f"{names} must be powers of two"
    return None


@lru_cache(maxsize=1)
def stored() -> dict[str, Any]:
    """The table of this installation. It is read once."""
    if not PATH.is_file():
        return {part: {} for part in PARTS}
    try:
        return checked(json.loads(PATH.read_text()))
    except ValueError as error:
        raise ValueError(f"{PATH}: {error}; python -m bench tune writes this file") from None


def times(op: str, dtype: torch.dtype, channels: int, positions: int, capability: int) -> list[dict[str, float]]:
    """Microseconds of ``cuda`` and of ``triton`` as they were measured, of the forward and of the backward; nothing
    where they were not compared."""
    rows = stored()["microseconds"].get(str(capability), {})
    found = [rows.get(row_of(name, dtype, channels, positions)) for name in (op, backward_of(op))]
    return [] if None in found else found


@lru_cache(maxsize=256)
def faster(op: str, dtype: torch.dtype, capability: int) -> tuple[tuple[int, int], ...]:
    """Where ``triton`` was faster than ``cuda`` in the forward and in the backward alike, so that it is whatever a call
    asks for: channels and positions, each the power of two that ends its bucket."""
    found = []
    for shape in sorted({row.rpartition("/")[2] for row in stored()["microseconds"].get(str(capability), {})}):
        channels, positions = map(int, shape.split("x"))
        both = times(op, dtype, channels, positions, capability)
        if both and all(each["triton"] < (1 - MARGIN) * each["cuda"] for each in both):
            found.append((channels, positions))
    return tuple(found)


@lru_cache(maxsize=4096)
def config(op: str, dtype: torch.dtype, channels: int, positions: int, capability: int) -> dict[str, int]:
    """The keyword arguments for the launch of a kernel. They are shared between calls: read them only.

    Args:
        op: one of ``OPS``; a backward has a row of its own.
        dtype: of the feature map.
        channels: C, or D of ``consensus_map``.
        positions: H·W.
        capability: of the card, 70 for 7.0; 0 under the interpreter.

    Returns:
        ``BLOCK_C`` and ``BLOCK_P``, channels and positions of a tile (powers of two), and ``num_warps``.
    """
    if op not in OPS:
        raise ValueError(f"config: op must be one of {', '.join(OPS)}, got {op!r}")
    row, table = row_of(op, dtype, channels, positions), stored()
    for part in ("capabilities", "calculated"):
        if (found := table[part].get(str(capability), {}).get(row)) is not None:
            return found
    return default(op, dtype, channels, positions, capability)
