"""Checkpoints: what was written comes back to the last bit, and whatever else a file holds is refused, not run."""

import copy
import os
import zipfile

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from m3em_fast.uda import METHODS, ActionModel
from m3em_fast.uda.checkpoint import CheckpointError, load_checkpoint, random_state, restore, save_checkpoint
from m3em_fast.uda.evaluation import METRICS
from m3em_fast.uda.run import UsageError
from train_cases import mutated

CPU = torch.device("cpu")
GIVEN = {"options": {"seed": 1}, "data": {"source_train": "ab" * 32, "target_test": "cd" * 32}}


def parts():
    """A small model that trains, with what a checkpoint is put into."""
    torch.manual_seed(0)
    model = ActionModel({}, {"Audio": 3}, 2, 2, method="ta3n", fc_dim=2, relation_dim=2, init="torch")
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, nesterov=True)
    scaler = torch.amp.GradScaler("cpu")
    return {"model": model, "optimizer": optimizer, "scaler": scaler}


def step_of(model, optimizer, scaler):
    out = model({"Audio": torch.randn(4, 5, 3)})
    scaler.scale(out.verb.sum() + out.noun.sum()).backward()
    scaler.step(optimizer)
    scaler.update()


@pytest.fixture(scope="module")
def state():
    """After epoch 1 of 2, of 2 steps each."""
    trained = parts()
    for _ in range(2):
        step_of(**trained)
    scores = dict.fromkeys(METRICS, 1.0)
    history = {"loss": [1.0, 2.0], "terms": [{"classification": 1.0}] * 2}
    history |= {"source_val": [scores], "target_test": [scores]}
    states = {name: part.state_dict() for name, part in trained.items()}
    return {**states, "epoch": 1, "step": 0, "random": random_state(CPU), "history": history, **GIVEN}


@pytest.fixture(scope="module")
def checkpoint(state, tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / "checkpoint.pt"
    save_checkpoint(path, state)
    return path


def put_into(path, **parts):
    return restore(path, **GIVEN, **parts, device=CPU, epochs=2, steps=2)


def put(path):
    return put_into(path, **parts())


def test_a_good_state_is_put_back(checkpoint, state):
    fresh = parts()
    assert put_into(checkpoint, **fresh) == (state["history"], 1, 0)
    for name, x in state["model"].items():
        assert torch.equal(x, fresh["model"].state_dict()[name])
    momentum = fresh["optimizer"].state_dict()["state"]
    assert momentum.keys() == state["optimizer"]["state"].keys() and momentum
    for index, x in momentum.items():
        assert torch.equal(x["momentum_buffer"], state["optimizer"]["state"][index]["momentum_buffer"])


def test_a_flipped_bit_is_refused(checkpoint, tmp_path):
    """torch itself does not see it."""
    with zipfile.ZipFile(checkpoint) as archive:
        weights = max(archive.infolist(), key=lambda entry: entry.file_size * ("/data/" in entry.filename))
        content = archive.read(weights)
    data = bytearray(checkpoint.read_bytes())
    data[data.index(content) + len(content) // 2] ^= 1
    (tmp_path / "checkpoint.pt").write_bytes(data)
    torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    with pytest.raises(CheckpointError, match=rf"\({weights.filename} is damaged\)"):
        load_checkpoint(tmp_path / "checkpoint.pt")


def test_a_packed_checkpoint_is_refused_before_it_is_unpacked(checkpoint, tmp_path):
    packed = tmp_path / "checkpoint.pt"
    with zipfile.ZipFile(checkpoint) as archive, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as other:
        for entry in archive.infolist():
            other.writestr(entry.filename, archive.read(entry))
    with pytest.raises(CheckpointError, match="packed"):
        load_checkpoint(packed)


LENGTH = "does not fit 2 epochs of 2 steps; was it trained on other data, or altered"
MODEL = "does not fit this model; was it trained on other data, or altered"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.update(options=[]), "does not say with what options"),
        (lambda s: s.update(options={"seed": torch.ones(2)}), "does not say with what options"),
        (lambda s: s.update(options={}), "was started with --seed None, not 1"),
        (lambda s: s.pop("step"), "must have exactly the entries of format 2; missing or unknown: step."),
        (lambda s: s.update(more=1), "must have exactly the entries of format 2; missing or unknown: more."),
        (lambda s: s.update(data=None), "does not say on what data"),
        (lambda s: s["data"].pop("target_test"), "does not say on what data"),
        (lambda s: s["data"].update(target_test=torch.ones(2)), "does not say on what data"),
        (
            lambda s: s["data"].update(target_test="ee" * 32),
            "was started on a target_test whose manifest's SHA-256 begins with eeeeeeeeeeee, not cdcdcdcdcdcd; were",
        ),
        (lambda s: s.update(epoch=3), LENGTH),
        (lambda s: s.update(epoch=-1), LENGTH),
        (lambda s: s.update(epoch=True), LENGTH),
        (lambda s: s.update(epoch=2), LENGTH),  # with a history of one epoch
        (lambda s: s.update(step=3), LENGTH),
        (
            lambda s: s.update(
                epoch=0,
                step=3,
                history={"loss": [1.0] * 3, "terms": [{}] * 3, "source_val": [], "target_test": []},
            ),
            LENGTH,
        ),
        (
            lambda s: s.update(epoch=3, history={name: x[:1] * len(x) * 3 for name, x in s["history"].items()}),
            LENGTH,
        ),
        (lambda s: s.update(history=[]), LENGTH),
        (lambda s: s["history"]["loss"].append(1.0), LENGTH),
        (lambda s: s["history"].update(more=1), LENGTH),
        (lambda s: s["history"].update(loss=[1.0, float("nan")]), LENGTH),
        (lambda s: s["history"].update(terms=[{"a": 1.0}, {"b": 1.0}]), LENGTH),
        (lambda s: s["history"].update(terms=[1.0, 1.0]), LENGTH),
        (lambda s: s["history"].update(target_test=[{"verb_top1": 1.0}]), LENGTH),
        (lambda s: s["model"].popitem(), MODEL),
        (lambda s: s.update(model={k: x.double() for k, x in s["model"].items()}), MODEL),
        (lambda s: s.update(model={k: x[..., :1] for k, x in s["model"].items()}), MODEL),
        (lambda s: s.update(model={k: x.to_sparse() for k, x in s["model"].items()}), MODEL),
        (lambda s: s.update(optimizer=1), MODEL),
        (lambda s: s["optimizer"]["state"][0].update(momentum_buffer=torch.ones(1)), MODEL),
        (lambda s: s["optimizer"]["state"].update({99: {}}), MODEL),
        (lambda s: s.update(scaler={}), MODEL),
        (lambda s: s["scaler"].update(scale="big"), MODEL),
        (lambda s: s["scaler"].update(scale=float("nan")), MODEL),
        (lambda s: s["scaler"].update(growth_factor=1e9), MODEL),
        (lambda s: s.update(random={}), MODEL),
        (lambda s: s["random"].update(cpu=torch.zeros(7, dtype=torch.uint8)), MODEL),
    ],
    ids=range(36),
)
def test_an_altered_state_is_refused(state, tmp_path, change, words):
    altered = copy.deepcopy(state)
    change(altered)
    save_checkpoint(tmp_path / "checkpoint.pt", altered)
    with pytest.raises((CheckpointError, UsageError)) as caught:
        put(tmp_path / "checkpoint.pt")
    assert words in str(caught.value) and str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_the_learning_rate_and_its_like_come_from_the_options(state, tmp_path):
    altered = copy.deepcopy(state)
    altered["optimizer"]["param_groups"][0].update(weight_decay=9.0, momentum=0.1, params=[])
    save_checkpoint(tmp_path / "checkpoint.pt", altered)
    fresh = parts()
    put_into(tmp_path / "checkpoint.pt", **fresh)
    group = fresh["optimizer"].param_groups[0]
    assert (group["weight_decay"], group["momentum"]) == (0, 0.9)


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return isinstance(b, list) and len(a) == len(b) and all(map(equal, a, b))
    return type(a) is type(b) and a == b


@given(st.data())
def test_any_bytes_are_the_checkpoint_or_refused(checkpoint, tmp_path, data):
    """Not a checkpoint: the one that was written, to the last bit."""
    original = checkpoint.read_bytes()
    target = tmp_path / "checkpoint.pt"
    target.write_bytes(
        data.draw(st.binary(max_size=60)) if data.draw(st.booleans()) else mutated(data, original, 10**9)
    )
    try:
        found = load_checkpoint(target)
    except CheckpointError as error:
        assert "\n" not in str(error) and str(target) in str(error)
    else:
        assert equal(found, load_checkpoint(checkpoint))


@given(st.data())
def test_any_pickle_in_the_archive_is_read_or_refused(checkpoint, tmp_path, data):
    """The checksums are right here: somebody has made this file."""
    target, marker = tmp_path / "checkpoint.pt", tmp_path / "ran"
    code = data.draw(st.sampled_from([b"", b"cos\nmkdir\n(V%s\ntR0" % os.fsencode(marker)]))
    with zipfile.ZipFile(checkpoint) as archive, zipfile.ZipFile(target, "w") as other:
        for entry in archive.infolist():
            content = archive.read(entry)
            if entry.filename.endswith("data.pkl"):
                content = content[:2] + code + mutated(data, content, 10**9)[2:]
            other.writestr(entry.filename, content)
    try:
        put(target)
    except (CheckpointError, UsageError) as error:
        assert "\n" not in str(error) and str(tmp_path) in str(error)
    assert not marker.exists()


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.sampled_from(list(METHODS))
    | st.builds(torch.zeros, st.lists(st.integers(0, 3), max_size=3)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3) | st.integers(), inner, max_size=3),
    max_leaves=4,
)  # fmt: skip


@given(st.data())
def test_any_state_is_put_back_or_refused(state, tmp_path, data):
    altered = here = copy.deepcopy(state)
    for _ in range(data.draw(st.integers(0, 3))):
        keys = list(here) if isinstance(here, dict) else list(range(len(here)))
        key = data.draw(st.sampled_from(keys))
        if not isinstance(here[key], dict | list) or not here[key]:
            break
        here = here[key]
    here[data.draw(st.sampled_from(list(here) if isinstance(here, dict) else list(range(len(here)))))] = data.draw(
        VALUES
    )
    target, fresh = tmp_path / "checkpoint.pt", parts()
    save_checkpoint(target, altered)
    try:
        history, epoch, step = put_into(target, **fresh)
    except (CheckpointError, UsageError) as error:
        assert "\n" not in str(error) and str(tmp_path) in str(error)
    else:  # what was accepted can be trained with
        assert len(history["loss"]) == 2 * epoch + step
        step_of(**fresh)
