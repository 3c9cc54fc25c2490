"""Prompt lookup: guess the next tokens from what followed the same two tokens before, check all guesses in one step.

Answers repeat the note, so the guess is often right, and a step over a few rows reads the weights once, as a step over
one does: while decoding waits for memory, guesses are free. Nothing is lost: each guessed token is kept only where it
is what the request's own choice (greedy, sampled with its seed, or constrained) yields there.
"""

from __future__ import annotations

from collections.abc import Sequence

ROWS = 8  # tokens of a step up to which a processor still waits for memory rather than for arithmetic
MOST = 7  # guesses of one request at once


class Lookup:
    """One request's guesses. It stops guessing while its guesses are mostly wrong."""

    def __init__(self, prompt: Sequence[int]) -> None:
        self.ids: list[int] = []
        self.after: dict[tuple[int, int], int] = {}  # two tokens → where the text went on after them last
        self.tried = self.taken = 0
        self.add(prompt)

    def add(self, tokens: Sequence[int]) -> None:
        """Enter tokens of the text. A pair is known only once something follows it."""
        for token in tokens:
            if len(self.ids) >= 2:
                self.after[self.ids[-2], self.ids[-1]] = len(self.ids)
            self.ids.append(token)

    def guess(self, most: int) -> list[int]:
        """At most `most` tokens that may come next; [] where none are known or where guessing does not pay."""
        if self.tried >= 16 and self.taken * 4 < self.tried:
            return []
        start = self.after.get((self.ids[-2], self.ids[-1])) if len(self.ids) >= 2 else None
        return [] if start is None else self.ids[start : start + min(most, MOST)]

    def learn(self, tried: int, taken: int) -> None:
        self.tried, self.taken = self.tried + tried, self.taken + taken


def share(active: int, rows: int = ROWS) -> int:
    """How many guesses each of `active` requests may bring so that a step stays within the free rows."""
    return max(0, rows // active - 1)
