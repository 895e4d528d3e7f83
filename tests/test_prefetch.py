"""Reading ahead: the order and the values of reading one by one, errors in their place, and no thread left behind."""

import itertools
import threading
import time

import numpy as np
import pytest
import torch

from m3em_fast.data.prefetch import BatchReader, Prefetch
from m3em_fast.data.samplers import paired_batches
from m3em_fast.data.store import FeatureStore, FeatureStoreWriter, Modality, StoreError
from test_store import write


@pytest.fixture
def stores(tmp_path):
    write(tmp_path / "source", count=23, step=23, shard_bytes=128 + 4 * 240)
    write(tmp_path / "target", count=31, step=31)
    return [FeatureStore(tmp_path / "source"), FeatureStore(tmp_path / "target")]


def one_by_one(stores, pairs, frames=5):
    for source, target in pairs:
        parts = [store.read(part, frames=frames) for store, part in zip(stores, (source, target), strict=True)]
        yield (source, target), {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def pairs(epoch=0):
    return paired_batches(23, 31, 4, 7, seed=3, epoch=epoch)


def threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("m3em-prefetch")]


@pytest.mark.parametrize(("depth", "workers"), [(0, 1), (1, 1), (2, 2), (3, 2), (20, 4)])
def test_order_and_values_are_those_of_reading_one_by_one(stores, depth, workers):
    reader, seen = BatchReader(stores, stores[0].modalities, 5), 0
    state = torch.get_rng_state()
    with Prefetch(pairs(), reader, depth=depth, workers=workers) as batches:
        assert len(threads()) == 0  # not before the first batch is asked for
        for (wanted, features), (item, got) in itertools.zip_longest(one_by_one(stores, pairs()), batches):
            assert all(np.array_equal(a, b) for a, b in zip(wanted, item, strict=True))
            assert list(got) == list(features)
            assert all(torch.equal(got[name], features[name]) and got[name].is_contiguous() for name in features)
            seen += 1
            assert len(threads()) <= min(workers, depth)
    assert seen == 5 and not threads()
    assert torch.equal(torch.get_rng_state(), state)


def test_beginning_at_a_later_step(stores):
    reader = BatchReader(stores, ["RGB"], 5)
    with Prefetch(pairs(), reader) as batches:
        whole = [{n: x.clone() for n, x in features.items()} for _, features in batches]
    with Prefetch(itertools.islice(pairs(), 3, None), reader) as batches:
        rest = [{n: x.clone() for n, x in features.items()} for _, features in batches]
    assert len(whole) == 5 and len(rest) == 2
    assert all(torch.equal(a["RGB"], b["RGB"]) for a, b in zip(whole[3:], rest, strict=True))


def test_stores_of_which_one_is_not_read(stores):
    reader = BatchReader(stores, ["Audio"], 5)
    got = reader([None, np.array([3, 1])])
    assert torch.equal(got["Audio"], stores[1].read([3, 1], ["Audio"], 5)["Audio"])
    with Prefetch(
        ((part, None) for part in (np.array([2]), np.array([1, 5, 6]), np.array([], int))), reader
    ) as batches:
        for (part, _), features in batches:
            assert torch.equal(features["Audio"], stores[0].read(part, ["Audio"], 5)["Audio"])


def test_memory_is_used_again_and_that_of_the_present_batch_is_not(stores):
    reader, places = BatchReader(stores, ["RGB"], 5), []
    with Prefetch(pairs(), reader, depth=2) as batches:
        for _, features in batches:
            before = features["RGB"].clone()
            time.sleep(0.01)  # those ahead are read meanwhile
            assert torch.equal(features["RGB"], before)
            places.append(features["RGB"].data_ptr())
    assert len(set(places)) == 3 and len(places) == 5


def test_it_reads_ahead_and_no_further(stores):
    begun = []

    def read(item, room):
        begun.append(item)
        return {"item": torch.tensor(item)}

    with Prefetch(range(100), read, depth=3, workers=1) as batches:
        for expected in range(10):
            item, batch = next(batches)
            assert item == expected == batch["item"]
            deadline = time.monotonic() + 10
            while len(begun) < item + 4 and time.monotonic() < deadline:
                time.sleep(0.001)
            time.sleep(0.005)
            assert begun == list(range(item + 4))
    assert begun == list(range(13)) and not threads()


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_an_error_comes_up_in_its_place(stores, depth):
    requests = ((np.array([i]), None) for i in (1, 2, 99, 3))
    seen = []
    with (
        pytest.raises(StoreError, match="holds clips 0 to 22, got index 99"),
        Prefetch(requests, BatchReader(stores, ["RGB"], 5), depth=depth) as batches,
    ):
        for (part, _), _features in batches:
            seen.append(int(part[0]))
    assert seen == [1, 2] and not threads()
    assert list(batches) == [], "it has ended"


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_an_error_of_the_requests_comes_up_in_its_place(stores, depth):
    def requests():
        yield np.array([1]), None
        yield np.array([2]), None
        raise RuntimeError("no more")

    seen = []
    with (
        pytest.raises(RuntimeError, match="no more"),
        Prefetch(requests(), BatchReader(stores, ["RGB"], 5), depth=depth) as batches,
    ):
        for (part, _), _features in batches:
            seen.append(int(part[0]))
    assert seen == [1, 2] and not threads()


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_left_in_the_middle_it_ends(error):
    """It waits for what has begun, and begins nothing more."""
    ended, gate, begun = [], threading.Event(), threading.Semaphore(0)

    def read(item, room):
        if item:
            begun.release()
            gate.wait(10)
        ended.append(item)
        return {}

    with pytest.raises(error), Prefetch(range(10**9), read, depth=4, workers=2) as batches:
        next(batches)
        assert all(begun.acquire(timeout=10) for _ in range(2))
        threading.Timer(0.05, gate.set).start()
        raise error
    assert not threads() and sorted(ended) == [0, 1, 2]
    with pytest.raises(StopIteration):
        next(batches)


def test_without_a_block_no_thread_outlives_it():
    batches = Prefetch(range(100), lambda item, room: {}, depth=2)
    next(batches)
    del batches
    deadline = time.monotonic() + 10
    while threads() and time.monotonic() < deadline:
        time.sleep(0.001)
    assert not threads()


def test_stores_that_do_not_fit(stores, tmp_path):
    with pytest.raises(ValueError, match="source has no modality 'Depth'"):
        BatchReader(stores, ["Depth"], 5)
    other = tmp_path / "other"
    with FeatureStoreWriter(other, {"RGB": Modality("map", 5, 4, 3, 3)}) as writer:
        writer.append(["a"], {"RGB": np.ones((1, 5, 4, 3, 3))})
    with pytest.raises(ValueError, match=r"other has RGB in \(4, 3, 3\) a frame, .*source in \(4, 3, 2\)"):
        BatchReader([stores[0], FeatureStore(other)], ["RGB"], 5)
    for options in ({"depth": -1}, {"workers": 0}):
        with pytest.raises(ValueError, match="depth must be at least 0 and workers at least 1"):
            Prefetch([], lambda item, room: {}, **options)


def test_many_threads_read_one_store(tmp_path):
    """Its shards are opened, and their checksums remembered, by whoever comes first."""
    write(tmp_path / "store", count=40, step=40, shard_bytes=1)
    store, whole = FeatureStore(tmp_path / "store"), FeatureStore(tmp_path / "store").read(range(40))
    (tmp_path / "store" / ".verified.json").unlink()
    order = [np.random.default_rng(i).permutation(40) for i in range(20)]
    with Prefetch(((part,) for part in order), BatchReader([store], whole, 5), depth=8, workers=8) as batches:
        for (part,), features in batches:
            for name in ("RGB", "Crop"):
                assert torch.equal(features[name], whole[name][part])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="page-locked memory needs a card")
def test_page_locked_memory(stores):
    with Prefetch(pairs(), BatchReader(stores, ["RGB"], 5, pin_memory=True)) as batches:
        for (_, features), (_, wanted) in zip(batches, one_by_one(stores, pairs()), strict=True):
            assert features["RGB"].is_pinned()
            assert torch.equal(features["RGB"].to("cuda", non_blocking=True).cpu(), wanted["RGB"])
