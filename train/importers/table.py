"""Your own labelled set from a table: `python -m train.importers.table --table my.csv --out my.jsonl`.

The table is CSV (comma, semicolon or tab) with a header; one row is one answer to one question about one text:

    text,type,answer
    "Left breast mass, 2.5 cm, grade 2",tumor_size,2.5 cm
    "Left breast mass, 2.5 cm, grade 2",tumor_laterality,left
    "Left breast mass, 2.5 cm, grade 2",cancer_stage,not relevant

Columns: `text`; `type` (a phenotype's name) or `question` (its question), or "diagnosis"; `answer` (empty or "not
relevant": the text does not say). `id` and `patient` where there are any: rows of one id, else of one text, make one
record; without `patient` every text counts as a patient of its own, which makes intervals too narrow where patients
have several texts. A question that has no row is not asked. The records are train.clinic's and serve `eval.score`,
`eval.run` and `train.instruct`.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infer.codes import describe, lookup
from infer.extract.places import occurrences
from infer.tasks import DIAGNOSIS_QUESTION, NOT_RELEVANT, PHENOTYPES
from model.support import cli as command
from model.support.cli import UserError, nearest
from model.support.files import check_not_read, write_jsonl
from model.support.lock import output


@dataclass(frozen=True)
class Options:
    """Make records of a labelled table."""

    table: Path
    """CSV file with a header: text, type or question, answer; id and patient where there are any."""
    out: Path
    """JSON-lines file to write."""
    overwrite: bool = False
    """Replace a file that is there."""


def label(name: str, where: str) -> str:
    """The phenotype that a type or question names ("Tumor Size", "What is the tumor size?"), or "diagnosis"."""
    plain = re.sub(r"[^a-z]+", "_", name.lower().replace("tumour", "tumor")).strip("_")
    known = {"diagnosis": "diagnosis", _plain(DIAGNOSIS_QUESTION): "diagnosis"}
    for phenotype in PHENOTYPES.values():
        known |= {phenotype.name: phenotype.name, _plain(phenotype.question): phenotype.name}
    if plain not in known:
        names = [*PHENOTYPES, "diagnosis"]
        raise UserError(f"{where}: no type {name!r}{nearest(plain, names)}; there are {', '.join(names)}")
    return known[plain]


def _plain(text: str) -> str:
    return re.sub(r"[^a-z]+", "_", text.lower()).strip("_")


def span(text: str, answer: str) -> dict[str, Any]:
    """The answer and where it first occurs in the text (verbatim, else in any case); null where it does not."""
    found = occurrences(answer, text) or occurrences(answer, text, ignore_case=True)
    start, end = found[0] if found else (None, None)
    return {"text": answer, "start": start, "end": end}


def diagnosis(answer: str, where: str) -> dict[str, str]:
    """Description and ICD-10-CM code of an answer that holds the code, or the description word for word."""
    code = next(iter(lookup(answer, 1)), "")
    written = re.sub(r"\s*\(?\b[A-Z]\d[0-9A-Z](?:\.?[0-9A-Z]{1,4})?\b\)?\s*$", "", answer).strip()
    if not code or (written and written == answer.strip() and describe(code).lower() != written.lower()):
        raise UserError(f"{where}: the diagnosis names no ICD-10-CM code of C00-D49; write it as 'description (code)'")
    return {"text": written or describe(code), "code": code}


def rows(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """(line, row) of the table, its columns in small letters. Raises UserError where a column is missing."""
    try:
        raw = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}); save it as 'CSV UTF-8'") from error
    if not raw.strip():
        raise UserError(f"{path}: empty; give a header and one row an answer")
    delimiter = max(",;\t", key=raw.lstrip().splitlines()[0].count)
    reader = csv.DictReader(io.StringIO(raw, newline=""), delimiter=delimiter, restkey="", strict=True)
    columns = [(name or "").strip().lower() for name in reader.fieldnames or ()]
    if "text" not in columns or "answer" not in columns or not {"type", "question"} & set(columns):
        known = {"id", "patient", "text", "type", "question", "answer"} & set(columns)  # the line may be a note's text
        raise UserError(f"{path}: its first line names {', '.join(sorted(known)) or 'no column'}; a header needs text, "
                        "answer, and type or question")  # fmt: skip
    reader.fieldnames = columns
    try:
        for row in reader:
            if "" in row:
                raise UserError(
                    f"{path}:{reader.line_num}: more cells than columns; quote texts that hold a {delimiter!r}"
                )
            if not any(row.values()):  # the empty rows that spreadsheets leave at the end
                continue
            if missing := [key for key, value in row.items() if value is None]:
                raise UserError(f"{path}:{reader.line_num}: fewer cells than columns: no {missing[0]}")
            yield reader.line_num, {key: value or "" for key, value in row.items()}
    except csv.Error as error:
        raise UserError(f"{path}:{reader.line_num}: {error}; is a quotation mark missing?") from error


def records(path: Path) -> list[dict[str, Any]]:
    """The records of a table, in the order of their first rows."""
    made: dict[str, dict[str, Any]] = {}
    for line, row in rows(path):
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
        kind, answer = label(row.get("type") or row.get("question", ""), where), " ".join(row["answer"].split())
        if kind == "diagnosis":
            if "diagnosis" in record:
                raise UserError(f"{where}: a second diagnosis for {name!r}")
            record["diagnosis"] = diagnosis(answer, where)
            continue
        given = record["phenotypes"].setdefault(kind, [])
        for part in answer.split(","):
            if part.strip() and part.strip().lower() != NOT_RELEVANT:
                given.append(span(row["text"], part.strip()))
    if not made:
        raise UserError(f"{path}: a header and no row")
    return list(made.values())


def remarks(made: list[dict[str, Any]]) -> str:
    """What a reader should know of the records: their number, and answers that training could not learn to copy."""
    spans = [(name, one) for record in made for name, many in record["phenotypes"].items() for one in many]
    nowhere = sum(one["start"] is None for name, one in spans if not PHENOTYPES[name].values)
    other = sum(one["text"] not in PHENOTYPES[name].values for name, one in spans if PHENOTYPES[name].values)
    said = f"{len(made)} records, {len(spans)} answers, {sum('diagnosis' in record for record in made)} diagnoses"
    further = sum(len(record.get("further_diagnoses", ())) for record in made)
    said += f"; {further} further diagnoses, not asked for" if further else ""
    said += f"; {nowhere} answers stand nowhere in their text" if nowhere else ""
    return said + (f"; {other} answers are not of their phenotype's closed list" if other else "")


def main(options: Options) -> None:
    check_not_read(options.out, options.table)
    made = records(options.table)
    with output(options.out, options.overwrite):
        write_jsonl(options.out, made)
    print(f"{options.out}: {remarks(made)}")


if __name__ == "__main__":
    command.run(main, Options)
