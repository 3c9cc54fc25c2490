"""Okapi BM25 over an inverted index. Scores are bit-identical to rank_bm25's BM25Okapi.

    score(d, q) = Σ_w idf(w) · f (k1 + 1) / (f + k1 (1 − b + b |d| / mean |d|)),    f = count of w in d

idf(w) = log(N − n + ½) − log(n + ½) for a word in n of N texts. If that is negative (a word of more than half of the
texts), it is ε times the mean idf of all words. k1, b and ε are rank_bm25's defaults.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

from model.support.cli import UserError

K1, B, EPSILON = 1.5, 0.75, 0.25
_WORD = re.compile(r"\w+")


def words(text: str) -> list[str]:
    """The words of a text in lower case, in order."""
    return _WORD.findall(text.lower())


class BM25:
    """An inverted index of `texts`. Raises UserError if they hold no word."""

    def __init__(self, texts: Sequence[str]) -> None:
        counts = [Counter(words(text)) for text in texts]
        self.size = len(counts)
        lengths = np.array([sum(count.values()) for count in counts], dtype=np.float64)
        if not lengths.sum():
            raise UserError("BM25 has no word to index; give at least one text that is not empty")
        # rank_bm25's order of operations, here and below, for bit-identical scores
        self._norm = K1 * (1 - B + B * lengths / (int(lengths.sum()) / self.size))
        postings: dict[str, tuple[list[int], list[int]]] = {}
        for row, count in enumerate(counts):
            for word, times in count.items():
                rows, frequencies = postings.setdefault(word, ([], []))
                rows.append(row)
                frequencies.append(times)
        self._postings = {word: (np.array(rows), np.array(f, np.float64)) for word, (rows, f) in postings.items()}
        idf, total = {}, 0.0
        for word, (held, _) in self._postings.items():
            idf[word] = math.log(self.size - len(held) + 0.5) - math.log(len(held) + 0.5)
            total += idf[word]  # not sum(), which compensates for rounding
        floor = EPSILON * (total / len(idf))
        self._idf = {word: floor if value < 0 else value for word, value in idf.items()}

    def scores(self, query: str) -> np.ndarray:
        """The score of every text (float64). A word that occurs twice in the query counts twice."""
        total = np.zeros(self.size)
        for word in words(query):
            if word in self._postings:
                rows, f = self._postings[word]
                total[rows] += self._idf[word] * (f * (K1 + 1) / (f + self._norm[rows]))
        return total

    def search(self, query: str, k: int) -> list[tuple[int, float]]:
        """[(index, score), …] of the k best texts, best first; ties go to the lower index.

        Raises UserError for a query without words.
        """
        if not words(query):
            raise UserError("the query is empty: it holds no word to search for")
        scores = self.scores(query)
        best = np.argsort(-scores, kind="stable")[:k]
        return [(int(row), float(scores[row])) for row in best]
