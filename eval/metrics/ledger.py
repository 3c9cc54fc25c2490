"""The disagreement ledger: every answer that two presets score differently, with the reason.

Answers are compared by exact match under the presets' three forms (clinical, released, plain text). Also listed are
right answers to which some preset gives a BLEU-2 of at most 0.5: an answer of one word has no bigram, so COCO's BLEU-2
of a perfect one is 0.001.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from eval.metrics.presets import PRESETS
from eval.metrics.scoring import answers, question
from eval.metrics.text import clinical, released, unstemmed

ONE_WORD = "a perfect answer of one word has no pair of words for BLEU-2"
COMPARED = {  # one preset of each form → the presets that share the form
    "clinical": "clinical",
    "cancerllm": "cancerllm, cancerllm-released",
    "coco": "coco, sacrebleu, nltk, rouge_score",
}


def why(predicted: str, gold: str) -> str:
    """Why two answers are equal under one preset and different under another."""
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
    """The answers that presets score differently, from each question's (predicted, gold) answers.

    Identical disagreements are one entry with a count. Sorted by count, with the one-word answers last.
    """
    found: dict[tuple[str, str, str], dict[str, Any]] = {}

    def add(predicted: str, gold: str, reason: str, verdicts: dict[str, str]) -> None:
        entry = found.setdefault(
            (predicted, gold, reason),
            {"predicted": predicted, "gold": gold, "why": reason, "verdicts": verdicts, "count": 0},
        )
        entry["count"] += 1

    for given, gold in pairs:
        golds = answers(list(gold), PRESETS["clinical"])
        for one in answers(list(given), PRESETS["clinical"]):
            equal = {name: [g for g in golds if PRESETS[name].form(one) == PRESETS[name].form(g)] for name in COMPARED}
            if any(equal.values()) and not all(equal.values()):
                match = next(g for g in golds if any(g in matches for matches in equal.values()))
                verdicts = {COMPARED[name]: "right" if matches else "wrong" for name, matches in equal.items()}
                add(one, match, why(one, match), verdicts)
            if one in golds:
                bleus = {name: question([one], [one], preset)["bleu2"].f1 for name, preset in PRESETS.items()}
                if low := {name: f"BLEU-2 {bleu:.1f}" for name, bleu in bleus.items() if bleu <= 50}:
                    add(one, one, ONE_WORD, low)
    order = lambda entry: (entry["why"] == ONE_WORD, -entry["count"], entry["predicted"], entry["gold"])  # noqa: E731
    return sorted(found.values(), key=order)
