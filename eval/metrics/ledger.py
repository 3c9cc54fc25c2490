"""The disagreement ledger: every answer that two presets score differently, and the reason.

Answers are compared by exact match: clinical form, released form, or the plain text. And a right answer is listed where
a definition still gives it no more than 0.5: one word has no pair of words, so COCO's BLEU-2 of a perfect one is 0.001.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from eval.metrics.presets import PRESETS
from eval.metrics.scoring import answers, question
from eval.metrics.text import clinical, released, unstemmed

ONE_WORD = "a perfect answer of one word has no pair of words for BLEU-2"
COMPARED = {  # presets whose forms differ, with those that share each form
    "clinical": "clinical",
    "cancerllm": "cancerllm, cancerllm-released",
    "coco": "coco, sacrebleu, nltk, rouge_score",
}


def why(predicted: str, gold: str) -> str:
    """The reason that the forms of two answers agree under one preset and not under another."""
    if released(predicted) == released(gold) and clinical(predicted) != clinical(gold):
        if unstemmed(predicted) != unstemmed(gold):
            return "Porter stems make the words equal; clinically they are written differently"
        if {c for c in predicted if c in "+-−"} != {c for c in gold if c in "+-−"}:
            return "stripping punctuation removes the sign: + and − become equal"
        if any(c.isdigit() for c in predicted):
            return "stripping punctuation removes the point in a number or code"
        return "stripping punctuation or case removes a difference that the clinical form keeps"
    if clinical(predicted) == clinical(gold) and released(predicted) != released(gold):
        return "the same quantity or sign written differently (unit, number word, spacing, hyphen)"
    return "differs only in case, spacing or punctuation that carries no clinical meaning"


def ledger(pairs: Iterable[tuple[Sequence[str], Sequence[str]]]) -> list[dict[str, Any]]:
    """For (predicted, gold) answers of each question: those scored differently, equal ones counted, commonest first
    and the one-word answers last."""
    found: dict[tuple[str, str, str], dict[str, Any]] = {}

    def note(predicted: str, gold: str, reason: str, verdicts: dict[str, str]) -> None:
        entry = found.setdefault(
            (predicted, gold, reason),
            {"predicted": predicted, "gold": gold, "why": reason, "verdicts": verdicts, "count": 0},
        )
        entry["count"] += 1

    for given, gold in pairs:
        rights = answers(list(gold), PRESETS["clinical"])
        for one in answers(list(given), PRESETS["clinical"]):
            equal = {name: [g for g in rights if PRESETS[name].form(one) == PRESETS[name].form(g)] for name in COMPARED}
            if any(equal.values()) and not all(equal.values()):
                near = next(g for g in rights if any(g in those for those in equal.values()))
                verdicts = {COMPARED[name]: "right" if those else "wrong" for name, those in equal.items()}
                note(one, near, why(one, near), verdicts)
            if one in rights:
                low: dict[str, str] = {}
                for name, preset in PRESETS.items():
                    bleu = question([one], [one], preset)["bleu2"].f1
                    low |= {name: f"BLEU-2 {bleu:.1f}"} if bleu <= 50 else {}
                if low:
                    note(one, one, ONE_WORD, low)
    order = lambda entry: (entry["why"] == ONE_WORD, -entry["count"], entry["predicted"], entry["gold"])  # noqa: E731
    return sorted(found.values(), key=order)
