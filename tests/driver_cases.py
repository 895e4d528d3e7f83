"""What the tests of the launcher share: calls of an op that go through it, and what the driver has seen of them."""

import torch

import m3em_fast
from m3em_fast import ops
from op_cases import Call, check, random_tensors

# Calls that a launcher makes, each with an error that it may meet.
WRONG = {"cuModuleLoadData": 2, "cuModuleGetFunction": 500, "cuFuncSetAttribute": 1}
WRONG |= {"cuFuncLoad": 2, "cuLaunchKernel": 700}
LARGE = Call("consensus_map")


def inputs(n=2, d=5, h=4, w=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, d, h, w, generator=generator) for _ in range(2)]


def large():
    """Maps whose blocks need more shared memory than is given unasked."""
    return inputs(n=1, d=3, h=56, w=56)


def result(a, b):
    a.requires_grad_()
    out = ops.consensus_map(a, b)
    return [out.detach(), torch.autograd.grad(out.sum(), a)[0]]


def assert_right(found, a, b):
    with m3em_fast.backend("reference"):
        for got, wanted in zip(found, result(a, b), strict=True):
            torch.testing.assert_close(got, wanted)


def names(calls):
    return [call.name for call in calls]


def made(driver, name):
    """The calls of one name since the last time, for a test that looks at one alone."""
    return [call for call in driver.log() if call.name == name]


def check_large():
    check("simt", LARGE, random_tensors(LARGE, 1, 3, 56, 56, torch.float32))
