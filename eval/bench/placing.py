"""Accuracy of the places of repeated values, against taking the first occurrence or the last.

The notes are annotated (the clinic's, or a table's). The model is made to give the annotated answers, so that each
value's right place is known, and every value that occurs more than once in its note is placed as infer.extract places
it. Rows of other margins (infer.extract.evidence.MARGIN) say what share is decided and how much of it is right.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from tqdm import tqdm

from eval.bench.row import Row
from infer import tasks
from infer.engine.generate import Generator
from infer.engine.load import load
from infer.engine.settings import Generation, Settings
from infer.extract.ask import Answer, Asker, Limits
from infer.extract.evidence import MARGIN, MOST, Forced, Reading, decide
from infer.extract.notes import Note
from infer.extract.places import Span
from infer.extract.schedule import Work
from model.support.cli import UserError
from model.support.files import read_jsonl

MARGINS = (0.0, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0)


def rows(
    weights: str, notes: str, adapter: str = "", dtype: str = "float32", limit: int = 0, batch: int = 8
) -> list[Row]:
    """The share placed right, of all and of each phenotype; then of each margin.

    `notes`: JSON lines of annotated notes whose values have `start` and `end`, the first `limit` (0: all); `batch`:
    notes at once.
    """
    records = [record for _, record in read_jsonl(notes) if record.get("phenotypes")][: limit or None]
    if not records:
        raise UserError(f"{notes}: no note with annotated phenotypes")
    model, tokenizer = load(weights, [adapter] if adapter else [], dtype)
    asker = Asker(Generator(model, tokenizer), "phenotype", "template", Limits(), batch=batch)
    return summary(measure(asker, tqdm(records, unit="note", desc="placing", disable=None)), len(records))


def gold_answers(asker: Asker, record: Mapping[str, Any]) -> Iterator[tuple[Answer, list[Span | None]]]:
    """The annotated answers to a record's questions as the model would write them, each with its values' right places;
    only those in which a value occurs more than once in the note."""
    note = Note(record["id"], record["text"])
    (part,) = asker.parts(note)
    for (name, question), prompt in zip(asker.questions(note), part.prompts, strict=True):
        texts = [value["text"] for value in record["phenotypes"].get(name) or ()]
        places = {value["text"]: (value["start"], value["end"]) for value in record["phenotypes"].get(name) or ()}
        tokens = asker.tokenizer.encode(tasks.answer(texts))
        given = Answer(part, name, question, Generation(asker.generator.decode(tokens), tokens, [], "length"))
        readings = asker.readings(given) if texts else []
        if any(len(reading.spans) > 1 for reading in readings):
            forced = Settings(max_new_tokens=len(tokens), constraint=Forced(tokens))
            (out,) = asker.generator.generate([prompt], forced)
            values = tasks.parse_answer(out.text)
            yield Answer(part, name, question, out), [places.get(value) for value in values]


def measure(asker: Asker, records: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Every repeated value of the records: its phenotype, occurrences, right place and the losses (evidence.losses)."""
    found = []
    for record in records:
        rows: list[dict[str, Any]] = []
        readings: list[Reading] = []
        for answer, right in gold_answers(asker, record):
            for reading, place in zip(asker.readings(answer), right, strict=True):
                if 1 < len(reading.spans) <= MOST and place in reading.spans:
                    readings.append(reading)
                    rows.append({"id": record["id"], "phenotype": answer.name, "spans": reading.spans, "right": place})
        (measured,) = asker.results([Work(asker.losses(readings))])
        found += [{**row, "losses": one} for row, one in zip(rows, measured, strict=True)]
    return found


def share(hits: list[bool]) -> float:
    return round(100 * sum(hits) / max(1, len(hits)), 1)


def summary(found: list[dict[str, Any]], notes: int) -> list[Row]:
    """Shares of the values that are placed right: by evidence, and at the first or last occurrence."""
    made = []
    kinds = {"all": found}
    kinds |= {name: [row for row in found if row["phenotype"] == name] for name in tasks.PHENOTYPES}
    for name, of in kinds.items():
        right = share([decide(row["spans"], row["losses"], 0.0)[0] == row["right"] for row in of])
        for peer, place in (("first occurrence", 0), ("last occurrence", -1)):
            theirs = share([row["spans"][place] == row["right"] for row in of])
            if of:
                made.append(
                    Row(f"placed right: {name}", right, theirs, peer, "right, %", f"{len(of)} values of {notes} notes")
                )
    for margin in MARGINS:
        decided = [row for row in found if len(decide(row["spans"], row["losses"], margin)) == 1]
        right = share([decide(row["spans"], row["losses"], 0.0)[0] == row["right"] for row in decided])
        setting = f"{share([True] * len(decided) + [False] * (len(found) - len(decided)))} % decided"
        name = f"margin {margin}{' (in use)' if margin == MARGIN else ''}"
        made.append(Row(name, right, None, None, "right of those decided, %", setting))
    return made
