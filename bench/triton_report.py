"""Write docs/triton-resources.md: what the compiler says about every Triton kernel. Needs no card.

    python -m bench.triton_report

The launches of the package's own functions are caught and compiled ahead of time, with the sizes of blocks and the
specialisation that they would have on a card. Registers, local and shared memory are the figures of the ptxas that
Triton brings; nothing is timed. Fails where a kernel has local memory (a spill is one) or more than 96 KB of shared
memory on compute capability 7.0.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from bench.cuda_plan import PAPER
from bench.cuda_report import PROCESSORS, Usage, occupancy, share, table

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "docs/triton-resources.md"
CAPABILITIES = (70, 80, 90)
SHARED = 96 << 10  # bytes that a block may have on 7.0
DTYPES = {"f64": "float64", "f32": "float32", "f16": "float16", "bf16": "bfloat16"}
SHAPES = ((7, 7), (14, 14))


class Broken(Exception):
    """There can be no report. The message is one sentence."""


@dataclass(frozen=True)
class Compiled:
    """One kernel for one capability."""

    name: str  # op_stage_dtype_shape
    kernel: str  # op.stage: which function it is
    capability: int
    threads: int
    registers: int
    local: int
    shared: int


class Target:
    """As much of a driver as compiling asks for."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # kernels are kept by device

    def get_current_stream(self, device: int) -> int:
        return 0


def used(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of local memory."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        done = subprocess.run([str(tool), "--dump-resource-usage", str(file)], capture_output=True, text=True)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", done.stdout)
    if found is None:
        raise Broken(f"cuobjdump said nothing about registers: {(done.stderr or done.stdout).strip()[:200]}")
    registers, stack, local = map(int, found.groups())
    return registers, stack + local


def calls(modules: dict[str, ModuleType], dtype: str, height: int, width: int) -> list[tuple[str, Callable[[], Any]]]:
    """What is compiled for a dtype and a shape: functions that launch kernels, with a word for their names."""
    import torch

    def empty(channels: int | None, *size: int) -> Any:
        # One sample, of which nothing depends; the kernels do not run.
        return torch.zeros(1, channels, *size, dtype=getattr(torch, DTYPES[dtype])) if channels else None

    found: list[tuple[str, Callable[[], Any]]] = []
    gate, pool, consensus = (modules[name] for name in ("channel_gate", "consensus_pool", "consensus_map"))
    x, out = empty(PAPER["channel_gate"].c, height, width), empty(2 * PAPER["channel_gate"].c, height, width)
    vector, plane = empty(PAPER["channel_gate"].c), empty(1, height, width)
    found.append(("", lambda: gate.forward(x, [vector, vector], out)))
    found.append(("", lambda: gate.backward(x, [vector, vector], out, [x, vector, vector])))
    found.append(("", lambda: pool.forward(x, plane, vector)))
    found.append(("", lambda: pool.backward(x, plane, vector, x, plane)))
    a = empty(PAPER["consensus_map"].c, height, width)
    # Kernels of the Pearson coefficient and for channels_last differ in little: once is enough.
    for center, last in ((False, False), *(((True, False), (False, True)) if dtype == "f32" else ())):
        options = (PAPER["consensus_map"].more, center, 1e-8, a.dtype)
        maps = (a.contiguous(memory_format=torch.channels_last) if last else a,) * 2

        def both(options: tuple = options, maps: tuple = maps) -> None:
            result, saved = consensus.forward(options, maps, True)
            consensus.backward(options, result, maps, saved, (True, True))

        found.append(("_center" if center else "_last" if last else "", both))
    return found


def kernels() -> dict[str, ModuleType]:
    """The modules of the kernels by op, not interpreted."""
    os.environ.pop("TRITON_INTERPRET", None)
    try:
        importlib.import_module("triton.runtime")
    except ImportError as error:
        raise Broken(f"Triton cannot be imported ({error}); the extra m3em_fast[triton] brings it.") from None
    from m3em_fast.triton import _launch

    if _launch.INTERPRETED:
        raise Broken("Triton has been imported with TRITON_INTERPRET=1, and then it compiles nothing.")
    folder = ROOT / "m3em_fast/triton"
    names = sorted(path.stem for path in folder.glob("*.py") if not path.stem.startswith("_"))
    return {name: importlib.import_module(f"m3em_fast.triton.{name}") for name in names}


def compile_for(capability: int, modules: dict[str, ModuleType]) -> None:
    """Have Triton compile for a capability from now on, and the modules choose their blocks for it."""
    from triton.runtime import driver

    from m3em_fast.triton import _launch

    driver.set_active(Target(capability))
    for module in (_launch, *modules.values()):
        module.capability_of = lambda x, own=capability: own  # type: ignore[attr-defined]


def measure(capabilities: Sequence[int] = CAPABILITIES) -> list[Compiled]:
    """Compiles every kernel. Changes the modules of the kernels for good: for a process of its own."""
    modules = kernels()
    compiled: dict[tuple[str, int], Compiled] = {}
    for capability in capabilities:
        compile_for(capability, modules)
        for dtype in DTYPES:
            if dtype == "bf16" and capability < 80:
                continue
            for height, width in SHAPES:
                for word, call in calls(modules, dtype, height, width):
                    suffix = f"{dtype}_{height}x{width}{word}"
                    for op, module in modules.items():
                        _catch(module, op, suffix, capability, compiled)
                    call()
    return list(compiled.values())


def _catch(module: ModuleType, op: str, suffix: str, capability: int, compiled: dict) -> None:
    """Have a module compile what it would launch."""

    def launch(kernel: Any, programs: int, writes: Any, *arguments: Any, **constants: Any) -> None:
        built = kernel.warmup(*arguments, grid=(programs,), **constants)
        registers, local = used(built.asm["cubin"])
        stage = kernel.__name__.strip("_")
        name = f"{op}_{stage}_{suffix}"
        threads = 32 * constants.get("num_warps", 4)
        shared = built.metadata.shared  # all of it is asked for at the launch
        compiled[name, capability] = Compiled(name, f"{op}.{stage}", capability, threads, registers, local, shared)

    module.launch = launch  # type: ignore[attr-defined]


def problems(compiled: Sequence[Compiled]) -> list[str]:
    """What fails the report, a sentence each."""
    found = []
    for each in compiled:
        where = f"on {each.capability // 10}.{each.capability % 10}"
        if each.local:
            found.append(f"{each.name} has {each.local} bytes of local memory {where}.")
        if each.capability == 70 and each.shared > SHARED:
            found.append(f"{each.name} has {each.shared} bytes of shared memory {where}; {SHARED} is the limit.")
    return found


def report(compiled: Sequence[Compiled], version: str) -> str:
    by_name: dict[str, dict[int, Compiled]] = {}
    for each in compiled:
        by_name.setdefault(each.name, {})[each.capability] = each
    rows = []
    for name, found in by_name.items():
        cells = []
        for capability in CAPABILITIES:
            each = found.get(capability)
            if each is None:
                cells.append("")
                continue
            usage = Usage(each.registers, each.shared, each.local, 0)
            full = occupancy(PROCESSORS[f"sm_{capability}"], each.threads, usage, 0)
            cells.append(f"{each.registers} · {share(full)}" + (f" · {each.local} B local" if each.local else ""))
        any_of = list(found.values())
        shared = " ".join(str(size) for size in sorted({each.shared for each in any_of}))
        rows.append([f"`{name}`", str(any_of[0].threads), shared, *cells])
    lines = f"""# Resources of the Triton kernels

Written by `python -m bench.triton_report`; do not edit. Compiled ahead of time with Triton {version}, whose ptxas gives
the figures, as the package would launch them for {" and ".join(f"{h}x{w}" for h, w in SHAPES)}, with
C = {PAPER["channel_gate"].c} and 2 gates, and D = {PAPER["consensus_map"].c} and {PAPER["consensus_map"].more} scales.
**No card was asked: nothing here is a measurement**, and another version of Triton gives other figures.

Under each architecture: registers a thread · the share of a multiprocessor's warps that programs of a kernel can fill.
Shared memory is in bytes a program. `center`: the Pearson coefficient; `last`: channels_last. bfloat16 is served from
8.0 on. The report and the tests fail on local memory, which every spill needs, and on more than {SHARED} bytes of
shared memory on 7.0.
""".splitlines()
    heads = ["kernel", "threads", "shared memory", *(f"sm_{capability}" for capability in CAPABILITIES)]
    return "\n".join([*lines, "", *table(heads, rows)]) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """With ``--json FILE`` the figures go there, and the document is left as it is."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments and (len(arguments) != 2 or arguments[0] != "--json"):
        sys.exit("m3em_fast: bench.triton_report takes no arguments, or --json and a file.")
    try:
        compiled = measure()
        import triton
    except Broken as error:
        sys.exit(f"m3em_fast: {error}")
    if arguments:
        found = {"triton": triton.__version__, "kernels": [asdict(each) for each in compiled]}
        Path(arguments[1]).write_text(json.dumps(found))
        return
    DOCUMENT.write_text(report(compiled, triton.__version__))
    print(f"{DOCUMENT.relative_to(ROOT)}: {len(compiled)} kernels, {len(CAPABILITIES)} capabilities")
    if sentences := problems(compiled):
        sys.exit("\n".join(f"m3em_fast: {line}" for line in sentences))


if __name__ == "__main__":
    main()
