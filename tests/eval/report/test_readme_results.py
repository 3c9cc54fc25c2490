"""README.md's results are written from a run's files, between their markers and nowhere else."""

import json
from pathlib import Path

import pytest

from eval.report.readme import COLUMNS, SYSTEMS, Options, fill, main
from model.support.cli import UserError

PAGE = "before\n<!-- results -->\noutdated row\n<!-- /results -->\nbetween\n<!-- parity -->\n<!-- /parity -->\nafter\n"


def figures(f1: float) -> dict:
    return {"exact_match": {"f1": f1, "low": f1 - 5, "high": f1 + 5}}


@pytest.fixture
def finished(tmp_path) -> Path:
    folder = tmp_path / "demo"
    (folder / "tuned").mkdir(parents=True)
    systems = [
        {"name": name, "clinical": {"phenotype": figures(10.0 + n), "diagnosis": figures(20.0 + n)}}
        for n, name in enumerate(SYSTEMS)
    ]
    report = {
        "seconds": 600,
        "preset": "clinical",
        "host": {"cores": 2, "cpu": "A Processor"},
        "sets": {where: {"notes": 40, "systems": systems} for where, _ in COLUMNS},
    }
    (folder / "report.json").write_text(json.dumps(report))
    (folder / "tuned" / "run.json").write_text(json.dumps({"code": {"commit": "0123456789abcdef"}}))
    (folder / "parity.txt").write_text("stage  max error\n  embedding 0.0\n  layer 0 q  0\nother\nparity holds: x\n")
    return folder


def test_results_are_written_between_their_markers(finished, tmp_path):
    page = tmp_path / "README.md"
    page.write_text(PAGE)
    main(Options(finished, page))
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "between" in text and "outdated row" not in text
    assert "| base + tuning | 11.0 [6, 16] | 21.0 [16, 26] |" in text
    assert "10 minutes on 2 cores (A Processor), commit 0123456" in text
    assert "parity holds: x" in text and "other" not in text
    main(Options(finished, page))
    assert page.read_text() == text


def test_a_page_without_markers_or_a_run_without_report_is_refused(finished, tmp_path):
    with pytest.raises(UserError, match="results"):
        fill("no markers", "results", "x")
    (finished / "parity.txt").unlink()
    with pytest.raises(UserError, match="parity.txt: missing"):
        main(Options(finished, tmp_path / "README.md"))
