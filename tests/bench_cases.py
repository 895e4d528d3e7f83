"""Small cases of bench/, and its table as text."""

import importlib
import io
from dataclasses import replace

import torch
from rich.console import Console

from bench import report
from bench.__main__ import OPS
from bench.case import Size
from bench.core import Settings

SMALL = Size(n=3, c=8, d=4, h=7, w=8)
QUICK = Settings(seconds=0.0, min_rounds=2, max_rounds=2, tiny_calls=2, tiny_rounds=2, compile_seconds=30.0)


def all_cases(size=SMALL, dtype=torch.float32, layout="contiguous"):
    return [case for op in OPS for case in importlib.import_module(f"bench.{op}").cases(size, dtype, layout)]


def case_of(op, variant, **options):
    return next(case for case in all_cases(**options) if (case.op, case.variant) == (op, variant))


def with_problem(case, problem):
    """The case with tensors and functions made beforehand."""
    return replace(case, setup=lambda: problem)


def rendered(rows):
    console = Console(width=200, file=io.StringIO())
    console.print(report.table(rows))
    return console.file.getvalue()
