"""README.md's results are written from a run's files, between their markers and nowhere else."""

import json
from pathlib import Path

import pytest

from eval.report.readme import SETS, SYSTEMS, Options, fill, main
from model.support.cli import UserError

PAGE = "before\n" + "between\n".join(
    f"<!-- {name} -->\noutdated {name}\n<!-- /{name} -->\n" for name in ("quick", "results", "parity")
)


def figures(f1: float) -> dict:
    return {"f1": f1, "low": f1 - 5, "high": f1 + 5}


@pytest.fixture
def finished(tmp_path) -> Path:
    groups = {name: {"phenotype": figures(10.0 + n), "diagnosis": figures(20.0 + n)} for n, name in enumerate(SYSTEMS)}
    systems = {name: {"groups": found} for name, found in groups.items()}
    scores = {
        "code": {"commit": "0123456789abcdef"},
        "host": {"cpu": "A Processor"},
        "sets": {where: {"notes": 40 + n, "systems": systems} for n, where in enumerate(SETS)},
    }
    (tmp_path / "scores.json").write_text(json.dumps(scores))
    (tmp_path / "parity.txt").write_text("stage  max error\n  embedding 0.0\n  layer 0 q  0\nother\nparity holds: x\n")
    (tmp_path / "quick.txt").write_text("\nfirst: a note\n" + "  a phenotype\n" * 8 + "  diagnosis\n\nsecond: a note\n")
    return tmp_path


def test_results_are_written_between_their_markers(finished, tmp_path):
    page = tmp_path / "README.md"
    page.write_text(PAGE + "after\n")
    main(Options(finished, page))
    text = page.read_text()
    assert (
        text.startswith("before\n")
        and text.endswith("after\n")
        and text.count("between") == 2
        and "outdated" not in text
    )
    assert f"| {SYSTEMS[1]} | 11.0 [6, 16] | 21.0 [16, 26] |" in text
    assert "commit 0123456, A Processor; 40, 41, 42 notes" in text
    assert "parity holds: x" in text and "other" not in text
    assert "first: a note" in text and "diagnosis" in text and "second" not in text
    main(Options(finished, page))
    assert page.read_text() == text


def test_a_page_without_markers_or_a_run_without_report_is_refused(finished, tmp_path):
    with pytest.raises(UserError, match="results"):
        fill("no markers", "results", "x")
    (finished / "parity.txt").unlink()
    with pytest.raises(UserError, match="parity.txt: missing"):
        main(Options(finished, tmp_path / "README.md"))
