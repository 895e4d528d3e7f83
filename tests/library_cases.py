"""What the tests of registered ops and of compiled functions share."""

import torch


def ops_of(call):
    """The registered ops that a call becomes."""
    return ["_consensus_pool" if call.op == "gated_consensus_pool" else f"_{call.op}"]


def leaves_of(tensors, needs):
    return [tensor.detach().requires_grad_(need) for tensor, need in zip(tensors, needs, strict=True)]


def gradients(out, leaves, grad, **options):
    return torch.autograd.grad(out, [leaf for leaf in leaves if leaf.requires_grad], grad, **options)


def forms(tensors):
    return [(t.shape, t.dtype, t.stride()) for t in tensors]


def assert_same(found, wanted):
    """The same bits in the same layout."""
    assert forms(found) == forms(wanted)
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


class Saved:
    """Which of some tensors are kept for a backward, by their memory."""

    def __init__(self, tensors):
        self.addresses = [tensor.data_ptr() for tensor in tensors]

    def of(self, function, inputs):
        seen = set()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.add(t.data_ptr()) or t, lambda t: t):
            out = function(*inputs)
        return out, [address in seen for address in self.addresses]
