"""Reading a store into memory that is there, and the benchmark of it."""

import json
import mmap
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from bench import loading
from m3em_fast.data import store as store_module
from m3em_fast.data.prefetch import BatchReader
from m3em_fast.data.store import FeatureStore, FeatureStoreWriter, Modality
from test_store import write


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "store", shard_bytes=128 + 3 * 240)
    return tmp_path / "store"


@pytest.mark.parametrize("frames", [None, 3])
def test_into_given_memory(folder, frames):
    store, where = FeatureStore(folder), [6, 0, 3, 3]
    wanted = store.read(where, frames=frames)
    out = {name: torch.full((6, *x.shape[1:]), torch.nan, dtype=torch.float16) for name, x in wanted.items()}
    got = store.read(where, frames=frames, out={name: x[1:5] for name, x in out.items()})
    for name, x in out.items():
        assert got[name].data_ptr() == x[1:].data_ptr()
        assert torch.equal(x[1:5], wanted[name]) and x[[0, 5]].isnan().all(), name


def test_given_memory_that_does_not_fit(folder):
    store, right = FeatureStore(folder), torch.zeros(2, 5, 4, 3, 2, dtype=torch.float16)
    wide = torch.zeros(2, 5, 4, 2, 3, dtype=torch.float16).transpose(3, 4)
    for bad in (right[:1], right.float(), right.to("meta"), wide):
        with pytest.raises(ValueError, match=r"out: RGB must be contiguous, \(2, 5, 4, 3, 2\) of torch.float16 on cpu"):
            store.read([0, 1], ["RGB"], out={"RGB": bad})
    with pytest.raises(ValueError, match="out must have a tensor for RGB, it has none"):
        store.read([0, 1], ["RGB"], out={})


@pytest.mark.skipif(
    store_module.native is None or not Path("/sys/kernel/mm/transparent_hugepage").is_dir(),
    reason="no compiled kernels, or a system without huge pages",
)
@pytest.mark.parametrize("ahead", [False, True])
def test_a_large_batch_gets_huge_pages(tmp_path, ahead):
    modality = Modality("map", 5, 1024, 7, 7)
    with FeatureStoreWriter(tmp_path / "s", {"X": modality}) as writer:
        writer.append(["a"], {"X": np.ones((1, *modality.shape))})
    store, where = FeatureStore(tmp_path / "s"), np.zeros(20, int)
    x = BatchReader([store], ["X"], 5)([where])["X"] if ahead else store.read(where)["X"]
    middle, flags = x.data_ptr() + x.nbytes // 2, {}
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            begin, end = (int(text, 16) for text in found.groups())
        elif line.startswith("VmFlags:"):
            flags[range(begin, end)] = line.split()[1:]
    assert [words for part, words in flags.items() if middle in part and "hg" in words]


def test_uint8_is_the_stored_number_times_the_step_rounded_once(tmp_path):
    """Whatever the shard: its own steps, in float32; any of the 256 numbers."""
    rng, modality = np.random.default_rng(0), Modality("map", 4, 64, 2, 2, "uint8")
    steps = rng.uniform(1e-4, 250, 64).astype(np.float32)
    numbers = rng.permutation(np.tile(np.arange(256), 16)).reshape(4, 4, 64, 2, 2)
    with FeatureStoreWriter(tmp_path / "s", {"X": modality}, scales={"X": steps}, shard_bytes=1) as writer:
        for i in range(4):
            values = (numbers[i] * steps.reshape(64, 1, 1)).astype(np.float32)
            writer.append([str(i)], {"X": values[None]})
    document = json.loads((tmp_path / "s" / "manifest.json").read_text())
    for i, shard in enumerate(document["shards"]):
        shard["scale"] = [float(step) for step in steps * (i + 1) / 4]
    (tmp_path / "s" / "manifest.json").write_text(json.dumps(document))
    stored = np.concatenate([np.load(tmp_path / "s" / f"X-{i:05d}.npy") for i in range(4)])
    assert np.abs(stored.astype(int) - numbers).max() <= 1 and len(np.unique(stored)) > 250
    scale = (steps.reshape(64, 1, 1) * np.arange(1, 5, dtype=np.float32).reshape(4, 1, 1, 1, 1) / 4).astype(np.float32)
    wanted = (stored.astype(np.float32) * scale).astype(np.float16)
    where = [3, 0, 1, 1, 2]
    assert np.array_equal(FeatureStore(tmp_path / "s").read(where)["X"].numpy(), wanted[where])


def test_what_is_on_the_disk_is_asked_for_before_it_is_copied(tmp_path, monkeypatch):
    """Every page of the clips of a batch, of whatever shard, and no other; not for vectors and single frames."""
    modalities = {"RGB": Modality("map", 5, 200, 7, 7), "Audio": Modality("vector", 5, 8)}
    rng, asked = np.random.default_rng(0), []
    with FeatureStoreWriter(tmp_path / "s", modalities, shard_bytes=128 + 3 * 98000) as writer:
        features = {name: rng.random((7, *m.shape)) for name, m in modalities.items()}
        writer.append([str(i) for i in range(7)], features)

    class Recording(mmap.mmap):
        def madvise(self, option, start, length):
            asked.append((option, start, length, self.size()))
            return super().madvise(option, start, length)

    monkeypatch.setattr(store_module.mmap, "mmap", Recording)
    now, takes = [0.0], [1.0]

    def clock():
        now[0] += takes[0]
        return now[0]

    monkeypatch.setattr(store_module.time, "perf_counter", clock)
    store = FeatureStore(tmp_path / "s")
    got = store.read([6, 1, 2])["RGB"]
    assert torch.equal(got, torch.from_numpy(features["RGB"][[6, 1, 2]].astype(np.float16)))
    assert len(asked) == 3
    for (option, start, length, size), row in zip(asked, (0, 1, 2), strict=True):
        begin = 128 + row * 98000
        assert option == mmap.MADV_WILLNEED and start % mmap.PAGESIZE == 0
        assert 0 <= begin - start < mmap.PAGESIZE and start + length == begin + 98000 <= size
    assert [size for *_, size in asked] == [128 + 98000, 128 + 3 * 98000, 128 + 3 * 98000]
    store.read([0, 1], frames=1)
    store.read([])
    assert len(asked) == 3
    for seconds, more in ((1e-6, 4), (1.0, 4), (1e-6, 5), (1e-6, 5)):
        # Asked for after a read that was slow, as from a disk, and not after one as fast as memory.
        takes[0] = seconds
        store.read([4], ["RGB"])
        assert len(asked) == more


# The benchmark.


def test_a_quick_run_measures_every_way_and_keeps_a_record(tmp_path, capsys):
    (tmp_path / "there").mkdir()
    arguments = [
        "--quick",
        "--workers",
        "1",
        "3",
        "--folder",
        str(tmp_path / "there"),
        "--json",
        str(tmp_path / "x.json"),
    ]
    assert loading.main(arguments) == 0
    assert list((tmp_path / "there").iterdir()) == []
    shown = capsys.readouterr().out
    assert "uint8" in shown and "prefetch" in shown and "A step of 335 clips takes a V100" in shown
    found = json.loads((tmp_path / "x.json").read_text())
    ways = {("raw", 1), ("prefetch", 1), ("read", 1), ("raw", 3), ("prefetch", 3)}
    assert {(one["dtype"], one["way"], one["workers"]) for one in found} == {
        (dtype, *way) for dtype in ("float16", "uint8") for way in ways
    }
    for one in found:
        assert one["op"] == "loading" and one["p50_ms"] > 0 and one["torch"] == torch.__version__
        assert (one["ratio_to_raw"] == 1) == (one["way"] == "raw")
        size = 2 * 10 * 2 * 5 * 32 * 49 * (2 if one["dtype"] == "float16" else 1)
        assert one["stored_gb_per_s"] == pytest.approx(size / one["p50_ms"] / 1e6)


def test_ratios_are_taken_within_a_turn(tmp_path, monkeypatch):
    """raw gets slower from turn to turn; prefetch takes half of its time always."""
    options = loading.resolve(loading.Options(quick=True, rounds=5, workers=(1,)))
    store = loading.make_store(tmp_path / "store", "float16", options)
    now, turn = [0.0], [0]

    def took(way):
        def read(batches):
            turn[0] += way == "raw"
            now[0] += turn[0] * {"raw": 2.0, "prefetch": 1.0, "read": 8.0}[way]

        return read

    class Raw(loading.Raw):
        __call__ = staticmethod(took("raw"))

    monkeypatch.setattr(loading, "clock", lambda: now[0])
    todo = {("raw", 1): Raw(store, 10, 1), ("prefetch", 1): took("prefetch"), ("read", 1): took("read")}
    monkeypatch.setattr(loading, "ways", lambda *_: todo)
    found = {one.way: one for one in loading.measure(store, options)}
    assert {way: one.ratio for way, one in found.items()} == {"raw": 1, "prefetch": 2, "read": 0.25}
    assert found["raw"].seconds == (4, 6) and found["prefetch"].median == 2.5  # the first turn is left out


@pytest.mark.parametrize("dtype", ["float16", "uint8"])
def test_what_is_not_as_stored_is_not_timed(tmp_path, monkeypatch, dtype):
    store = loading.make_store(tmp_path / dtype, dtype, loading.resolve(loading.Options(quick=True)))
    raw, real = loading.Raw(store, 10, 1), loading.BatchReader.__call__
    loading.check(store, np.arange(10), raw)

    def turned(self, item, room):
        return real(self, [item[0][::-1].copy()], room)

    monkeypatch.setattr(loading.BatchReader, "__call__", turned)
    with pytest.raises(AssertionError, match="RGB was not read as it is stored"):
        loading.check(store, np.arange(10), raw)


def result(dtype, seconds, workers=1, way="prefetch"):
    size = 335 * 5 * 2 * 1024 * 49
    return loading.Result(way, dtype, workers, (seconds,), size * (2 if dtype == "float16" else 1), 2 * size, 0.7)


def test_what_a_v100_needs():
    """By hand: two maps, each projected and its gradients taken with 86 GFLOP, and every floor of traffic."""
    seconds, moved, flops = loading.step_of_a_v100()
    maps, latent, n = 1675 * 1024 * 49 * 2, 1675 * 512 * 49 * 2, 1675
    assert flops == 4 * 2 * n * 49 * 1024 * 512
    assert moved > 2 * (2 * maps + 2 * latent) and seconds == pytest.approx(flops / (125e12 * 2 / 3) + moved / 9e11)
    lines = loading.verdict([result("float16", 0.02), result("float16", 0.005, 2), result("uint8", 0.05)])
    assert lines[0].startswith(f"A step of 335 clips takes a V100 {1e3 * seconds:.1f} ms at best")
    assert f"it needs {2 * maps / seconds / 1e9:.1f} GB/s of float16 maps" in lines[0]
    assert lines[1] == "Its bus brings 12 GB/s, a batch of float16 in 28.0 ms."
    assert "67.24 GB/s delivered here" in lines[2] and lines[2].endswith("for the step: met.")
    assert lines[3].endswith("12.0 for the bus: met.")
    assert "6.72 GB/s delivered here" in lines[4] and lines[5].endswith("12.0 for the bus: not met.")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--clips", "0"], "--clips must be at least 1, got 0."),
        (["--rounds", "-1"], "--rounds must be at least 1, got -1."),
        (["--workers", "1", "0"], "--workers must be numbers of threads, at least 1 each."),
        (["--folder", "{tmp}/none"], "--folder: there is no folder {tmp}/none."),
        (["--json", "{tmp}/none/x.json"], "--json: there is no folder {tmp}/none."),
        (["--quik"], "--quik is no option (did you mean --quick?); python -m bench.loading --help lists them."),
        (["--clips", "many"], "--clips must be a whole number, got many."),
    ],
)
def test_refused(tmp_path, capsys, arguments, words):
    try:
        code = loading.main([argument.format(tmp=tmp_path) for argument in arguments])
    except SystemExit as stop:
        code = stop.code
    said = capsys.readouterr()
    assert (code, said.out) == (2, "") and said.err == f"bench.loading: {words.format(tmp=tmp_path)}\n"
