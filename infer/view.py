"""Marks the answers of an infer.extract job in the text of their notes, as a self-contained page.

    python -m infer.view answers.jsonl --notes notes.jsonl --out page.html

Each phenotype has a colour and a letter. If the notes carry gold answers (`phenotypes` and `diagnosis`, as train.clinic
writes them), the page shows them beside the model's and can filter for wrong answers. It holds the notes' text, so only
its owner may read it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from infer.extract.notes import Note, json_note, read_notes
from infer.inspect.html import build
from infer.tasks import NOT_RELEVANT, PHENOTYPES
from model.support.cli import UserError, run
from model.support.files import numbered_lines, read_jsonl, write_text
from model.support.lock import output

LETTERS = dict(zip(PHENOTYPES, "RUZIGHLS", strict=True))
"""R receptors, U their status, Z size, I site, G grade, H histology, L laterality, S stage."""
STYLES = ("page.css", "answers.css")
SOME = 0.05  # least probability of an alternative that is shown
Json = dict[str, Any]


@dataclass(frozen=True)
class Options:
    """Write a page that shows a job's answers in their notes."""

    answers: Annotated[Path, tyro.conf.Positional]
    """The output of infer.extract (JSON lines)."""
    notes: Path
    """The notes of that job: JSON lines, a table, or a folder of .txt files."""
    out: Path
    """The page (HTML); it holds the notes and is readable by its owner only."""
    overwrite: bool = False
    """Replace an existing page."""
    text_column: str = "text"
    """Column or field of a note's text."""
    id_column: str = "id"
    """Column or field of a note's id."""


def main(options: Options) -> int:
    with output(options.out, options.overwrite, options.answers, options.notes):
        shown = list(entries(options))
        text = page(f"Answers: {options.answers.name}", shown)
        write_text(options.out, text, mode=0o600)
    print(f"{options.out}: {len(shown)} notes with their text, readable by its owner only (0600)")
    return 0


def page(title: str, shown: list[Json]) -> str:
    """The HTML page of notes with their answers, each an `entry`."""
    data = {"notes": shown, "letters": LETTERS}
    return build("view.html", STYLES, ("elements.js", "note.js", "view.js"), title, data)


def entries(options: Options) -> Iterator[Json]:
    """The page's entry for each record, in order. Raises UserError if records and notes do not match."""
    notes = notes_with_gold(options)
    for number, record in read_jsonl(options.answers, ("id",)):
        where = f"{options.answers}:{number}"
        note, gold = next(notes, (None, {}))
        if note is None:
            raise UserError(f"{where}: {options.notes} has no note for it; give the notes of that job")
        if note.id != record["id"]:
            raise UserError(
                f"{where}: is about another note than {options.notes} has there; give the notes of that job"
            )
        try:
            yield entry(note, record, gold)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"{where}: is not a record of infer.extract for this note; give its output and the notes of that job"
            ) from error


def notes_with_gold(options: Options) -> Iterator[tuple[Note, Json]]:
    """Each note, in order, with its gold answers; only JSON lines can hold them."""
    columns = (options.text_column, options.id_column)
    if not options.notes.name.lower().removesuffix(".gz").endswith((".jsonl", ".ndjson")):
        yield from ((note, {}) for note in read_notes(options.notes, *columns))
        return
    for number, line in numbered_lines(options.notes):
        note = json_note(line, number, *columns)
        yield note, {} if note.error else json.loads(line)


def entry(note: Note, record: Json, gold: Json | None = None) -> Json:
    """The page's data of one note: text, one row per answer, and the values of the filters. Raises ValueError for a
    span outside the note."""
    rows = answer_rows(record, gold or {})
    for row in rows:
        for start, end in (*row["gold_places"], *(place for value in row["values"] for place in value["places"])):
            if not 0 <= start < end <= len(note.text):
                raise ValueError("a span outside the note")
    return {
        "id": note.id,
        "text": note.text,
        "error": record.get("error"),
        "rows": rows,
        "least": min((row["p"] for row in rows if row["p"] is not None), default=None),
        "wrong": any(row["right"] is False for row in rows),
        "ungrounded": any(not value["grounded"] for row in rows for value in row["values"]),
    }


def answer_rows(record: Json, gold: Json) -> list[Json]:
    """One row per answer of a record: values with their spans (where it was read, then other possible places),
    probability, and correctness if `gold` has the question."""
    rows = [row(name, answer, gold.get("phenotypes")) for name, answer in record.get("phenotypes", {}).items()]
    rows += [row(answer["question"], answer, None) for answer in record.get("answers", ())]
    if "diagnosis" in record:
        rows.append(diagnosis_row(record["diagnosis"], gold.get("diagnosis")))
    return rows


def row(name: str, answer: Json, gold: Any) -> Json:
    right = gold[name] if isinstance(gold, dict) and name in gold else None
    closed = name in PHENOTYPES and bool(PHENOTYPES[name].values)
    values = [shown_value(value, closed) for value in answer["answers"]]
    otherwise = NOT_RELEVANT if answer["not_relevant"] else answer.get("raw", "")
    spans = [span if isinstance(span, dict) else {"text": span} for span in right or ()]
    texts = [span["text"] for span in spans]
    return {
        "name": name,
        "values": values,
        "said": "" if values else otherwise,
        "p": confidence(answer, [value["logprob"] for value in answer["answers"]]),
        "others": others(answer),
        "gold": None if right is None else texts or [NOT_RELEVANT],
        "gold_places": [[span["start"], span["end"]] for span in spans if span.get("start") is not None],
        "right": None if right is None else normalized([value["text"] for value in values]) == normalized(texts),
    }


def shown_value(value: Json, closed: bool) -> Json:
    place = [] if value["start"] is None else [[value["start"], value["end"]]]
    return {
        "text": value["text"],
        "p": math.exp(value["logprob"]),
        "places": place + value.get("ambiguous", []),
        "grounded": closed or bool(place),
    }


def diagnosis_row(answer: Json, gold: Any) -> Json:
    codes = [code["code"] for code in answer["codes"]]
    row = {"name": "diagnosis", "values": [], "said": answer["text"], "p": confidence(answer), "gold_places": []}
    row["others"] = others(answer)
    if not isinstance(gold, dict):
        return row | {"gold": None, "right": None}
    code = gold.get("code")
    return row | {
        "gold": [f"{gold['text']} ({code})" if code else gold["text"]],
        "right": codes[:1] == [code] * bool(code),
    }


def confidence(answer: Json, logprobs: list[float] | None = None) -> float | None:
    """Probability of an answer: the calibrated one if there is one, else the model's; None if it has neither."""
    if "probability" in answer:
        return answer["probability"]
    logprob = answer.get("logprob", sum(logprobs) if logprobs else None)
    return None if logprob is None else math.exp(logprob)


def others(answer: Json) -> list[Json]:
    """The alternatives to an answer that the model gives some probability, which is not calibrated."""
    found = [{"text": one["text"], "p": math.exp(one["logprob"])} for one in answer.get("alternatives", ())]
    return [one for one in found if one["p"] >= SOME]


def normalized(texts: list[str]) -> set[str]:
    """Values for comparison: without case and white space."""
    return {"".join(text.casefold().split()) for text in texts}


if __name__ == "__main__":
    run(main, Options)
