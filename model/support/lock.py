"""An output belongs to one job at a time, and nothing that a user had is replaced unasked.

    with hold(out): …                  a job that resumes where it was interrupted: extraction, training, an experiment
    with output(out, overwrite): …    a program that makes `out` in one go: an importer, convert, merge

A lock is a file beside the output (`.NAME.lock`) under flock, which the kernel releases however the process ends.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from model.support.cli import UserError
from model.support.files import check_not_read, check_writable, read_json, write_json

TEMPORARY = re.compile(r"\.(.+)\.[a-z0-9_]{8}\.(part|old)")  # what files.py names a write that is not yet whole


@contextlib.contextmanager
def hold(out: str | os.PathLike[str]) -> Iterator[None]:
    """Be the only process that writes `out`, a file or a folder; what a killed one left beside it is removed first.

    Under torchrun the first rank holds it for all. Raises UserError where another process holds it, where it is a
    symbolic link, and where its folder cannot be written. On a file system without locks a warning says so.
    """
    out = Path(out)
    if out.is_symlink():
        raise UserError(f"{out}: a symbolic link; give the place itself, {os.path.realpath(out)}, or another name")
    check_writable(out)
    place = out.resolve()
    path = _lock_of(place)
    handle = _take(path, out)
    try:
        os.ftruncate(handle, 0)
        os.write(handle, f"process {os.getpid()} on {socket.gethostname()}".encode())
        for left in list(path.parent.iterdir()):
            found = TEMPORARY.fullmatch(left.name)
            if found is not None and found[1] == place.name:
                _sweep(left)
        yield
    finally:
        path.unlink(missing_ok=True)  # while it is held: whoever opened it meanwhile finds another file and tries again
        os.close(handle)


def _take(path: Path, out: Path) -> int:
    """The lock file, opened and locked."""
    while True:
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        except OSError as error:
            raise UserError(f"cannot write {out}: {error.strerror}; choose another place for it") from error
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(handle, 200, 0).decode(errors="replace") or "another process"
            os.close(handle)
            raise UserError(f"{out}: {holder} is writing it; wait for its end, or choose another name") from None
        except OSError as error:
            print(f"{out}: cannot be locked ({error.strerror}): see that no second job writes it", file=sys.stderr)
            return handle
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), os.stat(path)):
                return handle
        os.close(handle)  # its holder removed it just before


@contextlib.contextmanager
def output(out: str | os.PathLike[str] | None, overwrite: bool, *read: str | os.PathLike[str]) -> Iterator[None]:
    """`hold`, where `out` must not exist (an empty folder may) unless `overwrite`, and is never one of the files that
    are `read`. None: nothing will be written."""
    if out is None:
        yield
        return
    out = Path(out)
    check_not_read(out, *map(Path, read))
    with hold(out):
        if not overwrite and out.exists() and not (out.is_dir() and is_empty(out)):
            raise UserError(f"{out}: exists; choose another name, or give --overwrite to replace it")
        yield


def claim(out: Path, mark: Path, identity: Mapping[str, Any], begun: bool) -> dict[str, Any]:
    """Take `out` for the job of this identity, which `mark` then says; returns what the mark holds.

    `begun`: there is something under the name. Raises UserError, and writes nothing, where that is not this job's.
    """
    text = json.dumps(identity, sort_keys=True)
    stamped = {**json.loads(text), "hash": hashlib.sha256(text.encode()).hexdigest()}
    ours = is_claimed(mark)
    if not ours and (begun or os.path.lexists(mark)):
        raise UserError(f"{out if begun else mark}: exists and is no job's of ours; choose another --out or remove it")
    known = read_json(mark) if begun else stamped
    if known["hash"] != stamped["hash"]:
        differs = [key for key, value in stamped.items() if key != "hash" and known.get(key) != value]
        raise UserError(
            f"{out}: belongs to another job (other {', '.join(differs) or 'options'}); choose another "
            "--out or remove it"
        )
    if not begun:
        write_json(mark, stamped)
    return stamped


def is_claimed(mark: Path) -> bool:
    """Whether `mark` is one that `claim` has written."""
    try:
        known = read_json(mark)
    except (UserError, OSError):
        return False
    return isinstance(known, dict) and "hash" in known


def is_empty(folder: Path) -> bool:
    """Whether a folder holds nothing but what killed writes left."""
    return all(TEMPORARY.fullmatch(entry.name) for entry in folder.iterdir())


def discard(folder: Path) -> None:
    """Remove a folder that this process holds. Killed meanwhile, the next `hold` removes the rest."""
    old = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".old", dir=folder.parent))
    os.replace(folder, old / "discarded")
    shutil.rmtree(old)


def sweep(folder: Path) -> None:
    """Remove what killed writes left in a folder that this process holds: it may hold notes. What another process
    holds in there is left alone."""
    for place, folders, files in os.walk(folder):
        for name in (*folders, *files):
            found = TEMPORARY.fullmatch(name)
            if found and not _lock_of(Path(place, found[1])).exists():
                _sweep(Path(place, name))
        folders[:] = [name for name in folders if not _lock_of(Path(place, name)).exists()]


def _sweep(left: Path) -> None:
    found = TEMPORARY.fullmatch(left.name)
    assert found is not None
    name, was = left.with_name(found[1]), left / "was"
    if was.exists() and not name.exists():
        os.replace(was, name)  # killed after the older folder was moved aside and before the new one took its name
    if left.is_dir() and not left.is_symlink():
        shutil.rmtree(left)
    else:
        left.unlink()


def _lock_of(out: Path) -> Path:
    return out.with_name(f".{out.name}.lock")
