"""Runs one block of a kernel from its PTX, on numpy: all lanes of the block at once, and counts what its warps do.

Where lanes of a warp part, those at the lowest instruction go first, until they meet the others again. A warp knows
nothing of the others between two barriers, so running all of them side by side counts what each would do alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from bench.ptx import access, lanes
from bench.ptx.code import Instruction, Kernel, Module, Operand, Unknown
from bench.ptx.memory import CONSTANTS, PARAMETERS, SHARED, Fault, Memory, Region
from bench.ptx.tally import Tally
from bench.ptx.values import DTYPES, dtype_of, unknown, value_of

__all__ = ["Machine"]

Mask = Any  # which lanes of the block, an array of bool
Run = Callable[[Mask], None]
WARP = 32


class Machine:
    """One kernel with its arguments; runs block after block. `tally` counts all of them.

    Args:
        module: what the kernel is part of.
        kernel: the kernel.
        regions: global memory.
        threads: of a block.
        shared: bytes of shared memory that the launch asks for.
        parameters: the kernel's arguments, as the driver copies them.

    Raises:
        Unknown: an instruction that is not known here.
        Fault: while it runs, an access that is wrong.
    """

    def __init__(
        self, module: Module, kernel: Kernel, regions: list[Region], threads: int, shared: int, parameters: bytes
    ) -> None:
        self.kernel, self.threads = kernel, threads
        self.warps = -(-threads // WARP)
        self.lanes = self.warps * WARP
        self.memory = Memory.of_launch(regions, module.static + shared, parameters, module.constants)
        self.shared = next(region for region in self.memory.regions if region.start == SHARED)
        self.symbols = {name: start + PARAMETERS for name, (start, _) in kernel.parameters.items()}
        self.symbols |= module.shared
        at = CONSTANTS
        for name, data in module.constants.items():
            self.symbols[name] = at
            at += -(-len(data) // 16) * 16
        lane = np.arange(self.lanes, dtype=np.uint32)
        self.registers: dict[str, Any] = {
            name: np.zeros(self.lanes, dtype=DTYPES[type]) for name, type in kernel.registers.items()
        }
        self.registers |= {
            f"%{name}.{axis}": np.zeros(self.lanes, dtype=np.uint32)
            for name in ("tid", "ctaid", "ntid", "nctaid")
            for axis in "xyz"
        }
        self.registers["%laneid"], self.registers["%warpid"] = lane % WARP, lane // WARP
        self.registers["%tid.x"][:] = lane
        for name in ("%ntid", "%nctaid"):
            for axis in "xyz":
                self.registers[f"{name}.{axis}"][:] = 1
        self.registers["%ntid.x"][:] = threads
        self.tally = Tally(kernel, self.warps)
        self._built: list[Run | None] = [None] * len(kernel.instructions)

    # ------------------------------------------------------------------------------------------------- control

    def run(self, block: int, blocks: int) -> None:
        """One block of a grid of as many."""
        self.registers["%ctaid.x"][:], self.registers["%nctaid.x"][:] = block, blocks
        self.shared.data[:] = 0xFF  # NaN in every type
        self.tally.begin()
        self.copies = access.Copies(self.lanes)
        self._alive = np.arange(self.lanes) < self.threads
        # Lanes, by the instruction that they have come to: those that may go on, those at a barrier of the block, and
        # those that wait for lanes of their warp.
        self._groups: dict[int, Mask] = {0: self._alive.copy()}
        self._waiting: dict[int, Mask] = {}
        self._early: dict[int, Mask] = {}
        with np.errstate(all="ignore"):
            while self._groups or self._waiting:
                if not self._groups:
                    self._groups, self._waiting = self._waiting, {}
                    self.tally.barrier()
                at = min(self._groups)
                self._follow(at, self._groups.pop(at))
        if self._early:
            text = self.kernel.instructions[next(iter(self._early))].text
            raise Fault(f"{self.kernel.name}: lanes that {text!r} waits for do not come.")
        self.tally.end()

    def _follow(self, at: int, mask: Mask) -> None:
        """Runs lanes from an instruction on, as long as they stay together and nobody is behind them."""
        code, tally, groups = self.kernel.instructions, self.tally, self._groups
        nearest = min(groups, default=len(code))
        tally.lanes_are(mask)
        while at < len(code) and at < nearest:
            i = code[at]
            if i.op in ("shfl", "vote") or (i.op == "bar" and i.modifiers[0] == "warp"):
                mask = self._met(at, i, mask)
                if not mask.any():
                    return
                tally.lanes_are(mask)
            tally.issue(at)
            if i.op in ("bra", "ret", "exit") or (i.op in ("bar", "barrier") and i.modifiers[0] != "warp"):
                chosen = mask if not i.guard else self._guarded(i, mask)
                if i.op == "bra":
                    self._put(groups, self.kernel.labels[str(i.operands[0])], chosen)
                elif i.op in ("ret", "exit"):
                    self._alive &= ~chosen
                elif i.modifiers == ("sync",) and i.operands == (0,):
                    self._put(self._waiting, at + 1, chosen)
                else:
                    raise unknown(i)
                self._put(groups, at + 1, mask & ~chosen)
                return
            run = self._built[at]
            if run is None:
                run = self._built[at] = self.build(at, i)
            if i.guard:
                chosen = self._guarded(i, mask)
                if chosen.any():
                    run(chosen)
            else:
                run(mask)
            at += 1
        if at < len(code):
            self._put(groups, at, mask)

    @staticmethod
    def _put(groups: dict[int, Mask], at: int, mask: Mask) -> None:
        if mask.any():
            groups[at] = groups[at] | mask if at in groups else mask

    def _guarded(self, i: Instruction, mask: Mask) -> Mask:
        held = self.registers[i.guard]
        return mask & ~held if i.negated else mask & held

    def _met(self, at: int, i: Instruction, mask: Mask) -> Mask:
        """Of these lanes, and of those that have waited here, the ones whose warps have all that the instruction names;
        the rest waits."""
        mask = mask | self._early.pop(at, False)
        named = np.broadcast_to(self.source(i, i.operands[-1], "u32")(), self.lanes)
        needed = np.bitwise_or.reduce(np.where(mask, named, 0).reshape(-1, WARP), axis=1)
        expected = (np.repeat(needed, WARP) >> self.registers["%laneid"] & 1).astype(bool) & self._alive
        short = np.repeat((expected & ~mask).reshape(-1, WARP).any(axis=1), WARP)
        self._put(self._early, at, mask & short)
        return mask & ~short

    # -------------------------------------------------------------------------------------------- instructions

    def build(self, at: int, i: Instruction) -> Run:
        """What runs an instruction. Raises :class:`Unknown`."""
        if (builder := BUILDERS.get(i.op)) is not None:
            return builder(self, at, i)
        if i.op in ("membar", "fence", "bar"):
            return lambda mask: None
        value = value_of(i)
        target = self.target(i, i.operands[0], value.to)
        operands = i.operands[1 : 1 + len(value.sources)]
        sources = [self.source(i, operand, type) for operand, type in zip(operands, value.sources, strict=True)]
        function = value.function
        return lambda mask: target(function(*(source() for source in sources)), mask)

    def register(self, i: Instruction, operand: Operand) -> Any:
        if isinstance(operand, str) and operand in self.registers:
            return self.registers[operand]
        raise Unknown(f"{operand!r} in {i.text!r} is no register.")

    def source(self, i: Instruction, operand: Operand, type: str) -> Callable[[], Any]:
        """What reads an operand as numbers of a type, one a lane or one for all."""
        dtype = np.dtype(dtype_of(i, type))
        if isinstance(operand, (int, float)):
            number = np.array([operand % (1 << 64) if isinstance(operand, int) else operand])
            if isinstance(operand, int):
                number = number.astype(np.uint64)
                constant = number.astype(dtype) if dtype.kind in "fb" else number.view(np.int64).astype(dtype)
            else:
                constant = number.astype(f"f{dtype.itemsize}").view(dtype)
            return lambda: constant
        if isinstance(operand, str) and operand in self.symbols:
            constant = np.array([self.symbols[operand]], dtype=np.uint64).astype(dtype)
            return lambda: constant
        if isinstance(operand, str) and operand.startswith("!"):
            negated = self.register(i, operand[1:])
            return lambda: ~negated
        register = self.register(i, operand)
        if dtype.itemsize < register.dtype.itemsize:
            held = register.view(dtype)[:: register.dtype.itemsize // dtype.itemsize]
        else:
            held = register.view(dtype)
        return lambda: held

    def target(self, i: Instruction, operand: Operand, type: str) -> Callable[[Any, Mask], None]:
        """What writes numbers of a type to an operand, in some lanes."""
        if operand == "_":
            return lambda value, mask: None
        register, dtype = self.register(i, operand), np.dtype(dtype_of(i, type))
        if dtype.itemsize == register.dtype.itemsize:
            held = register.view(dtype)
            return lambda value, mask: np.copyto(held, value, where=mask, casting="unsafe")
        # A wider register: the sign goes on where there is one.
        kind = register.view(f"{'i' if dtype.kind == 'i' else 'u'}{register.dtype.itemsize}")
        if dtype.kind == "f":
            bits = np.dtype(f"u{dtype.itemsize}")
            return lambda value, mask: np.copyto(kind, value.astype(dtype).view(bits), where=mask, casting="unsafe")
        return lambda value, mask: np.copyto(kind, value.astype(dtype), where=mask, casting="unsafe")


# What is more than a value made of values.
BUILDERS: dict[str, Callable[[Machine, int, Instruction], Run]] = {
    "ld": access.access,
    "st": access.access,
    "cp": access.copy,
    "ldmatrix": access.matrix,
    "stmatrix": access.matrix,
    "mov": lanes.move,
    "setp": lanes.compare,
    "cvta": lanes.address_space,
    "shfl": lanes.shuffle,
    "vote": lanes.vote,
    "activemask": lanes.vote,
}
