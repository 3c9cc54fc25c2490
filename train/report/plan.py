"""Predicts a recipe's memory, by category, and its time, before anything is loaded.

    python -m train.report.plan train/recipes/cancerllm.toml --config train/recipes/mistral-7b.json --gpus 10 --gpu
    a100-80gb

Memory is lora/memory.py's estimate for the micro-batch with the longest rows; `python -m eval.bench plan` compares it
with measured runs. Time is FLOPs / (peak rate × model FLOP utilisation). The utilisation is `--mfu` or that of an
earlier run (`--like RUN/run.json`); without either, a GPU's time is a range, for utilisations of 0.5 to 0.2.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from tyro.conf import Positional

from lora.memory import PROGRAM, Step, active_layers, trained_model, training
from model.checkpoints.weights import config_dict
from model.config import ModelConfig
from model.support.cli import UserError, nearest, run
from model.support.files import read_json
from train.loss import chunk
from train.recipe import Recipe, read_toml

GPUS = {  # bytes of memory, dense bf16 FLOP/s: from data sheets
    "a100-40gb": (40e9, 312e12),
    "a100-80gb": (80e9, 312e12),
    "h100-80gb": (80e9, 989e12),
    "l4-24gb": (24e9, 121e12),
}
GPU_SHARES = (0.5, 0.2)  # assumed utilisations: LoRA on Mistral-7B at 3,354 tok/s on an A100 (fms-acceleration) is 0.31
SHEETS = {name.split("-")[0].upper(): rate for name, (_, rate) in GPUS.items()}  # peak by a word of the driver's name
CPU_SHARE = 0.75  # utilisation on a CPU, of its measured GEMM rate (eval.bench train)
NONE = "(the recipe names no weights)"


@dataclass(frozen=True)
class Options:
    """Predict memory and time of a recipe. Exit 1 if it does not fit."""

    recipe: Positional[str]
    """A recipe, as for train.pretrain and train.instruct."""
    config: str = ""
    """The model's config.json (or its folder), if the recipe's weights are not on this machine."""
    gpus: int = 1
    """Number of processes (on CPUs they share the machine)."""
    gpu: str = "cpu"
    """a100-40gb, a100-80gb, h100-80gb, l4-24gb, or cpu: this machine."""
    stage: Literal["auto", "pretrain", "instruct"] = "auto"
    """The program that runs the recipe (auto: by its options or its file's name)."""
    documents: int = 0
    """Number of documents in the data (0: count the recipe's data)."""
    document_tokens: int = 0
    """Average number of tokens of a document."""
    row_tokens: int = 0
    """Tokens of the longest row (0: the data's, else the recipe's block)."""
    mfu: float = 0.0
    """Model FLOP utilisation (0: that of `like`, else an assumption)."""
    like: str = ""
    """run.json of a training run on such a device, for its model FLOP utilisation."""
    json: bool = False
    """Print JSON."""


@dataclass(frozen=True)
class Load:
    """Size of the data, in one epoch."""

    tokens: int
    targets: int  # supervised tokens
    longest: int  # tokens of the longest row
    rows: int
    reach: float  # average number of tokens that a token attends to, without a window
    source: str  # for the report


def step_of(config: ModelConfig, recipe: Recipe, row_tokens: int, targets: int, heap: bool = False) -> Step:
    """The micro-batch whose memory is planned: rows of `row_tokens` tokens, `targets` supervised tokens in all."""
    from train.recipe import lora_config, parameter_dtype

    return Step(
        tokens=recipe.micro_rows * row_tokens,
        logits=min(chunk(config.vocab_size), targets),
        dtype=getattr(torch, recipe.dtype),
        stored=parameter_dtype(recipe),
        lora=None if recipe.full else lora_config(recipe),
        seed=recipe.seed,
        base=recipe.base,
        optimizer=recipe.optimizer,
        plain=recipe.full or recipe.compile or bool(config.num_local_experts),
        recomputed=recipe.checkpoint_blocks,
        dropout=recipe.dropout > 0,
        heap=heap,
    )


def memory(
    config: ModelConfig, recipe: Recipe, ranks: int, row_tokens: int, targets: int, gpu: str = ""
) -> dict[str, float]:
    """Bytes per process at the step's peak, by category; `targets`: supervised tokens of a micro-batch.

    `gpu`: "cpu" adds the fragmentation of glibc's heap, a GPU's name its CUDA context, "" neither.
    """
    parts = training(config, step_of(config, recipe, row_tokens, targets, gpu == "cpu"), ranks)
    if gpu not in ("", "cpu"):
        parts["context (assumed)"] = PROGRAM["cuda"]
    return parts


def arithmetic(config: ModelConfig, recipe: Recipe, load: Load) -> float:
    """FLOPs of one epoch.

    Per weight and token: 2 forward, 2 backward for the input's gradient, 2 more for the weight's own if it is trained.
    Attention, per (query, key) pair and unit of width: 4 forward, 10 backward (scores are recomputed). Checkpointed
    blocks add a second forward pass.
    """
    step = step_of(config, recipe, 0, 0)
    model = trained_model(config, step)
    linear = sum(
        p.numel() for name, p in model.named_parameters() if ".layers." in name and p.dim() == 2 and "lora_" not in name
    )
    adapter = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)
    if config.num_local_experts:
        linear = int(linear * config.num_experts_per_tok / config.num_local_experts)  # attention's share is small
    backward_share = active_layers(config, step) / config.num_hidden_layers
    matrices = (6 if recipe.full else 2 + 2 * backward_share) * linear + 6 * adapter
    recomputed = 2 * linear + 2 * adapter if recipe.checkpoint_blocks else 0
    keys = sum(min(load.reach, window or math.inf) for window in config.windows)
    attention = 14 * config.num_attention_heads * config.head_dim * keys
    head = (6 if recipe.full else 4) * config.vocab_size * config.hidden_size
    return load.tokens * (matrices + recomputed + attention) + load.targets * head


def find_config(options: Options, recipe: Recipe) -> ModelConfig:
    """The model's configuration, from `--config`, the recipe's init or its weights."""
    if options.config or recipe.init:
        return ModelConfig.from_dict(config_dict(options.config or recipe.init))
    if not Path(recipe.weights).exists():
        raise UserError(
            f"{recipe.weights}: no such folder; give the model's shape with --config, for example "
            "--config train/recipes/mistral-7b.json"
        )
    return ModelConfig.from_pretrained(recipe.weights)


def find_load(options: Options, recipe: Recipe, stage: str) -> Load:
    """The data's size: as given by the options, else estimated from a sample of the recipe's rows."""
    if options.documents or options.document_tokens:
        return given_load(options, recipe)
    missing = [file for file in recipe.data if not Path(file).is_file()]
    if missing:
        raise UserError(f"{missing[0]}: no such file; give the data's size: --documents N --document-tokens M")
    import tempfile

    from train.data.dataset import Rows
    from train.data.rows import ANSWER
    from train.data.store import build_store
    from train.recipe import encoding_of

    encoding = encoding_of(recipe, stage)
    if not Path(encoding.tokenizer).exists():
        raise UserError(
            f"{encoding.tokenizer}: no such folder, so nothing counts the data's tokens; give them: "
            "--documents N --document-tokens M"
        )
    with tempfile.TemporaryDirectory() as folder:
        rows = Rows(build_store(recipe.data, encoding, Path(folder) / "tokens", recipe.records), recipe, stage)
        seen = [rows[i] for i in range(0, len(rows), max(1, len(rows) // 256))]
    tokens = sum(map(len, seen)) * len(rows) // len(seen)
    targets = sum(row.targets(ANSWER) for row in seen) * len(rows) // len(seen)
    longest = options.row_tokens or max(map(len, seen))
    reach = sum(row.pairs() for row in seen) / sum(map(len, seen))
    return Load(tokens, targets, longest, len(rows), reach, f"{len(rows):,} rows of {', '.join(recipe.data)}")


def given_load(options: Options, recipe: Recipe) -> Load:
    """The data's size by `--documents` and `--document-tokens`."""
    if options.documents < 1 or options.document_tokens < 1:
        raise UserError("give both --documents and --document-tokens, each at least 1")
    tokens = options.documents * options.document_tokens
    longest = options.row_tokens or recipe.block
    source = f"{options.documents:,} documents of {options.document_tokens:,} tokens (as given)"
    masked = recipe.packing != "concatenate"  # a token then attends to its own document only
    reach = min(options.document_tokens, longest) / 2 if masked else longest / 2
    rows = options.documents if recipe.packing == "none" else math.ceil(tokens / longest)
    return Load(tokens, tokens, longest, rows, reach, source)


def device(options: Options) -> tuple[float, float, tuple[float, ...], str]:
    """(bytes per process, peak FLOP/s per process, utilisations from highest to lowest, their source)."""
    given, source = (measured_share(options.like), options.like) if options.like else (options.mfu, "--mfu")
    if options.gpu == "cpu":
        from model.support.hardware import probe

        rates, total = probe(), os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        peak = max(rates["fp32_gflops"], rates["bf16_gflops"]) * 1e9
        basis = f"of this machine's measured rate ({source if given else 'as steps of ours reach'})"
        return total / options.gpus, peak / options.gpus, (given or CPU_SHARE,), basis
    if options.gpu not in GPUS:
        raise UserError(f"--gpu {options.gpu}{nearest(options.gpu, list(GPUS))}; it is cpu or {', '.join(GPUS)}")
    size, peak = GPUS[options.gpu]
    basis = f"of {peak / 1e12:.0f} TFLOP/s ({source if given else 'assumed: no run measured it; --like or --mfu'})"
    return size, peak, (given,) if given else GPU_SHARES, basis


def measured_share(path: str) -> float:
    """The model FLOP utilisation of a run card (train/report/card.py)."""
    card = read_json(path)
    share = card.get("model_flop_utilisation") if isinstance(card, dict) else None
    if not isinstance(share, float) or not 0 < share <= 1:
        raise UserError(f"{path}: has no model_flop_utilisation in (0, 1]; give run.json of a finished training run")
    return share


def remedies(
    config: ModelConfig, recipe: Recipe, options: Options, load: Load, available: float
) -> list[dict[str, Any]]:
    """Changes to the recipe, the cheapest first and each on top of those before, with the total of each, until it
    fits."""
    changes: list[tuple[str, dict[str, Any], int]] = []
    if recipe.micro_rows > 1:
        changes.append(("micro_rows = 1 (the same batch, accumulated)", {"micro_rows": 1}, options.gpus))
    if not recipe.checkpoint_blocks:
        changes.append(("checkpoint_blocks = true (a third more time)", {"checkpoint_blocks": True}, options.gpus))
    if not recipe.full and not recipe.base:
        changes.append(('base = "nf4" (4-bit base)', {"base": "nf4"}, options.gpus))
    if recipe.optimizer == "adamw":
        changes.append(('optimizer = "adamw8bit"', {"optimizer": "adamw8bit"}, options.gpus))
    changes += [(f"{n} processes", {}, n) for n in (2, 4, 8, 16, 32) if n > options.gpus and options.gpu != "cpu"]
    found, changed = [], recipe
    for text, values, processes in changes:
        changed = replace(changed, **values)
        total = sum(memory(config, changed, processes, load.longest, targets_of(load, changed), options.gpu).values())
        found.append({"change": text, "total_gb": total / 1e9, "fits": total <= available})
        if total <= available:
            break
    return found


def targets_of(load: Load, recipe: Recipe) -> int:
    """Number of supervised tokens in a micro-batch of the longest rows."""
    return math.ceil(load.targets / max(load.tokens, 1) * load.longest * recipe.micro_rows)


def plan(options: Options) -> dict[str, Any]:
    """The plan, as `--json` prints it."""
    if options.gpus < 1 or not 0 <= options.mfu <= 1 or options.row_tokens < 0:
        raise UserError("--gpus is at least 1, --mfu lies in (0, 1], --row-tokens is not negative")
    if options.mfu and options.like:
        raise UserError("--mfu and --like both give the share of the device's peak; leave one out")
    raw = read_toml(options.recipe)
    recipe = Recipe(
        **{"data": ("data.jsonl",), "out": "runs/planned", **({} if raw.get("init") else {"weights": NONE}), **raw}
    )
    stage = options.stage
    if stage == "auto":
        asks = {"template", "share_prefix", "tasks", "loss_on", "append_eos", "note_loss"} & raw.keys()
        stage = "instruct" if asks or "instruct" in Path(options.recipe).stem else "pretrain"
    config, load = find_config(options, recipe), find_load(options, recipe, stage)
    available, peak, shares, basis = device(options)
    parts = memory(config, recipe, options.gpus, load.longest, targets_of(load, recipe), options.gpu)
    total = sum(parts.values())
    passes = recipe.steps * recipe.batch_rows / load.rows if recipe.steps else recipe.epochs
    flops = arithmetic(config, recipe, load) * passes
    seconds = [flops / (peak * share * options.gpus) for share in shares]
    return {
        "recipe": options.recipe,
        "stage": stage,
        "gpus": options.gpus,
        "gpu": options.gpu,
        "data": asdict(load),
        "bytes": parts,
        "total_bytes": total,
        "available_bytes": available,
        "fits": total <= available,
        "steps": recipe.steps or max(1, round(recipe.epochs * load.rows / recipe.batch_rows)),
        "tokens": load.tokens * passes,
        "flops": flops,
        "mfu": shares,
        "mfu_basis": basis,
        "seconds": seconds,
        "tokens_per_second": [load.tokens * passes / each for each in seconds],
        "remedies": [] if total <= available else remedies(config, recipe, options, load, available),
    }


def as_text(result: dict[str, Any]) -> str:
    """The plan as text."""
    lines = [
        f"{result['recipe']} ({result['stage']}) on {result['gpus']} x {result['gpu']}: {result['data']['source']}, "
        f"rows of at most {result['data']['longest']:,} tokens",
        "",
        "memory of each process, GB",
    ]
    lines += [f"  {name:20} {size / 1e9:8.3f}" for name, size in result["bytes"].items()]
    verdict = "fits" if result["fits"] else "DOES NOT FIT"
    lines += [
        f"  {'total':20} {result['total_bytes'] / 1e9:8.3f}   of {result['available_bytes'] / 1e9:.1f}: {verdict}",
        "",
    ]
    time, rate, share = (
        " to ".join(map(form, result[key]))
        for key, form in (("seconds", duration), ("tokens_per_second", "{:,.0f}".format), ("mfu", "{:.0%}".format))
    )
    lines.append(
        f"time {time} for {result['tokens']:,.0f} tokens in {result['steps']:,} steps: {rate} tok/s, "
        f"{result['flops']:.2e} FLOP at {share} {result['mfu_basis']}"
    )
    for number, remedy in enumerate(result["remedies"]):
        fits = ", fits" if remedy["fits"] else ""
        lines.append(f"  {'and ' * (number > 0)}{remedy['change']}: {remedy['total_gb']:.1f} GB{fits}")
    if result["remedies"] and not result["remedies"][-1]["fits"]:
        lines.append("  still too much: a smaller block (shorter rows) or a smaller model")
    return "\n".join(lines)


def duration(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.1f} min"


def main(options: Options) -> int:
    result = plan(options)
    print(json.dumps(result, indent=2) if options.json else as_text(result))
    return 0 if result["fits"] else 1


if __name__ == "__main__":
    run(main, Options)
