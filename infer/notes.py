"""Reading the notes of a job, one at a time: JSON lines or a folder of .txt files. A bad note is not the job's end."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from model.command import UserError


@dataclass(frozen=True)
class Note:
    """One note, or the reason why it cannot be read. `questions` are the record's own, in place of a task's."""

    id: str
    text: str = ""
    error: str | None = None
    questions: tuple[str, ...] = field(default=())
    patient: str | None = None


def read_notes(path: Path) -> Iterator[Note]:
    """Notes in the file's order (a folder's: by name). Raises UserError where there is nothing to read."""
    if path.is_dir():
        files = sorted(path.glob("*.txt"))
        if not files:
            raise UserError(f"{path}: holds no .txt file; give a folder of notes or a JSON-lines file")
        for file in files:
            yield text_file(file)
        return
    if not path.is_file():
        raise UserError(
            f"{path}: no such file or folder; give JSON lines with 'id' and 'text', or a folder of .txt files"
        )
    if path.suffix == ".txt":
        yield text_file(path)
        return
    count = 0
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                count += 1
                yield json_line(line, number)
    if not count:
        raise UserError(f"{path}: empty: it holds no note; give one JSON object a line")


def text_file(file: Path) -> Note:
    try:
        return checked(file.stem, file.read_text(encoding="utf-8"), ())
    except UnicodeDecodeError as error:
        return Note(file.stem, error=f"not UTF-8 text (byte {error.start})")


def json_line(line: bytes, number: int) -> Note:
    name = f"line {number}"
    try:
        record: Any = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return Note(name, error=f"not UTF-8 text (byte {error.start} of line {number})")
    except (json.JSONDecodeError, RecursionError):
        return Note(name, error=f"line {number} is not JSON")
    if not isinstance(record, dict):
        return Note(name, error=f"line {number} is not a JSON object")
    if isinstance(record.get("id"), (str, int)):
        name = str(record["id"])
    asked = record.get("questions", [])
    texts = [q.get("question") if isinstance(q, dict) else q for q in asked] if isinstance(asked, list) else [None]
    if not all(isinstance(text, str) and text.strip() for text in texts):
        return Note(name, error="'questions' is not a list of questions ({\"question\": text})")
    patient = record.get("patient")
    return checked(name, record.get("text"), tuple(texts), None if patient is None else str(patient))


def checked(name: str, text: Any, questions: tuple[str, ...], patient: str | None = None) -> Note:
    if not isinstance(text, str):
        return Note(name, error="'text' is missing or is not text")
    if not text.strip():
        return Note(name, error="the note is empty")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return Note(name, error=f"half a surrogate pair at character {error.start}: the text is not Unicode")
    return Note(name, text, None, questions, patient)


def fingerprint(path: Path) -> str:
    """A hash of the notes' bytes, so that a job is only ever continued on the same notes."""
    digest = hashlib.sha256()
    files = sorted(path.glob("*.txt")) if path.is_dir() else [path]
    for file in files:
        if path.is_dir():
            digest.update(file.name.encode() + b"\0")
        with open(file, "rb") as data:
            digest.update(hashlib.file_digest(data, "sha256").digest())
    return digest.hexdigest()
