"""How bench/ptx/machine.py runs what reads and writes memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from bench.ptx.code import Address, Instruction, Operand
from bench.ptx.memory import SHARED, Fault
from bench.ptx.values import dtype_of, unknown

if TYPE_CHECKING:
    from bench.ptx.machine import Machine, Mask, Run

__all__ = ["Copies", "access", "copy", "matrix"]

WARP = 32
# How a cache is used and who sees it: nothing that changes what is read.
_HINTS = {"nc", "volatile", "relaxed", "ca", "cg", "cs", "cv", "lu", "wb", "wt", "gpu", "cta", "sys", "v2", "v4"}


def _where(machine: Machine, i: Instruction, operand: Operand, space: str) -> Callable[[Any], Any]:
    """Generic addresses of some lanes."""
    if not isinstance(operand, Address):
        raise unknown(i)
    register = machine.registers.get(operand.base)
    base = machine.source(i, operand.base or 0, "u64" if register is None else f"u{8 * register.dtype.itemsize}")
    offset = np.uint64((operand.offset + (SHARED if space == "shared" else 0)) % (1 << 64))
    return lambda lanes: np.broadcast_to(base(), machine.lanes)[lanes].astype(np.uint64) + offset


def access(machine: Machine, at: int, i: Instruction) -> Run:
    space = next((word for word in i.modifiers if word in ("global", "shared", "param", "const")), "")
    rest = {word for word in i.modifiers[:-1] if word != space and not word.startswith(("L1::", "L2::"))}
    if rest - _HINTS:
        raise unknown(i)
    loads = i.op == "ld"
    many = i.operands[0 if loads else 1]
    parts = many if isinstance(many, tuple) else (many,)
    dtype = np.dtype(dtype_of(i, i.type))
    where = _where(machine, i, i.operands[1 if loads else 0], space)
    size, what = dtype.itemsize * len(parts), f"{machine.kernel.name}: {i.text!r}"
    memory, tally, everywhere = machine.memory, machine.tally, machine.lanes
    if loads:
        targets = [machine.target(i, part, i.type) for part in parts]
    else:
        sources = [machine.source(i, part, i.type) for part in parts]

    def run(mask: Mask) -> None:
        lanes = np.flatnonzero(mask)
        places = where(lanes)
        if loads:
            found = memory.load(places, dtype, len(parts), what)
            whole = np.empty(everywhere, dtype=dtype)
            for column, target in enumerate(targets):
                whole[lanes] = found[:, column]
                target(whole, mask)
        else:
            values = np.empty((len(lanes), len(parts)), dtype=dtype)
            for column, source in enumerate(sources):
                values[:, column] = np.broadcast_to(source(), everywhere)[lanes]
            memory.store(places, values, what)
        tally.access(at, places, lanes // WARP, lanes % WARP, size)

    return run


def matrix(machine: Machine, at: int, i: Instruction) -> Run:
    """ldmatrix and stmatrix: of 8x8 numbers of 16 bits, whose rows lie where eight lanes of a warp say."""
    loads, across = i.op == "ldmatrix", "trans" in i.modifiers
    shape = [word for word in i.modifiers if word not in ("trans", "cta")]
    if shape[:3] != ["sync", "aligned", "m8n8"] or shape[3] not in ("x1", "x2", "x4") or shape[4:] != ["shared", "b16"]:
        raise unknown(i)
    many, memory = i.operands[0 if loads else 1], machine.memory
    parts = many if isinstance(many, tuple) else (many,)
    if len(parts) != int(shape[3][1:]):
        raise unknown(i)
    where = _where(machine, i, i.operands[1 if loads else 0], "shared")
    targets = [machine.target(i, part, "b32") for part in parts] if loads else []
    sources = [] if loads else [machine.source(i, part, "b32") for part in parts]
    what = f"{machine.kernel.name}: {i.text!r}"

    def run(mask: Mask) -> None:
        if not (mask.reshape(-1, WARP).all(axis=1) == mask.reshape(-1, WARP).any(axis=1)).all():
            raise Fault(f"{what} needs all lanes of a warp.")
        everyone = np.flatnonzero(mask)
        lanes = everyone[everyone % WARP < 8 * len(parts)]
        places = where(lanes)
        shape = (-1, len(parts), 8, 8)  # warps, matrices, rows, numbers
        if loads:
            held = memory.load(places, np.uint16, 8, what).reshape(shape)
            held = np.ascontiguousarray(held.swapaxes(2, 3) if across else held)
            for column, target in enumerate(targets):
                whole = np.empty(machine.lanes, dtype=np.uint32)
                whole[everyone] = np.ascontiguousarray(held[:, column]).reshape(-1).view(np.uint32)
                target(whole, mask)
        else:
            words = [np.broadcast_to(source(), machine.lanes)[everyone].reshape(-1, WARP) for source in sources]
            held = np.ascontiguousarray(np.stack(words, 1)).view(np.uint16).reshape(shape)
            memory.store(places, (held.swapaxes(2, 3) if across else held).reshape(-1, 8), what)
        machine.tally.access(at, places, lanes // WARP, lanes % WARP, 16)

    return run


class _Copy(NamedTuple):
    lanes: Any
    groups: Any  # of each lane
    to: Any
    values: Any


class Copies:
    """Copies from global to shared memory that are under way (cp.async): there when a lane has waited for its own."""

    def __init__(self, lanes: int) -> None:
        self.committed = np.zeros(lanes, dtype=np.int64)  # groups of each lane
        self._open: list[_Copy] = []

    def start(self, lanes: Any, to: Any, values: Any) -> None:
        self._open.append(_Copy(lanes, self.committed[lanes], to, values))

    def land(self, machine: Machine, mask: Mask, left: int | None) -> None:
        """All but the last `left` groups of some lanes; None: whether they were committed or not."""
        still = []
        for each in self._open:
            done = mask[each.lanes]
            if left is not None:
                done = done & (each.groups < self.committed[each.lanes] - left)
            if done.any():
                machine.memory.store(each.to[done], each.values[done], f"{machine.kernel.name}: cp.async")
            if not done.all():
                still.append(_Copy(*(column[~done] for column in each)))
        self._open = still


def copy(machine: Machine, at: int, i: Instruction) -> Run:
    """cp.async and what waits for it."""
    tally = machine.tally
    if i.modifiers[:1] != ("async",):
        raise unknown(i)
    if i.modifiers == ("async", "commit_group"):

        def commit(mask: Mask) -> None:
            machine.copies.committed[mask] += 1

        return commit
    if i.modifiers in (("async", "wait_all"), ("async", "wait_group")):
        left = None if i.modifiers[1] == "wait_all" else i.operands[0]
        if left is not None and not isinstance(left, int):
            raise unknown(i)

        def wait(mask: Mask) -> None:
            newest = int(machine.copies.committed[mask].max()) - (left or 0)
            groups = {int(name[6:]) for name in tally.pending if name.startswith("async ")}
            tally.wait({f"async {group}" for group in groups if left is None or group < newest})
            machine.copies.land(machine, mask, left)

        return wait
    known = i.modifiers[1] in ("ca", "cg") and i.modifiers[2:4] == ("shared", "global")
    if not known or len(i.operands) != 3 or i.operands[2] not in (4, 8, 16):
        raise unknown(i)
    size = int(str(i.operands[2]))
    to, of = (_where(machine, i, i.operands[n], space) for n, space in ((0, "shared"), (1, "global")))

    def run(mask: Mask) -> None:
        lanes = np.flatnonzero(mask)
        places, near = of(lanes), to(lanes)
        what = f"{machine.kernel.name}: {i.text!r}"
        copies = machine.copies
        copies.start(lanes, near, machine.memory.load(places, np.uint32, size // 4, what))
        warp, lane = lanes // WARP, lanes % WARP
        tally.access(at, places, warp, lane, size, f"async {int(copies.committed[lanes].max())}")
        tally.access(at, near, warp, lane, size)

    return run
