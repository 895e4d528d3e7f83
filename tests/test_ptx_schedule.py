"""Loads start early and nothing else changes (bench/ptx/schedule.py); copies to shared memory come when waited for."""

import random

import numpy as np
import pytest
import torch

from bench.ptx import code as ptx
from bench.ptx.machine import Machine
from bench.ptx.memory import Fault
from bench.ptx.schedule import scheduled
from ptx_cases import aligned, computed, machine, run

ADDRESS = "mul.wide.u32 %d9, %r0, 4; add.s64 %d8, %d0, %d9;"


def moved(body, *arrays, early=True, threads=32):
    """The machine after one block, with its loads moved or not."""
    made = machine(body, *arrays, threads=threads)
    if early:
        regions = [region for region in made.memory.regions if region.name.startswith("array")]
        parameters = bytes(next(region.data for region in made.memory.regions if region.name == "parameters"))
        module = ptx.Module({}, {"room": 0}, 0, {})
        made = Machine(module, scheduled(made.kernel), regions, threads, 4096, parameters)
    made.run(0, 1)
    return made


def numbers(count=64):
    return aligned(np.arange(count, dtype=np.uint32))


@pytest.mark.parametrize(
    ("body", "before", "after"),
    [
        ("ld.global.u32 %r1, [%d8]; add.s32 %r3, %r1, 1; ld.global.u32 %r2, [%d8+4]; add.s32 %r4, %r2, 1;", 2, 1),
        # The address of the second has to be made first.
        ("ld.global.u32 %r1, [%d8]; add.s32 %r3, %r1, 1; add.s64 %d7, %d8, 8; ld.global.u32 %r2, [%d7]; "
         "add.s32 %r4, %r2, 1;", 2, 1),
        # Of two and two that need them.
        ("ld.global.u32 %r1, [%d8]; and.b32 %r3, %r1, 7; mul.wide.u32 %d6, %r3, 4; add.s64 %d6, %d6, %d0; "
         "ld.global.u32 %r5, [%d6]; add.s32 %r7, %r5, 1; ld.global.u32 %r2, [%d8+4]; and.b32 %r4, %r2, 7; "
         "mul.wide.u32 %d7, %r4, 4; add.s64 %d7, %d7, %d0; ld.global.u32 %r6, [%d7]; add.s32 %r8, %r6, 1;", 4, 2),
        # Not over a store, which may be of the same memory, nor a barrier.
        ("ld.global.u32 %r1, [%d8]; st.global.u32 [%d8+8], %r1; ld.global.u32 %r2, [%d8+4]; add.s32 %r4, %r2, 1;",
         2, 2),
        ("ld.global.u32 %r1, [%d8]; add.s32 %r3, %r1, 1; bar.sync 0; ld.global.u32 %r2, [%d8]; add.s32 %r4, %r2, 1;",
         2, 2),
        # Not into another stretch: one lane may go on to it and another not.
        ("ld.global.u32 %r1, [%d8]; setp.eq.u32 %p1, %r1, 9; @%p1 bra ON; ld.global.u32 %r2, [%d8+4]; ON: "
         "add.s32 %r4, %r2, 1;", 2, 2),
        ("ld.global.u32 %r1, [%d8]; add.s32 %r3, %r1, 1; ON: ld.global.u32 %r2, [%d8+4]; add.s32 %r4, %r2, 1; "
         "add.s32 %r5, %r5, 1; setp.lt.u32 %p1, %r5, 2; @%p1 bra ON;", 3, 3),
        # A register that is used again.
        ("ld.global.u32 %r1, [%d8]; add.s32 %r3, %r1, 1; ld.global.u32 %r1, [%d8+4]; add.s32 %r4, %r1, 1;", 2, 2),
        ("ld.global.u32 %r1, [%d8]; add.s32 %r3, %r1, 1; ld.volatile.global.u32 %r2, [%d8]; add.s32 %r4, %r2, 1;",
         2, 2),
        # Over a store to shared memory.
        ("ld.global.u32 %r1, [%d8]; st.shared.u32 [room], %r1; ld.global.u32 %r2, [%d8+4]; add.s32 %r4, %r2, 1;",
         2, 1),
        # Its address comes from there, from after a store that needs the first.
        ("ld.global.u32 %r1, [%d8]; and.b32 %r3, %r1, 0; st.shared.u32 [room], %r3; ld.shared.u32 %r5, [room]; "
         "cvt.u64.u32 %d7, %r5; add.s64 %d7, %d7, %d8; ld.global.u32 %r2, [%d7]; add.s32 %r4, %r2, 1;", 2, 2),
        # Only where a predicate holds that the first decides.
        ("ld.global.u32 %r1, [%d8]; setp.ne.u32 %p1, %r1, 77; @%p1 ld.global.u32 %r2, [%d8+4]; add.s32 %r4, %r2, 1;",
         2, 2),
    ],
)  # fmt: skip
def test_waits_before_and_after(body, before, after):
    assert moved(ADDRESS + body, numbers(), early=False).tally.rounds == before
    made = moved(ADDRESS + body, numbers())
    assert made.tally.rounds == after
    again = scheduled(made.kernel)
    assert [i.text for i in again.instructions] == [i.text for i in made.kernel.instructions]


def program(source):
    """A random stretch of code that ends with all of its registers in memory."""
    registers = [f"%r{i}" for i in range(1, 7)]
    lines = [ADDRESS, "shl.b32 %r10, %r0, 2;"]
    lines += [f"add.s32 {name}, %r0, {source.randrange(100)};" for name in registers]
    for _ in range(24):
        to, a, b = (source.choice(registers) for _ in range(3))
        at = 4 * source.randrange(6)
        lines += source.choice(
            [
                [f"ld.global.u32 {to}, [%d8+{at}];"],
                [f"ld.global.u32 {to}, [%d8+{at}];"],
                [f"and.b32 %r11, {a}, 28;", "cvt.u64.u32 %d7, %r11;", "add.s64 %d7, %d7, %d0;"],
                [f"ld.global.u32 {to}, [%d7];"],
                [f"@%p1 ld.global.u32 {to}, [%d8+{at}];"],
                [f"st.global.u32 [%d8], {a};"],
                [f"st.shared.u32 [%r10+{4 * source.randrange(2)}], {a};"],
                [f"ld.shared.u32 {to}, [%r10+{4 * source.randrange(2)}];"],
                [f"add.s32 {to}, {a}, {b};"],
                [f"@!%p1 xor.b32 {to}, {a}, {b};"],
                [f"setp.lt.u32 %p1, {a}, {b};"],
                [f"shfl.sync.bfly.b32 {to}, {a}, {source.choice([1, 2, 16])}, 31, -1;"],
                ["bar.sync 0;"],
            ]
        )
    lines += ["mul.wide.u32 %d6, %r0, 24;", "add.s64 %d6, %d6, %d1;"]
    lines += [f"st.global.u32 [%d6+{4 * i}], {name};" for i, name in enumerate(registers)]
    return "mov.u64 %d7, %d0;\n" + "\n".join(lines)


def test_random_programs_compute_the_same():
    source, earlier = random.Random(0), 0
    for _ in range(150):
        body, results = program(source), []
        for early in (False, True):
            data, out = numbers(), aligned(np.zeros(32 * 6, dtype=np.uint32))
            made = moved(body, data, out, early=early)
            results.append((data.tolist(), out.tolist()))
            earlier += made.tally.rounds * (1 if not early else -1)
        assert results[0] == results[1], body
    assert earlier > 50


# ----------------------------------------------------------------------------------------- copies to shared memory

COPY = f"""
    {ADDRESS}
    add.s64 %d10, %d1, %d9;
    mov.u32 %r9, room;
    shl.b32 %r10, %r0, 2;
    add.s32 %r10, %r9, %r10;
    cp.async.ca.shared.global [%r10], [%d8], 4;
    cp.async.commit_group;
    cp.async.ca.shared.global [%r10+128], [%d8+128], 4;
    cp.async.commit_group;
    WAIT
    ld.shared.u32 %r1, [%r10];
    ld.shared.u32 %r2, [%r10+128];
    st.global.u32 [%d10], %r1;
    st.global.u32 [%d10+128], %r2;
"""


@pytest.mark.parametrize(
    ("wait", "there", "rounds"),
    [
        ("", 0, 0),
        ("cp.async.wait_group 2;", 0, 0),
        ("cp.async.wait_group 1;", 32, 1),
        ("cp.async.wait_group 0;", 64, 1),
        ("cp.async.wait_group 1; cp.async.wait_group 0;", 64, 1),  # both were under way
        ("cp.async.wait_all;", 64, 1),
    ],
)
def test_copies_come_when_they_are_waited_for(wait, there, rounds):
    data, out = aligned(np.arange(1, 65, dtype=np.uint32)), numbers()
    made = run(COPY.replace("WAIT", wait), data, out)
    nothing = [2**32 - 1] * 64
    assert out.tolist() == [*range(1, 65)][:there] + nothing[there:]
    assert made.tally.rounds == rounds
    assert sum(access.sectors for access in made.tally.far.values()) == 16
    assert sum(access.wavefronts for access in made.tally.near.values()) == 4


def test_a_copy_of_16_bytes_and_what_is_refused():
    data = aligned(np.arange(128, dtype=np.uint32))
    body = """
        mul.wide.u32 %d9, %r0, 16; add.s64 %d8, %d0, %d9;
        shl.b32 %r10, %r0, 4;
        cp.async.cg.shared.global [%r10], [%d8], 16;
        cp.async.wait_all;
        xor.b32 %r10, %r10, 16;
        ld.shared.v4.u32 {%r1, %r2, %r3, %r4}, [%r10];
        st.global.v4.u32 [%d8], {%r1, %r2, %r3, %r4};
    """
    run(body, data)
    assert data.reshape(16, 2, 4)[:, ::-1].reshape(-1).tolist() == list(range(128))
    with pytest.raises(Fault, match="not aligned to 16 bytes"):
        run("mov.u32 %r1, room; cp.async.cg.shared.global [%r1+4], [%d0], 16; cp.async.wait_all;", data)
    with pytest.raises(ptx.Unknown, match=r"cp\.async\.bulk"):
        run("cp.async.bulk.shared.global [%r1], [%d0], 16;", data)


def test_bfloat16_is_rounded_to_the_nearest():
    given = np.random.default_rng(0).integers(0, 2**32, 1000, dtype=np.uint32)
    given[:4] = [0x7F800001, 0x7F7FFFFF, 0x3F808000, 0x3F818000]
    wanted = torch.from_numpy(given.view(np.float32)).bfloat16()
    found = computed("cvt.rn.bf16.f32 $0, $1;", "b16", "f32", given=[given.view(np.float32)])
    known = ~wanted.isnan()
    assert torch.equal(torch.from_numpy(found.view(np.int16))[known], wanted.view(torch.int16)[known])
    assert (found[~known.numpy()] == 0x7FFF).all()
    back = computed("cvt.f32.bf16 $0, $1;", "f32", "b16", given=[found])
    assert torch.equal(torch.from_numpy(back)[known], wanted.float()[known])


def test_a_number_of_float_is_its_bits_where_bits_are_wanted():
    assert computed("mov.b32 $0, 0f3F800000;", "b32", "b32", given=[np.zeros(1, np.uint32)]).tolist() == [0x3F800000]
    bits = computed("mov.b64 $0, 0d3FF0000000000000;", "b64", "b32", given=[np.zeros(1, np.uint32)])
    assert bits.tolist() == [0x3FF0000000000000]
