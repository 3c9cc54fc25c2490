"""Exact search over an index of dense vectors against the matrix product that it cannot do without, and FAISS's own.

The product alone (all scores, nothing chosen) is the limit of any exact search; ours adds the choice of the k best.
Where the package faiss-cpu is installed, its exact `knn` answers the same queries.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from infer.retrieval.search import top_k


def seconds(run: Callable[[], object], repeats: int) -> float:
    """The best of several runs, after one that is not counted."""
    run()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return min(times)


def rows(vectors: int = 1_000_000, width: int = 768, queries: int = 32, k: int = 10, repeats: int = 3) -> list[dict]:
    """Milliseconds for all queries together: blocked top k, the bare product, FAISS where it is installed."""
    rng = np.random.default_rng(0)
    matrix_ND = np.empty((vectors, width), np.float32)
    for start in range(0, vectors, 65_536):
        part = matrix_ND[start : start + 65_536]
        part[:] = rng.standard_normal(part.shape, dtype=np.float32)
    query_QD = rng.standard_normal((queries, width), dtype=np.float32)
    found, _ = top_k(query_QD, matrix_ND, k)
    scores_QN = query_QD @ matrix_ND.T
    for q in range(queries):  # the same rows as a whole sort gives
        best = np.argpartition(-scores_QN[q], k)[:k]
        assert set(found[q]) == set(best.tolist())
    setting = f"{vectors} x {width} float32, {queries} queries, k {k}, best of {repeats}"
    del scores_QN
    ours = seconds(lambda: top_k(query_QD, matrix_ND, k), repeats)
    product = seconds(lambda: query_QD @ matrix_ND.T, repeats)
    made = [row("exact top k", ours, product, "the product alone (numpy)", setting, product)]
    try:
        import faiss
    except ImportError:
        return made
    theirs = seconds(lambda: faiss.knn(query_QD, matrix_ND, k, faiss.METRIC_INNER_PRODUCT), repeats)
    return [*made, row("exact top k", ours, theirs, "faiss.knn", setting, product)]


def row(name: str, ours: float, peer: float, peer_name: str, setting: str, limit: float) -> dict[str, Any]:
    return {
        "name": name, "ours": 1e3 * ours, "peer": 1e3 * peer, "peer_name": peer_name, "ratio": peer / ours,
        "limit": 1e3 * limit, "share_of_limit": limit / ours, "unit": "ms", "setting": setting,
    }  # fmt: skip
