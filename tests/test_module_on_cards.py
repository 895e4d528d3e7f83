"""The whole module on the kernels for cards, run on the CPU (csrc/simt): what it launches, and the memory it takes."""

from collections import Counter

import pytest
import torch

import m3em_fast
import simt_cases
from m3em_fast.nn import MutualEnhancement
from m3em_fast.ops import _gated_projection_cuda
from m3em_fast.ops._gated_projection_cuda import ALIGNMENT

SPATIAL, VECTOR = {"RGB": 24, "Flow": 24}, {"Audio": 10}
N, D, PART = 6, 5, 2
PARTS = N // PART  # of gated_projection, for each of the two maps
VALUES = N * 24 * 49  # of a map
FEATURES = [(torch.float64, None), (torch.float32, None), (torch.float16, torch.float32), (torch.bfloat16, None)]
FEATURES += [(torch.float16, None)]
EVERY_DTYPE = pytest.mark.parametrize(("dtype", "beside"), FEATURES, ids=str)
EVERY_LAYOUT = pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
FROZEN = pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "features too"])


@pytest.fixture(autouse=True)
def driver():
    found, _ = simt_cases.simulated()
    with m3em_fast.backend("simt"):
        yield found


def make(dtype, beside, layout=torch.contiguous_format, frozen=True):
    torch.manual_seed(0)
    module = MutualEnhancement(SPATIAL, VECTOR, latent_channels=D, reduction=2).double()
    features = {k: torch.randn(N, c, 7, 7).to(dtype, memory_format=layout) for k, c in SPATIAL.items()}
    features |= {k: torch.randn(N, c).to(dtype) for k, c in VECTOR.items()}
    return module.to(beside or dtype), {k: x.requires_grad_(not frozen) for k, x in features.items()}


def leaves_of(module, features):
    return [*module.parameters(), *(x for x in features.values() if x.requires_grad)]


def grads_for(out):
    return [torch.linspace(-1, 1, t.numel(), dtype=torch.float64).view(t.shape).to(t.dtype) for t in out]


def flat(enhanced):
    return [enhanced.consensus, *enhanced.vectors.values()]


@pytest.fixture
def small_workspace(monkeypatch):
    """Room for two samples, in whatever dtype the parameters have. Returns the bytes of such a gated operand."""

    def set_for(module, layout=torch.contiguous_format):
        size, unit = next(module.parameters()).element_size(), 1 if layout == torch.channels_last else ALIGNMENT
        monkeypatch.setattr(_gated_projection_cuda, "WORKSPACE", PART * 2 * 24 * 49 * size)
        return 2 * 24 * -(-PART * 49 * size // unit) * unit

    return set_for


class Memory:
    """Every allocation while it lasts, by torch's own account."""

    def __enter__(self):
        self.profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
        self.profile.__enter__()
        return self

    def __exit__(self, *error):
        self.profile.__exit__(*error)
        events = [e for e in self.profile.profiler.kineto_results.events() if e.name() == "[memory]"]
        # Those freed are below zero.
        self.changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]

    def at_least(self, size):
        return [change for change in self.changes if change >= size]

    @property
    def peak(self):
        """Above what there was before."""
        held = most = 0
        for change in self.changes:
            held += change
            most = max(most, held)
        return most

    @property
    def left(self):
        return sum(self.changes)


@EVERY_DTYPE
@EVERY_LAYOUT
@FROZEN
def test_result_and_gradients_are_those_of_the_definition(small_workspace, dtype, beside, layout, frozen):
    """Within 64 roundings of the largest value, as bench/gate.py has it: to the dtype of the features, in which the ops
    hand on what they have computed."""
    module, features = make(dtype, beside, layout, frozen)
    small_workspace(module)
    out = flat(module(features))
    grads = grads_for(out)
    found = [*out, *torch.autograd.grad(out, leaves_of(module, features), grads)]
    with m3em_fast.backend("reference"):
        exactly = module.double()
        wide = {k: x.detach().double().requires_grad_(not frozen) for k, x in features.items()}
        wanted = flat(exactly(wide))
        wanted += torch.autograd.grad(wanted, leaves_of(exactly, wide), [grad.double() for grad in grads])
    assert len(found) == len(wanted) == 4 + 14 + (0 if frozen else 3)
    for got, want in zip(found, wanted, strict=True):
        allowed = 64 * torch.finfo(dtype).eps / 2
        torch.testing.assert_close(got.double(), want, rtol=0, atol=allowed * want.abs().max().item())


def launched(driver):
    """Kernels by the name of their stage, without dtype and shape; whatever else is called comes by its own name."""
    calls = driver.log()
    expected = ("cuCtxGetCurrent", "cuCtxPushCurrent", "cuCtxPopCurrent", "cuLaunchKernel")
    # Neither memory of its own nor anything that waits.
    assert {call.name for call in calls} <= set(expected)
    return Counter(call.subject.split()[0].rsplit("_", 2)[0] for call in calls if call.name == "cuLaunchKernel")


@EVERY_DTYPE
@EVERY_LAYOUT
@FROZEN
def test_what_is_launched(driver, small_workspace, dtype, beside, layout, frozen):
    module, features = make(dtype, beside, layout, frozen)
    small_workspace(module)
    leaves = leaves_of(module, features)
    out = flat(module(features))  # loads the kernels
    torch.autograd.grad(out, leaves, grads_for(out))
    driver.log()
    out = flat(module(features))
    assert launched(driver) == {
        "consensus_pool_forward": 4,
        "channel_gate_forward": 2 * PARTS,
        "consensus_map_partial": 1,
        "consensus_map_finish": 1,
    }
    torch.autograd.grad(out, leaves, grads_for(out))
    # Pooling for the gates has a gradient for the features alone, one number a channel, which takes no kernel.
    assert launched(driver) == {
        "consensus_pool_backward": 2,
        "consensus_pool_finish": 2,
        "channel_gate_backward": 2 * PARTS,
        "channel_gate_forward": 2 * PARTS,
        "consensus_map_backward": 1,
    }


def test_without_gradients_nothing_more_is_launched(driver, small_workspace):
    module, features = make(torch.float32, None)
    small_workspace(module)
    module(features)
    driver.log()
    with torch.no_grad():
        module(features)
    assert sum(launched(driver).values()) == 4 + 2 * PARTS + 2


# Not bfloat16: torch's product of it on a CPU takes memory of its own.
@pytest.mark.parametrize(("dtype", "beside"), [f for f in FEATURES if f[0] != torch.bfloat16], ids=str)
@EVERY_LAYOUT
@FROZEN
def test_no_gated_tensor_and_no_copy_of_the_features(small_workspace, dtype, beside, layout, frozen):
    """The gated tensor would take three times the workspace, and a copy of a map more than half of it."""
    module, features = make(dtype, beside, layout, frozen)
    workspace = small_workspace(module, layout)
    x, leaves = VALUES * dtype.itemsize, leaves_of(module, features)
    latent, half = N * D * 49 * (beside or dtype).itemsize, workspace // 2
    assert x > half
    with Memory() as forward:
        out = flat(module(features))
    assert forward.at_least(half) == [workspace] * len(SPATIAL)
    # Row-major products are made in the same order as the operand, one part at a time.
    product = 0 if layout == torch.channels_last else workspace // (2 * 24) * D
    assert forward.peak <= forward.left + workspace + product
    with Memory() as backward:
        gradients = torch.autograd.grad(out, leaves, grads_for(out))
    big = Counter(backward.at_least(half))
    # In parts the gated operand's gradient and, in the same memory, the operand once more for the weight.
    wanted = Counter({workspace: len(SPATIAL)})
    if frozen:
        # And the gradient of the latent map, of a part once more in the order that products take.
        assert backward.peak <= workspace + latent + product
    else:
        # By two of the three ops that read a map: that of the plain mean is one number a channel.
        wanted[x] += 2 * len(SPATIAL)
    assert big == wanted
    del gradients
