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
    rows_QK, best_QK = np.empty((len(query_QD), 0), np.int64), np.empty((len(query_QD), 0), np.float32)
    for start in range(0, len(matrix_ND), block):
        block_ND = np.asarray(matrix_ND[start : start + block], dtype=np.float32)
        scores_QN = similarities(query_QD, block_ND, similarity)
        rows_QN = np.broadcast_to(np.arange(start, start + len(block_ND)), scores_QN.shape)
        scores_QM, rows_QM = np.hstack([best_QK, scores_QN]), np.hstack([rows_QK, rows_QN])
        order_QK = np.argsort(-scores_QM, axis=1, kind="stable")[:, :k]  # stable: the lower row wins a tie
        best_QK = np.take_along_axis(scores_QM, order_QK, axis=1)
        rows_QK = np.take_along_axis(rows_QM, order_QK, axis=1)
    return rows_QK, best_QK


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
