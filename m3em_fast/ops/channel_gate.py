from __future__ import annotations

from torch import Tensor

from m3em_fast import reference
from m3em_fast.ops import _checks


def channel_gate(x: Tensor, *gates: Tensor) -> Tensor:
    """Gate the channels of ``x`` by each gate and concatenate the copies over channels.

    Equations 2 to 4 of the M3EM report with two gates (self and cross refinement); squeeze-and-excitation with one.

    Args:
        x: (N,C,H,W) in float64, float32, float16 or bfloat16. N may be 0.
        *gates: G >= 1 tensors (N,C), each in the dtype of ``x``, or float32 beside a half ``x``. Any values; the
            report takes them from a sigmoid.

    Returns:
        (N, G*C, H, W) in the dtype and memory format of ``x``: channel ``g*C + c`` is ``x[:, c] * gates[g][:, c]``.

    Raises:
        TypeError: something is no floating-point tensor, or a dtype does not go with that of ``x``.
        ValueError: no gate, or a shape or device that differs from what ``x`` asks for.
    """
    _checks.tensor("channel_gate", "x", x, 4, "(N,C,H,W)")
    return reference.channel_gate(x, _checks.gates("channel_gate", gates, x))
