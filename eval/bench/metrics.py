"""Our metrics against the public ones, end to end (texts in, figures out) at a given length. Same figures, see
tests/eval.

The texts are all different and each is scored once per pass, so no program's memory of whole lines helps it.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any

WORDS = (
    "left right upper lower lobe breast lung colon invasive ductal carcinoma adenocarcinoma grade 2 3 stage IIB IIIA "
    "2.5 1.8 cm mm x tumor, mass. biopsy shows; margins (negative) ER+ PR- HER2 positive the a of with and no patient "
    "was seen in clinic today for follow-up."
).split()


def texts(count: int, tokens: int, seed: int = 0) -> list[tuple[str, str]]:
    """Pairs (prediction, reference): the reference with one word in six changed."""
    rng = random.Random(seed)
    pairs = []
    for _ in range(count):
        reference = rng.choices(WORDS, k=tokens)
        prediction = [rng.choice(WORDS) if rng.random() < 1 / 6 else word for word in reference]
        pairs.append((" ".join(prediction), " ".join(reference)))
    return pairs


def seconds(run: Callable[[str, str], float], pairs: list[tuple[str, str]]) -> float:
    began = time.perf_counter()
    for p, g in pairs:
        run(p, g)
    return time.perf_counter() - began


def rows(tokens: int = 150, count: int = 100, repeats: int = 5) -> list[dict[str, Any]]:
    """Milliseconds a pair, ours and the peer's in turn, the best of `repeats` passes over `count` fresh pairs each."""
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu.metrics import BLEU

    from eval.metrics import pairs as likeness
    from eval.metrics.text import words_13a, words_rouge

    rouge, bleu = RougeScorer(["rougeL"]), BLEU(max_ngram_order=2, effective_order=True)
    contests: list[tuple[str, str, Callable[[str, str], float], Callable[[str, str], float]]] = [
        (
            "ROUGE-L",
            "rouge-score",
            lambda p, g: likeness.rouge_l_google(words_rouge(p), words_rouge(g)),
            lambda p, g: rouge.score(g, p)["rougeL"].fmeasure,
        ),
        (
            "sentence BLEU-2",
            "sacrebleu",
            lambda p, g: likeness.bleu_sacrebleu(words_13a(p), words_13a(g)),
            lambda p, g: bleu.sentence_score(p, [g]).score / 100,
        ),
    ]
    result = []
    for name, peer_name, ours, peers in contests:
        for p, g in texts(5, tokens, seed=-1):
            assert abs(ours(p, g) - peers(p, g)) < 1e-9
        best = [
            min(values)
            for values in zip(
                *(
                    (seconds(ours, texts(count, tokens, turn)), seconds(peers, texts(count, tokens, turn)))
                    for turn in range(repeats)
                ),
                strict=True,
            )
        ]
        mine, theirs = (1e3 * value / count for value in best)
        result.append(
            {
                "name": name,
                "ours": mine,
                "peer": theirs,
                "peer_name": peer_name,
                "ratio": theirs / mine,
                "limit": None,
                "share_of_limit": None,
                "unit": "ms a pair",
                "setting": f"{tokens} words, {count} pairs, best of {repeats}",
            }
        )
    return result
