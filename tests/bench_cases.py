"""Small cases of bench/, its table as text, and a provider that kills the process it runs in."""

import importlib
import io
import itertools
import os
from dataclasses import dataclass, replace

import torch
from rich.console import Console

from bench import report
from bench.__main__ import OPS
from bench.case import Size
from bench.core import Settings
from bench.providers import Provider

SMALL = Size(n=3, c=8, d=4, h=7, w=8)
QUICK = Settings(seconds=0.0, min_rounds=2, max_rounds=2, tiny_calls=2, tiny_rounds=2, compile_seconds=30.0)


def all_cases(size=SMALL, dtype=torch.float32, layout="contiguous", beside=None):
    return [case for op in OPS for case in importlib.import_module(f"bench.{op}").cases(size, dtype, layout, beside)]


def case_of(op, variant, **options):
    return next(case for case in all_cases(**options) if (case.op, case.variant) == (op, variant))


def with_problem(case, problem):
    """The case with tensors and functions made beforehand."""
    return replace(case, setup=lambda: problem)


def rendered(rows):
    console = Console(width=200, file=io.StringIO())
    console.print(report.table(rows))
    return console.file.getvalue()


@dataclass(frozen=True)
class Kills(Provider):
    """Dies of ``signal`` in the call after ``calls`` good ones; of an exit code where that is what was asked for."""

    signal: int = 0
    calls: int = 0
    code: int | None = None
    dtype: torch.dtype | None = None  # of the first input; others do not count

    def function(self, problem):
        count = itertools.count()

        def kill(*tensors):
            if self.dtype in (None, tensors[0].dtype) and next(count) == self.calls:
                if self.code is not None:
                    os._exit(self.code)
                os.kill(os.getpid(), self.signal)
            return problem.fast(*tensors)

        return kill
