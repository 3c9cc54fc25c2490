"""Answers three sample notes with the released adapter: `make quick`.

    python -m infer.quick [--notes my-notes/]

Prints each note's answers with their context in the note, and writes answers.jsonl and the page of infer.view.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infer import released, view
from infer.extract.notes import read_notes
from model.support.cli import UserError, python_here, run
from model.support.files import check_not_read, write_jsonl

CONTEXT = 4  # words of the note shown on each side of a value


@dataclass(frozen=True)
class Options:
    """Answer three sample notes, or your own, with the released adapter."""

    notes: Path = released.SAMPLES
    """JSON lines, a table, or a folder of .txt files."""
    out: Path | None = None
    """Folder for answers.jsonl and page.html, which are replaced (default: runs/quick, or runs/quick-NAME for --notes
    NAME)."""
    adapter: Path | None = None
    """Another adapter for the same base model (a PEFT folder)."""


def main(options: Options) -> int:
    from infer.extract.extractor import Extractor

    name = "quick" if options.notes == released.SAMPLES else f"quick-{options.notes.stem}"
    out = options.out or Path("runs") / name
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file; give --out a folder for the answers and their page")
    answers, page = out / "answers.jsonl", out / "page.html"
    for file in (answers, page):
        check_not_read(file, options.notes)
    notes = list(read_notes(options.notes))
    extractor = Extractor(released.smollm2(), options.adapter or released.adapter())
    records = []
    for note in notes:
        record = {"id": note.id, "error": note.error} if note.error else {"id": note.id, **extractor.answers(note.text)}
        records.append(record)
        print("\n".join(table(note.id, note.text, record)), flush=True)
    write_jsonl(answers, records)
    view.main(view.Options(answers, options.notes, page, overwrite=True))
    command = f"{python_here()} -m infer.quick --notes my-notes/"
    print(f"\nopen {page} in a browser; your own notes: {command}, or make serve")
    return int(any("error" in record for record in records))


def table(name: str, text: str, record: dict[str, Any]) -> list[str]:
    """A note's answers as lines: question, answer, probability, and context in the note."""
    if "error" in record:
        return [f"\n{name}: {record['error'].removeprefix(f'{name}: ')}"]
    lines = [f"\n{name}: {' '.join(text[:200].split())[: width() - len(name) - 4]} …"]
    for row in view.answer_rows(record, {}):
        answer = "; ".join(value["text"] for value in row["values"]) or row["said"]
        probability = "" if row["p"] is None else f"{100 * row['p']:.0f} %"
        spans = [value["places"][0] for value in row["values"] if value["places"]]
        line = f"  {row['name'].replace('_', ' '):24} {answer:34} {probability:>6}  "
        lines.append(line + " | ".join(in_context(text, *span) for span in dict.fromkeys(map(tuple, spans))))
    return [line[: width()].rstrip() for line in lines]


def in_context(text: str, start: int, end: int) -> str:
    """A span of the note in brackets, with CONTEXT words before and after it."""
    before, after = text[:start].split(" "), text[end:].split(" ")
    return " ".join(f"{' '.join(before[-CONTEXT:])}[{text[start:end]}]{' '.join(after[:CONTEXT])}".split())


def width() -> int:
    return max(100, shutil.get_terminal_size((140, 24)).columns)


if __name__ == "__main__":
    run(main, Options)
