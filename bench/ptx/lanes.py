"""How bench/ptx/machine.py runs what moves numbers between registers, and between lanes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from bench.ptx.code import Instruction, Operand
from bench.ptx.memory import SHARED, Fault
from bench.ptx.values import DTYPES, comparison, unknown

if TYPE_CHECKING:
    from bench.ptx.machine import Machine, Mask, Run

__all__ = ["address_space", "compare", "move", "shuffle", "vote"]

WARP = 32


def move(machine: Machine, at: int, i: Instruction) -> Run:
    to, operand = i.operands[0], i.operands[1]
    if isinstance(to, tuple):
        return _split(machine, i, to, operand)
    if isinstance(operand, tuple):
        return _join(machine, i, to, operand)
    source, target = machine.source(i, operand, i.type), machine.target(i, to, i.type)
    return lambda mask: target(source(), mask)


def _part(i: Instruction, count: int) -> str:
    type = f"b{int(i.type[1:]) // count}"
    if type not in DTYPES:
        raise unknown(i)
    return type


def _split(machine: Machine, i: Instruction, to: tuple[Operand, ...], operand: Operand) -> Run:
    part = _part(i, len(to))
    whole = machine.source(i, operand, i.type)
    targets = [machine.target(i, each, part) for each in to]

    def run(mask: Mask) -> None:
        held: Any = np.ascontiguousarray(np.broadcast_to(whole(), machine.lanes)).view(DTYPES[part])
        columns = held.reshape(machine.lanes, -1).copy()
        for column, target in enumerate(targets):
            target(columns[:, column], mask)

    return run


def _join(machine: Machine, i: Instruction, to: Operand, operands: tuple[Operand, ...]) -> Run:
    part = _part(i, len(operands))
    sources = [machine.source(i, each, part) for each in operands]
    target = machine.target(i, to, i.type)

    def run(mask: Mask) -> None:
        held: Any = np.empty((machine.lanes, len(sources)), dtype=DTYPES[part])
        for column, source in enumerate(sources):
            held[:, column] = source()
        target(held.view(DTYPES[i.type]).reshape(-1), mask)

    return run


def compare(machine: Machine, at: int, i: Instruction) -> Run:
    relation = comparison(i)
    combined = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}
    with_other = len(i.modifiers) == 3
    if len(i.modifiers) > 3 or (with_other and i.modifiers[1] not in combined):
        raise unknown(i)
    first, second = (machine.source(i, operand, i.type) for operand in i.operands[1:3])
    both = i.operands[0] if isinstance(i.operands[0], tuple) else (i.operands[0],)
    targets = [machine.target(i, each, "pred") for each in both]
    other = machine.source(i, i.operands[3], "pred") if with_other else None

    def run(mask: Mask) -> None:
        found = relation(first(), second())
        ways = [found, ~found][: len(targets)]
        if other is not None:
            known = other()
            ways = [combined[i.modifiers[1]](way, known) for way in ways]
        for target, way in zip(targets, ways, strict=True):
            target(way, mask)

    return run


def address_space(machine: Machine, at: int, i: Instruction) -> Run:
    space, back = i.modifiers[-2], i.modifiers[0] == "to"
    if space not in ("shared", "global", "param", "const"):
        raise unknown(i)
    source, target = machine.source(i, i.operands[1], i.type), machine.target(i, i.operands[0], i.type)
    shift = np.array([SHARED if space == "shared" else 0], dtype=np.uint64)
    return lambda mask: target(source() - shift if back else source() + shift, mask)


def shuffle(machine: Machine, at: int, i: Instruction) -> Run:
    if i.modifiers[0] != "sync" or i.modifiers[1] not in ("bfly", "idx", "up", "down"):
        raise unknown(i)
    way, first = i.modifiers[1], i.operands[0]
    to, ok = (first[0], first[1]) if isinstance(first, tuple) else (first, None)
    target, held = machine.target(i, to, "b32"), None if ok is None else machine.target(i, ok, "pred")
    value, other, clamp = (machine.source(i, operand, "b32") for operand in i.operands[1:4])
    lane = machine.registers["%laneid"].astype(np.int64)
    base = np.arange(machine.lanes) - lane

    def run(mask: Mask) -> None:
        by, control = (np.broadcast_to(each(), machine.lanes).astype(np.int64) for each in (other, clamp))
        segment, bound = control >> 8 & 31, control & 31
        lowest, highest = lane & segment, (lane & segment) | (bound & ~segment)
        source = {"up": lane - (by & 31), "down": lane + (by & 31), "bfly": lane ^ (by & 31)}.get(way)
        if source is None:
            source = lowest | (by & 31 & ~segment)
        inside = source >= highest if way == "up" else source <= highest
        source = np.where(inside, source, lane)
        if not mask[(base + source)[mask]].all():
            raise Fault(f"{machine.kernel.name}: {i.text!r} reads a lane that is not there.")
        target(np.broadcast_to(value(), machine.lanes)[base + source], mask)
        if held is not None:
            held(inside, mask)

    return run


def vote(machine: Machine, at: int, i: Instruction) -> Run:
    how = "ballot" if i.op == "activemask" else i.modifiers[1]
    if how not in ("ballot", "any", "all"):
        raise unknown(i)
    target = machine.target(i, i.operands[0], "b32" if how == "ballot" else "pred")
    held = None if i.op == "activemask" else machine.source(i, i.operands[1], "pred")

    def run(mask: Mask) -> None:
        yes = mask if held is None else mask & (~held() if how == "all" else held())
        bits = (yes.reshape(-1, WARP).astype(np.uint64) << np.arange(WARP, dtype=np.uint64)).sum(axis=1)
        found = np.repeat(bits.astype(np.uint32), WARP)
        target(found if how == "ballot" else (found != 0) == (how == "any"), mask)

    return run
