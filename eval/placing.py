"""Accuracy of the places of repeated values: python -m eval.placing --weights … --notes ….

The notes are annotated (the clinic's, or a table's). The model is made to give the annotated answers, so that each
value's right place is known, and every value that occurs more than once in its note is placed as infer.extract places
it. Reported: the share that is right, what the first and the last occurrence would score, and what other margins would
decide (infer.extract.evidence.MARGIN).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from infer import tasks
from infer.engine.generate import Generator
from infer.engine.load import load
from infer.engine.settings import Generation, Settings
from infer.extract.ask import Answer, Asker, Limits
from infer.extract.evidence import MARGIN, MOST, Forced, Reading, decide
from infer.extract.notes import Note
from infer.extract.places import Span
from infer.extract.schedule import Work
from model.support import cli as command
from model.support.cli import UserError
from model.support.files import read_jsonl, write_json
from model.support.lock import output

MARGINS = (0.0, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0)


@dataclass(frozen=True)
class Options:
    """Measure where repeated values are placed."""

    weights: str
    """The model's folder."""
    notes: Path
    """JSON lines of notes with annotated phenotypes, whose values have `start` and `end`."""
    adapter: tuple[str, ...] = ()
    """LoRA adapters, merged in this order."""
    dtype: str = "float32"
    """float32, bfloat16, float16 or float64."""
    limit: int = 0
    """Read the first notes only; 0: all."""
    batch: int = 8
    """Notes at once."""
    out: Path | None = None
    """JSON file for the figures and every value's losses (no text of a note)."""
    overwrite: bool = False
    """Replace a file that is there."""


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


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Shares of the values that are placed right: by evidence, and at the first or last occurrence."""

    def share(part: list[bool]) -> float:
        return round(100 * sum(part) / max(1, len(part)), 1)

    placed = [(decide(row["spans"], row["losses"], 0.0)[0] == row["right"], row) for row in rows]
    margins = []
    for margin in MARGINS:
        decided = [right for right, row in placed if len(decide(row["spans"], row["losses"], margin)) == 1]
        count = round(100 * len(decided) / max(1, len(rows)), 1)
        margins.append({"margin": margin, "decided": count, "right_of_decided": share(decided)})
    return {
        "values": len(rows),
        "right": share([right for right, _ in placed]),
        "first": share([row["spans"][0] == row["right"] for row in rows]),
        "last": share([row["spans"][-1] == row["right"] for row in rows]),
        "margins": margins,
        "phenotypes": {
            name: {"values": len(of), "right": share(of)}
            for name in tasks.PHENOTYPES
            if (of := [right for right, row in placed if row["phenotype"] == name])
        },
    }


def main(options: Options) -> None:
    records = [record for _, record in read_jsonl(options.notes) if record.get("phenotypes")]
    if not records:
        raise UserError(f"{options.notes}: no note with annotated phenotypes")
    records = records[: options.limit or None]
    with output(options.out, options.overwrite):
        report(options, records)


def report(options: Options, records: list[dict[str, Any]]) -> None:
    model, tokenizer = load(options.weights, list(options.adapter), options.dtype)
    asker = Asker(Generator(model, tokenizer), "phenotype", "template", Limits(), batch=options.batch)
    rows = measure(asker, tqdm(records, unit="note", desc="placing", disable=None))
    found = summary(rows)
    if options.out:
        write_json(options.out, {**found, "rows": rows})
    print(
        f"{found['values']} repeated values of {len(records)} notes placed right: {found['right']} % "
        f"(first {found['first']} %, last {found['last']} %)"
    )
    for name, of in found["phenotypes"].items():
        print(f"  {name}: {of['right']} % of {of['values']}")
    for row in found["margins"]:
        print(
            f"  margin {row['margin']}: {row['decided']} % decided, {row['right_of_decided']} % of them right"
            + (" (in use)" if row["margin"] == MARGIN else "")
        )


if __name__ == "__main__":
    command.run(main, Options)
