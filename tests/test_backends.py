"""Which backend serves a call; and what holds for compiled kernels beyond the values that test_ops.py checks."""

import os
import subprocess
import sys
import threading

import pytest
import torch

import m3em_fast
from m3em_fast import backends, ops, reference
from m3em_fast.backends import BackendError
from m3em_fast.uda import ActionModel, total_loss
from op_cases import FULL_CALLS, check, random_grad, random_tensors

COMPILED = [name for name in backends.available() if name != "reference"]
FULL_CALL = pytest.mark.parametrize("call", FULL_CALLS, ids=str)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def with_gradients(call, tensors):
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    out = call(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, random_grad(out))]


def test_the_extension_is_there():
    """`make test` builds it; without it every test of a compiled backend would pass by not being there."""
    assert "cpu" in backends.available(), backends.refusal("cpu", "consensus_map", ())
    assert all("cpu" in kernels for kernels in backends.KERNELS.values())


@pytest.mark.parametrize("name", COMPILED)
@FULL_CALL
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_the_number_of_threads_changes_no_bit(name, call, dtype, threads):
    tensors = random_tensors(call, 11, 131, 7, 8, dtype)  # enough work for every thread to be given some
    results = []
    with m3em_fast.backend(name):
        for count in (1, 2, 3):
            threads(count)
            results.append(with_gradients(call, tensors))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("name", [*COMPILED, "triton"])
@FULL_CALL
def test_a_clip_does_not_depend_on_the_batch_in_one_bit(name, call):
    if (name, call.op) == ("triton", "gated_projection"):
        pytest.skip("torch's matrix product is inside, whose order of sums may depend on the batch")
    tensors = random_tensors(call, 6, 67, 7, 7, torch.float32)
    with m3em_fast.backend(name):
        whole = call(*tensors)
        for rows in (slice(2, 3), slice(1, 6)):
            clips = [t if n in ("weight", "bias") else t[rows] for n, t in zip(call.names, tensors, strict=True)]
            assert torch.equal(call(*clips), whole[rows])


@FULL_CALL
@pytest.mark.parametrize("isa", ["plain", "avx2", "avx512"])
def test_every_instruction_set(isa, call):
    before = backends.native.isa()
    if not backends.native.choose_isa(isa):
        pytest.skip(f"this machine cannot run {isa}")
    try:
        assert backends.native.isa() == isa
        with m3em_fast.backend("cpu"):
            for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
                for layout in ("contiguous", "channels_last", "sliced"):
                    layouts = [layout] * len(call.names)
                    check("cpu", call, random_tensors(call, 2, 19, 7, 7, dtype, layouts=layouts))
    finally:
        backends.native.choose_isa(before)


def test_an_unknown_instruction_set_changes_nothing():
    before = backends.native.isa()
    assert not backends.native.choose_isa("sse9")
    assert backends.native.isa() == before


@FULL_CALL
def test_third_derivatives(call):
    """The second derivative of the kernels comes from the reference, and stays a part of the graph."""
    tensors = random_tensors(call, 1, 2, 3, 3, torch.float64)
    found = {}
    for name in ("cpu", "reference"):
        with m3em_fast.backend(name):
            leaves = [tensor.detach().requires_grad_() for tensor in tensors]
            value = call(*leaves).pow(3).sum()
            for _ in range(3):
                grads = torch.autograd.grad(value, leaves, create_graph=True, allow_unused=True)
                value = sum(g.pow(2).sum() for g in grads if g is not None)
            found[name] = [g for g in grads if g is not None]
    assert any(g.abs().max() > 0 for g in found["reference"])
    for got, want in zip(found["cpu"], found["reference"], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-9)


def test_the_choice_of_the_forward_is_kept_for_the_backward(monkeypatch):
    a, b = (torch.randn(2, 3, 4, 4, requires_grad=True) for _ in range(2))
    with m3em_fast.backend("cpu"):
        out = ops.consensus_map(a, b)

    def never(*arguments):
        raise AssertionError("the backward asked for the backend again")

    monkeypatch.setattr(backends, "choose", never)
    done = threading.Thread(target=lambda: out.sum().backward())
    done.start()
    done.join()
    assert a.grad is not None


def test_blocks_nest_and_other_threads_have_their_own():
    seen = {}
    with m3em_fast.backend("reference"):
        with m3em_fast.backend("cpu"):
            assert backends.current() == "cpu"
            other = threading.Thread(target=lambda: seen.update(name=backends.current()))
            other.start()
            other.join()
        assert backends.current() == "reference"
    assert seen["name"] == backends.current() == os.environ.get("M3EM_BACKEND", "auto")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_threads_that_call_ops_at_once_disturb_nothing(dtype):
    """Two threads a backend, each with its own choice, all in every op at the same time."""
    inputs = {call: random_tensors(call, 6, 131, 7, 7, dtype) for call in FULL_CALLS}
    alone = {}
    for name in backends.available():
        with m3em_fast.backend(name):
            alone[name] = {call: with_gradients(call, tensors) for call, tensors in inputs.items()}
    threads, wrong, start = [], [], threading.Barrier(2 * len(alone))

    def work(name, wanted):
        start.wait()
        with m3em_fast.backend(name):
            for _ in range(10):
                for call, tensors in inputs.items():
                    found = with_gradients(call, tensors)
                    if name != "reference" and not all(map(torch.equal, found, wanted[call])):
                        wrong.append((name, call))
                assert backends.current() == name
        wrong.append("done")

    for name, wanted in alone.items():
        threads += [threading.Thread(target=work, args=(name, wanted)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == ["done"] * len(threads)


def test_an_unknown_backend_is_named():
    message = r"m3em_fast.backend: .*one of auto, cpu, cuda, triton, reference, got 'fpga'"
    with pytest.raises(ValueError, match=message), m3em_fast.backend("fpga"):
        pass


@pytest.mark.parametrize(("value", "expected"), [("reference", "reference"), ("", "auto"), ("fpga", "got 'fpga'")])
def test_the_environment_variable(value, expected):
    code = "from m3em_fast import backends\ntry: print(backends.current())\nexcept ValueError as e: print(e)"
    environment = {**os.environ, "M3EM_BACKEND": value}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert expected in done.stdout


def test_without_the_extension_the_reference_serves_and_a_choice_by_name_says_why(monkeypatch):
    monkeypatch.setattr(backends, "native", None)
    monkeypatch.setattr(backends, "_MISSING", "There is no C++ compiler.")
    x = torch.randn(2, 3, 4, 4)
    assert backends.available() == ("reference",)
    torch.testing.assert_close(ops.consensus_pool(x), x.mean((2, 3)))
    with m3em_fast.backend("cpu"), pytest.raises(BackendError, match=r"not there: There is no C\+\+ compiler"):
        ops.consensus_pool(x)


class Tagged(torch.Tensor):
    """A tensor subclass."""


def test_explain_says_what_serves_a_call_and_why_the_others_do_not():
    a = torch.randn(2, 3, 4, 4)
    assert m3em_fast.explain("consensus_map", a, a).splitlines() == [
        f"consensus_map is served by cpu ({backends.native.isa()}).",
        f"cuda: {backends.cards.unavailable() or 'it takes CUDA tensors, not tensors on cpu'}",
        "triton: it serves where it is chosen by name",
        "reference: slower",
    ]
    assert m3em_fast.explain("consensus_pool", a.to("meta")).startswith("consensus_pool is served by cpu")
    tagged = m3em_fast.explain("channel_gate", a.as_subclass(Tagged), [a[:, :, 0, 0]])
    assert tagged.splitlines() == [
        "channel_gate is served by reference.",
        "cpu: it takes plain tensors, not Tagged",
        f"cuda: {backends.cards.unavailable() or 'it takes plain tensors, not Tagged'}",
        "triton: it takes plain tensors, not Tagged",
    ]
    with m3em_fast.backend("reference"):
        assert "cpu: backend reference is chosen by name" in m3em_fast.explain("consensus_map", a, a)
    with m3em_fast.backend("cpu"):
        assert "is served by none" in m3em_fast.explain("consensus_map", a, a.as_subclass(Tagged))
    for op in ops.__all__:
        assert m3em_fast.explain(getattr(ops, op), a) == m3em_fast.explain(op, a)
    for op, said in (("conv2d", "'conv2d'"), (reference.consensus_map, "<function consensus_map")):
        with pytest.raises(ValueError, match=f"explain: op must be one of channel_gate.*got {said}"):
            m3em_fast.explain(op, a)


def test_the_working_memory_of_a_thread_is_what_the_docstring_says():
    """From one thread to two, of one sample each. Not ru_maxrss, which begins at the peak of the process around."""
    code = (
        "import torch; from m3em_fast import ops; a, b = torch.randn(2, 2, 8, 512, 512); peaks = []\n"
        "kept = torch.ones(2**26)\n"  # 256 MB, more than the import has held for a moment
        "for threads in 1, 2:\n"
        "    torch.set_num_threads(threads); ops.consensus_map(a, b)\n"
        "    peaks.append(1024 * int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0]))\n"
        "print((peaks[1] - peaks[0]) / 512**2)"
    )
    environment = {**os.environ, "M3EM_BACKEND": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert "331 bytes a\n    position, of which it touches 235" in ops.consensus_map.__doc__
    assert 0.97 * 235 < float(done.stdout) < 1.03 * 235


def test_a_negative_view_is_not_read_as_its_memory():
    x = torch.randn(2, 3, 4, 4, dtype=torch.complex64).conj().imag
    assert x.is_neg()
    torch.testing.assert_close(ops.consensus_pool(x), x.resolve_neg().mean((2, 3)))


def test_training_on_kernels_follows_training_on_the_reference():
    torch.manual_seed(0)
    features = {name: torch.rand(12, 5, 16, 7, 7).half() for name in ("RGB", "Flow")}
    features["Audio"] = torch.rand(12, 5, 16).half()
    labels = torch.arange(6) % 3, torch.arange(6) % 4
    losses = {}
    for name in ("cpu", "reference"):
        torch.manual_seed(1)
        sizes = {"latent_channels": 8, "reduction": 4, "fc_dim": 24, "relation_dim": 12, "init": "torch"}
        model = ActionModel({"RGB": 16, "Flow": 16}, {"Audio": 16}, 3, 4, **sizes)
        optimizer = torch.optim.SGD(model.parameters(), 0.03, momentum=0.9, nesterov=True)
        with m3em_fast.backend(name):
            losses[name] = []
            for _ in range(20):
                loss, _ = total_loss(model(features).streams, *labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses[name].append(loss.item())
    assert losses["cpu"][-1] < losses["cpu"][0]
    for got, want in zip(losses["cpu"], losses["reference"], strict=True):
        assert abs(got - want) <= 1e-4 * abs(want)


class Clips(torch.utils.data.Dataset):
    def __len__(self):
        return 2

    def __getitem__(self, index):
        a, b = torch.ones(8, 128, 7, 7), torch.ones(8, 128, 7, 7)
        return ops.consensus_map(a, b), backends.native.forked()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Python 3.12 warns of any fork beside threads
def test_a_forked_worker_runs_on_one_thread_and_does_not_hang(threads):
    threads(2)
    Clips()[0]  # starts the threads that a fork leaves behind
    assert not backends.native.forked()
    loader = torch.utils.data.DataLoader(Clips(), num_workers=1, timeout=60, multiprocessing_context="fork")
    for out, forked in loader:
        assert forked.item()
        torch.testing.assert_close(out[0], torch.full((8, 1, 7, 7), 3.0))
