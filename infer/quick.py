"""Three sample notes answered by the released adapter: `make quick`.

    python -m infer.quick [--out runs/quick]

Prints each note's answers with the words that they stand on, and writes answers.jsonl and the page of infer.view.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infer import released, view
from infer.extract.notes import read_notes
from model.support.cli import run
from model.support.files import write_jsonl

AROUND = 4  # words of the note on each side of a value


@dataclass(frozen=True)
class Options:
    """Answer three sample notes, or a few of your own, with the released adapter."""

    notes: Path = released.SAMPLES
    """JSON lines, a table, or a folder of .txt files."""
    out: Path = Path("runs/quick")
    """Where answers.jsonl and page.html go; what is there is replaced."""
    adapter: Path | None = None
    """Another adapter on the released one's base (a PEFT folder)."""


def main(options: Options) -> int:
    from infer.extract.extractor import Extractor

    notes = list(read_notes(options.notes))
    extractor = Extractor(released.smollm2(), options.adapter or released.adapter())
    records = []
    for note in notes:
        record = {"id": note.id, "error": note.error} if note.error else {"id": note.id, **extractor.answers(note.text)}
        records.append(record)
        print("\n".join(table(note.id, note.text, record)), flush=True)
    answers, page = options.out / "answers.jsonl", options.out / "page.html"
    write_jsonl(answers, records)
    answers.chmod(0o600)
    view.main(view.Options(answers, options.notes, page, overwrite=True))
    print(f"\nopen {page} in a browser; your own notes: python -m infer.quick --notes my-notes/, or make serve")
    return 0


def table(name: str, text: str, record: dict[str, Any]) -> list[str]:
    """A note's answers as lines: question, answer, probability, and where in the note it was read."""
    if "error" in record:
        return [f"\n{name}: {record['error']}"]
    lines = [f"\n{name}: {' '.join(text[:200].split())[: width() - len(name) - 4]} …"]
    for row in view.answer_rows(record, {}):
        answer = "; ".join(value["text"] for value in row["values"]) or row["said"]
        sure = "" if row["p"] is None else f"{100 * row['p']:.0f} %"
        places = [value["places"][0] for value in row["values"] if value["places"]]
        line = f"  {row['name'].replace('_', ' '):24} {answer:34} {sure:>6}  "
        lines.append(line + " | ".join(around(text, *place) for place in dict.fromkeys(map(tuple, places))))
    return [line[: width()].rstrip() for line in lines]


def around(text: str, start: int, end: int) -> str:
    """The words that a value stands on, in brackets, among their neighbours."""
    before, after = text[:start].split(" "), text[end:].split(" ")
    return " ".join(f"{' '.join(before[-AROUND:])}[{text[start:end]}]{' '.join(after[:AROUND])}".split())


def width() -> int:
    return max(100, shutil.get_terminal_size((140, 24)).columns)


if __name__ == "__main__":
    run(main, Options)
