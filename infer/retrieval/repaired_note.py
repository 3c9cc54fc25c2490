"""infer.extract --repair: answers a repaired note and maps the answers' places back to the original.

    original   T2 tumor of the LUL, invasvie.        repaired   T2 tumor of the left upper lobe, invasive.
    answered   "left upper lobe" at 16–31            recorded   "LUL" at 16–19
    answered   "invasive" at 33–41                   recorded   "invasive" at 21–29, where the note has "invasvie"

An expanded abbreviation is recorded as in the note, a misspelled word in its correct spelling. A part of an expansion
("upper lobe") keeps its words and gets the place of the whole abbreviation.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from infer import tasks
from infer.extract.notes import Note
from infer.extract.places import occurrences
from infer.retrieval.repair import SHORT_FORMS, Change, Repair, apply


@dataclass(frozen=True)
class RepairedNote:
    """A note's original text and its repairs, in order."""

    original: str
    changes: tuple[Change, ...]

    @cached_property
    def origin(self) -> list[tuple[int, int]]:
        """For each character of the repaired text, its span in the original."""
        spans, end = [], 0
        for change in self.changes:
            spans += [(i, i + 1) for i in range(end, change.start)]
            spans += [(change.start, change.end)] * len(change.after)
            end = change.end
        return spans + [(i, i + 1) for i in range(end, len(self.original))]

    def answer(self, start: int, end: int, text: str) -> dict[str, Any]:
        """The answer `text` at a span of the repaired text, with text and span of the original."""
        first, last = self.origin[start][0], self.origin[end - 1][1]
        partial = (start > 0 and self.origin[start - 1] == self.origin[start]) or (
            end < len(self.origin) and self.origin[end] == self.origin[end - 1]
        )  # begins or ends within an expansion
        inside = [change for change in self.changes if first <= change.start and change.end <= last]
        corrections = [change for change in inside if change.before.lower() not in SHORT_FORMS]
        if len(corrections) < len(inside) and not partial:
            shifted = [Change(c.start - first, c.end - first, c.before, c.after) for c in corrections]
            text = apply(self.original[first:last], shifted)
        return {"text": text, "start": first, "end": last}

    def alternatives(self, question: dict[str, Any]) -> list[dict[str, Any]]:
        """A question's alternatives as their values are written in the original, without those that are the answer
        there."""
        repaired, found = apply(self.original, self.changes), []
        for one in question["alternatives"]:
            texts = []
            for value in tasks.parse_answer(one["text"]):
                spans = occurrences(value, repaired)
                texts.append(self.answer(*spans[0], value)["text"] if spans else value)
            found.append({**one, "text": tasks.answer(texts).strip()})
        own = tasks.answer([value["text"] for value in question["answers"]]).strip()
        return [one for one in found if one["text"] != own]

    def restore(self, record: dict[str, Any]) -> dict[str, Any]:
        """The record of the repaired note, with places of the original (in place), and its `repairs`."""
        if "error" in record:
            return record
        questions = [*(record.get("phenotypes") or {}).values(), *record.get("answers", ())]
        for value in (value for question in questions for value in question["answers"] if value["start"] is not None):
            others = [self.answer(start, end, "") for start, end in value.get("ambiguous", ())]
            value |= self.answer(value["start"], value["end"], value["text"])
            if others:
                value["ambiguous"] = [[other["start"], other["end"]] for other in others]
        for question in questions:
            if "alternatives" in question:
                question["alternatives"] = self.alternatives(question)
        return {**record, "repairs": [[change.start, change.end, change.after] for change in self.changes]}


def repair_note(note: Note, repair: Repair) -> tuple[Note, RepairedNote]:
    """The repaired note, and the map to its original."""
    changes = tuple(repair.changes(note.text))
    return replace(note, text=apply(note.text, changes)), RepairedNote(note.text, changes)
