"""Which backend serves a call, and why.

``auto`` takes the fastest that can serve the call; a backend chosen by name serves it or raises with its reason. The
choice is made by ``m3em_fast.backend("cpu")`` around a block, by the environment variable M3EM_BACKEND for the whole
process (read when the package is imported), and else it is ``auto``.

On a CUDA device that is ``cuda`` where it can serve, but for the shapes in which ``python -m bench tune`` has found
``triton`` to be faster on such a card (m3em_fast/triton/table.json). The number of samples has no say in it: a clip has
its bits whatever else is in the batch.

Under ``torch.compile`` and ``torch.export`` the choice is made once, while the call is traced, from what is in force
around the first call of the compiled function or around the export; the program keeps it. An op is then one node of the
graph, ``m3em_fast::_<op>``, and the program needs this package wherever it runs; traced under the reference, it holds
torch's own operators alone. The table is asked under ``torch.compile`` as in eager mode, and a program is traced anew
for maps of another row of it. An exported program is for other shapes and other cards too: there it is not asked, nor
is it under torch 2.7, which says of every trace that it is an export.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode
from torch.nn import Parameter
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from m3em_fast import _openmp, cuda, triton

Function = TypeVar("Function", bound=Callable)

native: Any
try:
    # After torch, whose OpenMP library the kernels then share.
    _openmp.offer()
    native = importlib.import_module("m3em_fast._C")
except ImportError as error:
    native = None
    _note = Path(__file__).with_name("_C_missing.txt")
    _MISSING = _note.read_text().strip() if _note.is_file() else f"m3em_fast._C could not be imported ({error})."
else:
    _MISSING = ""
    native.types(Tensor, Parameter)

__all__ = ["BACKENDS", "BackendError", "available", "backend", "choose", "current", "order", "refusal"]

BACKENDS = ("cpu", "cuda", "triton", "reference")
"""Every backend. ``cpu`` takes CPU tensors, ``cuda`` and ``triton`` CUDA tensors; the reference takes any and is the
slowest. Under TRITON_INTERPRET=1 ``triton`` takes CPU tensors instead, where it is chosen by name: for tests."""

KERNELS: dict[str, Mapping[str, Any]] = {}
"""op -> backend -> its ``Kernels``; None for an op that is made of others."""

cards = cuda.Cards(native)
triton_devices = triton.Devices()
# Device code on the CPU, for tests: a backend by the name simt, where they have opened it, and never a choice of auto.
simulated: cuda.Simulated | None = None


def simulate(library: Path, archive: Path) -> cuda.Simulated:
    """Make ``simt`` a backend: the kernels of an archive, on a driver library of csrc/simt."""
    global simulated
    simulated = cuda.Simulated(native, str(library), archive)
    return simulated


class BackendError(RuntimeError):
    """A backend chosen by name cannot serve the call; the message says why."""


# Read once, for a look into the environment costs a microsecond a call.
_default = os.environ.get("M3EM_BACKEND") or "auto"
# What auto tries, in this order.
_FOR_CPU, FOR_CUDA = ("cpu", "reference"), ("cuda", "triton", "reference")
_TRITON_FIRST = ("triton", "cuda", "reference")
_QUICK = ("auto", "cpu")
_peek_transform = torch._C._functorch.peek_interpreter_stack
_count_modes = torch._C._len_torch_dispatch_stack
_recording = torch._C._get_tracing_state
_is_batched = torch._C._functorch.is_legacy_batchedtensor  # by is_grads_batched=True, which is no transform


def _checked(name: str, origin: str) -> str:
    if name not in ("auto", *BACKENDS) and (name != "simt" or simulated is None):
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
    chosen = _chosen.get() or _default
    return chosen if chosen == "auto" else _checked(chosen, "M3EM_BACKEND")


def available(device: str = "cpu") -> tuple[str, ...]:
    """The backends that can serve an ordinary call on this machine, with tensors on ``"cpu"`` or on ``"cuda"``."""
    names = FOR_CUDA if device == "cuda" else _FOR_CPU
    kernels = [name for name in names[:-1] if _device_of(name) == device and not missing(name, "", (name,))]
    return (*kernels, names[-1])


def _device_of(name: str) -> str:
    """The kind of device whose tensors a backend with kernels takes."""
    return "cuda" if name == "cuda" or (name == "triton" and not triton.interpreted()) else "cpu"


def constant(function: Function) -> Function:
    """Have torch.compile call a function of constants while it traces, and keep the answer.

    This is what ``torch.compiler.assume_constant_result`` does, but for the import of the whole compiler (a second) in
    every process that imports this module.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@constant
def chosen_by_name() -> bool:
    """Whether no other backend may serve a call that the chosen one cannot."""
    return current() != "auto"


@constant
def under_vmap() -> bool:
    levels = torch._C._functorch.get_interpreter_stack() or ()
    return any(level.key() == torch._C._functorch.TransformType.Vmap for level in levels)


def missing(name: str, op: str, kernels: Collection[str]) -> str | None:
    """Why a backend can serve no call of an op on this machine; None where it can serve some."""
    if name not in kernels:
        return f"it has no kernel for {op}"
    if name == "triton":
        return triton_devices.unavailable()
    if native is None:
        return f"the compiled kernels are not there: {_MISSING}"
    if name == "cuda":
        return cards.unavailable()
    return "no simulated driver is open" if name == "simt" and simulated is None else None


@constant
def _faster_in_triton(op: str, index: int | None, dtype: torch.dtype) -> tuple[tuple[int, int], ...]:
    return triton_devices.faster(op, index or 0, dtype)


def _triton_first(op: str, x: Tensor, index: int | None) -> bool:
    """Whether calls with maps like x (N,C,H,W) are faster in Triton on a CUDA device, by a measurement on such a card.
    torch.compile traces this function: it looks at no size where nothing was measured, and at N nowhere."""
    for channels, positions in _faster_in_triton(op, index, x.dtype):
        _, c, h, w = x.shape
        if c <= channels < 2 * c and h * w <= positions < 2 * h * w:
            return True
    return False


def _strange(t: Tensor) -> str | None:
    """Why a tensor is none that kernels take, wherever it is, real or not. torch.compile traces this function."""
    kind = type(t)
    if kind is not Tensor and kind is not Parameter and kind is not FakeTensor and kind is not FunctionalTensor:
        return f"it takes plain tensors, not {kind.__name__}"
    return None


def _device(kind: str, index: int | None) -> str:
    return kind if index is None else f"{kind}:{index}"


def misplaced(name: str, op: str, kind: str, index: int | None, dtypes: Collection[torch.dtype]) -> str | None:
    """Why a backend with kernels of an op takes no tensors of a device in some dtypes; None where it does."""
    takes = _device_of(name)
    if name in ("cuda", "triton"):
        # A form without memory takes any backend that is usable here.
        unavailable = missing(name, op, (name,))
        if unavailable is not None or kind == "meta":
            return unavailable
    if kind not in (takes, "meta"):
        note = ""
        if name == "triton":
            note = " under TRITON_INTERPRET=1" if takes == "cpu" else " (CPU tensors under TRITON_INTERPRET=1 alone)"
        return f"it takes {takes.upper()} tensors{note}, not tensors on {_device(kind, index)}"
    if kind == "cuda":
        return cards.refusal(op, index or 0) if name == "cuda" else triton_devices.refusal(index or 0, dtypes)
    return simulated.refusal(op, simulated.device) if name == "simt" and simulated is not None else None


def transformed(grad: Tensor | None = None) -> str | None:
    """What goes on around a call, or around a backward with a gradient, that a kernel would know nothing of."""
    if _peek_transform() is not None or (grad is not None and _is_batched(grad)):
        return "a transform of torch.func needs an op that it can look into"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation is active"
    return None


def _examine(name: str, op: str, tensors: tuple[Tensor | None, ...]) -> tuple[str | None, bool]:
    """Why a backend with kernels cannot serve a call here (None: it can), and whether it is reached through the
    registered op."""
    registered = False
    reason = transformed()
    if reason is not None:
        return reason, False
    if _recording() is not None:
        return "torch.jit.trace is recording, and would keep the result as a constant", False
    if _count_modes() > 0:
        tracers: tuple[type, ...] = (FakeTensorMode,)
        if torch.compiler.is_compiling():
            tracers = (FakeTensorMode, FunctionalTensorMode, ProxyTorchDispatchMode)
        if not all(isinstance(mode, tracers) for mode in _get_current_dispatch_mode_stack()):
            return "a dispatch mode is active, and it would not see the kernel", False
        registered = True
    on_cpu, real = _device_of(name) == "cpu", None
    for t in tensors:
        if t is None:
            continue
        kind = type(t)
        if (kind is Tensor or kind is Parameter) and (t.is_cpu if on_cpu else t.is_cuda):
            if t.is_neg():
                return "a tensor is the negative view of another one", False
            real = t
            continue
        reason = _strange(t) or misplaced(name, op, t.device.type, t.device.index, _dtypes(tensors))
        if reason is not None:
            return reason, False
        registered = True
    if name == "cpu" or real is None:
        return None, registered
    if name == "triton":
        reason = missing(name, op, (name,)) if on_cpu else triton_devices.refusal(real.get_device(), _dtypes(tensors))
        return reason, registered
    found = simulated if name == "simt" else cards
    return found.refusal(op, found.place(real)) if found is not None else None, registered


def _dtypes(tensors: Sequence[Tensor | None]) -> list[torch.dtype]:
    """torch.compile traces this function."""
    return [t.dtype for t in tensors if t is not None]


def refusal(name: str, op: str, tensors: Sequence[Tensor | None]) -> str | None:
    """Why a backend cannot serve a call of an op on these tensors; None where it can."""
    if name == "reference":
        return None
    return missing(name, op, KERNELS.get(op, (name,))) or _examine(name, op, tuple(tensors))[0]


def choose(op: str, kernels: Collection[str], tensors: tuple[Tensor | None, ...]) -> tuple[str, bool]:
    """The backend for a call of an op that has kernels in some backends, and whether the registered op leads there.

    Raises:
        BackendError: the backend chosen by name cannot serve the call.
    """
    if torch.compiler.is_compiling():
        strange, device = None, None
        for t in tensors:
            if t is not None:
                strange = strange or _strange(t)
                device = device or t.device
        kind, index = ("cpu", None) if device is None else (device.type, device.index)
        dtypes = tuple(_dtypes(tensors))
        first = False
        if kind == "cuda" and not torch.compiler.is_exporting():
            first = _triton_first(op, tensors[0], index)  # type: ignore[arg-type]
        backend, refused = _choose_at_trace_time(op, tuple(kernels), strange, kind, index, dtypes, first)
        if refused is not None:
            raise BackendError(refused)
        return backend, True
    if (
        (_chosen.get() or _default) in _QUICK
        and native is not None
        and "cpu" in kernels
        and _peek_transform() is None
        and not _count_modes()
        and _recording() is None
        and forward_ad._current_level < 0
        and native.ordinary(tensors)
    ):
        return "cpu", False  # nearly every call on a CPU; what follows finds out why not
    wanted = current()
    names: tuple[str, ...]
    if wanted == "auto":
        names = order(op, tensors[0])
    else:
        names = (wanted,)
    for name in names:
        if name == "reference":
            break
        reason = None if native is not None and name in kernels else missing(name, op, kernels)
        registered = False
        if reason is None:
            reason, registered = _examine(name, op, tensors)
        if reason is None:
            return name, registered
        if wanted != "auto":
            raise refused_by(name, op, reason)
    return "reference", False


def order(op: str, x: Tensor | None) -> tuple[str, ...]:
    """What auto tries for a call whose first tensor is x, one after the other."""
    if x is None or not x.is_cuda:
        return _FOR_CPU
    return _TRITON_FIRST if _triton_first(op, x, x.get_device()) else FOR_CUDA


def refused_by(name: str, op: str, reason: str) -> BackendError:
    return BackendError(f"{op}: backend {name} cannot serve this call: {reason}")


@constant
def _choose_at_trace_time(
    op: str,
    kernels: tuple[str, ...],
    strange: str | None,
    kind: str,
    index: int | None,
    dtypes: tuple[torch.dtype, ...],
    triton_first: bool = False,
) -> tuple[str, str | None]:
    """The backend, or why the one chosen by name cannot serve the call. The tracer can read neither a context variable
    nor the state of transforms."""
    wanted = current()
    names: tuple[str, ...] = (wanted,) if wanted != "auto" else _FOR_CPU
    if wanted == "auto" and kind == "cuda":
        names = _TRITON_FIRST if triton_first else FOR_CUDA
    for name in names:
        if name == "reference":
            break
        reason = missing(name, op, kernels) or strange or _examine(name, op, ())[0]
        reason = reason or misplaced(name, op, kind, index, dtypes)
        if reason is None:
            return name, None
        if wanted != "auto":
            return "", str(refused_by(name, op, reason))
    return "reference", None
