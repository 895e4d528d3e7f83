"""Where the tests of ``make gpu`` run: on the card, or on a backend for CPU tensors that stands in for it.

M3EM_GPU_STAND_IN=simt, or another backend for CPU tensors, tries them out where there is no card.
"""

import os
from contextlib import contextmanager

import pytest
import torch

import m3em_fast
from m3em_fast import backends

# Without it torch's matrix products are not the same from run to run. Read when the card is first used.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
STAND_IN = os.environ.get("M3EM_GPU_STAND_IN")
if STAND_IN is None and not torch.cuda.is_available():
    pytest.skip("torch sees no CUDA device here", allow_module_level=True)
DEVICE = "cpu" if STAND_IN else "cuda"


def served():
    """The backends that are tried: those with kernels that serve tensors of the device."""
    if STAND_IN:
        return (STAND_IN,)
    # cuda is what `make gpu` is about: without it there are failures, and not fewer tests.
    return ("cuda", *(name for name in backends.available("cuda") if name == "triton"))


BACKENDS = served()
# Of triton a few shapes and layouts, for it compiles for each of them; the interpreter runs all of them (test_ops.py).
TRITON_SHAPES, TRITON_LAYOUTS = ((3, 40, 7, 7), (2, 200, 7, 8), (2, 70, 7, 7)), ("contiguous", "channels_last")
ON_CARD = pytest.mark.skipif(STAND_IN is not None, reason="a stand-in on the CPU has no streams")


def fits(request, name):
    """Leaves out what would take triton too long on a card."""
    found = request.node.callspec.params
    few = found.get("shape", TRITON_SHAPES[0]) in TRITON_SHAPES
    if DEVICE == "cuda" and name == "triton" and not (few and found.get("layout", "contiguous") in TRITON_LAYOUTS):
        pytest.skip("triton compiles for every shape and layout; the interpreter has them all")
    if name != "cuda" and request.node.get_closest_marker("compiled_kernels"):
        pytest.skip("of the compiled kernels alone")


COMPILED_KERNELS = pytest.mark.compiled_kernels


@contextmanager
def on_the_card(name):
    """One backend by name, so that no other one serves in its place; memory that torch hands out is NaN."""
    if STAND_IN == "simt":
        import simt_cases

        simt_cases.simulated()
    torch.use_deterministic_algorithms(True, warn_only=True)
    products = torch.backends.cuda.matmul
    before, products.allow_fp16_reduced_precision_reduction = products.allow_fp16_reduced_precision_reduction, False
    halves, products.allow_bf16_reduced_precision_reduction = products.allow_bf16_reduced_precision_reduction, False
    try:
        with m3em_fast.backend(name):
            yield
    finally:
        products.allow_fp16_reduced_precision_reduction = before
        products.allow_bf16_reduced_precision_reduction = halves
        torch.use_deterministic_algorithms(False)


def assert_equal(found, wanted):
    assert all(map(torch.equal, found, wanted)), [(f - w).abs().max() for f, w in zip(found, wanted, strict=True)]
