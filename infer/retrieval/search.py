"""Exact nearest-neighbour search in blocks, and the guard against leaking a note's own diagnosis (`allowed`).

A search reads all vectors once per batch of queries: 3 GB for a million vectors of 768 numbers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

BLOCK = 65_536  # rows per matrix product
SHINGLE = 5  # words per shingle
NEAR = 0.6  # share of common shingles from which two notes are near-duplicates


def top_k(
    query_QD: np.ndarray, matrix_ND: np.ndarray, k: int, similarity: str = "dot", block: int = BLOCK
) -> tuple[np.ndarray, np.ndarray]:
    """(rows_QK, scores_QK) of the k most similar rows, best first; exact, ties go to the lower row.

    `similarity` is "dot", "cosine" or "euclidean": the score is then 2 q·x − ‖x‖², the negative squared distance up to
    the constant ‖q‖². `matrix_ND` may be memory-mapped, float32 or float16; products are float32.
    """
    query_QD = np.asarray(query_QD, dtype=np.float32)
    if not np.isfinite(query_QD).all():
        raise ValueError("a query vector contains NaN or infinity")
    if similarity == "cosine":
        query_QD = query_QD / np.maximum(np.linalg.norm(query_QD, axis=1, keepdims=True), 1e-12)
    k = min(k, len(matrix_ND))
    rows = [np.empty(0, np.int64)] * len(query_QD)
    best = [np.empty(0, np.float32)] * len(query_QD)
    for start in range(0, len(matrix_ND), block):
        block_ND = np.asarray(matrix_ND[start : start + block], dtype=np.float32)
        scores_QN = similarities(query_QD, block_ND, similarity)
        for q, scores_N in enumerate(scores_QN):
            # later rows lose ties, so only rows better than the k-th best so far matter: few after the first block
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
    """The runs of SHINGLE words of a text; of a shorter text, all its words as one run."""
    words = re.findall(r"\w+", text.lower())
    return frozenset(tuple(words[i : i + SHINGLE]) for i in range(max(1, len(words) - SHINGLE + 1)))


def allowed(note: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """True if `other` may be shown with `note`: it is not the same note, of the same patient, or a near-duplicate (at
    least NEAR of the shorter text's shingles occur in the longer one)."""
    if str(note["id"]) == str(other["id"]) or note["text"] == other["text"]:
        return False
    if note.get("patient") not in (None, "") and str(note["patient"]) == str(other.get("patient")):  # 7 equals "7"
        return False
    a, b = shingles(note["text"]), shingles(other["text"])
    return len(a & b) < NEAR * min(len(a), len(b))
