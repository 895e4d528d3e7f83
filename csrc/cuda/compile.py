"""Device code for the build: which architectures are packed, and the two commands that ninja runs.

    compile.py image NVRTC INCLUDE SOURCE ARCH OUTPUT      one source for one architecture, with OUTPUT.d for ninja
    compile.py pack PLAN OUTPUT [IMAGE ...]                the archive m3em_fast/_cuda.zip

The archive holds the images as <arch>/<name>, the sources as source/cuda/<file>, for compilation at run time, and
index.json, which says what was left out and why.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import sys
import zipfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
# 8.6 and 8.9 run the code for 8.0. PTX serves what comes later.
ARCHITECTURES = ("sm_70", "sm_75", "sm_80", "sm_90", "sm_100", "sm_120", "compute_80", "compute_120")
SUFFIX = {"sm": ".cubin", "compute": ".ptx"}
KEPT = "their sources are packed, for compilation on the machine with the card"


def load_nvrtc() -> Any:
    """m3em_fast/nvrtc.py by its path: the package imports torch, which no build has."""
    if "_m3em_nvrtc" not in sys.modules:
        spec = importlib.util.spec_from_file_location("_m3em_nvrtc", ROOT / "m3em_fast/nvrtc.py")
        assert spec is not None and spec.loader is not None
        sys.modules["_m3em_nvrtc"] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules["_m3em_nvrtc"]


def wanted(words: str) -> list[str]:
    """What M3EM_CUDA_ARCHS asks for: nothing or "all", "none", or words like 70, 8.0, sm_90, compute_80 and 90+PTX, the
    last one for a cubin and PTX. Raises ValueError, with a sentence, for anything else."""
    found: list[str] = []
    given = re.split(r"[\s,;]+", words.strip())
    if given in ([""], ["all"]):
        return list(ARCHITECTURES)
    if given == ["none"]:
        return []
    for word in filter(None, given):
        if not (match := re.fullmatch(r"(sm_|compute_)?(\d+)\.?(\d)(\+PTX)?", word, re.IGNORECASE)):
            raise ValueError(
                f"M3EM_CUDA_ARCHS, {words!r}, has {word!r}, which is no architecture; "
                'a list like "70,80,90+PTX" or "sm_70;compute_80" was expected, or one of the words "all" and "none".'
            )
        number = match[2] + match[3]
        kind = (match[1] or "sm_").lower()
        found += [f"{kind}{number}"] + ([f"compute_{number}"] if match[4] else [])
    return list(dict.fromkeys(found))


def sources() -> list[Path]:
    return sorted(HERE.glob("*.cu"))


def headers() -> dict[str, str]:
    """Our own, under the names that sources include."""
    return {f"cuda/{path.name}": path.read_text() for path in sorted(HERE.glob("*.cuh"))}


def plan(version: str) -> tuple[dict[str, Any], Any, list[str]]:
    """What the archive will hold, as index.json has it and before anything is compiled; the NVRTC or None; and the
    lines that the build has to say. Raises ValueError for a wrong M3EM_CUDA_ARCHS."""
    module, chosen = load_nvrtc(), os.environ.get("M3EM_CUDA_ARCHS", "")
    archs, lines, nvrtc = wanted(chosen), [], None
    missing = {arch: f"M3EM_CUDA_ARCHS was {chosen} in the build." for arch in ARCHITECTURES if arch not in archs}
    if not archs:
        lines.append(f"M3EM_CUDA_ARCHS=none: no CUDA kernels are compiled; {KEPT}.")
    else:
        try:
            nvrtc = module.find()
        except module.Missing as error:
            missing |= dict.fromkeys(archs, str(error))
            lines.append(f"{error} No CUDA kernels are compiled; {KEPT}.")
    if nvrtc is not None:
        able = nvrtc.architectures()
        for arch in archs:
            if int(arch.partition("_")[2]) not in able:
                missing[arch] = f"NVRTC {nvrtc.name} cannot make code for it."
                lines.append(f"NVRTC {nvrtc.name} ({nvrtc.path}) cannot make code for {arch}, which is left out.")
        if problem := module.cache_problem():
            lines.append(problem)
    made = [arch for arch in archs if arch not in missing]
    images = sorted(f"{arch}/{path.stem}{SUFFIX[arch.partition('_')[0]]}" for arch in made for path in sources())
    index = {"version": version, "nvrtc": nvrtc.name if nvrtc else None, "missing": missing, "images": images}
    return index, nvrtc, lines


def image(library: str, include: str, source: str, arch: str, output: str) -> None:
    # setup.py has found both, and no two files of one build may be compiled by different ones.
    os.environ.update(M3EM_NVRTC=library, M3EM_CUDA_INCLUDE=include)
    nvrtc, path, own = load_nvrtc(), Path(source), headers()
    text = path.read_text()
    try:
        # setup.py has said once what there is to say about the cache.
        made = nvrtc.cached(nvrtc.find(), text, source, arch, own, say=lambda line: None)
    except (nvrtc.Failed, nvrtc.Missing) as error:
        raise SystemExit(f"m3em_fast: {error}") from None
    used = [source, *(f"{path.parent.parent.as_posix()}/{name}" for name in nvrtc.needed(text, own))]
    Path(output + ".d").write_text(f"{output}: {' '.join(name.replace(' ', chr(92) + ' ') for name in used)}\n")
    Path(output).write_bytes(made.image)


def pack(plan_file: str | Path, output: str | Path, *images: str) -> None:
    """The same bytes for the same contents, whenever and by whom they are packed."""
    index = json.loads(Path(plan_file).read_text())
    entries = {f"source/cuda/{path.name}": path.read_bytes() for path in (*sources(), *HERE.glob("*.cuh"))}
    digest = hashlib.sha256()
    for name, data in sorted(entries.items()):
        digest.update(f"{name} {len(data)}\n".encode() + data)
    index["digest"] = digest.hexdigest()
    for path in map(Path, images):
        entries[f"{path.parent.name}/{path.name}"] = path.read_bytes()
    assert set(index["images"]) == {name for name in entries if not name.startswith("source/")}
    entries["index.json"] = (json.dumps(index, indent=2, sort_keys=True) + "\n").encode()
    new = Path(f"{output}.new")
    with zipfile.ZipFile(new, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name in sorted(entries):
            info = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
            info.compress_type, info.external_attr = zipfile.ZIP_DEFLATED, 0o644 << 16
            archive.writestr(info, entries[name])
    os.replace(new, output)


if __name__ == "__main__":
    {"image": image, "pack": pack}[sys.argv[1]](*sys.argv[2:])
