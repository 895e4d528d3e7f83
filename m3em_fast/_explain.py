"""Which backend serves a call, in words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from m3em_fast import backends


def explain(op: str | Callable[..., Tensor], *arguments: Any) -> str:
    """Which backend would serve a call of an op here and now, and why each of the others would not.

    Args:
        op: one of ``m3em_fast.ops``, or its name.
        *arguments: what the op would be called with.

    Returns:
        A line with the answer, then a line for every other backend.
    """
    from m3em_fast import ops

    op = next((name for name in ops.__all__ if getattr(ops, name) is op), op)
    if not isinstance(op, str) or op not in ops.__all__:
        raise ValueError(f"explain: op must be one of {', '.join(ops.__all__)}, got {op!r}")
    flat = [t for a in arguments for t in (a if isinstance(a, (list, tuple)) else (a,))]
    tensors = [t for t in flat if isinstance(t, Tensor)]
    wanted = backends.current()
    names = (*backends.BACKENDS, "simt") if wanted == "simt" else backends.BACKENDS
    reasons = {name: backends.refusal(name, op, tensors) for name in names}
    for name, kernels in backends.KERNELS[op].items():
        if name in names and reasons[name] is None and kernels is not None and kernels.refuses is not None:
            reasons[name] = kernels.refuses((), tensors) if tensors else None
    first = tensors[0] if tensors else None
    on_card = first is not None and first.is_cuda
    maps = first if first is not None and on_card and first.dim() == 4 else None
    tried: tuple[str, ...] = names
    if wanted == "auto":  # what is refused for its shape has no row in the table
        tried = backends.FOR_CUDA if on_card and maps is None else backends.order(op, first)
    able = [name for name in tried if reasons[name] is None and wanted in ("auto", name)]
    if able:
        native = backends.native
        detail = (
            f" ({native.isa()}{', one thread after a fork' if native.forked() else ''})" if able[0] == "cpu" else ""
        )
        lines = [f"{op} is served by {able[0]}{detail}."]
    else:
        lines = [f"{op} is served by none: {wanted} is chosen by name and cannot."]
    for name in names:
        if name not in able[:1]:
            other = "slower" if name in tried else "it serves where it is chosen by name"
            if maps is not None and {name, *able[:1]} == {"cuda", "triton"}:
                _, c, h, w = maps.shape
                measured = backends.triton_devices.times(op, maps.get_device(), maps.dtype, c, h * w)
                if measured:
                    other = f"{'slower' if name == 'cuda' else 'not faster in forward and backward alike'} ({measured})"
            if wanted not in ("auto", name):
                other = f"backend {wanted} is chosen by name"
            lines.append(f"{name}: {reasons[name] or other}")
    return "\n".join(lines)
