"""recall@k and nDCG of a retriever: are a note's neighbours notes of the same diagnosis?

A neighbour is relevant where its diagnosis has the note's ICD-10-CM code. The guard of infer.retrieval.index applies:
neither the note, nor its patient's other notes, nor near-duplicates are retrieved or counted as relevant.

recall@k is the share of the notes' relevant records among the first k, as in BEIR; nDCG@10 discounts the relevant
record at rank r by log2(r + 1) and divides by the best order's sum. A note with nothing relevant in the index is left
out and counted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from eval.metrics.statistics import interval
from eval.questions import code_of, patient_of
from infer.retrieval.index import Index
from infer.retrieval.search import allowed

CUTS = (1, 5, 10)


def recall(hits: Sequence[bool], relevant: int, k: int) -> float:
    """The share of `relevant` records among the first k results."""
    return sum(hits[:k]) / relevant


def ndcg(hits: Sequence[bool], relevant: int, k: int = 10) -> float:
    """nDCG@k with relevance 0 or 1."""
    gain = sum(1 / math.log2(rank + 2) for rank, hit in enumerate(hits[:k]) if hit)
    return gain / sum(1 / math.log2(rank + 2) for rank in range(min(relevant, k)))


def measure(index: Index, notes: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """recall@k and nDCG@10 with its interval over patients, of the `found_in` notes that have something relevant; {}
    where none has."""
    recalls: dict[int, list[float]] = {k: [] for k in CUTS}
    gains, patients = [], []
    for note in notes:
        code = code_of(note)
        same = [record for record in index.records if code_of(record) == code]
        relevant = sum(allowed(note, record) for record in same)
        if not relevant:
            continue
        found = index.neighbours(note, max(CUTS))
        hits = [code_of(record) == code for record in found]
        for k in CUTS:
            recalls[k].append(recall(hits, relevant, k))
        gains.append(ndcg(hits, relevant))
        patients.append(patient_of(note))
    if not gains:
        return {}
    mean = {str(k): sum(values) / len(values) for k, values in recalls.items()}
    low, high = interval(gains, patients, (0.0, 1.0))
    return {
        "recall_at": mean,
        "ndcg": sum(gains) / len(gains),
        "ndcg_low": low,
        "ndcg_high": high,
        "found_in": len(gains),
    }
