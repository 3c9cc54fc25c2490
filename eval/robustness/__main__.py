"""Corrupted copies of annotated notes, one file a rate:

    python -m eval.robustness misspelling --data heldout.jsonl --out DIR      test notes, answers clean
    python -m eval.robustness labels --data train.jsonl --out DIR             training answers, notes clean

DIR holds rate-00.jsonl, rate-10.jsonl, … Train on them with train.instruct, answer them with infer.extract and score
with eval.score like any other file.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from eval.robustness.labels import corrupt
from eval.robustness.misspelling import misspell
from model.command import UserError, run
from model.files import read_jsonl, write_jsonl


@dataclass(frozen=True)
class Options:
    """Corrupt annotated notes at nested rates."""

    what: Annotated[Literal["labels", "misspelling"], tyro.conf.Positional]
    """Wrong training answers, or misspelled words."""
    data: Path
    """JSON lines of annotated notes."""
    out: Path
    """The folder to write."""
    rates: tuple[float, ...] = (0.0, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9)
    """The shares of records (labels) or of words (misspelling)."""
    seed: int = 0
    """Which records or words, and which mistakes."""


def main(options: Options) -> None:
    for rate in options.rates:
        if not 0 <= rate <= 1:
            raise UserError(f"--rates {rate}: a rate is between 0 and 1")
    fields = ("id", "text", "phenotypes") if options.what == "labels" else ("id", "text")
    records = [record for _, record in read_jsonl(options.data, fields)]
    for rate in options.rates:
        if options.what == "labels":
            changed = corrupt(records, rate, options.seed)
        else:
            changed = [misspell(record, rate, options.seed) for record in records]
        touched = sum(new != old for new, old in zip(changed, records, strict=True))
        path = options.out / f"rate-{round(100 * rate):02d}.jsonl"
        write_jsonl(path, changed)
        print(f"{path}: {touched} of {len(records)} notes changed")


if __name__ == "__main__":
    run(main, Options)
