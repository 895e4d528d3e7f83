"""The Triton kernels of channel_gate and consensus_pool where the general op tests do not lead: several tiles, chunks
of channels, what a card's compiler makes of them. consensus_map has its own tests (test_triton_consensus_map.py)."""

import json
import os
import subprocess
import sys

import pytest
import torch

import m3em_fast
import triton_cases
from m3em_fast import ops
from m3em_fast.triton import _launch, channel_gate, consensus_pool
from op_cases import CALLS, DTYPES, LAYOUTS, Call, check, random_grad, random_tensors

EVERY_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)
MINE = [call for call in CALLS if call.op in ("channel_gate", "consensus_pool", "gated_projection")]
EVERY_CALL = pytest.mark.parametrize("call", MINE, ids=str)


@pytest.fixture(autouse=True)
def interpreted():
    assert _launch.INTERPRETED
    triton_cases.quicken()
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # memory that nobody has written to is NaN
    with m3em_fast.backend("triton"):
        yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.fixture
def small(monkeypatch):
    """Tiles of a few numbers, so that a sample is many of them."""

    def set_to(channels, positions):
        tile = {"BLOCK_C": channels, "BLOCK_P": positions, "num_warps": 1}
        for kernels in (channel_gate, consensus_pool):
            monkeypatch.setattr(kernels, "sizes_of", lambda *_: tile)

    return set_to


# A chunk of the backward of consensus_pool is four tiles of channels: 9 of them are one, 11 two with tiles of 2.
FORMS = [(dtype, "contiguous") for dtype in DTYPES] + [(torch.float16, layout) for layout in LAYOUTS[1:]]


@EVERY_CALL
@pytest.mark.parametrize(("dtype", "layout"), FORMS, ids=str)
def test_many_tiles(small, call, dtype, layout):
    small(2, 4)
    check("triton", call, random_tensors(call, 2, 11, 3, 5, dtype, layouts=[layout] * len(call.names)), layout)


@EVERY_CALL
@pytest.mark.parametrize("tile", [(1, 4), (4, 16), (16, 8)], ids=str)
@pytest.mark.parametrize("shape", [(1, 9, 5, 3), (2, 8, 4, 4), (2, 1, 1, 7)], ids=str)
def test_tiles_that_fit_and_that_do_not(small, call, tile, shape):
    small(*tile)
    check("triton", call, random_tensors(call, *shape, torch.float32))


@EVERY_CALL
@EVERY_DTYPE
def test_a_clip_does_not_depend_on_the_batch_in_one_bit(small, call, dtype):
    """Result and gradients; where torch's matrix product is inside, that says nothing of the order of its sums."""
    if call.op == "gated_projection":
        call = Call("gated_consensus_pool", gates=call.gates, cmap=call.bias)
    small(4, 8)
    tensors = random_tensors(call, 5, 19, 3, 5, dtype)
    leaves = [t.requires_grad_() for t in tensors]
    whole = call(*leaves)
    grad = random_grad(whole)
    gradients = torch.autograd.grad(whole, leaves, grad)
    for clips in (slice(1, 2), slice(2, 5)):
        alone = [t.detach()[clips].requires_grad_() for t in tensors]
        out = call(*alone)
        assert torch.equal(out, whole[clips])
        for one, all_ in zip(torch.autograd.grad(out, alone, grad[clips]), gradients, strict=True):
            assert torch.equal(one, all_[clips])


@pytest.mark.parametrize("gates", [4, 9])
def test_more_gates_than_the_kernels_for_cards_take(gates):
    call = Call("channel_gate", gates=gates)
    check("triton", call, random_tensors(call, 2, 5, 3, 4, torch.float32))


def test_needs_decide_what_is_read(monkeypatch):
    """A gradient that nobody wants is not written, and what only it would need is not read."""
    seen = []
    launch = channel_gate.launch

    def watching(kernel, programs, writes, x, gates, grad, grad_x, grad_gates, *rest, **constants):
        read = "x" * (x is not None) + "".join(str(g) for g, gate in enumerate(gates) if gate is not None)
        written = "x" * (grad_x is not None) + "".join(str(g) for g, t in enumerate(grad_gates) if t is not None)
        seen.append((read, written))
        launch(kernel, programs, writes, x, gates, grad, grad_x, grad_gates, *rest, **constants)

    call = Call("channel_gate", gates=2)
    for needs, wanted in {"x": ("01", "x"), "0": ("x", "0"), "01": ("x", "01"), "x1": ("x01", "x1")}.items():
        names = ["x" if need == "x" else f"gate{need}" for need in needs]
        tensors = random_tensors(call, 2, 3, 4, 5, torch.float32)
        leaves = [t.requires_grad_(name in names) for name, t in zip(call.names, tensors, strict=True)]
        out = ops.channel_gate(*leaves)
        monkeypatch.setattr(channel_gate, "launch", watching)
        out.sum().backward()
        monkeypatch.setattr(channel_gate, "launch", launch)
        assert seen.pop() == wanted


@pytest.mark.parametrize("value", [1.00390625, -1.01171875, 3.0e38, float("inf"), float("nan"), 1e-40])
def test_the_interpreter_rounds_to_bfloat16_as_a_card_does(value):
    """Between two numbers of bfloat16 to the nearer one, and halfway to the even one."""
    x, gate = torch.full((1, 1, 1, 1), value), torch.ones(1, 1)
    out = torch.full((1, 1, 2, 2), 7.0, dtype=torch.bfloat16)[:, :, ::2, ::2]
    channel_gate.forward(x, [gate], out)
    wanted = x.to(torch.bfloat16)
    torch.testing.assert_close(out, wanted, rtol=0, atol=0, equal_nan=True)
    assert out._base.flatten()[1:].eq(7).all()  # what lies between is left alone


# Compiles the kernels with sums for cards, once for addresses that are multiples of 16 and once for any, and tells how
# the numbers of each sum are spread over threads, which is what decides its order.
LAYOUTS_OF_SUMS = """
import json, re, sys
import triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from m3em_fast.triton import channel_gate, consensus_pool

half, pair, counts = "*fp16", ("*fp32", "*fp16"), ("i32", "i32")
tile = dict(ACC=tl.float32, LINE=True, BLOCK_C=32, BLOCK_P=64)
CASES = {
    "channel_gate": (channel_gate._backward, dict(x=half, gates=pair, grad=half, grad_x=half, grad_gates=pair,
        gate_n=counts, gate_c=counts), dict(G=2, MANY=2, **tile)),
    "pool": (consensus_pool._forward, dict(x=half, cmap="*fp32", out="*fp32"), tile),
    "pool_backward": (consensus_pool._backward, dict(x=half, cmap="*fp32", grad="*fp32", grad_x=half, partial="*fp32"),
        dict(TILES=4, **tile)),
}

def sums(kernel, types, constants, one, aligned, capability):
    names, signature, values, attributes = kernel.arg_names, {}, {}, {}
    for i, name in enumerate(names):
        kind = types.get(name, ("i32",) * 4 if name.endswith("_strides") else "i32")
        if name in constants or (one == 1 and name == "grad_c"):
            signature[name], values[(i,)] = "constexpr", constants.get(name, 1)
            continue
        if name.endswith("_strides"):
            kind = tuple("constexpr" if k == one else each for k, each in enumerate(kind))
            values[(i, one)] = 1
        signature[name] = kind
        places = [(i, k) for k, each in enumerate(kind) if each != "constexpr"] if isinstance(kind, tuple) else [(i,)]
        numbers = "i32" in kind
        # As a launch would have it; strides are multiples of 16 either way.
        if numbers or (aligned and name not in kernel.do_not_specialize_on_alignment):
            attributes |= {place: [["tt.divisibility", 16]] for place in places}
    source = ASTSource(kernel, signature, constexprs=values, attrs=attributes)
    text = triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm["ttgir"]
    layouts = dict(re.findall(r"^(#\\w+) = (#ttg.*)$", text, re.M))
    found = re.findall(r'"tt.reduce".*?\\}\\) : \\(tensor<[^>]*?(#\\w+)>\\)', text, re.S)
    return [layouts[name] for name in found]

for name, case in CASES.items():
    for one in (3, 1):  # which stride is 1: that of W, or that of C
        both = [sums(*case, one, aligned, int(sys.argv[1])) for aligned in (False, True)]
        print(json.dumps([name, one, *both]))
"""


@pytest.mark.parametrize("capability", [70, 90])
def test_no_order_of_a_sum_depends_on_how_addresses_are_aligned(tmp_path, capability):
    """As it would where a clip of a batch begins at a multiple of 16 bytes and the next one does not."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "TRITON_DEFAULT_FP_FUSION": "1"}
    command = [sys.executable, "-c", LAYOUTS_OF_SUMS, str(capability)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(lines) == 6
    for name, one, unaligned, aligned in lines:
        assert unaligned and unaligned == aligned, (name, one)
        # Of what is read, neighbouring threads take neighbouring numbers, whichever way these lie.
        assert f"threadsPerWarp = [{'1, 32' if one == 3 else '32, 1'}]" in aligned[0]
