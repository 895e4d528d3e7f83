"""Two processes under the challenge's protocols; needs what tests/test_epic_run.py makes."""

import json
from dataclasses import replace

import numpy as np
import pytest

import train
from distributed_cases import run_main, together
from m3em_fast.epic.scores import read_scores
from test_epic_run import data, options  # noqa: F401  # data is a fixture


@pytest.mark.parametrize("protocol", ["val", "test"])
def test_two_processes_leave_the_scores_of_one(data, tmp_path, protocol):  # noqa: F811
    one = options(data, tmp_path / "one", model="B", protocol=protocol, epochs=2, dropout=0.0)
    train.train(one)
    codes, said = together(2, tmp_path / "said", run_main, replace(one, run=tmp_path / "two"))
    assert codes == [0, 0], said
    folders = sorted((tmp_path / "one" / "scores").iterdir())
    assert folders
    for folder in folders:
        own, other = read_scores(folder), read_scores(tmp_path / "two" / "scores" / folder.name)
        for x, y in ((own.verb, other.verb), (own.noun, other.noun)):
            np.testing.assert_allclose(y, x, rtol=0, atol=64 * 2.0**-24 * np.abs(x).max())
    metrics = [json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("one", "two")]
    assert metrics[0]["results"] == metrics[1]["results"]
