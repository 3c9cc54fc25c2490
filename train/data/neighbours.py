"""Training notes with their neighbours, so that a model learns to read them as it will be asked with them:

    python -m infer.retrieval.index --notes train.jsonl --out INDEX
    python -m train.data.neighbours --data train.jsonl --index INDEX --tokenizer MODEL --out train-near.jsonl
    python -m train.instruct RECIPE.toml --data train-near.jsonl …

Each record gains `neighbours`, [{"id", "text"}, …]: what infer.extract --retriever would show with its diagnosis
question (train.data.records puts the texts there). The guard of infer.retrieval.index holds for training notes too:
none is shown itself, its patient's other notes, or a near-duplicate, so no answer is given away.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from infer.retrieval.index import Index
from infer.retrieval.neighbours import Neighbours
from model.support.cli import UserError, run
from model.support.files import read_jsonl, write_jsonl
from model.support.lock import output
from model.text.tokenizer import Tokenizer

BUDGET = 1000  # tokens of all neighbours of a note together (infer.extract gives them what its limit leaves)


@dataclass(frozen=True)
class Options:
    """Put each note's neighbours from an index beside it."""

    data: Path
    """JSON lines of annotated notes."""
    index: Path
    """An index of training notes (python -m infer.retrieval.index)."""
    tokenizer: Path
    """The folder of the model that will be tuned."""
    out: Path
    """JSON lines: the same records with `neighbours`."""
    encoder_weights: Path | None = None
    """The index's encoder folder (none for bm25)."""
    neighbours: int = 3
    """How many, as infer.extract's option."""
    neighbour_tokens: int = 64
    """Tokens of each neighbour's text, as infer.extract's option."""
    overwrite: bool = False
    """Replace a file that is there."""


def beside(options: Options, near: Neighbours, tokenizer: Tokenizer) -> Iterator[dict[str, object]]:
    for number, record in tqdm(read_jsonl(options.data, ("id", "text")), unit="note", disable=None):
        if not isinstance(record["text"], str):
            raise UserError(f"{options.data}:{number}: 'text' is not text")
        note = {"id": str(record["id"]), "text": record["text"], "patient": record.get("patient")}
        shown = near.shown(tokenizer, near.of(note), BUDGET)
        yield {**record, "neighbours": [{"id": name, "text": text} for name, text in shown]}


def main(options: Options) -> None:
    with output(options.out, options.overwrite, options.data):
        near = Neighbours(
            Index(options.index, weights=options.encoder_weights), options.neighbours, options.neighbour_tokens
        )
        count = write_jsonl(options.out, beside(options, near, Tokenizer.from_pretrained(options.tokenizer)))
    print(f"{options.out}: {count} notes, {near.index.manifest['encoder']}")


if __name__ == "__main__":
    run(main, Options)
