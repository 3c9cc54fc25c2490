"""transformers' own models of the tiny configs."""

import torch
import transformers
from tiny_models import raw_config


def make_theirs(family: str, seed: int = 0, **changes):
    """transformers' own model of a tiny config, its weights drawn wide enough for attention to be sharp."""
    raw = raw_config(family, **changes)
    config = transformers.AutoConfig.for_model(**raw)
    if raw["model_type"] == "mixtral":
        config._experts_implementation = "eager"
    config._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + noise * 0.1 if parameter.dim() == 1 else noise * 0.15)
    return model.eval()
