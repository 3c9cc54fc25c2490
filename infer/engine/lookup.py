"""Prompt-lookup speculation: draft the tokens that followed the last two tokens before, verify all drafts in one step.

Answers repeat the note, so drafts are often right, and a step over a few rows takes little longer than over one,
because both read the weights once. The output does not change: a draft token is accepted only if it equals the token
that the request chooses there (greedy, sampled with its seed, or constrained).

Whether to speculate depends on the expected gain. If each draft token is accepted with probability p, given that those
before it were, a step with k of them yields 1 + p + … + p^k tokens; for B requests it takes B · (k + 1) rows. With
p = 0.6, one request, and a further row costing an eighth of the first row's time:

    k           0      1      2      3      4
    tokens      1      1.60   1.96   2.18   2.31
    time        1      1.13   1.25   1.38   1.50
    gain        1      1.42   1.57   1.58   1.54         k = 3 is chosen; with p = 0.1, k = 0

p is a running average, updated with every token: even without speculation, the token is compared with the draft.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from infer.engine.forward import Engine, Layer
from model.support.hardware import processor

MAX_GUESSES = 7  # draft tokens of one request per step
MEMORY = 8  # time constant of the running average of a request's acceptance rate, in tokens
MARGIN = 1.1  # speculate only if the expected gain is at least this


class Lookup:
    """Draft tokens of one request, and its acceptance rate."""

    def __init__(self, prompt: Sequence[int]) -> None:
        self.ids: list[int] = []
        self.after: dict[tuple[int, int], int] = {}  # two tokens → the index after their last occurrence
        self.rate = 0.5  # prior
        self.add(prompt, count=False)

    def add(self, tokens: Sequence[int], count: bool = True) -> None:
        """Append tokens of the prompt or the answer; `count`: update the acceptance rate with them."""
        for token in tokens:
            if len(self.ids) >= 2:
                pair = self.ids[-2], self.ids[-1]
                if count and pair in self.after:
                    self.rate += ((self.ids[self.after[pair]] == token) - self.rate) / MEMORY
                self.after[pair] = len(self.ids)
            self.ids.append(token)

    def guess(self, most: int) -> list[int]:
        """At most `most` draft tokens; [] if the last two tokens have not occurred before."""
        start = self.after.get((self.ids[-2], self.ids[-1])) if len(self.ids) >= 2 else None
        return [] if start is None else self.ids[start : start + max(0, min(most, MAX_GUESSES))]


def best_guess_count(rates: Sequence[float], known: Sequence[int], row_cost: float) -> int:
    """Number of draft tokens per request that maximizes expected tokens per unit of time; 0 if speculation does not
    pay.

    `rates`: acceptance rate of each request; `known`: number of draft tokens each request has; `row_cost`: time of one
    further row of a step relative to the first row.
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
    """Time of one further row of a decode step relative to a step of one row.

    Constants, rounded from measured steps of one to eight rows. They are not measured at run time, because rounding
    depends on the number of rows: a request must take the same steps on every run.
    """
    if engine.device.type != "cpu":
        return 1 / 64  # a GPU computes hundreds of operations in the time of reading a byte
    first = engine.layers[0]
    quantized = first.qkv.quantized if isinstance(first, Layer) else None
    if quantized is not None and quantized.kind == "w8a8":
        return 1 / 16
    if quantized is not None:  # packed weights are dequantized again every four rows, others once a step
        return 1 / 4 if quantized.packed else 1 / 32
    if engine.dtype == torch.bfloat16:
        return 1 / 16 if "bf16" in processor() else 1.0  # emulated bf16 is compute-bound
    return 1 / 8
