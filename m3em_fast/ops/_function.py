"""From kernels to a differentiable op: one forward, one backward, and a second derivative from the reference."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from m3em_fast import backends
from m3em_fast.ops._cpu import Form, gradients_of
from m3em_fast.ops._library import Registered

# A tuple of tensors in the order of the op's signature, None for an optional one that is not given. Typed as Any, for
# a checker cannot know which of them may be None.
Tensors = tuple[Any, ...]


@dataclass(frozen=True)
class Kernels:
    """What one backend brings for one op. ``options`` are the op's arguments that are no tensors.

    Attributes:
        forward: (options, tensors, saves) -> the result, and what the backward will need besides the inputs (nothing
            where ``saves`` is False).
        backward: (options, gradient, tensors, saved, needs) -> one gradient for every tensor, None where ``needs`` is
            False. The gradient may come with any strides, 0 included. In the place of an input that is not read there
            stands its :class:`Form`, without memory.
        form: (options, tensors) -> what a forward that saves returns, in memory that nothing is written to. For meta
            and fake tensors, so without a look at values or addresses.
        refuses: (options, tensors) -> why these kernels cannot serve a call that their backend could, or None. Without
            options it asks for the op's defaults. Not there where they serve every call.
    """

    forward: Callable[[tuple, Tensors, bool], tuple[Tensor, Sequence[Tensor]]]
    backward: Callable[[tuple, Tensor, Tensors, Sequence[Tensor], Sequence[bool]], Sequence[Tensor | None]]
    form: Callable[[tuple, Tensors], tuple[Tensor, Sequence[Tensor]]]
    refuses: Callable[[tuple, Sequence[Any]], str | None] | None = None


@dataclass(frozen=True, eq=False)
class Op:
    """One op: its name, its definition and its kernels.

    Attributes:
        reference: (options, tensors) -> the result, made of differentiable torch functions.
        reads: needs -> which inputs the backward reads when it makes the needed gradients. The others are not kept:
            the op is linear in them, so that their values are in none of these gradients.
        kernels: backend -> kernels.
        schema: arguments and results of the registered op ``m3em_fast::_<name>``: tensors (one list of them at most),
            then the options, then ``str backend``; a tensor, or a tuple of the result and what a forward saves.
        gradients: (tensors, needs) -> the gradients as the backward of any kernels makes them, without values; None
            where they are not needed. For fake tensors, like ``Kernels.form``.
    """

    name: str
    reference: Callable[[tuple, Tensors], Tensor]
    reads: Callable[[Sequence[bool]], Sequence[bool]]
    kernels: Mapping[str, Kernels]
    schema: str
    gradients: Callable[[Tensors, Sequence[bool]], Sequence[Tensor | None]] = gradients_of
    registered: Registered = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "registered", Registered(self))
        backends.KERNELS[self.name] = self.kernels

    def __call__(self, options: tuple, *tensors: Tensor | None) -> Tensor:
        backend, registered = backends.choose(self.name, self.kernels, tensors)
        if backend == "reference":
            return self.reference(options, tensors)
        kernels = self.kernels[backend]
        if kernels.refuses is not None and (reason := kernels.refuses(options, tensors)) is not None:
            if backends.chosen_by_name():
                raise backends.refused_by(backend, self.name, reason)
            return self.reference(options, tensors)
        if registered:
            return self.registered(options, tensors, backend)
        if torch.is_grad_enabled():
            for t in tensors:
                if t is not None and t.requires_grad:
                    return _Apply.apply(self, options, backend, *tensors)
        return kernels.forward(options, tensors, False)[0]


class _Call:
    """What a backward has to know of its forward, besides the tensors that are saved."""

    __slots__ = ("backend", "forms", "kept", "needs", "op", "options")

    def __init__(self, op: Op, options: tuple, backend: str, tensors: Tensors, needs: Sequence[bool]) -> None:
        self.op, self.options, self.backend, self.needs = op, options, backend, needs
        self.kept = [t is not None and read for t, read in zip(tensors, op.reads(needs), strict=True)]
        self.forms = [None if t is None or keep else Form(t) for t, keep in zip(tensors, self.kept, strict=True)]

    def inputs(self, saved: Sequence[Tensor]) -> tuple[list, Sequence[Tensor]]:
        """The inputs, forms in the place of those not kept, and the rest of ``saved``."""
        rest = iter(saved)
        tensors = [next(rest) if keep else form for keep, form in zip(self.kept, self.forms, strict=True)]
        return tensors, list(rest)

    def backward(self, grad: Tensor, saved: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
        inputs, extra = self.inputs(saved)
        if grad._is_zerotensor():  # it has a shape but no memory
            grad = grad.clone()
        return tuple(self.op.kernels[self.backend].backward(self.options, grad, tuple(inputs), extra, self.needs))

    def by_reference(
        self, grad: Tensor, saved: Sequence[Tensor], differentiable: bool
    ) -> tuple[list, list[Tensor | None]]:
        """The inputs, and the gradients by them as the reference makes them, if so with a graph of their own."""
        inputs, _ = self.inputs(saved)
        for i, (t, keep) in enumerate(zip(inputs, self.kept, strict=True)):
            if keep:  # an alias: differentiation stops at it, and stays connected to what made the tensor behind it
                inputs[i] = t.view_as(t)
            elif t is not None:  # any value does, for the gradients do not depend on it
                stand_in = torch.zeros((), dtype=t.dtype, device=t.device).expand(t.shape)
                inputs[i] = stand_in.requires_grad_(self.needs[i])
        wanted = [t for t, need in zip(inputs, self.needs, strict=True) if need]
        out = self.op.reference(self.options, tuple(inputs))
        first = iter(torch.autograd.grad(out, wanted, grad, create_graph=differentiable, allow_unused=True))
        return inputs, [next(first) if need else None for need in self.needs]


class _Apply(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, op: Op, options: tuple, backend: str, *tensors: Tensor | None) -> Tensor:
        out, extra = op.kernels[backend].forward(options, tensors, True)
        # The backward may run in another thread, with another choice of backends in force: this one is kept.
        ctx.call = call = _Call(op, options, backend, tensors, ctx.needs_input_grad[3:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*[t for t, keep in zip(tensors, call.kept, strict=True) if keep], *extra)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple:
        if grads[0] is None:
            return (None,) * len(ctx.needs_input_grad)
        reason = backends.transformed(grads[0])
        if reason is not None:  # is_grads_batched, a tangent of the gradient: what no kernel can read
            if backends.chosen_by_name():
                raise backends.refused_by(ctx.call.backend, f"gradient of {ctx.call.op.name}", reason)
            differentiable = torch.is_grad_enabled()
            with torch.enable_grad():
                _, first = ctx.call.by_reference(grads[0], ctx.saved_tensors, differentiable)
            return (None, None, None, *first)
        if torch.is_grad_enabled():  # create_graph=True: this backward is to be differentiated itself
            return (None, None, None, *_Backward.apply(ctx.call, grads[0], *ctx.saved_tensors))
        return (None, None, None, *ctx.call.backward(grads[0], ctx.saved_tensors))


class _Backward(torch.autograd.Function):
    """The backward kernel as a function of its own, so that it can be differentiated once more."""

    @staticmethod
    def forward(ctx: Any, call: _Call, grad: Tensor, *saved: Tensor) -> tuple[Tensor | None, ...]:
        ctx.call = call
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(grad, *saved[: sum(call.kept)])
        return call.backward(grad, saved)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple:
        call: _Call = ctx.call
        grad, *saved = ctx.saved_tensors
        with torch.enable_grad():
            grad = grad.view_as(grad)
            inputs, first = call.by_reference(grad, saved, True)
            pairs = [(f, g) for f, g in zip(first, grads, strict=True) if f is not None and g is not None]
            pairs = [(f, g) for f, g in pairs if f.requires_grad]
            leaves = [grad, *(t for t, keep in zip(inputs, call.kept, strict=True) if keep)]
            leaves = [t for t in leaves if t.requires_grad]
            second: dict[int, Tensor | None] = {}
            if pairs and leaves:
                outputs, incoming = zip(*pairs, strict=True)
                results = torch.autograd.grad(
                    outputs, leaves, incoming, create_graph=torch.is_grad_enabled(), allow_unused=True
                )
                second = {id(leaf): result for leaf, result in zip(leaves, results, strict=True)}
        mine = [second.get(id(grad)), *(second.get(id(t)) for t, keep in zip(inputs, call.kept, strict=True) if keep)]
        return (None, *mine, *(None,) * (len(ctx.needs_input_grad) - 1 - len(mine)))
