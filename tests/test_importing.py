"""The benchmark of imports: a few clips for real, and what it refuses, compares and leaves behind."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from bench import importing
from m3em_fast.data.store import FeatureStore

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="memory is read from /proc")


@pytest.fixture
def small(monkeypatch):
    """Files of 8 KB, of which three are real."""
    monkeypatch.setattr(importing, "SHAPE", (5, 8, 7, 7))
    monkeypatch.setattr(importing, "CLIP_BYTES", 4 * 5 * 8 * 7 * 7)
    monkeypatch.setattr(importing, "REAL", 3)


@pytest.mark.parametrize("dtype", ["float16", "uint8"])
def test_a_small_run_measures_and_leaves_a_record_alone(tmp_path, capsys, dtype):
    """Two sizes of whole clips; the sizes of files and stores by hand."""
    (tmp_path / "there").mkdir()
    arguments = ["--gigabytes", "0.001", "0.004", "--dtype", dtype, "--folder", str(tmp_path / "there")]
    assert importing.main([*arguments, "--json", str(tmp_path / "x.json")]) == 0
    assert list((tmp_path / "there").iterdir()) == []
    assert "within 1" in capsys.readouterr().out
    found = json.loads((tmp_path / "x.json").read_text())
    clip = 5 * 1024 * 7 * 7
    assert [one["clips"] for one in found] == [1, 4]
    for one in found:
        assert one["op"] == "importing" and one["dtype"] == dtype and one["torch"] == torch.__version__
        assert one["read_gb"] == one["clips"] * clip * 4 / 1e9 and one["cpu_seconds"] > 0
        assert one["seconds"] > 1e-3
        size = clip * (2 if dtype == "float16" else 1) * one["clips"] / 1e9
        assert size < one["stored_gb"] < size + 1e-4
        assert 10 < one["base_mb"] < one["peak_mb"] < 1000
        assert 10 < one["own_mb"] < one["peak_mb"] and one["file_mb"] > 1


def test_the_folder_is_of_links_to_a_few_files(tmp_path, small):
    made = importing.make_folder(tmp_path, 8)
    files = [tmp_path / "maps" / f"P01_01_{i}.npy" for i in range(8)]
    assert len(made) == 3 and len({file.stat().st_ino for file in files}) == 3
    for i, file in enumerate(files):
        assert np.array_equal(np.load(file), made[i % 3]) and made[i % 3].shape == (5, 8, 7, 7)


@pytest.mark.parametrize("dtype", ["float16", "uint8"])
def test_a_store_that_is_not_what_was_read_is_no_measurement(tmp_path, small, dtype):
    importing.measure(tmp_path, 5, dtype)
    store, made = FeatureStore(tmp_path / "store"), [np.load(tmp_path / "maps" / f"P01_01_{i}.npy") for i in range(3)]
    importing.check(store, made, 5)
    with pytest.raises(AssertionError, match="the store has other clips"):
        importing.check(store, made, 6)
    for changed in range(3):
        others = [x + 0.01 * (i == changed) for i, x in enumerate(made)]
        with pytest.raises(AssertionError, match="was not stored as it was read"):
            importing.check(store, others, 5)


def test_memory_of_a_process():
    found = importing.memory(Path("/proc/self/status").read_text())
    assert set(found) == set(importing.LABELS) and found["VmHWM"] >= found["VmRSS"] > 2**20
    assert abs(found["RssAnon"] + found["RssFile"] - found["VmRSS"]) < 2**26  # the rest is shared memory
    assert importing.memory("Name:\tpython\nVmHWM:\t    12 kB\n") == {"VmHWM": 12 * 1024}
    assert importing.memory("Name:\tpython\nState:\tZ (zombie)\n") == {}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--gigabytes", "0"], "--gigabytes must be sizes of folders, above 0 and up to 10000."),
        (["--gigabytes", "nan"], "--gigabytes must be sizes of folders, above 0 and up to 10000."),
        (["--gigabytes"], "--gigabytes must be sizes of folders, above 0 and up to 10000."),
        (["--folder", "{tmp}/none"], "--folder: there is no folder {tmp}/none."),
        (["--json", "{tmp}/none/x.json"], "--json: there is no folder {tmp}/none."),
        (["--dtype", "int8"], "--dtype must be one of float16, uint8, got int8."),
    ],
)
def test_refused(tmp_path, capsys, arguments, words):
    try:
        code = importing.main([argument.format(tmp=tmp_path) for argument in arguments])
    except SystemExit as stop:
        code = stop.code
    said = capsys.readouterr()
    assert (code, said.out) == (2, "") and said.err == f"bench.importing: {words.format(tmp=tmp_path)}\n"


@pytest.mark.parametrize(("dtype", "needed"), [("float16", "21.1"), ("uint8", "11.1")])
def test_a_disk_without_the_room_is_left_alone(tmp_path, monkeypatch, capsys, dtype, needed):
    class Usage:
        free = 11.0e9

    monkeypatch.setattr(importing.shutil, "disk_usage", lambda path: Usage)
    monkeypatch.setattr(importing, "measure", None)
    assert importing.main(["--dtype", dtype, "--folder", str(tmp_path)]) == 2
    said = capsys.readouterr()
    words = f"{tmp_path} has 11.0 GB free, and {needed} are needed."
    assert said.err == f"bench.importing: {words}\n" and list(tmp_path.iterdir()) == []


def test_an_import_that_fails_is_told_and_cleared_away(tmp_path, monkeypatch, capfd, small):
    real = importing.make_folder

    def spoiled(folder, clips):
        made = real(folder, clips)
        (folder / "maps" / "P01_01_1.npy").unlink()
        (folder / "maps" / "P01_01_1.npy").write_text("x")
        return made

    monkeypatch.setattr(importing, "make_folder", spoiled)
    assert importing.main(["--gigabytes", "0.0001", "--folder", str(tmp_path)]) == 2
    lines = capfd.readouterr().err.splitlines()
    assert "P01_01_1.npy is no readable .npy file" in lines[-2]
    assert lines[-1] == "bench.importing: the import of 13 clips ended with status 2."
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_clears_away(tmp_path, monkeypatch, capsys, small):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(importing, "check", interrupted)
    assert importing.main(["--gigabytes", "0.0001", "--folder", str(tmp_path)]) == 130
    assert capsys.readouterr().err.endswith("bench.importing: interrupted; nothing was kept.\n")
    assert list(tmp_path.iterdir()) == []
