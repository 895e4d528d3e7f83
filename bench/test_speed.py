"""The cases of bench/ under pytest-benchmark: ``pytest bench --benchmark-only``, for its comparison of two states:

    pytest bench --benchmark-only --benchmark-save=before        and after a change
    pytest bench --benchmark-only --benchmark-compare --benchmark-compare-fail=median:10%

Forward and backward of every case at the size of a step of the paper, 7x7, float32; M3EM_BENCH_QUICK=1 takes small
inputs. The providers run one after another here, so that ratios between them are those of ``python -m bench``.
"""

from __future__ import annotations

import importlib
import os
from typing import Any

import pytest
import torch

from bench import core, gate
from bench.__main__ import OPS
from bench.case import Case, Size
from bench.providers import Provider, select

SIZE = Size(n=4, c=32, d=16) if os.environ.get("M3EM_BENCH_QUICK") else Size()
CASES = [case for op in OPS for case in importlib.import_module(f"bench.{op}").cases(SIZE, torch.float32, "contiguous")]


@pytest.mark.parametrize("provider", select((), compiled=False), ids=lambda provider: provider.name)
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.op}-{case.variant}")
def test_speed(benchmark: Any, case: Case, provider: Provider) -> None:
    problem = case.setup()
    exact, grads = gate.exact_results(problem)
    entrant = core.admit(provider, problem, grads, exact, limit=600.0)
    assert entrant.error("forward+backward") is None
    benchmark.group = str(case)
    benchmark.extra_info.update(provider=provider.name, requires_grad=case.needs)
    benchmark(core.full_step(entrant, problem, grads))
