"""The smallest configs, in config.json's words, that exercise each family; and models with weights that are not tiny.

Weights of N(0, 0.02) would make attention nearly uniform and hide a wrong mask, so they are drawn five times wider.
"""

import torch

from model import ModelConfig, Transformer
from model.support.init import init_weights

BASE = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e4,
    "hidden_act": "silu",
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
EXPERTS = {"intermediate_size": 64, "num_local_experts": 4, "num_experts_per_tok": 2}
QWEN = {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}

FAMILIES: dict[str, dict] = {
    "mistral": {"model_type": "mistral", "sliding_window": 8},
    "mistral-no-window": {"model_type": "mistral", "sliding_window": None, "rope_theta": 1e6},
    "mistral-wide-heads": {"model_type": "mistral", "sliding_window": 5, "head_dim": 10},
    "mistral-window-1": {"model_type": "mistral", "sliding_window": 1},
    "llama": {"model_type": "llama"},
    "llama-tied": {"model_type": "llama", "tie_word_embeddings": True, "num_key_value_heads": 1},
    "llama-bias": {"model_type": "llama", "attention_bias": True},
    "llama-3": {"model_type": "llama", "rope_theta": 5e5, "rope_scaling": LLAMA3},
    "llama-linear": {"model_type": "llama", "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    "llama-yarn": {"model_type": "llama", "rope_scaling": YARN},
    "llama-dynamic": {
        "model_type": "llama",
        "max_position_embeddings": 12,
        "rope_scaling": {"rope_type": "dynamic", "factor": 3.0},
    },
    "odd-heads": {
        "model_type": "mistral",
        "sliding_window": 6,
        "hidden_size": 30,
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
        "head_dim": 10,
    },
    "mixtral": {"model_type": "mixtral", "sliding_window": None, **EXPERTS},
    "mixtral-window": {"model_type": "mixtral", "sliding_window": 6, **EXPERTS},
    "qwen2": {"model_type": "qwen2", "use_sliding_window": False},
    "qwen2-window": QWEN,
    "qwen2-tied": {"model_type": "qwen2", "use_sliding_window": False, "tie_word_embeddings": True},
}


def raw_config(family: str, **changes) -> dict:
    return {**BASE, **FAMILIES[family], **changes}


def tiny(family: str = "mistral", dtype: torch.dtype = torch.float64, seed: int = 0, **changes) -> Transformer:
    model = init_weights(Transformer(ModelConfig.from_dict(raw_config(family, **changes))), seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5)
            else:  # norms away from one, biases away from zero
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.to(dtype).eval()


def some_tokens(T: int, B: int = 2, seed: int = 0, vocabulary: int = 61) -> torch.Tensor:
    return torch.randint(3, vocabulary, (B, T), generator=torch.Generator().manual_seed(seed))
