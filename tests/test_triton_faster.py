"""Where Triton was measured to be faster than the compiled kernels, the automatic choice takes it. The table is one of
these tests' own, and so are the cards."""

import json

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import m3em_fast
from m3em_fast import backends, triton
from m3em_fast.triton import _table

FASTER, SLOWER, ALIKE = ({"cuda": 20.0, "triton": time} for time in (12.5, 31.0, 19.8))
# 600 to 1024 channels and 33 to 64 positions, by op and dtype: forward, backward.
ROWS = {
    "consensus_map/float16": (FASTER, FASTER),
    "consensus_map/float32": (FASTER, SLOWER),
    "consensus_pool/float16": (FASTER, ALIKE),
    "consensus_pool/float32": (FASTER, FASTER),
    "channel_gate/float16": (FASTER, FASTER),
    "channel_gate/bfloat16": (FASTER, FASTER),
}


class Cards:
    """Every card has compiled kernels, but where a test takes them away."""

    without: str | None = None

    def unavailable(self):
        return None

    def place(self, tensor):
        return 0

    def refusal(self, op, index):
        return self.without


def forget(caches=(_table.stored, _table.faster)):
    for cache in caches:
        cache.cache_clear()


@pytest.fixture
def card(monkeypatch, tmp_path):
    """A V100 with the rows above, and an A100 with none."""
    timed = {}
    for row, (forward, backward) in ROWS.items():
        op, dtype = row.split("/")
        timed |= {f"{op}/{dtype}/1024x64": forward, f"{op}_backward/{dtype}/1024x64": backward}
    path = tmp_path / "table.json"
    path.write_text(json.dumps({"about": "x", "capabilities": {}, "calculated": {}, "microseconds": {"70": timed}}))
    monkeypatch.setattr(_table, "PATH", path)
    monkeypatch.setattr(triton, "version", lambda: "3.3.1")
    monkeypatch.setattr(triton, "interpreted", lambda: False)
    monkeypatch.setattr(triton, "without_driver", lambda: None)
    monkeypatch.setattr(triton, "capability", lambda index: (70, 80)[index])
    monkeypatch.setattr(triton, "start", lambda: None)
    monkeypatch.setattr(backends, "triton_devices", triton.Devices())
    monkeypatch.setattr(backends, "cards", Cards())
    forget()
    with m3em_fast.backend("auto"):
        yield backends.cards
    forget()


def maps(dtype=torch.float16, channels=1024, height=7, width=7, samples=2, index=0, requires_grad=False):
    """A tensor of a card that is not here."""
    with FakeTensorMode():
        return torch.empty(
            samples, channels, height, width, dtype=dtype, device=f"cuda:{index}", requires_grad=requires_grad
        )


def chosen(op, x):
    return backends.choose(op, backends.KERNELS[op], (x, x))[0]


def test_triton_serves_where_it_was_faster_in_both_directions(card):
    assert chosen("consensus_map", maps()) == "triton"
    assert chosen("consensus_map", maps(torch.float32)) == "cuda"  # its backward is slower
    assert chosen("consensus_pool", maps(torch.float32)) == "triton"
    assert chosen("consensus_pool", maps()) == "cuda"  # its backward is no faster but for noise
    assert chosen("channel_gate", maps()) == "triton"
    assert chosen("channel_gate", maps(torch.float32)) == "cuda"  # not measured


def test_ops_without_kernels_of_their_own_follow_those_whose_they_use(card):
    assert chosen("gated_projection", maps()) == "triton"
    assert chosen("gated_projection", maps(torch.float32)) == "cuda"
    assert chosen("gated_consensus_pool", maps(torch.float32)) == "triton"
    assert chosen("gated_consensus_pool", maps()) == "cuda"


def test_for_other_shapes_and_other_cards_nothing_was_measured(card):
    for channels, height, width in ((513, 7, 7), (1024, 8, 8), (1000, 3, 11)):
        assert chosen("consensus_map", maps(channels=channels, height=height, width=width)) == "triton"
    for channels, height, width in ((512, 7, 7), (1025, 7, 7), (1024, 4, 8), (1024, 5, 13), (1, 1, 1)):
        assert chosen("consensus_map", maps(channels=channels, height=height, width=width)) == "cuda"
    assert chosen("consensus_map", maps(index=1)) == "cuda"


def test_neither_the_number_of_samples_nor_a_gradient_has_a_say(card):
    """A clip would have other bits than in another batch, and in training other ones than in evaluation."""
    for samples in (0, 1, 10**6):
        assert chosen("consensus_map", maps(samples=samples)) == "triton"
    assert chosen("consensus_map", maps(requires_grad=True)) == "triton"


def test_a_choice_by_name_is_a_choice(card):
    for name in ("cuda", "triton", "reference"):
        with m3em_fast.backend(name):
            assert chosen("consensus_map", maps()) == chosen("consensus_map", maps(torch.float32)) == name


def test_what_triton_cannot_serve_goes_to_the_compiled_kernels(card, monkeypatch):
    assert chosen("channel_gate", maps(torch.bfloat16)) == "cuda"  # not on a V100, whatever the table says
    monkeypatch.setattr(triton, "version", lambda: None)
    monkeypatch.setattr(backends, "triton_devices", triton.Devices())
    assert chosen("consensus_map", maps()) == "cuda"


def test_without_compiled_kernels_nothing_changes(card, monkeypatch):
    card.without = "no kernels are packed"
    for dtype, served in ((torch.float16, "triton"), (torch.float32, "triton"), (torch.bfloat16, "reference")):
        assert chosen("consensus_map", maps(dtype)) == served


def test_the_table_of_this_package_is_not_read_for_a_cpu(card, monkeypatch):
    monkeypatch.setattr(_table, "stored", None)
    assert m3em_fast.ops.consensus_pool(torch.ones(1, 1024, 7, 7)).sum() == 1024


def test_a_call_costs_no_more_than_a_look_into_a_dictionary(card, monkeypatch):
    x = maps()
    assert chosen("consensus_map", x) == "triton" and chosen("channel_gate", maps(torch.float32)) == "cuda"
    monkeypatch.setattr(_table, "faster", None)
    monkeypatch.setattr(triton, "capability", None)
    assert chosen("consensus_map", x) == "triton" and chosen("channel_gate", maps(torch.float32)) == "cuda"


def test_explain_gives_both_times(card):
    said = m3em_fast.explain("consensus_map", maps(), maps()).splitlines()
    times = "measured on compute capability 7.0: forward cuda 20 us, triton 12.5 us; backward cuda 20 us, triton {} us"
    assert said[0] == "consensus_map is served by triton."
    assert said[2:] == [f"cuda: slower ({times.format(12.5)})", "reference: slower"]
    said = m3em_fast.explain("consensus_map", maps(torch.float32), maps(torch.float32)).splitlines()
    assert said[0] == "consensus_map is served by cuda."
    assert said[2] == f"triton: not faster in forward and backward alike ({times.format(31)})"
    for x in (maps(index=1), maps(torch.float64), maps(height=14)):
        said = m3em_fast.explain("consensus_map", x, x).splitlines()
        assert said[0] == "consensus_map is served by cuda." and "measured" not in "".join(said)
    with m3em_fast.backend("cuda"):
        assert "measured" not in m3em_fast.explain("consensus_map", maps(), maps())
    pooled = m3em_fast.explain("gated_consensus_pool", maps(torch.float32))
    assert pooled.startswith("gated_consensus_pool is served by triton.") and "forward cuda 20 us" in pooled


def test_the_choice_while_tracing(card):
    for first, served in ((True, "triton"), (False, "cuda")):
        found = backends._choose_at_trace_time("consensus_map", ("cuda", "triton"), None, "cuda", 0, (), first)
        assert found == (served, None)
        found = backends._choose_at_trace_time("consensus_map", ("cpu", "triton"), None, "cpu", None, (), first)
        assert found == ("cpu", None)


def test_a_compiled_program_asks_the_table_and_is_traced_anew_for_another_row(card):
    """With maps of any height: a trace holds for the heights of its row, and of samples it asks nothing."""
    torch.compiler.reset()
    traces = []

    def keep(graph, inputs):
        traces.append(graph)
        return graph.forward

    @torch.compile(backend=keep, fullgraph=True)
    def twice_where_triton_is_first(x):
        return x * 2 if backends._triton_first("consensus_map", x, 0) else x

    def first(samples, height):
        x = torch.ones(samples, 600, height, 7, dtype=torch.float16)
        torch._dynamo.mark_dynamic(x, 2)
        return bool((twice_where_triton_is_first(x) == 2).all())

    assert [first(2, height) for height in (7, 8, 9, 5)] == [True, True, True, True]
    assert len(traces) == 1
    assert [first(2, height) for height in (10, 4)] == [False, False]
    count = len(traces)
    assert [first(samples, 7) for samples in (3, 4, 9)] == [True, True, True]
    assert len(traces) <= count + 1  # torch makes the number of samples a symbol when it sees a second one
