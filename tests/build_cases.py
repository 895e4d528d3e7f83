"""Copies of the tree for tests that build and install, so that nothing touches the checkout, and what they ask them."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# Loads the extension alone, and hands on what follows on the command line.
LOAD = """
import importlib.util, json, sys
spec = importlib.util.spec_from_file_location("m3em_fast._C", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
"""


def run(*command, cwd, expect=0, **variables):
    """Standard output and error as one text; the build's own variables come from the test only. Device code is compiled
    where the test sets M3EM_CUDA_ARCHS."""
    clean = {k: v for k, v in os.environ.items() if k not in ("CXX", "CXXFLAGS", "LDFLAGS", "MAKEFLAGS", "PYTHONPATH")}
    clean["M3EM_CUDA_ARCHS"] = "none"
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=clean | {name: str(value) for name, value in variables.items()},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    assert done.returncode == expect, done.stdout
    return done.stdout


def extension(tree):
    found = [p for p in (tree / "m3em_fast").glob("_C.*") if p.suffix != ".pyi"]
    assert len(found) <= 1, found
    return found[0] if found else None


def build_info(library):
    # -S leaves out site-packages: what loads here needs neither torch nor anything else that is installed.
    program = LOAD + "print(json.dumps(module.build_info()))"
    return json.loads(run(sys.executable, "-I", "-S", "-c", program, library, cwd="/"))


def version():
    return re.search(r'__version__ = "(.+)"', (ROOT / "m3em_fast/_version.py").read_text())[1]


def said_by_the_build(text):
    """The one line in which the build says what is missing, beside what the test has left out itself."""
    lines = [line.strip() for line in text.splitlines() if line.strip().startswith("m3em_fast:")]
    (line,) = [line for line in lines if "M3EM_CUDA_ARCHS=none" not in line]
    return line


def clean_tree(target):
    """What a clean checkout holds, as far as builds and archives are concerned."""
    unbuilt = shutil.ignore_patterns("__pycache__", "_C.*", "_C_missing.txt", "_cuda.zip", "results")
    for name in ("bench", "csrc", "docs", "m3em_fast", "tests"):
        shutil.copytree(ROOT / name, target / name, ignore=unbuilt)
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, target)
    return target
