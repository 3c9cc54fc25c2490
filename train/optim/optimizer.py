"""Optimizers for a recipe, and the learning rate over steps.

Weight decay falls on matrices only. Muon (arXiv 2502.16982; torch's) takes the matrices of a model trained from
scratch, but not its embedding or output head; AdamW takes the rest.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from train.optim.muon import ShardedMuon
from train.recipe import Recipe


def named_trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that learn, by name, in the model's order."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def make_optimizers(model: nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """The recipe's optimizers over the trainable parameters; each group keeps its peak rate under "peak"."""
    params = named_trainable(model)
    if recipe.optimizer == "muon":
        matrices = {name: p for name, p in params.items() if p.dim() == 2 and ".layers." in name}
        rest = {name: p for name, p in params.items() if name not in matrices}
        kind = ShardedMuon if any(hasattr(p, "device_mesh") for p in matrices.values()) else torch.optim.Muon
        muon = kind(matrices.values(), lr=recipe.muon_rate, weight_decay=recipe.weight_decay)
        made: list[torch.optim.Optimizer] = [muon, adamw(rest, recipe)]
    elif recipe.optimizer == "sgd":
        made = [torch.optim.SGD(groups(params, recipe), lr=recipe.learning_rate)]
    elif recipe.optimizer == "adamw8bit":
        from train.optim.adamw8bit import AdamW8bit

        made = [AdamW8bit(groups(params, recipe), lr=recipe.learning_rate, betas=recipe.betas)]
    else:
        made = [adamw(params, recipe)]
    for optimizer in made:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return made


def adamw(params: dict[str, nn.Parameter], recipe: Recipe) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups(params, recipe), lr=recipe.learning_rate, betas=recipe.betas)


def groups(params: dict[str, nn.Parameter], recipe: Recipe) -> list[dict]:
    matrices = [p for p in params.values() if p.dim() >= 2]
    vectors = [p for p in params.values() if p.dim() < 2]
    made = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in made if group["params"]]


def rate(recipe: Recipe, step: int, steps: int) -> float:
    """The share of the peak learning rate at `step` (from 0): linear warm-up, then the schedule's fall."""
    warmup = recipe.warmup or math.ceil(recipe.warmup_share * steps)
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    fall = {"cosine": (1 + math.cos(math.pi * done)) / 2, "linear": 1 - done, "constant": 1.0}[recipe.schedule]
    return recipe.final_rate + (1 - recipe.final_rate) * fall


def state_tensors(model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> Iterator[tuple[str, str, Tensor]]:
    """(parameter's name, key, tensor) of every optimizer's state."""
    names: dict[Tensor, str] = {p: name for name, p in named_trainable(model).items()}
    for optimizer in optimizers:
        for param, state in optimizer.state.items():
            for key, value in state.items():
                yield names[param], key, torch.as_tensor(value)
