"""The launcher (csrc/cuda/driver.cpp) where several threads use it, after a fork, and when the driver refuses."""

import ctypes
import os
import threading

import pytest
import torch

import m3em_fast
import simt_cases
from driver_cases import assert_right, inputs, made, names, result
from m3em_fast import ops
from m3em_fast.backends import native

# -------------------------------------------------------------------------------------------------- threads, forks


def test_threads_that_call_for_the_first_time_at_once_load_once(fresh):
    driver, _ = fresh
    driver.slow(2000)
    count, found, wrong = 8, [], []
    start = threading.Barrier(count)

    def work():
        try:
            start.wait()
            with m3em_fast.backend("simt"):
                found.append(result(*inputs()))
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=work) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == [] and len(found) == count
    calls = driver.log()
    for name, times in {
        "cuInit": 1,
        "cuDevicePrimaryCtxRetain": 1,
        "cuModuleLoadData": 1,
        "cuModuleGetFunction": 3,
    }.items():
        assert names(calls).count(name) == times, name
    assert len({call.thread for call in calls if call.name == "cuLaunchKernel"}) >= count
    assert all(map(torch.equal, found[0], each) for each in found[1:])


def test_a_driver_is_started_once_by_threads_too(fresh):
    """Below the lock of m3em_fast/cuda.py, which lets in one at a time."""
    driver, _ = fresh
    driver.slow(2000)
    start, found, library = threading.Barrier(4), [], native.Driver(str(driver.path))

    def work():
        start.wait()
        found.append(library.device_count())

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [2] * 4
    assert names(driver.log()).count("cuInit") == 1


def in_a_child(function):
    """What a function says in a forked child, of itself or by its exception."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            said = str(function())
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
        os.write(writing, said.encode()[:4000])
        os._exit(0)
    os.close(writing)
    with open(reading) as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    return said


FORKED = "CUDA cannot be used in this process: it was forked from one that had used CUDA already"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Python 3.12 warns of any fork beside threads
def test_a_forked_child_is_refused(fresh):
    driver, cards = fresh
    result(*inputs())
    driver.log()
    said = in_a_child(lambda: ops.consensus_map(*inputs()))
    assert said == f'DriverError: {FORKED} (start it with the multiprocessing method "spawn").'
    assert FORKED in in_a_child(lambda: cards.refusal("consensus_map", 1))  # nor is anything loaded
    assert_right(result(*inputs()), *inputs())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_child_may_be_the_first(fresh):
    _, cards = fresh
    assert cards.unavailable() is None
    assert in_a_child(lambda: tuple(ops.consensus_map(*inputs()).shape)) == "(2, 1, 4, 3)"
    result(*inputs())


# ---------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("call", "error", "said"),
    [
        (
            "cuLaunchKernel",
            1,
            "consensus_map_partial_f32_any on CUDA device 0: CUDA_ERROR_INVALID_VALUE (invalid argument).",
        ),
        ("cuLaunchKernel", 4242, "consensus_map_partial_f32_any on CUDA device 0: error 4242."),
        (
            "cuModuleGetFunction",
            500,
            "consensus_map_partial_f32_any on CUDA device 0: CUDA_ERROR_NOT_FOUND (named symbol not",
        ),
        ("cuCtxGetCurrent", 3, "CUDA device 0: CUDA_ERROR_NOT_INITIALIZED (initialization error)."),
    ],
)
def test_an_error_is_a_sentence(fresh, call, error, said):
    """The call, the kernel, the device, and the driver's own words."""
    driver, cards = fresh
    assert cards.refusal("consensus_map", 0) is None
    driver.fail(call, error)
    with pytest.raises(native.DriverError) as caught:
        result(*inputs())
    assert str(caught.value).startswith(f"{call} failed") and said in str(caught.value)
    assert_right(result(*inputs()), *inputs())  # and the next call is none the worse


def test_an_error_of_the_second_launch_is_its_own(fresh):
    driver, _ = fresh
    driver.fail("cuLaunchKernel", 700, after=1)
    with pytest.raises(native.DriverError, match="consensus_map_finish_f32_any"):
        result(*inputs())


def test_too_many_samples_for_a_grid(fresh):
    """There is no such memory. The sentence comes before any launch."""
    driver, cards = fresh
    cards.refusal("consensus_map", 0)
    module = cards.modules["consensus_map", 0]
    a = torch.ones(1, 1, 1, 1)
    for n, d, said in ((2**31, 1, r"counts at most 2\^31 - 1 samples"), (2**30, 512, "a grid of 4294967296 blocks")):
        with pytest.raises(native.DriverError, match=said):
            native.cuda_consensus_map_forward(module, 0, a, a, a, 0, 0, (n, d, 1, 1), 1, False, 1e-8)
    assert made(driver, "cuLaunchKernel") == []


def test_the_driver_of_these_tests_refuses_what_a_card_refuses(fresh):
    """Else a launcher without contexts, attributes or limits would pass."""
    driver, _ = fresh
    library = driver.library
    result(*inputs())
    handle, context, loaded, kernel = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_void_p()
    assert library.cuDeviceGet(ctypes.byref(handle), 0) == 0
    assert library.cuDevicePrimaryCtxRetain(ctypes.byref(context), handle) == 0
    assert library.cuModuleLoadData(ctypes.byref(loaded), simt_cases.image("sm_70")) == 201  # no context
    assert library.cuCtxPushCurrent_v2(context) == 0
    for arch in ("sm_75", "sm_80", "compute_75"):
        assert library.cuModuleLoadData(ctypes.byref(loaded), simt_cases.image(arch)) == 209
    assert library.cuModuleLoadData(ctypes.byref(loaded), b"neither") == 200
    assert library.cuModuleLoadData(ctypes.byref(loaded), simt_cases.image("compute_70")) == 0
    assert library.cuModuleGetFunction(ctypes.byref(kernel), loaded, b"consensus_map_finish_f32_8x8") == 500
    assert library.cuModuleGetFunction(ctypes.byref(kernel), loaded, b"consensus_map_finish_f32_any") == 0
    assert library.cuFuncSetAttribute(kernel, 8, (96 << 10) + 1) == 1

    def launch(blocks=1, threads=256, shared=0, stream=None, function=kernel):
        return library.cuLaunchKernel(function, blocks, 1, 1, threads, 1, 1, shared, stream, None, None)

    assert launch(blocks=0) == launch(threads=0) == launch(shared=(48 << 10) + 1) == launch() == 1
    assert library.cuLaunchKernel(kernel, 1, 1, 1, 257, 1, 1, 0, None, ctypes.byref(context), None) == 701
    assert launch(function=loaded) == launch(stream=ctypes.c_void_p(driver.stream(1))) == 400
    assert library.cuCtxPopCurrent_v2(ctypes.byref(context)) == 0
    assert launch() == 201
