"""Exact nearest vectors by blocked products, and the guard that keeps a note's own answer out of its neighbours.

Exact search is one pass over the vectors (3 GB for a million of 768 numbers) for every batch of queries.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

BLOCK = 65_536  # rows a product takes at a time
SHINGLE, NEAR = 5, 0.6  # words of a run; share of common runs from which two notes are near-duplicates


def top_k(
    query_QD: np.ndarray, matrix_ND: np.ndarray, k: int, similarity: str = "dot"
) -> tuple[np.ndarray, np.ndarray]:
    """(rows_QK, scores_QK) of the k most similar rows, best first, ties to the lower row; exact.

    `similarity` is dot, cosine (rows and queries are taken at length 1) or euclidean (the score is minus the squared
    distance, and the squared length of the query is left out as it orders nothing). `matrix_ND` may be memory-mapped
    float32 or float16; products are float32.
    """
    query_QD = np.asarray(query_QD, dtype=np.float32)
    if not np.isfinite(query_QD).all():
        raise ValueError("a query vector holds NaN or infinity")
    if similarity == "cosine":
        query_QD = query_QD / np.maximum(np.linalg.norm(query_QD, axis=1, keepdims=True), 1e-12)
    k = min(k, len(matrix_ND))
    rows = [np.empty(0, np.int64)] * len(query_QD)
    best = [np.empty(0, np.float32)] * len(query_QD)
    for start in range(0, len(matrix_ND), BLOCK):
        block_ND = np.asarray(matrix_ND[start : start + BLOCK], dtype=np.float32)
        scores_QN = similarities(query_QD, block_ND, similarity)
        for q, scores_N in enumerate(scores_QN):
            # Later rows lose ties, so only what beats the k-th best so far matters: few rows after the first block.
            hits = np.flatnonzero(scores_N > best[q][-1]) if len(best[q]) == k else np.arange(len(scores_N))
            if not len(hits):
                continue
            if len(hits) > 4 * k:
                floor = np.partition(scores_N[hits], -k)[-k]
                hits = hits[scores_N[hits] >= floor]
            row, score = np.concatenate([rows[q], hits + start]), np.concatenate([best[q], scores_N[hits]])
            order = np.lexsort((row, -score))[:k]
            rows[q], best[q] = row[order], score[order]
    return np.array(rows, dtype=np.int64).reshape(-1, k), np.array(best, dtype=np.float32).reshape(-1, k)


def similarities(query_QD: np.ndarray, block_ND: np.ndarray, similarity: str) -> np.ndarray:
    scores_QN = query_QD @ block_ND.T
    if similarity == "cosine":
        scores_QN /= np.maximum(np.linalg.norm(block_ND, axis=1), 1e-12)
    elif similarity == "euclidean":
        scores_QN = 2 * scores_QN - (block_ND**2).sum(1)
    return scores_QN


def shingles(text: str) -> frozenset[tuple[str, ...]]:
    """The runs of SHINGLE words of a text (all of its words as one run where it is shorter)."""
    words = re.findall(r"\w+", text.lower())
    return frozenset(tuple(words[i : i + SHINGLE]) for i in range(max(1, len(words) - SHINGLE + 1)))


def allowed(note: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether `other` may be shown with `note`: not the note itself, no note of the same patient, and no
    near-duplicate (a share of at least NEAR of the shorter text's runs of words is in the other one)."""
    if str(note["id"]) == str(other["id"]) or note["text"] == other["text"]:
        return False
    if note.get("patient") not in (None, "") and str(note["patient"]) == str(other.get("patient")):  # 7 is "7"
        return False
    a, b = shingles(note["text"]), shingles(other["text"])
    return len(a & b) < NEAR * min(len(a), len(b))
