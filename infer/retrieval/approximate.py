"""An approximate index beside the exact one, by the package faiss-cpu (`python -m infer.retrieval.index --faiss`).

Vectors are gathered into about 4 √N cells, and a query reads the PROBES cells nearest to it: for millions of notes or
many queries a second, at the price of a neighbour missed now and then. Below a million notes the exact search is
quick enough, and it is what Table 6 uses.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from infer.retrieval.search import BLOCK
from model.support.cli import UserError

PROBES = 32
SAMPLE = 256  # vectors a cell that its centre is found from


def library() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise UserError("--faiss needs the package faiss-cpu: pip install faiss-cpu, or search exactly") from error
    return faiss


def ready(vectors_ND: np.ndarray, similarity: str) -> np.ndarray:
    rows_ND = np.ascontiguousarray(vectors_ND, dtype=np.float32)
    if similarity == "cosine":
        rows_ND = rows_ND / np.maximum(np.linalg.norm(rows_ND, axis=1, keepdims=True), 1e-12)
    return rows_ND


def build_cells(matrix_ND: np.ndarray, similarity: str, path: Path, seed: int = 0) -> None:
    """Write FAISS's index of the matrix, block by block."""
    faiss = library()
    count, width = matrix_ND.shape
    cells = max(1, min(round(4 * count**0.5), count // 39))  # FAISS asks for 39 vectors a cell
    metric = faiss.METRIC_L2 if similarity == "euclidean" else faiss.METRIC_INNER_PRODUCT
    index = faiss.index_factory(width, f"IVF{cells},Flat", metric)
    chosen = np.sort(np.random.default_rng(seed).permutation(count)[: SAMPLE * cells])
    index.train(ready(matrix_ND[chosen], similarity))
    for start in range(0, count, BLOCK):
        index.add(ready(matrix_ND[start : start + BLOCK], similarity))
    faiss.write_index(index, str(path))


def search_cells(path: Path, query_QD: np.ndarray, k: int, similarity: str) -> tuple[np.ndarray, np.ndarray]:
    """(rows_QK, scores_QK) as `search.top_k`'s, best first; a row of −1 stands for no further neighbour found."""
    faiss = library()
    index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP)
    index.nprobe = PROBES
    query_QD = ready(query_QD, similarity)
    scores_QK, rows_QK = index.search(query_QD, k)
    if similarity == "euclidean":  # top_k's score leaves the query's squared length out
        scores_QK = (query_QD**2).sum(1, keepdims=True) - scores_QK
    return rows_QK, scores_QK
