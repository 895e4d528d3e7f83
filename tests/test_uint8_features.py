"""uint8 features as the store reads them: the compiled kernel gives torch's bits, of whole clips and of some frames."""

import numpy as np
import pytest

from m3em_fast.backends import native
from m3em_fast.data import store
from m3em_fast.data.store import FeatureStore, FeatureStoreWriter, Modality

pytestmark = pytest.mark.skipif(native is None, reason="the compiled kernels are not there")
SHAPES = ((5, 64, 7, 7), (5, 3, 5, 3), (2, 7), (1, 1, 50, 50), (1, 50, 6, 7), (3, 1, 1, 1))


@pytest.fixture(params=["plain", "avx2", "avx512"])
def isa(request):
    before = native.isa()
    if not native.choose_isa(request.param):
        pytest.skip(f"this machine has no {request.param}")
    yield request.param
    native.choose_isa(before)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("picked", ["all", "some"])
def test_the_kernel_gives_torchs_bits(isa, shape, picked):
    rng = np.random.default_rng(0)
    stored = rng.integers(0, 256, shape, dtype=np.uint8)
    # Steps that make subnormal numbers, and such that do not fit into float16.
    steps = np.resize(np.float32([1e-8, 0.37, 256.9, 1.0 / 3.0, 300.0]), shape[1])
    frames = list(range(shape[0])) if picked == "all" else list(range(1, shape[0], 2)) or [0]
    expected, found = (np.full((len(frames), *shape[1:]), np.nan, np.float16) for _ in range(2))
    widener = store._Widener(expected.shape)
    widener.stored[...] = stored[frames]
    shard = store.Shard("RGB", "x.npy", 0, 1, 0, "", steps.tolist())
    widener(shard, expected)
    store._widen(stored, frames, steps, found)
    np.testing.assert_array_equal(found.view(np.uint16), expected.view(np.uint16))


def test_a_store_reads_the_same_with_and_without_it(tmp_path, monkeypatch):
    rng = np.random.default_rng(1)
    modality = Modality("map", 5, 6, 4, 3, "uint8")
    features = rng.random((9, *modality.shape)).astype(np.float16)
    with FeatureStoreWriter(tmp_path / "s", {"RGB": modality}, shard_bytes=3 * modality.clip_bytes + 200) as writer:
        writer.append([f"c{i}" for i in range(9)], {"RGB": features})
    read = FeatureStore(tmp_path / "s").read
    fast = [read([7, 0, 3, 3, 8], frames=frames)["RGB"] for frames in (None, 3)]
    monkeypatch.setattr(store, "native", None)
    for one, frames in zip(fast, (None, 3), strict=True):
        assert one.equal(read([7, 0, 3, 3, 8], frames=frames)["RGB"])
    assert abs(fast[0][1].numpy() - features[0]).max() < 1 / 255
