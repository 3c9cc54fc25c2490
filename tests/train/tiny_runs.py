"""Tiny models and runs for the tests. As a program under torchrun: some steps of several recipes, for test_ranks.py.

    torchrun --nproc-per-node N tests/train/tiny_runs.py CASES.json OUT.safetensors

CASES.json holds {name: [recipe's changes, store, stage]}, and under "" a mistake to make first (see `mutate`).
"""

import importlib
import inspect
import json
import os
import signal
import sys
import textwrap
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from lora import add_lora
from model.config import ModelConfig
from model.support.init import init_weights
from model.transformer import Transformer
from train.data.dataset import Rows
from train.data.rows import IGNORE
from train.data.store import TokenStore
from train.distributed.checkpoint import gathered, steps_saved
from train.distributed.sharding import Ranks, shard
from train.fast.block import fast_blocks
from train.loop import Trainer
from train.optim.optimizer import named_trainable
from train.recipe import Recipe, lora_config

CONFIG = ModelConfig(
    vocab_size=300,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=4,
    rms_norm_eps=1e-5,
    rope_theta=1e4,
    windows=(None, 9),
    max_position_embeddings=2048,
)
RECIPE = Recipe(data=("x",), out="x", weights="x", packing="none", block=400)


def mean_loss(logits_BTV: torch.Tensor, target_BT: torch.Tensor) -> torch.Tensor:
    """The definition that train/loss.py is held against: the mean of −log p over supervised tokens."""
    return F.cross_entropy(logits_BTV.flatten(0, 1), target_BT.flatten(), ignore_index=IGNORE)


def tiny(recipe: Recipe, config: ModelConfig = CONFIG, dtype: torch.dtype = torch.float64) -> Transformer:
    """A model whose adapters already do something (B is not zero), so that every gradient counts."""
    model = init_weights(Transformer(config), 1).to(dtype).use_attention("fast")
    if recipe.full:
        return model.requires_grad_(True)
    add_lora(model, lora_config(recipe), seed=2)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, param in model.named_parameters():
            if "lora_B" in name:
                param.copy_(torch.randn(param.shape, generator=generator, dtype=dtype) * 0.05)
    return model


def trainer(case: dict, store: str, stage: str, ranks: Ranks) -> Trainer:
    recipe = replace(RECIPE, **case)
    model = fast_blocks(tiny(recipe))
    model.model.checkpoint_blocks = recipe.checkpoint_blocks
    if ranks.world > 1:
        shard(model, ranks)
    return Trainer(recipe, model, Rows(TokenStore(store), recipe, stage), None, ranks, {})


def run_case(case: dict, store: str, stage: str, ranks: Ranks, every: bool = False) -> dict[str, torch.Tensor]:
    """Losses and norms of each step, the gradients before clipping of the first and the last (or of every one), and
    the weights at the end."""
    made = trainer(case, store, stage, ranks)
    losses, norms, found = [], [], {}
    for step in range(made.steps):
        loss, norm, _ = made.gradients(step)
        losses.append(loss)
        norms.append(norm)
        if every or step in (0, made.steps - 1):
            grads = {name: gathered(p.grad) for name, p in named_trainable(made.model).items()}
            found |= {f"grad{step}.{name}": grad for name, grad in grads.items()}
        made.update(step, norm)
    found |= {f"weight.{name}": gathered(p) for name, p in named_trainable(made.model).items()}
    return found | {"loss": torch.tensor(losses, dtype=torch.float64), "norm": torch.tensor(norms, dtype=torch.float64)}


def in_step(trainer: Trainer, step: int, act: Callable[[], object]) -> None:
    """Calls `act` in a step of a training (from 1): after its update, and before anything is written of it."""
    trainer.optimizers[0].register_step_post_hook(lambda *_: act() if trainer.progress.step == step - 1 else None)


def sigterm() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def as_recipe(options: dict, **more) -> Recipe:
    return Recipe(**{k: tuple(v) if isinstance(v, list) else v for k, v in {**options, **more}.items()})


def ends(out: Path) -> dict[str, bytes]:
    """What must be the same to the byte: the last checkpoint, the adapter, the metrics. The manifest holds hashes."""
    last = steps_saved(out / "checkpoints")[-1]
    files = [
        *sorted(p for p in last.rglob("*") if p.is_file()),
        *sorted((out / "adapter").glob("*")),
        out / "metrics.jsonl",
    ]
    return {str(file.relative_to(out)): file.read_bytes() for file in files}


def mutate(module: str, name: str, right: str, wrong: str) -> Callable[[], None]:
    """Put a mistake into a function or method of ours, everywhere it is known by name. Returns what takes it out."""
    home, (*owner, leaf) = importlib.import_module(module), name.split(".")
    holder = getattr(home, owner[0]) if owner else home
    original = getattr(holder, leaf)
    source = textwrap.dedent(inspect.getsource(original))
    assert source.count(right) == 1, f"{module}.{name} no longer says {right!r}: bring the list of mistakes up to date"
    scope = dict(vars(home))
    exec(compile(source.replace(right, wrong), f"{module} with a mistake", "exec"), scope)
    places = [holder] if owner else [m for m in list(sys.modules.values()) if getattr(m, leaf, None) is original]

    def put(function: Callable) -> None:
        for place in places:
            setattr(place, leaf, function)

    put(scope[leaf])
    return lambda: put(original)


def main() -> None:
    torch.set_num_threads(1)
    cases = json.loads(Path(sys.argv[1]).read_text())
    ranks = Ranks.join("cpu")
    mutate(*cases.pop("")) if "" in cases else None
    out = {}
    for name, (case, store, stage) in cases.items():
        out |= {f"{name}/{key}": value for key, value in run_case(case, store, stage, ranks).items()}
    if ranks.first:
        save_file(out, sys.argv[2])
    ranks.gather(None)  # the others wait for the first
    if ranks.world > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
