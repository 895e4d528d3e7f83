"""Accuracies: against a ranking of all pairs one by one, torchmetrics, and counts made by hand."""

import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from epic_cases import NOUNS, VERBS, published_folder, refused, store, write_annotations
from m3em_fast.epic import scoring
from m3em_fast.epic.annotations import Annotations
from m3em_fast.epic.scores import EpicError, log_softmax, read_scores
from m3em_fast.epic.scoring import Accuracy, accuracies, majority, score, top_actions, top_classes
from m3em_fast.uda import evaluation

KINDS = ("verb", "noun", "action")


@pytest.fixture(scope="module")
def labels(tmp_path_factory):
    return Annotations(write_annotations(tmp_path_factory.mktemp("epic") / "labels"), published=False)


def places(row):
    """Each class's place among its kind, by the rule in words: higher score first, of equal ones the higher id."""
    place = [0] * len(row)
    for mine, score_ in enumerate(row):
        place[mine] = sum(other > score_ or (other == score_ and its > mine) for its, other in enumerate(row))
    return place


def slow_actions(verb, noun):
    """All pairs of one clip, best first."""
    verbs, nouns = places(verb), places(noun)
    pairs = [(v, n) for v in range(len(verb)) for n in range(len(noun))]
    return sorted(pairs, key=lambda pair: (-(verb[pair[0]] + noun[pair[1]]), verbs[pair[0]], nouns[pair[1]]))


# Few different values, and some that differ by less than a sum can hold: most clips have ties, true ones and rounded.
VALUES = st.sampled_from([0.0, -1.0, -1.5, -1e-17, np.nextafter(-1.0, 0), -3.0, -1e16, -1e16 + 2])


@given(st.data())
def test_the_best_pairs_are_those_of_all_pairs(data):
    clips, verbs = data.draw(array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=8))
    nouns = data.draw(st.integers(1, 9))
    verb = data.draw(arrays(np.float64, (clips, verbs), elements=VALUES))
    noun = data.draw(arrays(np.float64, (clips, nouns), elements=VALUES))
    for k in (1, 3, 5):
        found = top_actions(verb, noun, k)
        for row in range(clips):
            wanted = slow_actions(verb[row].tolist(), noun[row].tolist())[:k]
            assert list(zip(found[0][row].tolist(), found[1][row].tolist(), strict=True)) == wanted
            assert top_classes(verb, k)[row].tolist() == np.argsort(places(verb[row].tolist()))[:k].tolist()


def test_the_challenge_s_size_and_its_product_of_probabilities():
    """97 x 300 classes: the whole product of softmax scores, the 5 best of it."""
    draw = np.random.default_rng(0)
    verb, noun = draw.normal(size=(50, 97), scale=3), draw.normal(size=(50, 300), scale=3)
    product = np.exp(log_softmax(verb))[:, :, None] * np.exp(log_softmax(noun))[:, None, :]
    best = np.argsort(product.reshape(50, -1), 1)[:, ::-1][:, :5]
    found = top_actions(log_softmax(verb), log_softmax(noun), 5)
    assert np.array_equal(found[0] * 300 + found[1], best)


def test_a_constant_answer_is_not_the_majority_class():
    assert top_classes(np.zeros((1, 97)), 5).tolist() == [[96, 95, 94, 93, 92]]
    assert [found.tolist() for found in top_actions(np.zeros((1, 3)), np.zeros((1, 4)), 2)] == [[[2, 2]], [[3, 2]]]


def test_as_torchmetrics_has_it(labels, tmp_path):
    split = labels.split("target_val")
    for seed in range(5):
        found = store(tmp_path / str(seed), "target_val", split.ids, seed=seed, right=split.labels, gain=1.0)
        wanted = evaluation.accuracies(
            torch.from_numpy(found.verb),
            torch.from_numpy(found.noun),
            *(torch.from_numpy(split.labels[kind]) for kind in ("verb", "noun")),
        )
        mine = score(found, labels)["all"]
        for kind in KINDS:
            assert mine[kind].top1 == pytest.approx(wanted[f"{kind}_top1"], abs=1e-5)
            assert mine[kind].top5 == pytest.approx(wanted[f"{kind}_top5"], abs=1e-5)


def slow_score(found, split, labels):
    """By hand, clip by clip, as the rules say it."""
    hits = {group: {kind: [] for kind in KINDS} for group in ("all", "tail", "unseen")}
    rows = {clip: row for row, clip in enumerate(found.ids)}
    for place, clip in enumerate(split.ids):
        verb, noun = (log_softmax(x[rows[clip]][None])[0].tolist() for x in (found.verb, found.noun))
        truth = split.labels["verb"][place], split.labels["noun"][place]
        ranks = {"verb": places(verb)[truth[0]], "noun": places(noun)[truth[1]]}
        ranks["action"] = slow_actions(verb, noun).index(truth)
        tail = {"verb": truth[0] in labels.tail["verb"], "noun": truth[1] in labels.tail["noun"]}
        tail["action"] = tail["verb"] or tail["noun"]
        for kind in KINDS:
            hits["all"][kind].append(ranks[kind])
            if tail[kind]:
                hits["tail"][kind].append(ranks[kind])
            if clip.startswith("P06"):
                hits["unseen"][kind].append(ranks[kind])

    def percent(ranks):
        return Accuracy(len(ranks), *(100.0 * sum(rank < k for rank in ranks) / len(ranks) for k in (1, 5)))

    return {group: {kind: percent(ranks) for kind, ranks in kinds.items()} for group, kinds in hits.items()}


def test_all_tail_and_unseen_clips(labels, tmp_path):
    split = labels.split("target_val")
    for seed in range(4):
        ids = np.random.default_rng(seed).permutation(split.ids).tolist()
        found = store(tmp_path / str(seed), "target_val", ids, seed=seed)
        mine = score(found, labels)
        assert mine == slow_score(found, split, labels)
        assert mine["unseen"]["verb"].clips == 7 and mine["tail"]["action"].clips > mine["tail"]["noun"].clips


def test_a_group_without_clips_has_no_accuracy(labels, tmp_path):
    split = labels.split("source_train")
    found = score(store(tmp_path / "a", "source_train", split.ids), labels)
    assert set(found["unseen"].values()) == {Accuracy(0, None, None)}


def test_majority(labels):
    split = labels.split("target_val")  # verbs 0 to 5, 14 clips: five classes hold 12, 2 of them 3 each
    assert majority(split)["verb"] == Accuracy(14, 100 * 3 / 14, 100 * 12 / 14)
    assert majority(split)["action"] == Accuracy(14, 100 / 14, 500 / 14)


def test_what_cannot_be_scored(labels, tmp_path):
    ids = labels.split("target_val").ids
    cases = [
        ("target_test", labels.split("target_test").ids, {}, "has scores of target_test, whose labels are not public."),
        ("nonsense", ids, {}, "'nonsense' is no split of the challenge"),
        ("target_val", ids[1:], {}, "lacks 1 of the 14 clips of"),
        ("target_val", [*ids, "P01_01_0"], {}, "has 1 clips that"),
        ("target_val", ids, {"classes": (VERBS, NOUNS + 1)}, "has scores of 10 noun classes, the challenge has 9."),
        ("target_val", ids, {"classes": (VERBS - 1, NOUNS)}, "has scores of 5 verb classes, the challenge has 6."),
    ]
    for number, (split, clips, more, words) in enumerate(cases):
        with pytest.raises(EpicError) as caught:
            score(store(tmp_path / str(number), split, clips, **more), labels)
        assert words in str(caught.value)


def test_a_whole_split_takes_little_memory(tmp_path):
    """7,906 clips, whose product with all pairs would take 1.8 GB."""
    folder = write_annotations(tmp_path / "labels", 97, 300, {"target_val": 7906})
    full = Annotations(folder, published=False)
    split = full.split("target_val")
    draw = np.random.default_rng(0)
    verb, noun = (draw.normal(size=(7906, n)).astype(np.float32) for n in (97, 300))
    tracemalloc.start()
    try:
        found = accuracies(log_softmax(verb), log_softmax(noun), split, full)
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert found["all"]["action"].clips == 7906 and most < 100e6


def test_the_command(labels, tmp_path, capsys):
    split = labels.split("target_val")
    store(tmp_path / "a", "target_val", split.ids, right=split.labels, gain=1e4)
    store(tmp_path / "b", "target_val", split.ids, model="B", seed=1)
    options = ["--annotations", str(labels.folder), "--no-published"]
    assert scoring.main([str(tmp_path / "a"), str(tmp_path / "b"), *options]) == 0
    shown = capsys.readouterr().out
    assert "A, target_val" in shown and "B, target_val" in shown
    assert shown.count("all clips") == shown.count("tail classes") == shown.count("unseen participants") == 2
    assert "100.00 / 100.00" in shown and "21.43 / 85.71" in shown
    for arguments, words in [
        (options, "name at least one folder of stored scores."),
        ([tmp_path / "c", *options], f"{tmp_path / 'c'} holds no stored scores: scores.json cannot be read"),
        (
            [tmp_path / "a", *options[:2]],
            "has 6 rows, the published file has 97; --no-published reads one of your own.",
        ),
    ]:
        assert words in refused(capsys, scoring.main, arguments)


def test_the_published_labels(tmp_path):
    """The most frequent answers reach what they are known to, and right ones everything."""
    full = Annotations(published_folder())
    split = full.split("target_val")
    floor = majority(split)
    assert [round(floor[kind].top1, 1) for kind in KINDS] == [22.9, 6.3, 2.9]
    verb, noun = np.zeros((7906, 97), np.float32), np.zeros((7906, 300), np.float32)
    verb[:, 0], noun[:, 0] = 1, 1
    constant = accuracies(log_softmax(verb), log_softmax(noun), split, full)["all"]
    assert (constant["verb"].top1, constant["noun"].top1) == (floor["verb"].top1, floor["noun"].top1)
    assert constant["verb"].top1 == 100 * 1811 / 7906 and constant["noun"].top1 == 100 * 497 / 7906
    right = store(tmp_path / "a", "target_val", split.ids, classes=(97, 300), right=split.labels, gain=100.0)
    assert {value.top1 for value in score(read_scores(right.path), full)["all"].values()} == {100.0}
