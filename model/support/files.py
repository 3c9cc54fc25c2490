"""Atomic writes, and validated reads of untrusted files.

Writing: under a temporary name, then synced and renamed, so that a path always holds either the old or the new content.
Reading: a malformed file raises a `UserError` that names the file and, for JSON lines, the line.
"""

from __future__ import annotations

import contextlib
import ctypes
import gzip
import hashlib
import json
import math
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

LONGEST_LINE = 2**25  # bytes
LONGEST_JSON = 2**28  # bytes; a sanity limit: a tokenizer.json with 256,000 pieces has 35 MB
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")  # escaped, alone or in a pair
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # of renameat2(2)


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike[str], mode: int | None = None) -> Iterator[Path]:
    """Yield a temporary path in `path`'s folder; on a clean exit sync it and rename it to `path`, else remove it.

    `mode`: permissions, for example 0o600 for files with notes; by default the umask decides. If `path` is a symbolic
    link, its target is replaced.
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
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(
    path: str | os.PathLike[str], keep_others: bool = False, drop: re.Pattern[str] | None = None
) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; on a clean exit sync its files and put it in `path`'s place.

    An existing folder is removed. With `keep_others` its entries are kept, unless the new folder has one of the same
    name or the name matches `drop`. If `path` is a symbolic link, its target is replaced. Raises UserError if `path` is
    a file.
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
                sync(entry)
        sync(temporary)
        if not path.exists():
            os.replace(temporary, path)
        elif not exchange(temporary, path):
            # if killed between the two renames, the old folder is .NAME.*.old/was (model/support/lock.py restores it)
            old = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".old", dir=path.parent))
            os.replace(path, old / "was")
            os.replace(temporary, path)
            shutil.rmtree(old)
        sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def exchange(one: Path, other: Path) -> bool:
    """Swap two paths atomically (renameat2). Returns False if the system cannot."""
    try:
        renameat2 = ctypes.CDLL(None).renameat2
    except (AttributeError, OSError):  # not Linux, or a C library before 2018
        return False
    return renameat2(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) == 0


def _link_others(old: Path, new: Path, drop: re.Pattern[str] | None) -> None:
    """Hard-link (or copy) into `new` what only `old` has, except names that match `drop`."""
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
    """Create `path`'s folder. Raises UserError if `path` cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; choose another place for it") from error
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"cannot write {path}: its folder is not writable; choose another place for it")


def check_not_read(out: Path, *read: Path) -> None:
    """Raise UserError if writing `out` would replace one of the inputs `read`, or a file in one of them."""
    inputs = set(map(os.path.realpath, read))  # Path.resolve would raise on circular links
    if os.path.realpath(out) in inputs or (out.is_file() and os.path.realpath(out.parent) in inputs):
        raise UserError(f"{out}: is itself read; write to another place")


def sync(path: Path) -> None:
    """fsync a file's content, or a folder's entries."""
    handle = os.open(path, os.O_RDONLY)
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
    """Write one JSON object per line, atomically, readable by the owner only (they hold notes). Returns the count."""
    count = 0
    with atomic_file(path, mode=0o600) as temporary, open(temporary, "w", encoding="utf-8") as out:
        for row in rows:
            out.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    return count


def check_regular(path: str | os.PathLike[str]) -> None:
    """Raise UserError if `path` is missing or not a regular file: opening or reading a pipe or device may never end."""
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"{path}: no such file") from error
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a pipe, socket or device"
        raise UserError(f"{path}: {kind}, not a file")


def read_text(path: str | os.PathLike[str], keep_mark: bool = False, most: float = math.inf) -> str:
    """A UTF-8 file's text with its line ends unchanged. `keep_mark`: keep a byte order mark too. Raises UserError if
    the file is missing, larger than `most` bytes or not UTF-8."""
    check_regular(path)
    if (size := os.path.getsize(path)) > most:
        raise UserError(f"{path}: {size} bytes, more than the limit of {most}; it is corrupt")
    try:
        return Path(path).read_bytes().decode("utf-8" if keep_mark else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from error


def read_json(path: str | os.PathLike[str], most: int = LONGEST_JSON, unique: bool = False) -> Any:
    """The JSON value in a file. Raises UserError if the file is missing, larger than `most` bytes or not JSON, and with
    `unique` if an object has a duplicate key (readers differ in which one wins)."""
    return parse_json(path, read_text(path, most=most), unique)


def parse_json(path: str | os.PathLike[str], text: str, unique: bool = False) -> Any:
    """Parse a file's text as JSON. Raises UserError as `read_json` does."""
    try:
        return json.loads(text, object_pairs_hook=without_duplicates if unique else None)
    except KeyError as error:
        raise UserError(f"{path}: {error} is there twice; the file is corrupt") from error
    except (ValueError, RecursionError) as error:  # not JSON, nested too deeply, or a number of thousands of digits
        where = f" at line {error.lineno}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
        raise UserError(f"{path}: not JSON{where}; is the file whole?") from error


def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object's pairs as a dict. Raises KeyError with the first key that is there twice."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise KeyError(name)
        found[name] = value
    return found


def numbered_lines(path: str | os.PathLike[str]) -> Iterator[tuple[int, bytes]]:
    """Yield (number from 1, line) for every line that is not blank; a file named .gz is decompressed.

    A line longer than LONGEST_LINE is cut to LONGEST_LINE + 1 bytes, which `parse_json_line` refuses. Raises UserError
    if the file cannot be read or holds no line.
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
        raise UserError(f"{path}: empty: it holds no record; give one JSON object per line")


def read_jsonl(
    path: str | os.PathLike[str],
    required: Iterable[str] = (),
    check: Callable[[dict[str, Any]], object] = lambda record: None,
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number from 1, object) for every line of a JSON-lines file (or .jsonl.gz) that is not blank.

    Raises UserError as `numbered_lines` and `parse_json_line` do, and if `check` raises ValueError.
    """
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
    """One line of a JSON-lines file as a dict; `id` and `patient` are converted to strings.

    Raises UserError, naming file and line, if the line is longer than LONGEST_LINE or no JSON object, if a `required`
    field is missing or a field is there twice, if `id`, `patient` or a required `text` has the wrong type, and for NaN
    or an unpaired surrogate, which Python reads but cannot write.
    """
    where = f"{path}:{number}"
    constants: list[str] = []
    if len(line) > LONGEST_LINE:
        raise UserError(f"{where}: a line of more than {LONGEST_LINE:,} bytes; is a line end missing?")
    try:
        text = line.decode("utf-8-sig" if number == 1 else "utf-8")  # some editors write a byte order mark
        record = json.loads(text, parse_constant=constants.append, object_pairs_hook=without_duplicates)
        if _SURROGATE.search(text):
            json.dumps(record, ensure_ascii=False).encode()  # raises if one is unpaired
    except KeyError as error:
        raise UserError(f"{where}: a field is there twice; keep one of them") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 text (byte {error.start} of the line)") from error
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where}: holds half a surrogate pair (an escape \\ud800 … \\udfff alone); not Unicode"
        ) from error
    except (ValueError, RecursionError) as error:
        column = f" (column {error.colno})" if isinstance(error, json.JSONDecodeError) else ""
        remedy = "give one JSON object per line"
        if b"\r" in line.strip():
            remedy = "its lines end in a carriage return alone; save it with line feeds"
        raise UserError(f"{where}: not JSON{column}; {remedy}") from error
    if constants:
        raise UserError(f"{where}: {constants[0]} is not a JSON number; write null")
    if not isinstance(record, dict):
        raise UserError(f"{where}: a {type(record).__name__}, not a JSON object; give one object per line")
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
