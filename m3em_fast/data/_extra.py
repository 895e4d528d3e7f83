"""Libraries that only some of the package needs are imported where they are used."""

from __future__ import annotations

import importlib
from typing import Any


def needs(module: str) -> Any:
    """The module of an optional library.

    Raises:
        ImportError: it is not installed; the message is one sentence that names the extra to install.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f'{module} could not be imported ({error}): pip install "m3em_fast[train]".') from error
