"""A repaired note beside its original: what infer.extract --repair reads, and the way back of its answers' places.

    original   T2 tumor of the LUL, invasvie.        repaired   T2 tumor of the left upper lobe, invasive.
    answered   "left upper lobe" at 16–31            written    "LUL" at 16–19
    answered   "invasive" at 33–41                   written    "invasive" at 21–29, where the note has "invasvie"

Places are the original's: answers point into it. An abbreviation that was expanded is answered as
the note writes it, as every open answer is; a misspelled word in its right spelling. A part of an expansion ("upper
lobe") keeps its words, and its place is the whole abbreviation.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from infer.extract.notes import Note
from infer.retrieval.repair import SHORT_FORMS, Change, Repair, apply


@dataclass(frozen=True)
class RepairedNote:
    """A note's original text and its changes, in order."""

    original: str
    changes: tuple[Change, ...]

    @cached_property
    def origin(self) -> list[tuple[int, int]]:
        """For each character of the repaired text, the span of the original that it replaces."""
        places, at = [], 0
        for change in self.changes:
            places += [(i, i + 1) for i in range(at, change.start)]
            places += [(change.start, change.end)] * len(change.after)
            at = change.end
        return places + [(i, i + 1) for i in range(at, len(self.original))]

    def answer(self, start: int, end: int, text: str) -> dict[str, Any]:
        """The answer at a place of the repaired text, as one of the original."""
        first, last = self.origin[start][0], self.origin[end - 1][1]
        cut = (start > 0 and self.origin[start - 1] == self.origin[start]) or (
            end < len(self.origin) and self.origin[end] == self.origin[end - 1]
        )
        inside = [change for change in self.changes if first <= change.start and change.end <= last]
        spelled = [change for change in inside if change.before.lower() not in SHORT_FORMS]
        if len(spelled) < len(inside) and not cut:
            moved = [Change(c.start - first, c.end - first, c.before, c.after) for c in spelled]
            text = apply(self.original[first:last], moved)
        return {"text": text, "start": first, "end": last}

    def restore(self, record: dict[str, Any]) -> dict[str, Any]:
        """An answers' record of the repaired note as one of the original; `repairs` lists what was changed."""
        if "error" in record:
            return record
        asked = [*(record.get("phenotypes") or {}).values(), *record.get("answers", ())]
        for answer in (one for question in asked for one in question["answers"] if one["start"] is not None):
            others = [self.answer(start, end, "") for start, end in answer.get("ambiguous", ())]
            answer |= self.answer(answer["start"], answer["end"], answer["text"])
            if others:
                answer["ambiguous"] = [[other["start"], other["end"]] for other in others]
        return {**record, "repairs": [[change.start, change.end, change.after] for change in self.changes]}


def repair_note(note: Note, repair: Repair) -> tuple[Note, RepairedNote]:
    """The note as it is read after repair, and the map to its original."""
    changes = tuple(repair.changes(note.text))
    return replace(note, text=apply(note.text, changes)), RepairedNote(note.text, changes)
