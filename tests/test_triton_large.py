"""Triton kernels on tensors of more than 2^31 numbers, interpreted, in memory that is only promised: a page that nobody
touches costs nothing. The interpreter says of every 32-bit number that overflows, and memory lies before each tensor,
so that a wrong address finds zeros and no end of the process."""

import math
import mmap

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from m3em_fast.triton import _launch, channel_gate, consensus_map, consensus_pool
from triton_cases import quicken, set_options

pytestmark = pytest.mark.skipif(not _launch.INTERPRETED, reason="TRITON_INTERPRET was not set when triton was imported")
COUNT = 2**31
NO_RESERVE = 0x4000  # mmap.MAP_NORESERVE, which has its name since Python 3.11
new_empty = torch.Tensor.new_empty


def promised(shape, dtype):
    """Contiguous zeros, with 2^31 more before them."""
    size = (COUNT + math.prod(shape)) * dtype.itemsize
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE)
    return torch.frombuffer(memory, dtype=dtype)[COUNT:].view(shape)


@pytest.fixture(autouse=True)
def strict(monkeypatch):
    """Overflows are errors, and what kernels leave for one another is promised memory too."""

    def promise(x, size, *rest, dtype=None, **options):
        shape = (size, *rest) if isinstance(size, int) else tuple(size)
        if math.prod(shape) < COUNT:
            return new_empty(x, shape, dtype=dtype, **options)
        return promised(shape, dtype or x.dtype)

    monkeypatch.setattr(torch.Tensor, "new_empty", promise)
    quicken()
    before = set_options(debug=True, sanitize_overflow=True)
    yield
    set_options(**before)


def numbers(*shape):
    """Between 1/2 and 3/2, so that no sum is far from others."""
    source = torch.Generator().manual_seed(math.prod(shape))
    return torch.rand(shape, generator=source).add_(0.5).half()


# Every call: from its tensors, and what makes memory for its results, to the results.


def gate_forward(empty, x, *gates):
    n, c, h, w = x.shape
    out = empty((n, len(gates) * c, h, w))
    channel_gate.forward(x, gates, out)
    return [out]


def gate_backward(empty, grad, x, *gates):
    grads = [empty(x.shape), *(gate.new_empty(gate.shape) for gate in gates)]
    channel_gate.backward(x, gates, grad, grads)
    return grads


def pool_forward(empty, x, cmap):
    out = x.new_empty(x.shape[:2])
    consensus_pool.forward(x, cmap, out)
    return [out]


def pool_backward(empty, x, cmap, grad):
    grads = [empty(x.shape), x.new_empty(cmap.shape)]
    consensus_pool.backward(x, cmap, grad, *grads)
    return grads


def map_both(scales, center):
    def call(empty, a, b, grad):
        options = (scales, center, 1e-8, a.dtype)
        out, saved = consensus_map.forward(options, (a, b), True)
        return [out, *consensus_map.backward(options, grad, (a, b), saved, (True, True))]

    return call


# ------------------------------------------------------------------------------------------ strides as large as that


def far_apart(values, axis, memory, start):
    """The numbers with 2^30 others between neighbours along one axis: the third is more than 2^31 away from the first,
    and its stride fits into 32 bits. ``start`` keeps tensors apart."""
    strides = list(values.stride())
    strides[axis] = COUNT // 2 + 8
    found = memory.as_strided(values.shape, strides, memory.storage_offset() + start)
    return found.copy_(values)


X, VECTOR, PLANE, ONE = (3, 3, 3, 3), (3, 3), (3, 1, 3, 3), (3, 1)
STRIDED = {
    "channel_gate": (gate_forward, X, VECTOR),
    "channel_gate_of_one_channel": (gate_forward, PLANE, ONE, ONE, ONE),
    "channel_gate_backward": (gate_backward, X, X, VECTOR),
    "channel_gate_backward_of_one_channel": (gate_backward, X, PLANE, ONE, ONE, ONE),
    "consensus_pool": (pool_forward, X, PLANE),
    "consensus_pool_backward": (pool_backward, X, PLANE, VECTOR),
    "consensus_map": (map_both(2, False), X, X, PLANE),
    "consensus_map_center": (map_both(2, True), X, X, PLANE),
    "consensus_map_on_a_card": (map_both(2, True), X, X, PLANE),
}


@pytest.mark.parametrize("axis", range(4), ids=("N", "C", "H", "W"))
@pytest.mark.parametrize("name", STRIDED)
def test_neighbours_that_are_far_apart(monkeypatch, name, axis):
    if name.endswith("_on_a_card"):  # its tiles are smaller, and single cells then a path of their own
        monkeypatch.setattr(consensus_map, "capability_of", lambda x: 70)
    call, *shapes = STRIDED[name]
    inputs = [numbers(*shape) for shape in shapes]
    memory, starts = promised((COUNT + 2**17,), torch.float16), iter(range(0, 2**16, 2**10))

    def spread(values):
        if values.dim() <= axis or values.shape[axis] < 3:  # one that has no such axis
            return values
        return far_apart(values, axis, memory, next(starts))

    wanted = call(lambda shape: torch.empty(shape, dtype=torch.float16), *inputs)
    monkeypatch.setattr(consensus_map, "gradients_of", lambda grad, tensors, needs: [spread(t * 0) for t in tensors])
    found = call(lambda shape: spread(torch.zeros(shape, dtype=torch.float16)), *map(spread, inputs))
    for one, other in zip(found, wanted, strict=True):
        assert other.any() and other.isfinite().all()
        assert torch.equal(one, other)


# -------------------------------------------------------------------------------------------------- many samples


@pytest.fixture
def last_sample(monkeypatch):
    """Has the kernels run the programs of the last sample alone."""
    from triton.runtime.interpreter import interpreter_builder as builder

    def launch(kernel, programs, writes, *arguments, **constants):
        samples = max(t.shape[0] for t in writes if t is not None)
        own = programs // samples
        assert own * samples == programs
        with pytest.MonkeyPatch.context() as patch:
            index, dim = builder.set_grid_idx, builder.set_grid_dim
            patch.setattr(builder, "set_grid_dim", lambda *dims: dim(programs, 1, 1))
            patch.setattr(builder, "set_grid_idx", lambda x, *rest: index(programs - own + x, *rest))
            _launch.launch(kernel, own, writes, *arguments, **constants)

    def start():
        for module in (channel_gate, consensus_map, consensus_pool):
            monkeypatch.setattr(module, "launch", launch)

    return start


# A sample's shapes; how many of them there are; tiles of so many channels and positions.
MANY = {
    "channel_gate": (gate_forward, ((32, 1, 1), (32,)), 2**26, None),
    "channel_gate_backward": (gate_backward, ((32, 1, 1), (32, 1, 1), (32,)), 2**26, None),
    "consensus_pool": (pool_forward, ((32, 1, 1), (1, 1, 1)), 2**26, None),
    "consensus_pool_backward": (pool_backward, ((1, 4, 8), (1, 4, 8), (1,)), 2**26, None),
    "consensus_pool_backward_in_chunks": (pool_backward, ((6, 4, 8), (1, 4, 8), (6,)), 2**26, (1, 32)),
    "consensus_map": (map_both(1, False), ((3, 4, 4), (3, 4, 4), (1, 4, 4)), 2**27, None),
    "consensus_map_center": (map_both(1, True), ((3, 4, 4), (3, 4, 4), (1, 4, 4)), 2**27, None),
}


@pytest.mark.parametrize("name", MANY)
def test_many_samples(monkeypatch, last_sample, name):
    call, shapes, samples, tile = MANY[name]
    if tile is not None:
        sizes = {"BLOCK_C": tile[0], "BLOCK_P": tile[1], "num_warps": 1}
        monkeypatch.setattr(consensus_pool, "sizes_of", lambda *_: sizes)
    monkeypatch.setattr(
        consensus_map, "gradients_of", lambda grad, tensors, needs: [t.new_empty(t.shape) for t in tensors]
    )
    alone = [numbers(1, *shape) for shape in shapes]
    wanted = call(lambda shape: torch.zeros(shape, dtype=torch.float16), *alone)
    inputs = []
    for values in alone:
        inputs.append(promised((samples + 2, *values.shape[1:]), torch.float16))
        inputs[-1][-1] = values[0]
    last_sample()
    found = call(lambda shape: promised(shape, torch.float16), *inputs)
    for one, other in zip(found, wanted, strict=True):
        assert other.any() and other.isfinite().all()
        assert torch.equal(one[-1:], other)
