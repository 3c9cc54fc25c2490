"""Which occurrence of a repeated value the model read: mask each one in turn and measure the loss in log-probability.

A note may say "2.5 cm" twice, of a cyst and of the tumor. The answer's tokens are scored again (forced, not generated)
with the keys of one occurrence masked for the question and the answer. Masking the occurrence that was read makes the
value less likely:

    loss(span) = log p(value | note, question) − log p(value | note, question that does not see span)

The note is not prefilled again: its keys stay in the cache as long as one of its questions does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from infer.engine.generate import Generator
from infer.engine.settings import Generation, Hidden, Settings
from infer.engine.tree import common_length
from infer.extract.answers import span_logprob, token_spans
from infer.extract.places import Span

MARGIN = 0.25
"""If the two largest losses differ by less (nats), the place is ambiguous (chosen by python -m eval.bench placing)."""
MAX_SPANS = 8
"""A value with more occurrences is not resolved: each costs a request."""


@dataclass(frozen=True)
class Reading:
    """A value of an answer and the spans of the note where it may have been read."""

    prompt: Callable[[str], list[int]]
    """Gives the question's prompt about a text."""
    text: str
    """The text that was asked about: the note from `start` on (characters)."""
    start: int
    out: Generation
    """The answer."""
    value_span: Span
    """The value in `out.text`."""
    spans: list[Span]
    """Its occurrences in the note."""

    @property
    def is_open(self) -> bool:
        """True if there are several occurrences to choose from, and not too many to try."""
        return 1 < len(self.spans) <= MAX_SPANS

    def hidden(self, token_counts: dict[int, int]) -> Iterator[tuple[list[int], Hidden]]:
        """For each span, the prompt and the tokens to mask for everything after the text.

        `token_counts` maps an offset in the note to the number of prompt tokens before it, and is shared by all
        questions about the text. That number is the length of the common prefix of the prompts about the text and about
        the text up to that offset.
        """
        prompt = self.prompt(self.text)

        def tokens_before(offset: int, text: str) -> int:
            if offset not in token_counts:
                token_counts[offset] = common_length(prompt, self.prompt(text))
            return token_counts[offset]

        # the end of the text, as a key beyond its offsets: a token that merges it with other words after it is not its
        after = tokens_before(self.start + len(self.text) + 1, self.text + " x")
        for span in self.spans:
            first, stop = (tokens_before(offset, self.text[: offset - self.start]) for offset in span)
            first = min(first, after - 1)
            yield prompt, Hidden(first, min(max(first + 1, stop), after), after)


@dataclass(frozen=True)
class Forced:
    """A constraint (Settings.constraint) that allows only the given tokens."""

    tokens: Sequence[int]

    def allowed(self, tokens: Sequence[int]) -> list[int]:
        return [self.tokens[len(tokens)]]


def hiding(
    generator: Generator, reading: Reading, token_counts: dict[int, int]
) -> Iterator[tuple[list[int], Settings]]:
    """For each span, the prompt and settings that score the answer up to the value again with the span masked.
    `token_counts` as in Reading.hidden."""
    count = sum(start < reading.value_span[1] for start, _ in token_spans(reading.out, generator.decode))
    forced = Settings(max_new_tokens=count, constraint=Forced(reading.out.tokens[:count]))
    for prompt, hidden in reading.hidden(token_counts):
        yield prompt, replace(forced, hidden=hidden)


def losses(reading: Reading, masked: Sequence[Generation], decode: Callable[[list[int]], str]) -> list[float]:
    """The loss of every span of a reading, in nats. `masked` are the results of the requests of `hiding`."""
    spans = token_spans(reading.out, decode)
    full = span_logprob(reading.out.logprobs, spans, *reading.value_span)
    return [full - span_logprob(out.logprobs, spans, *reading.value_span) for out in masked]


def decide(spans: list[Span], losses: Sequence[float], margin: float = MARGIN) -> list[Span]:
    """The span with the largest loss, then all others whose loss is within `margin` of it, by descending loss."""
    order = sorted(range(len(spans)), key=lambda n: -losses[n])
    return [spans[n] for n in order if n == order[0] or losses[order[0]] - losses[n] <= margin]
