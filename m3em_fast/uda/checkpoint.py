"""Checkpoints that survive interruption and cannot run code."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import torch

__all__ = ["CheckpointError", "load_checkpoint", "random_state", "restore_random_state", "save_checkpoint"]

FORMAT = 1
KEYS = {"format", "model", "optimizer", "scaler", "epoch", "step", "random", "history", "options"}


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message is one sentence."""


def random_state(device: torch.device) -> dict[str, torch.Tensor]:
    """State of the generators that training draws from, as tensors."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore_random_state(state: dict[str, torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write to a temporary file beside ``path``, flush it to the disk, rename: ``path`` is never half a checkpoint."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        torch.save({"format": FORMAT, **state}, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint of :func:`save_checkpoint` with ``weights_only=True``.

    Raises:
        CheckpointError: the file is damaged, holds more than tensors and plain values, or comes from another version.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of what a foreign pickle might hold just before refusing it
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what torch raises here depends on which byte is wrong
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path} is no readable checkpoint of train.py ({reason}).") from error
    if not isinstance(state, dict) or set(state) != KEYS:
        raise CheckpointError(f"{path} is a file of torch, but no checkpoint of train.py.")
    if state["format"] != FORMAT:
        raise CheckpointError(f"{path} has checkpoint format {state['format']}, this version reads format {FORMAT}.")
    return state
