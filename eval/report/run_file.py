"""Reads run.json and the files that it names."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from eval.questions import Counts, Question, pair, read_predictions, read_references
from model.support.cli import UserError
from model.support.files import read_json

Json = dict[str, Any]
PARTS = {"wrong_labels": "labels", "misspelling": "misspelling", "canaries": "canaries", "retrieval": "retrieval"}
"""Experiments: key in run.json → folder in a run of the demo or of make tables."""


class Asked(NamedTuple):
    """One system on one test set: its entry in run.json, its questions, the unpaired records, and its predictions."""

    system: Json
    questions: list[Question]
    counts: Counts
    predictions: list[Json]


def read_run(run: Path) -> Json:
    """run.json. Raises UserError if it is missing, has no references or systems, or a system lacks a field."""
    if not run.is_dir():
        raise UserError(f"{run}: no such run folder")
    given = read_json(run / "run.json")
    if not isinstance(given, dict) or not given.get("systems") or not isinstance(given.get("references"), dict):
        raise UserError(
            f"{run / 'run.json'}: 'systems' or 'references' is missing; eval.run scores a model and writes both"
        )
    for place, system in enumerate(given["systems"]):
        if missing := {"name", "kind", "predictions"} - set(system):
            raise UserError(f"{run / 'run.json'}: systems[{place}] lacks {', '.join(sorted(missing))}")
    return given


def read_parts(run: Path, given: Json) -> Json:
    """The results of the experiments in PARTS; None for those that run.json does not name."""
    return {key: read_json(run / given[key]) if given.get(key) else None for key in PARTS}


def read_set(run: Path, given: Json, test_set: str) -> tuple[list[Json], dict[str, Asked]]:
    """A test set's references, and the answers of every system that has predictions for it."""
    references, found = read_references(run / given["references"][test_set]), {}
    for system in given["systems"]:
        if test_set in system["predictions"]:
            predictions = read_predictions(run / system["predictions"][test_set])
            questions, counts = pair(references, predictions, system.get("notes"))
            found[system["name"]] = Asked(system, questions, counts, predictions)
    return references, found
