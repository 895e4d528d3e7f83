"""Ensembles: the fused scores, the search for weights against a slow one, and that no label of the target is read."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pandas
import pytest

from epic_cases import CLIPS, NOUNS, VERBS, refused, store, write_annotations
from m3em_fast.epic import ensemble
from m3em_fast.epic.annotations import SPLITS, Annotations
from m3em_fast.epic.ensemble import fuse_scores, grid, search_weights
from m3em_fast.epic.scores import EpicError, log_softmax, read_scores
from m3em_fast.epic.scoring import top_actions


@pytest.fixture
def labels(tmp_path):
    return Annotations(write_annotations(tmp_path / "labels"), published=False)


def models(tmp_path, labels, split="target_val", gains=(0.0, 0.0, 0.0), **options):
    """Scores of A, B and C, each in an order of its own."""
    found, table = [], labels.split(split)
    for number, gain in enumerate(gains):
        order = np.random.default_rng(number).permutation(len(table.ids))
        right = table.labels and {kind: values[order] for kind, values in table.labels.items()}
        ids, model = [table.ids[i] for i in order], "ABCDEFGH"[number]
        path = tmp_path / split / model
        found.append(store(path, split, ids, model, seed=number, right=right, gain=gain, **options))
    return found


def test_the_weighted_mean_of_log_softmax_scores(tmp_path, labels):
    three = models(tmp_path, labels)
    ids, verb, noun = fuse_scores(three, [1.0, 1.0, 0.5])
    assert tuple(ids) == three[0].ids and verb.dtype == noun.dtype == np.float64
    for kind, fused in (("verb", verb), ("noun", noun)):
        for row, clip in enumerate(ids):
            logits = [getattr(one, kind)[one.ids.index(clip)].astype(np.float64) for one in three]
            total = (logits[0] + logits[1] + 0.5 * logits[2]) / 2.5  # logits: a constant of the clip does not matter
            wanted = total - math.log(sum(math.exp(value) for value in total))
            assert abs(fused[row] - wanted).max() < 1e-13


def test_the_weighted_mean_of_probabilities(tmp_path, labels):
    three = models(tmp_path, labels)
    ids, verb, _ = fuse_scores(three, [2.0, 1.0, 1.0], "softmax")
    for row, clip in enumerate(ids):
        parts = [np.exp(log_softmax(one.verb[one.ids.index(clip)])) for one in three]
        assert abs(np.exp(verb[row]) - (2 * parts[0] + parts[1] + parts[2]) / 4).max() < 1e-15


@pytest.mark.parametrize("average", ensemble.AVERAGES)
def test_only_ratios_count_and_0_leaves_a_model_out(tmp_path, labels, average):
    three = models(tmp_path, labels)
    alone = fuse_scores(three, [0, 3, 0], average)
    wanted = [log_softmax(logits) for logits in three[1].ordered(three[0].ids, "x")]
    assert all(abs(found - want).max() < 1e-14 for found, want in zip(alone[1:], wanted, strict=True))
    few, many = (fuse_scores(three, weights, average) for weights in ([1, 2, 4], [3e307, 6e307, 12e307]))
    assert all(abs(a - b).max() < 1e-13 for a, b in zip(few[1:], many[1:], strict=True))
    far = [replace(one, verb=one.verb * np.float32(1e6)) for one in three]
    assert np.isfinite(fuse_scores(far, [1, 1, 1], average)[1]).all()


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ([1, 1], "--weights must be one for each of the 3 models, got 2."),
        ([1, -1, 1], "--weights must be 0 or more, and one of them positive, got 1 -1 1."),
        ([0, 0, 0], "and one of them positive, got 0 0 0."),
        ([1, math.nan, 1], "got 1 nan 1."),
        ([1, math.inf, 1], "got 1 inf 1."),
    ],
)
def test_weights_that_are_none(tmp_path, labels, weights, words):
    with pytest.raises(EpicError) as caught:
        fuse_scores(models(tmp_path, labels), weights)
    assert words in str(caught.value)


def test_scores_that_do_not_go_together(tmp_path, labels):
    first, second, _ = models(tmp_path, labels)
    others = [
        (replace(second, split="source_val"), "is of split 'source_val', "),
        (replace(second, protocol="test"), "is of protocol 'test', "),
        (replace(second, verb=second.verb[:, :5]), f"has 5 verb classes, {first.path} has 6."),
        (replace(second, noun=second.noun[:, :5]), f"has 5 noun classes, {first.path} has 9."),
        (replace(second, ids=(*second.ids[1:], "P03_101_99")), f"lacks 1 of the 14 clips of {first.path}, the first"),
    ]
    for other, words in others:
        with pytest.raises(EpicError) as caught:
            fuse_scores([first, other], [1, 1])
        assert str(caught.value).startswith(f"{second.path} {words}")
    with pytest.raises(EpicError, match="needs the scores of at least two models"):
        fuse_scores([first], [1])


def test_the_grid_is_every_tenth():
    for count in (2, 3, 4):
        wanted = [parts for parts in itertools.product(range(11), repeat=count) if sum(parts) == 10]
        assert np.array_equal(grid(count) * 10, wanted)
    assert len(grid(4)) == 286


@pytest.mark.parametrize("average", ensemble.AVERAGES)
@pytest.mark.parametrize("gains", [(0.0, 0.0, 2.0), (1.0, 1.0, 0.0), (0.0, 0.0, 0.0)])
def test_the_search_finds_what_a_slow_one_finds(tmp_path, labels, gains, average):
    three = models(tmp_path, labels, "source_val", gains)
    weights, best, equal = search_weights(three, labels, average)
    table = labels.split("source_val")
    truth = dict(zip(table.ids, zip(*table.labels.values(), strict=True), strict=True))

    def right(shares):
        ids, verb, noun = fuse_scores(three, shares, average)
        found = top_actions(verb, noun, 1)
        return sum((v, n) == truth[clip] for clip, v, n in zip(ids, found[0][:, 0], found[1][:, 0], strict=True))

    counts = {tuple(parts): right(parts) for parts in grid(3)}
    assert best == 100 * max(*counts.values(), right([1, 1, 1])) / CLIPS["source_val"]
    assert equal == 100 * right([1, 1, 1]) / CLIPS["source_val"]
    if equal == best:
        assert weights.tolist() == [1 / 3] * 3
    else:
        assert counts[tuple(weights)] == max(counts.values())
        nearest = min(sum((w - 1 / 3) ** 2 for w in ws) for ws, n in counts.items() if n == max(counts.values()))
        assert sum((weights - 1 / 3) ** 2) == pytest.approx(nearest, abs=1e-8)


def test_constant_scores_are_searched_as_they_are_ranked(tmp_path, labels):
    """The highest id is the answer among equal ones: the class 5 of verbs and 8 of nouns, and never class 0."""
    zeros = [replace(one, verb=one.verb * 0, noun=one.noun * 0) for one in models(tmp_path, labels, "source_val")]
    found = labels.split("source_val").labels
    share = 100 * np.mean((found["verb"] == VERBS - 1) & (found["noun"] == NOUNS - 1))
    assert search_weights(zeros, labels)[1] == share


def test_no_label_of_the_target_is_read(tmp_path, labels, monkeypatch):
    """The search runs without the target's files, asks for no split but source_val, and takes no score of a target."""
    three = models(tmp_path, labels, "source_val", (0.0, 1.0, 2.0))
    target = models(tmp_path, labels, "target_val", (0.0, 1.0, 2.0))
    before = search_weights(three, labels)
    path = labels.folder / SPLITS["target_val"].file
    table = pandas.read_csv(path)
    table["verb_class"] = table["verb_class"].to_numpy()[::-1]
    table.to_csv(path, index=False)
    assert np.array_equal(search_weights(three, Annotations(labels.folder, published=False))[0], before[0])
    for split in SPLITS:
        if split != "source_val":
            (labels.folder / SPLITS[split].file).unlink()
    fresh, asked = Annotations(labels.folder, published=False), []
    monkeypatch.setattr(fresh, "split", lambda name: asked.append(name) or Annotations.split(fresh, name))
    assert np.array_equal(search_weights(three, fresh)[0], before[0])
    assert asked == ["source_val"]
    with pytest.raises(EpicError, match="has scores of target_val; weights are searched on source_val only"):
        search_weights(target, fresh)
    with pytest.raises(EpicError, match="has scores of target_val"):
        search_weights([three[0], target[1]], fresh)
    said = [replace(one, split="source_val") for one in target]  # a name is not believed
    with pytest.raises(EpicError, match=r"has clips that .*source_val.csv has not, such as 'P0"):
        search_weights(said, fresh)


def test_a_part_of_the_source_will_do(tmp_path, labels):
    ids = labels.split("source_val").ids[:5]
    right = {kind: values[:5] for kind, values in labels.split("source_val").labels.items()}
    bad = store(tmp_path / "a", "source_val", ids, seed=1)
    bad = replace(bad, verb=20 * bad.verb, noun=20 * bad.noun)
    good = store(tmp_path / "b", "source_val", ids, seed=2, right=right, gain=12.0)
    weights, best, _ = search_weights([bad, good], labels)
    assert best == 100.0 and weights[1] > weights[0]


def test_models_are_searched_over_the_same_clips(tmp_path, labels):
    """Each model's ids are compared with the first one's, in whatever order: rows do not simply go together."""
    ids = labels.split("source_val").ids
    first = store(tmp_path / "a", "source_val", ids[:6], seed=1)
    for number, (clips, words) in enumerate(
        (
            (ids[:5], f"lacks 1 of the 6 clips of {first.path}, the first {ids[5]!r}."),
            ([*ids[:5], ids[7]], f"lacks 1 of the 6 clips of {first.path}, the first {ids[5]!r}."),
            ([*ids[:6], "P03_101_99"], f"has 1 clips that {first.path} does not have, the first 'P03_101_99'."),
        )
    ):
        other = store(tmp_path / f"b{number}", "source_val", clips, seed=2)
        for models in ([first, other], [first, first, other]):
            with pytest.raises(EpicError) as caught:
                search_weights(models, labels)
            assert str(caught.value) == f"{other.path} {words}"
    turned = store(tmp_path / "c", "source_val", ids[5::-1], seed=1)
    straight = replace(turned, ids=first.ids, verb=turned.verb[::-1], noun=turned.noun[::-1])
    found, wanted = (search_weights([first, other], labels) for other in (turned, straight))
    assert np.array_equal(found[0], wanted[0]) and found[1:] == wanted[1:]


def test_too_many_models_or_other_classes(tmp_path, labels):
    seven = models(tmp_path, labels, "source_val", [0.0] * 7)
    with pytest.raises(EpicError, match="weights are searched for at most 6 models, got 7"):
        search_weights(seven, labels)
    with pytest.raises(EpicError, match="has scores of 5 verb classes, the challenge has 6"):
        search_weights([replace(one, verb=one.verb[:, :5]) for one in seven[:2]], labels)


def paths(scores):
    return [str(one.path) for one in scores]


def test_the_command(tmp_path, labels, capsys):
    three = models(tmp_path, labels)
    out = tmp_path / "out"
    assert ensemble.main([*paths(three), "--out", str(out)]) == 0
    assert "A+B+C, target_val" in capsys.readouterr().out
    found = read_scores(out)
    ids, verb, noun = fuse_scores(three, [1, 1, 1])
    assert (found.ids, found.model, found.split, found.protocol) == (tuple(ids), "A+B+C", "target_val", "val")
    assert np.array_equal(found.verb, verb.astype("f4")) and np.array_equal(found.noun, noun.astype("f4"))
    assert found.about["weights"] == "equal" and found.about["average"] == "log-softmax"
    assert [part["model"] for part in found.about["ensemble"]] == ["A", "B", "C"]

    assert ensemble.main([*paths(three[:2]), "--out", f"{out}2", "--weights", "3", "1", "--average", "softmax"]) == 0
    found = read_scores(f"{out}2")
    assert [part["weight"] for part in found.about["ensemble"]] == [0.75, 0.25] and found.about["weights"] == "given"
    assert np.array_equal(found.verb, fuse_scores(three[:2], [3, 1], "softmax")[1].astype("f4"))


def test_the_command_searches(tmp_path, labels, capsys):
    known = models(tmp_path, labels, "source_val", (0.0, 0.0, 4.0))
    three = models(tmp_path, labels)
    (labels.folder / SPLITS["target_val"].file).unlink()
    options = ["--annotations", str(labels.folder), "--no-published"]
    assert ensemble.main([*paths(three), "--search", *paths(known), "--out", str(tmp_path / "out"), *options]) == 0
    shown = capsys.readouterr().out
    assert "action top-1 on source_val: " in shown and "these models were trained on source_val" in shown
    found = read_scores(tmp_path / "out")
    weights = [part["weight"] for part in found.about["ensemble"]]
    assert found.about["weights"] == "searched on 12 clips of source_val" and weights[2] > max(weights[:2])
    assert np.array_equal(found.verb, fuse_scores(three, weights)[1].astype("f4"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{A}", "{B}", "--out", "{A}"], "A already exists; scores are never written over."),
        (["{A}", "{A}/../A", "--out", "{new}"], "A is given twice; --weights makes a model count more."),
        (
            ["{A}", "{B}", "--out", "{new}", "--search", "{A}", "{A}"],
            "A is given twice; --weights makes a model count more.",
        ),
        (["{A}", "--out", "{new}"], "an ensemble needs the scores of at least two models."),
        (["--out", "{new}"], "an ensemble needs the scores of at least two models."),
        (["{A}", "{B}", "--out", "{new}", "--weights", "1"], "--weights must be one for each of the 2 models, got 1."),
        (["{A}", "{B}", "--out", "{new}", "--weights", "1", "x"], "--weights must be numbers, got 1 x."),
        (["{A}", "{B}", "--out", "{new}", "--weights", "1", "1", "--search", "{A}", "{B}"], "not both."),
        (
            ["{A}", "{B}", "--out", "{new}", "--search", "{B}", "{A}"],
            "--search is of the models B, A, the ensemble of A, B",
        ),
        (["{A}", "{B}", "--out", "{new}", "--search", "{A}", "{B}"], "weights are searched on source_val only."),
        (
            ["{A}", "{B}", "--out", "{new}", "--average", "max"],
            "--average must be one of log-softmax, softmax, got max.",
        ),
        (["{A}", "{B}"], "--out is missing;"),
    ],
)
def test_what_the_command_refuses(tmp_path, labels, capsys, arguments, words):
    names = {one.model: one.path for one in models(tmp_path, labels)} | {"new": tmp_path / "new"}
    options = ["--annotations", labels.folder, "--no-published"]
    assert words in refused(capsys, ensemble.main, [word.format(**names) for word in arguments] + options)
    assert not (tmp_path / "new").exists()
