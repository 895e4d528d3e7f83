"""The machine that runs PTX computes what a card would, bit by bit."""

import itertools
from fractions import Fraction

import numpy as np
import pytest

from bench.ptx import code as ptx
from bench.ptx.memory import Fault
from ptx_cases import TEXT, aligned, computed, run

WORDS = [0, 1, 2, 5, 31, 32, 33, 255, 0x7FFFFFFF, 0x80000000, 0x80000001, 0xDEADBEEF, 0xFFFFFFFE, 0xFFFFFFFF]
PAIRS = list(itertools.product(WORDS, WORDS))
M32, M64 = (1 << 32) - 1, (1 << 64) - 1


def signed(x, bits=32):
    return x - (1 << bits) if x >> (bits - 1) else x


def quotient(a, b):
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def field(a, start, length, sign):
    """bfe as its definition has it, bit by bit."""
    start, length = start & 255, length & 255
    top = min(start + length - 1, 31)
    last = (a >> top & 1) if sign and length else 0
    return sum(((a >> start + i & 1) if i < length and start + i <= 31 else last) << i for i in range(32))


def inserted(a, b, start, length):
    start, length = start & 255, length & 255
    for i in range(length):
        if start + i < 32:
            b = b & ~(1 << start + i) | (a >> i & 1) << start + i
    return b


def permuted(a, b, selector):
    data = [(b << 32 | a) >> 8 * i & 255 for i in range(8)]
    ways = [selector >> 4 * i & 15 for i in range(4)]
    taken = [(255 if data[w & 7] >> 7 else 0) if w & 8 else data[w & 7] for w in ways]
    return sum(byte << 8 * i for i, byte in enumerate(taken))


TWO = {
    "add.s32 $0, $1, $2;": lambda a, b: a + b,
    "sub.s32 $0, $1, $2;": lambda a, b: a - b,
    "mul.lo.s32 $0, $1, $2;": lambda a, b: a * b,
    "mul.hi.s32 $0, $1, $2;": lambda a, b: signed(a) * signed(b) >> 32,
    "mul.hi.u32 $0, $1, $2;": lambda a, b: a * b >> 32,
    "mad.lo.s32 $0, $1, $2, -7;": lambda a, b: a * b - 7,
    "mad.hi.u32 $0, $1, $2, 7;": lambda a, b: (a * b >> 32) + 7,
    "div.s32 $0, $1, $2;": lambda a, b: quotient(signed(a), signed(b)) if b else None,
    "rem.s32 $0, $1, $2;": lambda a, b: signed(a) - quotient(signed(a), signed(b)) * signed(b) if b else None,
    "div.u32 $0, $1, $2;": lambda a, b: a // b if b else None,
    "rem.u32 $0, $1, $2;": lambda a, b: a % b if b else None,
    "min.s32 $0, $1, $2;": lambda a, b: min(signed(a), signed(b)),
    "max.u32 $0, $1, $2;": max,
    "and.b32 $0, $1, $2;": lambda a, b: a & b,
    "or.b32 $0, $1, $2;": lambda a, b: a | b,
    "xor.b32 $0, $1, $2;": lambda a, b: a ^ b,
    "shl.b32 $0, $1, $2;": lambda a, b: a << b if b < 32 else 0,
    "shr.u32 $0, $1, $2;": lambda a, b: a >> b if b < 32 else 0,
    "shr.s32 $0, $1, $2;": lambda a, b: signed(a) >> min(b, 31),
    "bfe.u32 $0, $1, $2, 7;": lambda a, b: field(a, b, 7, False),
    "bfe.s32 $0, $1, 5, $2;": lambda a, b: field(a, 5, b, True),
    "bfe.s32 $0, $1, $2, 9;": lambda a, b: field(a, b, 9, True),
    "bfi.b32 $0, $1, $2, 9, 12;": lambda a, b: inserted(a, b, 9, 12),
    "bfi.b32 $0, $1, 77, $2, 30;": lambda a, b: inserted(a, 77, b, 30),
    "prmt.b32 $0, $1, $2, 0x7A43;": lambda a, b: permuted(a, b, 0x7A43),
    "prmt.b32 $0, $1, 5, $2;": lambda a, b: permuted(a, 5, b),
    "shf.l.wrap.b32 $0, $1, $2, 33;": lambda a, b: ((b << 32 | a) << 1) >> 32,
    "shf.r.clamp.b32 $0, $1, 9, $2;": lambda a, b: (9 << 32 | a) >> min(b, 32),
    "shf.r.wrap.b32 $0, $1, 9, $2;": lambda a, b: (9 << 32 | a) >> (b & 31),
    "lop3.b32 $0, $1, $2, 0x0F0F1234, 0x96;": lambda a, b: a ^ b ^ 0x0F0F1234,
    # The definition, bit by bit.
    "lop3.b32 $0, $1, $2, 0x0F0F1234, 0xE2;": lambda a, b: sum(
        (0xE2 >> ((a >> i & 1) << 2 | (b >> i & 1) << 1 | (0x0F0F1234 >> i & 1)) & 1) << i for i in range(32)
    ),
    "setp.lt.s32 %p1, $1, $2; selp.b32 $0, 3, 4, %p1;": lambda a, b: 3 if signed(a) < signed(b) else 4,
    "setp.hi.u32 %p1, $1, $2; selp.b32 $0, 3, 4, %p1;": lambda a, b: 3 if a > b else 4,
    "setp.eq.s32 %p2, $1, 5; setp.lt.or.u32 %p1|%p3, $1, $2, %p2; selp.b32 %r9, 1, 0, %p3; "
    "selp.b32 $0, 2, %r9, %p1;": lambda a, b: 2 if a == 5 or a < b else 1,
    "setp.eq.s32 %p2, $1, 5; setp.lt.and.u32 %p1, $1, $2, !%p2; selp.b32 $0, 1, 0, %p1;": lambda a, b: a != 5 and a < b,
}


@pytest.mark.parametrize("text", TWO)
def test_integers_of_32_bits(text):
    given = np.array(PAIRS, dtype=np.uint32)
    found = computed(text, "b32", "b32", "b32", given=given.T)
    for (a, b), got in zip(PAIRS, found, strict=True):
        wanted = TWO[text](a, b)
        assert wanted is None or got == int(wanted) & M32, (text, hex(a), hex(b))


ONE = {
    "not.b32 $0, $1;": ("b32", lambda a: ~a),
    "neg.s32 $0, $1;": ("b32", lambda a: -a),
    "abs.s32 $0, $1;": ("b32", lambda a: abs(signed(a))),
    "popc.b32 $0, $1;": ("b32", lambda a: bin(a).count("1")),
    "clz.b32 $0, $1;": ("b32", lambda a: 32 - a.bit_length()),
    "brev.b32 $0, $1;": ("b32", lambda a: int(f"{a:032b}"[::-1], 2)),
    "cvt.s64.s32 $0, $1;": ("b64", signed),
    "cvt.u64.u32 $0, $1;": ("b64", lambda a: a),
    "cvt.s32.s16 $0, $1;": ("b32", lambda a: signed(a & 0xFFFF, 16)),
    "cvt.u16.u32 $0, $1;": ("b16", lambda a: a & 0xFFFF),
    "mul.wide.s32 $0, $1, -3;": ("b64", lambda a: signed(a) * -3),
    "mul.wide.u32 $0, $1, 3000000000;": ("b64", lambda a: a * 3000000000),
    "mad.wide.s32 $0, $1, 5, 1;": ("b64", lambda a: signed(a) * 5 + 1),
    "mov.b32 {%h5, %h6}, $1; mov.b32 $0, {%h6, %h5};": ("b32", lambda a: a >> 16 | (a & 0xFFFF) << 16),
    "cvt.u64.u32 %d10, $1; shl.b64 %d10, %d10, 13; mov.b64 {%r10, %r11}, %d10; mov.b32 $0, %r11;": (
        "b32",
        lambda a: a << 13 >> 32,
    ),
    "mov.b32 %f9, $1; mov.b32 $0, %f9;": ("b32", lambda a: a),
    "{.reg .b16 low, high; mov.b32 {low, high}, $1; {.reg .b16 low; mov.b16 low, 9;} mov.b32 $0, {low, low};}": (
        "b32",
        lambda a: (a & 0xFFFF) * 0x10001,
    ),
}


@pytest.mark.parametrize("text", ONE)
def test_one_word(text):
    to, wanted = ONE[text]
    found = computed(text, to, "b32", given=[np.array(WORDS, dtype=np.uint32)])
    for a, got in zip(WORDS, found, strict=True):
        assert int(got) == int(wanted(a)) % (1 << int(to[1:])), (text, hex(a))


def test_integers_of_64_bits():
    values = [0, 1, 7, M32, 1 << 32, (1 << 63) - 1, 1 << 63, M64 - 3, 0x123456789ABCDEF]
    pairs = list(itertools.product(values, values))
    columns = np.array(pairs, dtype=np.uint64).T
    for text, wanted in {
        "add.s64 $0, $1, $2;": lambda a, b: a + b,
        "mul.lo.s64 $0, $1, $2;": lambda a, b: a * b,
        "mul.hi.u64 $0, $1, $2;": lambda a, b: a * b >> 64,
        "mul.hi.s64 $0, $1, $2;": lambda a, b: signed(a, 64) * signed(b, 64) >> 64,
        "div.s64 $0, $1, $2;": lambda a, b: quotient(signed(a, 64), signed(b, 64)) if b else None,
        "max.s64 $0, $1, $2;": lambda a, b: max(signed(a, 64), signed(b, 64)),
    }.items():
        for (a, b), got in zip(pairs, computed(text, "b64", "b64", "b64", given=columns), strict=True):
            assert wanted(a, b) is None or int(got) == wanted(a, b) & M64, (text, hex(a), hex(b))


FLOATS = np.float32(
    [0.0, -0.0, 1.0, -1.5, 3.0, 1 / 3, 1e-40, -1e-44, 3.4e38, 65504.0, 65519.9, 65520.0, 2.5, 3.5, 1e20]
)
FLOATS = np.float32([*FLOATS, np.inf, -np.inf, np.nan, 5.9e-8, 2.9e-8, -7.49, 16777217.0])


def same(found, wanted):
    assert np.array_equal(np.isnan(found), np.isnan(wanted))
    known = ~np.isnan(wanted)
    bits = f"u{wanted.dtype.itemsize}"
    assert np.array_equal(found[known].view(bits), wanted[known].view(bits))


def test_floats():
    a, b = (np.array(column) for column in zip(*itertools.product(FLOATS, FLOATS), strict=True))
    with np.errstate(all="ignore"):
        for text, wanted in {
            "add.f32 $0, $1, $2;": a + b,
            "sub.rn.f32 $0, $1, $2;": a - b,
            "mul.f32 $0, $1, $2;": a * b,
            "div.rn.f32 $0, $1, $2;": a / b,
            "min.f32 $0, $1, $2;": np.fmin(a, b),
            "sqrt.rn.f32 $0, $1;": np.sqrt(a),
            "rcp.rn.f32 $0, $1;": np.float32(1) / a,
            "abs.f32 $0, $1;": np.abs(a),
            "neg.f32 $0, $2;": -b,
            "copysign.f32 $0, $1, $2;": np.copysign(b, a),
        }.items():
            same(computed(text, "f32", "f32", "f32", given=[a, b]), wanted)


def nearest(exact):
    """The float32 nearest to a fraction, of two at the same distance the even one."""
    guess = np.float32(float(exact))
    around = [np.nextafter(guess, np.float32(-np.inf)), guess, np.nextafter(guess, np.float32(np.inf))]
    return min(around, key=lambda x: (abs(Fraction(float(x)) - exact), int(x.view(np.uint32)) & 1))


def test_fma_rounds_once():
    generator = np.random.default_rng(0)
    a, b = (generator.standard_normal(4000).astype(np.float32) for _ in range(2))
    # Sums that lie next to the middle between two numbers of float32, where float64 in between loses what decides.
    c = (generator.standard_normal(4000) * 2.0 ** generator.integers(-40, 30, 4000)).astype(np.float32)
    a[:3], b[:3], c[:3] = 1 + 2**-12, 1 + 2**-12, [2**-60, -(2**-60), 0]
    found = computed("fma.rn.f32 $0, $1, $2, $3;", "f32", "f32", "f32", "f32", given=[a, b, c])
    for x, y, z, got in zip(a.tolist(), b.tolist(), c.tolist(), found, strict=True):
        assert got == nearest(Fraction(x) * Fraction(y) + Fraction(z)), (x, y, z)
    twice = (a.astype(np.float64) * b + c).astype(np.float32)
    assert (found != twice).any()
    huge, inf = np.float32(3e38), np.float32(np.inf)
    special = np.array([[huge, huge, -1], [inf, 0, 1], [inf, 1, -inf], [1, 2, inf], [-huge, 4, 1]], dtype=np.float32).T
    found = computed("fma.rn.f32 $0, $1, $2, $3;", "f32", "f32", "f32", "f32", given=special)
    same(found, np.array([inf, np.nan, np.nan, inf, -inf], dtype=np.float32))


@pytest.mark.parametrize("relation", ["eq", "ne", "lt", "ge", "equ", "neu", "ltu", "leu", "gtu", "geu", "num", "nan"])
def test_relations_of_floats(relation):
    a, b = (np.array(column) for column in zip(*itertools.product(FLOATS, FLOATS), strict=True))
    text = f"setp.{relation}.f32 %p1, $1, $2; selp.b32 $0, 1, 0, %p1;"
    found = computed(text, "b32", "f32", "f32", given=[a, b]) == 1
    operators = {"eq": "__eq__", "ne": "__ne__", "lt": "__lt__", "le": "__le__", "gt": "__gt__", "ge": "__ge__"}
    for x, y, got in zip(a.tolist(), b.tolist(), found, strict=True):
        unordered = x != x or y != y
        if relation in ("num", "nan"):
            assert got == (unordered == (relation == "nan"))
        else:
            ordered = not unordered and getattr(x, operators[relation[:2]])(y)
            assert got == (ordered or (unordered and relation.endswith("u")))


def test_conversions():
    with np.errstate(all="ignore"):
        half = FLOATS.astype(np.float16)
        same(computed("cvt.rn.f16.f32 $0, $1;", "b16", "f32", given=[FLOATS]).view(np.float16), half)
        same(computed("cvt.f32.f16 $0, $1;", "f32", "b16", given=[half.view(np.uint16)]), half.astype(np.float32))
        same(computed("cvt.f64.f32 $0, $1;", "f64", "f32", given=[FLOATS]), FLOATS.astype(np.float64))
        same(computed("cvt.rni.f32.f32 $0, $1;", "f32", "f32", given=[FLOATS]), np.rint(FLOATS))
        same(computed("cvt.sat.f32.f32 $0, $1;", "f32", "f32", given=[FLOATS])[2:7], np.clip(FLOATS[2:7], 0, 1))
    whole = [0, 0, 1, -1, 3, 0, 0, 0, 2**31 - 1, 65504, 65519, 65520, 2, 3, 2**31 - 1, 2**31 - 1, -(2**31), 0, 0, 0, -7]
    found = computed("cvt.rzi.s32.f32 $0, $1;", "b32", "f32", given=[FLOATS]).view(np.int32)
    assert found.tolist() == [*whole, 16777216]
    even = computed("cvt.rni.s32.f32 $0, $1;", "b32", "f32", given=[FLOATS]).view(np.int32)
    assert (even[12], even[13], even[20]) == (2, 4, -7)
    given = np.array([16777217, 2**32 - 1], dtype=np.uint32)
    assert computed("cvt.rn.f32.u32 $0, $1;", "f32", "b32", given=[given]).tolist() == [16777216.0, 4294967296.0]
    assert computed("cvt.rn.f32.s32 $0, $1;", "f32", "b32", given=[given]).tolist() == [16777216.0, -1.0]


def test_pairs_of_halves():
    a, b = (np.random.default_rng(i).standard_normal((8, 2)).astype(np.float16) for i in range(2))
    given = [np.ascontiguousarray(x).view(np.uint32).reshape(-1) for x in (a, b)]
    for text, wanted in {
        "add.f16x2 $0, $1, $2;": a + b,
        "mul.rn.f16x2 $0, $1, $2;": a * b,
        "fma.rn.f16x2 $0, $1, $2, $1;": (a.astype(np.float64) * b + a).astype(np.float16),
    }.items():
        same(computed(text, "b32", "b32", "b32", given=given).view(np.float16).reshape(-1, 2), wanted)


# ----------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("ex2.approx.f32 %f1, %f2;", "ex2.approx.f32"),
        ("div.approx.f32 %f1, %f2, %f3;", "div.approx.f32"),
        ("add.ftz.f32 %f1, %f2, %f3;", "add.ftz.f32"),
        ("cvt.rz.bf16x2.f32 %r1, %f2, %f3;", "cvt.rz.bf16x2.f32"),
        ("cvt.rz.f16.f32 %h1, %f2;", "cvt.rz.f16.f32"),
        ("atom.global.add.u32 %r1, [%d0], 1;", "atom.global.add.u32"),
        ("bar.sync 1, 64;", "bar.sync"),
        ("shfl.bfly.b32 %r1, %r2, 1, 31;", "shfl.bfly.b32"),
        ("ld.weird.u32 %r1, [%d0];", "ld.weird.u32"),
        ("prmt.b32.f4e %r1, %r2, %r3, %r4;", "prmt.b32.f4e"),
        ("wmma.load %r1;", "wmma.load"),
    ],
)
def test_an_unknown_instruction_is_refused_by_its_name(text, said):
    with pytest.raises(ptx.Unknown, match=f"^The PTX instruction {said} is not known here"):
        run(text, aligned(np.zeros(32, dtype=np.uint32)))


def test_what_cannot_be_read_is_refused():
    with pytest.raises(ptx.Unknown, match=r"'%r99' in 'mov.u32 %r1, %r99' is no register"):
        run("mov.u32 %r1, %r99;")
    with pytest.raises(ptx.Unknown, match=r"kernel has '.local .align 4 .b8 depot\[8\]', which cannot be run"):
        run(".local .align 4 .b8 depot[8];")
    with pytest.raises(ptx.Unknown, match="function of its own"):
        ptx.parse(TEXT.format(body="", threads=32) + ".func helper() { ret; }")
    with pytest.raises(ptx.Unknown, match="ends within a kernel"):
        ptx.parse(TEXT.format(body="", threads=32).rstrip()[:-1])


def test_accesses_that_a_card_does_not_forgive():
    data = aligned(np.zeros(64, dtype=np.uint32))
    with pytest.raises(Fault, match=r"touches 4 bytes at 0x[0-9a-f]+, which is no memory of the launch"):
        run("ld.global.u32 %r1, [%d0+256];", data)
    with pytest.raises(Fault, match=r"touches 4 bytes at 0x3, which is no memory"):
        run("mov.u64 %d4, 3; st.global.u32 [%d4], %r1;", data)
    with pytest.raises(Fault, match="is not aligned to 16 bytes in array 0"):
        run("ld.global.v4.u32 {%r1, %r2, %r3, %r4}, [%d0+4];", data)
    with pytest.raises(Fault, match="which is no memory"):
        run("mov.u32 %r1, room; st.shared.u32 [%r1+4096], %r2;", data)
