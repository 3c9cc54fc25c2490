"""The results of the experiments, as their programs write them, for a report."""

import pytest

from eval.questions import Question
from eval.robustness.canaries import by_count
from eval.robustness.curve import curve, recovery


def asked(right):
    return [
        Question(f"n{i}", f"p{i}", name, (gold,), (gold if i < right else "nowhere",))
        for i in range(12)
        for name, gold in (("tumor_size", "2 cm"), ("diagnosis", "lung cancer"))
    ]


@pytest.fixture
def parts():
    spelled = curve({"as misspelled": {0.0: asked(12), 0.1: asked(6)}, "repaired": {0.0: asked(12), 0.1: asked(10)}})
    spelled |= {
        "corrupted": "words misspelled",
        "changed": [0, 40],
        "of": 400,
        "recovery": [{"rate": 0.1, **recovery(asked(12), asked(6), asked(10))}],
    }
    wrong = curve({"trained on wrong labels": {0.0: asked(12), 0.3: asked(4)}, "left out": {0.3: asked(9)}})
    wrong |= {
        "corrupted": "records",
        "changed": [0, 3],
        "of": 10,
        "recovery": [],
        "filter": {"rate": 0.3, "dropped": 3, "dropped_wrong": 2, "wrong": 3, "records": 10, "auc": 0.9},
    }
    one = {"name": "c", "count": 4, "rank": 1, "exposure": 8.0, "extracted": True}
    leaks = {
        "notes": 20,
        "steps": 3,
        "passes": 1.0,
        "references": 255,
        "most": 8.0,
        "lines_dropped": 5,
        "rows": {"planted": by_count([one, {**one, "count": 0, "exposure": 1.0, "extracted": False}])},
    }
    near = {
        "notes": 12,
        "rows": [
            {
                "name": "BM25",
                "note": "",
                "recall_at": {"1": 0.5},
                "ndcg": 0.4,
                "diagnosis": spelled["series"]["repaired"]["diagnosis"][0],
            },
            {"name": "MedCPT", "note": "weights not given", "diagnosis": None},
        ],
    }
    return {"wrong_labels": wrong, "misspelling": spelled, "canaries": leaks, "retrieval": near}
