"""The set scorer: a question's predicted answers P against its gold answers G, under a preset.

    precision = mean over p of max over g of m(p, g)        both empty       1, 1, 1
    recall    = mean over g of max over p of m(p, g)        only G empty     0, 1, 0
    F1        = harmonic mean of the two, per question      only P empty     1, 0, 0

Scores are means over questions, in percent. Two of three receptors found, none wrong: precision 1, recall 2/3, F1 0.8.

    >>> result = score(["ER+; PR-"], [["ER+", "PR-", "HER2-"]])
    >>> result.exact_match
    Figures(precision=100.0, recall=66.66666666666666, f1=80.0)
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from eval.metrics.presets import PRESETS, Preset, chosen
from model.support.cli import UserError

METRICS = ("exact_match", "bleu2", "rouge_l")


@dataclass(frozen=True)
class Figures:
    """Precision, recall and F1 in percent; NaN if the preset does not compute the metric."""

    precision: float
    recall: float
    f1: float


@dataclass(frozen=True)
class Scores:
    """Means over questions, with each question's own scores."""

    exact_match: Figures
    bleu2: Figures
    rouge_l: Figures
    average_f1: float
    """Mean F1 of the metrics that the preset computes (three; two for cancerllm-released)."""
    per_question: tuple[dict[str, Figures], ...]
    """Metric name → figures, in the order of the questions."""
    signature: str
    """The preset and its choices, enough to reproduce the scores."""


def score(
    predictions: Sequence[str | Sequence[str]], references: Sequence[str | Sequence[str]], preset: str = "clinical"
) -> Scores:
    """Score the answers to many questions.

    Each list has one item per question: a list of answers, or one text, which is split at "; " under `clinical` and at
    commas under the other presets, as the paper's scripts do. For a single answer that contains commas give a list of
    one.

    `preset` is a name, or the signature of another score. Raises UserError if an argument is a text instead of a list,
    if the lists are empty or differ in length, or if the preset is unknown.
    """
    made = chosen(preset)
    if isinstance(predictions, str) or isinstance(references, str):
        raise UserError("a text in place of a list; give lists with one item per question")
    if len(predictions) != len(references):
        raise UserError(f"{len(predictions)} predictions for {len(references)} references; give one item per question")
    if not references:
        raise UserError("nothing to score: the lists are empty")
    return gather([question(p, g, made) for p, g in zip(predictions, references, strict=True)], made.name)


def gather(per_question: Sequence[dict[str, Figures]], preset: str) -> Scores:
    """Average the questions' scores."""
    means = {
        name: Figures(
            *(_mean(getattr(one[name], part) for one in per_question) for part in ("precision", "recall", "f1"))
        )
        for name in METRICS
    }
    average = _mean(means[name].f1 for name in METRICS if not math.isnan(means[name].f1))
    return Scores(
        **means,
        average_f1=average,
        per_question=tuple(per_question),
        signature=PRESETS[preset].signature,
    )


def question(predicted: str | Sequence[str], gold: str | Sequence[str], preset: Preset) -> dict[str, Figures]:
    """The three metrics of one question."""
    ps, gs = answers(predicted, preset), answers(gold, preset)
    exact = best_matches([preset.form(p) for p in ps], [preset.form(g) for g in gs], lambda p, g: float(p == g))
    nan = Figures(math.nan, math.nan, math.nan)
    p_words, g_words = [preset.words(p) for p in ps], [preset.words(g) for g in gs]
    bleu = best_matches(p_words, g_words, preset.bleu) if preset.bleu else nan
    if preset.rouge_words:
        p_words, g_words = [preset.rouge_words(p) for p in ps], [preset.rouge_words(g) for g in gs]
    return {"exact_match": exact, "bleu2": bleu, "rouge_l": best_matches(p_words, g_words, preset.rouge)}


def answers(given: str | Sequence[str], preset: Preset) -> list[str]:
    """The distinct answers in a text or a list, without blanks and without the preset's phrase for "no answer"."""
    parts: Iterable[str] = [given] if isinstance(given, str) else given
    if isinstance(given, str) or preset.splits_lists:
        parts = [part for text in parts for part in re.split(preset.separator, text)]
    found = list(dict.fromkeys(part.strip() for part in parts if part.strip()))
    if preset.nothing is not None:
        found = [answer for answer in found if answer.lower().rstrip(".") != preset.nothing]
    return found


def best_matches(ps: Sequence, gs: Sequence, m) -> Figures:
    """Precision, recall and F1 of predicted against gold answers under the similarity m(p, g)."""
    if not ps or not gs:
        precision, recall = float(not ps), float(not gs)
    else:
        table = [[m(p, g) for g in gs] for p in ps]
        precision = sum(map(max, table)) / len(ps)
        recall = sum(max(column) for column in zip(*table, strict=True)) / len(gs)
    f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
    return Figures(100 * precision, 100 * recall, 100 * f1)


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return math.fsum(values) / len(values) if values else math.nan
