"""A job that may be killed at any moment: its output grows batch by batch, and it continues where it stopped.

While it runs, OUT.part holds what is done and OUT.job.json says which job that is (a hash of notes and options); both
are this job's alone (model/support/lock.py). A batch is a function of the notes' order, so the same batches come
whether or not the job was interrupted; a batch is one write followed by a sync, and whatever a kill left behind it is
cut off. At the end OUT.part is renamed to OUT, if it holds a record for each note and the notes are those of the
beginning. With several ranks, rank r takes the batches r, r + N, … and writes OUT.r.part; the first rank merges them in
order.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from infer.extract.notes import Note, fingerprint
from model.support.cli import UserError
from model.support.files import parse_json_line, read_json, sync_folder, write_json
from model.support.lock import claim, hold

END = 2**20  # bytes of each end of a weights' file that tell it from another


def batches(notes: Iterable[Note], most: int) -> Iterator[list[Note]]:
    """Notes in order, in batches of `most` notes.

    They are not sorted by length: prompts are read ragged, without padding, so that would save nothing there, while a
    job would have to hold all notes, or its records' places, to write them in order.
    """
    left = iter(notes)
    while batch := list(islice(left, most)):
        yield batch


def mark_of(out: Path) -> Path:
    return out.with_name(out.name + ".job.json")


def begun(out: Path) -> dict[str, Any]:
    """What the job of this output, finished or not, is made of; {} where there is none."""
    known = read_json(mark_of(out)) if mark_of(out).exists() else None
    return known if isinstance(known, dict) else {}


def stamp(path: str | Path) -> list[Any]:
    """A model's or adapter's place, and its files' names, sizes and a hash of their two ends: enough to see that it was
    trained anew, at no cost where a file has many gigabytes."""
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


def is_part(name: str, out: str) -> bool:
    """Whether a file's name is that of what a job has done of this output; o32.part is none of o3's."""
    return re.fullmatch(rf"{re.escape(out)}(\.\d+|\.merged)?\.part", name) is not None


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
    """One job's files. `identity` is everything that decides the output's bytes. Of processes that hold one model
    together, and so answer the same notes, one `writes`."""

    def __init__(self, out: Path, identity: dict[str, Any], rank: int = 0, world: int = 1, writes: bool = True) -> None:
        self.out, self.rank, self.world, self.writes = out, rank, world, writes
        self.part = self.part_of(rank)
        self.identity = {**identity, "world": world}

    def part_of(self, rank: int) -> Path:
        return self.out.with_name(self.out.name + (f".{rank}.part" if self.world > 1 else ".part"))

    def lock(self) -> contextlib.AbstractContextManager[None]:
        """Keep every other job off this output, and another rank off this rank's part, while the process lives."""
        return hold(self.out if self.rank == 0 else self.part) if self.writes else contextlib.nullcontext()

    def claim(self) -> bool:
        """Take the output's name for this job; True where the job is already finished.

        Raises UserError, and writes nothing, where the name belongs to another job.
        """
        if self.out.is_dir():
            raise UserError(f"{self.out}: a folder; name the output file")
        if self.rank == 0 and self.writes:
            begun = self.out.exists() or any(is_part(file.name, self.out.name) for file in self.out.parent.iterdir())
            claim(self.out, mark_of(self.out), self.identity, begun)
            if self.out.exists():
                self.drop_parts()  # a kill just after the output got its name leaves them
        return self.out.exists()

    def drop_parts(self) -> None:
        if self.rank == 0 and self.writes:
            for rank in range(self.world):
                self.part_of(rank).unlink(missing_ok=True)

    def resume(self, sizes: Iterable[int]) -> int:
        """Cut the part file after its last whole batch, given this rank's batch sizes in order; batches done.

        Raises UserError where a whole line of it is no JSON object: then this job did not write it so.
        """
        if not self.part.exists():
            return 0
        done, end, lines_before = 0, 0, 0
        with open(self.part, "rb") as data:
            for size in sizes:
                lines = [data.readline() for _ in range(size)]
                if not all(line.endswith(b"\n") for line in lines):
                    break
                for number, line in enumerate(lines, start=lines_before + 1):
                    parse_record(self.part, number, line)
                done, end, lines_before = done + 1, end + sum(map(len, lines)), lines_before + size
        if self.writes:
            with open(self.part, "r+b") as data:
                data.truncate(end)
                os.fsync(data.fileno())
        return done

    def append(self, records: list[dict[str, Any]]) -> None:
        """One batch: one write, one sync."""
        if not self.writes:
            return
        data = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()
        with open(self.part, "ab") as out:
            out.write(data)
            out.flush()
            os.fsync(out.fileno())

    def finish(self, sizes: Sequence[int], notes: Unchanged) -> None:
        """Give the output its name, merging the ranks' parts batch by batch.

        Raises UserError, and keeps what is answered, where the notes are not those of the beginning or the parts hold
        another number of records.
        """
        notes.check()
        try:
            notes.check(wholly=True)
        except UserError:  # at an unknown time: the parts may hold answers to other notes, so this job cannot continue
            write_json(mark_of(self.out), {**self.identity, "notes": "changed while the job ran", "hash": ""})
            raise
        whole = self.part
        if self.world == 1:
            whole.touch()
        else:
            whole = self.out.with_name(self.out.name + ".merged.part")
            self.merge(whole, sizes)
        records, _ = tally(whole)
        if records != sum(sizes):
            raise UserError(
                f"{whole}: {records} records for {sum(sizes)} notes: something else wrote to it; remove "
                f"{self.out.name}*.part, and the same command answers the notes again"
            )
        os.replace(whole, self.out)
        sync_folder(self.out.parent)
        self.drop_parts()

    def merge(self, whole: Path, sizes: Iterable[int]) -> None:
        paths = [self.part_of(rank) for rank in range(self.world)]
        for path in paths:
            if not path.exists():
                raise UserError(
                    f"{path}: not there; every rank must write into the same folder, so give --out in one "
                    "that all machines share"
                )
        with contextlib.ExitStack() as stack:
            parts = [stack.enter_context(open(path, "rb")) for path in paths]
            out = stack.enter_context(open(whole, "wb"))
            for number, size in enumerate(sizes):
                for _ in range(size):
                    out.write(parts[number % self.world].readline())
            for part in parts:
                out.writelines(part)  # more records than notes, which `finish` counts
            out.flush()
            os.fsync(out.fileno())


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
