"""The EPIC-KITCHENS-100 challenge of unsupervised domain adaptation: labels, scores, ensembles, submission."""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "PROTOCOLS": "annotations",
    "SPLITS": "annotations",
    "Annotations": "annotations",
    "EpicError": "_errors",
    "Scores": "scores",
    "annotations_folder": "annotations",
    "check_submission": "_check",
    "fuse_scores": "ensemble",
    "read_scores": "scores",
    "score": "scoring",
    "search_weights": "ensemble",
    "write_scores": "scores",
    "write_submission": "submission",
}
__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    # Imported on demand, so that `python -m m3em_fast.epic.scoring` does not find its module loaded already.
    if name in _HOME:
        return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
