"""Each quirk of the paper's scripts, switched on alone, is trained and judged beside the sound way."""

import json
import subprocess
import sys

import pytest

from eval.report.build import render
from eval.report.paper import PAPER
from eval.report.run_file import PARTS


@pytest.mark.slow
def test_only_texts_run_together_leak_and_every_quirk_has_its_row(tmp_path):
    out = tmp_path / "quirks"
    made = subprocess.run(
        [sys.executable, "-m", "eval.experiments.quirks", "--scale", "tiny", "--out", str(out)],
        capture_output=True,
        text=True,
    )
    assert made.returncode == 0, made.stderr[-500:]
    found = json.loads((out / "quirks.json").read_text())
    assert found["pretrain"]["sound"]["leak"] == 0.0 < found["pretrain"]["texts run together"]["leak"]
    assert {"sound", "instruction first", "no end-of-text", "NF4 base", "8-bit AdamW"} < found["instruct"].keys()
    empty = {"title": "held out", "notes": 0, "patients": 0, "systems": [], "paired": []}
    page = render(
        {
            "sets": {"heldout": empty},
            "curves": {},
            "examples": [],
            "ledger": [],
            "paper": PAPER,
            "seconds": None,
            **dict.fromkeys(PARTS),
            "quirks": found,
        }
    )
    assert all(f"<td>{quirk}</td>" in page for quirk in ("texts run together", "instruction first", "8-bit AdamW"))


def test_an_out_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    made = subprocess.run(
        [sys.executable, "-m", "eval.experiments.quirks", "--scale", "tiny", "--out", str(tmp_path)],
        capture_output=True,
        text=True,
    )
    assert made.returncode == 2 and "is no job's of ours" in made.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
