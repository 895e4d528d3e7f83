"""What only Triton's PTX has of all that bench/ptx runs: other headers, places in a source, instructions of its own."""

import itertools

import numpy as np
import pytest
import torch

from bench.ptx import code as ptx
from bench.ptx.cost import cost, kind
from bench.ptx.machine import Machine
from bench.ptx.memory import Fault, Region
from bench.ptx.schedule import scheduled
from ptx_cases import aligned, computed, run

TEXT = """
.version 8.7
.target sm_70
.address_size 64
.extern .shared .align 16 .b8 global_smem[];
.visible .entry _kernel(
	.param .u64 .ptr .global .align 1 _kernel_param_0,
	.param .u32 _kernel_param_1,
	.param .u32 _kernel_param_2,
	.param .u32 _kernel_param_3,
	.param .u64 .ptr .global .align 1 _kernel_param_4
)
.reqntid 64
{
	.reg .b32 %r<9>;
	.reg .b64 %rd<9>;
	.loc	1 26 0                          // kernel.py:26:0
$L__func_begin0:
	.file	1 "/there/kernel.py"
	ld.param.b64 %rd0, [_kernel_param_0];
	.loc	1 27 3
	ld.param.b32 %r1, [_kernel_param_3];
$L__tmp0:
	mov.u32 %r0, %tid.x;
	mul.wide.u32 %rd1, %r0, 4;
	add.s64 %rd0, %rd0, %rd1;
	ld.global.b32 { %r2 }, [ %rd0 + 0 ];
	add.s32 %r2, %r2, %r1;
$L__tmp1:
	ld.global.b32 { %r3 }, [ %rd0 + 256 ];
	add.s32 %r2, %r2, %r3;
	st.global.b32 [ %rd0 + 0 ], { %r2 };
	ret;
}
	.section	.debug_info
	{
.b32 1
	}
"""


def test_parameters_places_and_labels():
    module = ptx.parse(TEXT)
    kernel = module.kernels["_kernel"]
    assert kernel.threads == 64 and kernel.parameter_bytes == 32
    assert [start for start, _ in kernel.parameters.values()] == [0, 8, 12, 16, 24]
    assert len(kernel.instructions) == 11
    # A label that nobody goes to keeps no load from being early.
    early = scheduled(kernel)
    loads = [at for at, i in enumerate(early.instructions) if i.far_load]
    assert loads[1] == loads[0] + 1
    data = aligned(np.arange(128, dtype=np.uint32))
    given = data.ctypes.data.to_bytes(8, "little") + bytes(8) + (1000).to_bytes(4, "little") + bytes(12)
    Machine(module, early, [Region("data", data.ctypes.data, data.view(np.uint8))], 64, 0, given).run(0, 1)
    assert data[:64].tolist() == [1000 + i + (i + 64) for i in range(64)]


def bfloat16(bits):
    return torch.from_numpy(bits.view(np.int16).copy()).view(torch.bfloat16)


def agree(found, wanted):
    known = ~wanted.isnan()
    assert torch.equal(bfloat16(found)[known], wanted[known]) and bool(bfloat16(found).isnan()[~known].all())


def test_products_of_bfloat16_are_rounded_once():
    a, b, c = np.random.default_rng(0).integers(0, 2**16, (3, 1024), dtype=np.uint16)
    exact = [bfloat16(x).double() for x in (a, b, c)]
    agree(computed("mul.bf16 $0, $1, $2;", "b16", "b16", "b16", given=[a, b]), (exact[0] * exact[1]).bfloat16())
    pair = computed("mul.bf16x2 $0, $1, $2;", "b32", "b32", "b32", given=[a.view(np.uint32), b.view(np.uint32)])
    agree(pair.view(np.uint16), (exact[0] * exact[1]).bfloat16())
    near = (c & 0x81FF) | 0x3F00  # so that all three have a part in the sum
    a, b = (a & 0x80FF) | 0x3F00, (b & 0x80FF) | 0x3F00
    found = computed("fma.rn.bf16 $0, $1, $2, $3;", "b16", "b16", "b16", "b16", given=[a, b, near])
    # Exact in float64; torch rounds that to bfloat16 by way of float32, so it is rounded by hand.
    exact = (bfloat16(a).double() * bfloat16(b).double() + bfloat16(near).double()).numpy()
    around = [bfloat16((found.astype(int) + step).astype(np.uint16)).double().numpy() for step in (-1, 0, 1)]
    distance = [np.abs(each - exact) for each in around]
    assert (distance[1] <= distance[0]).all() and (distance[1] <= distance[2]).all()
    even = (distance[1] < distance[0]) & (distance[1] < distance[2]) | (found % 2 == 0)
    assert even.all()
    given = [x.view(np.uint32) for x in (a, b, near)]
    pair = computed("fma.rn.bf16x2 $0, $1, $2, $3;", "b32", "b32", "b32", "b32", given=given)
    assert np.array_equal(pair.view(np.uint16), found)


def test_a_sum_next_to_the_middle_of_two_bfloat16():
    """Which float32 would put there, so that what decides is lost."""
    # In 128ths: 136 · 136 is 144.5, in the middle, and 136 · 152 is 161.5. Of the two next to them one is even.
    tiny, negative = 0x2180, 0xA180  # 2^-60
    given = np.array(
        [(0x3F88, 0x3F88, c) for c in (0, tiny, negative)] + [(0x3F88, 0x3F98, c) for c in (0, tiny, negative)]
    )
    found = computed("fma.rn.bf16 $0, $1, $2, $3;", "b16", "b16", "b16", "b16", given=given.astype(np.uint16).T)
    assert found.tolist() == [0x3F90, 0x3F91, 0x3F90, 0x3FA2, 0x3FA2, 0x3FA1]


def test_two_numbers_in_32_bits():
    a, b = np.random.default_rng(1).standard_normal((2, 64)).astype(np.float32)
    found = computed("cvt.rn.f16x2.f32 $0, $1, $2;", "b32", "f32", "f32", given=[a, b])
    assert np.array_equal(found.view(np.float16).reshape(-1, 2), np.stack([b, a], 1).astype(np.float16))
    found = computed("cvt.rn.bf16x2.f32 $0, $1, $2;", "b32", "f32", "f32", given=[a, b])
    agree(found.view(np.uint16), torch.from_numpy(np.stack([b, a], 1)).bfloat16().flatten())
    words = np.array(list(itertools.product([0, 1, 0x7FFF, 0x8000, 0xFFFF], repeat=2)), np.uint16)
    for op, function in {"add": np.add, "min": np.minimum, "max": np.maximum}.items():
        for type in (np.int16, np.uint16):
            given = [np.ascontiguousarray(x).view(np.uint32).reshape(-1) for x in (words, words[::-1])]
            text = f"{op}.{'s' if type == np.int16 else 'u'}16x2 $0, $1, $2;"
            found = computed(text, "b32", "b32", "b32", given=given).view(type).reshape(-1, 2)
            assert np.array_equal(found, function(words.view(type), words[::-1].view(type))), text


def test_the_quick_division_is_no_worse_than_a_card():
    a, b = np.random.default_rng(2).standard_normal((2, 64)).astype(np.float32)
    assert np.array_equal(computed("div.full.f32 $0, $1, $2;", "f32", "f32", "f32", given=[a, b]), a / b)
    quick, exact = (ptx._instruction(f"div.{how}.f32 %f1, %f2, %f3", [{}]) for how in ("full", "rn"))
    assert cost(quick) < cost(exact)


MATRIX = """
    mov.u32 %r1, room;
    shl.b32 %r2, %r0, 2;
    add.s32 %r3, %r1, %r2;
    mul.wide.u32 %d5, %r0, 4;
    add.s64 %d6, %d0, %d5;
    ld.global.u32 %r4, [%d6];
    st.shared.u32 [%r3], %r4;
    shl.b32 %r5, %r0, 4;
    and.b32 %r5, %r5, 127;
    add.s32 %r5, %r1, %r5;
    {body}
    st.global.u32 [%d6], %r6;
"""


@pytest.mark.parametrize("trans", ["", ".trans"])
def test_a_matrix_of_numbers_of_16_bits(trans):
    """Lane t has numbers 2·(t % 4) and the next one of row t / 4, or of that column."""
    wanted = np.arange(64, dtype=np.uint16).reshape(8, 8)
    data = aligned(wanted.reshape(-1)).view(np.uint32)
    text = f"ldmatrix.sync.aligned.m8n8.x1{trans}.shared.b16 {{%r6}}, [%r5];"
    made = run(MATRIX.format(body=text), data)
    shown = wanted.T if trans else wanted
    assert np.array_equal(data.view(np.uint16).reshape(8, 8), shown)
    at = next(at for at, i in enumerate(made.kernel.instructions) if i.op == "ldmatrix")
    assert kind(made.kernel.instructions[at]) == "shared"
    assert (made.tally.near[at].wavefronts, made.tally.near[at].bytes) == (1, 128)
    # And back: what a matrix is stored as reads as it was.
    data = aligned(wanted.reshape(-1)).view(np.uint32)
    text = f"stmatrix.sync.aligned.m8n8.x1{trans}.shared.b16 [%r5], {{%r4}}; ld.shared.u32 %r6, [%r3];"
    run(MATRIX.format(body=text), data)
    assert np.array_equal(data.view(np.uint16).reshape(8, 8), shown)


def test_four_matrices_and_those_that_are_refused():
    wanted = np.arange(256, dtype=np.uint16)
    data = aligned(wanted).view(np.uint32)
    body = """
        mov.u32 %r1, room;
        mul.wide.u32 %d5, %r0, 16;
        add.s64 %d6, %d0, %d5;
        ld.global.v4.u32 {%r4, %r5, %r6, %r7}, [%d6];
        shl.b32 %r2, %r0, 4;
        add.s32 %r2, %r1, %r2;
        st.shared.v4.u32 [%r2], {%r4, %r5, %r6, %r7};
        ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r4, %r5, %r6, %r7}, [%r2];
        st.global.v4.u32 [%d6], {%r4, %r5, %r6, %r7};
    """
    run(body, data)
    # Of every lane one word of each matrix.
    assert np.array_equal(data.view(np.uint16).reshape(32, 4, 2).swapaxes(0, 1).reshape(-1), wanted)
    for text in (
        "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r4}, [%r2];",
        "ldmatrix.sync.aligned.m8n16.x1.shared.b8x16.b6x16_p32 {%r4}, [%r2];",
    ):
        with pytest.raises(ptx.Unknown, match="The PTX instruction ldmatrix"):
            run(text, data)
    with pytest.raises(Fault, match="needs all lanes of a warp"):
        run(
            "setp.lt.u32 %p1, %r0, 8; mov.u32 %r1, room; @%p1 ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r4}, [%r1];",
            data,
        )
