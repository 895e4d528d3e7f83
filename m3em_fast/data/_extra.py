"""Libraries that only some of the package needs are imported where they are used."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from typing import Any


def needs(module: str, extra: str = "train") -> Any:
    """The module of an optional library, which ``extra`` brings.

    Raises:
        ImportError: it is not installed; the message is one sentence that names the extra to install.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f'{module} could not be imported ({error}): pip install "m3em_fast[{extra}]".') from error


# What the extra `train` brings, by the names of modules.
TRAIN = ("matplotlib", "rich", "tensorboard", "torchmetrics", "tqdm", "tyro")


def require(prog: str, *modules: str) -> None:
    """End the program, with one sentence and exit code 2, where libraries of the extra ``train`` are missing."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        print(f'{prog}: {", ".join(missing)} missing: pip install "m3em_fast[train]".', file=sys.stderr)
        sys.exit(2)
