"""Merge an adapter into the weights in memory, W + s·B A, and undo it.

The sum is computed in at least fp32 and rounded to the weight's dtype. Subtracting the update would not undo that
rounding, so the original weights are kept, and unmerging restores them bit for bit.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lora.adapter import adapted
from lora.layer import LoRALinear
from model.support.cli import UserError


def merged_weight(weight: Tensor, delta: Tensor) -> Tensor:
    """weight + delta, computed in at least fp32 and rounded to the weight's dtype."""
    return (weight.detach().to(delta.dtype) + delta).to(weight.dtype)


def merge_lora(model: nn.Module, keep: bool = True) -> nn.Module:
    """Merge the active adapter into the weights, in place; returns the model.

    `keep=False` drops adapters and original weights: the layers become plain nn.Linear again.
    """
    layers = adapted(model)
    if not any(layer.active for layer in layers.values()):
        raise UserError("lora: no adapter is active, so there is nothing to merge")
    if any(layer.quantized is not None for layer in layers.values()):
        raise UserError("lora: the base is quantized; merge into its checkpoint instead: python -m lora.merge")
    while layers:  # each layer leaves the dict, so that without `keep` its original weight is freed at once
        path, layer = layers.popitem()
        if layer.active is not None and layer.original is None:
            merged = merged_weight(layer.weight, layer.delta(layer.active))
            layer.original, layer.weight = layer.weight.detach(), nn.Parameter(merged, requires_grad=False)
        if not keep:
            model.set_submodule(path, as_linear(layer))
    if not keep:
        model.__dict__.pop("lora_configs", None)
    return model


def unmerge_lora(model: nn.Module) -> nn.Module:
    """Restore the original weights, bit for bit; the adapter is active again."""
    for layer in adapted(model).values():
        if layer.original is not None:
            layer.weight, layer.original = nn.Parameter(layer.original, requires_grad=False), None
    return model


def as_linear(layer: LoRALinear) -> nn.Linear:
    """The layer's weight and bias as an nn.Linear, without adapters."""
    with torch.device("meta"):
        linear = nn.Linear(layer.in_features, layer.out_features, bias=False)
    linear.weight, linear.bias = layer.weight, layer.bias
    return linear
