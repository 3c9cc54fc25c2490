"""Tiny models and runs for the tests. As a program under torchrun: some steps of several recipes, for test_ranks.py.

    torchrun --nproc-per-node N tests/train/tiny_runs.py CASES.json OUT.safetensors
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from lora import LoRAConfig, add_lora
from model.config import ModelConfig
from model.transformer import Transformer
from train.checkpoint import whole
from train.dataset import Rows
from train.fast import fast_blocks
from train.loop import Trainer
from train.optimizer import named_trainable
from train.recipe import Recipe
from train.sharding import Ranks, shard
from train.store import TokenStore

CONFIG = ModelConfig(
    vocab_size=300, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=4, rms_norm_eps=1e-5, rope_theta=1e4, windows=(None, 9),
    max_position_embeddings=2048,
)  # fmt: skip
RECIPE = Recipe(data=("x",), out="x", weights="x", packing="none", block=400)


def tiny(recipe: Recipe, config: ModelConfig = CONFIG, dtype: torch.dtype = torch.float64) -> Transformer:
    """A model whose adapters already do something (B is not zero), so that every gradient counts."""
    model = Transformer(config).init_weights(1).to(dtype).use_attention("fast")
    if recipe.full:
        return model.requires_grad_(True)
    add_lora(model, LoRAConfig(recipe.r, recipe.alpha, recipe.dropout), seed=2)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, param in model.named_parameters():
            if "lora_B" in name:
                param.copy_(torch.randn(param.shape, generator=generator, dtype=dtype) * 0.05)
    return model


def trainer(case: dict, store: str, stage: str, ranks: Ranks) -> Trainer:
    recipe = replace(RECIPE, **case)
    model = fast_blocks(tiny(recipe))
    if ranks.world > 1:
        shard(model, ranks)
    return Trainer(recipe, model, Rows(TokenStore(store), recipe, stage), None, ranks, {})


def run_case(case: dict, store: str, stage: str, ranks: Ranks) -> dict[str, torch.Tensor]:
    made = trainer(case, store, stage, ranks)
    losses, norms, found = [], [], {}
    for step in range(made.steps):
        loss, norm, _ = made.gradients(step)
        losses.append(loss)
        norms.append(norm)
        if step in (0, made.steps - 1):
            grads = {name: whole(p.grad) for name, p in named_trainable(made.model).items()}
            found |= {f"grad{step}.{name}": grad for name, grad in grads.items()}
        made.update(step, norm)
    found |= {f"weight.{name}": whole(p) for name, p in named_trainable(made.model).items()}
    return found | {"loss": torch.tensor(losses, dtype=torch.float64), "norm": torch.tensor(norms, dtype=torch.float64)}


def main() -> None:
    torch.set_num_threads(1)
    cases = json.loads(Path(sys.argv[1]).read_text())
    ranks = Ranks.join("cpu")
    out = {}
    for name, (case, store, stage) in cases.items():
        out |= {f"{name}/{key}": value for key, value in run_case(case, store, stage, ranks).items()}
    if ranks.first:
        save_file(out, sys.argv[2])
    ranks.wait()
    if ranks.world > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
