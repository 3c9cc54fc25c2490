"""Which of its occurrences a value was read from: hide each in turn, and see what the answer loses.

A note may hold "2.5 cm" twice, of a cyst and of the tumor. The answer's tokens are scored again (forced, not generated)
on the note without one of the two; where the occurrence that was read is missing, the value loses log-probability:

    loss(span) = log p(value | note, question) − log p(value | note without span, question)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from infer.engine.generate import Generator
from infer.engine.settings import Generation, Settings
from infer.extract.answers import span_logprob, token_ends
from infer.extract.places import Span

MARGIN = 0.25
"""Nats between the two largest losses below which they do not decide (python -m eval.bench placing)."""
MOST = 8
"""Occurrences that are hidden in turn: each costs a reading of the note from there on. Of a value with more, none is
decided."""


@dataclass(frozen=True)
class Reading:
    """A value in an answer and the places where it may have been read. `prompt` gives the question's prompt over a
    text; `text` is the note's from `start` on; `said` are the value's characters in `out.text`, `spans` the note's."""

    prompt: Callable[[str], list[int]]
    text: str
    start: int
    out: Generation
    said: Span
    spans: list[Span]

    def without(self, span: Span) -> list[int]:
        """The prompt over the text without one of the places."""
        return self.prompt(self.text[: span[0] - self.start] + self.text[span[1] - self.start :])


@dataclass(frozen=True)
class Forced:
    """A constraint (Settings.constraint) that allows one continuation only."""

    tokens: Sequence[int]

    def allowed(self, tokens: Sequence[int]) -> list[int]:
        return [self.tokens[len(tokens)]]


def hiding(generator: Generator, reading: Reading) -> Iterator[tuple[list[int], Settings]]:
    """The prompt and settings that score the value again without each of its places."""
    ends = token_ends(reading.out, generator.decode)
    count = 1 + next(n for n, end in enumerate(ends) if end >= reading.said[1])
    for span in reading.spans:
        forced = Settings(max_new_tokens=count, constraint=Forced(reading.out.tokens[:count]))
        # a text with less in it may take a token more, which may be one too many: the first is left out then
        yield reading.without(span)[-(generator.max_length - count) :], forced


def losses(reading: Reading, hidden: Sequence[Generation], decode: Callable[[list[int]], str]) -> list[float]:
    """The loss of every place of a reading, in nats, from the outcomes of `hiding`."""
    ends = token_ends(reading.out, decode)
    kept = span_logprob(reading.out.logprobs, ends, *reading.said)
    return [kept - span_logprob(out.logprobs, ends, *reading.said) for out in hidden]


def decide(spans: list[Span], lost: Sequence[float], margin: float = MARGIN) -> list[Span]:
    """The place with the largest loss, then the others whose loss is not smaller by more than `margin`."""
    order = sorted(range(len(spans)), key=lambda n: -lost[n])
    return [spans[n] for n in order if n == order[0] or lost[order[0]] - lost[n] <= margin]
