"""What eval.report and eval.compare are given: run.json and the results that it names, their forms checked.

A form is a type, `[form]` for a list, `{key: form}` for an object that holds these keys, or `{str: form}` for one of
any keys. What stands deeper in an experiment's result than its form says is taken as its program wrote it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from model.support.cli import UserError
from model.support.files import read_json

Json = dict[str, Any]
NUMBER = int | float
HELP = "eval.report's help says what it holds"
SAID = {str: "a text", int: "a whole number", bool: "true or false", NUMBER: "a number", dict: "an object",
        list: "a list", dict | None: "an object or null"}  # fmt: skip
SYSTEM = {"name": str, "kind": str, "predictions": {str: str}}
NEEDED = {"systems": [SYSTEM], "references": {str: str}}
MAY = {"seconds": NUMBER, "peak_mb": NUMBER, "curves": {str: str}, "bits_per_byte": [dict], "leaks": dict}
SYSTEM_MAY = {"notes": int, "seconds": NUMBER, "peak_mb": NUMBER, "form": str, "grounded": bool}
POINT = {"step": NUMBER, "loss": NUMBER}
_CURVE = {"rates": [NUMBER], "slope": dict, "phenotype": [dict | None], "diagnosis": [dict | None]}
_DAMAGE = {"rates": [NUMBER], "series": {str: _CURVE}, "damaged": str, "changed": [int], "of": int, "patients": int}
_COUNT = {"count": int, "canaries": int, "exposure": NUMBER, "low": NUMBER, "high": NUMBER, "extracted": int,
          "extracted_low": NUMBER, "extracted_high": NUMBER}  # fmt: skip
_HELD_OUT = {"held_out_loss": NUMBER}
PARTS = {
    "counterfactual": _DAMAGE,
    "misspelling": _DAMAGE,
    "canaries": {"notes": int, "steps": int, "passes": NUMBER, "references": int, "most": NUMBER,
                 "lines_dropped": int, "rows": {str: [_COUNT]}},
    "retrieval": {"notes": int, "rows": [{"name": str, "diagnosis": dict | None}]},
    "quirks": {"scale": str, "pretrain": {"sound": _HELD_OUT}, "instruct": {"sound": _HELD_OUT}, "scoring": dict},
}  # fmt: skip


def read_run(run: Path) -> Json:
    """run.json. Raises UserError where it is of another form."""
    if not run.is_dir():
        raise UserError(f"{run}: no such run folder")
    path = run / "run.json"
    given = read_json(path)
    for key in NEEDED:
        if not isinstance(given, dict) or not given.get(key):
            raise UserError(f"{path}: lacks {key!r}; {HELP}")
    check(given, NEEDED, str(path))
    check_given(given, MAY | dict.fromkeys(PARTS, str), str(path))
    for place, system in enumerate(given["systems"]):
        check_given(system, SYSTEM_MAY, f"{path}: systems[{place}]")
    return given


def read_parts(run: Path, given: Json) -> Json:
    """The results of the experiments that run.json names; None for the others. Raises UserError for another form."""
    found: Json = dict.fromkeys(PARTS)
    for key, form in PARTS.items():
        if given.get(key):
            found[key] = read_json(run / given[key])
            check(found[key], form, str(run / given[key]), f"name the result of that experiment as {key!r}")
    return found


def check_given(value: Json, forms: Json, where: str) -> None:
    """Check the fields that are there; one that is null passes for absent."""
    for key, form in forms.items():
        if value.get(key) is not None:
            check(value[key], form, f"{where}: {key!r}")


def check(value: Any, form: Any, where: str, remedy: str = HELP) -> None:
    """Raise UserError where the value is of another form."""
    kind = type(form) if isinstance(form, dict | list) else form
    if not isinstance(value, kind):
        raise UserError(f"{where} is not {SAID[kind]}; {remedy}")
    if isinstance(form, list):
        for place, one in enumerate(value):
            check(one, form[0], f"{where}[{place}]", remedy)
    elif isinstance(form, dict):
        for key in value if str in form else form:
            if key not in value:
                raise UserError(f"{where} lacks {key!r}; {remedy}")
            check(value[key], form.get(key, form.get(str)), f"{where}: {key!r}", remedy)
