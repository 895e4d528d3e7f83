"""How many instructions a card makes of one of PTX, and of which kind they are.

ptxas makes the card's own instructions of PTX: some of them vanish, some become many. The numbers here are those of
sm_70, counted in what it makes of kernels of a line each (tests/test_cuda_work.py counts them again).
"""

from __future__ import annotations

from bench.ptx.code import Instruction

__all__ = ["KINDS", "cost", "kind"]

KINDS = ("integer", "float", "conversion", "shared", "global", "control")
# Division and roots: sequences of instructions, or calls of them.
_LONG = {
    ("div", "s32"): 25.0,
    ("div", "u32"): 19.0,
    ("rem", "s32"): 21.0,
    ("rem", "u32"): 18.0,
    ("div", "s64"): 70.0,
    ("div", "u64"): 70.0,
    ("rem", "s64"): 70.0,
    ("rem", "u64"): 70.0,
    ("div", "f32"): 11.0,
    ("rcp", "f32"): 7.0,
    ("sqrt", "f32"): 9.0,
    ("div", "f64"): 16.0,
    ("rcp", "f64"): 11.0,
    ("sqrt", "f64"): 16.0,
}
_DOUBLED = ("add", "sub", "and", "or", "xor", "not", "selp", "setp", "shl", "shr", "neg", "abs")


def kind(i: Instruction) -> str:
    if i.op in ("bra", "ret", "exit", "bar", "barrier", "membar", "fence") or i.type == "pred":
        return "control"
    if i.op == "cp":
        return "global"
    if i.op in ("ld", "st"):
        return "shared" if "shared" in i.modifiers else "integer" if "param" in i.modifiers else "global"
    if i.op in ("shfl", "ldmatrix", "stmatrix"):
        return "shared"
    if i.op == "cvt":
        return "conversion" if any(word[0] == "f" for word in i.modifiers[-2:]) else "integer"
    return "float" if i.type.startswith("f") else "integer"


def cost(i: Instruction) -> float:
    """Instructions of the card."""
    if i.op == "mov":
        # A copy is a matter of names; what comes from nowhere has to be made.
        return 1.0 if isinstance(i.operands[1], str) and i.operands[1].startswith("%") and "." in i.operands[1] else 0.0
    if i.op == "cvta" or i.type == "pred" or (i.op == "ld" and "param" in i.modifiers):
        return 0.0
    if i.op == "cvt" and not any(word[0] == "f" for word in i.modifiers[-2:]):
        # The upper half of a wider number is zero or the sign; a narrower one is a part of it.
        return 1.0 if i.modifiers[-2:] == ("s64", "s32") else 0.0
    if i.op == "div" and "full" in i.modifiers:
        return 8.0
    if (i.op, i.type) in _LONG:
        return _LONG[i.op, i.type]
    if i.op in ("min", "max") and kind(i) == "integer":
        return 2.0 if "32" in i.type else 4.0
    if i.op in ("mul", "mad") and "wide" not in i.modifiers and i.type in ("s64", "u64", "b64"):
        return 4.0
    if i.op in _DOUBLED and i.type in ("s64", "u64", "b64"):
        return 2.0
    return 1.0
