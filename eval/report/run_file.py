"""run.json and the results that it names, written by our own programs: the fields that a report cannot do without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from model.support.cli import UserError
from model.support.files import read_json

Json = dict[str, Any]
RUN = {"systems": list, "references": dict}
SYSTEM = {"name": str, "kind": str, "predictions": dict}
PARTS = {  # the experiments' results: what each of them must hold
    "wrong_labels": {"rates": list, "series": dict},
    "misspelling": {"rates": list, "series": dict},
    "canaries": {"rows": dict},
    "retrieval": {"rows": list},
    "quirks": {"pretrain": dict, "instruct": dict},
}


def check(value: Any, fields: dict[str, type], where: str) -> None:
    """Raise UserError where the value lacks a field or one is of another type."""
    for name, kind in fields.items():
        if not isinstance(value, dict) or not isinstance(value.get(name), kind) or not value[name]:
            raise UserError(f"{where}: {name!r} is missing or not a {kind.__name__}; see eval.report's help")


def read_run(run: Path) -> Json:
    """run.json. Raises UserError where it is of another form."""
    if not run.is_dir():
        raise UserError(f"{run}: no such run folder")
    path = run / "run.json"
    given = read_json(path)
    check(given, RUN, str(path))
    for place, system in enumerate(given["systems"]):
        check(system, SYSTEM, f"{path}: systems[{place}]")
    for file in (*given["references"].values(), *(f for s in given["systems"] for f in s["predictions"].values())):
        if not isinstance(file, str):
            raise UserError(f"{path}: a file's name is not a text; see eval.report's help")
    return given


def read_parts(run: Path, given: Json) -> Json:
    """The results of the experiments that run.json names; None for the others."""
    found: Json = dict.fromkeys(PARTS)
    for key, fields in PARTS.items():
        if given.get(key):
            found[key] = read_json(run / str(given[key]))
            check(found[key], fields, str(run / str(given[key])))
    return found
