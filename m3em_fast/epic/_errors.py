"""What everything around the challenge says when it is given something that it cannot use."""

from __future__ import annotations

__all__ = ["EpicError"]


class EpicError(ValueError):
    """Labels, scores or a submission are refused; the message is one sentence: what, where, and what was expected."""
