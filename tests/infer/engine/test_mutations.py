"""Mistakes that a tree of prompts invites must be seen: each changes log-probabilities far beyond rounding."""

import pytest
import torch
from answering_models import tiny_model

from infer.engine import cache, levels
from infer.engine.generate import Generator
from infer.engine.settings import Hidden, Settings

# two notes of unlike length with three questions each: levels are padded, and branches are as unlike
PROMPTS = [
    [5 + note, *range(20, 50 + 9 * note), 200 + question, *range(7, 9 + question)]
    for note in range(2)
    for question in range(3)
]


def answers(tokenizer) -> torch.Tensor:
    hidden = [Hidden(4, 9, 31 + 9 * (row // 3)) if row % 3 == 2 else None for row in range(6)]  # after the note
    settings = [Settings(max_new_tokens=5, hidden=one) for one in hidden]
    outs = Generator(tiny_model(windows=(None, 24)), tokenizer).generate(PROMPTS, settings)
    return torch.tensor([out.logprobs for out in outs])


def slot_off_by_one(monkeypatch):
    found = levels.Level.positions
    monkeypatch.setattr(levels.Level, "positions", lambda self, begin: found(self, begin).roll(1, 1))


def padding_is_seen(monkeypatch):
    found = levels.Level.positions
    monkeypatch.setattr(levels.Level, "positions", lambda self, begin: found(self, begin).clamp_min(0))


def level_is_merged_twice(monkeypatch):
    found = cache.levels_of
    monkeypatch.setattr(cache, "levels_of", lambda prefixes: [group for group in found(prefixes) for _ in range(2)])
    pad = cache.padded

    def kept(prefixes):  # the second time, the keys and values of the first
        if not prefixes[0].keys[0].numel():
            return made[-1]
        made.append(pad(prefixes))
        return made[-1]

    made: list = []
    monkeypatch.setattr(cache, "padded", kept)


def mask_of_the_wrong_row(monkeypatch):
    found = cache.Cache._mask

    def rolled(self, *arguments):
        unseen_BTA = found(self, *arguments)
        return None if unseen_BTA is None else unseen_BTA.roll(1, 0)

    monkeypatch.setattr(cache.Cache, "_mask", rolled)


def prefix_of_the_wrong_branch(monkeypatch):
    found = levels.Level.index

    def rolled(self):
        found(self)
        self.place_r, self.even = self.place_r.roll(1), False

    monkeypatch.setattr(levels.Level, "index", rolled)


def hidden_of_the_wrong_row(monkeypatch):
    found = cache.Cache._prefill_prefixes

    def rolled(self):
        found(self)
        self.hidden_B3 = self.hidden_B3.roll(1, 0)

    monkeypatch.setattr(cache.Cache, "_prefill_prefixes", rolled)


MUTATIONS = (
    hidden_of_the_wrong_row,
    slot_off_by_one,
    padding_is_seen,
    level_is_merged_twice,
    mask_of_the_wrong_row,
    prefix_of_the_wrong_branch,
)


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_mistake_in_the_tree_is_noticed(mutation, tokenizer, monkeypatch):
    right = answers(tokenizer)
    mutation(monkeypatch)
    assert (answers(tokenizer) - right).abs().max() > 1e-6
