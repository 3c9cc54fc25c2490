"""A request's settings and its result."""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from typing import Any

from model.support.cli import UserError

with contextlib.suppress(ImportError):  # only the command line reads these annotations; a bare CUDA image lacks it
    import tyro


@dataclass(frozen=True)
class Hidden:
    """The tokens `first` … `stop` − 1 of a prompt, which its tokens from `after` on and those generated do not see.
    0 ≤ first < stop ≤ after < the prompt's length."""

    first: int
    stop: int
    after: int


@dataclass(frozen=True)
class Settings:
    """How one request is continued. Values out of range are refused."""

    max_new_tokens: int = 50
    """At most so many new tokens."""
    temperature: float = 0.0
    """0: greedy."""
    top_k: int = 0
    """Only the k likeliest tokens; 0: all."""
    top_p: float = 1.0
    """Only the likeliest tokens that reach this share of the probability."""
    min_p: float = 0.0
    """Only tokens at least this share as likely as the likeliest."""
    seed: int = 0
    """Seed of sampling."""
    stop: tuple[str, ...] = ()
    """Texts that end the generation; they are not part of its text."""
    stop_cycles: tyro.conf.Suppress[bool] = False
    """End where the same tokens repeat without end."""
    constraint: tyro.conf.Suppress[Any] = None
    """What tokens are allowed after those generated so far: an object with `allowed(tokens) -> ids | None`. The ids are
    a list or an int64 tensor (on the model's device, nothing is copied each step)."""
    hidden: tyro.conf.Suppress[Hidden | None] = None
    """A part of the prompt that its end does not see."""

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
            if not (isinstance(value, kind) and math.isfinite(value) and low <= value <= high):
                whole = "a whole number " if kind is int else ""
                raise UserError(f"{name} is {value!r}; it must be {whole}between {low} and {high}")
        if self.top_p == 0:
            raise UserError("top_p is 0, which leaves no token; 1 keeps all")
        if not isinstance(self.stop, (tuple, list)) or not all(isinstance(text, str) for text in self.stop):
            raise UserError(f"stop is {self.stop!r}; it must be a tuple of texts, for example ('.',)")
        if any(not text for text in self.stop):
            raise UserError("a stop string is empty: it would stop before the first token; leave it out")


@dataclass(frozen=True)
class Generation:
    """The result of a request. `logprobs` are the tokens' natural log-probabilities under the model itself;
    `finish_reason` is "stop" (end token), "stop_string", "repetition" or "length"."""

    text: str
    tokens: list[int]
    logprobs: list[float]
    finish_reason: str
    prompt_tokens: int = 0
