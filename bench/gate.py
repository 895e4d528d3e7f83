"""No time without the right result: every provider is compared with the definition, in float64, before it is timed.

The bound, element by element, for results and gradients:

    |result - exact| <= u_out |exact| + 64 u_acc max|exact| + smallest subnormal

with the unit roundoff u_out of the result's dtype and u_acc of the dtype in which sums are held: for m3em_fast float32
beside half (float64 for float64); for eager and torch.compile the lowest dtype of the inputs, because torch's functions
round to half between each other, and so for the whole module, whose ops do. Where a half operand of a matrix product or
a half factor is rounded on the way to a half result (``Problem.rounds``), 4 u_half max|exact| more. For a module
max|exact| of a gradient is taken over the parameters of one of its parts. The largest use seen of the 64 is 9 in
float32 and 20 in half, both in the module.

The tests' bound (tests/exact.py) is the sharper one and the judge of a kernel. This one is cheap enough for inputs of
full size, and catches a channel left out, a wrong window and a row that was not written.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from bench.case import Outputs, Problem
from bench.providers import BASELINES, choose

ROUNDINGS = 64
CHUNK = 2**22  # elements of the largest input that are looked at together


@dataclass
class Results:
    """The outputs of a call and its gradients by the inputs that need one."""

    outputs: list[Tensor]
    gradients: dict[str, Tensor] = field(default_factory=dict)


def as_tuple(outputs: object) -> Outputs:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)  # type: ignore[arg-type]


def exact_results(problem: Problem) -> tuple[Results, list[Tensor]]:
    """The definition in float64, and the random gradients of the outputs with which it and everybody goes backward.

    A few samples at a time: all of them at once would take several times the memory of what is measured."""
    function = problem.exact or problem.fast
    source = torch.Generator().manual_seed(1)
    batch = next(tensor.shape[0] for name, tensor in problem.inputs.items() if name not in problem.shared)
    largest = max(tensor.numel() for name, tensor in problem.inputs.items() if name not in problem.shared)
    step = max(1, CHUNK * batch // largest)
    grads: list[Tensor] = []
    outputs: list[list[Tensor]] = []
    gradients: dict[str, list[Tensor]] = {name: [] for name in problem.needs}
    for start in range(0, batch, step):
        part = slice(start, start + step)
        leaves = {
            name: (tensor if name in problem.shared else tensor[part]).detach().double()
            for name, tensor in problem.inputs.items()
        }
        for name in problem.needs:
            leaves[name].requires_grad_()
        with choose("reference"):
            found = as_tuple(function(*leaves.values()))
        if not grads:
            drawn = [torch.randn(batch, *out.shape[1:], generator=source) for out in found]
            grads = [grad.to(out.device, problem.result_dtype) for grad, out in zip(drawn, found, strict=True)]
        outputs.append([out.detach() for out in found])
        if not problem.needs:
            continue
        wanted = [leaves[name] for name in problem.needs]
        derived = torch.autograd.grad(found, wanted, [grad[part].double() for grad in grads])
        for name, gradient in zip(problem.needs, derived, strict=True):
            if name in problem.shared and gradients[name]:
                gradients[name][0] += gradient
            else:
                gradients[name].append(gradient)
    whole = Results([torch.cat(parts) for parts in zip(*outputs, strict=True)])
    whole.gradients = {name: torch.cat(parts) for name, parts in gradients.items()}
    return whole, grads


def complaint(
    what: str, result: Tensor, exact: Tensor, largest: float, accumulation: torch.dtype, operands: bool = False
) -> str | None:
    """Why ``result`` is not ``exact`` within the bound, in which ``largest`` stands for max|exact|; or None.

    With ``operands`` a half result may have had a factor rounded to its dtype."""
    if result.shape != exact.shape:
        return f"{what} has shape {tuple(result.shape)}, wanted {tuple(exact.shape)}"
    if exact.numel() == 0:
        return None
    own = torch.finfo(result.dtype)
    fixed = ROUNDINGS * torch.finfo(accumulation).eps / 2 * largest + own.smallest_normal * own.eps
    if operands and result.dtype in (torch.float16, torch.bfloat16):
        fixed += 4 * own.eps / 2 * largest
    error = result.detach().double().sub_(exact).abs_()
    allowed = exact.abs().mul_(own.eps / 2).add_(fixed)
    wrong = ~(error <= allowed)  # so that a NaN is wrong as well
    count = int(wrong.sum())
    if not count:
        return None
    worst = int(torch.where(wrong, error.nan_to_num(nan=float("inf")), 0).argmax())
    off, limit = error.flatten()[worst].item(), allowed.flatten()[worst].item()
    return f"{what}: {count} of {exact.numel()} elements are wrong, one by {off:.3g} where {limit:.3g} is allowed"


def check(provider: str, problem: Problem, found: Results, exact: Results) -> str | None:
    """The first thing that is wrong with what a provider found, or None."""
    used = max((tensor.dtype for tensor in problem.inputs.values()), key=lambda dtype: torch.finfo(dtype).eps)
    is_half = used in (torch.float16, torch.bfloat16)
    rounds_between = provider in BASELINES or problem.rounds == "between"
    accumulation = torch.float32 if is_half and not rounds_between else used
    if len(found.outputs) != len(exact.outputs):
        return f"gave {len(found.outputs)} results, wanted {len(exact.outputs)}"
    for out in found.outputs:
        if out.dtype != problem.result_dtype:
            return f"the result is {out.dtype}, wanted {problem.result_dtype}"
    # What is left of a small layer's gradient after cancellation says nothing of what was summed: the parameters of one
    # part of a module (smr.*, cmc.*) have their largest gradient in common.
    largest: dict[str, float] = {}
    for name, gradient in exact.gradients.items():
        part = name.split(".")[0]
        largest[part] = max(largest.get(part, 0.0), gradient.abs().max().item())
    triples = [
        ("the result", own, wanted, wanted.abs().max().item())
        for own, wanted in zip(found.outputs, exact.outputs, strict=True)
    ]
    triples += [
        (f"the gradient by {name}", own, exact.gradients[name], largest[name.split(".")[0]])
        for name, own in found.gradients.items()
    ]
    reasons = (complaint(*triple, accumulation, problem.rounds == "operands") for triple in triples)
    return next((reason for reason in reasons if reason is not None), None)
