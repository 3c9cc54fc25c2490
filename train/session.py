"""From a recipe to a run: data, model and trainer put together, and what is left in the run's folder."""

from __future__ import annotations

import platform
import sys
import time
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora import LoRAConfig, add_lora, load_adapter, merge_lora
from lora.adapter import write_adapter
from lora.narrow import narrow_base
from model.command import UserError, guard
from model.config import ModelConfig
from model.files import atomic_folder, read_json, write_json
from model.tokenizer import copy_tokenizer
from model.transformer import Transformer
from model.weights import save_weights
from train.checkpoint import snapshot
from train.dataset import Rows
from train.fast import training_blocks
from train.loop import Trainer
from train.recipe import Recipe, parse
from train.sharding import Ranks, shard
from train.store import Encoding, build_store

UNIMPORTANT = ("out", "resume", "allow_changed", "save_every", "keep_last", "device", "threads", "on_bad_step",
               "micro_rows", "checkpoint_blocks", "compile", "fuse")  # may differ between a run and its resumption


def program(stage: str) -> None:
    """The command line of train.pretrain and train.instruct."""

    def main() -> int:
        recipe = parse(None, stage)
        print(train(recipe, stage))
        return 0

    raise SystemExit(guard(main, f"train.{stage}"))


def train(recipe: Recipe, stage: str) -> Path:
    """Run a recipe to its end. Returns the adapter's folder (or the model's, in full training)."""
    began = time.monotonic()
    ranks = Ranks.join(recipe.device)
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    trainer = prepare(recipe, stage, ranks)
    trainer.run()
    params, _ = trainer.save() if ranks.world > 1 else ({}, {})
    return finish(trainer, stage, params, began)


def prepare(recipe: Recipe, stage: str, ranks: Ranks) -> Trainer:
    """Everything up to the first step, in the order that finds mistakes soonest."""
    if stage == "pretrain" and recipe.template == "faithful":
        raise UserError("recipe: template = 'faithful' belongs to train.instruct; here it is packing = 'concatenate'")
    if stage == "instruct" and recipe.packing == "concatenate":
        raise UserError("recipe: packing = 'concatenate' belongs to train.pretrain; use 'documents' or 'none'")
    if ranks.world > 1 and recipe.optimizer in ("muon", "adamw8bit"):
        raise UserError(f"recipe: optimizer {recipe.optimizer!r} runs on one process only; use 'adamw'")
    encoding = Encoding(stage, recipe.tokenizer or recipe.weights, recipe.template, recipe.tasks, recipe.append_eos)
    rows, valid = stores(recipe, stage, encoding, ranks)
    model, base = load_model(recipe, ranks)
    largest = model.config.max_position_embeddings
    if recipe.block > largest:
        raise UserError(f"recipe: block {recipe.block} is more than the model's {largest} positions")
    return Trainer(recipe, model, rows, valid, ranks, identity(recipe, stage, rows), base)


def stores(recipe: Recipe, stage: str, encoding: Encoding, ranks: Ranks) -> tuple[Rows, Rows | None]:
    folder = Path(recipe.out) / "tokens"
    if ranks.first:  # the others find what the first has made
        build_store(recipe.data, encoding, folder / "train", recipe.records)
        if recipe.valid_data:
            build_store(recipe.valid_data, encoding, folder / "valid")
    ranks.wait()
    made = build_store(recipe.data, encoding, folder / "train", recipe.records)
    held_out = build_store(recipe.valid_data, encoding, folder / "valid") if recipe.valid_data else None
    return Rows(made, recipe, stage), None if held_out is None else Rows(held_out, recipe, stage)


def load_model(recipe: Recipe, ranks: Ranks) -> tuple[nn.Module, str]:
    """The model with its adapter (or all of it trainable), and the place of its base weights."""
    dtype, base = getattr(torch, recipe.dtype), recipe.weights
    if recipe.init:
        config = ModelConfig.from_dict(read_json(recipe.init))
        model = Transformer(config).init_weights(recipe.seed).to(ranks.device, dtype)
    else:
        model = Transformer.from_pretrained(recipe.weights, dtype=dtype, device=ranks.device)
    if recipe.full:
        model.requires_grad_(True)
    elif recipe.adapter and not recipe.merge_adapter:
        load_adapter(model, recipe.adapter)
    else:
        if recipe.adapter:
            merge_lora(load_adapter(model, recipe.adapter), keep=False)
            base = str(Path(recipe.out) / "base")
            if ranks.first:
                save_model(model.state_dict(), model.config, Path(base), recipe.tokenizer or recipe.weights)
        add_lora(model, lora_config(recipe, model.config), seed=recipe.seed)
    if recipe.base:
        narrow_base(model, recipe.base)
    model.model.checkpoint_blocks = recipe.checkpoint_blocks
    model.use_attention("fast")
    if not recipe.compile:  # torch.compile fuses the plain block by itself
        training_blocks(model, recipe.fuse)
    return (shard(model, ranks) if ranks.world > 1 else model), base


def lora_config(recipe: Recipe, config: ModelConfig) -> LoRAConfig:
    targets: Any = recipe.target_modules
    if targets == ("all-linear",):
        targets = "all-linear"
    elif "lm_head" in targets:
        raise UserError("recipe: an adapter on lm_head is not covered; leave it out of target_modules")
    if recipe.first_layer >= config.num_hidden_layers:
        raise UserError(f"recipe: first_layer {recipe.first_layer}; the model has {config.num_hidden_layers} layers")
    layers = tuple(range(recipe.first_layer, config.num_hidden_layers)) if recipe.first_layer else None
    return LoRAConfig(recipe.r, recipe.alpha, recipe.dropout, targets, layers, recipe.rslora)


def identity(recipe: Recipe, stage: str, rows: Rows) -> dict[str, Any]:
    """What a run's numbers are a function of; a resume compares it."""
    options = {key: value for key, value in asdict(recipe).items() if key not in UNIMPORTANT}
    options = {key: list(value) if isinstance(value, tuple) else value for key, value in options.items()}
    return {"stage": stage, "recipe": options, "data": rows.store.manifest["identity"]}


def save_model(state: dict[str, torch.Tensor], config: ModelConfig, path: Path, tokenizer: str) -> None:
    """A model's folder as transformers and this repository load it, with the tokenizer's files."""
    save_weights(state, config.to_dict(), path, 5 * 2**30)
    copy_tokenizer(tokenizer, path)


def finish(trainer: Trainer, stage: str, params: dict[str, torch.Tensor], began: float) -> Path:
    """Write the final adapter or model, and the run card."""
    recipe, out = trainer.recipe, trainer.out
    final = out / ("model" if recipe.full else "adapter")
    if trainer.ranks.first:
        held = params or snapshot(trainer.model, [])[0]
        if recipe.full:
            save_model(held, trainer.model.config, final, recipe.tokenizer or recipe.weights)
        else:
            with atomic_folder(final) as folder:
                write_adapter(folder, *trainer.adapter(held))  # type: ignore[misc]
        write_json(out / "run.json", run_card(trainer, time.monotonic() - began))
    trainer.ranks.wait()
    return final


def run_card(trainer: Trainer, seconds: float) -> dict[str, Any]:
    """What was run, on what, and what it cost."""
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    return {
        **trainer.identity,
        "steps": trainer.steps,
        "rows": len(trainer.rows),
        "records": len(trainer.rows.store),
        "tokens": trainer.progress.tokens,
        "skipped_steps": trainer.progress.skipped,
        "best_valid_loss": trainer.progress.best,
        "best_step": trainer.progress.best_step,
        "trained_parameters": trained,
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "seconds": seconds,
        "training_seconds": trainer.seconds,
        "tokens_per_second": trainer.tokens_this_run / trainer.seconds if trainer.seconds else None,
        "peak_memory_bytes": peak_memory(trainer.ranks.device),
        "ranks": trainer.ranks.world,
        "device": device_name(trainer.ranks.device),
        "threads": torch.get_num_threads(),
        "packages": {name: metadata.version(name) for name in ("torch", "numpy", "safetensors", "tokenizers")},
        "python": platform.python_version(),
    }


def peak_memory(device: torch.device) -> int:
    """Bytes: the GPU's peak allocation, or the process's peak resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
