from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from m3em_fast import backends, reference
from m3em_fast.ops import _checks
from m3em_fast.ops.consensus_pool import pool


def gated_consensus_pool(x: Tensor, gates: Sequence[Tensor], cmap: Tensor | None = None) -> Tensor:
    """``consensus_pool(channel_gate(x, *gates), cmap)`` without the gated tensor.

    Pooling commutes with gating, so the vector pooled once is multiplied by each gate.

    Args:
        x: (N,C,H,W) in float64, float32, float16 or bfloat16. N may be 0.
        gates: G >= 1 tensors (N,C), each in the dtype of ``x``, or float32 beside a half ``x``.
        cmap: (N,1,H,W) in the dtype of ``x``, or float32 beside a half ``x``; or None for the plain mean.

    Returns:
        (N, G*C), float32 if any input is float32, else in the dtype of ``x``.

    Raises:
        TypeError: something is no floating-point tensor, or a dtype does not go with that of ``x``.
        ValueError: no gate, or a shape or device that differs from what ``x`` asks for.
    """
    _checks.tensor("gated_consensus_pool", "x", x, 4, "(N,C,H,W)")
    gates = _checks.gates("gated_consensus_pool", gates, x)
    if cmap is not None:
        _checks.consensus("gated_consensus_pool", cmap, x)
    if backends.choose("gated_consensus_pool", _BACKENDS, (x, *gates, cmap))[0] == "reference":
        return reference.gated_consensus_pool(x, gates, cmap)
    # No kernel of its own: pool once, not yet rounded, then a product of small tensors in plain torch.
    pooled = pool(x, cmap, reference.accumulation_dtype(x.dtype))
    gated = torch.cat([pooled * gate.to(pooled.dtype) for gate in gates], dim=1)
    return gated.to(reference.widest(x, cmap, *gates))


_BACKENDS = ("cpu", "cuda", "simt", "triton")
backends.KERNELS["gated_consensus_pool"] = dict.fromkeys(_BACKENDS)
