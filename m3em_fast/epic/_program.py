"""What the commands around the challenge share: one sentence and status 2 where something is refused, and tables."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

from m3em_fast import _cli
from m3em_fast.data._extra import needs
from m3em_fast.epic._errors import EpicError

__all__ = ["console", "run"]


def run(target: Callable[..., None], arguments: Sequence[str] | None, module: str) -> int:
    """Call ``target`` with what the command line says; the exit status.

    Args:
        target: a function whose parameters are the options.
        arguments: ``sys.argv[1:]`` by default.
        module: what a user types after ``python -m``.
    """
    try:
        _cli.cli(target, arguments, prog=f"python -m {module}")
    except (EpicError, ImportError) as error:
        print(f"{module}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{module}: interrupted; nothing was left half written.", file=sys.stderr)
        return 130
    return 0


def console() -> Any:
    """Where tables go: a log file has no width of its own, and 80 columns would cut cells in two."""
    width = None if sys.stdout.isatty() else 120
    return needs("rich.console").Console(width=width, highlight=False, markup=False)
