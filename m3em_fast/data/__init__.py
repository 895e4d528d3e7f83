"""Feature store, samplers and the embedded digits benchmark."""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "BatchReader": "prefetch",
    "FeatureStore": "store",
    "FeatureStoreWriter": "store",
    "Modality": "store",
    "Prefetch": "prefetch",
    "StoreError": "store",
    "frame_offsets": "store",
    "import_features": "importer",
    "num_batches": "samplers",
    "paired_batches": "samplers",
}
__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    # Imported on demand, so that `python -m m3em_fast.data.store` does not find its module loaded already.
    if name in _HOME:
        return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
