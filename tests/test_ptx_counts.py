"""Lanes, warps and blocks of the machine that runs PTX, and what it counts: on kernels whose counts are known."""

import numpy as np
import pytest

from bench.ptx.memory import Fault
from ptx_cases import aligned, run

LANE = "mul.wide.u32 %d9, %r0, 4; add.s64 %d8, %d0, %d9;"  # %d8: this thread's number of 32 bits
STORE = f"{LANE} st.global.u32 [%d8], %r1;"


def numbers(count=32):
    return aligned(np.zeros(count, dtype=np.uint32))


def executed(machine, text):
    """How often an instruction was executed by warps."""
    code = machine.kernel.instructions
    return sum(count for i, count in zip(code, machine.tally.executed, strict=True) if i.text.startswith(text))


def access(machine, text, space="far"):
    """What the one instruction with this text did to memory."""
    code = machine.kernel.instructions
    (found,) = (each for at, each in getattr(machine.tally, space).items() if code[at].text.startswith(text))
    return found


# ------------------------------------------------------------------------------------------------ lanes and warps


def test_both_sides_of_a_branch_are_run_and_counted():
    out = numbers(64)
    body = f"""
        setp.lt.u32 %p1, %r0, 8;
        @%p1 bra SMALL;
        mov.u32 %r1, 1;
        bra.uni JOIN;
    SMALL:
        mov.u32 %r1, 2;
    JOIN:
        add.s32 %r1, %r1, 10;
        {STORE}
    """
    made = run(body, out, threads=64)
    assert out.tolist() == [12] * 8 + [11] * 56
    assert executed(made, "mov.u32 %r1, 1") == 2  # of both warps
    assert executed(made, "mov.u32 %r1, 2") == 1  # of the first alone
    assert executed(made, "add.s32 %r1, %r1, 10") == 2  # together again
    assert executed(made, "ret") == 2


def test_lanes_of_a_loop_wait_for_the_longest():
    out = numbers()
    body = f"""
        and.b32 %r2, %r0, 7;
        mov.u32 %r1, 0;
    AGAIN:
        setp.ge.u32 %p1, %r1, %r2;
        @%p1 bra DONE;
        add.s32 %r1, %r1, 1;
        bra.uni AGAIN;
    DONE:
        {STORE}
    """
    made = run(body, out)
    assert out.tolist() == [lane % 8 for lane in range(32)]
    assert executed(made, "add.s32 %r1, %r1, 1") == 7
    assert executed(made, "st.global.u32") == 1


def test_a_predicate_switches_lanes_off_and_the_instruction_is_counted():
    out = aligned(np.full(32, 7, dtype=np.uint32))
    body = f"""
        {LANE}
        setp.eq.u32 %p1, %r0, 3;
        mov.u32 %r1, 5;
        @!%p1 add.s32 %r1, %r1, 1;
        @%p1 st.global.u32 [%d8], %r1;
        @%p2 st.global.u32 [%d8+4], %r1;
    """
    made = run(body, out)
    assert out.tolist() == [7, 7, 7, 5] + [7] * 28
    assert executed(made, "@%p2 st.global") == 1
    assert access(made, "@%p1 st.global").sectors == 1


def test_the_last_warp_may_be_short_and_blocks_know_their_place():
    out = numbers(80)
    body = """
        mov.u32 %r2, %ctaid.x;
        mad.lo.s32 %r3, %r2, 40, %r0;
        mul.wide.u32 %d9, %r3, 4; add.s64 %d8, %d0, %d9;
        mov.u32 %r4, %nctaid.x; mov.u32 %r5, %ntid.x; mov.u32 %r6, %tid.y;
        mad.lo.s32 %r1, %r4, 1000, %r5;
        mad.lo.s32 %r1, %r2, 10000, %r1;
        add.s32 %r1, %r1, %r6;
        st.global.u32 [%d8], %r1;
    """
    made = run(body, out, threads=40, blocks=2)
    assert out.tolist() == [2040] * 40 + [12040] * 40
    assert executed(made, "st.global") == 4
    assert access(made, "st.global").bytes == 320


def shuffled(way, by, clamp, guard=""):
    out = numbers()
    body = f"""
        add.s32 %r2, %r0, 100;
        mov.u32 %r1, 0;
        shfl.sync.{way}.b32 %r1|%p1, %r2, {by}, {clamp}, -1;
        selp.b32 %r3, 1000, 0, %p1;
        add.s32 %r1, %r1, %r3;
        {STORE}
    """
    run(body, out)
    return [(value % 1000 - 100, value >= 1000) for value in out.tolist()]


def test_shuffles():
    lanes = range(32)
    assert shuffled("bfly", 5, 31) == [(lane ^ 5, True) for lane in lanes]
    assert shuffled("down", 3, 31) == [(lane + 3, True) if lane < 29 else (lane, False) for lane in lanes]
    assert shuffled("up", 3, 0) == [(lane - 3, True) if lane >= 3 else (lane, False) for lane in lanes]
    assert shuffled("idx", 9, 31) == [(9, True)] * 32
    # Of eight lanes each, as __shfl_sync and its like ask for with a width of 8: the mask is in the upper bits.
    assert shuffled("idx", 11, 31 | 24 << 8) == [(lane // 8 * 8 + 3, True) for lane in lanes]
    eight = [(lane + 3, True) if lane % 8 < 5 else (lane, False) for lane in lanes]
    assert shuffled("down", 3, 31 | 24 << 8) == eight
    assert shuffled("up", 3, 24 << 8) == [(lane - 3, True) if lane % 8 >= 3 else (lane, False) for lane in lanes]


def test_votes():
    out = numbers(64)
    body = f"""
        and.b32 %r2, %r0, 3;
        setp.eq.u32 %p1, %r2, 1;
        vote.sync.ballot.b32 %r1, %p1, -1;
        vote.sync.any.pred %p2, %p1, -1;
        vote.sync.all.pred %p3, !%p1, -1;
        @!%p2 add.s32 %r1, %r1, 1;
        @%p3 add.s32 %r1, %r1, 1;
        {STORE}
    """
    run(body, out, threads=64)
    assert out.tolist() == [0x22222222] * 64


def test_lanes_that_come_early_to_a_shuffle_wait_for_the_others():
    """The shuffle stands before what half of the lanes do first, so those at the lowest instruction would pass it."""
    out = numbers(64)
    body = f"""
        mov.u32 %r2, %r0;
        setp.lt.u32 %p1, %r0, 40;
        @!%p1 bra FIRST;
    MEET:
        shfl.sync.bfly.b32 %r1, %r2, 31, 31, -1;
        bar.warp.sync -1;
        {STORE}
        ret;
    FIRST:
        add.s32 %r2, %r2, 1000;
        bra.uni MEET;
    """
    made = run(body, out, threads=64)
    wanted = [lane + (1000 if lane >= 40 else 0) for lane in range(64)]
    assert out.tolist() == [wanted[lane ^ 31] for lane in range(64)]
    assert executed(made, "shfl") == 2


def test_lanes_that_never_come_and_lanes_that_are_not_there():
    with pytest.raises(Fault, match=r"lanes that 'shfl.sync.bfly.b32 %r1, %r2, 1, 31, -1' waits for do not come"):
        run("""
            setp.lt.u32 %p1, %r0, 8;
            @%p1 bra AWAY;
            shfl.sync.bfly.b32 %r1, %r2, 1, 31, -1;
        AWAY:
            bar.sync 0;
            bra.uni AWAY2;
        AWAY2:
        """)
    with pytest.raises(Fault, match="reads a lane that is not there"):
        run("shfl.sync.bfly.b32 %r1, %r2, 16, 31, 0xffff;", threads=16)


def test_barriers_hold_the_warps_of_a_block():
    """A warp reads what another one has written, in shared memory that is new in every block."""
    out = numbers(128)
    body = f"""
        mov.u32 %r2, room;
        shl.b32 %r3, %r0, 2;
        add.s32 %r4, %r2, %r3;
        ld.shared.u32 %r5, [%r4];
        st.shared.u32 [%r4], %r0;
        bar.sync 0;
        mov.u32 %r6, 127;
        sub.s32 %r6, %r6, %r0;
        shl.b32 %r6, %r6, 2;
        add.s32 %r6, %r6, %r2;
        ld.shared.u32 %r1, [%r6];
        setp.ne.s32 %p1, %r5, -1;
        @%p1 mov.u32 %r1, 0;
        {STORE}
    """
    made = run(body, out, threads=128, blocks=3)
    assert out.tolist() == list(range(127, -1, -1))
    assert made.tally.barriers == 3


def test_generic_addresses_constants_and_parameters_in_memory():
    out = numbers()
    body = f"""
        mov.u32 %r2, room;
        cvt.u64.u32 %d4, %r2;
        cvta.shared.u64 %d4, %d4;
        mov.u64 %d5, room;
        cvta.shared.u64 %d5, %d5;
        setp.ne.s64 %p2, %d4, %d5;
        @%p2 add.s64 %d5, %d5, 1;
        st.u32 [%d5+8], 5;
        ld.shared.u32 %r3, [room+8];
        mov.u64 %d6, table;
        ld.global.u32 %r4, [%d6+8];
        ld.global.u32 %r5, [table+12];
        mov.b64 %d7, kernel_param_0;
        ld.param.u64 %d10, [%d7];
        cvta.to.global.u64 %d10, %d10;
        setp.eq.s64 %p1, %d10, %d0;
        selp.b32 %r1, 1000, 0, %p1;
        add.s32 %r1, %r1, %r3;
        add.s32 %r1, %r1, %r4;
        add.s32 %r1, %r1, %r5;
        {STORE}
    """
    made = run(body, out)
    assert out.tolist() == [1075] * 32
    assert access(made, "st.u32", "near").wavefronts == 1  # shared memory, by its generic address


# -------------------------------------------------------------------------------------------- bank conflicts


def shared_access(size, byte, lanes=32):
    """Every lane reads `size` bytes at byte(lane) of shared memory: wavefronts, and as many without a conflict."""
    at = aligned(np.array([byte(lane) for lane in range(32)], dtype=np.uint32))
    to = {2: "u16 %h1", 4: "u32 %r1", 8: "v2.u32 {%r1, %r2}", 16: "v4.f32 {%f1, %f2, %f3, %f4}"}[size]
    form, registers = to.split(" ", 1)
    body = f"{LANE} ld.global.u32 %r5, [%d8]; mov.u32 %r6, room; add.s32 %r6, %r6, %r5; "
    body += f"setp.lt.u32 %p1, %r0, {lanes}; @%p1 ld.shared.{form} {registers}, [%r6];"
    made = run(body, at, shared=32 << 10)
    found = access(made, "@%p1 ld.shared", "near")
    assert found.requests == 1
    return found.wavefronts, found.ideal


@pytest.mark.parametrize(
    ("size", "byte", "wavefronts", "ideal"),
    [
        (4, lambda lane: 4 * lane, 1, 1),
        (4, lambda lane: 8 * lane, 2, 1),
        (4, lambda lane: 4 * 33 * lane, 1, 1),
        (4, lambda lane: 128 * lane, 32, 1),
        (4, lambda lane: 64, 1, 1),  # one word for all
        (4, lambda lane: 4 * (lane // 2), 1, 1),
        (4, lambda lane: 4 * 49 * lane, 1, 1),
        (4, lambda lane: 4 * 12 * lane, 4, 1),
        (4, lambda lane: 128 * (lane % 2), 2, 1),  # two words of one bank
        (2, lambda lane: 2 * lane, 1, 1),
        (2, lambda lane: 128 * (lane // 2) + 2 * (lane % 2), 16, 1),
        (8, lambda lane: 8 * lane, 2, 2),
        (8, lambda lane: 16 * lane, 4, 2),
        (8, lambda lane: 0, 2, 2),
        (16, lambda lane: 16 * lane, 4, 4),
        (16, lambda lane: 32 * lane, 8, 4),
        (16, lambda lane: 128 * lane, 32, 4),
        (16, lambda lane: 16 * (lane // 8), 4, 4),
    ],
)
def test_bank_conflicts(size, byte, wavefronts, ideal):
    assert shared_access(size, byte) == (wavefronts, ideal)


def test_bank_conflicts_of_a_few_lanes():
    assert shared_access(4, lambda lane: 128 * lane, lanes=5) == (5, 1)
    assert shared_access(16, lambda lane: 16 * lane, lanes=9) == (2, 2)


def test_each_warp_has_its_own_wavefronts():
    made = run("mov.u32 %r2, room; st.shared.u32 [%r2], %r0;", threads=96)
    found = access(made, "st.shared", "near")
    assert (found.requests, found.wavefronts, found.ideal) == (3, 3, 3)


# -------------------------------------------------------------------------------------------- sectors


def sectors(step, size=4, skip=0, threads=32):
    data = aligned(np.zeros(threads * step * 4 + 64, dtype=np.uint8))
    form = {2: "u16 %h1", 4: "u32 %r1", 16: "v4.u32 {%r1, %r2, %r3, %r4}"}[size]
    form, registers = form.split(" ", 1)
    made = run(
        f"mul.wide.u32 %d9, %r0, {step}; add.s64 %d8, %d0, %d9; ld.global.{form} {registers}, [%d8+{skip}];",
        data,
        threads=threads,
    )
    found = access(made, "ld.global")
    return found.requests, found.sectors, found.bytes


@pytest.mark.parametrize(
    ("how", "wanted"),
    [
        ({"step": 4}, (1, 4, 128)),
        ({"step": 4, "skip": 4}, (1, 5, 128)),
        ({"step": 4, "skip": 32}, (1, 4, 128)),
        ({"step": 8}, (1, 8, 128)),
        ({"step": 128}, (1, 32, 128)),
        ({"step": 0}, (1, 1, 128)),
        ({"step": 2, "size": 2}, (1, 2, 64)),
        ({"step": 16, "size": 16}, (1, 16, 512)),
        ({"step": 16, "size": 16, "skip": 16}, (1, 17, 512)),
        ({"step": 4, "threads": 64}, (2, 8, 256)),
        ({"step": 4, "threads": 64, "skip": 16}, (2, 10, 256)),  # a sector that two warps need is two
    ],
)
def test_sectors(how, wanted):
    assert sectors(**how) == wanted


def test_what_was_touched_is_known_byte_by_byte_in_twos():
    data, out = numbers(64), numbers(64)
    body = (
        f"{LANE} ld.global.u32 %r1, [%d8]; ld.global.u32 %r1, [%d8]; add.s64 %d8, %d1, %d9; st.global.u32 [%d8], %r1;"
    )
    made = run(body, data, out)
    a, b = (next(region for region in made.memory.regions if region.name == name) for name in ("array 0", "array 1"))
    assert [2 * int(marks.sum()) for marks in (a.read, a.written, b.read, b.written)] == [128, 0, 0, 128]


# -------------------------------------------------------------------------------------------- waits


@pytest.mark.parametrize(
    ("body", "rounds"),
    [
        ("", 0),
        ("ld.global.u32 %r1, [%d8];", 0),  # that nobody waits for
        ("ld.global.u32 %r1, [%d8]; add.s32 %r3, %r1, 1;", 1),
        ("ld.global.u32 %r1, [%d8]; ld.global.u32 %r2, [%d8+4]; add.s32 %r3, %r1, %r2;", 1),
        ("ld.global.u32 %r1, [%d8]; ld.global.u32 %r2, [%d8+4]; add.s32 %r3, %r1, 1; add.s32 %r3, %r2, 1;", 1),
        ("ld.global.u32 %r1, [%d8]; add.s32 %r3, %r1, 1; ld.global.u32 %r2, [%d8]; add.s32 %r3, %r2, 1;", 2),
        # The address of the second is what the first has loaded.
        ("ld.global.u32 %r1, [%d8]; mul.wide.u32 %d10, %r1, 4; add.s64 %d10, %d10, %d0; ld.global.u32 %r2, [%d10]; "
         "mov.u32 %r3, %r2;", 2),
        ("ld.global.v2.u32 {%r1, %r2}, [%d0]; mov.u32 %r3, %r2;", 1),
        ("ld.global.u32 %r1, [%d8]; mov.u32 %r1, 5;", 1),  # written over
        ("ld.global.u32 %r1, [%d8]; st.global.u32 [%d8], %r2; mov.u32 %r3, %r1;", 1),
        ("ld.global.u32 %r1, [%d8]; setp.eq.u32 %p1, %r1, 0; @%p1 mov.u32 %r2, 5;", 1),
        ("st.shared.u32 [room], %r1; ld.shared.u32 %r1, [room]; mov.u32 %r3, %r1;", 0),
    ],
)  # fmt: skip
def test_waits(body, rounds):
    made = run(LANE + body, numbers(64))
    assert (made.tally.rounds, made.tally.waits) == (rounds, rounds)


def test_between_barriers_the_warp_that_waits_most_counts():
    """The first warp waits twice before the barrier and the second twice behind it, each once in the other part."""
    twice = "ld.global.u32 %r1, [%d8]; mov.u32 %r2, %r1; ld.global.u32 %r1, [%d8]; mov.u32 %r2, %r1;"
    once = "ld.global.u32 %r1, [%d8]; mov.u32 %r2, %r1;"
    body = f"""
        {LANE}
        setp.lt.u32 %p1, %r0, 32;
        @%p1 bra FIRST;
        {once}
        bar.sync 0;
        {twice}
        ret;
    FIRST:
        {twice}
        bar.sync 0;
        {once}
    """
    made = run(body, numbers(64), threads=64)
    assert (made.tally.rounds, made.tally.waits, made.tally.barriers) == (4, 6, 1)


def test_a_load_waits_for_nobody_across_a_barrier_and_a_warp_for_its_own():
    made = run(LANE + "ld.global.u32 %r1, [%d8]; bar.sync 0; mov.u32 %r2, %r1;", numbers(64), threads=64)
    assert made.tally.rounds == 1
    body = "ld.global.u32 %r1, [%d8]; setp.lt.u32 %p1, %r0, 32; @%p1 bra ON; mov.u32 %r2, %r1; ON: mov.u32 %r3, 0;"
    assert run(LANE + body, numbers(64), threads=64).tally.waits == 1


def test_the_registers_of_an_instruction():
    made = run("@%p2 ld.global.v2.u32 {%r1, %r2}, [%d0+4];", numbers())
    (load,) = (i for i in made.kernel.instructions if i.text.startswith("@%p2"))
    assert load.registers == {"%p2", "%r1", "%r2", "%d0"}
