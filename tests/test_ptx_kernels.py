"""The kernels of csrc/cuda, run from their PTX with what the host launches them with, give the right results; and the
weights of instructions are those of the compiled code."""

import ctypes
import shutil
import struct

import pytest
import torch

import exact
from bench import cuda_work
from bench.cuda_count import Compiled, region
from bench.cuda_host import Failed, Host
from bench.ptx.code import parse
from bench.ptx.cost import cost
from bench.ptx.machine import Machine
from bench.ptx.schedule import scheduled
from op_cases import DTYPES, Call, lay_out, random_grad, random_tensors
from ptx_cases import CSRC, FOUND, needs_nvrtc


@pytest.fixture(scope="module")
def compiled():
    return Compiled(CSRC)


@pytest.fixture(scope="module")
def host():
    return Host(CSRC)


class Memory:
    """Tensors that launches may touch; results are full of NaN before."""

    def __init__(self, module):
        self.module, self.regions, self.kept, self.ran = module, [], [], []

    def given(self, t):
        self.kept.append(t)
        if all(part.start != t.untyped_storage().data_ptr() for part in self.regions):
            self.regions.append(region(f"tensor {len(self.kept)}", t))
        return t

    def result(self, shape, dtype, like=None):
        t = torch.full(shape, torch.nan, dtype=dtype)
        if like is not None and like.is_contiguous(memory_format=torch.channels_last) and not like.is_contiguous():
            t = t.contiguous(memory_format=torch.channels_last)
        return self.given(t)

    def run(self, launch):
        """All blocks of a grid."""
        kernel = scheduled(self.module.kernels[launch.kernel])
        arguments = ctypes.string_at(launch.arguments, kernel.parameter_bytes)
        machine = Machine(self.module, kernel, self.regions, launch.threads, launch.shared, arguments)
        for block in range(launch.blocks):
            machine.run(block, launch.blocks)
        self.ran.append(launch.kernel)


def simulated(module, host, call, tensors, grad):
    """The result and the gradients of a call, by the kernels alone, and which kernels those were."""
    memory = Memory(module)
    wide = torch.float64 if tensors[0].dtype == torch.float64 else torch.float32
    x, *others = [memory.given(t) for t in tensors]
    n, c, h, w = x.shape
    memory.given(grad)
    grads = [memory.result(t.shape, t.dtype, t) for t in tensors]
    if call.op == "channel_gate":
        out = memory.result((n, len(others) * c, h, w), x.dtype, x)
        host.channel_gate_forward(memory.run, x, others, out)
        host.channel_gate_backward(memory.run, x, others, grad, grads[0], grads[1:])
    elif call.op == "consensus_map":
        center, scales = call.options.get("center", False), min(3, exact.scale_limit(h, w))
        needs = host.consensus_map_needs(x, scales, center)
        work, stats = (memory.result((n * number,), wide) for number in needs)
        out = memory.result((n, 1, h, w), x.dtype)
        how = {"scales": scales, "center": center}
        host.consensus_map_forward(memory.run, x, others[0], out, stats, work, **how)
        host.consensus_map_backward(memory.run, x, others[0], grad, *grads, stats, **how)
    else:
        cmap = others[0] if others else None
        out = memory.result((n, c), x.dtype)
        work = memory.result((n * host.consensus_pool_workspace(x),), wide)
        host.consensus_pool_forward(memory.run, x, cmap, out)
        host.consensus_pool_backward(memory.run, x, cmap, grad, grads[0], grads[1] if others else None, work)
    return out, grads, memory.ran


CALLS = (
    Call("channel_gate", gates=2),
    Call("consensus_map"),
    Call("consensus_map", options={"center": True}),
    Call("consensus_pool"),
    Call("consensus_pool", cmap=True),
)


@needs_nvrtc
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("call", CALLS, ids=str)
@pytest.mark.parametrize(
    ("shape", "layout", "arch"),
    [
        ((1, 72, 7, 7), "contiguous", "compute_70"),
        ((2, 40, 7, 7), "contiguous", "compute_80"),
        ((2, 3, 7, 7), "contiguous", "compute_70"),
        ((1, 8, 6, 4), "contiguous", "compute_80"),
        ((2, 5, 5, 3), "channels_last", "compute_70"),
        ((1, 72, 5, 7), "channels_last", "compute_70"),
        ((2, 16, 3, 5), "channels_last", "compute_80"),
    ],
    ids=["7x7", "7x7 on 80", "few", "6x4 on 80", "channels_last", "packs of channels", "packs of channels on 80"],
)
def test_results_are_right(compiled, host, call, dtype, shape, layout, arch):
    tensors = random_tensors(call, *shape, dtype)
    tensors = [lay_out(t, layout if t.dim() == 4 and t.shape[1] > 1 else "contiguous") for t in tensors]
    wanted = call.exact(tensors)
    grad = torch.empty(wanted.value.shape, dtype=call.result_dtype(tensors))
    grad = random_grad(grad, layout if grad.dim() == 4 and grad.shape[1] > 1 else "contiguous", key=call.names)
    out, grads, ran = simulated(compiled.module(call.op, arch), host, call, tensors, grad)
    accumulation = torch.float64 if dtype == torch.float64 else torch.float32
    exact.assert_close(out, wanted.value, exact.bound(wanted, out.dtype, accumulation), f"{call}")
    for name, found, each in zip(call.names, grads, call.exact_gradients(tensors, grad), strict=True):
        allowed = exact.bound(each, found.dtype, accumulation)
        exact.assert_close(found, each.value, allowed, f"gradient of {call} by {name}")
    assert all(kernel.startswith(call.op) for kernel in ran)
    assert any("backward" in kernel for kernel in ran)


@needs_nvrtc
def test_every_kernel_of_a_tree_can_be_run(compiled):
    """Not one instruction of theirs is unknown, whether the calls of these tests reach it or not."""
    ops = [path.stem for path in sorted((CSRC / "cuda").glob("*.cu"))]
    for module in (compiled.module(op, arch) for op in ops for arch in cuda_work.ARCHS):
        for kernel in module.kernels.values():
            machine = Machine(module, kernel, [], 32, 0, bytes(kernel.parameter_bytes))
            for at, i in enumerate(kernel.instructions):
                if i.op not in ("bra", "ret", "exit", "bar", "barrier"):
                    machine.build(at, i)
                elif i.op == "bra":
                    assert i.operands[0] in kernel.labels


def test_the_host_refuses_what_it_refuses_a_card(host):
    x = torch.zeros(1, 2, 3, 3)
    gates, out = [torch.zeros(1, 2)] * 9, torch.zeros(1, 18, 3, 3)
    with pytest.raises(Failed, match="at most 8 gates"):
        host.channel_gate_forward(lambda launch: None, x, gates, out)


def test_what_goes_wrong_within_a_launch_is_raised(host):
    x, out = torch.zeros(1, 2, 3, 3), torch.zeros(1, 2)

    def broken(launch):
        raise ValueError(f"{launch.kernel} {launch.blocks} {launch.threads}")

    with pytest.raises(ValueError, match=r"consensus_pool_forward_f32_\w+ 1 \d+"):
        host.consensus_pool_forward(broken, x, None, out)


def test_a_host_that_does_not_compile(tmp_path):
    shutil.copytree(CSRC / "cuda", tmp_path / "cuda")
    shutil.copytree(CSRC / "cpu", tmp_path / "cpu")
    (tmp_path / "cuda/consensus_pool.cpp").write_text("int broken")
    with pytest.raises(Failed, match=r"The host's half of consensus_pool in .* does not compile:\n"):
        Host(tmp_path).consensus_pool_forward(print, torch.zeros(1, 2, 3, 3), None, torch.zeros(1, 2))


# ------------------------------------------------------------------------------------------------------- weights

# What ptxas makes of one more of an operation, counted in the code for sm_70. Divisions and roots of floats have a
# second way for rare numbers, which runs for none of ours: there the weight is less than the code.
WEIGHED = {
    "add": ("int", "X + Y", 0.1),
    "multiply": ("int", "X * Y", 0.1),
    "divide": ("int", "X / Y", 0.1),
    "remainder": ("int", "X % Y", 0.1),
    "by_49": ("int", "X / 49", 0.3),
    "divide_u32": ("unsigned", "X / Y", 0.1),
    "remainder_u32": ("unsigned", "X % Y", 0.1),
    "least": ("int", "min(X, Y)", 0.1),
    "choose": ("int", "Z > 3 ? X : Y", 0.1),
    "high": ("int", "__mulhi(X, Y)", 0.3),
    "add_64": ("long long", "X + Y", 0.1),
    "multiply_64": ("long long", "X * Y", 0.1),
    "shift_64": ("long long", "X << 3", 0.1),
    "choose_64": ("long long", "Z > 3 ? X : Y", 0.1),
    "add_f32": ("float", "X + Y", 0.1),
    "fma_f32": ("float", "X * Y + Z", 0.1),
    "convert": ("float", "(float)(int)X", 0.1),
    "divide_f32": ("float", "X / Y", 0.6),
    "root_f32": ("float", "sqrtf(X)", 0.6),
    "invert_f32": ("float", "1.0f / X", 0.6),
    "add_f64": ("double", "X + Y", 0.1),
    "divide_f64": ("double", "X / Y", 0.6),
}


def weighed(name, type, form, count):
    lines = [f"{type} x{i} = p[threadIdx.x + {32 * i}];" for i in range(11)]
    for i in range(count):
        each = form.replace("X", f"x{i}").replace("Y", f"x{i + 1}").replace("Z", f"x{i + 2}")
        lines.append(f"x{i} = {each};")
    lines += [f"q[threadIdx.x + {32 * i}] = x{i};" for i in range(11)]
    head = f'extern "C" __global__ void {name}_{count}(const {type} *p, {type} *q)'
    return f"{head} {{ {' '.join(lines)} }}\n"


def sizes_of_code(cubin):
    """Instructions of every kernel, of 16 bytes each, but for those that fill up."""
    (sections,) = struct.unpack_from("<Q", cubin, 40)
    size, count, names = struct.unpack_from("<HHH", cubin, 58)
    headers = [struct.unpack_from("<IIQQQQ", cubin, sections + i * size) for i in range(count)]
    found = {}
    for name, *_, offset, length in headers:
        start = headers[names][4] + name
        text = cubin[start : cubin.index(b"\0", start)].decode()
        if text.startswith(".text."):
            code = [struct.unpack_from("<Q", cubin, offset + at)[0] & 0xFFF for at in range(0, length, 16)]
            found[text[6:]] = sum(each != 0x918 for each in code)
    return found


@needs_nvrtc
def test_the_weights_of_instructions_are_those_of_the_compiled_code():
    source = "".join(weighed(name, *how[:2], count) for name, how in WEIGHED.items() for count in (4, 8))
    code = sizes_of_code(FOUND.compile(source, "weights.cu", "sm_70", {}).image)
    kernels = parse(FOUND.compile(source, "weights.cu", "compute_70", {}).image.decode()).kernels
    for name, (*_, off) in WEIGHED.items():
        four, eight = (sum(map(cost, kernels[f"{name}_{count}"].instructions)) for count in (4, 8))
        made = (code[f"{name}_8"] - code[f"{name}_4"]) / 4
        assert (1 - off) * made <= (eight - four) / 4 <= (1 + min(off, 0.3)) * made, (name, made, (eight - four) / 4)
