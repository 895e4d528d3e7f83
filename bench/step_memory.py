"""How much memory a training step of the paper's size takes on a card, from torch's account of smaller ones on the CPU.

    python -m bench.step_memory

TA3N + M3EM on frozen RGB and flow maps (1024 x 7 x 7) and audio vectors (1024) in float16, five frames a clip, D = 512,
under autocast to float16 with loss scaling, as ``train.py --precision fp16`` does it. Everything that torch allocates
between the batch and the end of the optimizer's step is counted in steps of a few clips; what grows with the clips is
extended on a straight line through two of them, and a third one says how straight it is. On a card the workspace of
``gated_projection`` comes on top: gated operands, and what a product makes of them. Not counted: the driver's own
memory, what torch's libraries keep, and what the allocator rounds up.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch

import m3em_fast
from m3em_fast import _cli
from m3em_fast.ops import _gated_projection_cuda
from m3em_fast.uda import ActionModel, total_loss

CLIPS, SOURCE, FRAMES = 335, 128, 5
SPATIAL, VECTOR, SIDE = {"RGB": 1024, "Flow": 1024}, {"Audio": 1024}, 7
VERBS, NOUNS = 97, 300
MEASURED = (6, 12, 18)
LATENT, GATES = 512, 2


def workspace_bytes() -> int:
    operand = _gated_projection_cuda.WORKSPACE
    return operand + operand * LATENT // (GATES * min(SPATIAL.values()))


def batch(clips: int, device: str = "cpu") -> dict[str, torch.Tensor]:
    half = {"dtype": torch.float16, "device": device}
    maps = {name: torch.zeros(clips, FRAMES, c, SIDE, SIDE, **half) for name, c in SPATIAL.items()}
    return maps | {name: torch.zeros(clips, FRAMES, c, **half) for name, c in VECTOR.items()}


def model_of(device: str = "cpu") -> ActionModel:
    with torch.device(device):
        return ActionModel(SPATIAL, VECTOR, VERBS, NOUNS, latent_channels=LATENT)


def state_bytes() -> int:
    """Parameters, their gradients and their momentum."""
    return 3 * sum(p.numel() * p.element_size() for p in model_of("meta").parameters())


def batch_bytes(clips: int) -> int:
    return sum(x.numel() * x.element_size() for x in batch(clips, "meta").values())


def peak_of(changes: Sequence[int]) -> int:
    """The most that is held at a time, of allocations above and releases below zero, above what there was before."""
    held = most = 0
    for change in changes:
        held += change
        most = max(most, held)
    return most


def step_peak(clips: int) -> int:
    """Bytes of a step above batch and state: what its forward and its backward hold at a time."""
    torch.manual_seed(0)
    model, features = model_of(), {name: x.normal_() for name, x in batch(clips).items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, nesterov=True)
    scaler = torch.amp.GradScaler("cpu")
    labels = torch.arange(max(1, clips * SOURCE // CLIPS))

    def step() -> None:
        with torch.autocast("cpu", dtype=torch.float16):
            loss, *_ = total_loss(model(features).streams, labels % VERBS, labels % NOUNS)
        optimizer.zero_grad(set_to_none=False)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

    step()  # makes gradients and momentum, which stay
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]  # type: ignore[union-attr]
    return peak_of([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())])


def extended(clips: Sequence[int], peaks: Sequence[int], to: int) -> tuple[float, float]:
    """The line through the first and the last point at ``to``, and how far the others are off it, as a share."""
    slope = (peaks[-1] - peaks[0]) / (clips[-1] - clips[0])

    def line(at: int) -> float:
        return peaks[0] + slope * (at - clips[0])

    return line(to), max(abs(peak / line(at) - 1) for at, peak in zip(clips, peaks, strict=True))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _cli.Parser(prog="python -m bench.step_memory", description=__doc__.splitlines()[0])
    parser.parse_args(arguments)
    with m3em_fast.backend("auto"):
        peak, off = extended(MEASURED, [step_peak(clips) for clips in MEASURED], CLIPS)
    parts = {
        "parameters, gradients, momentum": state_bytes(),
        f"batch of {CLIPS} clips x {FRAMES} frames, float16": batch_bytes(CLIPS),
        "forward and backward, at most at a time": round(peak),
        "workspace of gated_projection": workspace_bytes(),
    }
    parts["together"] = sum(parts.values())
    for name, size in parts.items():
        print(f"{name:45}{size / 1e9:7.2f} GB")
    print(f"The steps measured, of {', '.join(map(str, MEASURED))} clips, are {off:.1%} off a straight line at most.")
    for card in (16, 32):
        print(f"{parts['together'] / (card * 2**30):.0%} of a card of {card} GB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
