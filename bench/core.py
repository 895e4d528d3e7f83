"""The measuring: copy bandwidth, times of all providers in turn, memory kept for the backward, time of a tiny call."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from bench import gate
from bench.case import Case, Problem
from bench.device import COPY_BUFFER, CopyBandwidth, Device, clock, device_of
from bench.providers import Provider, TookTooLong, fresh_compiler, quiet, time_limit

MODES = ("forward", "backward", "forward+backward")
TINY_MODES = ("tiny, no gradient", "tiny, forward+backward")
# What a half row with a matrix product in it may take of the time of its float32 row; any other row is moved bytes.
HALF_PRODUCT = 1.15
IN_FLOAT32 = " in float32"  # behind the name of a provider
Turn = Callable[[str | None], None]


@dataclass(frozen=True)
class Settings:
    """How long to measure. A round is one call of every provider."""

    seconds: float = 8.0
    min_rounds: int = 5
    max_rounds: int = 100
    warm_up: int = 1
    tiny_calls: int = 200  # calls of a tiny input that one reading of the clock covers
    tiny_rounds: int = 25
    compile_seconds: float = 180.0
    copy_buffer: int = COPY_BUFFER


@dataclass
class Row:
    """One provider in one mode. Without times where ``error`` says why, or where there is no backward."""

    case: Case
    provider: Provider
    mode: str
    times: list[float] = field(default_factory=list)  # seconds, in the order of the rounds
    error: str | None = None
    ratio_to_eager: float | None = None  # how many times faster than eager; below 1: slower
    ratio_to_compile: float | None = None
    ratio_to_float32: float | None = None  # of a backend, to itself
    copy_bandwidth: float | None = None  # bytes a second
    bytes_moved: int | None = None  # by the model, not measured
    flops: int | None = None
    saved_bytes: int | None = None

    @property
    def percentiles(self) -> tuple[float, float, float] | None:
        return percentiles(self.times) if self.times else None

    @property
    def bandwidth(self) -> float | None:
        """Bytes a second: the bytes that have to be moved over the median."""
        return self.bytes_moved / self.percentiles[1] if self.percentiles and self.bytes_moved else None

    @property
    def multiple_of_floor(self) -> float | None:
        """The median over the time in which a copy moves those bytes."""
        return self.copy_bandwidth / self.bandwidth if self.copy_bandwidth and self.bandwidth else None

    @property
    def share_of_copy(self) -> float | None:
        """Bytes that have to be moved a second, over those that a copy moves."""
        return self.bandwidth / self.copy_bandwidth if self.copy_bandwidth and self.bandwidth else None

    @property
    def loss(self) -> bool:
        """A backend that is slower than eager. ``reference`` is a definition and not meant to win."""
        is_fast = self.provider.backend not in (None, "reference")
        return is_fast and self.ratio_to_eager is not None and self.ratio_to_eager < 1

    @property
    def half_loss(self) -> bool:
        """A backend that is slower with a half x than in float32, though half the bytes are to be moved."""
        is_fast = self.provider.backend not in (None, "reference")
        allowed = 1 / HALF_PRODUCT if self.flops else 1
        return is_fast and self.ratio_to_float32 is not None and self.ratio_to_float32 < allowed


def percentiles(times: list[float]) -> tuple[float, float, float]:
    """The 20th, the 50th and the 80th."""
    low, middle, high = np.percentile(times, (20, 50, 80))
    return float(low), float(middle), float(high)


def times_faster(times: list[float], baseline: list[float]) -> float | None:
    """The median over rounds of the ratio within a round: what slowed a whole round down does not count."""
    pairs = list(zip(baseline, times, strict=False))
    return float(np.median([base / own for base, own in pairs])) if pairs else None


def nobody(name: str | None) -> None:
    """Keeps no account of whose turn it is."""


def interleaved(
    steps: Mapping[str, Callable[[], Mapping[str, float]]], settings: Settings, turn: Turn = nobody
) -> dict[str, dict[str, list[float]]]:
    """Runs every step once a round (A B C A B C ...) and collects, by step and mode, the seconds that each reports."""
    readings: dict[str, dict[str, list[float]]] = {name: {} for name in steps}
    for _ in range(settings.warm_up):
        for name, step in steps.items():
            turn(name)
            step()
    start, rounds = clock(), 0
    while rounds < settings.min_rounds or (rounds < settings.max_rounds and clock() - start < settings.seconds):
        for name, step in steps.items():
            turn(name)
            for mode, seconds in step().items():
                readings[name].setdefault(mode, []).append(seconds)
        rounds += 1
    turn(None)
    return readings


class _Kept:
    """Stands for a saved tensor for as long as the graph does."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.detach()


def saved_bytes(function: Callable[[], object]) -> int:
    """Bytes kept for the backward of what ``function`` returns: the distinct storages behind tensors that were saved
    or that a Function's ctx holds, inputs and parameters included."""
    kept: weakref.WeakSet[_Kept] = weakref.WeakSet()

    def pack(tensor: Tensor) -> _Kept:
        holder = _Kept(tensor)
        kept.add(holder)
        return holder

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda holder: holder.tensor):
        outputs = gate.as_tuple(function())
    # Those of a graph that is gone already are gone from the set: they are not kept until the backward.
    found = [holder.tensor for holder in kept]
    pending = [out.grad_fn for out in outputs]
    seen = set()
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        pending += [following for following, _ in node.next_functions]
        found += _tensors_in(list(getattr(node, "__dict__", {}).values()))
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in found}
    return sum(storages.values())


def _tensors_in(value: object) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return [tensor for item in value for tensor in _tensors_in(item)]
    return []


def first_line(error: BaseException) -> str:
    """What fits into a table of an error."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


@dataclass
class Entrant:
    """A provider before one case: what passed, and what did not and why."""

    provider: Provider
    function: Callable[..., object]
    forward_error: str | None = None
    backward_error: str | None = None

    def error(self, mode: str) -> str | None:
        return self.forward_error or (self.backward_error if mode.endswith("backward") else None)


def admit(provider: Provider, problem: Problem, grads: list[Tensor], exact: gate.Results, limit: float) -> Entrant:
    """Let a provider compute everything once and compare it. A wrong number bars it from every time; an error in the
    backward leaves it the time of its forward, which was right."""
    entrant = Entrant(provider, provider.function(problem))
    found = gate.Results([])
    try:
        with quiet(), time_limit(limit, f"{provider.name}: first call"), provider.chosen():
            outputs = gate.as_tuple(entrant.function(*problem.inputs.values()))
            found.outputs = list(outputs)
            try:
                if problem.needs:
                    gradients = torch.autograd.grad(outputs, problem.wanted, grads)
                    found.gradients = dict(zip(problem.needs, gradients, strict=True))
            except (Exception, TookTooLong) as error:
                entrant.backward_error = first_line(error)
    except (Exception, TookTooLong) as error:
        entrant.forward_error = first_line(error)
        return entrant
    wrong = gate.check(provider.name, problem, found, exact)
    entrant.forward_error = None if wrong is None else f"wrong: {wrong}"
    return entrant


MOST_COPIES = 32


def in_turn(problem: Problem, between: int) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """The inputs, and those of them by which gradients are wanted, without an end: copies take turns, so many that
    ``between`` bytes of others are read before the same ones again. What the whole batch shares is in all of them."""
    own = [t.numel() * t.element_size() for name, t in problem.inputs.items() if name not in problem.shared]
    copies = min(MOST_COPIES, 1 + -(-between // max(1, sum(own)))) if between else 1
    sets = [problem.inputs]
    for _ in range(1, copies):
        made = {n: t if n in problem.shared else t.detach().clone() for n, t in problem.inputs.items()}
        for name in problem.needs:
            made[name].requires_grad_()
        sets.append(made)
    return itertools.cycle([(list(inputs.values()), [inputs[name] for name in problem.needs]) for inputs in sets])


def full_step(
    entrant: Entrant,
    problem: Problem,
    grads: list[Tensor],
    device: Device | None = None,
    turns: Iterator[tuple[list[Tensor], list[Tensor]]] | None = None,
) -> Callable[[], dict[str, float]]:
    """One forward and one backward with the clock read between: both, and their sum, are of the same call. ``turns``
    is one for all who are timed in the same rounds: nobody finds what the one before has just read."""
    where = device or device_of("cpu")
    turns = turns or in_turn(problem, 0)
    backward = bool(problem.needs) and entrant.backward_error is None

    def step() -> dict[str, float]:
        inputs, wanted = next(turns)
        with entrant.provider.chosen():
            where.prepare()
            start = where.mark()
            outputs = entrant.function(*inputs)
            middle = where.mark()
            if not backward:
                return {"forward": where.seconds(start, middle)[0]}
            gradients = torch.autograd.grad(gate.as_tuple(outputs), wanted, grads)
            end = where.mark()
        first, second = where.seconds(start, middle, end)
        del gradients
        return {"forward": first, "backward": second, "forward+backward": first + second}

    return step


def tiny_step(
    entrant: Entrant, problem: Problem, grads: list[Tensor], calls: int, device: Device | None = None
) -> Callable[[], dict[str, float]]:
    """Seconds a call where there is hardly anything to compute, without gradients and with them."""
    inputs, wanted, function = list(problem.inputs.values()), problem.wanted, entrant.function
    backward = bool(wanted) and entrant.backward_error is None
    finish = (device or device_of("cpu")).finish

    def step() -> dict[str, float]:
        with entrant.provider.chosen():
            finish()
            with torch.no_grad():
                start = clock()
                for _ in range(calls):
                    function(*inputs)
                finish()
                found = {TINY_MODES[0]: (clock() - start) / calls}
            if backward:
                start = clock()
                for _ in range(calls):
                    torch.autograd.grad(gate.as_tuple(function(*inputs)), wanted, grads)
                finish()
                found[TINY_MODES[1]] = (clock() - start) / calls
        return found

    return step


def modes_of(case: Case, tiny: bool) -> list[str]:
    """The modes in which a case has a row."""
    return [mode for mode in (TINY_MODES if tiny else MODES) if case.needs or not mode.endswith("backward")]


def twin_steps(
    twin: Case, entrants: list[Entrant], limit: float, turn: Turn, device: Device
) -> dict[str, Callable[[], dict[str, float]]]:
    """What the same backends do with the twin of a case, to be timed in the same rounds."""
    problem = twin.made(device.name)
    exact, grads = gate.exact_results(problem)
    steps, turns = {}, in_turn(problem, device.cold)
    for entrant in entrants:
        if entrant.provider.backend is None or entrant.forward_error is not None:
            continue
        turn(entrant.provider.name)
        own = admit(entrant.provider, problem, grads, exact, limit)
        if own.forward_error is None:
            steps[entrant.provider.name + IN_FLOAT32] = full_step(own, problem, grads, device, turns)
    turn(None)
    return steps


def measure(
    case: Case,
    providers: list[Provider],
    settings: Settings,
    copy: CopyBandwidth | None = None,
    tiny: bool = False,
    turn: Turn = nobody,
    twin: Case | None = None,
    device: str = "cpu",
) -> list[Row]:
    """All rows of a case. With ``tiny`` the microseconds of a call instead of bandwidth and memory.

    ``turn`` is told before every call whose code is about to run, and None where it is only ours. ``twin`` is the same
    case in float32: with it the backends run that in the same rounds as well, for the ratio."""
    if any(provider.name == "compile" for provider in providers):
        fresh_compiler(device)
    where = device_of(device)
    problem = case.made(device)
    exact, grads = gate.exact_results(problem)
    entrants = []
    for provider in providers:
        turn(provider.name)
        entrants.append(admit(provider, problem, grads, exact, settings.compile_seconds))
    del exact
    steps, saved = {}, {}
    turns = in_turn(problem, 0 if tiny else where.cold)
    for entrant in entrants:
        if entrant.forward_error is not None:
            continue
        name = entrant.provider.name
        turn(name)
        if tiny:
            step = tiny_step(entrant, problem, grads, settings.tiny_calls, where)
        else:
            step = full_step(entrant, problem, grads, where, turns)
        try:
            # The compiler makes another graph where gradients are off.
            with quiet(), time_limit(settings.compile_seconds, f"{name}: first calls"):
                step()
            if not tiny and problem.needs:
                with entrant.provider.chosen():
                    saved[name] = saved_bytes(lambda e=entrant: e.function(*problem.inputs.values()))  # type: ignore[misc]
        except (Exception, TookTooLong) as error:
            entrant.forward_error = first_line(error)
            continue
        steps[name] = step
    if tiny:
        settings = Settings(0.0, settings.tiny_rounds, settings.tiny_rounds, settings.warm_up)
    turn(None)
    if twin is not None:
        steps |= twin_steps(twin, entrants, settings.compile_seconds, turn, where)
    copies = copy() if copy else []
    readings = interleaved(steps, settings, lambda name: turn(name and name.removesuffix(IN_FLOAT32)))
    copies += copy() if copy else []
    bandwidth = copy.of(copies) if copy else None

    rows = []
    for entrant in entrants:
        own = readings.get(entrant.provider.name, {})
        for mode in modes_of(case, tiny):
            row = Row(case, entrant.provider, mode, own.get(mode, []), entrant.error(mode))
            if row.times and entrant.provider.name != "eager":
                row.ratio_to_eager = times_faster(row.times, readings.get("eager", {}).get(mode, []))
            if row.times and entrant.provider.name not in ("eager", "compile"):
                row.ratio_to_compile = times_faster(row.times, readings.get("compile", {}).get(mode, []))
            row.ratio_to_float32 = times_faster(
                row.times, readings.get(entrant.provider.name + IN_FLOAT32, {}).get(mode, [])
            )
            if not tiny:
                row.copy_bandwidth = bandwidth
                row.bytes_moved, row.flops = problem.traffic.of(mode)
                row.saved_bytes = saved.get(entrant.provider.name)
            rows.append(row)
    return rows
