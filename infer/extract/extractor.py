"""Phenotypes and diagnosis of one note from Python: `infer.extract` without files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from infer.engine.generate import Generator
from infer.engine.load import load
from infer.extract.ask import Asker, Limits, form_for
from infer.extract.notes import Note
from infer.released import adapter, smollm2
from model.support.cli import UserError


class Extractor:
    """A model that answers questions about notes.

    `weights` is a model's folder or GGUF file, `adapter` a LoRA adapter's folder (PEFT). With `grounded`, decoding is
    constrained: an answer is "not relevant", a value of a closed list, a span of the note, or an ICD-10-CM code.
    Raises UserError for files that are missing or do not belong together.
    """

    def __init__(self, weights: str | Path, adapter: str | Path | None = None, grounded: bool = True) -> None:
        adapters = () if adapter is None else (adapter,)
        model, tokenizer = load(weights, adapters)
        form = form_for(tokenizer, adapters)
        self.asker = Asker(Generator(model, tokenizer), "both", form, Limits(), long="windows", grounded=grounded)

    @classmethod
    def released(cls) -> Extractor:
        """The released adapter on its base (infer/released). Raises UserError where the base is missing or another."""
        return cls(smollm2(), adapter())

    def answers(self, text: str) -> dict[str, Any]:
        """A note's record without its id: `phenotypes` and `diagnosis`, each answer with its place in `text` (start
        and end, in characters) and its natural log-probability, as infer/extract/answers.py's SCHEMA describes them.

        A note beyond 1,500 tokens is read in overlapping windows. Raises UserError for an empty note.
        """
        (record,) = self.asker.records([Note("", text)])
        if "error" in record:
            raise UserError(record["error"])
        del record["id"]
        return record
