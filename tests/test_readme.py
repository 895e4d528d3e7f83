"""What the README shows must run, and what it points to must exist."""

import re
import subprocess
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def test_the_python_of_the_readme_runs():
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    assert blocks
    names = {}
    for block in blocks:
        exec(block, names)
    assert names["vectors"]["RGB"].shape == names["vectors"]["Audio"].shape == (40, 2048)
    assert names["consensus"].shape == (40, 1, 7, 7)
    assert torch.isfinite(names["consensus"]).all()


def test_links_and_pictures_exist():
    targets = re.findall(r"\]\(([^)#]+)\)", README)
    assert "docs/images/consensus.png" in targets
    for target in targets:
        assert target.startswith("https://") or (ROOT / target).is_file(), target


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"\bmake ([\w-]+)", README)):
        assert re.search(rf"^{target}:", makefile, re.M), target


def test_the_folder_of_the_data_may_have_a_space_in_its_name():
    command = ["make", "--dry-run", "train", "DATA=my data"]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert shown.count("my data") == shown.count('"my data"') == 3
