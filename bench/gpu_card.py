"""The card of ``make gpu`` and what its kernels come from, in one line of JSON: ``python -m bench.gpu_card``.

A process of its own, because a build has to come between two looks, and a process keeps the extension that it has
loaded. ``problem`` says in one sentence why there is nothing to measure, ``kernel_problem`` why our kernels do not run.
"""

from __future__ import annotations

import json
import platform
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any


def driver_version() -> str | None:
    """Of NVIDIA's kernel module."""
    module = Path("/proc/driver/nvidia/version")
    if module.exists() and (found := re.search(r"\b\d{3}\.\d+(\.\d+)?\b", module.read_text())):
        return found[0]
    return ask("driver_version")


def ask(what: str) -> str | None:
    """What nvidia-smi says of the first card."""
    try:
        query = ["nvidia-smi", f"--query-gpu={what}", "--format=csv,noheader"]
        done = subprocess.run(query, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.splitlines()[0].strip() if done.returncode == 0 and done.stdout.strip() else None


def card() -> dict[str, Any]:
    """The current card, or ``problem``."""
    import torch

    found = {"torch": torch.__version__, "cuda": torch.version.cuda, "python": platform.python_version()}
    if torch.version.cuda is None:
        return {**found, "problem": f"torch {torch.__version__} is built without CUDA; a build with CUDA is needed."}
    if not torch.cuda.is_available():
        return {**found, "problem": f"torch {torch.__version__} (CUDA {torch.version.cuda}) sees no CUDA device here."}
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    found |= {"card": properties.name, "capability": f"{properties.major}.{properties.minor}"}
    found |= {"driver": driver_version(), "exclusive": (ask("compute_mode") or "").lower().startswith("exclusive")}
    if properties.major < 7:
        return {**found, "problem": f"{properties.name} has compute capability {found['capability']}; 7.0 is needed."}
    try:
        # A card that torch's own kernels were not compiled for is seen all the same.
        torch.ones(1, device="cuda").add(1).item()
    except RuntimeError as error:
        reason = str(error).splitlines()[0].rstrip(".")
        return {**found, "problem": f"torch {torch.__version__} cannot compute on {properties.name} ({reason})."}
    return found


def kernels(capability: str) -> dict[str, Any]:
    """Where the kernels come from: the archive, or a compiler here; or ``kernel_problem``."""
    import torch

    from bench.gpu import OPS
    from m3em_fast import backends, cuda, nvrtc

    native, why = backends.native, None
    x, gate = torch.zeros(1, 1, 1, 1, device="cuda"), torch.zeros(1, 1, device="cuda")
    for op in OPS:
        tensors = {"channel_gate": [x, gate], "consensus_map": [x, x], "consensus_pool": [x, None]}[op]
        with backends.backend("cuda"):
            reason = backends.refusal("cuda", op, tensors)
        if reason is not None:
            return {"kernel_problem": f"backend cuda cannot serve {op} here: {reason.rstrip('.')}."}
    with zipfile.ZipFile(cuda.ARCHIVE) as packed:
        index = json.loads(packed.read("index.json"))
        names = [cuda.image_for(packed.namelist(), op, int(capability.replace(".", ""))) for op in OPS]
        images = [packed.read(name) if name else None for name in names]
    for name, image in zip(names, images, strict=True):
        if image is None:
            why = "none are packed for this card"
            break
        try:
            native.Module(native.Driver(cuda.LIBRARY), torch.cuda.current_device(), image)
        except native.ImageRejected:
            why = f"the driver rejects the packed {name}"
            break
    if (reason := trial()) is not None:
        return {"kernel_problem": reason}
    if why is None:
        return {"kernels": f"packed {', '.join(filter(None, names))}", "nvrtc": index["nvrtc"]}
    return {"kernels": f"compiled on this machine ({why})", "nvrtc": nvrtc.find().name}


def trial(chosen: str = "cuda", device: str = "cuda") -> str | None:
    """Why kernels of ours are of no use here: every op once, small, forward and backward, beside the reference."""
    import torch

    import m3em_fast
    from m3em_fast import ops

    drawn = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Any:
        return torch.randn(shape, generator=drawn).to(device).requires_grad_()

    x, other, gate, cmap = draw(2, 16, 7, 7), draw(2, 16, 7, 7), draw(2, 16), draw(2, 1, 7, 7)
    calls = {
        "consensus_map": (ops.consensus_map, (x, other)),
        "channel_gate": (ops.channel_gate, (x, gate)),
        "consensus_pool": (ops.consensus_pool, (x, cmap)),
    }
    for op, (function, inputs) in calls.items():
        found = []
        try:
            for backend in (chosen, "reference"):
                with m3em_fast.backend(backend):
                    out = function(*inputs)
                    found.append([out.detach(), *torch.autograd.grad(out.square().sum(), inputs)])
            torch.testing.assert_close(*found, rtol=1e-3, atol=1e-3)
        except (AssertionError, RuntimeError) as error:
            lines = " ".join(line.strip() for line in str(error).splitlines() if line.strip())
            return f"{op} on backend {chosen}: {lines[:300].rstrip('.')}."
    return None


def main() -> int:
    found = card()
    if "problem" not in found and "--kernels" in sys.argv[1:]:
        found |= kernels(found["capability"])
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
