"""A request's generation settings and its result."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

from model.support.cli import UserError

with contextlib.suppress(ImportError):  # tyro reads these annotations; a bare CUDA image may lack it
    import tyro


@dataclass(frozen=True)
class Hidden:
    """Masks the prompt's tokens first … stop − 1 for its tokens from `after` on and for all generated ones.
    0 ≤ first < stop ≤ after < length of the prompt."""

    first: int
    stop: int
    after: int


@dataclass(frozen=True)
class Settings:
    """How one request is continued. Raises UserError for values out of range."""

    max_new_tokens: int = 50
    """Maximum number of new tokens."""
    temperature: float = 0.0
    """0: greedy."""
    top_k: int = 0
    """Sample from the k likeliest tokens; 0: all."""
    top_p: float = 1.0
    """Sample from the smallest set of likeliest tokens whose probabilities sum to at least this."""
    min_p: float = 0.0
    """Sample from tokens at least this fraction as likely as the likeliest."""
    seed: int = 0
    """Seed of sampling."""
    stop: tuple[str, ...] = ()
    """Strings that end the generation; they are cut from its text."""
    stop_cycles: tyro.conf.Suppress[bool] = False
    """End when the text repeats itself (see generate.cycles)."""
    constraint: tyro.conf.Suppress[Any] = None
    """Constrained decoding: an object with `allowed(tokens) -> ids | None`, which gets the tokens generated so far and
    returns the ids allowed next (None: all), as a list or an int64 tensor. A tensor on the model's device saves a copy
    each step. With speculation draft tokens follow, which may not be allowed: then any ids do."""
    hidden: tyro.conf.Suppress[Hidden | None] = None
    """A part of the prompt to mask for the tokens after it."""
    runner_up: tyro.conf.Suppress[bool] = False
    """Keep the second likeliest token of each step."""

    def __post_init__(self) -> None:
        for name, low, high, kind in (
            ("temperature", 0, 100, (int, float)),
            ("top_p", 0, 1, (int, float)),
            ("min_p", 0, 1, (int, float)),
            ("top_k", 0, 10**9, int),
            ("max_new_tokens", 1, 10**9, int),
            ("seed", -(2**62), 2**62, int),
        ):
            value = getattr(self, name)
            if not (isinstance(value, kind) and low <= value <= high):
                integer = "a whole number " if kind is int else ""
                raise UserError(f"{name} is {value!r}; it must be {integer}between {low} and {high}")
        if self.top_p == 0:
            raise UserError("top_p is 0, which leaves no token; 1 keeps all")
        if not isinstance(self.stop, (tuple, list)) or not all(isinstance(text, str) for text in self.stop):
            raise UserError(f"stop is {self.stop!r}; it must be a tuple of texts, for example ('.',)")
        if any(not text for text in self.stop):
            raise UserError("a stop string is empty: it would stop before the first token; leave it out")


@dataclass(frozen=True)
class Generation:
    """The result of a request. `logprobs` are the tokens' natural log-probabilities under the model, before temperature
    and constraint. `finish_reason` is "stop" (end token), "stop_string", "repetition" or "length"."""

    text: str
    tokens: list[int]
    logprobs: list[float]
    finish_reason: str
    prompt_tokens: int = 0
