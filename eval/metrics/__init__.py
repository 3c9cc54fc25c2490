"""Exact match, BLEU-2 and ROUGE-L of sets of answers, under presets tested against the public scorers."""

from eval.metrics.presets import PRESETS
from eval.metrics.scoring import Figures, Scores, score

__all__ = ["Figures", "PRESETS", "Scores", "score"]
