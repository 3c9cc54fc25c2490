"""Output locks: one process writes an output at a time, and nothing is overwritten unless asked for.

    with hold(out): …                 for jobs that resume after an interruption: extraction, training, experiments
    with output(out, overwrite): …    for programs that write `out` in one go: importers, convert, merge

The lock is a file beside the output (`.NAME.lock`) under flock, which the kernel releases however the process ends.
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

TEMPORARY = re.compile(r"\.(.+)\.[a-z0-9_]{8}\.(part|old)")  # the names of temporary files in model/support/files.py


@contextlib.contextmanager
def hold(out: str | os.PathLike[str]) -> Iterator[None]:
    """Lock `out`, a file or a folder, for this process, and remove what killed processes left beside it.

    Under torchrun only rank 0 calls this. Raises UserError if another process holds the lock, if `out` is a symbolic
    link, or if its folder cannot be written. Prints a warning on a file system without locks.
    """
    out = Path(out)
    if out.is_symlink():
        raise UserError(f"{out}: a symbolic link; give its target, {os.path.realpath(out)}, or another name")
    target = out.resolve()
    if not target.name:
        raise UserError(f"{out}: the root folder; name a folder in it")
    check_writable(out)
    path = _lock_file(target)
    handle = _acquire(path, out)
    try:
        os.ftruncate(handle, 0)
        os.write(handle, f"process {os.getpid()} on {socket.gethostname()}".encode())
        for entry in list(path.parent.iterdir()):
            found = TEMPORARY.fullmatch(entry.name)
            if found is not None and found[1] == target.name:
                _remove_temporary(entry)
        yield
    finally:
        path.unlink(missing_ok=True)  # before the lock is released; `_acquire` checks that its file still exists
        os.close(handle)


def _acquire(path: Path, out: Path) -> int:
    """Open and lock the lock file of `out`; returns its descriptor."""
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
            print(f"{out}: cannot be locked ({error.strerror}): make sure that no other job writes it", file=sys.stderr)
            return handle
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), os.stat(path)):
                return handle
        os.close(handle)  # the previous holder removed the file before it was locked: try again


@contextlib.contextmanager
def output(out: str | os.PathLike[str] | None, overwrite: bool, *read: str | os.PathLike[str]) -> Iterator[None]:
    """`hold`, for an `out` that must not exist yet unless `overwrite` (an empty folder may) and is none of the inputs
    `read`. Does nothing if `out` is None."""
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
    """Reserve `out` for a resumable job: write the job's `identity` and its hash to the file `mark`, and return both.

    `begun`: `out` exists already. Raises UserError, and writes nothing, if `out` or `mark` is not this job's.
    """
    text = json.dumps(identity, sort_keys=True)
    stamped = {**json.loads(text), "hash": hashlib.sha256(text.encode()).hexdigest()}
    if not is_claimed(mark) and (begun or os.path.lexists(mark)):
        raise UserError(
            f"{out if begun else mark}: exists and was not written by a job; choose another --out or remove it"
        )
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
    """True if `claim` wrote the file `mark`."""
    try:
        known = read_json(mark)
    except (UserError, OSError):
        return False
    return isinstance(known, dict) and "hash" in known


def is_empty(folder: Path) -> bool:
    """True if a folder holds nothing but temporary files of killed processes."""
    return all(TEMPORARY.fullmatch(entry.name) for entry in folder.iterdir())


def discard(folder: Path) -> None:
    """Remove a folder that this process holds, in one step. If killed meanwhile, the next `hold` removes the rest."""
    old = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".old", dir=folder.parent))
    os.replace(folder, old / "discarded")
    shutil.rmtree(old)


def sweep(folder: Path) -> None:
    """Remove temporary files of killed processes (they may hold notes) in a folder that this process holds, except
    those of outputs that another process holds."""
    for parent, folders, files in os.walk(folder):
        for name in (*folders, *files):
            found = TEMPORARY.fullmatch(name)
            if found and not _lock_file(Path(parent, found[1])).exists():
                _remove_temporary(Path(parent, name))
        folders[:] = [name for name in folders if not _lock_file(Path(parent, name)).exists()]


def _remove_temporary(temporary: Path) -> None:
    """Remove a temporary file or folder; restores the old folder if `atomic_folder` was killed while replacing it."""
    found = TEMPORARY.fullmatch(temporary.name)
    assert found is not None
    path, was = temporary.with_name(found[1]), temporary / "was"
    if was.exists() and not path.exists():
        os.replace(was, path)
    if temporary.is_dir() and not temporary.is_symlink():
        shutil.rmtree(temporary)
    else:
        temporary.unlink()


def _lock_file(out: Path) -> Path:
    return out.with_name(f".{out.name}.lock")
