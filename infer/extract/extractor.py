"""Phenotypes and diagnosis of one note from Python: `infer.extract` without files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from infer.engine.generate import Generator, RequestBatch, State
from infer.engine.load import load
from infer.extract.answers import read_calibration
from infer.extract.ask import Answer, Asker, Limits, Part, form_for, without_partial_value
from infer.extract.notes import Note
from infer.extract.schedule import Group
from infer.released import adapter, smollm2
from model.support.cli import UserError


class Extractor:
    """A model that answers questions about notes.

    `weights` is a model's folder or GGUF file, `adapter` a LoRA adapter's folder (PEFT). With `grounded`, decoding is
    constrained: an answer is "not relevant", a value of a closed list, a span of the note, or an ICD-10-CM code.
    `alternatives` other answers are sought for each question. Raises UserError for files that are missing or do not
    belong together.
    """

    def __init__(
        self, weights: str | Path, adapter: str | Path | None = None, grounded: bool = True, alternatives: int = 1
    ) -> None:
        adapters = () if adapter is None else (adapter,)
        model, tokenizer = load(weights, adapters)
        form = form_for(tokenizer, adapters)
        sure = read_calibration(adapters)
        self.asker = Asker(
            Generator(model, tokenizer),
            "both",
            form,
            Limits(),
            "windows",
            grounded,
            temperatures=sure,
            alternatives=alternatives,
        )

    @classmethod
    def released(cls) -> Extractor:
        """The released adapter on its base (infer/released). Raises UserError where the base is missing or another."""
        return cls(smollm2(), adapter())

    def answers(self, text: str) -> dict[str, Any]:
        """A note's record without its id: `phenotypes` and `diagnosis`, each answer with its place in `text` (start
        and end, in characters), its natural log-probability, where the adapter is calibrated its probability of being
        right, and the alternatives to it, as infer/extract/record.schema.json describes them.

        A note beyond 1,500 tokens is read in overlapping windows. Raises UserError for an empty note.
        """
        (record,) = self.asker.records([Note("", text)])
        if "error" in record:
            raise UserError(record["error"])
        del record["id"]
        return record

    def stream(self, text: str) -> Iterator[dict[str, Any]]:
        """`answers` as it comes: after every step what has ended in it, a part of the record (of a repeated value the
        place is not yet chosen; {} where nothing ended), and at last the whole record. May be left at any step.

        Parts come of notes within the limit. Raises UserError as `answers`.
        """
        asker, note, batch = self.asker, Note("", text), RequestBatch(self.asker.generator)
        steps = asker.work(note)
        try:
            groups = next(steps)
            waiting = self.asked(note, groups)
            while True:
                batch.add([state for group in groups for state in group.states])
                while True:
                    ended = [one for one in waiting if one[-1].finish is not None]
                    waiting = [one for one in waiting if one[-1].finish is None]
                    yield self.part(ended)
                    if not batch.active:
                        break
                    batch.step()
                groups = next(steps)
        except StopIteration as end:
            if "error" in end.value:
                raise UserError(end.value["error"]) from None
            yield {name: value for name, value in end.value.items() if name != "id"}

    def asked(self, note: Note, groups: list[Group]) -> list[tuple[Part, str, str, State]]:
        """Each question of a note that is read whole, with its part and request; nothing of one read in windows."""
        parts = self.asker.parts(note)
        if len(parts) > 1:
            return []
        states = [state for group in groups for state in group.states]
        return [(parts[0], *asked, state) for asked, state in zip(self.asker.questions(note), states, strict=True)]

    def part(self, ended: list[tuple[Part, str, str, State]]) -> dict[str, Any]:
        """The record of answers that have ended; the places of a repeated value are all ambiguous."""
        asker = self.asker
        outs = [without_partial_value(asker.generator.result(state), state.settings) for *_, state in ended]
        answers = [
            Answer(part, name, question, out) for (part, name, question, _), out in zip(ended, outs, strict=True)
        ]
        places = [[reading.spans for reading in asker.readings(answer)] for answer in answers]
        record = asker.record([answers], [places]) if answers else {}
        record.pop("tokens", None)
        return record
