"""Scores any checkpoint on annotated notes, as a row of a report:

    python -m eval.run --weights DIR [--adapter DIR] --data my.jsonl --out runs/mine
    python -m eval.run --model mistral-7b --weights DIR --data my.jsonl --out runs/mine     # adds a row to that report

`--data` has annotated notes (records of train.clinic; `train.importers.table` and `brat` convert yours), or texts with
questions of their own (`train.importers.conll`). Only questions with an annotation are scored. The run's folder gets a
copy of the notes, each model's answers, run.json and the report, with intervals over patients from 10 patients on.
`--model` takes the chat form and title of a model from eval/baselines.toml. Without it, our prompt template is used if
an adapter is given, else the model's own chat form.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import resource
import tempfile
import time
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from eval.experiments.steps import begin
from eval.questions import read_references
from eval.report.build import terminal_table, write
from infer.extract import program
from infer.extract.options import AskOptions
from model.support import cli as command
from model.support.cli import UserError, nearest
from model.support.files import read_json, write_json, write_jsonl
from model.support.hardware import max_resident_mb

BASELINES = Path(__file__).with_name("baselines.toml")


@dataclass(frozen=True, kw_only=True)
class Options(AskOptions):
    """Ask a model about annotated notes and add its row to a report."""

    data: Path
    """Annotated notes, JSON lines."""
    out: Path
    """The run's folder. If it holds a run on the same notes, a row is added."""
    model: str = ""
    """A model of eval/baselines.toml: mistral-7b, biomistral-7b, clinicalcamel-70b, mixtral-8x7b, llama-2-13b or
    qwen-7b."""
    name: str = ""
    """The row's name (empty: the model's title, or the name of the last adapter's or the weights' folder)."""
    long: Literal["error", "truncate", "windows"] = "windows"
    """A note above the token limit: no answer, truncate it, or read overlapping windows and merge the answers."""
    overwrite: bool = False
    """Replace an existing row of this name."""

    def __post_init__(self) -> None:
        self.check()


def baseline(name: str) -> dict[str, Any]:
    """An entry of eval/baselines.toml. Raises UserError for an unknown name."""
    entries = tomllib.loads(BASELINES.read_text(encoding="utf-8"))
    if name not in entries:
        raise UserError(
            f"--model {name}: not in eval/baselines.toml{nearest(name, list(entries))}; it has {', '.join(entries)}"
        )
    config = {
        key: None if value == "none" else value for key, value in entries[name]["config"].items()
    }  # TOML has no null
    return {**entries[name], "config": config}


def add_row(out: Path, row: dict[str, Any], data: Path, seconds: float) -> None:
    """Add a system's row to the folder's run.json, replacing a row of the same name."""
    run = out / "run.json"
    given = (
        read_json(run)
        if run.exists()
        else {
            "title": f"{data.stem}: {out.name}",
            "scale": "",
            "host": None,
            "curves": {},
            "references": {"data": "data.jsonl"},
            "systems": [],
            "seconds": 0.0,
        }
    )
    given["systems"] = [system for system in given["systems"] if system["name"] != row["name"]] + [row]
    names = [system["name"] for system in given["systems"]]
    given["compare"] = [[names[0], name] for name in names[1:]]
    given["seconds"] = given.get("seconds", 0.0) + seconds
    given["peak_mb"] = max(row["peak_mb"], given.get("peak_mb") or 0)
    write_json(run, given)


def main(options: Options) -> None:
    entry = baseline(options.model) if options.model else None
    records = read_references(options.data)
    if not any(record.get("phenotypes") or record.get("diagnosis") or record.get("questions") for record in records):
        raise UserError(f"{options.data}: no question; give annotated notes")
    name = options.name or (
        entry["title"] if entry else Path(options.adapter[-1] if options.adapter else options.weights).name
    )
    if len(name) > 100 or not name.isprintable():  # it becomes a file's name
        raise UserError("the row's name has more than 100 characters, or one that cannot be printed; give --name")
    form = options.form if options.form != "auto" or entry is None else entry["form"]
    out = options.out
    with begin(out, {"program": "eval.run", "data": digest(records)}):
        file = file_of(out, name, options.overwrite)
        write_jsonl(out / "data.jsonl", records)
        ask(options, records[: options.limit], name, form, file)


def digest(records: Sequence[dict[str, Any]]) -> str:
    return hashlib.sha256(json.dumps(records, sort_keys=True).encode()).hexdigest()


def file_of(out: Path, name: str, overwrite: bool) -> str:
    """The path of a row's answers, relative to `out`. Raises UserError if another row uses it, or if a row of that name
    exists and may not be overwritten."""
    file = f"predictions/{re.sub(r'[^A-Za-z0-9.-]+', '-', name)}.jsonl"
    rows = read_json(out / "run.json")["systems"] if (out / "run.json").exists() else []
    for row in rows:
        if row["predictions"]["data"] == file and not (overwrite and row["name"] == name):
            raise UserError(f"{out}: has the row {row['name']!r} already; give --name, or --overwrite to replace it")
    return file


def ask(options: Options, asked: Sequence[dict[str, Any]], name: str, form: str, file: str) -> None:
    """Ask the model, then write its answers, its row in run.json, and the report."""
    began = time.monotonic()
    wanted = {kind for kind in ("phenotypes", "diagnosis") if any(record.get(kind) for record in asked)}
    task = "both" if len(wanted) == 2 else "diagnosis" if wanted == {"diagnosis"} else "phenotype"
    how = {field.name: getattr(options, field.name) for field in fields(AskOptions)} | {"task": task, "form": form}
    (options.out / file).parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".answers.", suffix=".part", dir=options.out) as folder:
        answers = Path(folder) / "answers.jsonl"
        program.main(program.Options(notes=options.out / "data.jsonl", out=answers, **how))
        os.replace(answers, options.out / file)  # keeps the old answers if the job fails
    seconds = time.monotonic() - began
    row = {
        "name": name,
        "kind": "model" if options.adapter else "base",
        "predictions": {"data": file},
        "seconds": seconds,
        "peak_mb": max_resident_mb(resource.getrusage(resource.RUSAGE_SELF)),
        "family": options.weights,
        "notes": len(asked),
        "form": form,
    }
    add_row(options.out, row, options.data, seconds)
    print(terminal_table(write(options.out)))
    print(f"report: {options.out / 'report.html'}")


if __name__ == "__main__":
    command.run(main, Options)
