"""uint8 features as the store reads them: the compiled kernel gives torch's bits, of whole clips and of some frames."""

from types import SimpleNamespace

import numpy as np
import pytest

from m3em_fast.backends import native
from m3em_fast.data import store
from m3em_fast.data.store import FeatureStore, FeatureStoreWriter, Modality

pytestmark = pytest.mark.skipif(native is None, reason="the compiled kernels are not there")
# Of a clip. The last one is more than the kernel takes at a time. Rows of 49 begin anywhere in a cache line, rows of
# 64 where one begins.
SHAPES = (
    (5, 64, 7, 7),
    (5, 3, 5, 3),
    (2, 64, 8, 8),
    (2, 7),
    (1, 1, 50, 50),
    (1, 50, 6, 7),
    (3, 1, 1, 1),
    (2, 1500, 7, 7),
)


@pytest.fixture(params=["plain", "avx2", "avx512"])
def isa(request):
    before = native.isa()
    if not native.choose_isa(request.param):
        pytest.skip(f"this machine has no {request.param}")
    yield request.param
    native.choose_isa(before)


def widened(stored, rows, picked, steps, streamed=False):
    """What the store makes of some clips of a shard, between two rows that nobody is to write to."""
    out = np.full((len(rows) + 2, len(picked), *stored.shape[2:]), np.nan, np.float16)
    shard = store.Shard("RGB", "x.npy", 0, len(stored), 0, "", steps.tolist())
    with pytest.MonkeyPatch.context() as patch:
        if store.native is not None and native.isa() == "plain":  # which torch is faster than
            patch.setattr(store, "native", SimpleNamespace(isa=str, uint8_features=native.uint8_features))
        patch.setattr(store, "_STREAMED", -1 if streamed else 2**60)
        store._widen(stored, np.array(rows), picked, shard, out, np.arange(len(rows), 0, -1))
    assert np.isnan(out[[0, -1]]).all()
    return out[1:-1]


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("picked", ["all", "some"])
def test_the_kernel_gives_torchs_bits(isa, monkeypatch, shape, picked, streamed):
    rng = np.random.default_rng(0)
    stored = rng.integers(0, 256, (3, *shape), dtype=np.uint8)
    # Steps that make subnormal numbers, and such that do not fit into float16; every channel another one.
    steps = np.resize(np.float32([1e-8, 0.37, 256.9, 1.0 / 3.0, 300.0]), shape[1])
    steps *= np.linspace(0.5, 1.0, shape[1], dtype=np.float32)
    frames = list(range(shape[0])) if picked == "all" else list(range(shape[0] - 1, 0, -2)) or [0]
    found = widened(stored, [2, 0, 0], frames, steps, streamed)
    monkeypatch.setattr(store, "native", None)
    expected = widened(stored, [2, 0, 0], frames, steps)
    np.testing.assert_array_equal(found.view(np.uint16), expected.view(np.uint16))
    with np.errstate(over="ignore"):
        value = stored[0, frames[0]].astype(np.float32) * steps.reshape(-1, *[1] * (len(shape) - 2))
        np.testing.assert_array_equal(found[0, 0], value.astype(np.float16))


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("bytes_off", [0, 2, 30, 62])
def test_wherever_it_is_written(isa, bytes_off, streamed):
    """Memory whose rows begin anywhere within a cache line, and are shorter than one or longer."""
    rng = np.random.default_rng(0)
    for channels, positions in ((1, 3), (1, 33), (3, 43), (2, 100)):
        stored = rng.integers(0, 256, (2, 1, channels, positions), dtype=np.uint8)
        steps, size = rng.random(channels, np.float32), channels * positions
        room = np.full(2 * size + 128, np.nan, np.float16)
        begin = (-room.ctypes.data % 64 + bytes_off) // 2
        out = room[begin : begin + 2 * size].reshape(2, size)
        source, to = (x.ctypes.data + np.arange(2) * x.strides[0] for x in (stored, out))
        frames = np.zeros(1, np.int64)
        addresses = (x.ctypes.data for x in (source, to, steps, frames))
        native.uint8_features(*addresses, 2, 1, channels, positions, streamed)
        wanted = (stored[:, 0].astype(np.float32) * steps[:, None]).astype(np.float16).reshape(2, size)
        assert np.array_equal(out, wanted)
        assert np.isnan(room[:begin]).all() and np.isnan(room[begin + 2 * size :]).all()


def test_a_store_reads_the_same_with_and_without_it(tmp_path, monkeypatch):
    rng = np.random.default_rng(1)
    modality = Modality("map", 5, 6, 4, 3, "uint8")
    features = rng.random((9, *modality.shape)).astype(np.float16)
    with FeatureStoreWriter(tmp_path / "s", {"RGB": modality}, shard_bytes=3 * modality.clip_bytes + 200) as writer:
        writer.append([f"c{i}" for i in range(9)], {"RGB": features})
    read = FeatureStore(tmp_path / "s").read
    fast = [read([7, 0, 3, 3, 8], frames=frames)["RGB"] for frames in (None, 3)]
    assert len(list((tmp_path / "s").glob("*.npy"))) == 3
    monkeypatch.setattr(store, "native", None)
    for one, frames in zip(fast, (None, 3), strict=True):
        assert one.equal(read([7, 0, 3, 3, 8], frames=frames)["RGB"])
    assert abs(fast[0][1].numpy() - features[0]).max() < 1 / 255
