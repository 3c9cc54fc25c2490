"""What retrieval puts into a diagnosis prompt: the nearest notes of other patients, shortened, each with its diagnosis.

    ### Note: {note}\n\n### Another note: {its beginning}\n### Its diagnosis: … (C50.912)\n\n### Question: …

The neighbours come from an index of training notes (infer/retrieval/index.py) through its guard. They get the tokens
that the note and the question leave of the limit: the note is never cut for them. The same text is
put into training notes by train.data.neighbours, so what a model is tuned on is what it is asked with.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from infer import tasks
from infer.retrieval.index import Index
from model.support.cli import UserError
from model.text.tokenizer import Tokenizer, to_characters

LEAST = 16  # tokens of a neighbour's text: with less of it, it is left out


class Neighbours:
    """The `count` nearest answered notes of an index, each cut after `tokens` of its text."""

    def __init__(self, index: Index, count: int = 3, tokens: int = 64) -> None:
        if count < 1 or tokens < LEAST:
            raise UserError(f"{count} neighbours of {tokens} tokens: show at least one, of at least {LEAST} tokens")
        if not any(answer_of(record) for record in index.records):
            raise UserError("the index holds no note with a diagnosis to show; index training notes (`diagnosis`)")
        self.index, self.count, self.tokens = index, count, tokens

    def of(self, note: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The records to show with a note (`id`, `text`, `patient` where known), best first."""
        return self.index.neighbours(note, self.count, lambda record: bool(answer_of(record)))

    def shown(self, tokenizer: Tokenizer, found: list[dict[str, Any]], budget: int) -> list[tuple[str, str]]:
        """(id, text) of as many of the records as fit into `budget` tokens together; the last may be cut shorter."""
        parts: list[tuple[str, str]] = []
        for record in found:
            text = self.fitted(tokenizer, record, budget)
            if text is None:
                break
            budget -= len(tokenizer.encode(text))
            parts.append((record["id"], text))
        return parts

    def fitted(self, tokenizer: Tokenizer, record: dict[str, Any], budget: int) -> str | None:
        """A record as an example of at most `budget` tokens, or None where too little of it would be left."""
        most = self.tokens
        while most >= LEAST:
            text = tasks.example(beginning(tokenizer, record["text"], most), answer_of(record))
            over = len(tokenizer.encode(text)) - budget
            if over <= 0:
                return text
            most -= over
        return None


def answer_of(record: Mapping[str, Any]) -> str:
    """A record's diagnosis as the diagnosis task answers it; "" where it has none."""
    given = record.get("diagnosis")
    if isinstance(given, str) and given.strip():
        return f" {' '.join(given.split())}"
    if not isinstance(given, Mapping) or not given.get("text"):
        return ""
    return tasks.diagnosis_answer(given["text"], given["code"]) if given.get("code") else f" {given['text']}"


def beginning(tokenizer: Tokenizer, text: str, tokens: int) -> str:
    """The first tokens of a text, whole characters only."""
    ids, spans = tokenizer.encode(text, offsets=True)
    if len(ids) <= tokens:
        return text
    return text[: to_characters(text, spans)[tokens - 1][1]]
