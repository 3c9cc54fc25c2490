"""Other answers to a question: at the step where the model was least certain, its second choice, continued greedily."""

from __future__ import annotations

import math
from itertools import accumulate
from typing import Any

from infer import tasks
from infer.engine.generate import Generator, State
from infer.engine.settings import Generation
from infer.extract.answers import kept_logprobs


def second_choices(generator: Generator, state: State, count: int) -> list[State]:
    """The `count` likeliest ways to leave a finished request's answer by one step's second choice, best first. Each is
    a request that continues there (already finished if the second choice ends the answer). The request must have been
    generated with `Settings.runner_up`."""
    before = accumulate(state.logprobs, initial=0.0)
    steps = [
        (total + logprob, n) for n, (total, (_, logprob)) in enumerate(zip(before, state.runner_ups, strict=False))
    ]
    found = []
    for total, n in sorted(steps, key=lambda step: -step[0])[:count]:
        if math.isfinite(total):
            one = State(state.prompt, state.settings, state.tokens[:n], state.logprobs[:n])
            generator.enter(one, *state.runner_ups[n])
            one.prompt, one.given = [*one.prompt, *one.tokens], len(one.tokens)
            found.append(one)
    return found


def alternative(generator: Generator, name: str, out: Generation) -> dict[str, Any]:
    """A record's entry: the answer's text, written as the task writes it, and its log-probability."""
    text = " ".join(out.text.split())
    if name != "diagnosis" and text:
        text = tasks.answer(tasks.parse_answer(text)).strip()
    return {"text": text, "logprob": round(sum(kept_logprobs(out, generator.decode)), 4)}
