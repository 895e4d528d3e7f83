from __future__ import annotations

from torch import Tensor

from m3em_fast import reference
from m3em_fast.ops import _checks


def consensus_pool(x: Tensor, cmap: Tensor | None = None) -> Tensor:
    """Mean over positions of ``(1 + cmap) * x``; without a map the plain mean (global average pooling).

    The weighted average with a residual connection of section 2.2 of the M3EM report. The map is not normalised.

    Args:
        x: (N,C,H,W) in float64, float32, float16 or bfloat16. N may be 0.
        cmap: (N,1,H,W) in the dtype of ``x``, or float32 beside a half ``x``; or None.

    Returns:
        (N,C), float32 if ``cmap`` is float32, else in the dtype of ``x``.

    Raises:
        TypeError: something is no floating-point tensor, or a dtype does not go with that of ``x``.
        ValueError: a shape or device differs from what ``x`` asks for.
    """
    _checks.tensor("consensus_pool", "x", x, 4, "(N,C,H,W)")
    if cmap is not None:
        _checks.consensus("consensus_pool", cmap, x)
    return reference.consensus_pool(x, cmap)
