"""Requests that are added to a running batch get the plain model's tokens, and text in the cache is not read again."""

import contextlib
from dataclasses import replace

import pytest
import torch
from answering_models import make_mistake, plain_greedy, tokens_read, unseen
from drawn_prompts import MODELS, readings, trees, windowed
from hypothesis import given, settings
from hypothesis import strategies as st

from infer.engine.cache import Cache
from infer.engine.generate import Generator, RequestBatch, Settings
from infer.engine.levels import Level
from infer.engine.settings import Hidden


def check_added(generator, groups, between):
    """Each group of (prompt, new tokens) comes after so many steps of those before it: the plain model's tokens."""
    rows, states = RequestBatch(generator), []
    for group, steps in zip(groups, between, strict=True):
        added = generator.states(*zip(*[(p, Settings(max_new_tokens=new)) for p, new in group], strict=True), {})
        rows.add(added)
        states += added
        for _ in range(steps):
            if rows.active:
                rows.step()
    while rows.active:
        rows.step()
    for state in states:
        new, model = state.settings.max_new_tokens, generator.engine.model
        tokens, logprobs = plain_greedy(model, state.prompt, new, generator.stop_ids)
        assert state.tokens == tokens
        assert torch.allclose(torch.tensor(state.logprobs), torch.tensor(logprobs), atol=1e-5)


@pytest.mark.parametrize("kind", ["full", "window"])
@pytest.mark.parametrize("ended", [True, False])
@pytest.mark.parametrize("shared", [True, False])
def test_a_text_that_is_in_the_cache_is_not_read_again(kind, ended, shared, tokenizer):
    """Until the step after its last question has ended; what a window has dropped of it is read again."""
    model, text = MODELS[kind], [(7 * i) % 250 for i in range(60)]
    generator = Generator(model, tokenizer)
    rows = RequestBatch(generator)
    other = [[*text[:20], *range(100, 130), 200 + q] for q in range(2)] * shared  # a text that begins as this one
    asked = [[*text, 200 + q] for q in range(2)] + other
    rows.add(generator.states(asked, None, {"max_new_tokens": 1 if ended else 3}))
    assert bool(rows.active) != ended
    hidden = Hidden(10, 20, len(text))
    again = [[*text, 210 + q] for q in range(3)] + [[*one[:-1], 220] for one in other]
    states = generator.states(again, None, {"max_new_tokens": 2, "hidden": hidden})
    for state in states[3:]:
        state.settings = replace(state.settings, hidden=None)
    with tokens_read(model) as read:
        rows.add(states)
    assert sum(read) == len(states) + (60 + 30 * shared) * (kind == "window")
    while rows.active:
        rows.step()
    for state in states:
        with unseen(model, state.settings.hidden):
            assert state.tokens == plain_greedy(model, list(state.prompt), 2, tokenizer.stop_ids)[0]


def test_a_lone_request_with_a_hidden_part_does_not_read_its_text_again(tokenizer):
    model, text = MODELS["full"], [(7 * i) % 250 for i in range(100)]
    generator, rows = Generator(model, tokenizer), RequestBatch(Generator(model, tokenizer))
    rows.add(generator.states([[*text, 200], [*text, 201]], None, {"max_new_tokens": 4}))
    lone = generator.states([[*text, 210, 211]], None, {"max_new_tokens": 2, "hidden": Hidden(10, 20, len(text))})
    with tokens_read(model) as read:
        rows.add(lone)
    assert sum(read) == 2
    while rows.active:
        rows.step()
    with unseen(model, lone[0].settings.hidden):
        assert lone[0].tokens == plain_greedy(model, list(lone[0].prompt), 2, tokenizer.stop_ids)[0]


@settings(deadline=None, max_examples=15)
@given(data=st.data(), reading=readings(), kind=st.sampled_from(["plain", "mixed"]))
def test_tokens_do_not_depend_on_when_a_request_was_added(data, reading, kind, tokenizer):
    window, chunk = reading
    groups = [
        [(prompt, data.draw(st.integers(1, 12))) for prompt in prompts]
        for prompts in data.draw(st.lists(trees(), min_size=2, max_size=4))
    ]
    between = [data.draw(st.integers(0, 9)) for _ in groups]
    check_added(Generator(windowed(kind, window), tokenizer, chunk=chunk), groups, between)


def notes_of(lengths, new):
    """A group a note: three questions about so many tokens, with answers of different lengths."""
    notes = [[(7 * i + n) % 250 for i in range(length)] for n, length in enumerate(lengths)]
    return [[([*note, 200 + q, q], new + 2 * q) for q in range(3)] for note in notes]


MISTAKES = {  # of Cache.join, Cache.retain or Level's index
    "a slot off by one": ("join", "[self.length_B, other.length_B]", "[self.length_B, other.length_B - 1]"),
    "positions off by one": ("join", "[self.start_B, other.start_B]", "[self.start_B, other.start_B + 1]"),
    "a stale slot after a refill": ("join", "other.keys[layer], dim=-1", "self.keys[layer], dim=-1"),
    "values of the rows before": ("join", "other.values[layer], dim=-2", "self.values[layer], dim=-2"),
    "a note's keys for its neighbour's": ("join", "own + prefix.branches.start,", "own - 1 + prefix.branches.start,"),
    "a tree's levels in one": ("join", "free.remove(match)", "pass"),
    "a mask of the wrong row": ("index", "places.get(branch, -1) // n", "places.get(branch + 1, -1) // n"),
    "a row kept for its neighbour": ("retain", "self.start_B[kept_B]", "self.start_B[: len(rows)]"),
}


@pytest.mark.parametrize("mistake", [None, *MISTAKES])
def test_a_mistake_in_refilling_is_noticed(mistake, tokenizer, monkeypatch):
    if mistake is not None:
        name, right, wrong = MISTAKES[mistake]
        owner = Level if name == "index" else Cache
        make_mistake(monkeypatch, owner, name, right, wrong)
    noticed = pytest.raises((AssertionError, IndexError, RuntimeError)) if mistake else contextlib.nullcontext()
    with noticed:
        groups = notes_of([40, 30, 60, 12], 4)
        above, below = [*range(40)], [*range(100, 140)]  # a tree of two levels of alike lengths
        shared = [([*above, *below, 7], 5), ([*above, *below, 8], 5), ([*above, 9], 5)]
        check_added(Generator(MODELS["full"], tokenizer), [*groups, shared], [2, 3, 6, 1, 0])
