"""The launcher (csrc/cuda/driver.cpp): contexts, streams, graph capture, threads, forks and errors, against a driver
library without a card (csrc/simt/driver.cpp). What it loads is in test_cuda_images.py."""

import ctypes
import threading

import pytest
import torch

import m3em_fast
import simt_cases
from driver_cases import WRONG, assert_right, check_large, inputs, large, made, names, result
from m3em_fast import backends, ops
from m3em_fast.backends import BackendError, native
from simt_cases import GLOBAL, RELAXED, ROOT, THREAD_LOCAL

SOURCE = ROOT / "csrc/cuda/driver.cpp"


# ------------------------------------------------------------------------------------------------------ starting


def test_to_look_for_a_driver_calls_nothing_in_it(fresh):
    driver, cards = fresh
    assert cards.unavailable() is None
    assert driver.log() == []


def test_the_driver_is_started_once(fresh):
    driver, cards = fresh
    for device in (0, 1, 0):
        cards.device = device
        assert_right(result(*inputs()), *inputs())
    assert names(driver.log()).count("cuInit") == 1


def test_a_library_that_is_no_driver(tmp_path):
    with pytest.raises(native.DriverError, match=r"^no CUDA driver library was found \(/nowhere/libcuda.so.1\)$"):
        native.Driver("/nowhere/libcuda.so.1")
    with pytest.raises(native.DriverError, match=r"has no cuInit, so it is older than CUDA 10.1"):
        native.Driver(native.__file__)
    (tmp_path / "text.so").write_text("no library\n")
    with pytest.raises(native.DriverError, match=r"^no CUDA driver library was found \(.*text.so: .*\)$"):
        native.Driver(str(tmp_path / "text.so"))


def test_a_device_that_is_not_there(fresh):
    _, cards = fresh
    cards.device = 7
    with pytest.raises(
        BackendError, match=r"simt cannot serve this call: there is no CUDA device 7; the driver has 2\."
    ):
        result(*inputs())


@pytest.mark.parametrize("call", ["cuInit", "cuDeviceGetCount", "cuDeviceGetAttribute", "cuDevicePrimaryCtxRetain"])
def test_a_start_that_fails_is_tried_again(fresh, call):
    driver, _ = fresh
    driver.fail(call, 2)
    with pytest.raises(BackendError, match=rf"{call} failed( on CUDA device 0)?: CUDA_ERROR_OUT_OF_MEMORY"):
        result(*inputs())
    assert_right(result(*inputs()), *inputs())


def test_no_card_behind_the_driver(tmp_path, monkeypatch):
    monkeypatch.setattr(backends, "simulated", None)
    simt_cases.opened(tmp_path, devices=0)
    with m3em_fast.backend("simt"):
        said = m3em_fast.explain("consensus_map", *inputs())
    assert "simt: cuInit failed: CUDA_ERROR_NO_DEVICE (no CUDA-capable device is detected)." in said


# ------------------------------------------------------------------------------------------------ what is launched


def test_launches_of_a_forward_and_a_backward(fresh):
    driver, _ = fresh
    for time in range(3):
        driver.log()
        a, b = inputs()
        out = ops.consensus_map(a.requires_grad_(), b)
        forward = driver.log()
        out.sum().backward()
        backward = driver.log()
        launches = [c.subject.split(" stream")[0] for c in forward + backward if c.name == "cuLaunchKernel"]
        assert launches == [
            "consensus_map_partial_f32_any blocks=2 threads=256 shared=3844",
            "consensus_map_finish_f32_any blocks=2 threads=256 shared=60",
            "consensus_map_backward_f32_any blocks=2 threads=256 shared=1020",
        ]
        # A module is loaded once and a kernel looked up once.
        assert names(forward).count("cuModuleLoadData") == (time == 0)
        assert names(forward + backward).count("cuModuleGetFunction") == (3 if time == 0 else 0)
        assert [call.error for call in forward + backward if call.error] == []


def test_no_samples_are_no_launch(fresh):
    driver, _ = fresh
    out, grad = result(*inputs(n=0))
    assert out.shape == (0, 1, 4, 3) and grad.shape == (0, 5, 4, 3)
    assert made(driver, "cuLaunchKernel") == []


def test_the_launcher_allocates_nothing():
    """The driver library of these tests has no such function either."""
    looked_up = [line for line in SOURCE.read_text().splitlines() if "M3EM_LOOK_UP(cu" in line]
    assert len(looked_up) == 15
    assert "cuMem" not in SOURCE.read_text()


def test_shared_memory_is_asked_for_once_a_kernel(fresh):
    driver, _ = fresh
    result(*inputs())
    assert made(driver, "cuFuncSetAttribute") == []  # as much as this is given unasked
    for _ in range(2):
        check_large()
    calls = driver.log()
    assert [call.subject for call in calls if call.name == "cuFuncSetAttribute"] == [f"8={96 << 10}"] * 2
    assert names(calls).count("cuLaunchKernel") == 6


def test_a_card_with_less_shared_memory_declines(tmp_path, monkeypatch):
    monkeypatch.setattr(backends, "simulated", None)
    simt_cases.opened(tmp_path, archs=("sm_75",), capability=75, shared=64 << 10)
    with m3em_fast.backend("simt"):
        result(*inputs())
        with pytest.raises(BackendError, match=r"needs \d+ bytes of shared memory a block, and there are 65536"):
            result(*large())


# ------------------------------------------------------------------------------------------- devices and contexts


def test_a_second_device(fresh):
    driver, cards = fresh
    assert_right(result(*inputs()), *inputs())
    driver.log()
    cards.device = 1
    assert_right(result(*inputs()), *inputs())
    calls = driver.log()
    assert names(calls).count("cuModuleLoadData") == 1  # modules are those of a device
    assert {call.device for call in calls if call.name in WRONG} == {"1"}
    assert [driver.retained(device) for device in (0, 1)] == [1, 1]


def test_several_images_share_the_context_of_a_device(fresh):
    """One for every op. It is retained once, for good."""
    driver, _ = fresh
    library = native.Driver(str(driver.path))
    for _ in range(3):
        native.Module(library, 1, simt_cases.image("sm_70"))
    assert [driver.retained(device) for device in (0, 1)] == [0, 1]


def test_a_thread_has_no_context_before_and_none_afterwards(fresh):
    driver, _ = fresh
    assert driver.library.cuInit(0) == 0
    seen = []

    def work():
        seen.append(driver.current())
        with m3em_fast.backend("simt"):
            seen.append(result(*inputs()))
        seen.append(driver.current())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen[0] is seen[2] is None
    assert_right(seen[1], *inputs())


@pytest.fixture
def contexts(fresh):
    """The primary contexts of both devices; that of the second is current, as after torch.cuda.set_device(1)."""
    driver, _ = fresh
    found = []
    for device in (0, 1):
        handle, context = ctypes.c_int(), ctypes.c_void_p()
        assert driver.library.cuInit(0) == driver.library.cuDeviceGet(ctypes.byref(handle), device) == 0
        assert driver.library.cuDevicePrimaryCtxRetain(ctypes.byref(context), handle) == 0
        found.append(context.value)
    assert driver.library.cuCtxPushCurrent_v2(ctypes.c_void_p(found[1])) == 0
    yield found
    assert driver.library.cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p())) == 0


def test_the_context_of_a_thread_is_restored(fresh, contexts):
    driver, _ = fresh
    assert_right(result(*inputs()), *inputs())
    assert driver.current() == contexts[1]
    assert {call.device for call in made(driver, "cuLaunchKernel")} == {"0"}


def test_a_context_that_is_current_is_left_alone(fresh, contexts):
    driver, cards = fresh
    driver.log()
    cards.device = 1
    result(*inputs())
    assert not {"cuCtxPushCurrent", "cuCtxPopCurrent"} & set(names(driver.log()))


@pytest.mark.parametrize("call", WRONG)
def test_the_context_is_restored_after_an_error(fresh, contexts, call):
    driver, _ = fresh
    driver.fail(call, WRONG[call])
    with pytest.raises((BackendError, native.DriverError), match=f"{call} failed"):
        result(*large())
    assert driver.current() == contexts[1]


# --------------------------------------------------------------------------------------------- streams and capture


def test_a_side_stream(fresh):
    driver, cards = fresh
    cards.current = driver.stream(0)
    assert_right(result(*inputs()), *inputs())
    on = [call.subject.split("stream=")[1] for call in made(driver, "cuLaunchKernel")]
    assert on == [str(cards.current)] * 3


def test_a_stream_of_another_device_is_an_error(fresh):
    driver, cards = fresh
    result(*inputs())
    cards.current = driver.stream(1)
    with pytest.raises(
        native.DriverError, match=r"cuLaunchKernel failed for consensus_map_partial_f32_any on CUDA dev"
    ):
        result(*inputs())


@pytest.mark.parametrize("mode", [GLOBAL, THREAD_LOCAL, RELAXED])
def test_the_first_call_may_be_captured(fresh, monkeypatch, mode):
    """Modules are loaded and attributes set while a stream is captured; the launches are done when it is replayed."""
    driver, cards = fresh
    result(*inputs())  # the driver has started, as under torch
    cards.device = 1  # and here nothing is loaded
    cards.current = driver.stream(1)
    a, b = large()
    kept, new_empty = [], torch.Tensor.new_empty
    # A captured workspace stays where it is, as in the memory pool of torch's graphs.
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: kept.append(new_empty(*a, **k)) or kept[-1])
    driver.capture(cards.current, mode)
    out = ops.consensus_map(a, b)
    assert driver.end_capture(cards.current) == 2
    out.fill_(7)
    assert driver.replay(cards.current) == 0
    with m3em_fast.backend("reference"):
        torch.testing.assert_close(out, ops.consensus_map(a, b))


def test_another_thread_may_capture_at_the_first_call(fresh):
    """A capture in the global mode forbids every thread to load, but one that is relaxed."""
    driver, cards = fresh
    stream, ready, done = [], threading.Event(), threading.Event()

    def capture():
        stream.append(driver.stream(0))
        driver.capture(stream[0])
        ready.set()
        done.wait()

    result(*inputs())
    cards.device = 1
    thread = threading.Thread(target=capture)
    thread.start()
    ready.wait()
    try:
        check_large()
    finally:
        done.set()
        thread.join()


def test_loading_while_a_stream_is_captured_is_what_a_card_refuses(fresh):
    """Without the exchange of modes the two tests above could not fail."""
    driver, _ = fresh
    result(*inputs())
    image, loaded = simt_cases.image("sm_70"), ctypes.c_void_p()
    context = ctypes.c_void_p()
    handle = ctypes.c_int()
    assert driver.library.cuDeviceGet(ctypes.byref(handle), 0) == 0
    assert driver.library.cuDevicePrimaryCtxRetain(ctypes.byref(context), handle) == 0
    assert driver.library.cuCtxPushCurrent_v2(context) == 0
    driver.capture(driver.stream(0))
    assert driver.library.cuDevicePrimaryCtxRetain(ctypes.byref(context), handle) == 900
    assert driver.library.cuModuleLoadData(ctypes.byref(loaded), image) == 900
    assert driver.exchange_mode(RELAXED) == GLOBAL
    assert driver.library.cuModuleLoadData(ctypes.byref(loaded), image) == 0
    assert driver.exchange_mode(GLOBAL) == RELAXED
    assert driver.library.cuCtxPopCurrent_v2(ctypes.byref(context)) == 0


@pytest.mark.parametrize("mode", [GLOBAL, THREAD_LOCAL, RELAXED])
@pytest.mark.parametrize("call", [None, *WRONG])
def test_the_capture_mode_of_a_thread_is_restored(fresh, mode, call):
    driver, _ = fresh
    assert driver.library.cuInit(0) == 0
    driver.exchange_mode(mode)
    try:
        if call is None:
            result(*large())
        else:
            driver.fail(call, WRONG[call])
            with pytest.raises((BackendError, native.DriverError), match=f"{call} failed"):
                result(*large())
        loading = [c.mode for c in driver.log() if c.name in WRONG and c.name != "cuLaunchKernel"]
        assert set(loading) == {RELAXED}
    finally:
        assert driver.exchange_mode(GLOBAL) == mode
