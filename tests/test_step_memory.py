"""The model of a step's memory: its arithmetic, and that the README says what it says."""

import re
from pathlib import Path

import pytest

from bench import step_memory

README = (Path(__file__).resolve().parents[1] / "README.md").read_text()


def test_the_most_that_is_held_at_a_time():
    assert step_memory.peak_of([5, -5, 3, 4, -7, 6]) == 7
    assert step_memory.peak_of([-5, 2]) == 0


def test_a_line_through_the_ends():
    assert step_memory.extended((1, 2, 3), (10, 20, 30), 10) == (100, 0)
    assert step_memory.extended((1, 2, 3), (10, 25, 30), 10)[1] == pytest.approx(0.25)


def test_a_batch_and_a_state():
    assert step_memory.batch_bytes(335) == 335 * 5 * (2 * 1024 * 49 + 1024) * 2
    model = step_memory.model_of("meta")
    assert step_memory.state_bytes() == 12 * sum(p.numel() for p in model.parameters())


def test_the_readme_has_these_figures(capsys):
    assert step_memory.main([]) == 0
    said = capsys.readouterr().out
    together = re.search(r"^together +(\S+) GB", said, re.M)[1]
    assert f"modelled at {together} GB" in README
    for part, word in (("batch", "batch"), ("forward", "forward and backward"), ("workspace", "`gated_projection`")):
        size = re.search(rf"^{part}.* (\S+) GB", said, re.M)[1]
        assert re.search(rf"{re.escape(word)} {size}\b", README), word
    assert "off a straight line" in said
