"""Sizes of blocks for the Triton kernels: what was measured on a card (table.json), and else what arithmetic says.

``python -m bench tune`` measures and writes the table. Nothing here depends on the number of samples, so a sample's
sums have one order whatever else is in the batch.
"""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path

import torch

__all__ = ["bucket", "config", "default", "power_of_two"]

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


@lru_cache(maxsize=1)
def table() -> dict[str, dict[str, dict[str, int]]]:
    """capability -> ``op/dtype/bucket`` -> sizes."""
    return json.loads(PATH.read_text())["capabilities"] if PATH.is_file() else {}


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
    row = f"{op}/{str(dtype).removeprefix('torch.')}/{bucket(channels, positions)}"
    found = table().get(str(capability), {}).get(row)
    return found or default(op, dtype, channels, positions, capability)
