"""Tables and pictures of runs: ``python -m m3em_fast.uda.report RUN [RUN ...]`` compares what train.py left behind.

With ``--reference RUN`` also one training in time: the same one, done under M3EM_BACKEND=reference.
"""

from __future__ import annotations

import json
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from m3em_fast.data import _extra

if __name__ == "__main__":
    _extra.require("m3em_fast.uda.report", *_extra.TRAIN)

import matplotlib

matplotlib.use("Agg")  # before pyplot: a training machine may have no display

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from m3em_fast import _cli

with suppress(ImportError):  # of the command line alone: who calls train.train() needs none
    import tyro

if TYPE_CHECKING:
    from m3em_fast.data.store import FeatureStore
    from m3em_fast.uda.model import ActionModel

__all__ = ["compare", "compare_backends", "draw_consensus", "draw_curves", "load_metrics", "print_table"]

KINDS = ("verb", "noun", "action")
SPLITS = {"source_val": "source validation", "target_val": "target validation", "target_test": "target test"}
FLOOR = "majority class"
ORDER = ("source_only", "ta3n", "m3em")
MAP_COLOURS = "RdYlGn"
COLOURS = {"verb": "tab:blue", "noun": "tab:orange", "action": "tab:green"}
FIRST_LOSSES = 20  # how many are compared: later ones drift apart, as those of two seeds do


class ReportError(ValueError):
    """A folder that holds no finished run; the message is one sentence."""


def load_metrics(run: Path) -> dict[str, Any]:
    """``metrics.json`` of a finished run."""
    path = run / "metrics.json"
    try:
        metrics = json.loads(path.read_text())
        compare([metrics])  # reads every number that the table will show
        known = {"loss", "terms", *metrics["results"]} <= set(metrics["history"])
        if not known or metrics["floor"].keys() != metrics["results"].keys():
            raise ValueError
    except FileNotFoundError as error:
        raise ReportError(f"{path} does not exist: {run} holds no finished run of train.py.") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ReportError(f"{path} is no metrics file of train.py.") from error
    return metrics


def compare(runs: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of "top-1 / top-5" in percent: the majority-class floor, then one row a run.

    Raises:
        ReportError: the runs report on different splits.
    """
    splits = list(runs[0]["results"])
    for run in runs:
        if list(run["results"]) != splits:
            found = " and ".join(", ".join(m["results"]) or "no split" for m in (runs[0], run))
            raise ReportError(f"runs that report on {found} do not stand in one table.")
    header = ["method"] + [f"{SPLITS[split]}: {kind}" for split in splits for kind in KINDS]

    def row(name: str, scores: dict[str, dict[str, float]]) -> list[str]:
        cells = [f"{scores[s][f'{k}_top1']:.1f} / {scores[s][f'{k}_top5']:.1f}" for s in splits for k in KINDS]
        return [name, *cells]

    return header, [row(FLOOR, runs[0]["floor"])] + [row(_name(m), m["results"]) for m in runs]


def _name(metrics: dict[str, Any]) -> str:
    """A run's in a table: the method, of EPIC-KITCHENS with the model."""
    return f"{metrics['model']}, {metrics['method']}" if "model" in metrics else metrics["method"]


def ordering(runs: list[dict[str, Any]]) -> str | None:
    """Whether source_only < ta3n < m3em in target action top-1, in words; None where one of them is missing."""
    found = {m["method"]: m["results"]["target_test"]["action_top1"] for m in runs if "target_test" in m["results"]}
    if any(name not in found for name in ORDER):
        return None
    values = [found[name] for name in ORDER]
    chain = " < ".join(f"{name} {value:.1f}" for name, value in zip(ORDER, values, strict=True))
    holds = values[0] < values[1] < values[2]
    return f"Target action top-1: {chain}: {'holds' if holds else 'does NOT hold'} in this run."


def _load_about(run: Path) -> tuple[dict[str, Any], float, str]:
    """From ``run.json``: what has to be equal for two trainings to be the same, seconds, and whose kernels served."""
    path = run / "run.json"
    try:
        about = json.loads(path.read_text())
        options = about["options"]
        served = about["environment"]["backends"][f"serves {options['device']} tensors"]
        return {**options, "data": about["data"]}, float(about["seconds"]), str(served)
    except FileNotFoundError as error:
        raise ReportError(f"{path} does not exist: {run} holds no finished run of train.py.") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ReportError(f"{path} does not say how it was trained; train.py of this version would have.") from error


def compare_backends(runs: list[Path], reference: Path) -> tuple[list[str], list[list[str]], str]:
    """Header, rows and a sentence on one training and the same one under M3EM_BACKEND=reference.

    Args:
        runs: the run of the same method among them is the one that is meant.
        reference: the other one.
    """
    other = load_metrics(reference)
    method = other["method"]
    target = next((split for split in other["results"] if split.startswith("target")), None)
    if target is None:
        raise ReportError(f"--reference {reference} reports no accuracies to compare.")
    found = [(run, own) for run in runs if (own := load_metrics(run))["method"] == method]
    if not found:
        raise ReportError(f"--reference {reference} is a run of {method}, and no other run is.")
    run, own = found[0]
    (how, seconds, served), (its_how, its_seconds, its_served) = _load_about(run), _load_about(reference)
    if its_served != "reference":
        raise ReportError(f"--reference {reference} was trained on {its_served}: set M3EM_BACKEND=reference.")
    if changed := sorted(name for name in {*how, *its_how} if how.get(name) != its_how.get(name)):
        name = changed[0].replace("_", "-")
        raise ReportError(f"--reference {reference} is not the same training as {run}: --{name} differs.")
    header = ["ops served by", "seconds", *(f"{SPLITS[target]}: {kind}" for kind in KINDS)]
    rows = []
    for name, time, metrics in ((served, seconds, own), (its_served, its_seconds, other)):
        scores = metrics["results"][target]
        cells = [f"{scores[f'{kind}_top1']:.1f} / {scores[f'{kind}_top5']:.1f}" for kind in KINDS]
        rows.append([name, f"{time:.1f}", *cells])
    losses = [np.array(metrics["history"]["loss"][:FIRST_LOSSES]) for metrics in (own, other)]
    difference = (abs(losses[0] - losses[1]) / abs(losses[1])).max()
    return (
        header,
        rows,
        (
            f"{method} trains {its_seconds / seconds:.2f} times as fast on {served} as on {its_served}; "
            f"the first {len(losses[0])} losses differ by {difference:.1g} of their value at most."
        ),
    )


def _table(title: str, header: list[str], rows: list[list[str]], dim: int | None = None) -> Table:
    table = Table(title=title, header_style="bold")
    for i, name in enumerate(header):
        table.add_column(name.replace(": ", "\n"), justify="left" if i == 0 else "right", no_wrap=i == 0)
    for i, cells in enumerate(rows):
        table.add_row(*cells, style="dim" if i == dim else None)
    return table


def print_table(runs: list[Path], reference: Path | None = None) -> list[dict[str, Any]]:
    metrics = [load_metrics(run) for run in runs]
    times = None if reference is None else compare_backends(runs, reference)
    # A log file has no width of its own, and 80 columns would cut every cell in two.
    console = Console() if sys.stdout.isatty() else Console(width=120)
    header, rows = compare(metrics)
    if len(header) > 1:
        console.print(_table("Accuracy in percent, top-1 / top-5, last epoch", header, rows, dim=0))
    for run, found in zip(runs, metrics, strict=True):
        if not any(split.startswith("target") for split in found["results"]):
            console.print(f"{run}: the target has no labels to compare with; its scores are in {run / 'scores'}.")
    if sentence := ordering(metrics):
        console.print(sentence)
    if times is not None:
        console.print(_table("The same training twice", *times[:2]), times[2], sep="\n")
    return metrics


def _markdown_table(header: list[str], rows: list[list[str]]) -> list[str]:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" + "---:|" * (len(header) - 1)]
    return lines + ["| " + " | ".join(cells) + " |" for cells in rows]


def markdown(metrics: list[dict[str, Any]], times: tuple[list[str], list[list[str]], str] | None = None) -> str:
    lines = _markdown_table(*compare(metrics))
    if sentence := ordering(metrics):
        lines += ["", sentence]
    if times is not None:
        lines += ["", *_markdown_table(*times[:2]), "", times[2]]
    return "\n".join(lines) + "\n"


def draw_curves(run: Path) -> Figure:
    """Loss terms and accuracies of a run over epochs, saved as ``curves.png``."""
    metrics = load_metrics(run)
    history = metrics["history"]
    splits = list(metrics["results"])
    epochs = max((len(history[split]) for split in splits), default=0)
    steps = max(1, len(history["terms"]) // max(1, epochs))
    figure, row = plt.subplots(1, 1 + len(splits), figsize=(5 * (1 + len(splits)), 4.2), layout="constrained")
    axes = np.atleast_1d(row)
    for name in history["terms"][0]:
        values = np.array([terms[name] for terms in history["terms"]])
        x = np.arange(1, len(values) + 1) / steps
        (line,) = axes[0].plot(x, values, alpha=0.2, linewidth=0.8)
        means = values[: epochs * steps].reshape(epochs, steps).mean(1)
        axes[0].plot(np.arange(1, epochs + 1) - 0.5, means, color=line.get_color(), label=name.replace("_", " "))
    axes[0].set(title=f"{_name(metrics)}: loss terms, summed over streams")
    axes[0].set(xlabel="epoch" if splits else "share of the training")
    axes[0].legend(fontsize=8)
    for axis, split in zip(axes[1:], splits, strict=True):
        for kind in KINDS:
            values = np.array([scores[f"{kind}_top1"] for scores in history[split]])
            axis.plot(np.arange(1, epochs + 1), values, marker=".", color=COLOURS[kind], label=kind)
            axis.axhline(metrics["floor"][split][f"{kind}_top1"], color=COLOURS[kind], linestyle=":", linewidth=1)
        axis.set(title=f"{SPLITS[split]}: top-1 (dotted: {FLOOR})", xlabel="epoch", ylabel="%", ylim=(0, 100))
        axis.legend(fontsize=8)
    figure.savefig(run / "curves.png", dpi=110)
    plt.close(figure)
    return figure


@torch.no_grad()
def draw_consensus(
    run: Path, model: ActionModel, store: FeatureStore, device: torch.device, clips: int = 4
) -> Figure | None:
    """Frames of a few clips, each above itself under its consensus weight 1 + C, saved as ``consensus.png``.

    None where the frames are not to be had: the digits benchmark renders them again from its seed, other feature
    stores hold no frames.
    """
    if store.meta.get("benchmark") != "digits" or store.labels is None:
        return None
    from m3em_fast.data.digits import NOUNS, VERBS, DigitsConfig, load_frames

    indices = np.linspace(0, len(store) - 1, clips).astype(int)
    frames, _, _ = load_frames(DigitsConfig(**store.meta["config"]), store.meta["split"], indices)
    training = model.training
    model.eval()
    features = store.read(indices, model.modalities, frames=model.num_segments)
    out = model({name: x.to(device) for name, x in features.items()})
    model.train(training)
    assert out.consensus is not None
    weight = 1.0 + out.consensus.float().cpu().numpy()
    limit = float(np.abs(weight).max())
    norm = matplotlib.colors.Normalize(-limit, limit)
    count, height, width = frames.shape[1:4]
    across = 2
    down = -(-clips // across)
    figure = plt.figure(figsize=(1.3 * count * across + 1.2, 2.9 * down + 0.4), layout="constrained")
    left, right = np.ravel(figure.subfigures(1, 2, squeeze=False, width_ratios=(1.0, 0.07)))
    panels = np.ravel(left.subfigures(down, across, squeeze=False))
    for row, index in enumerate(indices):
        axes = panels[row].subplots(2, count)
        for column in range(count):
            for axis in axes[:, column]:
                axis.set_axis_off()
            axes[0, column].imshow(frames[row, column])
            axes[1, column].imshow(frames[row, column].mean(-1), cmap="gray", vmin=0, vmax=255)
            axes[1, column].imshow(
                weight[row, column],
                cmap=MAP_COLOURS,
                norm=norm,
                alpha=0.6,
                interpolation="bilinear",
                extent=(-0.5, width - 0.5, height - 0.5, -0.5),
            )
        verb, noun = int(out.verb[row].argmax()), int(out.noun[row].argmax())
        truth = f"{VERBS[store.labels['verb'][index]]} {NOUNS[store.labels['noun'][index]]}"
        panels[row].suptitle(f"{truth}  (predicted: {VERBS[verb]} {NOUNS[noun]})", fontsize=10)
    bar = matplotlib.cm.ScalarMappable(norm, MAP_COLOURS)
    right.colorbar(bar, cax=right.subplots(), label="1 + C, the weight of a position in the pooling")
    figure.suptitle("Where RGB and flow agree: consensus maps on target test clips", fontsize=11)
    figure.savefig(run / "consensus.png", dpi=110)
    plt.close(figure)
    return figure


@dataclass(frozen=True)
class Options:
    """Compare finished runs of train.py in one table."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Run folders."""
    reference: Path | None = None
    """Folder of a run with the options of one of the others, made under M3EM_BACKEND=reference: compare their times,
    first losses and accuracies. Both in one go: of a resumed run only the last part is timed."""
    markdown: Path | None = None
    """Also write the table as Markdown to this file."""


def main() -> int:
    prog = "m3em_fast.uda.report"
    options: Options = _cli.cli(Options, prog=f"python -m {prog}")
    try:
        if not options.runs:
            raise ReportError("name at least one run folder.")
        metrics = print_table(list(options.runs), options.reference)
        if options.markdown is not None:
            times = None if options.reference is None else compare_backends(list(options.runs), options.reference)
            options.markdown.write_text(markdown(metrics, times))
    except (ReportError, OSError) as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
