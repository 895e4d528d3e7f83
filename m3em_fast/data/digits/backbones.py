"""Small convolutional networks, one a modality, trained on labelled source clips and then frozen.

They stand where the paper has TBN: what they see before pooling goes to the feature store.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .settings import NOUNS, VERBS

Advance = Callable[[int], object]


@dataclass(frozen=True)
class Recipe:
    """How the backbone of one modality is built and trained.

    Attributes:
        planes: channels of its input.
        label: class that it learns. One frame cannot show which way a digit moves, nor does the sound tell which digit.
        width: channels of its first layer.
        lr: highest learning rate of the one-cycle schedule.
        shift: largest random shift of an input picture, in pixels.
    """

    planes: int
    label: str
    width: int
    lr: float
    shift: int


RECIPES = {
    "RGB": Recipe(planes=3, label="noun", width=24, lr=3e-3, shift=4),
    "Flow": Recipe(planes=2, label="verb", width=16, lr=3e-3, shift=4),
    "Audio": Recipe(planes=1, label="verb", width=16, lr=3e-3, shift=0),
}
BATCH = 64
WEIGHT_DECAY = 5e-2


class Backbone(nn.Module):
    """(n, planes, H, W) float32 -> maps (n, channels, H/8, W/8), never negative."""

    def __init__(self, recipe: Recipe, channels: int) -> None:
        super().__init__()
        widths = (recipe.planes, recipe.width, recipe.width, 2 * recipe.width, channels, channels)
        strides = (2, 1, 2, 1, 2)
        self.body = nn.Sequential()
        for wide_in, wide_out, stride in zip(widths[:-1], widths[1:], strides, strict=True):
            self.body += nn.Sequential(
                nn.Conv2d(wide_in, wide_out, 3, stride, 1, bias=False), nn.BatchNorm2d(wide_out), nn.ReLU()
            )
        self.head = nn.Linear(channels, len(NOUNS) if recipe.label == "noun" else len(VERBS))

    def forward(self, x: Tensor) -> Tensor:
        """Feature maps before pooling."""
        maps: Tensor = self.body(x)
        return maps

    def classify(self, x: Tensor) -> Tensor:
        """Logits (n, classes)."""
        pooled = F.dropout(self(x).mean(dim=(2, 3)), 0.3, self.training)
        logits: Tensor = self.head(pooled)
        return logits


@contextlib.contextmanager
def deterministic(seed: int) -> Iterator[None]:
    """Deterministic algorithms and a seeded generator inside, the caller's settings and generator afterwards."""
    was, warn_only = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        torch.use_deterministic_algorithms(True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(was, warn_only=warn_only)


def as_input(modality: str, frames: np.ndarray) -> Tensor:
    """Frames of one modality, (n, H, W, planes) or (n, H, W), as the backbone's input (n, planes, H, W) float32."""
    x = torch.from_numpy(frames.astype(np.float32))
    if modality == "Audio":
        return (x + 1.0).unsqueeze(1)
    if modality == "RGB":
        x = x.div_(255.0).sub_(0.5).mul_(4.0)
    else:
        x = x.mul_(4.0)
    return x.permute(0, 3, 1, 2)


def _shifted(x: Tensor, shift: int, rng: np.random.Generator) -> Tensor:
    if not shift:
        return x
    height, width = x.shape[2:]
    padded = F.pad(x, (shift, shift, shift, shift), mode="replicate")
    out = torch.empty_like(x)
    for index, (dy, dx) in enumerate(rng.integers(0, 2 * shift + 1, (len(x), 2))):
        out[index] = padded[index, :, dy : dy + height, dx : dx + width]
    return out


def train(
    modality: str, clips: np.ndarray, labels: np.ndarray, channels: int, epochs: int, seed: int, advance: Advance
) -> Backbone:
    """Train one backbone; each step sees one random frame of each of its clips.

    With all five frames of a clip in a step, the RGB network learnt nothing in twelve epochs.

    Args:
        modality: RGB, Flow or Audio.
        clips: (n, frames, ...), as the renderer gives them.
        labels: (n,) int64, the classes that the modality's recipe names.
        channels: channels of the maps.
        epochs: passes over the clips.
        seed: initial weights, order, frames and shifts.
        advance: called with the number of clips after each step.
    """
    recipe = RECIPES[modality]
    rng = np.random.default_rng([seed, 4000, list(RECIPES).index(modality)])
    with deterministic(int(rng.integers(2**31))):
        net = Backbone(recipe, channels).train()
        decay = [p for p in net.parameters() if p.ndim > 1]
        plain = [p for p in net.parameters() if p.ndim <= 1]
        optimiser = torch.optim.AdamW(
            [{"params": decay, "weight_decay": WEIGHT_DECAY}, {"params": plain, "weight_decay": 0.0}]
        )
        steps = -(-len(clips) // BATCH)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, recipe.lr, total_steps=epochs * steps, pct_start=0.2)
        for _ in range(epochs):
            for chosen in np.array_split(rng.permutation(len(clips)), steps):
                frames = clips[chosen, rng.integers(0, clips.shape[1], len(chosen))]
                x = _shifted(as_input(modality, frames), recipe.shift, rng)
                loss = F.cross_entropy(net.classify(x), torch.from_numpy(labels[chosen]), label_smoothing=0.1)
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                schedule.step()
                advance(len(chosen))
    return net.eval()


@torch.no_grad()
def extract(net: Backbone, modality: str, clips: np.ndarray) -> Tensor:
    """Features of (n, frames, ...) clips: maps (n, frames, C, H, W), for Audio vectors (n, frames, C); float32."""
    count, frames = clips.shape[:2]
    maps = net(as_input(modality, clips.reshape(count * frames, *clips.shape[2:])))
    if modality == "Audio":
        maps = maps.mean(dim=(2, 3))
    return maps.contiguous().unflatten(0, (count, frames))


@torch.no_grad()
def accuracy(net: Backbone, modality: str, clips: np.ndarray, labels: np.ndarray) -> float:
    """Share of the clips whose label has the highest mean probability over the frames."""
    right = 0
    for start in range(0, len(clips), 100):
        part = clips[start : start + 100]
        logits = net.classify(as_input(modality, part.reshape(-1, *part.shape[2:])))
        guess = logits.softmax(1).unflatten(0, part.shape[:2]).mean(1).argmax(1)
        right += int((guess.numpy() == labels[start : start + 100]).sum())
    return right / len(clips)
