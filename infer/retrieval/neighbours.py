"""Retrieved examples for the diagnosis prompt: the nearest notes of other patients, truncated, with their diagnoses.

    ### Note: {note}\n\n### Another note: {its beginning}\n### Its diagnosis: … (C50.912)\n\n### Question: …

The neighbours come from an index of training notes (index.py) and pass its guard. They share the tokens that note and
question leave of the limit; the note is never truncated for them. train.data.neighbours adds the same text to training
notes, so that a model is tuned on the prompts that it gets.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from infer import tasks
from infer.retrieval.index import Index
from model.support.cli import UserError
from model.text.tokenizer import Tokenizer, to_characters

LEAST = 16  # minimum number of tokens of a neighbour's text


class Neighbours:
    """The `count` nearest notes with a diagnosis in an index, each truncated to `tokens` tokens of text."""

    def __init__(self, index: Index, count: int = 3, tokens: int = 64) -> None:
        if count < 1 or tokens < LEAST:
            raise UserError(f"{count} neighbours of {tokens} tokens: show at least one, of at least {LEAST} tokens")
        if not any(answer_of(record) for record in index.records):
            raise UserError("the index holds no note with a diagnosis to show; index training notes (`diagnosis`)")
        self.index, self.count, self.tokens = index, count, tokens

    def of(self, note: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The records to show with a note (`id`, `text` and, if known, `patient`), nearest first."""
        return self.index.neighbours(note, self.count, lambda record: bool(answer_of(record)))

    def shown(self, tokenizer: Tokenizer, found: list[dict[str, Any]], budget: int) -> list[tuple[str, str]]:
        """(id, example text) of as many records as fit into `budget` tokens together; the last may be shorter."""
        examples: list[tuple[str, str]] = []
        for record in found:
            text = self.fitted(tokenizer, record, budget)
            if text is None:
                break
            budget -= len(tokenizer.encode(text))
            examples.append((record["id"], text))
        return examples

    def fitted(self, tokenizer: Tokenizer, record: dict[str, Any], budget: int) -> str | None:
        """A record as an example of at most `budget` tokens; None if less than LEAST tokens of text would fit."""
        most = self.tokens
        while most >= LEAST:
            text = tasks.example(beginning(tokenizer, record["text"], most), answer_of(record))
            over = len(tokenizer.encode(text)) - budget
            if over <= 0:
                return text
            most -= over
        return None


def answer_of(record: Mapping[str, Any]) -> str:
    """A record's diagnosis in the form of the diagnosis task's answer; "" if it has none."""
    diagnosis = record.get("diagnosis")
    if isinstance(diagnosis, str) and diagnosis.strip():
        return f" {' '.join(diagnosis.split())}"
    if not isinstance(diagnosis, Mapping) or not diagnosis.get("text"):
        return ""
    if not diagnosis.get("code"):
        return f" {diagnosis['text']}"
    return tasks.diagnosis_answer(diagnosis["text"], diagnosis["code"])


def beginning(tokenizer: Tokenizer, text: str, tokens: int) -> str:
    """The text of the first `tokens` tokens, cut between characters."""
    ids, spans = tokenizer.encode(text, offsets=True)
    if len(ids) <= tokens:
        return text
    return text[: to_characters(text, spans)[tokens - 1][1]]
