"""Reading the notes of a job, one at a time: JSON lines or a folder of .txt files. A bad note is not the job's end.

A note's text is what stands in its file, line ends included, so that an answer's place can be looked up there; only a
byte order mark at a file's beginning is no part of it. Ids need not be unique: each note gets its own record.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from model.support.cli import UserError
from model.support.files import check_regular


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
        files = text_files(path)
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
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if line.strip():
                count += 1
                yield json_line(line, number)
    if not count:
        raise UserError(f"{path}: empty: it holds no note; give one JSON object a line")


def text_files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.glob("*.txt") if not file.is_dir())


def text_file(file: Path) -> Note:
    name = file.stem.encode("utf-8", "backslashreplace").decode()  # a name need not be UTF-8
    try:
        check_regular(file)
        return checked(name, file.read_bytes().decode("utf-8-sig"), ())
    except UnicodeDecodeError as error:
        return Note(name, error=f"not UTF-8 text (byte {error.start})")
    except UserError:
        return Note(name, error="the file is a pipe, socket or device")
    except OSError as error:
        return Note(name, error=f"the file cannot be read: {error.strerror}")


def json_line(line: bytes, number: int) -> Note:
    name = f"line {number}"
    try:
        record: Any = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return Note(name, error=f"not UTF-8 text (byte {error.start} of line {number})")
    except (ValueError, RecursionError):  # a number of more digits than Python reads is no JSONDecodeError
        return Note(name, error=f"line {number} is not JSON")
    if not isinstance(record, dict):
        return Note(name, error=f"line {number} is not a JSON object")
    given = record.get("id")
    if isinstance(given, (str, int)) and not isinstance(given, bool) and str(given).strip() and unicode(str(given)):
        name = str(given)
    asked = record.get("questions", [])
    texts = [q.get("question") if isinstance(q, dict) else q for q in asked] if isinstance(asked, list) else [None]
    if not all(isinstance(text, str) and text.strip() and unicode(text) for text in texts):
        return Note(name, error="'questions' is not a list of questions ({\"question\": text})")
    patient = record.get("patient")
    return checked(name, record.get("text"), tuple(texts), None if patient is None else str(patient))


def checked(name: str, text: Any, questions: tuple[str, ...], patient: str | None = None) -> Note:
    if not isinstance(text, str):
        return Note(name, error="'text' is missing or is not text")
    if not text.strip():
        return Note(name, error="the note is empty")
    if not unicode(text):
        at = next(n for n, letter in enumerate(text) if "\ud800" <= letter <= "\udfff")
        return Note(name, error=f"half a surrogate pair at character {at}: the text is not Unicode")
    return Note(name, text, None, questions, patient)


def unicode(text: str) -> bool:
    """Whether a text can be written: JSON's escapes can name half of a surrogate pair."""
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def fingerprint(path: Path) -> str:
    """A hash of the notes' bytes, so that a job is only ever continued on the same notes."""
    digest = hashlib.sha256()
    for file in text_files(path) if path.is_dir() else [path]:
        if path.is_dir():
            digest.update(os.fsencode(file.name) + b"\0")
        try:
            check_regular(file)
            with open(file, "rb") as data:
                digest.update(hashlib.file_digest(data, "sha256").digest())
        except (UserError, OSError):  # its record will say so
            digest.update(b"unread")
    return digest.hexdigest()
