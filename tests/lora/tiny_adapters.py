"""A tiny model and an adapter on it that does something."""

import torch

from lora import LoRAConfig, add_lora
from lora.adapter import adapted
from model import ModelConfig, Transformer
from model.support.init import init_weights

CONFIG = ModelConfig(
    vocab_size=61,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,
    rms_norm_eps=1e-5,
    rope_theta=1e4,
    windows=(8, 8),
    max_position_embeddings=64,
)
TOKENS = torch.randint(0, 61, (2, 20), generator=torch.Generator().manual_seed(1))


def base(dtype=torch.float32) -> Transformer:
    model = init_weights(Transformer(CONFIG), 3)
    with torch.no_grad():
        for param in model.parameters():
            if param.dim() == 2:
                param.mul_(5)
    return model.to(dtype)


def trained(config: LoRAConfig, dtype=torch.float32) -> Transformer:
    """A model with an adapter that does something."""
    model = add_lora(base(dtype), config)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for layer in adapted(model).values():
            for b_OR in layer.lora_B.values():
                b_OR.copy_(torch.randn(b_OR.shape, generator=generator) * 0.1)
    return model
