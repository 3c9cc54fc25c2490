"""recall@k and nDCG@10 of a retriever: do a note's neighbours have its diagnosis?

A record is relevant if its diagnosis has the note's ICD-10-CM code. As in infer.retrieval.index, the note itself, its
patient's other notes and near-duplicates are neither retrieved nor counted as relevant.

recall@k is the share of the relevant records that are among the first k, as in BEIR. nDCG@10 discounts a relevant
record at rank r by log2(r + 1) and divides by the ideal order's sum. Notes without a relevant record are left out.
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
    """Share of the `relevant` records that are among the first k results."""
    return sum(hits[:k]) / relevant


def ndcg(hits: Sequence[bool], relevant: int, k: int = 10) -> float:
    """nDCG@k with binary relevance."""
    gain = sum(1 / math.log2(rank + 2) for rank, hit in enumerate(hits[:k]) if hit)
    return gain / sum(1 / math.log2(rank + 2) for rank in range(min(relevant, k)))


def measure(index: Index, notes: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """recall@k, and nDCG@10 with its interval over patients, over the `found_in` notes that have a relevant record; {}
    if there are none."""
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
