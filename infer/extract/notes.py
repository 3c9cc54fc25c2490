"""Read the notes of a job one by one from JSON lines, a table or a folder of .txt files.

A note that cannot be read becomes a Note with an `error`; the job goes on. The text is kept as it is in the file, line
ends included (only a byte order mark is removed), so character offsets in an answer are offsets in the file. Ids may
repeat: each note gets its own record.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from model.support.cli import UserError
from model.support.files import check_regular, numbered_lines, parse_json_line, read_text, sha256_file
from model.support.tables import Table

LONGEST = 1_000_000
"""Maximum number of characters of a note (about 250,000 tokens)."""


@dataclass(frozen=True)
class Note:
    """One note, or the `error` that kept it from being read. `questions` replace the task's questions if given."""

    id: str
    text: str = ""
    error: str | None = None
    questions: tuple[str, ...] = field(default=())
    patient: str | None = None


def skip_reason(note: Note) -> str | None:
    """Returns why the model cannot be asked about this note, or None if it can. Cheap: does not tokenize."""
    if note.error is not None:
        return note.error
    if not note.text.strip():
        return "the note is empty"
    if len(note.text) > LONGEST:
        return f"the note has {len(note.text):,} characters, more than {LONGEST:,}; divide it"
    return None


def read_notes(path: Path, text_column: str = "text", id_column: str = "id") -> Iterator[Note]:
    """Yields notes in file order; those of a folder sorted by name.

    `text_column` and `id_column` name a table's columns or a JSON object's fields. Raises UserError if `path` does not
    exist, holds no note file, or has an unknown format.
    """
    name = path.name.lower().removesuffix(".gz")
    if path.is_dir():
        files = text_files(path)
        if not files:
            raise UserError(f"{path}: holds no .txt file; give a folder of notes, JSON lines or a table")
        yield from map(text_file, files)
    elif not path.is_file():
        if path.exists():
            check_regular(path)  # says what it is
        raise UserError(
            f"{path}: no such file or folder; give JSON lines with 'id' and 'text', a table, or a folder of .txt files"
        )
    elif path.suffix.lower() == ".txt":
        yield text_file(path)
    elif name.endswith((".csv", ".tsv")):
        yield from table_notes(path, text_column.lower(), id_column.lower())
    elif name.endswith((".jsonl", ".ndjson")):
        for number, line in numbered_lines(path):
            yield json_note(line, number, text_column, id_column)
    else:
        raise UserError(
            f"{path}: notes are read from JSON lines (.jsonl, .ndjson), tables (.csv, .tsv), each also as "
            ".gz, a .txt file or a folder of them; write it as one of these"
        )


def text_files(folder: Path) -> list[Path]:
    """A folder's .txt files (case-insensitive), without hidden ones, sorted by name."""
    files = (file for file in folder.iterdir() if file.suffix.lower() == ".txt" and not file.is_dir())
    return sorted(file for file in files if not file.name.startswith("."))


def ignored_files(folder: Path) -> str:
    """One line on what else a notes folder holds, as `listed` gives it; "" if nothing."""
    read = set(text_files(folder))
    return listed(kinds(path for path in sorted(folder.iterdir()) if path not in read))


def kinds(paths: Iterable[Path]) -> dict[str, list[str]]:
    """Group file names by kind: hidden files (such as macOS's "._…"), sub-folders, and files by extension."""
    found: dict[str, list[str]] = {}
    for path in paths:
        kind = "sub-folders" if path.is_dir() else f"{path.suffix or 'other'} files"
        found.setdefault("hidden files" if path.name.startswith(".") else kind, []).append(path.name)
    return found


def listed(groups: Mapping[str, list[str]]) -> str:
    """One line with each group's count and first name: "2 .pdf files (a.pdf, …), 1 sub-folders (old)"."""
    return ", ".join(
        f"{len(names)} {kind} ({names[0]}{', …' if len(names) > 1 else ''})" for kind, names in groups.items()
    )


def text_file(file: Path) -> Note:
    name = file.stem.encode("utf-8", "backslashreplace").decode()  # a name need not be UTF-8
    try:
        return checked(Note(name, read_text(file)))
    except UserError as error:
        return Note(name, error=str(error).removeprefix(f"{file}: "))
    except OSError as error:
        return Note(name, error=f"the file cannot be read: {error.strerror}")


def table_notes(path: Path, text: str, name: str) -> Iterator[Note]:
    table = Table(path)
    for column, option in ((text, "text"), (name, "id")):
        if column not in table.columns and (option, column) != ("id", "id"):
            raise UserError(
                f"{path}: its header names no column {column!r}; name the one with the {option} so, or give "
                f"infer.extract's --{option}-column"
            )
    for line, row in table.rows(text, name, "patient"):
        yield checked(Note(row.get(name, "").strip() or f"line {line}", row[text], patient=row.get("patient") or None))


def json_note(line: bytes, number: int, text_column: str, id_column: str) -> Note:
    name = f"line {number}"
    try:
        record: Any = parse_json_line("line", number, line)
    except UserError as error:
        return Note(id_in(line, id_column) or name, error=str(error).replace("line:", "line ", 1))
    given = record.get(id_column)
    if isinstance(given, (str, int)) and str(given).strip():
        name = str(given)
    text = record.get(text_column)
    if not isinstance(text, str):
        return Note(name, error=f"{text_column!r} is missing or is not text (or infer.extract --text-column)")
    asked = record.get("questions", [])
    texts: list[Any] = [None]
    if isinstance(asked, list):
        texts = [q.get("question") if isinstance(q, dict) else q for q in asked]
    if not all(isinstance(question, str) and question.strip() for question in texts):
        return Note(name, error="'questions' is not a list of questions ({\"question\": text})")
    return checked(Note(name, text, None, tuple(texts), record.get("patient")))


def id_in(line: bytes, id_column: str) -> str | None:
    """The id on a JSON line that is otherwise invalid, or None."""
    try:
        given = json.loads(line)[id_column]
        str(given).encode()
    except (ValueError, RecursionError, LookupError, TypeError):
        return None
    return str(given).strip() or None if type(given) in (str, int) else None


def checked(note: Note) -> Note:
    reason = skip_reason(note)
    return note if reason is None else Note(note.id, error=reason)


def fingerprint(path: Path) -> str:
    """Hash of all notes' bytes (hex): a job is only resumed on identical notes."""
    digest = hashlib.sha256()
    for file in text_files(path) if path.is_dir() else [path]:
        if path.is_dir():
            digest.update(os.fsencode(file.name) + b"\0")
        try:
            digest.update(bytes.fromhex(sha256_file(file)))
        except (UserError, OSError):  # reported in the note's record
            digest.update(b"unread")
    return digest.hexdigest()
