"""A job that may be killed at any moment: its output grows batch by batch and goes on where it stopped.

While it runs, OUT.part holds what is done and OUT.job.json says which job that is (a hash of notes and options); both
are this job's alone. A batch is a function of the notes' order and lengths, so the same batches come whether or not
the job was interrupted; a batch is one write followed by a sync, and whatever a kill left behind it is cut off. At the
end OUT.part is renamed to OUT. With several ranks, rank r takes the batches r, r + N, … and writes OUT.r.part; the
first rank merges them in order.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from infer.extract.notes import Note
from model.support.cli import UserError
from model.support.files import check_writable, read_json, sync_folder, write_json

END = 2**20  # bytes of each end of a weights' file that tell it from another


def batches(notes: Iterable[Note], most: int, letters: int) -> Iterator[list[Note]]:
    """Notes in order, in batches of at most `most` notes and about `letters` characters.

    They are not sorted by length: prompts are read ragged, without padding, so that would save nothing there, while a
    job would have to hold all notes, or its records' places, to write them in order.
    """
    held: list[Note] = []
    size = 0
    for note in notes:
        if held and (len(held) == most or size + len(note.text) > letters):
            yield held
            held, size = [], 0
        held.append(note)
        size += len(note.text)
    if held:
        yield held


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
        if file.exists():
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


class Job:
    """One job's files. `identity` is everything that decides the output's bytes. Of processes that hold one model
    together, and so answer the same notes, one `writes`."""

    def __init__(
        self, out: Path, identity: dict[str, Any], rank: int = 0, world: int = 1, writes: bool = True
    ) -> None:
        self.out, self.rank, self.world, self.writes = out, rank, world, writes
        self.mark = mark_of(out)
        self.part = self.part_of(rank)
        text = json.dumps({**identity, "world": world}, sort_keys=True)
        self.identity = {**identity, "world": world, "hash": hashlib.sha256(text.encode()).hexdigest()}

    def part_of(self, rank: int) -> Path:
        return self.out.with_name(self.out.name + (f".{rank}.part" if self.world > 1 else ".part"))

    def claim(self) -> bool:
        """Take the output's name for this job; True where the job is already finished.

        Raises UserError, and writes nothing, where the name belongs to another job.
        """
        check_writable(self.out)
        if self.out.is_dir():
            raise UserError(f"{self.out}: a folder; name the output file")
        known = read_json(self.mark) if self.mark.exists() else None
        if known is not None and not (isinstance(known, dict) and "hash" in known):
            raise UserError(f"{self.mark}: exists and is no job's of ours; choose another --out or remove it")
        begun = self.out.exists() or any(is_part(file.name, self.out.name) for file in self.out.parent.glob("*.part"))
        if not begun:  # a mark without output: a job that never started
            known = None
        if known is None and begun:
            raise UserError(f"{self.out}: exists and is no job's of ours; choose another --out or remove it")
        if known is not None and known["hash"] != self.identity["hash"]:
            differs = [k for k, v in self.identity.items() if k != "hash" and known.get(k) != v]
            raise UserError(
                f"{self.out}: belongs to another job (other {', '.join(differs) or 'options'}); choose another --out "
                f"or remove it and {self.mark.name}"
            )
        if known is None and self.rank == 0 and self.writes:
            write_json(self.mark, self.identity)
        if not self.out.exists():
            return False
        self.drop_parts()  # a kill just after the output got its name leaves them
        return True

    def drop_parts(self) -> None:
        if self.rank == 0 and self.writes:
            for rank in range(self.world):
                self.part_of(rank).unlink(missing_ok=True)

    def resume(self, sizes: Iterable[int]) -> int:
        """Cut the part file after its last whole batch, given this rank's batch sizes in order; batches done."""
        if not self.part.exists():
            return 0
        done, end, lines = 0, 0, 0
        with open(self.part, "rb") as data:
            for size in sizes:
                at, whole = end, True
                for _ in range(size):
                    line = data.readline()
                    at += len(line)
                    whole = whole and line.endswith(b"\n")
                if not whole:
                    break
                done, end, lines = done + 1, at, lines + size
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

    def finish(self, sizes: Iterable[int]) -> tuple[int, int]:
        """Give the output its name, merging the ranks' parts batch by batch; (notes, errors)."""
        if self.world == 1:
            self.part.touch()
            whole = self.part
        else:
            whole = self.out.with_name(self.out.name + ".merged.part")
            for part in map(self.part_of, range(self.world)):
                if not part.exists():
                    raise UserError(f"{part}: not there; every rank must write into the same folder, so give --out in "
                                    "one that all machines share")  # fmt: skip
            parts = [open(self.part_of(rank), "rb") for rank in range(self.world)]  # noqa: SIM115
            with open(whole, "wb") as out:
                for number, size in enumerate(sizes):
                    for _ in range(size):
                        out.write(parts[number % self.world].readline())
                out.flush()
                os.fsync(out.fileno())
            for part in parts:
                part.close()
        os.replace(whole, self.out)
        sync_folder(self.out.parent)
        self.drop_parts()
        return self.count()

    def count(self) -> tuple[int, int]:
        """(notes, errors) in the finished output."""
        notes = errors = 0
        with open(self.out, "rb") as lines:
            for line in lines:
                notes += 1
                errors += "error" in json.loads(line)
        return notes, errors
