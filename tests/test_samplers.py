"""The order of clips in an epoch."""

import numpy as np
import pytest

from m3em_fast.data.samplers import num_batches, paired_batches, shard


def epoch(ns=23, nt=40, bs=5, bt=8, seed=3, number=1):
    return list(paired_batches(ns, nt, bs, bt, seed=seed, epoch=number))


def test_every_clip_once_and_a_partial_last_batch():
    batches = epoch(23, 40, 5, 8)
    source, target = (np.concatenate(side) for side in zip(*batches, strict=True))
    assert source.dtype == target.dtype == np.int64
    assert sorted(source) == list(range(23)) and sorted(target) == list(range(40))
    assert [len(s) for s, _ in batches] == [5, 5, 5, 5, 3]
    assert not np.array_equal(source, np.arange(23))


@pytest.mark.parametrize(("ns", "nt", "steps"), [(20, 100, 4), (100, 20, 3), (21, 100, 5), (1, 1, 1)])
def test_stops_with_the_shorter(ns, nt, steps):
    assert len(epoch(ns, nt, 5, 8)) == num_batches(ns, nt, 5, 8) == steps


def test_the_public_codes_step_count():
    assert num_batches(16115, 26115, 128, 207) == 126


@pytest.mark.parametrize("side", [0, 1])
def test_depends_on_seed_and_epoch_alone(side):
    def flat(**change):
        return np.concatenate([pair[side] for pair in epoch(40, 40, **change)])

    first = flat()
    assert np.array_equal(first, flat())
    assert not np.array_equal(first, flat(number=2))
    assert not np.array_equal(first, flat(seed=4))
    assert not np.array_equal(flat(seed=1, number=2), flat(seed=2, number=1))


def test_domains_are_shuffled_apart_and_source_order_is_the_same_without_target():
    source, target = (np.concatenate(side) for side in zip(*epoch(40, 40, 8, 8), strict=True))
    assert not np.array_equal(source, target)
    alone = list(paired_batches(40, None, 8, 8, seed=3, epoch=1))
    assert all(target is None for _, target in alone)
    assert np.array_equal(np.concatenate([s for s, _ in alone]), source)


@pytest.mark.parametrize("name", ["num_source", "num_target", "batch_source", "batch_target"])
def test_refuses_empty(name):
    sizes = {"num_source": 4, "num_target": 4, "batch_source": 2, "batch_target": 2, name: 0}
    with pytest.raises(ValueError, match=f"^{name} must be at least 1, got 0.$"):
        paired_batches(**sizes, seed=0, epoch=0)


def test_refuses_negative_seed():
    with pytest.raises(ValueError, match="must not be negative, got -1 and 0"):
        paired_batches(4, 4, 2, 2, seed=-1, epoch=0)


@pytest.mark.parametrize("parts", [1, 2, 3, 4, 7])
def test_shares_are_the_whole_in_order_and_as_even_as_can_be(parts):
    for count in (0, 1, 2, 5, 6, 44, 128, 207):
        batch = np.random.default_rng(count).permutation(count)
        shares = [batch[shard(count, part, parts)] for part in range(parts)]
        assert np.array_equal(np.concatenate(shares), batch)
        sizes = [len(share) for share in shares]
        assert max(sizes) - min(sizes) <= 1 and (count >= parts or 0 in sizes)
