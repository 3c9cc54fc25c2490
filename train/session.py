"""Runs a recipe: builds data, model and trainer, trains, and writes the adapter or model and the run card."""

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
from lora.adapter import adapted
from lora.dropout import MASK_VERSION
from lora.merge import merge_folders
from lora.origin import check_origin
from lora.peft import AdapterFile, check_tensors, drop_absent_targets, read_config, write_adapter
from lora.quantized import quantize_base
from model.checkpoints.weights import config_dict, new_checkpoint, open_checkpoint, save_weights
from model.config import ModelConfig
from model.support.cli import UserError, guard
from model.support.files import atomic_folder
from model.support.lock import claim, hold, is_empty, sweep
from model.support.torchrun import rank_and_world
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

# Options that do not change a run's numbers, or only its length: a resumed run may change them.
MAY_CHANGE = set(
    "out resume allow_changed save_every keep_last device threads micro_rows checkpoint_blocks compile "
    "fuse sharded".split()
)


def program(stage: str) -> None:
    """Command line of train.pretrain and train.instruct."""

    def main() -> int:
        try:
            result = train(parse(None, stage), stage)
        except UserError:  # raised on every rank: print it once per machine
            if os.environ.get("LOCAL_RANK", "0") == "0":
                raise
            return 2
        if rank_and_world()[0] == 0:
            print(result)
        return 0

    raise SystemExit(guard(main, f"train.{stage}"))


def train(recipe: Recipe, stage: str) -> Path:
    """Runs a recipe to its end. Returns the adapter's folder (the model's, in full training)."""
    started = time.monotonic()
    ranks = Ranks.join(recipe.device)
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    with contextlib.ExitStack() as stack:
        ranks.run_on_first(lambda: stack.enter_context(hold(recipe.out)))
        trainer = prepare(recipe, stage, ranks)
        trainer.run()
        return finish(trainer, started)


def prepare(recipe: Recipe, stage: str, ranks: Ranks) -> Trainer:
    """Builds the trainer, cheap checks first. Raises UserError, mostly before anything is written."""
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
    empty = ranks.run_on_all(lambda: empty_model(recipe, config))
    sources = sources_of(recipe, encoding, ranks)
    drops = any(layer.active and layer.dropout[layer.active] > 0 for layer in adapted(empty[0]).values())
    run = identity(recipe, stage, sources, drops)
    if recipe.resume:  # before any store is written: a refused resume leaves the other run's store intact
        ranks.run_on_all(lambda: check_unchanged(Path(recipe.out) / "checkpoints", run, recipe.allow_changed))
    ranks.run_on_first(lambda: claim_out(Path(recipe.out), list(sources)))
    rows, valid = load_rows(recipe, stage, encoding, ranks, sources)
    recipe.steps_of(len(rows))  # raises where the warm-up is longer than the run
    for store in [split.store for split in (rows, valid) if split is not None]:
        largest = max(shard["largest"] for shard in store.manifest["shards"])
        if largest >= config.vocab_size:
            raise UserError(
                f"{encoding.tokenizer}: gives token {largest}, and the model has {config.vocab_size}: it"
                " is the tokenizer of another model"
            )
    model, base = load_model(recipe, config, ranks, empty)
    return Trainer(recipe, model, rows, valid, ranks, run, base)


def claim_out(out: Path, stores: list[str]) -> None:
    """Claims the run's folder. Deletes temporary files of killed processes, and token stores not named in `stores`.

    Raises UserError if the folder holds anything but a training run.
    """
    out.mkdir(parents=True, exist_ok=True)
    claim(out, out / "made-of.json", {"program": "train"}, begun=not is_empty(out))
    sweep(out)
    for old in (out / "tokens").glob("*"):
        if old.name not in stores:
            shutil.rmtree(old) if old.is_dir() else old.unlink()


def check_weights(recipe: Recipe) -> None:
    """Raises UserError if the weights are missing, or are not those that `adapter` was trained on."""
    if recipe.weights and not is_merged(recipe):
        open_checkpoint(recipe.weights)
        check_origin(recipe.weights, [recipe.adapter] if recipe.adapter else [])


def splits(recipe: Recipe, encoding: Encoding) -> dict[str, tuple[tuple[str, ...], Encoding, int]]:
    """(files, encoding, limit of records) of each token store. "valid", the smaller, comes first: errors show early."""
    all_questions = replace(encoding, empty_kept=1.0)  # makes held-out losses comparable between recipes
    valid = {"valid": (recipe.valid_data, all_questions, 0)} if recipe.valid_data else {}
    return valid | {"train": (recipe.data, encoding, recipe.records)}


def sources_of(recipe: Recipe, encoding: Encoding, ranks: Ranks) -> dict[str, dict[str, Any]]:
    """The identity of each token store, computed on the first rank."""
    return ranks.of_first(lambda: {name: identity_of(*split) for name, split in splits(recipe, encoding).items()})


def load_rows(
    recipe: Recipe, stage: str, encoding: Encoding, ranks: Ranks, sources: dict[str, dict[str, Any]]
) -> tuple[Rows, Rows | None]:
    """(training rows, held-out rows). The first rank tokenises; the others open its stores."""
    folder = Path(recipe.out) / "tokens"

    def build() -> dict[str, TokenStore]:
        built = {
            name: build_store(files, split_encoding, folder / name, limit, identity=sources[name])
            for name, (files, split_encoding, limit) in splits(recipe, encoding).items()
        }
        for store in built.values():
            if bad := store.manifest["rejects"]:
                print(
                    f"{bad} of {bad + len(store)} records cannot be used and are left out: "
                    f"{store.path}/rejects.jsonl names them",
                    file=sys.stderr,
                )
        return built

    built = ranks.run_on_first(build) or {}
    manifests = ranks.gather({name: store.manifest for name, store in built.items()})[0]

    def open_stores() -> dict[str, Rows]:
        stores = built or {name: TokenStore(folder / name) for name in manifests}
        if {name: store.manifest for name, store in stores.items()} != manifests:
            raise UserError(f"{folder}: not the first rank's token store; out must be a folder that all ranks share")
        return {name: Rows(store, recipe, stage) for name, store in stores.items()}

    rows = ranks.run_on_all(open_stores)
    return rows["train"], rows.get("valid")


def load_model(
    recipe: Recipe, config: ModelConfig, ranks: Ranks, empty: tuple[Transformer, AdapterFile | None]
) -> tuple[Transformer, str]:
    """Shards the `empty` model (see empty_model) and loads it. Returns (model, path of its base weights).

    Each rank reads only its own rows of the weights (sharded_load.py).
    """
    base = merged_base(recipe, ranks) if recipe.merge_adapter else recipe.weights
    model, adapter = empty
    if recipe.base == "nf4" and ranks.first:
        report_int8_layers(model)
    weight_ranks = ranks if recipe.sharded else Ranks(device=ranks.device)  # the ranks that one copy is divided over
    shapes = base_shapes(model)
    read = ranks.run_on_all(
        lambda: (
            from_checkpoint(open_checkpoint(base), shapes, weight_ranks)
            if base
            else fresh(recipe.seed, shapes, config.num_hidden_layers)
        )
    )
    compute_dtype = getattr(torch, recipe.dtype)
    sharded = weight_ranks.world > 1 or parameter_dtype(recipe) != compute_dtype
    if sharded:
        shard(model, ranks, compute_dtype if recipe.full else None)
    model.to_empty(device=ranks.device)
    load_sharded(model, weight_ranks, read, adapter, recipe.seed)
    if not sharded:
        join_weights(model)
    return model, base


def report_int8_layers(model: Transformer) -> None:
    """Prints which matrices of an NF4 base are int8, because their width is not a multiple of the NF4 block."""
    layers = adapted(model)
    if odd := [path for path, layer in layers.items() if layer.quantized and layer.quantized.kind != "nf4"]:
        print(
            f"base = nf4: {len(odd)} of {len(layers)} matrices are kept in int8, since 64 does not divide their "
            f"width: {odd[0]}",
            file=sys.stderr,
        )


def empty_model(recipe: Recipe, config: ModelConfig) -> tuple[Transformer, AdapterFile | None]:
    """(the model on the meta device with its adapters and quantized base; the tensors of an adapter to continue).

    Raises UserError if the adapter is missing or does not fit the model.
    """
    with torch.device("meta"):
        model = Transformer(config).to(parameter_dtype(recipe))
    if recipe.merge_adapter and not is_merged(recipe):
        check_tensors(model, AdapterFile(recipe.adapter), read_config(recipe.adapter), recipe.adapter)
    tensors = None
    if recipe.full:
        model.requires_grad_(True)
    else:
        tensors = add_adapters(model, recipe)
    if recipe.base:
        for layer in adapted(quantize_base(model, recipe.base)).values():
            assert layer.quantized is not None
            codes = layer.quantized.codes  # as a parameter, because FSDP shards parameters only
            del layer.quantized.codes
            layer.quantized.register_parameter("codes", nn.Parameter(codes, requires_grad=False))
    model.model.checkpoint_blocks = recipe.checkpoint_blocks
    model.use_attention("fast")
    if not recipe.compile:  # torch.compile fuses the plain block by itself
        training_blocks(model, recipe.fuse)
    return model, tensors


def add_adapters(model: Transformer, recipe: Recipe) -> AdapterFile | None:
    """Adds the recipe's adapters, in place. Returns the tensors of an adapter to continue (None for a new one)."""
    if recipe.adapter and not recipe.merge_adapter:
        lora, tensors = drop_absent_targets(read_config(recipe.adapter), model), AdapterFile(recipe.adapter)
        check_tensors(model, tensors, lora, recipe.adapter)
        add_lora(model, lora)
    else:
        lora, tensors = lora_config(recipe), None
        add_lora(model, lora)
    if lora.dropout > 0 and any(".experts." in path for path in adapted(model)):
        raise UserError(
            f"recipe: dropout {lora.dropout:g} with adapters on experts, whose tokens change places: their masks would "
            "depend on the batch; set dropout = 0, or target_modules without w1, w2 and w3"
        )
    return tensors


def is_merged(recipe: Recipe) -> bool:
    """True if the run resumes and its merged base is in out/base."""
    out = Path(recipe.out)
    return recipe.resume and bool(steps_saved(out / "checkpoints")) and (out / "base" / "config.json").is_file()


def merged_base(recipe: Recipe, ranks: Ranks) -> str:
    """Merges `adapter` into the weights, once. Returns the merged weights' folder, out/base."""
    folder = Path(recipe.out) / "base"

    def merge() -> None:
        merge_folders(recipe.weights, recipe.adapter, str(folder), getattr(torch, recipe.dtype), recipe.tokenizer)

    ranks.run_on_first(lambda: None if is_merged(recipe) else merge())
    return str(folder)


def identity(recipe: Recipe, stage: str, sources: dict[str, dict[str, Any]], drops: bool) -> dict[str, Any]:
    """Everything that a run's numbers depend on; a resume compares it. `drops`: the adapters have dropout, which a
    continued adapter may bring."""
    options = {key: value for key, value in asdict(recipe).items() if key not in MAY_CHANGE}
    options = {key: list(value) if isinstance(value, tuple) else value for key, value in options.items()}
    held_out = {"valid_data": sources["valid"]} if "valid" in sources else {}
    masks = {"dropout_masks": MASK_VERSION} if drops else {}
    return {"stage": stage, "recipe": options, "data": sources["train"], **held_out, **masks}


def save_model(state: dict[str, torch.Tensor], config: ModelConfig, path: Path, tokenizer: str) -> None:
    """Writes a model's folder in Hugging Face's form, with the tokenizer's files."""
    with new_checkpoint(path) as folder:
        save_weights(state, config.to_dict(), folder, 5 * 2**30)
        copy_tokenizer(tokenizer, folder)


def finish(trainer: Trainer, started: float) -> Path:
    """Writes the final adapter or model and the run card. Returns the folder of the former."""
    recipe, out = trainer.recipe, trainer.out
    final = out / ("model" if recipe.full else "adapter")
    peaks = trainer.ranks.gather(peak_memory(trainer.ranks.device))
    params, _ = snapshot(trainer.model, [], keep=trainer.ranks.first)

    def write() -> None:
        if recipe.full:
            state = {name: value.to(getattr(torch, recipe.dtype)) for name, value in params.items()}
            save_model(state, trainer.model.config, final, recipe.tokenizer or recipe.weights)
        else:
            with atomic_folder(final, keep_others=True) as folder:
                write_adapter(folder, *trainer.adapter(params))  # type: ignore[misc]
        write_card(trainer, time.monotonic() - started, peaks)

    trainer.ranks.run_on_first(write)
    return final
