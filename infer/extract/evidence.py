"""Which of its occurrences a value was read from: hide each in turn, and see what the answer loses.

A note may hold "2.5 cm" twice, of a cyst and of the tumor. The answer's tokens are scored again (forced, not generated)
while the question and the answer do not see the keys of one of the two; where the occurrence that was read is hidden,
the value loses log-probability:

    loss(span) = log p(value | note, question) − log p(value | note, question that does not see span)

The note itself is read once: as long as one of its questions is in the cache, its keys are there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from infer.engine.generate import Generator
from infer.engine.settings import Generation, Hidden, Settings
from infer.engine.tree import shared
from infer.extract.answers import span_logprob, token_places
from infer.extract.places import Span

MARGIN = 0.25
"""Nats between the two largest losses below which they do not decide (python -m eval.bench placing)."""
MOST = 8
"""Occurrences that are hidden in turn, each a request. Of a value with more, none is decided."""


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

    @property
    def is_open(self) -> bool:
        """Whether the place is to be decided."""
        return 1 < len(self.spans) <= MOST

    def hidden(self, tokens: dict[int, int]) -> Iterator[tuple[list[int], Hidden]]:
        """The prompt, and of each place its tokens, which what comes after the text does not see. `tokens` holds, for
        every question about the text, how many of a prompt's come before a place: those that the prompt over the text
        up to there shares with it."""
        whole = self.prompt(self.text)

        def before(place: int, text: str) -> int:
            if place not in tokens:
                tokens[place] = shared(whole, self.prompt(text))
            return tokens[place]

        after = before(self.start + len(self.text) + 1, self.text + " x")
        for span in self.spans:
            first, stop = (before(place, self.text[: place - self.start]) for place in span)
            first = min(first, after - 1)
            yield whole, Hidden(first, min(max(first + 1, stop), after), after)


@dataclass(frozen=True)
class Forced:
    """A constraint (Settings.constraint) that allows one continuation only."""

    tokens: Sequence[int]

    def allowed(self, tokens: Sequence[int]) -> list[int]:
        return [self.tokens[len(tokens)]]


def hiding(generator: Generator, reading: Reading, tokens: dict[int, int]) -> Iterator[tuple[list[int], Settings]]:
    """The prompt and settings that score the value again without each of its places. `tokens` as in Reading.hidden."""
    count = sum(begin < reading.said[1] for begin, _ in token_places(reading.out, generator.decode))
    forced = Settings(max_new_tokens=count, constraint=Forced(reading.out.tokens[:count]))
    for prompt, hidden in reading.hidden(tokens):
        yield prompt, replace(forced, hidden=hidden)


def losses(reading: Reading, hidden: Sequence[Generation], decode: Callable[[list[int]], str]) -> list[float]:
    """The loss of every place of a reading, in nats, from the outcomes of `hiding`."""
    spelt = token_places(reading.out, decode)
    kept = span_logprob(reading.out.logprobs, spelt, *reading.said)
    return [kept - span_logprob(out.logprobs, spelt, *reading.said) for out in hidden]


def decide(spans: list[Span], lost: Sequence[float], margin: float = MARGIN) -> list[Span]:
    """The place with the largest loss, then the others whose loss is not smaller by more than `margin`."""
    order = sorted(range(len(spans)), key=lambda n: -lost[n])
    return [spans[n] for n in order if n == order[0] or lost[order[0]] - lost[n] <= margin]
