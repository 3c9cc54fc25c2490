"""A recipe's optimizers and learning-rate schedule.

Weight decay applies to matrices only. With Muon (arXiv 2502.16982), it trains the matrices of the decoder layers and
AdamW everything else: embedding, output head and norms.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from train.optim.muon import ShardedMuon
from train.recipe import Recipe


def named_trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Trainable parameters by name, in the model's order."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def make_optimizers(model: nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """The recipe's optimizers over the trainable parameters; group["peak"] is each group's peak learning rate."""
    params = named_trainable(model)
    if recipe.optimizer == "muon":
        matrices = {name: p for name, p in params.items() if p.dim() == 2 and ".layers." in name}
        rest = {name: p for name, p in params.items() if name not in matrices}
        muon_class = ShardedMuon if any(hasattr(p, "device_mesh") for p in matrices.values()) else torch.optim.Muon
        muon = muon_class(matrices.values(), lr=recipe.muon_rate, weight_decay=recipe.weight_decay)
        optimizers: list[torch.optim.Optimizer] = [muon, adamw(rest, recipe)]
    elif recipe.optimizer == "sgd":
        optimizers = [torch.optim.SGD(groups(params, recipe), lr=recipe.learning_rate)]
    elif recipe.optimizer == "adamw8bit":
        from train.optim.adamw8bit import AdamW8bit

        optimizers = [AdamW8bit(groups(params, recipe), lr=recipe.learning_rate, betas=recipe.betas)]
    else:
        optimizers = [adamw(params, recipe)]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return optimizers


def adamw(params: dict[str, nn.Parameter], recipe: Recipe) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups(params, recipe), lr=recipe.learning_rate, betas=recipe.betas)


def groups(params: dict[str, nn.Parameter], recipe: Recipe) -> list[dict]:
    """Parameter groups: matrices with weight decay, vectors without."""
    matrices = [p for p in params.values() if p.dim() >= 2]
    vectors = [p for p in params.values() if p.dim() < 2]
    both = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in both if group["params"]]


def rate(recipe: Recipe, step: int, steps: int) -> float:
    """Learning rate at `step` (from 0) as a share of its peak: linear warm-up, then the schedule's decay."""
    warmup = recipe.warmup or math.ceil(recipe.warmup_share * steps)
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return {
        "cosine": (1 + math.cos(math.pi * progress)) / 2,
        "linear": 1 - progress,
        "constant": 1.0,
    }[recipe.schedule]


def state_tensors(model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> Iterator[tuple[str, str, Tensor]]:
    """Yields (parameter's name, key, tensor) of the optimizers' state."""
    names: dict[Tensor, str] = {p: name for name, p in named_trainable(model).items()}
    for optimizer in optimizers:
        for param, state in optimizer.state.items():
            for key, value in state.items():
                yield names[param], key, torch.as_tensor(value)
