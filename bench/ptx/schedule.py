"""Loads where ptxas puts them: early.

NVRTC leaves each load of PTX where the source has it, often next to its use. ptxas starts the loads of a stretch of
instructions without a branch one after another before it uses any, as far as their addresses are known and no store
or barrier stands before them. The order of PTX alone would count a wait for each.
"""

from __future__ import annotations

from dataclasses import replace

from bench.ptx.code import Instruction, Kernel, names

__all__ = ["scheduled"]

_ENDS = ("bra", "ret", "exit")
_FENCES = ("bar", "barrier", "membar", "fence", "atom", "red", "cp")


def scheduled(kernel: Kernel) -> Kernel:
    """The same kernel; instructions move within stretches that run from end to end."""
    # A label that nobody goes to, for a debugger, ends nothing.
    starts = {kernel.labels[str(i.operands[0])] for i in kernel.instructions if i.op == "bra"}
    code: list[Instruction] = []
    stretch: list[Instruction] = []
    for at, i in enumerate(kernel.instructions):
        if at in starts:
            code += _early(stretch)
            stretch = []
        stores = i.op == "st" and "shared" not in i.modifiers
        if i.op in _ENDS or i.op in _FENCES or stores or "volatile" in i.modifiers:
            code += [*_early(stretch), i]
            stretch = []
        else:
            stretch.append(i)
    return replace(kernel, instructions=[*code, *_early(stretch)])


def _early(stretch: list[Instruction]) -> list[Instruction]:
    loads = [at for at, i in enumerate(stretch) if i.far_load]
    if not loads:
        return stretch
    before = _needed(stretch)
    # By load: itself with all that it needs, and how many loads one after another that is.
    whole: list[set[int]] = []
    depth: list[int] = []
    for at, needed in enumerate(before):
        whole.append(needed.union(*(whole[each] for each in needed)))
        depth.append(max((depth[each] for each in needed), default=0) + (at in loads))
    order: list[int] = []
    for level in range(1, max(depth) + 1):
        ready = [at for at in loads if depth[at] == level]
        first = sorted(set().union(*(whole[at] for at in ready)) - set(order))
        order += first
        order += [at for at in ready if at not in first]
    order += sorted(set(range(len(stretch))) - set(order))
    return [stretch[at] for at in order]


def _needed(stretch: list[Instruction]) -> list[set[int]]:
    """By instruction those that have to come before it."""
    written: dict[str, int] = {}
    read: dict[str, list[int]] = {}
    near: list[int] = []  # accesses of shared memory
    last = {"st": -1, "between": -1}
    found: list[set[int]] = []
    for at, i in enumerate(stretch):
        stores = i.op in ("st", "stmatrix")
        to = set() if stores else names(i.operands[0])
        of = set().union(*(names(each) for each in i.operands[not stores :]))
        if i.guard:
            of.add(i.guard)
        needed = {written[name] for name in of | to if name in written}
        needed.update(*(read.get(name, ()) for name in to))
        if "shared" in i.modifiers and i.op in ("ld", "st", "ldmatrix", "stmatrix"):
            needed.update(near if stores else {last["st"]})
            near.append(at)
            last["st"] = at if stores else last["st"]
        if i.op in ("shfl", "vote"):
            needed.add(last["between"])
            last["between"] = at
        for name in to:
            written[name], read[name] = at, []
        for name in of:
            read.setdefault(name, []).append(at)
        found.append(needed - {at, -1})
    return found
