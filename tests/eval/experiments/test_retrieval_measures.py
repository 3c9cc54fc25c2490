"""Retrieval measures in numbers worked out by hand, over a guarded index."""

from __future__ import annotations

import json
import math

import pytest

from eval.experiments.retrieval import measure, ndcg, recall
from infer.retrieval.index import Index, Options, build


def test_recall_and_ndcg_in_numbers():
    hits = [False, True, True]
    assert recall(hits, 4, 1) == 0 and recall(hits, 4, 3) == 0.5
    assert ndcg(hits, 2) == pytest.approx((1 / math.log2(3) + 1 / 2) / (1 + 1 / math.log2(3)))
    assert ndcg([True, True], 2) == 1 and ndcg([False], 1) == 0


def test_a_patients_other_note_is_neither_retrieved_nor_expected(tmp_path):
    rows = [
        {"id": "a", "patient": "p1", "text": "left breast mass", "diagnosis": {"text": "x", "code": "C50.912"}},
        {"id": "b", "patient": "p2", "text": "breast lump found", "diagnosis": {"text": "x", "code": "C50.912"}},
        {"id": "c", "patient": "p3", "text": "colon polyp", "diagnosis": {"text": "y", "code": "C18.9"}},
        {"id": "d", "patient": "p4", "text": "lung nodule", "diagnosis": {"text": "z", "code": "C34.90"}},
        {"id": "e", "patient": "p5", "text": "skin spot", "diagnosis": "a text, as infer.retrieval.index takes it"},
    ]
    (tmp_path / "n.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    build(Options(out=tmp_path / "i", notes=tmp_path / "n.jsonl"))
    note = {"id": "q", "patient": "p1", "text": "a mass in the breast", "diagnosis": {"text": "x", "code": "C50.912"}}
    row = measure(Index(tmp_path / "i"), [note])
    assert row["recall_at"] == {"1": 1.0, "5": 1.0, "10": 1.0} and row["ndcg"] == 1.0
    assert row["found_in"] == 1 and row["ndcg_low"] is row["ndcg_high"] is None
    assert measure(Index(tmp_path / "i"), [{**note, "diagnosis": {"text": "w", "code": "C61"}}]) == {}
