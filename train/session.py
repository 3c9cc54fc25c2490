"""From a recipe to a run: data, model and trainer put together, and what is left in the run's folder."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora import add_lora
from lora.adapter import adapted, pattern_value
from lora.dropout import MASKS
from lora.merge import merge_folders
from lora.origin import check_origin
from lora.peft import AdapterFile, check_tensors, fitted, read_config, write_adapter
from lora.quantized import quantize_base
from model.checkpoints.weights import config_dict, new_checkpoint, open_checkpoint, save_weights
from model.config import ModelConfig
from model.support.cli import UserError, guard
from model.support.files import atomic_folder
from model.support.hardware import NO_INT8_PRODUCTS, int8_products
from model.support.lock import claim, hold, is_empty, sweep
from model.text.tokenizer import copy_tokenizer
from model.transformer import Transformer
from train.data.dataset import Rows
from train.data.store import Encoding, TokenStore, build_store, identity_of
from train.distributed.checkpoint import check_unchanged, snapshot, steps_saved
from train.distributed.sharded_load import base_shapes, fresh, from_checkpoint, load_sharded
from train.distributed.sharding import Ranks, shard
from train.fast.block import join_weights, training_blocks
from train.loop import Trainer
from train.recipe import Recipe, encoding_of, lora_config, parameter_dtype, parse
from train.report.card import code_hash, peak_memory, write_card

# Options that may differ between a run and its resumption.
UNIMPORTANT = set(
    "out resume allow_changed save_every keep_last device threads on_bad_step micro_rows checkpoint_blocks compile "
    "fuse sharded".split()
)


def program(stage: str) -> None:
    """The command line of train.pretrain and train.instruct."""

    def main() -> int:
        try:
            made = train(parse(None, stage), stage)
        except UserError:  # it is raised on every rank, so one of each machine says it
            if os.environ.get("LOCAL_RANK", "0") == "0":
                raise
            return 2
        if os.environ.get("RANK", "0") == "0":
            print(made)
        return 0

    raise SystemExit(guard(main, f"train.{stage}"))


def train(recipe: Recipe, stage: str) -> Path:
    """Run a recipe to its end. Returns the adapter's folder (or the model's, in full training)."""
    began = time.monotonic()
    ranks = Ranks.join(recipe.device)
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    with contextlib.ExitStack() as stack:
        ranks.run_on_first(lambda: stack.enter_context(hold(recipe.out)))
        trainer = prepare(recipe, stage, ranks)
        trainer.run()
        return finish(trainer, stage, began)


def prepare(recipe: Recipe, stage: str, ranks: Ranks) -> Trainer:
    """Everything up to the first step, cheap checks before costly ones."""
    ranks.assert_same({"stage": stage, "recipe": asdict(recipe), "code": code_hash(), "torch": torch.__version__})
    if stage == "pretrain" and recipe.template == "faithful":
        raise UserError("recipe: template = 'faithful' belongs to train.instruct; here it is packing = 'concatenate'")
    if stage == "instruct" and recipe.packing == "concatenate":
        raise UserError("recipe: packing = 'concatenate' belongs to train.pretrain; use 'documents' or 'none'")
    encoding = encoding_of(recipe, stage)
    config = ModelConfig.from_dict(config_dict(recipe.init or recipe.weights))
    if recipe.block > config.batch_length:
        raise UserError(f"recipe: block {recipe.block} is more than the model's {config.batch_length} positions")
    ranks.run_on_all(lambda: check_weights(recipe))
    if recipe.base == "w8a8" and not int8_products(str(ranks.device)):
        raise UserError(f'recipe: base = "w8a8": {NO_INT8_PRODUCTS}; take base = "int8", or leave it out')
    empty = ranks.run_on_all(lambda: empty_model(recipe, config))
    sources = sources_of(recipe, encoding, ranks)
    run = identity(recipe, stage, sources)
    if recipe.resume:  # before any store is made: a run that is refused keeps the other run's
        ranks.run_on_all(lambda: check_unchanged(Path(recipe.out) / "checkpoints", run, recipe.allow_changed))
    ranks.run_on_first(lambda: take(Path(recipe.out), list(sources)))
    rows, valid = stores(recipe, stage, encoding, ranks, sources)
    recipe.steps_of(len(rows))
    for store in [part.store for part in (rows, valid) if part is not None]:
        largest = max(shard["largest"] for shard in store.manifest["shards"])
        if largest >= config.vocab_size:
            raise UserError(
                f"{encoding.tokenizer}: gives token {largest}, and the model has {config.vocab_size}: it"
                " is the tokenizer of another model"
            )
    model, base = load_model(recipe, config, ranks, empty)
    return Trainer(recipe, model, rows, valid, ranks, run, base)


def take(out: Path, parts: list[str]) -> None:
    """Refuse a folder that holds anything but a training run; remove what killed calls left in it, and the tokens of
    notes that this run does not read."""
    out.mkdir(parents=True, exist_ok=True)
    claim(out, out / "made-of.json", {"program": "train"}, begun=not is_empty(out))
    sweep(out)
    for left in (out / "tokens").glob("*"):
        if left.name not in parts:
            shutil.rmtree(left) if left.is_dir() else left.unlink()


def check_weights(recipe: Recipe) -> None:
    """Raises UserError where the weights are not there, or are not those that `adapter` was trained on."""
    if recipe.weights and not merged_before(recipe):
        open_checkpoint(recipe.weights)
        check_origin(recipe.weights, [recipe.adapter] if recipe.adapter else [])


def parts(recipe: Recipe, encoding: Encoding) -> dict[str, tuple[tuple[str, ...], Encoding, int]]:
    """(files, encoding, records) of each token store; the smaller, held-out one first, for an early error."""
    whole = replace(encoding, empty_kept=1.0)  # held-out loss is on all questions, so that recipes compare
    held_out = {"valid": (recipe.valid_data, whole, 0)} if recipe.valid_data else {}
    return held_out | {"train": (recipe.data, encoding, recipe.records)}


def sources_of(recipe: Recipe, encoding: Encoding, ranks: Ranks) -> dict[str, dict[str, Any]]:
    """What each token store is a function of, as the first rank finds it."""
    return ranks.of_first(lambda: {name: identity_of(*part) for name, part in parts(recipe, encoding).items()})


def stores(
    recipe: Recipe, stage: str, encoding: Encoding, ranks: Ranks, sources: dict[str, dict[str, Any]]
) -> tuple[Rows, Rows | None]:
    """The rows to train on and the held-out ones. The first rank tokenises; the others open what it has made."""
    folder = Path(recipe.out) / "tokens"

    def build() -> dict[str, TokenStore]:
        built = {
            name: build_store(files, how, folder / name, limit, identity=sources[name])
            for name, (files, how, limit) in parts(recipe, encoding).items()
        }
        for store in built.values():
            if bad := store.manifest["rejects"]:
                print(
                    f"{bad} of {bad + len(store)} records cannot be used and are left out: "
                    f"{store.path}/rejects.jsonl names them",
                    file=sys.stderr,
                )
        return built

    made = ranks.run_on_first(build) or {}
    manifests = ranks.gather({name: store.manifest for name, store in made.items()})[0]

    def see() -> dict[str, Rows]:
        seen = made or {name: TokenStore(folder / name) for name in manifests}
        if {name: store.manifest for name, store in seen.items()} != manifests:
            raise UserError(f"{folder}: not what the first rank has made; out must be a folder that all ranks share")
        return {name: Rows(store, recipe, stage) for name, store in seen.items()}

    rows = ranks.run_on_all(see)
    return rows["train"], rows.get("valid")


def load_model(
    recipe: Recipe, config: ModelConfig, ranks: Ranks, empty: tuple[Transformer, AdapterFile | None]
) -> tuple[Transformer, str]:
    """The model with its adapter (or all of it trainable), and the place of its base weights.

    It is sharded while it is `empty` (see empty_model); then each rank reads its rows (sharded_load.py).
    """
    base = merged_base(recipe, ranks) if recipe.merge_adapter else recipe.weights
    model, adapter = empty
    if recipe.base == "nf4" and ranks.first:
        layers = adapted(model)
        if odd := [path for path, layer in layers.items() if layer.quantized and layer.quantized.kind != "nf4"]:
            print(
                f"base = nf4: {len(odd)} of {len(layers)} matrices are kept in int8, since 64 does not divide their "
                f"width: {odd[0]}",
                file=sys.stderr,
            )
    holders = ranks if recipe.sharded else Ranks(device=ranks.device)  # who hold the weights together
    shapes = base_shapes(model)
    read = ranks.run_on_all(
        lambda: (
            from_checkpoint(open_checkpoint(base), shapes, holders)
            if base
            else fresh(recipe.seed, shapes, config.num_hidden_layers)
        )
    )
    compute = getattr(torch, recipe.dtype)
    sharded = holders.world > 1 or parameter_dtype(recipe) != compute
    if sharded:
        shard(model, ranks, compute if recipe.full else None)
    model.to_empty(device=ranks.device)
    load_sharded(model, holders, read, adapter, recipe.seed)
    if not sharded:
        join_weights(model)
    return model, base


def empty_model(recipe: Recipe, config: ModelConfig) -> tuple[Transformer, AdapterFile | None]:
    """(the model on the meta device, with adapters, base packed; the tensors of an adapter to continue).

    Raises UserError where the adapter is not there, or where layers are asked for that the model has not.
    """
    with torch.device("meta"):
        model = Transformer(config).to(parameter_dtype(recipe))
    if recipe.merge_adapter and not merged_before(recipe):
        check_tensors(model, AdapterFile(recipe.adapter), read_config(recipe.adapter), recipe.adapter)
    tensors = None
    if recipe.full:
        model.requires_grad_(True)
    elif recipe.adapter and not recipe.merge_adapter:
        chosen, tensors = fitted(read_config(recipe.adapter), model), AdapterFile(recipe.adapter)
        check_tensors(model, tensors, chosen, recipe.adapter)
        add_lora(model, chosen)
    else:
        chosen = lora_config(recipe, config)
        add_lora(model, chosen)
        for pattern in (*chosen.rank_pattern, *chosen.alpha_pattern):
            if not any(pattern_value({pattern: True}, path, False) for path in adapted(model)):
                raise UserError(f"recipe: rank_pattern or alpha_pattern {pattern!r} fits no layer that has an adapter")
    if recipe.base:
        for layer in adapted(quantize_base(model, recipe.base)).values():
            assert layer.quantized is not None
            codes = layer.quantized.codes  # a parameter: these are what is sharded
            del layer.quantized.codes
            layer.quantized.register_parameter("codes", nn.Parameter(codes, requires_grad=False))
    model.model.checkpoint_blocks = recipe.checkpoint_blocks
    model.use_attention("fast")
    if not recipe.compile:  # torch.compile fuses the plain block by itself
        training_blocks(model, recipe.fuse)
    return model, tensors


def merged_before(recipe: Recipe) -> bool:
    """Whether a resumed run finds its merged base in out/base."""
    out = Path(recipe.out)
    return recipe.resume and bool(steps_saved(out / "checkpoints")) and (out / "base" / "config.json").is_file()


def merged_base(recipe: Recipe, ranks: Ranks) -> str:
    """out/base: the weights with `adapter` merged in."""
    folder = Path(recipe.out) / "base"

    def merge() -> None:
        merge_folders(recipe.weights, recipe.adapter, str(folder), getattr(torch, recipe.dtype), recipe.tokenizer)

    ranks.run_on_first(lambda: None if merged_before(recipe) else merge())
    return str(folder)


def identity(recipe: Recipe, stage: str, sources: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What a run's numbers are a function of; a resume compares it."""
    options = {key: value for key, value in asdict(recipe).items() if key not in UNIMPORTANT}
    options = {key: list(value) if isinstance(value, tuple) else value for key, value in options.items()}
    held_out = {"valid_data": sources["valid"]} if "valid" in sources else {}
    masks = {"dropout_masks": MASKS} if recipe.dropout else {}
    return {"stage": stage, "recipe": options, "data": sources["train"], **held_out, **masks}


def save_model(state: dict[str, torch.Tensor], config: ModelConfig, path: Path, tokenizer: str) -> None:
    """A model's folder as transformers and this repository load it, with the tokenizer's files."""
    with new_checkpoint(path) as folder:
        save_weights(state, config.to_dict(), folder, 5 * 2**30)
        copy_tokenizer(tokenizer, folder)


def finish(trainer: Trainer, stage: str, began: float) -> Path:
    """Write the final adapter or model, and the run card."""
    recipe, out = trainer.recipe, trainer.out
    final = out / ("model" if recipe.full else "adapter")
    peaks = trainer.ranks.gather(peak_memory(trainer.ranks.device))
    held, _ = snapshot(trainer.model, [], keep=trainer.ranks.first)

    def write() -> None:
        if recipe.full:
            narrow = {name: value.to(getattr(torch, recipe.dtype)) for name, value in held.items()}
            save_model(narrow, trainer.model.config, final, recipe.tokenizer or recipe.weights)
        else:
            with atomic_folder(final, keep_others=True) as folder:
                write_adapter(folder, *trainer.adapter(held))  # type: ignore[misc]
        write_card(trainer, time.monotonic() - began, peaks)

    trainer.ranks.run_on_first(write)
    return final
