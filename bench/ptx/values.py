"""What the instructions of PTX compute: for each a function of numpy arrays, one number a lane.

Rounding, wrapping and NaN are those of a card without fast-math. What is not here is refused by its name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from bench.ptx.code import Instruction, Unknown

__all__ = ["DTYPES", "Value", "dtype_of", "value_of"]

Array = Any  # numpy's, of any type

DTYPES = {
    "pred": np.bool_,
    "b8": np.uint8,
    "u8": np.uint8,
    "s8": np.int8,
    "b16": np.uint16,
    "u16": np.uint16,
    "s16": np.int16,
    "f16": np.float16,
    "b32": np.uint32,
    "u32": np.uint32,
    "s32": np.int32,
    "f32": np.float32,
    "b64": np.uint64,
    "u64": np.uint64,
    "s64": np.int64,
    "f64": np.float64,
}


class Value(NamedTuple):
    """How the destination is made of the sources, each read as its type."""

    to: str
    sources: tuple[str, ...]
    function: Callable[..., Array]


def dtype_of(instruction: Instruction, type: str) -> type[np.generic]:
    if type not in DTYPES:
        raise unknown(instruction)
    return DTYPES[type]


def unknown(instruction: Instruction) -> Unknown:
    name = ".".join((instruction.op, *instruction.modifiers))
    return Unknown(f"The PTX instruction {name} is not known here ({instruction.text}).")


def _floats(type: str) -> bool:
    return type[0] == "f"


def _divide(a: Array, b: Array) -> Array:
    if a.dtype.kind == "f":
        return a / b
    floor = a // b
    return floor + ((floor * b != a) & ((a < 0) != (b < 0))).astype(a.dtype)


def _wide(type: str) -> Any:
    return np.int64 if type[0] == "s" else np.uint64


def _product(part: str, type: str) -> Callable[[Array, Array], Array]:
    bits = int(type[1:])
    if part == "lo":
        return np.multiply
    if part == "wide":
        result = DTYPES[f"{type[0]}{2 * bits}"]
        return lambda a, b: np.multiply(a, b, dtype=result)
    if bits < 64:
        return lambda a, b: (np.multiply(a, b, dtype=_wide(type)) >> bits).astype(a.dtype)
    return _high


def _high(a: Array, b: Array) -> Array:
    exact = [int(x) * int(y) >> 64 for x, y in zip(*np.broadcast_arrays(a, b), strict=True)]
    return np.array(exact, dtype=a.dtype)


def _fused(a: Array, b: Array, c: Array) -> Array:
    """a * b + c, rounded once."""
    if a.dtype != np.float32:
        wide = np.longdouble if a.dtype == np.float64 else np.float64
        return (a.astype(wide) * b + c).astype(a.dtype)
    return _fused_wide(a, b, c).astype(np.float32)


def _fused_wide(a: Array, b: Array, c: Array) -> Array:
    """a * b + c of float32 in float64, rounded to odd, so that a second rounding sees what the first one lost."""
    # The product is exact in float64.
    product, c = a.astype(np.float64) * b, np.asarray(c, np.float64)
    total = product + c
    back = total - product
    lost = (product - (total - back)) + (c - back)
    bits = total.view(np.int64)
    inexact = (lost != 0) & np.isfinite(total) & (bits & 1 == 0)
    step = np.where((lost > 0) == (total > 0), 1, -1)
    return np.where(inexact, (bits + step).view(np.float64), total)


def _fused_bfloat16(*given: Array) -> Array:
    a, b, c = ((each.astype(np.uint32) << np.uint32(16)).view(np.float32) for each in given)
    exact = _fused_wide(a, b, c)
    near = exact.astype(np.float32)
    # To odd once more: cut off, and the last bit says whether anything was.
    cut = np.where(np.abs(near) > np.abs(exact), np.nextafter(near, np.float32(0)), near)
    return _to_bfloat16(np.where(near == exact, near.view(np.uint32), cut.view(np.uint32) | np.uint32(1)))


def _product_bfloat16(a: Array, b: Array) -> Array:
    return _fused_bfloat16(a, b, np.array([0x8000], np.uint16))  # less nothing, which keeps the sign of a zero


def _shift_left(a: Array, b: Array) -> Array:
    bits = a.dtype.itemsize * 8
    return np.where(b < bits, a << np.minimum(b, bits - 1).astype(a.dtype), 0).astype(a.dtype)


def _shift_right(a: Array, b: Array) -> Array:
    bits = a.dtype.itemsize * 8
    moved = a >> np.minimum(b, bits - 1).astype(a.dtype)
    return moved if a.dtype.kind == "i" else np.where(b < bits, moved, 0).astype(a.dtype)


def _funnel(left: bool, wrap: bool) -> Callable[[Array, Array, Array], Array]:
    def function(low: Array, high: Array, by: Array) -> Array:
        by = (by & 31 if wrap else np.minimum(by, 32)).astype(np.uint64)
        both = high.astype(np.uint64) << np.uint64(32) | low
        moved = both << by >> np.uint64(32) if left else both >> by
        return (moved & np.uint64(0xFFFFFFFF)).astype(np.uint32)

    return function


def _extract(a: Array, start: Array, length: Array) -> Array:
    bits = a.dtype.itemsize * 8
    above = bits - np.minimum(length & 0xFF, bits)
    # To the top and back down: with its sign for a signed type.
    return _shift_right(_shift_left(_shift_right(a, start & 0xFF), above), above)


def _insert(a: Array, b: Array, start: Array, length: Array) -> Array:
    bits = b.dtype.itemsize * 8
    start, length = (x.astype(np.int64) & 0xFF for x in (start, length))
    ones = _shift_left(np.where(length < bits, _shift_left(np.ones_like(b), length), 0).astype(b.dtype) - 1, start)
    ones = ones.astype(b.dtype)
    return (_shift_left(a, start) & ones) | (b & ~ones)


def _permute(a: Array, b: Array, selector: Array) -> Array:
    both = (b.astype(np.uint64) << np.uint64(32)) | a
    found = np.zeros_like(a)
    for i in range(4):
        way = selector >> np.uint32(4 * i)
        byte = (both >> ((way & 7).astype(np.uint64) * np.uint64(8))).astype(np.uint32) & 0xFF
        byte = np.where(way & 8, np.where(byte & 0x80, 0xFF, 0), byte).astype(np.uint32)
        found = found | byte << np.uint32(8 * i)
    return found


def _logic(table: int) -> Callable[[Array, Array, Array], Array]:
    def function(a: Array, b: Array, c: Array) -> Array:
        found = np.zeros_like(a & b & c)
        for i in range(8):
            if table >> i & 1:
                found = found | (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
        return found

    return function


def _leading(a: Array) -> Array:
    bits = a.dtype.itemsize * 8
    return np.array([bits - int(x).bit_length() for x in a], dtype=np.uint32)


def _reverse(a: Array) -> Array:
    bits = a.dtype.itemsize * 8
    return np.array([int(f"{int(x):0{bits}b}"[::-1], 2) for x in a], dtype=a.dtype)


_COMPARED: dict[str, Callable[[Array, Array], Array]] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
}


def comparison(instruction: Instruction) -> Callable[[Array, Array], Array]:
    """The relation of setp, which with NaN holds in its unordered forms alone."""
    name, floats = instruction.modifiers[0], _floats(instruction.type)
    if name in ("num", "nan"):
        return lambda a, b: (np.isnan(a) | np.isnan(b)) == (name == "nan")
    unordered = floats and name in ("equ", "neu", "ltu", "leu", "gtu", "geu")
    relation = _COMPARED.get(name[:2] if unordered else name)
    if relation is None:
        raise unknown(instruction)
    if unordered:
        return lambda a, b: relation(a, b) | np.isnan(a) | np.isnan(b)
    if floats and name == "ne":
        return lambda a, b: (a != b) & ~np.isnan(a) & ~np.isnan(b)
    return relation


_ROUNDED = {"i": np.rint, "z": np.trunc, "m": np.floor, "p": np.ceil}


def _to_bfloat16(bits: Array) -> Array:
    nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    up = np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))
    return np.where(nan, 0x7FFF, (bits + up) >> np.uint32(16)).astype(np.uint16)


def _above(high: Array, low: Array) -> Array:
    return high.astype(np.uint32) << np.uint32(16) | low


def _conversion(instruction: Instruction) -> Value:
    *how, to, source = instruction.modifiers
    if instruction.modifiers == ("rn", "bf16", "f32"):
        return Value("b16", ("b32",), _to_bfloat16)
    if instruction.modifiers == ("f32", "bf16"):
        return Value("b32", ("b16",), lambda a: a.astype(np.uint32) << np.uint32(16))
    if instruction.modifiers == ("rn", "bf16x2", "f32"):  # the first one above the second
        return Value("b32", ("b32", "b32"), lambda a, b: _above(_to_bfloat16(a), _to_bfloat16(b)))
    if instruction.modifiers == ("rn", "f16x2", "f32"):
        halves = np.float16, np.uint16
        return Value("b32", ("f32", "f32"), lambda a, b: _above(*(x.astype(halves[0]).view(halves[1]) for x in (a, b))))
    result, given = dtype_of(instruction, to), dtype_of(instruction, source)
    if not set(how) <= {"rn", "rz", "rni", "rzi", "rmi", "rpi", "sat"} or ("sat" in how and to != "f32"):
        raise unknown(instruction)
    rounding = next((word for word in how if word.endswith("i")), "")
    if _floats(source) and not _floats(to):
        limits = np.iinfo(result)  # type: ignore[type-var]
        way = _ROUNDED["i" if rounding == "rni" else rounding[1:2] or "z"]

        def whole(a: Array) -> Array:
            exact = way(a.astype(np.longdouble))
            held = np.clip(np.where(np.isnan(exact), 0, exact), limits.min, limits.max)
            return held.astype(result)

        return Value(to, (source,), whole)
    if rounding:
        way = _ROUNDED["i" if rounding == "rni" else rounding[1]]
        return Value(to, (source,), lambda a: way(a).astype(result))
    if "rz" in how and np.dtype(result).itemsize < np.dtype(given).itemsize:
        raise unknown(instruction)
    if "sat" in how:
        return Value(to, (source,), lambda a: np.fmin(np.fmax(a.astype(result), 0), 1))
    return Value(to, (source,), lambda a: a.astype(result))


def _pairs(function: Callable[..., Array], dtype: Any = np.float16) -> Callable[..., Array]:
    """Of two numbers in 32 bits."""

    def both(*given: Array) -> Array:
        halves = [np.ascontiguousarray(each).view(dtype).reshape(-1, 2) for each in given]
        return np.ascontiguousarray(function(*halves).astype(dtype)).view(np.uint32).reshape(-1)

    return both


_ALLOWED = {
    "add": {"rn"},
    "sub": {"rn"},
    "mul": {"rn", "lo", "hi", "wide"},
    "mad": {"lo", "hi", "wide"},
    "fma": {"rn"},
    "div": {"rn", "full"},  # which is off by two units at most on a card, and by none here
    "sqrt": {"rn"},
    "rcp": {"rn"},
}
_ONE: dict[str, Callable[..., Array]] = {
    "abs": np.abs,
    "neg": np.negative,
    "not": np.invert,
    "sqrt": np.sqrt,
    "rcp": lambda a: a.dtype.type(1) / a,
    "popc": lambda a: np.array([int(x).bit_count() for x in a], dtype=np.uint32),
    "clz": _leading,
    "brev": _reverse,
}
_TWO: dict[str, Callable[..., Array]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": _divide,
    "rem": lambda a, b: a - _divide(a, b) * b,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "copysign": lambda a, b: np.copysign(b, a),
}


def value_of(instruction: Instruction) -> Value:
    """Raises :class:`Unknown`, which names the instruction, for what is not known."""
    op, modifiers = instruction.op, instruction.modifiers
    if not modifiers:
        raise unknown(instruction)
    type = instruction.type
    if op == "cvt" and len(modifiers) >= 2:
        return _conversion(instruction)
    if op == "shf" and type == "b32" and modifiers[1] in ("wrap", "clamp"):
        return Value("b32", ("b32", "b32", "u32"), _funnel(modifiers[0] == "l", modifiers[1] == "wrap"))
    if op == "lop3" and type == "b32" and isinstance(instruction.operands[-1], int):
        return Value("b32", ("b32", "b32", "b32"), _logic(instruction.operands[-1]))
    if set(modifiers[:-1]) - _ALLOWED.get(op, set()):
        raise unknown(instruction)
    if type == "f16x2" and op in ("add", "sub", "mul", "fma", "neg", "abs"):
        return Value("b32", ("b32",) * (3 if op == "fma" else 2 if op in _TWO else 1), _pairs(_function(op)))
    if type in ("s16x2", "u16x2") and op in ("add", "min", "max"):
        two = {"add": np.add, "min": np.minimum, "max": np.maximum}[op]
        return Value("b32", ("b32", "b32"), _pairs(two, DTYPES[type[:3]]))
    if type in ("bf16", "bf16x2") and op in ("fma", "mul"):
        exact = _fused_bfloat16 if op == "fma" else _product_bfloat16
        to = "b16" if type == "bf16" else "b32"
        return Value(to, (to,) * (3 if op == "fma" else 2), exact if to == "b16" else _pairs(exact, np.uint16))
    dtype_of(instruction, type)
    if op == "mul" and not _floats(type):
        to = f"{type[0]}{2 * int(type[1:])}" if modifiers[0] == "wide" else type
        return Value(to, (type, type), _product(modifiers[0], type))
    if op == "mad":
        product = _product(modifiers[0], type)
        to = f"{type[0]}{2 * int(type[1:])}" if modifiers[0] == "wide" else type
        return Value(to, (type, type, to), lambda a, b, c: product(a, b) + c)
    if op == "fma" and _floats(type):
        return Value(type, (type,) * 3, _fused)
    if op in ("min", "max"):
        return Value(type, (type, type), np.fmin if op == "min" else np.fmax)
    if op == "div" and _floats(type) and len(modifiers) != 2:
        raise unknown(instruction)
    if op in ("shl", "shr"):
        return Value(type, (type, "u32"), _shift_left if op == "shl" else _shift_right)
    if op == "bfe":
        return Value(type, (type, "u32", "u32"), _extract)
    if op == "bfi":
        return Value(type, (type, type, "u32", "u32"), _insert)
    if op == "prmt" and type == "b32":
        return Value(type, (type,) * 3, _permute)
    if op == "selp":
        return Value(type, (type, type, "pred"), lambda a, b, chosen: np.where(chosen, a, b))
    if op in _ONE and (op not in ("sqrt", "rcp") or "rn" in modifiers):
        return Value("u32" if op in ("popc", "clz") else type, (type,), _ONE[op])
    if op in _TWO:
        return Value(type, (type, type), _TWO[op])
    raise unknown(instruction)


def _function(op: str) -> Callable[..., Array]:
    return _fused if op == "fma" else _TWO.get(op) or _ONE[op]
