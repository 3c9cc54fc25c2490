"""Adds similar notes ("neighbours") to training records, so that a model is tuned on the prompts of
infer.extract --retriever:

    python -m infer.retrieval.index --notes train.jsonl --out INDEX
    python -m train.data.neighbours --data train.jsonl --index INDEX --tokenizer MODEL --out train-near.jsonl
    python -m train.instruct RECIPE.toml --data train-near.jsonl …

Each record gains `neighbours`, [{"id", "text"}, …]: what infer.extract --retriever would show before its diagnosis
question (train.data.records encodes them there). As in infer.retrieval.index, a note is never shown itself, another
note of its patient, or a near-duplicate, so that no answer leaks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from infer.retrieval.index import Index
from infer.retrieval.neighbours import Neighbours
from model.support.cli import run
from model.support.files import read_jsonl, write_jsonl
from model.support.lock import output
from model.text.tokenizer import Tokenizer

BUDGET = 1000  # tokens of all neighbours of a note together (in infer.extract: what the prompt limit leaves)


@dataclass(frozen=True)
class Options:
    """Add to each note its nearest neighbours in an index."""

    data: Path
    """JSON lines of annotated notes."""
    index: Path
    """An index of training notes (python -m infer.retrieval.index)."""
    tokenizer: Path
    """The folder of the model that will be tuned."""
    out: Path
    """JSON lines: the same records with `neighbours`."""
    encoder_weights: Path | None = None
    """Folder of the index's encoder (not needed for bm25)."""
    neighbours: int = 3
    """Number of neighbours, as in infer.extract."""
    neighbour_tokens: int = 64
    """Tokens per neighbour, as in infer.extract."""
    overwrite: bool = False
    """Replace an existing file."""


def with_neighbours(options: Options, near: Neighbours, tokenizer: Tokenizer) -> Iterator[dict[str, object]]:
    """Yields the records of `options.data` with `neighbours` added."""
    for _, record in tqdm(read_jsonl(options.data, ("id", "text")), unit="note", disable=None):
        note = {"id": record["id"], "text": record["text"], "patient": record.get("patient")}
        shown = near.shown(tokenizer, near.of(note), BUDGET)
        yield {**record, "neighbours": [{"id": name, "text": text} for name, text in shown]}


def main(options: Options) -> None:
    with output(options.out, options.overwrite, options.data):
        near = Neighbours(
            Index(options.index, weights=options.encoder_weights), options.neighbours, options.neighbour_tokens
        )
        count = write_jsonl(options.out, with_neighbours(options, near, Tokenizer.from_pretrained(options.tokenizer)))
    print(f"{options.out}: {count} notes, {near.index.manifest['encoder']}")


if __name__ == "__main__":
    run(main, Options)
