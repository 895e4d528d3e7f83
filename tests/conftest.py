"""What tests share: threads, random examples, and the backend that an op test runs on."""

import os
import sys
from collections import Counter

import pytest
import torch

# Before anything imports Triton: its kernels then run on the CPU and take CPU tensors. `make gpu` sets 0, and they run
# on the card.
os.environ.setdefault("TRITON_INTERPRET", "1")

from hypothesis import HealthCheck, settings

# Plain asserts in these helpers are to show the values, as those in tests do.
pytest.register_assert_rewrite("epic_cases", "exact", "library_cases", "op_cases")

import m3em_fast  # noqa: E402
import simt_cases  # noqa: E402
import triton_cases  # noqa: E402
from m3em_fast import backends as m3em_backends  # noqa: E402

# One backend is one more word here: every test that takes the fixture `backend` then runs on it too. simt and triton
# run those of the ops that they have kernels for; which op a test is of say its parameter `call` or `op`, or its mark
# `op`. There is no Triton for other systems.
ON_CARDS = ("simt", "triton") if sys.platform == "linux" else ("simt",)
BACKENDS = ("reference", "cpu", *ON_CARDS)
SERVED = {name: {op for op, kernels in m3em_backends.KERNELS.items() if name in kernels} for name in ON_CARDS}

# The same examples in every run and on every machine; `--hypothesis-profile=search` looks for new ones.
COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]}
settings.register_profile("ci", derandomize=True, max_examples=50, database=None, **COMMON)
settings.register_profile("search", max_examples=1000, **COMMON)
settings.load_profile("ci")

PASSED = pytest.StashKey[Counter]()


def pytest_configure(config):
    config.stash[PASSED] = Counter()
    config.addinivalue_line("markers", "op(name): the op that a test without a parameter `call` is of")
    config.addinivalue_line("markers", "gpu: on a card, or on what stands for one")
    config.addinivalue_line("markers", "compiled_kernels: on a card, of the backend `cuda` alone")
    # Workers of pytest-xdist share the cores, and more threads than cores make small ops slower.
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))


def op_of(item):
    """The one op that a test calls, or an empty word."""
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    if "call" in parameters:
        return parameters["call"].op
    mark = item.get_closest_marker("op")
    return mark.args[0] if mark else parameters.get("op", "")


def pytest_collection_modifyitems(config, items):
    def runs(item):
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        name = parameters.get("backend", parameters.get("kernels"))
        return name not in SERVED or op_of(item) in SERVED[name]

    left_out = [item for item in items if not runs(item)]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if runs(item)]


def chosen(name):
    if name == "simt":
        simt_cases.simulated()
    if name == "triton":
        triton_cases.quicken()
    return m3em_fast.backend(name)


@pytest.fixture(params=BACKENDS)
def backend(request):
    """Runs the test on one backend and returns its name.

    Memory that torch hands out without writing to it is NaN for as long (that is what deterministic algorithms do to
    it), so an element that a kernel leaves out cannot be right by accident."""
    request.node.user_properties.append(("backend", request.param))
    request.node.user_properties.append(("op", op_of(request.node)))
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with chosen(request.param):
            yield request.param
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.fixture(params=[name for name in BACKENDS if name != "reference"])
def kernels(request):
    """A backend with kernels, chosen by name, and a compiler that has seen nothing yet: a call that the backend cannot
    serve raises, and is not served by another one."""
    torch.compiler.reset()
    with chosen(request.param):
        yield request.param


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """A driver library with two V100s that nobody has used, and its cards, behind the backend `simt`."""
    monkeypatch.setattr(m3em_backends, "simulated", None)
    opened = simt_cases.opened(tmp_path)
    with m3em_fast.backend("simt"):
        yield opened


@pytest.fixture
def automatic():
    """The choice of the backend left to the package, for calls that kernels cannot serve: the reference then does."""
    with m3em_fast.backend("auto"):
        yield "reference"


def backends_short_of_cases(passed, served=SERVED):
    """Backends that passed fewer cases of an op than `reference`, which has passed some. A skip is no pass."""
    short = {}
    for op in sorted({op for op, name in passed if name == "reference"}):
        for name in ("cpu", *(name for name in served if op in served[name])):
            if passed.get((op, name), 0) < passed[op, "reference"]:
                short[op, name] = passed.get((op, name), 0)
    return short


def _short(config):
    if config.option.keyword or any("::" in argument for argument in config.args):
        return {}  # a run of chosen tests says nothing about the number of cases
    return backends_short_of_cases(config.stash[PASSED])


class _Count:
    def __init__(self, config):
        self.passed = config.stash[PASSED]

    def pytest_runtest_logreport(self, report):
        found = dict(report.user_properties)
        if "backend" in found:
            self.passed[found["op"], found["backend"]] += report.when == "call" and report.passed


def pytest_sessionstart(session):
    # Under pytest-xdist the process that runs no test itself sees all reports; a worker has `workerinput`.
    if not hasattr(session.config, "workerinput"):
        session.config.pluginmanager.register(_Count(session.config), "cases-by-backend")


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session, exitstatus):
    if exitstatus == pytest.ExitCode.OK and not hasattr(session.config, "workerinput") and _short(session.config):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter, config):
    total = Counter()
    for (_, name), count in config.stash[PASSED].items():
        total[name] += count
    for name, count in total.items():
        terminalreporter.write_line(f"op tests passed on backend {name}: {count}")
    for op, name in _short(config):
        what = f"{name} passed fewer cases of {op or 'several ops'} than reference (a skip is no pass)"
        terminalreporter.write_line(f"FAILED: {what}", red=True)
