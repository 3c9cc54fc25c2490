"""Prompt lookup: guess the next tokens from what followed the same two tokens before, check all guesses in one step.

Answers repeat the note, so the guess is often right, and a step over a few rows reads the weights once, as a step over
one does. Nothing is lost: each guessed token is kept only where it is what the request's own choice (greedy, sampled
with its seed, or constrained) yields there.

Whether to guess depends on the expected gain. A request whose guesses are accepted with probability p, each after the
one before, yields 1 + p + … + p^k tokens a step with k guesses; a step of all B requests with up to k guesses each
takes B · (k + 1) rows. With p = 0.6, one request, and one more row at an eighth of the first one's time:

    k           0      1      2      3      4
    tokens      1      1.60   1.96   2.18   2.31
    time        1      1.13   1.25   1.38   1.50
    gain        1      1.42   1.57   1.58   1.54         k = 3 is taken; with p = 0.1 it is k = 0

p is updated with every token, guessing or not: the token is compared with what would have been guessed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from infer.engine.forward import Engine, Layer
from model.support.hardware import processor

MOST = 7  # guesses of one request at once
MEMORY = 8  # guesses over which a request's rate is averaged
MARGIN = 1.1  # a smaller expected gain than a tenth may be none


class Lookup:
    """One request's guesses, and how often they are accepted."""

    def __init__(self, prompt: Sequence[int]) -> None:
        self.ids: list[int] = []
        self.after: dict[tuple[int, int], int] = {}  # two tokens → the index after their last occurrence
        self.rate = 0.5  # nothing is known yet
        self.add(prompt, count=False)

    def add(self, tokens: Sequence[int], count: bool = True) -> None:
        """Enter tokens of the text. A pair is known only once something follows it."""
        for token in tokens:
            if len(self.ids) >= 2:
                pair = self.ids[-2], self.ids[-1]
                if count and pair in self.after:
                    self.rate += ((self.ids[self.after[pair]] == token) - self.rate) / MEMORY
                self.after[pair] = len(self.ids)
            self.ids.append(token)

    def guess(self, most: int) -> list[int]:
        """At most `most` tokens that may come next; [] where none are known."""
        start = self.after.get((self.ids[-2], self.ids[-1])) if len(self.ids) >= 2 else None
        return [] if start is None else self.ids[start : start + max(0, min(most, MOST))]


def best_guess_count(rates: Sequence[float], known: Sequence[int], row_cost: float) -> int:
    """The number of guesses a request that maximizes expected tokens per unit of time; 0 where guessing does not pay.

    `rates`: the acceptance rate of each request's guesses; `known`: how many it has; `row_cost`: the time of one more
    row of a step, as a share of the first row's.
    """
    B = len(rates)
    tokens, best, least = float(B), 0, MARGIN * B / (1 + row_cost * (B - 1))
    for k in range(1, max(known, default=0) + 1):
        tokens += sum(rate**k for rate, n in zip(rates, known, strict=True) if n >= k)
        gain = tokens / (1 + row_cost * (B * (k + 1) - 1))
        if gain > least:
            best, least = k, gain
    return best


def row_cost(engine: Engine) -> float:
    """The time of one more row of a step, as a share of a step of one row, for an engine's weights.

    Constants, rounded from measured steps of one to eight rows: the share depends little on the machine, and a request
    must take the same steps every time, because rounding depends on the number of rows.
    """
    if engine.device.type != "cpu":
        return 1 / 64  # hundreds of operations a byte
    first = engine.layers[0]
    quantized = first.qkv.quantized if isinstance(first, Layer) else None
    if quantized is not None and quantized.kind == "w8a8":
        return 1 / 16
    if quantized is not None:  # packed weights are dequantized again every four rows, others once a step
        return 1 / 4 if quantized.packed else 1 / 32
    if engine.dtype == torch.bfloat16:
        return 1 / 16 if "bf16" in processor() else 1.0  # emulated: arithmetic is all there is
    return 1 / 8
