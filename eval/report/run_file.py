"""run.json and the results that it names, as our programs write them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from model.support.cli import UserError
from model.support.files import read_json

Json = dict[str, Any]
PARTS = ("wrong_labels", "misspelling", "canaries", "retrieval")  # the experiments' results


def read_run(run: Path) -> Json:
    """run.json. Raises UserError where it is missing, has no references, or a system lacks a field."""
    if not run.is_dir():
        raise UserError(f"{run}: no such run folder")
    given = read_json(run / "run.json")
    if not isinstance(given, dict) or not given.get("systems") or not isinstance(given.get("references"), dict):
        raise UserError(f"{run / 'run.json'}: 'systems' or 'references' is missing; see eval.report's help")
    for place, system in enumerate(given["systems"]):
        if missing := {"name", "kind", "predictions"} - set(system):
            raise UserError(f"{run / 'run.json'}: systems[{place}] lacks {', '.join(sorted(missing))}")
    return given


def read_parts(run: Path, given: Json) -> Json:
    """The results of the experiments that run.json names; None for the others."""
    return {key: read_json(run / given[key]) if given.get(key) else None for key in PARTS}
