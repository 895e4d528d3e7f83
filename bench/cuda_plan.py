"""With what the host launches a CUDA kernel for a shape: its plan, asked by a program of a few lines."""

from __future__ import annotations

import os
import shlex
import subprocess
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

__all__ = ["ELEMENT", "FORMS", "FRAMES", "PAPER", "PLANS", "Broken", "Shape", "plan", "shape_of"]

ELEMENT = {"f64": 8, "f32": 4, "f16": 2, "bf16": 2}

# Arguments: bytes of a number of the maps, the form's number in FORMS, and of the shape n, c, h, w, more.
PROGRAM = """
#include "cuda/{op}.h"
#include <cstdio>
#include <cstdlib>
int main(int, char **v) {{
    m3em::{name}Arguments m = {{}};
    m.n = atoi(v[3]), m.{channels} = atoi(v[4]), m.h = atoi(v[5]), m.w = atoi(v[6]), m.{more} = atoi(v[7]);
    const m3em::{name}Plan p(m, atoi(v[1]), {form}(atoi(v[2])));
    const long long values[] = {{{values}}};
    for (long long value : values)
        printf("%lld ", value);
}}
"""
# By op, as its plan numbers them.
FORMS = {
    "consensus_map": ("any", "7x7", "14x14"),
    "channel_gate": ("any", "packs"),
    "consensus_pool": ("any", "packs"),
}
# By op: the plan's type for a form, what its arguments call the channels and Shape.more, and what is asked.
PLANS = {
    "consensus_map": (
        "m3em::MapForm",
        "d",
        "scales",
        ("p.partial_bytes", "p.finish_bytes", "p.backward_bytes", "m.chunks", "p.workspace", "p.stats"),
    ),
    "channel_gate": ("bool", "c", "num_gates", ("p.forward_bytes", "p.backward_bytes")),
    "consensus_pool": (
        "bool",
        "c",
        "rows",
        ("p.forward_bytes", "p.backward_bytes", "p.finish_bytes", "m.chunks", "p.workspace"),
    ),
}


@dataclass(frozen=True)
class Shape:
    n: int
    c: int
    h: int
    w: int
    more: int  # scales of consensus_map, gates of channel_gate
    said: str

    def __str__(self) -> str:
        return f"{self.h}x{self.w}, {self.said}"


# A step of the paper: 128 source and 207 target clips of 5 frames.
FRAMES = (128 + 207) * 5
PAPER = {
    "consensus_map": Shape(FRAMES, 512, 7, 7, 3, "D = 512, 3 scales"),
    "channel_gate": Shape(FRAMES, 1024, 7, 7, 2, "C = 1024, 2 gates"),
    "consensus_pool": Shape(FRAMES, 1024, 7, 7, 0, "C = 1024"),
}


def shape_of(op: str, form: str) -> Shape:
    """What the launch of a kernel is reported for."""
    return PAPER[op] if form in ("7x7", "packs") else replace(PAPER[op], h=14, w=14)


class Broken(Exception):
    """There can be no report. The message is one sentence."""


def plan(op: str, form: str, dtype: str, csrc: Path) -> dict[str, int]:
    """What the host's plan says for a shape, by name; a stage's shared memory by the name of the stage."""
    kind, channels, more, asked = PLANS[op]
    name = op.title().replace("_", "")
    source = PROGRAM.format(op=op, name=name, form=kind, channels=channels, more=more, values=", ".join(asked))
    shape = shape_of(op, form)
    values = (ELEMENT[dtype], FORMS[op].index(form), shape.n, shape.c, shape.h, shape.w, shape.more)
    with tempfile.TemporaryDirectory() as folder:
        program = str(Path(folder) / "plan")
        command = [*shlex.split(os.environ.get("CXX") or "g++"), "-std=c++17", f"-I{csrc}", "-x", "c++", "-", "-o"]
        try:
            done = subprocess.run([*command, program], input=source, text=True, capture_output=True)
        except OSError as error:
            raise Broken(f"The host's plan cannot be asked without a C++ compiler ({error}).") from None
        if done.returncode:
            raise Broken(f"The host's plan of {op} does not compile:\n{done.stderr}")
        words = subprocess.run([program, *map(str, values)], text=True, capture_output=True, check=True).stdout.split()
    return {name[2:].removesuffix("_bytes"): int(word) for name, word in zip(asked, words, strict=True)}
