"""Similarity of two texts, 0 to 1: BLEU-2 in three definitions, ROUGE-L in two, ROUGE-1 over sets.

The longest common subsequence uses Hyyrö's bit-parallel algorithm (2004): a row of the dynamic-programming table is one
integer whose zero bits mark where the length grows by one, so a row costs five integer operations.

    >>> lcs_length("a b c d".split(), "b x d".split())
    2
    >>> round(bleu_coco(["left"], ["left"]), 6), bleu_sacrebleu(["left"], ["left"]), bleu_nltk(["left"], ["left"])
    (0.001, 1.0, 1.491668146240062e-154)
    >>> round(rouge_l_coco("upper lobe".split(), "right upper lobe".split()), 4)  # P = 1, R = 2/3, beta = 1.2
    0.7722
"""

from __future__ import annotations

import math
from collections import _count_elements  # type: ignore[attr-defined]
from collections.abc import Hashable, Iterable, Sequence
from itertools import pairwise

Words = Sequence[str]


def lcs_length(a: Sequence[Hashable], b: Sequence[Hashable]) -> int:
    """Length of the longest common subsequence."""
    positions: dict[Hashable, int] = {}  # of each item of b, as a bit mask
    bit = 1
    for item in b:
        positions[item] = positions.get(item, 0) | bit
        bit <<= 1
    mask = bit - 1
    row = mask
    for item in a:
        occurrences = positions.get(item)
        if occurrences is not None:
            matched = row & occurrences
            row = ((row + matched) | (row - matched)) & mask
    return len(b) - row.bit_count()


def matches(p: Words, g: Words) -> tuple[int, int]:
    """Clipped unigram and bigram matches (the numerators of BLEU's precisions)."""
    return _clipped(p, g), _clipped(pairwise(p), pairwise(g))


def _clipped(p: Iterable[Hashable], g: Iterable[Hashable]) -> int:
    remaining: dict[Hashable, int] = {}
    _count_elements(remaining, g)  # Counter's C loop on a plain dict: building a Counter would take half of BLEU's time
    get, found = remaining.get, 0
    for item in p:
        count = get(item)
        if count:
            remaining[item] = count - 1
            found += 1
    return found


def bleu_coco(p: Words, g: Words) -> float:
    """The COCO caption scorer's BLEU-2. Its precisions are (matches + 1e-15) / (n-grams + 1e-9), so that a text without
    a matching bigram scores close to 0."""
    product = 1.0
    for order, right in enumerate(matches(p, g)):
        product *= (right + 1e-15) / (max(0, len(p) - order) + 1e-9)
    ratio = (len(p) + 1e-15) / (len(g) + 1e-9)
    return product**0.5 * (math.exp(1 - 1 / ratio) if ratio < 1 else 1.0)


def bleu_sacrebleu(p: Words, g: Words) -> float:
    """sacrebleu's sentence BLEU, max_ngram_order=2, effective_order=True, exponential smoothing."""
    one, two = matches(p, g)
    if not one:
        return 0.0
    brevity = math.exp(1 - len(g) / len(p)) if len(p) < len(g) else 1.0
    if len(p) == 1:
        return brevity * one
    return brevity * math.sqrt(one / len(p) * (two or 0.5) / (len(p) - 1))


def bleu_nltk(p: Words, g: Words) -> float:
    """nltk's sentence_bleu with weights (0.5, 0.5) and no smoothing. An order without a match has a precision of the
    smallest normal float, so a right answer of one word scores 1.5e-154."""
    one, two = matches(p, g)
    if not one:
        return 0.0
    brevity = math.exp(1 - len(g) / len(p)) if len(p) <= len(g) else 1.0
    tiny = 2.2250738585072014e-308
    pairs = two / max(1, len(p) - 1) or tiny
    return brevity * math.exp(math.fsum((0.5 * math.log(one / len(p)), 0.5 * math.log(pairs))))


def rouge_l_coco(p: Words, g: Words) -> float:
    """The COCO caption scorer's ROUGE-L: F-measure with beta = 1.2, which favours recall."""
    common = lcs_length(p, g)
    if not common:
        return 0.0
    precision, recall = common / len(p), common / len(g)
    return (1 + 1.2**2) * precision * recall / (recall + 1.2**2 * precision)


def rouge_l_google(p: Words, g: Words) -> float:
    """rouge_score's rougeL F-measure (beta = 1)."""
    common = lcs_length(p, g)
    return 2 * common / (len(p) + len(g)) if common else 0.0


def rouge_1_sets(p: Words, g: Words) -> float:
    """The "ROUGE" of the paper's released script: F1 of the two sets of words, ignoring order and repeats."""
    a, b = set(p), set(g)
    return 2 * len(a & b) / (len(a) + len(b)) if a and b else 0.0
