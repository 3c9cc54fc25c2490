"""recall@k and nDCG of a retriever: are a note's neighbours notes of the same diagnosis?

    python -m eval.experiments.retrieval --index DIR --notes heldout.jsonl [--weights DIR]

A neighbour is relevant where its diagnosis has the note's ICD-10-CM code. The guard of infer.retrieval.index applies:
neither the note, nor its patient's other notes, nor near-duplicates are retrieved or counted as relevant.

recall@k is the share of the notes' relevant records among the first k, as in BEIR; nDCG@10 discounts the relevant
record at rank r by log2(r + 1) and divides by the best order's sum. A note with nothing relevant in the index is left
out and counted.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.metrics.statistics import interval
from eval.questions import patient_of
from infer.retrieval.index import Index
from infer.retrieval.search import allowed
from model.support.cli import UserError, run
from model.support.files import read_jsonl

CUTS = (1, 5, 10)


@dataclass(frozen=True)
class Options:
    """Measure an index's retriever on annotated notes."""

    index: Path
    """An index of training notes (python -m infer.retrieval.index)."""
    notes: Path
    """JSON lines of annotated notes."""
    weights: Path | None = None
    """The encoder's folder (none for bm25)."""


def recall(hits: Sequence[bool], relevant: int, k: int) -> float:
    """The share of `relevant` records among the first k results."""
    return sum(hits[:k]) / relevant


def ndcg(hits: Sequence[bool], relevant: int, k: int = 10) -> float:
    """nDCG@k with relevance 0 or 1."""
    gain = sum(1 / math.log2(rank + 2) for rank, hit in enumerate(hits[:k]) if hit)
    return gain / sum(1 / math.log2(rank + 2) for rank in range(min(relevant, k)))


def code_of(record: Mapping[str, Any]) -> str | None:
    """The code of a record's diagnosis; None where it has none."""
    given = record.get("diagnosis")
    return given.get("code") if isinstance(given, Mapping) else None


def measure(index: Index, notes: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A row of table 6, less the effect on F1. Raises UserError where no note has anything relevant."""
    recalls: dict[int, list[float]] = {k: [] for k in CUTS}
    gains, patients, without = [], [], 0
    for note in notes:
        code = code_of(note)
        same = [record for record in index.records if code_of(record) == code]
        relevant = sum(allowed(note, record) for record in same)
        if not relevant:
            without += 1
            continue
        found = index.neighbours(note, max(CUTS))
        hits = [code_of(record) == code for record in found]
        for k in CUTS:
            recalls[k].append(recall(hits, relevant, k))
        gains.append(ndcg(hits, relevant))
        patients.append(patient_of(note))
    if not gains:
        raise UserError("no note has a record of its diagnosis in the index; index training notes with diagnoses")
    mean = {str(k): sum(values) / len(values) for k, values in recalls.items()}
    note_ = f"{len(gains)} notes; {without} without a relevant record left out"
    low, high = interval(gains, patients, (0.0, 1.0))
    return {
        "name": index.manifest["encoder"],
        "recall_at": mean,
        "ndcg": sum(gains) / len(gains),
        "ndcg_low": low,
        "ndcg_high": high,
        "found_in": len(gains),
        "note": note_,
    }


def main(options: Options) -> None:
    notes = [record for _, record in read_jsonl(options.notes, ("id", "text", "diagnosis"))]
    notes = [note for note in notes if code_of(note)]
    if not notes:
        raise UserError(f"{options.notes}: no note's diagnosis has a code; give {{'text': …, 'code': …}}")
    print(json.dumps(measure(Index(options.index, weights=options.weights), notes)))


if __name__ == "__main__":
    run(main, Options)
