"""What train.py can be told: typed options with a sentence each, the presets, and what is refused before anything is
written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from m3em_fast import _cli, backends
from m3em_fast.epic.models import MODELS
from m3em_fast.uda.model import METHODS
from m3em_fast.uda.run import UsageError

__all__ = ["PRESETS", "Options", "parse", "preset", "resolve"]

Model = Literal["all", "A", "B", "C", "D", "baseline"]
Protocol = Literal["digits", "val", "test"]


@dataclass(frozen=True)
class Options:
    """Train TA3N + M3EM on feature stores; the defaults shown are those of the preset."""

    preset: Literal["digits", "epic"] = "digits"
    """Where defaults come from: the digits benchmark, or the EPIC-KITCHENS-100 UDA challenge as published."""
    model: Model = "all"
    """Which modalities are read: all, those of the report's Model A to D, or of the public baseline (one stream)."""
    protocol: Protocol = "digits"
    """Which splits train, and which are reported on; val and test are the challenge's, see docs/reproduce.md."""
    data: Path = Path("data/digits")
    """Folder with a feature store, named after it, for each split of the protocol."""
    run: Path | None = None
    """Folder for everything that this run writes. None: runs/<preset>[-<model>-<protocol>]-<method>-<free number>."""
    resume: bool = False
    """Go on from the last checkpoint in --run, with the same options; the metrics become bitwise the same."""
    method: Literal["source_only", "ta3n", "ta3n_smr", "ta3n_cmc", "m3em"] = "m3em"
    """source_only: no adaptation. ta3n: adversarial, attentive. ta3n_smr, ta3n_cmc: one half of M3EM. m3em: both."""
    seed: int = 1
    """Draws initial weights, batches and dropout."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda where there is a card."""
    threads: int = 1
    """CPU threads, 0 for torch's own choice. The digits' ops are too small to share: a second thread mostly waits."""
    precision: Literal["fp32", "fp16", "bf16"] = "fp32"
    """fp16: autocast with loss scaling, the half precision of a V100. bf16: autocast, from compute capability 8.0."""
    save_every: int = 50
    """Steps between checkpoints; there is one at the end of every epoch too."""

    epochs: int = 12
    """Passes over the shorter of the two training sets."""
    lr: float | None = None
    """Learning rate of SGD. None: 0.01 for digits, there 0.03 with SMR or CMC; 0.003 for epic."""
    lr_steps: tuple[int, ...] = (4, 8)
    """Epochs after which the learning rate falls to a tenth."""
    batch_source: int = 32
    """Source clips a step."""
    batch_target: int = 32
    """Target clips a step."""
    weight_decay: float = 1e-4
    """Weight decay of SGD; momentum is 0.9, Nesterov."""
    clip_gradient: float = 20.0
    """Largest norm of the gradient over all parameters."""

    lambda_y: float = 1.0
    """Weight of the classification loss (equation 6)."""
    lambda_d: float = 1.0
    """Weight of all adversarial losses; the paper takes 3 with I3D features."""
    gamma: float = 0.003
    """Weight of the attentive entropy."""
    beta: tuple[float, float, float] = (0.75, 0.75, 0.5)
    """Reversal of the gradients of the relation, clip and frame discriminators, before warm-up."""

    latent: int = 16
    """D, channels of CMC's latent space."""
    num_scales: int | None = None
    """S, scales of the consensus map. None: 3, or fewer on maps too small for three."""
    center: bool = False
    """Pearson coefficient in CMC instead of the cosine."""
    reduction: int = 4
    """r, bottleneck ratio of SMR's gates."""
    gate_bias: bool = False
    """Biases in SMR's gates."""
    object_dim: int = 1024
    """Channels that a linear layer brings the objects of --model B to."""
    fc_dim: int = 128
    """Width of TA3N's shared frame layer."""
    relation_dim: int = 64
    """Width of TA3N's relations."""
    dropout: float = 0.5
    """Dropout on frame features and on the clip feature."""
    init: Literal["torch", "ta3n"] = "torch"
    """Initial weights: torch's default, or normal 0.001 as TA3N has it."""


PRESETS = {
    "digits": Options(),
    "epic": Options(
        preset="epic",
        model="A",
        protocol="val",
        data=Path("data/epic"),
        threads=0,
        epochs=30,
        lr_steps=(9, 19),  # the public baseline counts epochs from 1, and divides before the 10th and the 20th
        batch_source=128,
        batch_target=202,
        latent=512,
        reduction=16,
        fc_dim=512,
        relation_dim=256,
        init="ta3n",
    ),
}


# The public baseline's 128 * target clips // source clips: of 16115 and 26115; in PRESETS, of the 5002 and 7906 of val.
_BATCH_TARGET = {"test": 207}


def preset(name: str, model: Model, protocol: Protocol) -> Options:
    """The defaults of a preset; of ``"epic"`` they depend on the model and the protocol too."""
    options = PRESETS[name]
    if name != "epic":
        return options
    if model in MODELS:
        options = replace(options, lambda_d=MODELS[model].lambda_d, method=MODELS[model].method)
    return replace(
        options, model=model, protocol=protocol, batch_target=_BATCH_TARGET.get(protocol, options.batch_target)
    )


@dataclass(frozen=True)
class _Chosen:
    preset: Literal["digits", "epic"] = "digits"
    model: Model = PRESETS["epic"].model
    protocol: Protocol = PRESETS["epic"].protocol


def parse(arguments: Sequence[str], description: str | None = None) -> Options:
    """The command line over the defaults of its preset, which are therefore what --help shows."""
    chosen, _ = _cli.cli(_Chosen, arguments, prog="train.py", return_unknown_args=True, add_help=False)
    default = preset(chosen.preset, chosen.model, chosen.protocol)
    options: Options = _cli.cli(Options, arguments, prog="train.py", default=default, description=description)
    return options


def resolve(options: Options) -> Options:
    """Settle what is left open, and refuse what cannot work."""
    positive = ("epochs", "batch_source", "batch_target", "save_every", "clip_gradient", "latent", "reduction")
    for name in (*positive, "fc_dim", "relation_dim", "object_dim", *(("lr",) if options.lr is not None else ())):
        if not getattr(options, name) > 0:
            raise UsageError(f"--{name.replace('_', '-')} must be positive, got {getattr(options, name)}.")
    for name in ("lr", "clip_gradient", "weight_decay", "lambda_y", "lambda_d", "gamma", "beta"):
        value = getattr(options, name)
        if value is not None and not np.isfinite(value).all():
            raise UsageError(f"--{name.replace('_', '-')} must be finite, got {value}.")
    if options.weight_decay < 0:
        raise UsageError(f"--weight-decay must be 0 or more, got {options.weight_decay}.")
    if not 0 <= options.threads <= 1024:
        raise UsageError(f"--threads must be from 0 to 1024, got {options.threads}.")
    try:
        backends.current()
    except ValueError as error:
        raise UsageError(f"{error}.") from error
    if not 0 <= options.dropout < 1:
        raise UsageError(f"--dropout must be from 0 to below 1, got {options.dropout}.")
    if not 0 <= options.seed < 2**32:
        raise UsageError(f"--seed must be from 0 to 2**32 - 1, got {options.seed}.")
    if options.lr is None:
        enhances = METHODS[options.method]["smr"] or METHODS[options.method]["cmc"]
        # Sigmoid gates halve the features: at 0.01 M3EM has not converged after the 12 epochs of the digits preset.
        digits = 0.03 if enhances else 0.01
        options = replace(options, lr=digits if options.preset == "digits" else 0.003)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch sees no CUDA device here; take --device cpu.")
    if options.device == "auto":
        options = replace(options, device="cuda" if torch.cuda.is_available() else "cpu")
    if options.precision == "bf16" and options.device == "cuda" and torch.cuda.get_device_capability()[0] < 8:
        raise UsageError(
            "--precision bf16 needs compute capability 8.0, and this card has less: take --precision fp16."
        )
    return options
