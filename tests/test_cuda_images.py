"""What m3em_fast/cuda.py loads on a card, what it compiles when nothing fits, why it declines, and what backends.py
makes of it: against a driver library without a card, which takes an image for the architectures that a card takes."""

import json
import re
import threading
import zipfile
from contextlib import ExitStack, contextmanager

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import m3em_fast
import simt_cases
from m3em_fast import backends, cuda, env, nvrtc, ops
from m3em_fast.backends import BackendError, native
from op_cases import Call, check, random_tensors
from simt_cases import ROOT

PACKED = ("sm_70", "sm_75", "sm_80", "sm_90", "sm_100", "sm_120", "compute_80", "compute_120")
CALL = Call("consensus_map")


def tensors(shape=(2, 5, 4, 3)):
    return random_tensors(CALL, *shape, torch.float32)


def loaded(driver):
    """The architectures of the images that were given to the driver, and what it said."""
    return [(call.subject, call.error) for call in driver.log() if call.name == "cuModuleLoadData"]


class Compiler:
    """In the place of NVRTC."""

    name, identity = "12.9", "none"

    def __init__(self, able=(70, 80, 86, 90), gives=None, fails=None):
        self.able, self.gives, self.fails, self.asked = able, gives, fails, []

    def architectures(self):
        return list(self.able)

    def compile(self, source, name, arch, headers):
        self.asked.append((source, name, arch, headers))
        if self.fails:
            raise nvrtc.Failed(self.fails)
        return nvrtc.Compiled(simt_cases.image(self.gives or arch), "")


@pytest.fixture
def compiler(monkeypatch, tmp_path):
    def use(*arguments, **options):
        found = Compiler(*arguments, **options)
        monkeypatch.setattr(nvrtc, "find", lambda: found)
        return found

    monkeypatch.setenv("M3EM_CACHE", str(tmp_path / "cache"))
    return use


SOURCES = {
    "source/cuda/consensus_map.cu": '#include "cuda/one.cuh"\n',
    "source/cuda/one.cuh": "one",
    "source/cuda/other.cu": "other",
    "source/cuda/two.cuh": "two",
}


@pytest.fixture
def card(monkeypatch, tmp_path):
    """A card of some compute capability with such an archive, behind the backend `simt`."""
    monkeypatch.setattr(backends, "simulated", None)

    @contextmanager
    def make(capability, archs=PACKED, name="images", wrong=None, **other):
        folder = tmp_path / f"{name}-{capability}"
        folder.mkdir()
        driver, cards = simt_cases.opened(folder, capability=capability)
        simt_cases.archive(cards.archive, archs, **({**SOURCES, **other}))
        if wrong:  # an image that says that it is for another card
            with zipfile.ZipFile(cards.archive, "a") as packed:
                packed.writestr(wrong[0], simt_cases.image(wrong[1]))
        with m3em_fast.backend("simt"):
            yield driver, cards

    with ExitStack() as stack:
        yield lambda *arguments, **options: stack.enter_context(make(*arguments, **options))


# ------------------------------------------------------------------------------------------------ which image


@pytest.mark.parametrize(
    ("capability", "expected"),
    [
        (70, "sm_70"), (72, "sm_70"), (75, "sm_75"), (80, "sm_80"), (86, "sm_80"), (89, "sm_80"), (90, "sm_90"),
        (100, "sm_100"), (103, "sm_100"), (110, "compute_80"), (120, "sm_120"), (121, "sm_120"), (130, "compute_120"),
    ],
)  # fmt: skip
def test_every_card_runs_what_is_packed_for_it(card, compiler, capability, expected):
    """The driver takes it, and nothing is compiled."""
    compiling = compiler()
    driver, _ = card(capability)
    check("simt", CALL, tensors())
    assert loaded(driver) == [(expected, 0)]
    assert compiling.asked == []


def test_images_of_another_op_are_no_images():
    names = ["sm_70/other.cubin", "sm_70/consensus_map_2.cubin", "sm_70/my_consensus_map.cubin", "index.json"]
    assert cuda.image_for(names, "consensus_map", 70) is None
    assert cuda.image_for(["sm_75/a.cubin", "compute_75/a.ptx"], "a", 70) is None


def test_what_the_build_has_packed():
    """Of the tree itself, as far as the build had a compiler: every op that has kernels for cards, for every card."""
    with zipfile.ZipFile(cuda.ARCHIVE) as packed:
        names = packed.namelist()
        missing = json.loads(packed.read("index.json"))["missing"]
    on_cards = {cuda.IMAGES.get(op, op) for op, kernels in backends.KERNELS.items() if "cuda" in kernels}
    assert {f"source/cuda/{op}.cu" for op in on_cards} <= set(names)
    for op in on_cards:
        for capability in (70, 75, 80, 86, 90, 100, 120):
            assert missing or cuda.image_for(names, op, capability)


# ------------------------------------------------------------------------------------- compilation at run time


def test_a_rejected_image_is_compiled_again_and_kept_on_disk(card, compiler):
    compiling = compiler()
    driver, cards = card(70, (), wrong=("sm_70/consensus_map.cubin", "sm_80"))
    check("simt", CALL, tensors())
    assert loaded(driver) == [("sm_80", 209), ("sm_70", 0)]
    source, name, arch, headers = compiling.asked[0]
    assert (source, name, arch) == (SOURCES["source/cuda/consensus_map.cu"], "consensus_map.cu", "sm_70")
    assert headers == {"cuda/one.cuh": "one"}
    cards.device = 1
    check("simt", CALL, tensors())
    again, _ = card(70, (), name="another process", wrong=("sm_70/consensus_map.cubin", "sm_80"))
    check("simt", CALL, tensors())
    assert loaded(again) == [("sm_80", 209), ("sm_70", 0)]
    assert len(compiling.asked) == 1


@pytest.mark.parametrize(
    ("capability", "able", "arch"),
    [
        (70, (70, 80), "sm_70"),
        (86, (80, 86, 90), "sm_86"),
        (87, (80, 86, 90), "compute_86"),
        (130, (90, 120), "compute_120"),
    ],
)
def test_for_a_card_without_images_they_are_made(card, compiler, capability, able, arch):
    """PTX where the compiler does not know the card yet."""
    compiling = compiler(able)
    driver, _ = card(capability, ())
    check("simt", CALL, tensors())
    assert [asked[2] for asked in compiling.asked] == [arch]
    assert loaded(driver) == [(arch, 0)]


def test_the_sources_that_are_packed_compile_here(card, monkeypatch, tmp_path):
    """With the compiler of the build: the real sources, to a cubin that the driver of a V100 takes."""
    try:
        nvrtc.find()
    except nvrtc.Missing as error:
        pytest.skip(str(error))
    monkeypatch.setenv("M3EM_CACHE", str(tmp_path / "cache"))
    files = [path for path in (ROOT / "csrc/cuda").iterdir() if path.suffix in (".cu", ".cuh")]
    driver, _ = card(70, (), **{f"source/cuda/{path.name}": path.read_text() for path in files})
    check("simt", CALL, tensors())
    assert loaded(driver) == [("sm_70", 0)]
    assert len(list((tmp_path / "cache").iterdir())) == 1


# ------------------------------------------------------------------------------------------------ why it declines


def declines(reason):
    with pytest.raises(BackendError, match=rf"^consensus_map: backend simt cannot serve this call: {reason}$"):
        ops.consensus_map(*tensors())


SAID = r"consensus_map.cu does not compile for sm_70 \(NVRTC 12.9: ERROR\)"
REJECTED = r"the driver rejects sm_70/consensus_map.cubin \(cuModuleLoadData failed on CUDA device 0: "
REJECTED += r"CUDA_ERROR_NO_BINARY_FOR_GPU \(no kernel image is available for execution on the device\)\)"


def test_no_image_and_no_compiler(card, monkeypatch):
    tried = []

    def find():
        tried.append(1)
        raise nvrtc.Missing("There is no NVRTC (pip install it).")

    monkeypatch.setattr(nvrtc, "find", find)
    card(86, ("sm_70", "sm_90"), missing={"sm_86": "M3EM_CUDA_ARCHS was 70 in the build."})
    reason = (
        r"no kernels of consensus_map for compute capability 8\.6 are packed \(M3EM_CUDA_ARCHS was 70 in the build\)"
    )
    for _ in range(3):
        declines(rf"{reason}, and compiling them here failed: There is no NVRTC \(pip install it\)")
    assert len(tried) == 1  # what has failed for good is not tried again


def test_a_rejected_image_and_sources_that_do_not_compile(card, compiler):
    """The first line of the compiler's message says enough."""
    compiling = compiler(fails="consensus_map.cu does not compile for sm_70 (NVRTC 12.9: ERROR):\nline 1: error")
    card(70, (), wrong=("sm_70/consensus_map.cubin", "sm_80"))
    for _ in range(2):
        declines(rf"{REJECTED}, and compiling them here failed: {SAID}")
    assert len(compiling.asked) == 1


def test_what_was_compiled_is_rejected_too(card, compiler):
    compiler(gives="sm_90")
    card(70, (), wrong=("sm_70/consensus_map.cubin", "sm_80"))
    declines(rf"{REJECTED}, and compiling them here failed: cuModuleLoadData failed .*NO_BINARY_FOR_GPU.*")


def test_a_compiler_that_has_left_the_card_behind(card, compiler):
    compiler((75, 80))
    card(70, ())
    declines(r"no kernels .* for compute capability 7\.0 are packed, .*NVRTC 12\.9 cannot make .* capability 7\.0")


def test_a_source_that_is_gone(card, compiler):
    compiler()
    _, cards = card(70, ())
    simt_cases.archive(cards.archive, ())
    declines(r"no kernels .* NVRTC 12\.9 cannot make consensus_map, whose source is gone")


@pytest.mark.parametrize("damage", ["missing", "text", "cut"])
def test_an_archive_that_cannot_be_read(card, compiler, damage):
    compiler()
    _, cards = card(70)
    if damage == "missing":
        cards.archive.unlink()
    else:
        whole = cards.archive.read_bytes()
        cards.archive.write_bytes(b"no archive" if damage == "text" else whole[: len(whole) // 2])
    declines(r"the compiled kernels cannot be read from images\.zip \(.+\)")


def test_a_card_older_than_any_kernel(card, compiler):
    compiler((60, 70))
    card(60)
    declines(r"compute capability 6\.0 is older than 7\.0, the oldest that is served")


def test_what_may_pass_is_tried_again(card):
    driver, _ = card(70)
    driver.fail("cuModuleLoadData", 2)
    declines(r"cuModuleLoadData failed on CUDA device 0: CUDA_ERROR_OUT_OF_MEMORY \(out of memory\)\.")
    check("simt", CALL, tensors())


def test_one_device_may_decline_and_another_not(card, compiler):
    compiler(fails="no")
    driver, cards = card(70)
    driver.fail("cuModuleLoadData", 209)
    declines(".*NO_BINARY_FOR_GPU.*")
    cards.device = 1
    check("simt", CALL, tensors())


# ------------------------------------------------------------------------------------------------- backends.py


@pytest.fixture
def without_driver(monkeypatch):
    monkeypatch.setattr(backends, "cards", cuda.Cards(native, "/nowhere/libcuda.so.1"))
    return "no CUDA driver library was found (/nowhere/libcuda.so.1)"


def test_without_a_driver_everything_works_and_says_why(without_driver):
    a, b = tensors()
    assert f"cuda: {without_driver}" in m3em_fast.explain("consensus_map", a, b).splitlines()
    assert f"cuda: {without_driver}" in m3em_fast.explain("channel_gate", a, [a[:, :, 0, 0]])
    assert env.report()["backends"]["cuda"] == without_driver
    assert backends.available("cuda") == ("reference",) and "cuda" not in backends.available()
    with m3em_fast.backend("cuda"), pytest.raises(BackendError, match=re.escape(without_driver)):
        ops.consensus_map(a, b)
    with pytest.raises(BackendError, match=re.escape(without_driver)):
        torch.ops.m3em_fast._consensus_map(a, b, 2, False, 1e-8, "float32", "cuda")


def test_the_simulated_backend_is_for_tests_alone(monkeypatch):
    monkeypatch.setattr(backends, "simulated", None)
    with (
        pytest.raises(ValueError, match=r"one of auto, cpu, cuda, triton, reference, got 'simt'"),
        m3em_fast.backend("simt"),
    ):
        pass
    with pytest.raises(BackendError, match="no simulated driver is open"):
        torch.ops.m3em_fast._consensus_map(*tensors(), 2, False, 1e-8, "float32", "simt")
    simt_cases.simulated()
    with m3em_fast.backend("auto"):
        assert backends.choose("consensus_map", backends.KERNELS["consensus_map"], tuple(tensors()))[0] == "cpu"
        assert "simt" not in m3em_fast.explain("consensus_map", *tensors())
    assert "simt" not in (*backends.available(), *backends.available("cuda"), *env.report()["backends"])


def test_simt_takes_cpu_tensors(card):
    card(70)
    assert m3em_fast.explain("consensus_map", *tensors()).startswith("consensus_map is served by simt.")
    with FakeTensorMode():
        fakes = [torch.empty(2, 3, 4, 4, device="cuda") for _ in range(2)]
    with pytest.raises(BackendError, match="it takes CPU tensors, not tensors on cuda:0"):
        ops.consensus_map(*fakes)


@pytest.fixture
def with_driver(card, monkeypatch):
    """Cards behind the backend `cuda`: there are no tensors on them, but tensors without memory."""
    driver, cards = card(70)
    monkeypatch.setattr(backends, "cards", cards)
    with m3em_fast.backend("auto"):
        yield driver


def fakes():
    with FakeTensorMode() as mode:
        return mode, [torch.empty(2, 3, 4, 4, device="cuda:0") for _ in range(2)]


def test_a_fake_tensor_of_a_card_is_traced_for_the_card(with_driver):
    mode, inputs = fakes()
    assert m3em_fast.explain("consensus_map", *inputs).splitlines() == [
        "consensus_map is served by cuda.",
        "cpu: it takes CPU tensors, not tensors on cuda:0",
        "triton: it takes CPU tensors under TRITON_INTERPRET=1, not tensors on cuda:0",
        "reference: slower",
    ]
    assert backends.choose("consensus_map", backends.KERNELS["consensus_map"], tuple(inputs)) == ("cuda", True)
    with mode:
        out = ops.consensus_map(*inputs)
    assert (out.device, out.shape) == (torch.device("cuda:0"), (2, 1, 4, 4))
    assert [call for call in with_driver.log() if call.name == "cuLaunchKernel"] == []


def test_without_a_card_its_fake_tensors_are_the_references(without_driver):
    mode, inputs = fakes()
    assert backends.choose("consensus_map", backends.KERNELS["consensus_map"], tuple(inputs)) == ("reference", False)
    with mode:
        assert ops.consensus_map(*inputs).device == torch.device("cuda:0")


def test_a_meta_tensor_takes_a_backend_that_is_usable_here(with_driver, without_driver, monkeypatch):
    a, b = (t.to("meta") for t in tensors())
    for name in ("auto", "simt"):
        with m3em_fast.backend(name):
            assert ops.consensus_map(a, b).device.type == "meta"
    with m3em_fast.backend("cuda"), pytest.raises(BackendError, match="no CUDA driver library"):
        ops.consensus_map(a, b)
    monkeypatch.setattr(backends, "cards", backends.simulated)
    with m3em_fast.backend("cuda"):
        assert ops.consensus_map(a, b).shape == (2, 1, 4, 3)


def test_the_wrong_tensors_for_a_card(with_driver):
    with m3em_fast.backend("cuda"), pytest.raises(BackendError, match="it takes CUDA tensors, not tensors on cpu"):
        ops.consensus_map(*tensors())
    with pytest.raises(BackendError, match="it takes CUDA tensors, not tensors on cpu"):
        torch.ops.m3em_fast._consensus_map(*tensors(), 2, False, 1e-8, "float32", "cuda")


def test_threads_that_ask_at_once_compile_once(card, compiler):
    compiling = compiler()
    _, cards = card(70, ())
    answers, start = [], threading.Barrier(4)

    def ask():
        start.wait()
        answers.append(cards.refusal("consensus_map", 0))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [None] * 4 and len(compiling.asked) == 1
