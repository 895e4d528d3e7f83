"""Which backend serves a call, and why.

``auto`` takes the fastest that can serve the call; a backend chosen by name serves it or raises with its reason. The
choice is made by ``m3em_fast.backend("cpu")`` around a block, by the environment variable M3EM_BACKEND for the whole
process, and else it is ``auto``. Under ``torch.compile`` and ``torch.export`` the reference is traced, whatever is
chosen.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

native: Any
try:
    # After torch, whose OpenMP library the kernels then share.
    native = importlib.import_module("m3em_fast._C")
except ImportError as error:
    native = None
    _note = Path(__file__).with_name("_C_missing.txt")
    _MISSING = _note.read_text().strip() if _note.is_file() else f"m3em_fast._C could not be imported ({error})."
else:
    _MISSING = ""

__all__ = ["BACKENDS", "BackendError", "available", "backend", "choose", "current", "explain", "refusal"]

BACKENDS = ("cpu", "reference")
"""Every backend, fastest first."""


class BackendError(RuntimeError):
    """A backend chosen by name cannot serve the call; the message says why."""


def _checked(name: str, origin: str) -> str:
    if name not in ("auto", *BACKENDS):
        raise ValueError(f"{origin}: a backend must be one of auto, {', '.join(BACKENDS)}, got {name!r}")
    return name


_chosen: ContextVar[str | None] = ContextVar("m3em_fast_backend", default=None)


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Use one backend in a block: ``"auto"`` or one of ``BACKENDS``. Blocks nest; other threads are not affected.

    Raises:
        ValueError: there is no such backend.
    """
    token = _chosen.set(_checked(name, "m3em_fast.backend"))
    try:
        yield
    finally:
        _chosen.reset(token)


def current() -> str:
    """The name in force here: of the innermost block, else of M3EM_BACKEND, else ``"auto"``."""
    return _chosen.get() or _checked(os.environ.get("M3EM_BACKEND", "auto") or "auto", "M3EM_BACKEND")


def available() -> tuple[str, ...]:
    """The backends that can serve an ordinary call on this machine."""
    return BACKENDS if native is not None else ("reference",)


def refusal(name: str, op: str, tensors: Sequence[Tensor | None]) -> str | None:
    """Why a backend cannot serve a call of an op on these tensors; None where it can."""
    if name == "reference":
        return None
    if native is None:
        return f"the compiled kernels are not there: {_MISSING}"
    if torch.compiler.is_compiling():
        return "torch.compile and torch.export trace the reference"
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "a transform of torch.func needs an op that it can look into"
    if torch._C._len_torch_dispatch_stack() > 0:
        return "a dispatch mode is active, and it would not see the kernel"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation is active"
    for t in tensors:
        if t is None:
            continue
        if type(t) is not Tensor and type(t) is not torch.nn.Parameter:
            return f"it takes plain tensors, not {type(t).__name__}"
        if t.device.type != "cpu":
            return f"it takes CPU tensors, not tensors on {t.device}"
        if t.is_neg():
            return "a tensor is the negative view of another one"
    return None


def choose(op: str, kernels: Collection[str], tensors: Sequence[Tensor | None]) -> str:
    """The backend for a call of an op that has kernels in some backends.

    Raises:
        BackendError: the backend chosen by name cannot serve the call.
    """
    if torch.compiler.is_compiling():
        # The tracer cannot read a context variable, and there is one answer only.
        return "reference"
    wanted = current()
    for name in BACKENDS if wanted == "auto" else (wanted,):
        if name == "reference":
            return name
        reason = refusal(name, op, tensors) if name in kernels else f"it has no kernel for {op}"
        if reason is None:
            return name
        if wanted != "auto":
            raise BackendError(f"{op}: backend {name} cannot serve this call: {reason}")
    return "reference"


def explain(op: str, *arguments: Any) -> str:
    """Which backend would serve a call of an op here and now, and why each of the others would not.

    Args:
        op: name of the op, as in ``m3em_fast.ops``.
        *arguments: what the op would be called with.

    Returns:
        A line with the answer, then a line for every other backend.
    """
    from m3em_fast import ops

    if op not in ops.__all__:
        raise ValueError(f"explain: op must be one of {', '.join(ops.__all__)}, got {op!r}")
    flat = [t for a in arguments for t in (a if isinstance(a, (list, tuple)) else (a,))]
    tensors = [t for t in flat if isinstance(t, Tensor)]
    wanted = current()
    reasons = {name: refusal(name, op, tensors) for name in BACKENDS}
    able = [name for name in BACKENDS if reasons[name] is None and wanted in ("auto", name)]
    if able:
        detail = (
            f" ({native.isa()}{', one thread after a fork' if native.forked() else ''})" if able[0] == "cpu" else ""
        )
        lines = [f"{op} is served by {able[0]}{detail}."]
    else:
        lines = [f"{op} is served by none: {wanted} is chosen by name and cannot."]
    for name in BACKENDS:
        if name not in able[:1]:
            other = f"backend {wanted} is chosen by name" if wanted not in ("auto", name) else "slower"
            lines.append(f"{name}: {reasons[name] or other}")
    return "\n".join(lines)
