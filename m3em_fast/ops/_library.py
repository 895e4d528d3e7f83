"""The ops as ``torch.library`` knows them: what ``torch.compile``, ``torch.export``, meta and fake tensors go through.

Eager mode calls the kernels directly, for the boundary of a registered op costs more than a small kernel does. Both
ways lead to the same ``Kernels``. A graph with these ops runs where ``m3em_fast`` is imported.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from m3em_fast import backends
from m3em_fast.ops._checks import FLOATS
from m3em_fast.ops._cpu import Form

if TYPE_CHECKING:
    from m3em_fast.ops._function import Kernels, Op

_library = torch.library.Library("m3em_fast", "DEF")


# A schema has no dtypes: AOTInductor of torch 2.7 writes one number into a program and reads it as another dtype.
_WRITTEN = {dtype: str(dtype).removeprefix("torch.") for dtype in FLOATS}
_READ = {name: dtype for dtype, name in _WRITTEN.items()}


def written(option: Any) -> Any:
    """An option as a schema has it: a dtype by its name."""
    return _WRITTEN[option] if isinstance(option, torch.dtype) else option


def read(options: Sequence[Any]) -> tuple:
    """The options behind what a registered op is called with."""
    return tuple(_READ[option] if isinstance(option, str) else option for option in options)


class Registered:
    """``m3em_fast::_<op>`` and ``m3em_fast::_<op>_backward``, made of an ``Op``.

    The backward takes what its forward took, and between the tensors and the options: the forward's statistics and the
    forms of the inputs that are not read. It returns the needed gradients alone.
    """

    def __init__(self, op: Op) -> None:
        self.op = op
        arguments, results = op.schema[1:].split(") -> ")
        names = arguments.split(", ")
        tensors = [name for name in names if name.startswith("Tensor")]
        options = names[len(tensors) : -1]
        kinds = [name.split()[0] for name in tensors]
        self.count = len(tensors)
        # Where in the signature the one list of tensors stands, and how many tensors come after it.
        self.list_at = kinds.index("Tensor[]") if "Tensor[]" in kinds else None
        self.after = 0 if self.list_at is None else len(kinds) - self.list_at - 1
        self.saves = results != "Tensor"

        # An input that the backward does not read is None there.
        optional = ["Tensor?" + name.removeprefix("Tensor").removeprefix("?") for name in tensors]
        wanted = ", ".join(
            ["Tensor grad", *optional, "Tensor[] saved", "SymInt[] forms", *options, "bool[] needs", "str backend"]
        )
        self.forward = self._define(f"_{op.name}", op.schema, self._forward, self._fake_forward)
        self.backward = self._define(
            f"_{op.name}_backward", f"({wanted}) -> Tensor[]", self._backward, self._fake_backward
        )
        torch.library.register_autograd(
            f"m3em_fast::_{op.name}", self._formula, setup_context=self._setup, lib=_library
        )
        torch.library.register_autograd(f"m3em_fast::_{op.name}_backward", self._no_formula, lib=_library)

    @staticmethod
    def _define(name: str, schema: str, real: Any, fake: Any) -> Any:
        _library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        for key in ("CPU", "CUDA"):
            _library.impl(name, real, key)
        torch.library.register_fake(f"m3em_fast::{name}", fake, lib=_library)
        return getattr(torch.ops.m3em_fast, name).default

    def __call__(self, options: tuple, tensors: Sequence[Tensor | None], backend: str) -> Tensor:
        out = self.forward(*self._grouped(tensors), *[written(option) for option in options], backend)
        return out[0] if self.saves else out

    def _grouped(self, tensors: Sequence[Any]) -> list:
        """A flat sequence, one entry a tensor, as the schema has it."""
        if self.list_at is None:
            return list(tensors)
        stop = len(tensors) - self.after
        return [*tensors[: self.list_at], list(tensors[self.list_at : stop]), *tensors[stop:]]

    def _flat(self, grouped: Sequence[Any]) -> list:
        if self.list_at is None:
            return list(grouped)
        return [*grouped[: self.list_at], *grouped[self.list_at], *grouped[self.list_at + 1 :]]

    def _kernels(self, backend: str, first: Tensor) -> Kernels:
        """A program made elsewhere may name a backend that is not here, or have been moved to another device."""
        name, device = self.op.name, first.device
        reason = backends.missing(backend, name, self.op.kernels)
        reason = reason or backends.misplaced(backend, name, device.type, device.index, (first.dtype,))
        if reason is not None:
            raise backends.refused_by(backend, name, reason)
        return self.op.kernels[backend]

    def _forward(self, *arguments: Any) -> Any:
        tensors = tuple(self._flat(arguments[: self.count]))
        out, extra = self._kernels(arguments[-1], tensors[0]).forward(read(arguments[self.count : -1]), tensors, True)
        return (out, *extra) if self.saves else out

    def _fake_forward(self, *arguments: Any) -> Any:
        tensors = tuple(self._flat(arguments[: self.count]))
        kernels = self._kernels(arguments[-1], tensors[0])
        out, extra = kernels.form(read(arguments[self.count : -1]), tensors)
        return (out, *extra) if self.saves else out

    def _setup(self, ctx: Any, inputs: tuple, output: Any) -> None:
        tensors = self._flat(inputs[: self.count])
        needs = ctx.needs_input_grad[: len(tensors)]
        kept = list(tensors)
        forms: list[int] = []
        for i, (t, read) in enumerate(zip(tensors, self.op.reads(needs), strict=True)):
            if t is not None and not read:
                kept[i] = None
                forms += [i, FLOATS.index(t.dtype), t.dim(), *t.shape, *t.stride()]
        extra = output[1:] if self.saves else ()
        ctx.call = needs, forms, inputs[self.count :]
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*extra)
        ctx.save_for_backward(*kept, *extra)

    def _formula(self, ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple:
        needs, forms, rest = ctx.call
        grads: list[Tensor | None] = [None] * len(needs)
        if grad is not None:
            kept, extra = ctx.saved_tensors[: len(needs)], ctx.saved_tensors[len(needs) :]
            *options, backend = rest
            made = iter(self.backward(grad, *self._grouped(kept), list(extra), forms, *options, list(needs), backend))
            grads = [next(made) if need else None for need in needs]
        return (*self._grouped(grads), *(None for _ in rest))

    def _backward_arguments(self, grad: Tensor, arguments: tuple) -> tuple:
        """The inputs, forms in the place of those not kept; and everything behind them."""
        tensors = self._flat(arguments[: self.count])
        saved, forms, *options, needs, backend = arguments[self.count :]
        for i, form in _forms(forms, grad.device):
            tensors[i] = form
        return tuple(tensors), saved, read(options), needs, backend

    def _backward(self, grad: Tensor, *arguments: Any) -> list[Tensor]:
        tensors, saved, options, needs, backend = self._backward_arguments(grad, arguments)
        grads = self._kernels(backend, grad).backward(options, grad, tensors, saved, needs)
        return [g for g, need in zip(grads, needs, strict=True) if need and g is not None]

    def _fake_backward(self, grad: Tensor, *arguments: Any) -> list[Tensor]:
        tensors, _, _, needs, _ = self._backward_arguments(grad, arguments)
        grads = self.op.gradients(tensors, needs)
        return [g for g in grads if g is not None]

    def _no_formula(self, ctx: Any, *grads: Any) -> None:
        raise RuntimeError(
            f"{self.op.name}: double backward works in eager mode only, not under torch.compile or torch.export."
        )


def _forms(forms: Sequence[int], device: torch.device) -> Iterator[tuple[int, Form]]:
    """The position and the form, on a device, of every input that the backward does not read."""
    start = 0
    while start < len(forms):
        i, dtype, dim = forms[start : start + 3]
        middle = start + 3 + dim
        shape, stride = forms[start + 3 : middle], forms[middle : middle + dim]
        form = Form(torch.empty_strided(shape, stride, dtype=FLOATS[dtype], device="meta"))
        form.device = device
        yield i, form
        start = middle + dim
