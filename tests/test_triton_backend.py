"""When the backend `triton` serves a call, and the sentence with which it declines one. What Triton and the driver
would say is said by functions in their place; values are in test_ops.py, on the interpreter."""

import os
import subprocess
import sys
import threading

import pytest
import torch

import m3em_fast
from m3em_fast import backends, env, ops, triton
from m3em_fast.backends import BackendError
from op_cases import FULL_CALLS, Call, check, random_tensors

X = torch.ones(2, 3, 4, 4)
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@pytest.fixture
def machine(monkeypatch):
    """Sets what Triton and the driver say, and forgets what they have said before."""

    def say(version="3.3.1", interpreted=False, driver=None, capability=80, start=lambda: None):
        monkeypatch.setattr(triton, "version", version if callable(version) else lambda: version)
        monkeypatch.setattr(triton, "interpreted", lambda: interpreted)
        monkeypatch.setattr(triton, "without_driver", lambda: driver)
        monkeypatch.setattr(triton, "capability", capability if callable(capability) else lambda index: capability)
        monkeypatch.setattr(triton, "start", start)
        monkeypatch.setattr(backends, "triton_devices", triton.Devices())
        return backends.triton_devices

    return say


@pytest.fixture
def on_cuda(monkeypatch):
    """CPU tensors that say they are on a card, as far as the choice of the backend asks."""

    class Claims:
        requires_grad, is_cpu, is_cuda = False, False, True

        def __init__(self, dtype):
            self.dtype, self.device = dtype, torch.device("cuda", 0)

        def is_neg(self):
            return False

        def get_device(self):
            return 0

    monkeypatch.setattr(backends, "Tensor", Claims)
    return Claims


def chosen(op, *tensors):
    return backends.choose(op, backends.KERNELS[op], tensors)[0]


# ------------------------------------------------------------------------------------------------- why not


def test_without_triton(machine):
    machine(version=None)
    reason = "Triton is not installed (the extra m3em_fast[triton] brings it)"
    assert backends.refusal("triton", "consensus_pool", [X]) == reason
    with m3em_fast.backend("triton"), pytest.raises(BackendError) as error:
        ops.consensus_pool(X)
    assert str(error.value) == f"consensus_pool: backend triton cannot serve this call: {reason}"
    assert f"triton: {reason}" in m3em_fast.explain("consensus_pool", X).splitlines()
    assert env.report()["backends"]["triton"] == reason


def test_without_triton_the_interpreter_does_not_help(machine):
    machine(version=None, interpreted=True)
    with m3em_fast.backend("triton"), pytest.raises(BackendError, match="Triton is not installed"):
        ops.consensus_pool(X)


@pytest.mark.parametrize(("version", "old"), [("3.2.0", True), ("2.3", True), ("3.3.0", False), ("3.10.0+git1", False)])
def test_an_old_triton(machine, version, old):
    machine(version=version)
    wanted = f"Triton {version} is older than 3.3, the oldest that is served" if old else None
    assert backends.triton_devices.unavailable() == wanted


@pytest.mark.parametrize("missing", ["there is no CUDA device", "this PyTorch is built without CUDA"])
def test_without_a_driver(machine, missing):
    machine(driver=missing)
    reason = f"Triton 3.3.1 has no active driver: {missing}"
    assert backends.refusal("triton", "consensus_map", [X, X]) == reason
    assert backends.available("cuda")[-1] == "reference" and "triton" not in backends.available("cuda")
    with m3em_fast.backend("triton"), pytest.raises(BackendError, match=reason):
        ops.consensus_map(X, X)


def test_what_is_installed_is_asked_once(machine):
    asked = []
    devices = machine(version=lambda: asked.append(1))
    assert [devices.unavailable() for _ in range(3)] == [devices.unavailable()] * 3 and len(asked) == 1


def test_a_triton_that_cannot_be_imported(machine):
    def broken():
        raise OSError("libLLVM.so: undefined symbol: x\nmore of it")

    machine(version=broken)
    reason = "Triton cannot be imported (OSError: libLLVM.so: undefined symbol: x)"
    assert backends.triton_devices.unavailable() == reason


def test_a_driver_that_cannot_be_started(machine):
    """For its launcher Triton needs a C compiler. What has been found out is not asked again."""
    started = []

    def start():
        started.append(1)
        raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.")

    devices = machine(start=start)
    for _ in range(2):
        assert devices.refusal(0, [torch.float32]) == (
            "Triton's driver cannot be started (Failed to find C compiler. Please specify via CC environment variable)"
        )
    assert len(started) == 1


def test_cpu_tensors_are_for_the_interpreter(machine):
    machine()
    reason = "it takes CUDA tensors (CPU tensors under TRITON_INTERPRET=1 alone), not tensors on cpu"
    for op, tensors in (("consensus_pool", (X,)), ("gated_consensus_pool", (X, X[:, :, 0, 0]))):
        assert backends.refusal("triton", op, tensors) == reason
    with m3em_fast.backend("triton"), pytest.raises(BackendError) as error:
        ops.consensus_pool(X)
    assert str(error.value).endswith(reason)


def test_cuda_tensors_are_not_for_the_interpreter(machine):
    machine(interpreted=True)
    reason = "it takes CPU tensors under TRITON_INTERPRET=1, not tensors on cuda:1"
    assert backends.misplaced("triton", "consensus_pool", "cuda", 1, [torch.float32]) == reason


# ------------------------------------------------------------------------------------- what cards can be served


@pytest.mark.parametrize("capability", [80, 86, 90, 120])
def test_a_card_of_today_is_served_in_every_dtype(machine, capability):
    devices = machine(capability=capability)
    assert all(devices.refusal(0, [dtype]) is None for dtype in DTYPES)
    assert devices.capability(0) == capability


@pytest.mark.parametrize(("capability", "name"), [(70, "7.0"), (75, "7.5")])
def test_a_v100_is_served_in_float32_and_float16(machine, capability, name):
    devices = machine(capability=capability)
    for served in ([torch.float32], [torch.float16], [torch.float16, torch.float32]):
        assert devices.refusal(0, served) is None
    for other in ("bfloat16", "float64"):
        reason = f"on compute capability {name} it serves float32 and float16, not {other}"
        assert devices.refusal(0, [torch.float32, getattr(torch, other)]) == reason


def test_a_card_before_the_v100(machine):
    devices = machine(capability=61)
    assert devices.refusal(0, [torch.float32]) == "compute capability 6.1 is older than 7.0, the oldest that is served"


def test_each_card_by_itself(machine):
    devices = machine(capability=lambda index: (90, 70, 61)[index])
    assert devices.refusal(0, [torch.bfloat16]) is None
    assert "7.0 it serves" in devices.refusal(1, [torch.bfloat16])
    assert "6.1 is older" in devices.refusal(2, [torch.bfloat16])


# ------------------------------------------------------------------------------------------ the automatic choice


@pytest.fixture
def no_kernels(monkeypatch):
    """Cards for which there are no compiled kernels."""

    class Cards:
        def unavailable(self):
            return None

        def place(self, tensor):
            return 0

        def refusal(self, op, index):
            return "no kernels are packed"

    monkeypatch.setattr(backends, "cards", Cards())


@pytest.mark.parametrize("op", sorted(backends.KERNELS))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_auto_falls_from_cuda_to_triton_to_the_reference(machine, no_kernels, on_cuda, monkeypatch, op, dtype):
    with m3em_fast.backend("auto"):
        machine(capability=90)
        assert chosen(op, on_cuda(dtype)) == "triton"
        machine(capability=70)
        assert chosen(op, on_cuda(dtype)) == ("triton" if dtype in (torch.float32, torch.float16) else "reference")
        for nothing in ({"version": None}, {"version": "3.2.0"}, {"driver": "there is no CUDA device"}):
            machine(**nothing)
            assert chosen(op, on_cuda(dtype)) == "reference"
        machine(interpreted=True)
        assert chosen(op, on_cuda(dtype)) == "reference"
        machine(capability=90)
        monkeypatch.setattr(backends, "native", None)
        assert chosen(op, on_cuda(dtype)) == "triton"


def test_auto_takes_compiled_kernels_first(machine, no_kernels, on_cuda, monkeypatch):
    machine(capability=90)
    monkeypatch.setattr(type(backends.cards), "refusal", lambda *_: None)
    with m3em_fast.backend("auto"):
        assert chosen("consensus_pool", on_cuda(torch.float32)) == "cuda"
    with m3em_fast.backend("triton"):
        assert chosen("consensus_pool", on_cuda(torch.float32)) == "triton"


def test_a_choice_by_name_raises_where_auto_falls_through(machine, on_cuda):
    machine(capability=70)
    reason = "on compute capability 7.0 it serves float32 and float16, not bfloat16"
    with m3em_fast.backend("triton"), pytest.raises(BackendError, match=reason):
        chosen("consensus_map", on_cuda(torch.bfloat16))


def test_auto_never_takes_the_interpreter(monkeypatch):
    assert backends.refusal("triton", "consensus_pool", [X]) is None  # it could
    assert "triton" not in backends.available("cpu") and "triton" not in backends.available("cuda")
    with m3em_fast.backend("auto"):
        assert chosen("consensus_pool", X) == "cpu"
        assert "triton: it serves where it is chosen by name" in m3em_fast.explain("consensus_pool", X).splitlines()
        monkeypatch.setattr(backends, "native", None)
        assert chosen("consensus_pool", X) == "reference"
        assert m3em_fast.explain("consensus_pool", X).startswith("consensus_pool is served by reference.")


def test_auto_on_cpu_tensors_never_asks_for_triton(machine, monkeypatch):
    """No call of an ordinary program may pay for looking."""

    def never():
        raise AssertionError("asked for Triton")

    machine(version=never)
    monkeypatch.setattr(triton, "interpreted", never)
    with m3em_fast.backend("auto"):
        for call in FULL_CALLS:
            call(*random_tensors(call, 2, 3, 4, 4, torch.float32))


@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_available_on_a_card(machine, no_kernels, monkeypatch, name):
    machine()
    if name == "triton":
        monkeypatch.setattr(type(backends.cards), "unavailable", lambda _: "no driver")
        assert backends.available("cuda") == ("triton", "reference")
    else:
        assert backends.available("cuda") == ("cuda", "triton", "reference")
    assert backends.available("cpu") == ("cpu", "reference")


# ----------------------------------------------------------------------------------- blocks, threads, the environment


def test_blocks_nest_in_every_thread_by_itself():
    """Two threads on the interpreter, which runs one program at a time, beside one on the kernels of the CPU."""
    call = Call("consensus_pool", cmap=True)
    tensors = random_tensors(call, 3, 5, 4, 4, torch.float32)
    seen, start = [], threading.Barrier(3)

    def work(name):
        start.wait()
        with m3em_fast.backend("reference"), m3em_fast.backend(name):
            for _ in range(5):
                check(name, call, tensors)
            seen.append(backends.current())

    threads = [threading.Thread(target=work, args=(name,)) for name in ("triton", "cpu", "triton")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(seen) == ["cpu", "triton", "triton"]


def run(code, **variables):
    environment = {
        name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "M3EM_BACKEND")
    }
    done = subprocess.run(
        [sys.executable, "-c", code], env={**environment, **variables}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


CALL = """
import sys, torch
from m3em_fast import backends, ops
assert not any(name.partition(".")[0] == "triton" for name in sys.modules)
try: print(ops.consensus_pool(torch.full((1, 2, 2, 2), 3.0)).tolist(), backends.current(), end=" ")
except backends.BackendError as error: print(error, end=" ")
print("triton" in sys.modules)
"""


def test_the_environment_variable():
    assert run(CALL) == "[[3.0, 3.0]] auto False"
    assert run(CALL, M3EM_BACKEND="triton", TRITON_INTERPRET="1") == "[[3.0, 3.0]] triton True"
    said = run(CALL, M3EM_BACKEND="triton")
    assert said.startswith("consensus_pool: backend triton cannot serve this call: ")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a card")
def test_without_a_card_nothing_is_imported_to_say_so():
    reasons = "this PyTorch is built without CUDA", "there is no CUDA device"
    said = run(CALL, M3EM_BACKEND="triton")
    assert said.endswith(tuple(f" has no active driver: {reason} False" for reason in reasons))


HIDDEN = """
import sys
class Nothing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton": raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Nothing())
"""


def test_an_import_without_triton():
    code = HIDDEN + CALL + 'print(backends.refusal("triton", "consensus_pool", ()))'
    assert "Triton is not installed" in run(code)
    assert "Triton is not installed" in run(HIDDEN + CALL, M3EM_BACKEND="triton", TRITON_INTERPRET="1")


# ------------------------------------------------------------------------------------------------ torch.compile


def test_under_torch_compile_the_choice_is_that_of_the_trace():
    torch.compiler.reset()
    seen = []

    def keep(graph, inputs):
        seen.extend(node.args[-1] for node in graph.graph.nodes if "m3em_fast" in str(node.target))
        return graph.forward

    compiled = torch.compile(lambda x: ops.consensus_pool(x), backend=keep, fullgraph=True)
    with m3em_fast.backend("triton"):
        compiled(X)
    compiled(X)
    assert seen == ["triton"]


def test_under_torch_compile_a_reason_is_a_sentence(machine):
    torch.compiler.reset()
    machine(version="3.1.0")
    compiled = torch.compile(lambda x: ops.consensus_pool(x), backend="eager", fullgraph=True)
    reason = "backend triton cannot serve this call: Triton 3.1.0 is older than 3.3"
    with m3em_fast.backend("triton"), pytest.raises(Exception, match=reason):
        compiled(X)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_choice_while_tracing_knows_the_dtype(machine, no_kernels, dtype):
    machine(capability=70)
    with m3em_fast.backend("auto"):
        found = backends._choose_at_trace_time("consensus_map", ("cuda", "triton"), None, "cuda", 0, (dtype, dtype))
    assert found == ("triton" if dtype in (torch.float32, torch.float16) else "reference", None)
