"""Checkpoints that survive interruption and cannot run code."""

from __future__ import annotations

import io
import math
import sys
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from m3em_fast.uda.distributed import ALONE, Team
from m3em_fast.uda.evaluation import METRICS
from m3em_fast.uda.run import UsageError, write_whole

__all__ = [
    "CheckpointError",
    "load_checkpoint",
    "random_state",
    "restore",
    "restore_random_state",
    "save_checkpoint",
]

FORMAT = 2
KEYS = {"format", "model", "optimizer", "scaler", "epoch", "step", "random", "history", "options", "data"}


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message is one sentence."""


def random_state(device: torch.device, team: Team = ALONE) -> dict[str, Tensor]:
    """State of the generators that training draws from, as tensors: of one process (bytes,), of a ``team`` of several
    (processes, bytes)."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return {name: team.stacked(x) for name, x in state.items()}


def restore_random_state(state: dict[str, Tensor], device: torch.device, team: Team = ALONE) -> int:
    """Put back this process's part of a state, and return how many processes it is of; where these are not as many as
    there are now, nothing is put back."""
    for name, x in random_state(device).items():
        if name in state and (state[name].shape[-1:] != x.shape or state[name].dtype != x.dtype):
            raise ValueError(f"no state of a generator: {name}")
    processes = len(state["cpu"]) if state["cpu"].dim() == 2 else 1
    if processes == team.size:
        # Copied: torch reads a state from the beginning of its storage, and beyond its end.
        own = {name: (x[team.rank] if x.dim() == 2 else x).clone() for name, x in state.items()}
        torch.set_rng_state(own["cpu"])
        if device.type == "cuda" and "cuda" in own:
            torch.cuda.set_rng_state(own["cuda"], device)
    return processes


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint, or leave the one before as it is."""
    # Not to the file itself: where the disk is full, torch's archive ends with an error about its own positions.
    memory = io.BytesIO()
    torch.save({"format": FORMAT, **state}, memory)
    write_whole(path, memory.getbuffer())


def _check_sums(path: Path | io.BytesIO) -> None:
    """torch writes checksums and does not read them: a flipped bit would be trained on."""
    with zipfile.ZipFile(path) as archive:
        # Nothing that torch writes is packed; what is could be a thousand times its size.
        packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist())
        damaged = "packed entries" if packed else archive.testzip()
    if damaged is not None:
        raise ValueError(f"{damaged} is damaged")


def load_checkpoint(path: Path, team: Team = ALONE) -> dict[str, Any]:
    """Read a checkpoint of :func:`save_checkpoint` with ``weights_only=True``.

    Of a ``team`` the first process alone reads the file, which other machines need not have.

    Raises:
        CheckpointError: the file is damaged, holds more than tensors and plain values, or comes from another version.
    """
    if team.first and not path.is_file():
        raise CheckpointError(f"{path} is no ordinary file.")
    file: Path | io.BytesIO = path
    if team.size > 1:
        file = io.BytesIO(team.told(path.read_bytes() if team.first else None))
    try:
        _check_sums(file)
        if isinstance(file, io.BytesIO):
            file.seek(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of what a foreign pickle might hold just before refusing it
            state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # what torch raises here depends on which byte is wrong
        reason = str(error).splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{path} is no readable checkpoint of train.py ({reason:.200}).") from error
    if not isinstance(state, dict) or not {"format", "model", "options"} <= set(state):
        raise CheckpointError(f"{path} is a file of torch, but no checkpoint of train.py.")
    if type(state["format"]) is not int or state["format"] != FORMAT:
        raise CheckpointError(
            f"{path} has checkpoint format {state['format']!r:.40}, this version reads format {FORMAT}."
        )
    if set(state) != KEYS:
        odd = ", ".join(sorted(str(key)[:40] for key in set(state) ^ KEYS)[:5])
        raise CheckpointError(f"{path} must have exactly the entries of format {FORMAT}; missing or unknown: {odd}.")
    return state


def restore(
    path: Path,
    options: dict[str, Any],
    data: dict[str, str],
    reported: Sequence[str] = ("source_val", "target_test"),
    *,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    device: torch.device,
    epochs: int,
    steps: int,
    team: Team = ALONE,
) -> tuple[dict[str, list], int, int]:
    """Put the state of a checkpoint into what trains.

    Args:
        path: the checkpoint.
        options: with which the run goes on; plain values.
        data: split -> fingerprint of the store that it goes on with.
        reported: splits whose accuracies the history has.
        epochs, steps: how many there are in all, and in each epoch.
        team: the processes, all of which call this. They may be more or fewer than those that trained before: only
            the random numbers are then others.

    Returns:
        history, epoch and step of the checkpoint.

    Raises:
        UsageError: the run was started with other options or on other data.
        CheckpointError: as in :func:`load_checkpoint`, or the state is not one of this run.
    """
    state = load_checkpoint(path, team)
    found, epoch, step = state["options"], state["epoch"], state["step"]
    if not (isinstance(found, dict) and _plain(found)):
        raise CheckpointError(f"{path} does not say with what options the run was started.")
    if changed := sorted(name for name in options if found.get(name) != options[name]):
        name = changed[0]
        flag = f"--{name.replace('_', '-')}"
        raise UsageError(f"--resume: {path.parent} was started with {flag} {found.get(name)}, not {options[name]}.")
    known = state["data"]
    if not (isinstance(known, dict) and known.keys() == data.keys() and _plain(known)):
        raise CheckpointError(f"{path} does not say on what data the run was started.")
    if other := next((split for split in data if known[split] != data[split]), None):
        raise UsageError(
            f"--resume: {path.parent} was started on a {other} whose manifest's SHA-256 begins with "
            f"{known[other]!s:.12}, not {data[other]:.12}; were the data made again?"
        )
    if not (_position(epoch, step, epochs, steps) and _history(state["history"], reported, epoch, step, steps)):
        raise CheckpointError(
            f"{path} does not fit {epochs} epochs of {steps} steps; was it trained on other data, or altered?"
        )
    try:
        if not _same_form(state["model"], model.state_dict()):
            raise ValueError("other weights")
        groups = optimizer.state_dict()["param_groups"]  # not the file's: their numbers come from the options
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for index, buffers in state["optimizer"]["state"].items():
            if not _same_form(buffers, {"momentum_buffer": parameters[index]}):
                raise ValueError("other momentum")
        found, own = state["scaler"], scaler.state_dict()
        own |= {name: found[name] for name in ("scale", "_growth_tracker") if name in own}
        if not _same_form(found, scaler.state_dict()) or found != own or not 0 < found.get("scale", 1.0) < math.inf:
            raise ValueError("other loss scaling")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict({"state": state["optimizer"]["state"], "param_groups": groups})
        scaler.load_state_dict(state["scaler"])
        processes = restore_random_state(state["random"], device, team)
    except Exception as error:  # a state that was not written by save_checkpoint fails in any way it likes
        raise CheckpointError(f"{path} does not fit this model; was it trained on other data, or altered?") from error
    if processes != team.size:
        team.seed(options.get("seed", 0), epoch, step)
        if team.first:
            said = f"{path.parent} was trained in {processes} processes and goes on in {team.size}, with other dropout."
            print(f"train.py: {said}", file=sys.stderr)
    return state["history"], epoch, step


def _plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) and _plain(x) for key, x in value.items())
    if isinstance(value, list):
        return all(_plain(x) for x in value)
    return value is None or type(value) in (bool, int, float, str)


def _position(epoch: Any, step: Any, epochs: int, steps: int) -> bool:
    return type(epoch) is type(step) is int and epoch >= 0 <= step <= steps and epoch * steps + step <= epochs * steps


def _history(history: Any, reported: Sequence[str], epoch: int, step: int, steps: int) -> bool:
    if not _plain(history) or not isinstance(history, dict):
        return False
    lengths = dict.fromkeys(("loss", "terms"), epoch * steps + step) | dict.fromkeys(reported, epoch)
    if {name: len(x) for name, x in history.items() if isinstance(x, list)} != lengths or len(history) != len(lengths):
        return False
    terms, scores = history["terms"], [x for split in reported for x in history[split]]
    if not all(isinstance(x, dict) for x in terms + scores):
        return False
    numbers = [*history["loss"], *(value for x in terms + scores for value in x.values())]
    names = all(x.keys() == terms[0].keys() for x in terms) and all(set(x) == set(METRICS) for x in scores)
    return names and all(type(x) is float and math.isfinite(x) for x in numbers)


def _same_form(found: Any, wanted: dict[str, Any]) -> bool:
    """Whether two flat dicts have the same names, and values of the same types, shapes and dtypes."""
    if not isinstance(found, dict) or found.keys() != wanted.keys():
        return False
    for name, value in wanted.items():
        other = found[name]
        if isinstance(value, Tensor):
            if not isinstance(other, Tensor) or other.layout != torch.strided or other.is_meta:
                return False
            if other.shape != value.shape or other.dtype != value.dtype:
                return False
        elif type(other) is not type(value):
            return False
    return True
