"""Reading untrusted files and writing files atomically.

Writing: everything is written under a temporary name and renamed, so that a name holds either a whole file or the
previous one. Reading: every mistake is a `UserError` that names the file and, for JSON lines, the line.
"""

from __future__ import annotations

import contextlib
import ctypes
import gzip
import hashlib
import json
import os
import re
import shutil
import stat
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from model.support.cli import UserError

LONGEST_LINE = 2**25
"""Bytes of the longest line that is read."""
_HALF_PAIR = re.compile(r"\\u[dD][89a-fA-F]")  # every half of a pair, and every pair
LONGEST_JSON = 2**28  # bytes; a sanity limit, tokenizers of 256,000 pieces take 35 MB
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # of renameat2(2)


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike[str], mode: int | None = None) -> Iterator[Path]:
    """Yield a temporary path in `path`'s folder; on a clean exit sync it and rename it to `path`, else remove it.

    `mode` sets the permissions (for example 0o600 for files that hold a note's text); by default the umask decides. A
    symbolic link stays, and the file that it points to is replaced.
    """
    path = Path(os.path.realpath(path))
    check_writable(path)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        os.chmod(temporary, mode if mode is not None else 0o666 & ~_umask())
        os.replace(temporary, path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(
    path: str | os.PathLike[str], keep_others: bool = False, drop: re.Pattern[str] | None = None
) -> Iterator[Path]:
    """Yield a new folder beside `path`; on a clean exit it takes `path`'s place. An older folder there is removed with
    all that is in it; with `keep_others` the new one first gets what it lacks of that, but for names that match `drop`.
    A symbolic link stays, and the folder that it points to is replaced. A file there is left alone: a UserError.

    Everything in it is synced before it is renamed, so that no power cut leaves empty files under a name.
    """
    path = Path(os.path.realpath(path))
    check_writable(path)
    if path.exists() and not path.is_dir():
        raise UserError(f"cannot write {path}: a file is there, and a folder would take its place; give another name")
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent))
    try:
        yield temporary
        if keep_others:
            _link_others(path, temporary, drop)
        os.chmod(temporary, 0o777 & ~_umask())
        for entry in temporary.rglob("*"):
            if not entry.is_symlink():
                sync_folder(entry)
        sync_folder(temporary)
        if not path.exists():
            os.replace(temporary, path)
        elif not exchange(temporary, path):
            # two renames; killed between them, the older folder is .NAME.*.old/was (model/support/lock.py puts it back)
            old = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".old", dir=path.parent))
            os.replace(path, old / "was")
            os.replace(temporary, path)
            shutil.rmtree(old)
        sync_folder(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def exchange(one: Path, other: Path) -> bool:
    """Exchange two names in one step, so that neither is missing at any time; False where the system cannot."""
    try:
        renameat2 = ctypes.CDLL(None).renameat2
    except (AttributeError, OSError):  # no Linux, or a C library before 2018
        return False
    return renameat2(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) == 0


def _link_others(old: Path, new: Path, drop: re.Pattern[str] | None) -> None:
    for entry in old.iterdir() if old.is_dir() else ():
        if (new / entry.name).exists() or (drop is not None and drop.fullmatch(entry.name)):
            continue
        if entry.is_dir():
            shutil.copytree(entry, new / entry.name, copy_function=_link)
        else:
            _link(entry, new / entry.name)


def _link(source: str | Path, target: str | Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copy2(source, target)


def check_writable(path: Path) -> None:
    """Make `path`'s folder, or raise a UserError that says why `path` cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; choose another place for it") from error
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"cannot write {path}: its folder is not writable; choose another place for it")


def check_not_read(out: Path, *read: Path) -> None:
    """Raise a UserError where `out` is one of the files that are read, or is in a folder that is read: what is made
    would take its place."""
    places = set(map(os.path.realpath, read))  # of links in a circle it gives one, where Path.resolve raises
    if os.path.realpath(out) in places or (out.is_file() and os.path.realpath(out.parent) in places):
        raise UserError(f"{out}: is itself read; choose another --out")


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` durable, or a file's content."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_text(path: str | os.PathLike[str], text: str, mode: int | None = None) -> None:
    """Write `text` as UTF-8, atomically."""
    with atomic_file(path, mode) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write `value` as indented UTF-8 JSON, atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_jsonl(path: str | os.PathLike[str], rows: Iterable[Mapping[str, Any]]) -> int:
    """Write one JSON object a line, atomically, for its owner only: lines are of notes. Returns how many."""
    count = 0
    with atomic_file(path, mode=0o600) as temporary, open(temporary, "w", encoding="utf-8") as out:
        for row in rows:
            out.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    return count


def check_regular(path: str | os.PathLike[str]) -> None:
    """Raise a UserError where a file is missing, a folder, or a pipe, socket or device: opening one of those may wait
    forever, reading one may never end."""
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"{path}: no such file") from error
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a pipe, socket or device"
        raise UserError(f"{path}: {kind}, not a file")


def read_json(path: str | os.PathLike[str], most: int = LONGEST_JSON, unique: bool = False) -> Any:
    """The JSON value in a file of at most `most` bytes. Raises UserError where it is missing, longer or not JSON, and
    with `unique` where an object has a name twice (readers differ in which one counts)."""
    check_regular(path)
    with open(path, "rb") as file:
        if (size := os.fstat(file.fileno()).st_size) > most:
            raise UserError(f"{path}: {size} bytes, more than the {most} that such a file may have; it is corrupt")
        raw = file.read()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start})") from error
    return parse_json(path, text, unique)


def parse_json(path: str | os.PathLike[str], text: str, unique: bool = False) -> Any:
    """A file's text as JSON, or a UserError that names the place."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in pairs:
            if name in found:
                raise UserError(f"{path}: {name!r} is there twice; the file is corrupt")
            found[name] = value
        return found

    try:
        return json.loads(text, object_pairs_hook=once if unique else None)
    except UserError:
        raise
    except (ValueError, RecursionError) as error:  # not JSON, too deep, or a number of thousands of digits
        where = f" at line {error.lineno}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
        raise UserError(f"{path}: not JSON{where}; is the file whole?") from error


def numbered_lines(path: str | os.PathLike[str]) -> Iterator[tuple[int, bytes]]:
    """Yield (number from 1, line) for every line that is not blank; a file named .gz is decompressed.

    Of a line beyond LONGEST_LINE only its first LONGEST_LINE + 1 bytes are kept, which `parse_json_line` refuses.
    Raises UserError where the file cannot be read, and where it holds no line.
    """
    number, found = 0, False
    check_regular(path)
    try:
        with (gzip.open if str(path).endswith(".gz") else open)(path, "rb") as lines:
            while line := lines.readline(LONGEST_LINE + 1):
                number += 1
                rest = line
                while rest and not rest.endswith(b"\n"):
                    rest = lines.readline(LONGEST_LINE + 1)
                if line.strip():
                    found = True
                    yield number, line
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path}: not a whole gzip file (after line {number})") from error
    if not found:
        raise UserError(f"{path}: empty: it holds no record; give one JSON object a line")


def read_jsonl(
    path: str | os.PathLike[str],
    required: Iterable[str] = (),
    check: Callable[[dict[str, Any]], object] = lambda record: None,
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number from 1, object) for every line of a JSON-lines file (or .jsonl.gz); blank lines are passed
    over. Raises UserError as `numbered_lines` and `parse_json_line` do, and where `check` raises a ValueError."""
    fields = tuple(required)
    for number, line in numbered_lines(path):
        record = parse_json_line(path, number, line, fields)
        try:
            check(record)
        except ValueError as error:
            raise UserError(f"{path}:{number}: {error}") from error
        yield number, record


def parse_json_line(
    path: str | os.PathLike[str], number: int, line: bytes, required: Iterable[str] = ()
) -> dict[str, Any]:
    """One line of a JSON-lines file as an object with the `required` fields; `id`, `patient` and a required `text` as
    text.

    Raises UserError, naming file and line, for what is no JSON object, for half of a surrogate pair or NaN (both can be
    read and not be written again), for an id that is neither text nor a whole number, and for a line beyond
    LONGEST_LINE.
    """
    where = f"{path}:{number}"
    constants: list[str] = []
    if len(line) > LONGEST_LINE:
        raise UserError(f"{where}: a line of more than {LONGEST_LINE:,} bytes; is a line end missing?")
    try:
        text = line.decode("utf-8-sig" if number == 1 else "utf-8")  # some editors begin with a mark
        record = json.loads(text, parse_constant=constants.append)
        if _HALF_PAIR.search(text):
            json.dumps(record, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 text (byte {error.start} of the line)") from error
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where}: holds half a surrogate pair (an escape \\ud800 … \\udfff alone); not Unicode"
        ) from error
    except (ValueError, RecursionError) as error:
        column = f" (column {error.colno})" if isinstance(error, json.JSONDecodeError) else ""
        cause = "give one JSON object a line"
        if b"\r" in line.strip():
            cause = "its lines end in a carriage return alone; save it with line feeds"
        raise UserError(f"{where}: not JSON{column}; {cause}") from error
    if constants:
        raise UserError(f"{where}: {constants[0]} is not a JSON number; write null")
    if not isinstance(record, dict):
        raise UserError(f"{where}: a {type(record).__name__}, not a JSON object; give one object a line")
    missing = [field for field in required if field not in record]
    if missing:
        raise UserError(f"{where}: lacks the field {', '.join(map(repr, missing))}")
    if "text" in required and not isinstance(record["text"], str):
        raise UserError(f"{where}: 'text' is not text")
    for field in {"id", "patient"} & record.keys():
        value = record[field]
        if isinstance(value, int) and not isinstance(value, bool):
            record[field] = str(value)
        elif not isinstance(value, str) and (value is not None or field in required):
            raise UserError(f"{where}: {field!r} is neither text nor a whole number")
    return record


def sha256_file(path: str | os.PathLike[str]) -> str:
    """The SHA-256 of a file's bytes, as hexadecimal."""
    check_regular(path)
    with open(path, "rb") as data:
        return hashlib.file_digest(data, "sha256").hexdigest()
