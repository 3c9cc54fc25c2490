"""Tiny checkpoints of every family, written by transformers' own save_pretrained."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "model"))  # for tiny_models

transformers = pytest.importorskip("transformers", reason="needs transformers (the parity extra)")

from tiny_models import raw_config  # noqa: E402


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


@pytest.fixture(scope="session")
def published(tmp_path_factory):
    """published(family, **changes) → a folder that transformers wrote."""
    made: dict[str, Path] = {}

    def folder(family: str, **changes) -> Path:
        key = family + repr(sorted(changes.items()))
        if key not in made:
            made[key] = tmp_path_factory.mktemp("published") / family
            make_theirs(family, **changes).save_pretrained(made[key])
        return made[key]

    return folder
