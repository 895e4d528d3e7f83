"""Maps (N,C,H,W) of any strides, as the kernels of channel_gate and consensus_pool read and write them."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def place(q, W, LINE: tl.constexpr):
    """Row and column of positions; with LINE, where the stride of W leads along all of them, 0 and the position."""
    if LINE:
        row, column = tl.zeros_like(q), q
    else:
        row, column = q // W, q % W
    return row.to(tl.int64), column.to(tl.int64)


@triton.jit
def offset(strides, channel, row, column):
    """Of numbers from the first one of their sample. Everything that is multiplied has 64 bits."""
    return channel * strides[1] + row * strides[2] + column * strides[3]


@triton.jit
def tile(strides, channel, row, column):
    """The same of a tile: [channels, positions]."""
    return offset(strides, channel[:, None], row[None, :], column[None, :])
