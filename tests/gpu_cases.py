"""Where the tests of ``make gpu`` run: on the card, or on a backend for CPU tensors that stands in for it.

M3EM_GPU_STAND_IN=simt, or another backend for CPU tensors, tries them out where there is no card.
"""

import os
from contextlib import contextmanager

import pytest
import torch

import m3em_fast

# Without it torch's matrix products are not the same from run to run. Read when the card is first used.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
STAND_IN = os.environ.get("M3EM_GPU_STAND_IN")
if STAND_IN is None and not torch.cuda.is_available():
    pytest.skip("torch sees no CUDA device here", allow_module_level=True)
DEVICE, BACKEND = ("cpu", STAND_IN) if STAND_IN else ("cuda", "cuda")
ON_CARD = pytest.mark.skipif(STAND_IN is not None, reason="a stand-in on the CPU has no streams")


@contextmanager
def on_the_card():
    """Backend ``cuda`` by name, so that no other one serves in its place; memory that torch hands out is NaN."""
    if STAND_IN == "simt":
        import simt_cases

        simt_cases.simulated()
    torch.use_deterministic_algorithms(True, warn_only=True)
    products = torch.backends.cuda.matmul
    before, products.allow_fp16_reduced_precision_reduction = products.allow_fp16_reduced_precision_reduction, False
    halves, products.allow_bf16_reduced_precision_reduction = products.allow_bf16_reduced_precision_reduction, False
    try:
        with m3em_fast.backend(BACKEND):
            yield
    finally:
        products.allow_fp16_reduced_precision_reduction = before
        products.allow_bf16_reduced_precision_reduction = halves
        torch.use_deterministic_algorithms(False)


def assert_equal(found, wanted):
    assert all(map(torch.equal, found, wanted)), [(f - w).abs().max() for f, w in zip(found, wanted, strict=True)]
