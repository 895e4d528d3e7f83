"""What the tests of train.py share: small stores whose features show their labels, and options that fit them."""

import numpy as np
from hypothesis import strategies as st

import train
from m3em_fast.data.store import FeatureStoreWriter, Modality

MODALITIES = {
    "RGB": Modality("map", 5, 6, 4, 4, "float16"),
    "Flow": Modality("map", 5, 4, 4, 4, "float16"),
    "Audio": Modality("vector", 5, 5, None, None, "float16"),
}
CLASSES = {"verb": 3, "noun": 4}


def write_store(path, clips, seed, modalities=MODALITIES, labelled=True, flip=False, classes=CLASSES):
    rng = np.random.default_rng(seed)
    labels = {kind: rng.integers(0, count, clips) for kind, count in classes.items()}
    features = {}
    for name, m in modalities.items():
        shape = (clips, m.frames, m.channels) + ((m.height, m.width) if m.kind == "map" else ())
        x = rng.random(shape)
        for kind, first in (("verb", 0), ("noun", 1)):
            channel = (labels[kind] + first) % m.channels
            x[np.arange(clips), :, channel] += 1.5
        features[name] = x.astype(np.float16)
    if flip:
        labels = {kind: classes[kind] - 1 - x for kind, x in labels.items()}
    with FeatureStoreWriter(path, modalities, classes) as writer:
        writer.append([f"{path.name}_{i}" for i in range(clips)], features, labels if labelled else None)


def write_data(folder):
    sizes = {"source_train": 44, "source_val": 20, "target_train": 50, "target_test": 30}
    for seed, (split, clips) in enumerate(sizes.items()):
        write_store(folder / split, clips, seed, labelled=split != "target_train")
    return folder


def make_options(data, run, **changes):
    sizes = {"epochs": 2, "batch_source": 10, "batch_target": 12, "lr_steps": (1,), "save_every": 2, "latent": 4}
    return train.Options(data=data, run=run, **{**sizes, "fc_dim": 16, "relation_dim": 8, "device": "cpu", **changes})


def at_call(owner, name, count, action):
    """From now on the ``count``-th call of a function does something else first."""
    real, calls = getattr(owner, name), 0

    def counted(*arguments, **options):
        nonlocal calls
        calls += 1
        if calls == count:
            action()
        return real(*arguments, **options)

    setattr(owner, name, counted)


def mutated(data, original, end):
    """The bytes with some of them, before ``end``, taken out, put in, written over or set to others."""
    changed = bytearray(original)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, min(end, len(changed))))
        length = data.draw(st.integers(0, 9) | st.integers(0, len(changed)))
        changed[at : at + length] = data.draw(st.binary(max_size=9))
    return bytes(changed)
