"""A job that may be killed at any moment, and goes on where it stopped.

Notes are taken in epochs of some hundreds. No request goes from one epoch to the next, so an epoch's records are a
function of its notes: the same bytes, whether or not the job was interrupted and whichever process answers it.
OUT.parts/N.jsonl holds epoch N, written in one go, and OUT.job.json says which job that is (a hash of notes and
options). Processes take epochs as they become free: OUT.parts/N.taken says which one has it, until the next call. At
the end the first process joins the parts as OUT, if they hold a record for each note and the notes are those of the
beginning.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from infer.extract.notes import Note, fingerprint
from model.support.cli import UserError
from model.support.files import atomic_file, parse_json_line, read_json, write_json, write_jsonl
from model.support.lock import claim, hold, is_claimed, sweep

EPOCH = 32  # times the notes at once: at an epoch's end fewer are left to answer side by side
END = 2**20  # bytes of each end of a weights' file that tell it from another


def epochs(notes: Iterable[Note], most: int) -> Iterator[list[Note]]:
    """Notes in order, `most` at a time."""
    left = iter(notes)
    while epoch := list(islice(left, most)):
        yield epoch


def mark_of(out: Path) -> Path:
    return out.with_name(out.name + ".job.json")


def begun(out: Path) -> dict[str, Any]:
    """What the job of this output, finished or not, is made of; {} where there is none."""
    known = read_json(mark_of(out)) if mark_of(out).exists() else None
    return known if isinstance(known, dict) else {}


def stamp(path: str | Path) -> list[Any]:
    """A model's or adapter's path, and its files' names, sizes and a hash of their two ends: enough to see that it was
    trained anew, without reading files of many gigabytes."""
    where = Path(path)
    found: list[Any] = [str(where)]
    for file in sorted(f for f in where.iterdir() if f.is_file()) if where.is_dir() else [where]:
        if file.is_file():
            size = file.stat().st_size
            with open(file, "rb") as data:
                digest = hashlib.sha256(data.read(END))
                data.seek(max(END, size - END))
                digest.update(data.read(END))
            found.append([file.name, size, digest.hexdigest()])
    return found


class Unchanged:
    """The notes' file or folder as a job found it. `check` raises UserError once it holds anything else."""

    def __init__(self, path: Path) -> None:
        self.path, self.seen = path, stat_of(path)
        self.hash = fingerprint(path)

    def check(self, wholly: bool = False) -> None:
        """Read it again where it was written to since, or `wholly` (a folder's files may be written to unseen)."""
        now = stat_of(self.path)
        if wholly or now != self.seen:
            if fingerprint(self.path) != self.hash:
                raise UserError(
                    f"{self.path}: was changed while the job ran; what is answered is kept, but not under "
                    "the output's name: put the old notes back, or choose another --out"
                )
            self.seen = now


def stat_of(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


class Job:
    """One job's files. `identity` is everything that decides the output's bytes. Of the processes the one of rank 0
    alone takes the output's name, and joins the parts."""

    def __init__(self, out: Path, identity: dict[str, Any], rank: int = 0) -> None:
        self.out, self.identity, self.rank = out, identity, rank
        self.parts = out.with_name(out.name + ".parts")

    def part(self, epoch: int) -> Path:
        return self.parts / f"{epoch}.jsonl"

    def taken(self, epoch: int) -> Path:
        return self.parts / f"{epoch}.taken"

    def lock(self) -> contextlib.AbstractContextManager[None]:
        """Keep every other job off this output while the process lives."""
        return hold(self.out) if self.rank == 0 else contextlib.nullcontext()

    def claim(self) -> bool:
        """Take the output's name for this job; True where the job is already finished.

        Raises UserError, and writes nothing, where the name belongs to another job.
        """
        if self.rank == 0:
            if os.path.lexists(self.parts) and not is_claimed(mark_of(self.out)):
                raise UserError(f"{self.parts}: exists and was not written by a job; choose another --out or remove it")
            begun = self.out.exists() or any(self.parts.glob("*.jsonl"))
            claim(self.out, mark_of(self.out), self.identity, begun)
            if self.out.exists():
                self.drop_parts()  # a kill just after the output got its name leaves them
            else:
                self.parts.mkdir(exist_ok=True)
                sweep(self.parts)
                for mark in sorted(self.parts.glob("*.taken")):  # of processes that have ended
                    if not self.part(int(mark.stem)).exists():
                        owner = f"rank {mark.read_text()} ended in epoch {mark.stem}"
                        print(f"{self.out}: {owner}, which is answered again", file=sys.stderr)
                    mark.unlink()
        return self.out.exists()

    def drop_parts(self) -> None:
        shutil.rmtree(self.parts, ignore_errors=True)

    def done(self, sizes: Sequence[int]) -> set[int]:
        """The epochs that are answered, of epochs of these sizes. Raises UserError where a part is not as it was
        written."""
        found = set()
        for epoch, size in enumerate(sizes):
            if self.part(epoch).exists():
                self.check(epoch, size)
                found.add(epoch)
        return found

    def check(self, epoch: int, size: int) -> None:
        records, _ = tally(self.part(epoch))
        if records != size:
            raise UserError(
                f"{self.part(epoch)}: {records} records for {size} notes: something else wrote to it; remove it, and "
                "the same command answers its notes again"
            )

    def take(self, epoch: int) -> bool:
        """Whether the epoch is this process's to answer: it is the first to ask for it."""
        try:
            with open(self.taken(epoch), "x") as mark:
                mark.write(str(self.rank))
        except FileExistsError:
            return False
        except FileNotFoundError as error:
            raise UserError(
                f"{self.parts}: not there; every process must write into the same folder, so give --out in one that "
                "all machines share"
            ) from error
        return True

    def write(self, epoch: int, records: Iterable[dict[str, Any]]) -> None:
        write_jsonl(self.part(epoch), records)

    def remember(self, name: str, value: Any) -> None:
        """Write into the job's file what its further course depends on."""
        write_json(mark_of(self.out), {**begun(self.out), name: value})

    def missing(self, sizes: Sequence[int]) -> str:
        """Which processes took epochs and have not answered them; "" where all are answered."""
        left = [epoch for epoch in range(len(sizes)) if not self.part(epoch).exists()]
        owners: dict[str, list[str]] = {}
        for epoch in left:
            owner = f"rank {self.taken(epoch).read_text()}" if self.taken(epoch).exists() else "nobody"
            owners.setdefault(owner, []).append(str(epoch))
        return "; ".join(f"{owner} had epoch {', '.join(held)}" for owner, held in owners.items())

    def finish(self, sizes: Sequence[int], notes: Unchanged) -> None:
        """Join the parts as the output.

        Raises UserError, and keeps what is answered, where the notes are not those of the beginning, an epoch was not
        answered, or a part holds another number of records.
        """
        notes.check()
        try:
            notes.check(wholly=True)
        except UserError:  # at an unknown time: the parts may hold answers to other notes, so this job cannot continue
            write_json(mark_of(self.out), {**self.identity, "notes": "changed while the job ran", "hash": ""})
            raise
        if missing := self.missing(sizes):
            raise UserError(f"{self.out}: not whole: {missing}; the same command answers what is missing")
        for epoch, size in enumerate(sizes):
            self.check(epoch, size)
        with atomic_file(self.out, mode=0o600) as whole, open(whole, "wb") as joined:
            for epoch in range(len(sizes)):
                with open(self.part(epoch), "rb") as part:
                    shutil.copyfileobj(part, joined)
        self.drop_parts()


def tally(path: Path) -> tuple[int, int]:
    """(records, errors) of an output. Raises UserError, with the line, for what is no JSON object."""
    records = errors = 0
    with open(path, "rb") as lines:
        for records, line in enumerate(lines, start=1):
            errors += "error" in parse_record(path, records, line)
    return records, errors


def parse_record(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        return parse_json_line(path, number, line, ("id",))
    except UserError as error:
        raise UserError(f"{error}; {path.name} was changed: remove it, and the same command begins again") from error
