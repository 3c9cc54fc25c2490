"""Random initialization of a model that is trained from scratch."""

from __future__ import annotations

import zlib

import torch
from torch import Tensor

from model.transformer import Transformer


def init_weights(model: Transformer, seed: int) -> Transformer:
    """Initialize every weight in place with `first_weight`; returns the model."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(first_weight(name, weight.shape, seed, model.config.num_hidden_layers))
    return model


def first_weight(name: str, shape: torch.Size, seed: int, layers: int) -> Tensor:
    """Initial value of one weight in fp32: norms 1, biases 0, matrices Normal(0, 0.02), scaled by 1/√(2 · layers) if
    they end a residual branch (GPT-2). A function of (seed, name), so that each rank can draw its own part."""
    if len(shape) < 2:
        return torch.full(shape, 0.0 if name.endswith("bias") else 1.0)
    generator = torch.Generator().manual_seed((seed * 2654435761 + zlib.crc32(name.encode())) % 2**63)
    out = name.endswith(("o_proj.weight", "down_proj.weight", "w2.weight"))
    return torch.randn(shape, generator=generator) * 0.02 * ((2 * layers) ** -0.5 if out else 1.0)
