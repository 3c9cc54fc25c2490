"""Makes records of a labelled table: `python -m train.importers.table --table my.csv --out my.jsonl`.

The table is CSV (comma, semicolon or tab) with a header; each row is one answer to one question about one text:

    text,type,answer
    "Left breast mass, 2.5 cm, grade 2",tumor_size,2.5 cm
    "Left breast mass, 2.5 cm, grade 2",tumor_laterality,left
    "Left breast mass, 2.5 cm, grade 2",cancer_stage,not relevant

Columns:

    text                  the note
    type (or question)    a phenotype's name (or its question), or "diagnosis"
    answer                empty or "not relevant": the text does not say. A cell is one answer, including its commas;
                          `--separator ";"` splits it
    id, patient           optional. Rows with the same id, else with the same text, make one record. Without `patient`
                          each text is a patient of its own; confidence intervals are then too narrow if patients have
                          several texts

A question without a row is not asked. The records have train.clinic's form, for `eval.score`, `eval.run` and
`train.instruct`.

A diagnosis contains its ICD-10-CM code or is the exact description of one. A code is never corrected: an unknown code,
one of another chapter, or several in one cell raise an error that names the line.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from infer.tasks import NOT_RELEVANT
from model.support import cli as command
from model.support.cli import UserError
from model.support.lock import output
from model.support.tables import Table
from train.importers.record import Record, diagnosis, label, place, write

COLUMNS = ("id", "patient", "text", "type", "question", "answer")


@dataclass(frozen=True)
class Options:
    """Make records from a labelled table with an answer per row: columns text, type (tumor_size, …) and answer."""

    table: Path
    """CSV file with a header: text, type or question, answer; optionally id and patient."""
    out: Path
    """JSON-lines file to write."""
    overwrite: bool = False
    """Replace an existing file."""
    separator: str = ""
    """Separator of several answers in one cell, for example ";" (empty: a cell is one answer)."""


def records(path: Path, separator: str = "", notices: Counter[str] | None = None) -> list[Record]:
    """The records of a table, in the order of their first rows; `notices` counts rows without a diagnosis.

    Raises UserError, naming file and line, for a malformed table.
    """
    notices = Counter() if notices is None else notices
    table = Table(path)
    if not {"text", "answer"} <= set(table.columns) or not {"type", "question"} & set(table.columns):
        known = ", ".join(name for name in COLUMNS if name in table.columns)  # never the line: it may be a note's text
        raise UserError(
            f"{path}: its first line names {known or 'no column'}; a header needs text, answer, and type or question: "
            "a row for each answer, not a column"
        )
    made: dict[str, Record] = {}
    for line, row in table.rows(*COLUMNS):
        where = f"{path}:{line}"
        if not row["text"].strip():
            raise UserError(f"{where}: no text")
        key = row.get("id") or row["text"]
        name = row.get("id") or f"{path.stem}-{len(made) + 1}"
        record = made.setdefault(
            key, {"id": name, "patient": row.get("patient") or name, "style": "", "text": row["text"], "phenotypes": {}}
        )
        if record["text"] != row["text"]:
            raise UserError(f"{where}: its text is another than that of an earlier row with the same id")
        column = "type" if row.get("type") else "question"
        kind = label(row.get(column, ""), f"{where}: the column {column!r} (is a comma before it unquoted?)")
        cells = row["answer"].split(separator) if separator and kind != "diagnosis" else [row["answer"]]
        answers = [answer for cell in cells if (answer := " ".join(cell.split())) and answer.lower() != NOT_RELEVANT]
        if kind != "diagnosis":
            given = record["phenotypes"].setdefault(kind, [])
            given += [place(row["text"], answer) for answer in answers]
        elif not answers:
            notices["rows without a diagnosis, not asked for"] += 1
        else:
            if "diagnosis" in record:
                raise UserError(f"{where}: a second diagnosis for the same id or text; a record has one")
            record["diagnosis"] = diagnosis(answers[0], where)
    if not made:
        raise UserError(f"{path}: a header and no row")
    return list(made.values())


def main(options: Options) -> None:
    notices: Counter[str] = Counter()
    with output(options.out, options.overwrite, options.table):
        made = records(options.table, options.separator, notices)
        write(made, options.out, notices, Table(options.table).unread(*COLUMNS))


if __name__ == "__main__":
    command.run(main, Options)
