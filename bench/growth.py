"""How time and memory grow: every op and a training step against each of their sizes, with fitted exponents.

    python -m bench.growth                       a table (five minutes)
    python -m bench.growth --picture growth.png  and a picture of the points

Along an axis one size doubles from step to step while the others stay. The exponent is the slope of a straight line
through the logarithms: 1 is linear. Time is the median of forward and backward; memory is what is kept for the
backward, inputs included. The smallest steps of an axis stay in the cache, so exponents a little above 1 are no sign of
a quadratic term.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from bench.core import clock, saved_bytes
from m3em_fast import _cli, ops
from m3em_fast.uda import ActionModel, total_loss


@dataclass(frozen=True)
class Sizes:
    """Of one point. ``hw`` is the side of a square map, ``s`` scales, ``m`` spatial modalities."""

    n: int = 40
    c: int = 256
    d: int = 256
    hw: int = 14
    s: int = 3
    m: int = 2


@dataclass(frozen=True)
class Series:
    """One axis of one op, measured."""

    op: str
    axis: str
    sizes: tuple[int, ...]
    seconds: tuple[float, ...]
    saved: tuple[int, ...]

    def exponent(self, values: Sequence[float]) -> float:
        return float(np.polyfit(np.log(self.sizes), np.log(values), 1)[0])


AXES = {
    "n": (10, 20, 40, 80),
    "c": (128, 256, 512, 1024),
    "d": (64, 128, 256, 512),
    "hw": (7, 14, 28),
    "m": (2, 3, 4, 5),
}
AXES["s"] = (1, 2, 3, 4)
SHOWN = {"n": "N", "c": "C", "d": "D", "hw": "H·W", "s": "S", "m": "modalities"}
Made = tuple[Callable[[], Tensor], list[Tensor]]


def _maps(sizes: Sizes, channels: int) -> Tensor:
    return torch.randn(sizes.n, channels, sizes.hw, sizes.hw, requires_grad=True)


def _gates(sizes: Sizes) -> list[Tensor]:
    return [torch.rand(sizes.n, sizes.c, requires_grad=True) for _ in range(2)]


def channel_gate(sizes: Sizes) -> Made:
    x, gates = _maps(sizes, sizes.c), _gates(sizes)
    return lambda: ops.channel_gate(x, *gates), [x, *gates]


def consensus_map(sizes: Sizes) -> Made:
    a, b = _maps(sizes, sizes.c), _maps(sizes, sizes.c)
    return lambda: ops.consensus_map(a, b, sizes.s), [a, b]


def consensus_pool(sizes: Sizes) -> Made:
    x, cmap = _maps(sizes, sizes.c), _maps(sizes, 1)
    return lambda: ops.consensus_pool(x, cmap), [x, cmap]


def gated_projection(sizes: Sizes) -> Made:
    x, gates = _maps(sizes, sizes.c), _gates(sizes)
    weight = torch.randn(sizes.d, 2 * sizes.c, requires_grad=True)
    return lambda: ops.gated_projection(x, gates, weight), [x, *gates, weight]


def training_step(sizes: Sizes) -> Made:
    """Forward and backward of TA3N + M3EM on frozen features of N frames, five a clip."""
    clips = max(2, sizes.n // 5)
    spatial = {f"map{i}": sizes.c for i in range(sizes.m)}
    model = ActionModel(spatial, {"Audio": sizes.c}, 8, 10, latent_channels=sizes.d, num_scales=sizes.s, fc_dim=128)
    features = {name: torch.rand(clips, 5, sizes.c, sizes.hw, sizes.hw) for name in spatial}
    features["Audio"] = torch.rand(clips, 5, sizes.c)
    half = torch.arange(clips // 2)
    return lambda: total_loss(model(features).streams, half % 8, half % 10)[0], list(model.parameters())


PARTS: dict[str, tuple[Callable[[Sizes], Made], tuple[str, ...]]] = {
    "channel_gate": (channel_gate, ("n", "c", "hw")),
    "consensus_map": (consensus_map, ("n", "c", "hw", "s")),
    "consensus_pool": (consensus_pool, ("n", "c", "hw")),
    "gated_projection": (gated_projection, ("n", "c", "d", "hw")),
    "training step": (training_step, ("n", "c", "d", "hw", "s", "m")),
}


def point(make: Callable[[Sizes], Made], sizes: Sizes, seconds: float) -> tuple[float, int]:
    """Median seconds of a forward and backward, and the bytes kept between them."""
    torch.manual_seed(0)
    function, wanted = make(sizes)
    saved = saved_bytes(function)
    times: list[float] = []
    begin = clock()
    while len(times) < 5 or (clock() - begin < seconds and len(times) < 200):
        start = clock()
        out = function()
        torch.autograd.grad(out, wanted, torch.ones((), dtype=out.dtype).expand(out.shape), allow_unused=True)
        times.append(clock() - start)
    return float(np.median(times[1:])), saved


def series(op: str, axis: str, seconds: float) -> Series:
    make = PARTS[op][0]
    points = [point(make, replace(Sizes(), **{axis: value}), seconds) for value in AXES[axis]]
    sizes = tuple(value * value if axis == "hw" else value for value in AXES[axis])
    times, saved = zip(*points, strict=True)
    return Series(op, axis, sizes, times, saved)


def table(found: Sequence[Series]) -> Table:
    shown = Table("op", "axis", "sizes", "ms, first to last", "exponent of time", "MB kept", "exponent of memory")
    for one in found:
        shown.add_row(
            one.op,
            SHOWN[one.axis],
            " ".join(map(str, one.sizes)),
            f"{1e3 * one.seconds[0]:.2f} to {1e3 * one.seconds[-1]:.2f}",
            f"{one.exponent(one.seconds):.2f}",
            f"{one.saved[0] / 1e6:.1f} to {one.saved[-1] / 1e6:.1f}",
            f"{one.exponent(one.saved):.2f}",
        )
    return shown


def picture(found: Sequence[Series], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    axes = [axis for axis in SHOWN if any(one.axis == axis for one in found)]
    figure, plots = pyplot.subplots(2, len(axes), figsize=(3 * len(axes), 6), sharey="row", squeeze=False)
    for column, axis in enumerate(axes):
        for one in found:
            if one.axis == axis:
                style = {"label": one.op, "color": f"C{list(PARTS).index(one.op)}"}  # one colour an op in all plots
                plots[0][column].loglog(one.sizes, [1e3 * t for t in one.seconds], "o-", **style)
                plots[1][column].loglog(one.sizes, [b / 1e6 for b in one.saved], "o-", **style)
        plots[1][column].set_xlabel(SHOWN[axis])
        for plot in plots[:, column]:
            sizes = sorted({size for one in found if one.axis == axis for size in one.sizes})
            plot.set_xticks(sizes, [str(size) for size in sizes])
            plot.minorticks_off()
            plot.grid(alpha=0.3)
    plots[0][0].set_ylabel("forward + backward, ms")
    plots[1][0].set_ylabel("kept for the backward, MB")
    handles = {line.get_label(): line for plot in plots[0] for line in plot.get_lines()}
    figure.legend(handles.values(), handles.keys(), loc="upper center", ncol=len(handles))
    figure.tight_layout(rect=(0, 0, 1, 0.94))
    figure.savefig(path, dpi=110)


@dataclass(frozen=True)
class Options:
    seconds: float = 2.0
    """How long to measure a point."""
    picture: Path | None = None
    """Where to draw the points."""


def main(arguments: Sequence[str] | None = None) -> int:
    options: Options = _cli.cli(Options, arguments, description=__doc__, prog="python -m bench.growth")
    console = Console()
    if not console.is_terminal:
        console = Console(width=140)
    work = [(op, axis) for op, (_, axes) in PARTS.items() for axis in axes]
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("", total=len(work))
        found = []
        for op, axis in work:
            progress.update(task, description=f"{op} against {SHOWN[axis]}")
            found.append(series(op, axis, options.seconds))
            progress.advance(task)
    console.print(table(found))
    if options.picture is not None:
        picture(found, options.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
