"""An import that is interrupted, killed or out of disk goes on where it was; and how much memory one takes."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from m3em_fast.data import _writer, importer
from m3em_fast.data.store import FeatureStore, FeatureStoreWriter, Modality, StoreError
from test_importer import dump, make, run, write_maps

ROOT = Path(__file__).resolve().parents[1]


def contents(store):
    return {path.name: path.read_bytes() for path in sorted(store.iterdir())}


@pytest.fixture
def sources(tmp_path):
    """Options of an import of 60 clips, and what it makes when nothing disturbs it."""
    ids = [f"P01_01_{i}" for i in range(60)]
    write_maps(tmp_path / "maps", ids)
    options = {"pickle": dump(tmp_path / "x.pkl", make(ids)), "maps": (f"RGB={tmp_path / 'maps'}",), "dtype": "uint8"}
    importer.import_features(tmp_path / "whole", **options)
    return options, contents(tmp_path / "whole")


@pytest.mark.parametrize("place", ["append", "write", "finish", "sync", "manifest", "rename"])
@pytest.mark.parametrize("after", [0, 1, 4])
def test_interrupted_anywhere_it_goes_on(tmp_path, monkeypatch, sources, place, after):
    options, _ = sources
    monkeypatch.setattr(importer, "CHUNK_BYTES", 5 * 4 * (5 * 4 * 6 + 25 * 18))
    monkeypatch.setattr(importer, "SYNC_SECONDS", 0.0)
    real_init = _writer.FeatureStoreWriter.__init__

    def small(self, *arguments, **more):
        real_init(self, *arguments, shard_bytes=128 + 17 * 120, **more)

    monkeypatch.setattr(_writer.FeatureStoreWriter, "__init__", small)
    importer.import_features(tmp_path / "shards", **options)
    owner, name = {
        "append": (_writer.FeatureStoreWriter, "append"),
        "write": (_writer.ShardFile, "append"),
        "finish": (_writer.ShardFile, "finish"),
        "sync": (_writer.FeatureStoreWriter, "sync"),
        "manifest": (_writer, "_write_whole"),
        "rename": (_writer.os, "rename"),
    }[place]
    real, calls, lost = getattr(owner, name), 0, 0

    def breaks(*arguments, **more):
        nonlocal calls
        calls += 1
        if calls == after + 1:
            if after % 2:  # when it is done, or before
                real(*arguments, **more)
            raise KeyboardInterrupt
        return real(*arguments, **more)

    seen = []
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, breaks)
        if place == "rename" and after:
            importer.import_features(tmp_path / "store", **options)
        else:
            with pytest.raises(KeyboardInterrupt):
                importer.import_features(tmp_path / "store", **options)
            assert not (tmp_path / "store").exists()
            real_read = importer.MapFolder.read
            patch.setattr(importer.MapFolder, "read", lambda self, part: seen.extend(part) or real_read(self, part))
            importer.import_features(tmp_path / "store", **options)
            lost = 60 - len(seen)
    if place in ("append", "write") and after == 4:
        assert lost >= 5, "what was there was not read again"
    if place in ("manifest", "rename") and not after:
        assert place == "manifest" or lost == 60
    assert contents(tmp_path / "store") == contents(tmp_path / "shards")
    assert not list(tmp_path.glob(".*"))


CHILD = """
import sys, time
from m3em_fast.data import importer
importer.CHUNK_BYTES, importer.SYNC_SECONDS = 1, 0.0
real = importer.MapFolder.read
def slow(self, clips):
    time.sleep(0.02)
    return real(self, clips)
importer.MapFolder.read = slow
sys.exit(importer.main(sys.argv[1:]))
"""


def test_killed_it_goes_on(tmp_path, sources, capsys):
    options, whole = sources
    arguments = [str(tmp_path / "store"), f"--pickle={options['pickle']}", "--maps", *options["maps"], "--dtype=uint8"]
    command = [sys.executable, "-c", CHILD, *arguments]
    partial = tmp_path / ".store.partial"

    def reached():
        try:
            return len(json.loads((partial / "progress.json").read_text())["clips"])
        except (OSError, ValueError):
            return 0

    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        while reached() < 8:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.005)
        code, said = run(capsys, *arguments)
        assert code == 2 and said.endswith(f"{partial} is in use: another process is writing that store.")
        os.kill(process.pid, signal.SIGKILL)
    before = reached()
    assert 8 <= before < 60 and not (tmp_path / "store").exists()

    code, said = run(capsys, *arguments[:-1])  # with float16
    assert code == 2 and "holds an unfinished store of other data or options; finish it with those, or delete" in said
    file = tmp_path / "maps" / "P01_01_1.npy"
    state = file.stat()
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns + 10**9))
    code, said = run(capsys, *arguments)
    assert code == 2 and said.endswith(
        f"{partial} holds clips whose files have changed since; delete it to begin anew."
    )
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert reached() == before

    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        said = process.stderr.read()
    assert process.returncode == 0 and f"{before}/60" in said and "0/60" not in re.sub(r"\d0/60", "", said), said
    assert contents(tmp_path / "store") == whole and not partial.exists()


def test_a_store_that_was_finished_meanwhile_is_not_written_over(tmp_path):
    """The second of two writers looked before the first had finished, and enters afterwards."""
    modality = Modality("vector", frames=2, channels=3)
    first, second = (FeatureStoreWriter(tmp_path / "s", {"RGB": modality}, resume="same") for _ in range(2))
    with first:
        first.append(["a"], {"RGB": np.ones((1, 2, 3), np.float16)})
    with pytest.raises(StoreError, match="s already exists; a store is never written over"), second:
        raise AssertionError("it has begun to write")
    assert list(FeatureStore(tmp_path / "s").clips) == ["a"]
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_a_store_that_came_meanwhile_takes_no_unfinished_one_with_it(tmp_path):
    modality = Modality("vector", frames=2, channels=3)
    first, second = (FeatureStoreWriter(tmp_path / "s", {"RGB": modality}, resume="same") for _ in range(2))
    with pytest.raises(KeyboardInterrupt), first:
        first.append(["a"], {"RGB": np.ones((1, 2, 3), np.float16)})
        raise KeyboardInterrupt
    before = contents(first.folder)
    (tmp_path / "s").mkdir()
    with pytest.raises(StoreError, match="s already exists"), second:
        raise AssertionError("it has begun to write")
    assert contents(first.folder) == before and "progress.json" in before


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EACCES])
def test_what_may_pass_is_tried_again(tmp_path, monkeypatch, capsys, sources, number):
    options, _ = sources

    def breaks(self, *arguments):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(_writer.FeatureStoreWriter, "append", breaks)
    said = run(capsys, tmp_path / "store", f"--pickle={options['pickle']}")
    passes = number in (errno.ENOSPC, errno.EDQUOT, errno.EIO)
    advice = "; the same command goes on from there" if passes else ""
    words = f"{tmp_path / '.store.partial'} could not be written ({os.strerror(number)}){advice}."
    assert said == (2, f"m3em_fast.data.importer: {words}")


def test_a_file_in_the_way_of_the_folder_is_named(tmp_path, capsys, sources):
    options, _ = sources
    code, said = run(capsys, options["pickle"] / "store", f"--pickle={options['pickle']}")
    assert code == 2 and said.endswith(
        f"{options['pickle'] / '.store.partial'} could not be written (Not a directory)."
    )


def test_an_unfinished_store_that_was_spoiled_is_refused(tmp_path, monkeypatch, capsys, sources):
    options, whole = sources
    partial = tmp_path / ".store.partial"
    arguments = [tmp_path / "store", f"--pickle={options['pickle']}", "--maps", *options["maps"], "--dtype=uint8"]
    monkeypatch.setattr(importer, "CHUNK_BYTES", 1)
    real, calls = _writer.FeatureStoreWriter.append, []

    def full(self, *arguments):
        calls.append(1)
        if len(calls) > 20:
            raise OSError(28, "No space left on device")
        return real(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(_writer.FeatureStoreWriter, "append", full)
        code, said = run(capsys, *arguments)
    words = f"{partial} could not be written (No space left on device); the same command goes on from there."
    assert code == 2 and said.endswith(words)
    journal = (partial / "progress.json").read_text()
    assert len(json.loads(journal)["clips"]) == 20
    for spoiled in ("[", "{}", "[]", journal.replace('"open": {', '"open": {"Depth": 1, ')):
        (partial / "progress.json").write_text(spoiled)
        code, said = run(capsys, *arguments)
        assert code == 2 and f"{partial} cannot be gone on with (" in said and said.endswith("delete it to begin anew.")
    (partial / "progress.json").write_text(journal)
    size = (partial / "RGB-00000.half").stat().st_size
    os.truncate(partial / "RGB-00000.half", size - 1)
    code, said = run(capsys, *arguments)
    assert code == 2 and f"has {size - 1} bytes, and {size} had been written" in said
    (partial / "progress.json").unlink()  # killed before it was ever written: nothing is believed
    assert run(capsys, *arguments)[0] == 0
    assert contents(tmp_path / "store") == whole


# Memory, of a process that has done a small import before.

MEMORY = """
import sys
from pathlib import Path
from m3em_fast.data import importer
def peak():
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
def now():
    return int(Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0]) * 1024
folder, small, big = Path(sys.argv[1]), eval(sys.argv[2]), eval(sys.argv[3])
importer.import_features(folder / "small", **small)
Path("/proc/self/clear_refs").write_text("5")
before = now()
importer.import_features(folder / "big", **big)
print(peak() - before)
"""


def memory(folder, small, big):
    arguments = [sys.executable, "-c", f"from pathlib import PosixPath\n{MEMORY}", folder, repr(small), repr(big)]
    done = subprocess.run(arguments, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    print(f"{int(done.stdout) / 2**20:.1f} MB")
    return int(done.stdout)


@pytest.mark.parametrize(("protocol", "bound"), [(2, 1.7), (3, 0.9), (4, 0.9), (5, 0.9)])
def test_memory_of_a_pickle(tmp_path, protocol, bound):
    """Far within 1.2 times its arrays where they are stored as bytes: one copy of them is too many."""
    rng = np.random.default_rng(0)
    files = []
    for clips in (40, 800):
        array = rng.random((clips, 25, 1024), dtype=np.float32)
        value = {"features": {"RGB": array}, "narration_ids": [f"P01_01_{i}" for i in range(clips)]}
        files.append(dump(tmp_path / f"{clips}.pkl", value, protocol))
    took = memory(tmp_path, *({"pickle": file} for file in files))
    assert took <= bound * array.nbytes, f"{took / array.nbytes:.2f} times the arrays"
    for file in files:
        file.unlink()


@pytest.mark.parametrize("dtype", ["float16", "uint8"])
def test_memory_of_a_folder_of_maps(tmp_path, dtype):
    """Of the clips that are read at a time, and not of the folder."""
    rng = np.random.default_rng(0)
    for name, clips in (("few", 4), ("many", 150)):
        (tmp_path / name).mkdir()
        for i in range(clips):
            np.save(tmp_path / name / f"{i}.npy", rng.random((5, 1024, 7, 7), dtype=np.float32))
    options = [{"maps": (f"RGB={tmp_path / name}",), "dtype": dtype} for name in ("few", "many")]
    took = memory(tmp_path, *options)
    assert took < 75 * 2**20, f"{took / 2**20:.0f} MB"
