"""Your own labelled set from a table: `python -m train.importers.table --table my.csv --out my.jsonl`.

The table is CSV (comma, semicolon or tab) with a header; one row is one answer to one question about one text:

    text,type,answer
    "Left breast mass, 2.5 cm, grade 2",tumor_size,2.5 cm
    "Left breast mass, 2.5 cm, grade 2",tumor_laterality,left
    "Left breast mass, 2.5 cm, grade 2",cancer_stage,not relevant

Columns: `text`; `type` (a phenotype's name) or `question` (its question), or "diagnosis"; `answer` (empty or "not
relevant": the text does not say). A cell is one answer, commas and all; `--separator ";"` divides it. `id` and
`patient` where there are any: rows of one id, else of one text, make one record; without `patient` every text counts as
a patient of its own, which makes intervals too narrow where patients have several texts. A question that has no row is
not asked. The records are train.clinic's and serve `eval.score`, `eval.run` and `train.instruct`.

A diagnosis holds its ICD-10-CM code, or is a code's description word for word. A code that is written is never
replaced: another chapter's, a mistyped one and several in one cell are refused, with their line.
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
    """Make records of a labelled table: a row an answer, in the columns text, type (tumor_size, …) and answer."""

    table: Path
    """CSV file with a header: text, type or question, answer; id and patient where there are any."""
    out: Path
    """JSON-lines file to write."""
    overwrite: bool = False
    """Replace a file that is there."""
    separator: str = ""
    """What divides several answers in one cell, for example ";"; without it a cell is one answer."""


def records(path: Path, separator: str = "", notices: Counter[str] | None = None) -> list[Record]:
    """The records of a table, in the order of their first rows; `notices` counts the diagnoses that are not asked."""
    notices = Counter() if notices is None else notices
    table = Table(path)
    if not {"text", "answer"} <= set(table.columns) or not {"type", "question"} & set(table.columns):
        known = ", ".join(name for name in COLUMNS if name in table.columns)  # the line may be a note's text
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
            raise UserError(f"{where}: the id {name!r} has another text than before")
        kind = label(row.get("type") or row.get("question", ""), where)
        cells = row["answer"].split(separator) if separator and kind != "diagnosis" else [row["answer"]]
        answers = [answer for cell in cells if (answer := " ".join(cell.split())) and answer.lower() != NOT_RELEVANT]
        if kind != "diagnosis":
            given = record["phenotypes"].setdefault(kind, [])
            given += [place(row["text"], answer) for answer in answers]
        elif not answers:
            notices["rows without a diagnosis, not asked for"] += 1
        else:
            if "diagnosis" in record:
                raise UserError(f"{where}: a second diagnosis for {name!r}; a record has one")
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
