"""The report on finished runs: table, ordering sentence, Markdown, the two pictures, and its complaints."""

import copy
import json
import sys

import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt

import m3em_fast.data.digits
from m3em_fast.data.digits import NOUNS, VERBS
from m3em_fast.uda import ActionOutput, report

SPLITS = ("source_val", "target_test")
KINDS = ("verb", "noun", "action")


def scores(first):
    """Six different numbers from ``first`` on: verb top-1, verb top-5, noun top-1 and so on."""
    names = [f"{kind}_top{k}" for kind in KINDS for k in (1, 5)]
    return {name: first + i + 0.04 for i, name in enumerate(names)}


def make_run(method, target_action=None, epochs=3, steps=4):
    history = {split: [scores(10 * e + 50 * i) for e in range(epochs)] for i, split in enumerate(SPLITS)}
    history["loss"] = [11.0] * (epochs * steps)
    history["terms"] = [{"classification": 9.0 - s, "attentive_entropy": 2.0 + s} for s in range(epochs * steps)]
    results = {split: copy.deepcopy(history[split][-1]) for split in SPLITS}
    if target_action is not None:
        results["target_test"]["action_top1"] = target_action
    floor = {"source_val": scores(1), "target_test": scores(11)}
    return {"method": method, "results": results, "floor": floor, "history": history}


def save(folder, metrics, about=None):
    folder.mkdir()
    (folder / "metrics.json").write_text(metrics if isinstance(metrics, str) else json.dumps(metrics))
    if about is not None:
        (folder / "run.json").write_text(json.dumps(about))
    return folder


def about(served, seconds, device="cpu", seed=0, **options):
    """As much of run.json as the comparison of backends reads."""
    return {
        "options": {"method": "m3em", "data": "somewhere", "device": device, **options},
        "data": {"benchmark": "digits", "config": {"seed": seed}},
        "seconds": seconds,
        "environment": {"backends": {"in force": "auto", "serves cpu tensors": served, "serves cuda tensors": "cuda"}},
    }


def call(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["report", *map(str, arguments)])
    return report.main(), *capsys.readouterr()


def test_every_cell_is_under_its_heading():
    header, rows = report.compare([make_run("ta3n"), make_run("m3em", target_action=99.96)])
    assert header == ["method"] + [f"{s}: {k}" for s in ("source validation", "target test") for k in KINDS]
    assert rows == [
        ["majority class", "1.0 / 2.0", "3.0 / 4.0", "5.0 / 6.0", "11.0 / 12.0", "13.0 / 14.0", "15.0 / 16.0"],
        ["ta3n", "20.0 / 21.0", "22.0 / 23.0", "24.0 / 25.0", "70.0 / 71.0", "72.0 / 73.0", "74.0 / 75.0"],
        ["m3em", "20.0 / 21.0", "22.0 / 23.0", "24.0 / 25.0", "70.0 / 71.0", "72.0 / 73.0", "100.0 / 75.0"],
    ]


@pytest.mark.parametrize(
    ("values", "holds"),
    [
        ((30, 40, 50), True),
        ((30, 40, 40), False),
        ((40, 40, 50), False),
        ((45, 40, 50), False),
        ((30, 55, 50), False),
        ((50, 40, 30), False),
    ],
)
def test_the_ordering_is_strict_and_said_either_way(values, holds):
    runs = [make_run(method, value) for method, value in zip(("source_only", "ta3n", "m3em"), values, strict=True)]
    said = report.ordering(list(reversed(runs)))  # the order on the command line does not matter
    chain = " < ".join(f"{run['method']} {value}.0" for run, value in zip(runs, values, strict=True))
    assert said == f"Target action top-1: {chain}: {'holds' if holds else 'does NOT hold'} in this run."
    for left_out in range(3):
        assert report.ordering(runs[:left_out] + runs[left_out + 1 :]) is None


def test_the_command_prints_the_table_and_writes_it_as_markdown(tmp_path, monkeypatch, capsys):
    methods = {"source_only": 30.0, "ta3n": 40.0, "m3em": 50.0}
    runs = [save(tmp_path / method, make_run(method, value)) for method, value in methods.items()]
    code, out, err = call(monkeypatch, capsys, *runs, "--markdown", tmp_path / "table.md")
    assert (code, err) == (0, "")
    sentence = "Target action top-1: source_only 30.0 < ta3n 40.0 < m3em 50.0: holds in this run."
    lines = out.splitlines()
    assert max(map(len, lines)) <= 120
    for name in ("majority class", *methods):
        (line,) = [line for line in lines if line.strip("│ ").startswith(name)]
        assert line.count(" / ") == 6  # whole cells on one line, although no terminal says how wide it is
    assert sentence in out

    table = (tmp_path / "table.md").read_text().splitlines()
    assert table[0] == "| " + " | ".join(report.compare([make_run("m3em")])[0]) + " |"
    assert table[1] == "|---|---:|---:|---:|---:|---:|---:|"
    assert table[2].startswith("| majority class | 1.0 / 2.0 | 3.0 / 4.0 |") and table[2].endswith("| 15.0 / 16.0 |")
    assert [line.split(" | ")[0] for line in table[3:6]] == ["| source_only", "| ta3n", "| m3em"]
    assert table[6:] == ["", sentence]

    code, out, err = call(monkeypatch, capsys, runs[0], "--markdown", tmp_path / "one.md")
    assert code == 0 and "Target action" not in out and len((tmp_path / "one.md").read_text().splitlines()) == 4


def two_backends(folder, mine=None, its=None):
    """A run on the kernels and the one on the reference; their first 20 losses differ by a millionth at most."""
    own, other = make_run("m3em", 34.6, steps=10), make_run("m3em", 34.1, steps=10)
    other["history"]["loss"] = [2.0] * 20 + [1.0] * 10
    own["history"]["loss"] = [2.0] * 7 + [2.0 - 2e-6] + [2.0 + 1e-6] * 12 + [9.0] * 10
    kernels = save(folder / "m3em", own, mine or about("cpu", 24.04))
    return kernels, save(folder / "m3em-reference", other, its or about("reference", 48.08, data="somewhere else"))


TWICE = "m3em trains 2.00 times as fast on cpu as on reference; "
TWICE += "the first 20 losses differ by 1e-06 of their value at most."


def test_the_same_training_on_two_backends(tmp_path, monkeypatch, capsys):
    kernels, reference = two_backends(tmp_path)
    ta3n = save(tmp_path / "ta3n", make_run("ta3n", 30.0))
    header, rows, said = report.compare_backends([ta3n, kernels], reference)
    assert header == ["ops served by", "seconds"] + [f"target test: {kind}" for kind in KINDS]
    assert rows == [
        ["cpu", "24.0", "70.0 / 71.0", "72.0 / 73.0", "34.6 / 75.0"],
        ["reference", "48.1", "70.0 / 71.0", "72.0 / 73.0", "34.1 / 75.0"],
    ]
    assert said == TWICE

    arguments = (ta3n, kernels, "--reference", reference, "--markdown", tmp_path / "table.md")
    code, out, err = call(monkeypatch, capsys, *arguments)
    assert (code, err) == (0, "")
    assert TWICE in out.splitlines()
    assert max(map(len, out.splitlines())) <= 120
    for name, seconds in (("cpu", "24.0"), ("reference", "48.1")):
        (line,) = [line for line in out.splitlines() if line.strip("│ ").startswith(name)]
        assert seconds in line and line.count(" / ") == 3
    assert sum(line.strip("│ ").startswith("m3em ") and " / " in line for line in out.splitlines()) == 1
    table = (tmp_path / "table.md").read_text().splitlines()
    assert table[-6:] == [
        "| " + " | ".join(header) + " |",
        "|---|---:|---:|---:|---:|",
        *("| " + " | ".join(cells) + " |" for cells in rows),
        "",
        TWICE,
    ]
    assert table[-7] == "" and len(table) == 5 + 7


def test_what_is_not_the_same_training_is_not_compared(tmp_path, monkeypatch, capsys):
    good = about("cpu", 1.0)
    broken = {**good, "environment": {"backends": {"failed": "OSError: no"}}}
    cases = [
        (good, about("cpu", 1.0), "m3em-reference was trained on cpu: set M3EM_BACKEND=reference."),
        (good, about("reference", 1.0, device="cuda"), "m3em-reference was trained on cuda: set M3EM_BACKEND"),
        (good, about("reference", 1.0, lr_steps=[2]), "is not the same training as "),
        (good, about("reference", 1.0, lr_steps=[2]), ": --lr-steps differs."),
        (good, about("reference", 1.0, seed=1), ": --data differs."),
        (broken, about("reference", 1.0), "does not say how it was trained"),
        (good, {}, "does not say how it was trained"),
    ]
    for i, (mine, its, message) in enumerate(cases):
        (tmp_path / str(i)).mkdir()
        kernels, reference = two_backends(tmp_path / str(i), mine, its or {"options": {}})
        code, out, err = call(monkeypatch, capsys, kernels, "--reference", reference)
        assert (code, out) == (2, "") and message in err and err.count("\n") == 1, (message, err)
    kernels, reference = two_backends(tmp_path)
    ta3n = save(tmp_path / "ta3n", make_run("ta3n"))
    for runs, other, message in (
        ([ta3n], reference, "m3em-reference is a run of m3em, and no other run is."),
        ([kernels], tmp_path / "nowhere", "nowhere holds no finished run of train.py"),
        ([kernels], save(tmp_path / "half", make_run("m3em")), "half holds no finished run of train.py"),
    ):
        code, out, err = call(monkeypatch, capsys, *runs, "--reference", other)
        assert (code, out) == (2, "") and message in err and err.count("\n") == 1, (message, err)


def test_complaints_are_one_sentence_and_code_2(tmp_path, monkeypatch, capsys):
    (tmp_path / "empty").mkdir()
    good = save(tmp_path / "good", make_run("ta3n"))
    lacking = make_run("ta3n")
    del lacking["floor"]
    silent = make_run("ta3n")
    del silent["history"]["loss"]
    cases = {
        (tmp_path / "nowhere",): "nowhere holds no finished run of train.py",
        (tmp_path / "empty",): "empty holds no finished run of train.py",
        (good, tmp_path / "empty"): "empty holds no finished run of train.py",
        (good / "metrics.json",): "is no metrics file of train.py",
        (save(tmp_path / "cut", json.dumps(make_run("ta3n"))[:100]),): "is no metrics file of train.py",
        (save(tmp_path / "number", "5"),): "is no metrics file of train.py",
        (save(tmp_path / "list", "[]"),): "is no metrics file of train.py",
        (save(tmp_path / "lacking", lacking),): "is no metrics file of train.py",
        (save(tmp_path / "silent", silent),): "is no metrics file of train.py",
        (save(tmp_path / "hollow", json.dumps({**make_run("ta3n"), "results": {}})),): "is no metrics file of train.py",
        (): "name at least one run folder",
        (good, "--markdown", tmp_path / "no" / "table.md"): "No such file or directory",
    }
    for arguments, message in cases.items():
        code, _, err = call(monkeypatch, capsys, *arguments)
        assert code == 2 and message in err, (arguments, err)
        assert err.startswith("m3em_fast.uda.report: ") and err.count("\n") == 1


def test_curves_show_terms_by_epoch_and_top_1_beside_its_own_floor(tmp_path):
    run = save(tmp_path / "run", make_run("m3em"))
    before = plt.get_fignums()
    figure = report.draw_curves(run)
    assert plt.get_fignums() == before  # hundreds of runs in one process would fill the memory
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")
    terms, *tops = figure.axes
    assert "m3em" in terms.get_title()
    assert [text.get_text() for text in terms.get_legend().get_texts()] == ["classification", "attentive entropy"]
    classification, means = terms.lines[:2]
    np.testing.assert_allclose(classification.get_xdata(), np.arange(1, 13) / 4)
    np.testing.assert_allclose(classification.get_ydata(), 9.0 - np.arange(12))
    np.testing.assert_allclose(means.get_xdata(), [0.5, 1.5, 2.5])
    np.testing.assert_allclose(means.get_ydata(), [7.5, 3.5, -0.5])
    for axis, first, title in zip(tops, (0, 50), ("source validation", "target test"), strict=True):
        assert title in axis.get_title()
        for i, kind in enumerate(KINDS):
            line, floor = axis.lines[2 * i : 2 * i + 2]
            assert line.get_label() == kind and line.get_color() == floor.get_color()
            np.testing.assert_allclose(line.get_xdata(), [1, 2, 3])
            np.testing.assert_allclose(line.get_ydata(), first + 2 * i + 0.04 + 10 * np.arange(3))
            np.testing.assert_allclose(floor.get_ydata(), (1 if first == 0 else 11) + 2 * i + 0.04)


class Clips:
    """As much of the digits' feature store as the picture asks of it."""

    def __init__(self, benchmark="digits"):
        self.meta = {"benchmark": benchmark, "config": {}, "split": "target_test"}
        self.labels = {"verb": np.arange(21) % 8, "noun": np.arange(21) % 10}

    def __len__(self):
        return 21

    def read(self, indices, modalities, *, frames):
        assert modalities == ("RGB", "Flow") and frames == 5
        return {name: torch.from_numpy(np.array(indices)) for name in modalities}


class Maps(torch.nn.Module):
    """C = 0.1 clip + frame - 3, and for every clip one verb and noun ahead of its own."""

    modalities = ("RGB", "Flow")
    num_segments = 5

    def forward(self, features):
        assert not self.training and not torch.is_grad_enabled()
        clips = features["RGB"]
        consensus = 0.1 * clips[:, None, None, None] + torch.arange(5.0)[:, None, None].expand(5, 4, 4) - 3
        verb = torch.nn.functional.one_hot((clips + 1) % 8, 8).float()
        noun = torch.nn.functional.one_hot((clips + 1) % 10, 10).float()
        return ActionOutput(streams={}, verb=verb, noun=noun, consensus=consensus)


@pytest.mark.parametrize("training", [True, False])
def test_the_consensus_picture_lays_every_map_over_its_own_frame(tmp_path, monkeypatch, training):
    def load_frames(config, split, indices):
        assert split == "target_test"
        frames = np.zeros((len(indices), 5, 8, 8, 3), np.uint8)
        frames += (10 * np.array(indices)[:, None] + np.arange(5)).astype(np.uint8)[:, :, None, None, None]
        return frames, None, None

    monkeypatch.setattr(m3em_fast.data.digits, "load_frames", load_frames)
    model = Maps().train(training)
    figure = report.draw_consensus(tmp_path, model, Clips(), torch.device("cpu"))
    assert model.training == training
    assert (tmp_path / "consensus.png").read_bytes().startswith(b"\x89PNG")
    panels = figure.subfigs[0].subfigs
    for panel, clip in zip(panels, (0, 6, 13, 20), strict=True):  # from the first clip to the last
        verb, noun = (clip + 1) % 8, (clip + 1) % 10
        truth = f"{VERBS[clip % 8]} {NOUNS[clip % 10]}"
        assert panel.get_suptitle() == f"{truth}  (predicted: {VERBS[verb]} {NOUNS[noun]})"
        above, below = panel.axes[:5], panel.axes[5:]
        for frame in range(5):
            assert (above[frame].images[0].get_array() == 10 * clip + frame).all()
            grey, weight = below[frame].images
            assert (grey.get_array() == 10 * clip + frame).all()
            np.testing.assert_allclose(weight.get_array(), 1 + 0.1 * clip + frame - 3, rtol=1e-6, atol=1e-6)
            # Zero, where a position is left out, has the colour in the middle.
            assert weight.norm.vmax == -weight.norm.vmin == pytest.approx(4.0)


def test_there_is_no_consensus_picture_without_frames(tmp_path):
    for store in (Clips("other"), Clips()):
        if store.meta["benchmark"] == "digits":
            store.labels = None
        assert report.draw_consensus(tmp_path, Maps(), store, torch.device("cpu")) is None
    assert not list(tmp_path.iterdir())
