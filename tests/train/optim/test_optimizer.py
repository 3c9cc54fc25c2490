"""A recipe's optimizers hold its numbers, and decay falls on matrices only."""

from dataclasses import replace

import pytest
import torch
from tiny_runs import RECIPE, tiny

from train.optim.optimizer import make_optimizers, named_trainable, rate


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit", "muon", "sgd"])
def test_every_parameter_is_in_one_group_and_only_matrices_decay(optimizer):
    recipe = replace(RECIPE, full=True, optimizer=optimizer, weight_decay=0.3, learning_rate=0.02, muon_rate=0.05)
    model = tiny(recipe)
    made = make_optimizers(model, recipe)
    groups = [group for each in made for group in each.param_groups]
    held = [param for group in groups for param in group["params"]]
    assert len(held) == len(set(held)) and set(held) == set(named_trainable(model).values())
    for group in groups:
        assert {param.dim() >= 2 for param in group["params"]} == {group["weight_decay"] == 0.3}
    muons = [each for each in made if isinstance(each, torch.optim.Muon)]
    assert len(muons) == (optimizer == "muon")
    assert all(group["peak"] == (0.05 if each in muons else 0.02) for each in made for group in each.param_groups)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
def test_the_averages_are_the_recipes(optimizer):
    recipe = replace(RECIPE, optimizer=optimizer, betas=(0.8, 0.95))
    (made,) = make_optimizers(tiny(recipe), recipe)
    assert {group["betas"] for group in made.param_groups} == {(0.8, 0.95)}


def test_schedules_fall_as_they_are_called():
    recipe = replace(RECIPE, steps=8, warmup=0)
    cosine = (2 + 2**0.5) / 4  # (1 + cos 45°) / 2
    falls = {"linear": [1.0, 0.75, 0.5, 0.0], "cosine": [1.0, cosine, 0.5, 0.0], "constant": [1.0] * 4}
    for schedule, expected in falls.items():
        rates = [rate(replace(recipe, schedule=schedule), step, 8) for step in (0, 2, 4, 8)]
        assert rates == pytest.approx(expected)
