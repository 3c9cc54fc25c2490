"""Plan before paying: memory by category and time of a recipe, before anything is loaded.

    python -m train.report.plan train/recipes/cancerllm.toml --config train/recipes/mistral-7b.json --gpus 10 --gpu
    a100-80gb

Sizes of weights and adapters are those of the model built without memory (meta tensors). Activations are counted from
what each block keeps for its backward pass (fast/block.py; model/transformer.py where full training, compile or experts
need the plain block), for the micro-batch of longest rows. Time is arithmetic over the rate that is reached: the
device's peak times `--mfu`, which is an assumption on a GPU and is marked as one. `python -m eval.bench plan` holds
the memory against measured runs.
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

from model.checkpoints.weights import config_dict
from model.config import ModelConfig
from model.quantize.linear import bytes_of
from model.support.cli import UserError, nearest, run
from train.loss import chunk
from train.recipe import Recipe, read_toml

GPUS = {  # bytes of memory, dense bf16 FLOP/s: the makers' data sheets
    "a100-40gb": (40e9, 312e12),
    "a100-80gb": (80e9, 312e12),
    "h100-80gb": (80e9, 989e12),
    "l4-24gb": (24e9, 121e12),
}
GPU_SHARE = 0.30  # of the peak: 3,354 tok/s of LoRA on Mistral-7B on an A100 (fms-acceleration's table) is 31 % of it
SHEETS = {name.split("-")[0].upper(): rate for name, (_, rate) in GPUS.items()}  # by the word in the driver's names
CPU_SHARE = 0.75  # of the measured product rate: a step of ours on a CPU (eval.bench train)
GPU_CONTEXT = 1.0e9  # the driver's context and libraries' workspaces: an assumption
MAPPED = 32 * 2**20  # glibc gives larger blocks a mapping of their own, which goes back when they are freed
NONE = "(the recipe names no weights)"
WIDTH = {"float64": 8, "float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class Options:
    """Predict memory and time of a recipe. Exit 1 when it does not fit."""

    recipe: Positional[str]
    """A recipe, as train.pretrain and train.instruct take it."""
    config: str = ""
    """The model's config.json (or its folder), where the recipe's weights are not here yet."""
    gpus: int = 1
    """Processes that share the work (and, on CPUs, the machine)."""
    gpu: str = "cpu"
    """a100-40gb, a100-80gb, h100-80gb, l4-24gb, or cpu: this machine."""
    stage: Literal["auto", "pretrain", "instruct"] = "auto"
    """Which program runs it (auto: instruct where a note's questions are asked for)."""
    documents: int = 0
    """Documents of the data (0: the recipe's data is read)."""
    document_tokens: int = 0
    """Tokens of a document, on average."""
    row_tokens: int = 0
    """Tokens of the longest row (0: the data's, else the recipe's block)."""
    mfu: float = 0.0
    """Share of the device's peak arithmetic that is reached (0: the assumption that the plan prints)."""
    json: bool = False
    """Print JSON."""


@dataclass(frozen=True)
class Load:
    """What the data asks for: tokens of one pass, supervised tokens among them, longest row, rows (of one pass), and
    how many tokens one of them sees on average."""

    tokens: int
    targets: int
    longest: int
    rows: int
    reach: float
    source: str


def built(config: ModelConfig, recipe: Recipe) -> torch.nn.Module:
    """The model with its adapters, on meta: sizes without memory."""
    from model.transformer import Transformer
    from train.recipe import lora_config, parameter_dtype

    with torch.device("meta"):
        model = Transformer(config)
    model = model.to(parameter_dtype(recipe))
    if recipe.full:
        return model.requires_grad_(True)
    from lora import add_lora

    return add_lora(model, lora_config(recipe, config), seed=recipe.seed)


def memory(
    config: ModelConfig, recipe: Recipe, ranks: int, row_tokens: int, targets: int, heap: bool = False
) -> dict[str, float]:
    """Bytes on each process, by category, at the step's peak; `targets` of a micro-batch are supervised. `heap`:
    tensors are allocated on glibc's heap (on a CPU)."""
    from lora.adapter import adapted
    from train.recipe import parameter_dtype

    model, e = built(config, recipe), WIDTH[recipe.dtype]
    adapters = {name: layer for name, layer in adapted(model).items()}
    block = root = largest = 0.0
    for name, p in model.named_parameters():
        if "lora_" in name:
            continue
        layer = adapters.get(name.removesuffix(".weight"))
        size = bytes_of(recipe.base, *p.shape) if recipe.base and layer is not None else p.nbytes
        largest = max(largest, p.numel() * e if layer is not None and recipe.base else 0.0)
        block, root = (block + size, root) if ".layers." in name else (block, root + size)
    trained = [p for p in model.parameters() if p.requires_grad]
    width = sum(p.numel() * p.element_size() for p in trained)
    count = sum(p.numel() for p in trained)
    matrices = sum(
        p.numel() * p.element_size()
        for name, p in model.named_parameters()
        if p.requires_grad and p.dim() == 2 and ".layers." in name
    )
    state = {"adamw": 2 * width, "sgd": 0.0, "adamw8bit": count * (2 + 2 * 4 / 256), "muon": 2 * width - matrices}
    tokens, layers = recipe.micro_rows * row_tokens, config.num_hidden_layers
    inside, passing = block_bytes(config, recipe, e, plain(config, recipe))
    kept = layers * config.hidden_size * e + inside if recipe.checkpoint_blocks else active(config, recipe) * inside
    V, held = config.vocab_size, min(chunk(config.vocab_size), targets)
    beside = e if e >= 4 else 4 + e  # narrow numbers are widened beside themselves
    made = {
        "weights": block + root,
        "adapters": 0.0 if recipe.full else width,
        "gradients": width,
        "optimizer": state[recipe.optimizer],
        "activations": tokens * (kept + passing),
        "logits": V * beside * (held + (config.hidden_size if recipe.full else 0)),
        "gathered": largest,
    }
    if heap:
        made["fragmentation"] = heap_fragmentation(config, recipe, tokens * e)
    stored = parameter_dtype(recipe).itemsize
    if ranks > 1 or stored != e:  # FSDP: shards, the whole of the root's group, and two blocks gathered at a time
        made |= {key: made[key] / ranks for key in ("adapters", "gradients", "optimizer")}
        made["weights"] = (block + root) / ranks
        made["gathered"] += (root + 2 * block / layers) * e / stored
    return made


def heap_fragmentation(config: ModelConfig, recipe: Recipe, width: int) -> float:
    """Bytes between kept tensors that glibc's heap cannot use again; `width` is the bytes of one number for each token.

    torch asks for aligned blocks (posix_memalign), and for those glibc needs a free chunk larger than the block: the
    chunk that a freed tensor leaves never serves the next tensor of its size. Each fast or recomputed block frees one
    tensor of the feed-forward's width between tensors that are kept. MALLOC_MMAP_THRESHOLD_=1048576 in the environment
    avoids it, for a twelfth more time.
    """
    size = config.intermediate_size * width
    if (plain(config, recipe) and not recipe.checkpoint_blocks) or size >= MAPPED:
        return 0.0
    return active(config, recipe) * size


def active(config: ModelConfig, recipe: Recipe) -> int:
    """Layers that keep anything: those from the first adapter on."""
    return config.num_hidden_layers - (0 if recipe.full else recipe.first_layer)


def plain(config: ModelConfig, recipe: Recipe) -> bool:
    return recipe.full or recipe.compile or bool(config.num_local_experts)


def block_bytes(config: ModelConfig, recipe: Recipe, e: int, plain: bool) -> tuple[float, float]:
    """(bytes a token that a block keeps for its backward pass, bytes a token of what passes through at the peak)."""
    D, F = config.hidden_size, config.intermediate_size * max(1, config.num_experts_per_tok or 1)
    Q, G = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    wide = max(e, 4)
    low = 0 if recipe.full else 7 * recipe.r
    if not plain:
        # two inputs, turned q and k, v, attention's result, gate, up, the low-rank products, log-sums and 1/rms
        return e * (2 * D + 2 * Q + 2 * G + 2 * F + low) + wide * (config.num_attention_heads + 2), e * (4 * F + 2 * D)
    # norms' inputs widened and their results, q and the repeated k and v, the result, gate, silu, up and their product
    kept = 2 * wide * D + e * (2 * D + 4 * Q + 4 * F + low) + wide * config.num_attention_heads
    if recipe.full:  # RMSNorm's unit vectors, for the gradient of its weight
        kept += 2 * e * D
    if recipe.dropout:  # each layer's mask and masked input
        kept += e * (2 * 5 * D + 2 * Q + 2 * F)
    return kept, e * (3 * F + 2 * D)


def arithmetic(config: ModelConfig, recipe: Recipe, load: Load) -> float:
    """Floating-point operations of one pass over the data: 2 a weight and token forward, 2 backward for the input's
    gradient, 2 more for a trained weight's own; attention 14 a pair and width (4 forward, 10 backward, where scores are
    made again); recomputed blocks forward again."""
    model = built(config, recipe)
    linear = sum(
        p.numel() for name, p in model.named_parameters() if ".layers." in name and p.dim() == 2 and "lora_" not in name
    )
    low = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)
    if config.num_local_experts:
        linear = int(linear * config.num_experts_per_tok / config.num_local_experts)  # attention's share is small
    back = active(config, recipe) / config.num_hidden_layers
    matrices = (6 if recipe.full else 2 + 2 * back) * linear + 6 * low
    again = 2 * linear + 2 * low if recipe.checkpoint_blocks else 0
    seen = sum(min(load.reach, window or math.inf) for window in config.windows)
    attention = 14 * config.num_attention_heads * config.head_dim * seen
    head = (6 if recipe.full else 4) * config.vocab_size * config.hidden_size
    return load.tokens * (matrices + again + attention) + load.targets * head


def find_config(options: Options, recipe: Recipe) -> ModelConfig:
    if options.config or recipe.init:
        return ModelConfig.from_dict(config_dict(options.config or recipe.init))
    if not Path(recipe.weights).exists():
        raise UserError(
            f"{recipe.weights}: no such folder; give the model's shape with --config, for example "
            "--config train/recipes/mistral-7b.json"
        )
    return ModelConfig.from_pretrained(recipe.weights)


def find_load(options: Options, recipe: Recipe, stage: str) -> Load:
    """The data's size: counted where the data and the tokenizer are here, else as the options say."""
    if options.documents or options.document_tokens:
        if options.documents < 1 or options.document_tokens < 1:
            raise UserError("give both --documents and --document-tokens, each at least 1")
        tokens = options.documents * options.document_tokens
        longest = options.row_tokens or recipe.block
        source = f"{options.documents:,} documents of {options.document_tokens:,} tokens (as given)"
        apart = recipe.packing != "concatenate"  # then a token sees its own document only
        reach = min(options.document_tokens, longest) / 2 if apart else longest / 2
        return Load(tokens, tokens, longest, math.ceil(tokens / longest), reach, source)
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


def device(options: Options) -> tuple[float, float, float, str]:
    """(bytes a process may use, peak FLOP/s a process, share of it that is reached, what the share rests on)."""
    if options.gpu == "cpu":
        from model.support.hardware import probe

        rates, total = probe(), os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        peak = max(rates["fp32_gflops"], rates["bf16_gflops"]) * 1e9
        return total / options.gpus, peak / options.gpus, options.mfu or CPU_SHARE, "of this machine's measured rate"
    if options.gpu not in GPUS:
        raise UserError(f"--gpu {options.gpu}{nearest(options.gpu, list(GPUS))}; it is cpu or {', '.join(GPUS)}")
    size, peak = GPUS[options.gpu]
    return size, peak, options.mfu or GPU_SHARE, f"of {peak / 1e12:.0f} TFLOP/s (an assumption; --mfu)"


def remedies(
    config: ModelConfig, recipe: Recipe, options: Options, load: Load, available: float
) -> list[dict[str, Any]]:
    """Changes that cost least first, each with the total that it leads to, until one fits."""
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
    made, so_far, gpus = [], recipe, options.gpus
    for what, values, processes in changes:
        so_far, gpus = replace(so_far, **values), processes
        total = total_bytes(
            memory(config, so_far, gpus, load.longest, targets_of(load, so_far), options.gpu == "cpu"), options.gpu
        )
        made.append({"change": what, "total_gb": total / 1e9, "fits": total <= available})
        if total <= available:
            break
    return made


def total_bytes(parts: dict[str, float], gpu: str) -> float:
    return sum(parts.values()) + (GPU_CONTEXT if gpu != "cpu" else 0.0)


def targets_of(load: Load, recipe: Recipe) -> int:
    return math.ceil(load.targets / max(load.tokens, 1) * load.longest * recipe.micro_rows)


def plan(options: Options) -> dict[str, Any]:
    """Everything that the command prints."""
    if options.gpus < 1 or not 0 <= options.mfu <= 1 or options.row_tokens < 0:
        raise UserError("--gpus is at least 1, --mfu lies in (0, 1], --row-tokens is not negative")
    raw = read_toml(options.recipe)
    recipe = Recipe(
        **{"data": ("data.jsonl",), "out": "runs/planned", **({} if raw.get("init") else {"weights": NONE}), **raw}
    )
    stage = options.stage
    if stage == "auto":
        asks = {"template", "share_prefix", "tasks", "loss_on", "append_eos", "note_loss"} & raw.keys()
        stage = "instruct" if asks or "instruct" in Path(options.recipe).stem else "pretrain"
    config, load = find_config(options, recipe), find_load(options, recipe, stage)
    available, peak, share, basis = device(options)
    parts = memory(config, recipe, options.gpus, load.longest, targets_of(load, recipe), options.gpu == "cpu")
    total = total_bytes(parts, options.gpu)
    passes = recipe.steps * recipe.batch_rows / load.rows if recipe.steps else recipe.epochs
    flops = arithmetic(config, recipe, load) * passes
    seconds = flops / (peak * share * options.gpus)
    return {
        "recipe": options.recipe,
        "stage": stage,
        "gpus": options.gpus,
        "gpu": options.gpu,
        "data": asdict(load),
        "bytes": {**parts, **({"context (assumed)": GPU_CONTEXT} if options.gpu != "cpu" else {})},
        "total_bytes": total,
        "available_bytes": available,
        "fits": total <= available,
        "steps": recipe.steps or max(1, round(recipe.epochs * load.rows / recipe.batch_rows)),
        "tokens": load.tokens * passes,
        "flops": flops,
        "mfu": share,
        "mfu_basis": basis,
        "seconds": seconds,
        "tokens_per_second": load.tokens * passes / seconds,
        "remedies": [] if total <= available else remedies(config, recipe, options, load, available),
    }


def shown(found: dict[str, Any]) -> str:
    lines = [
        f"{found['recipe']} ({found['stage']}) on {found['gpus']} x {found['gpu']}: {found['data']['source']}, "
        f"rows of at most {found['data']['longest']:,} tokens",
        "",
        "memory of each process, GB",
    ]
    lines += [f"  {name:20} {size / 1e9:8.3f}" for name, size in found["bytes"].items()]
    verdict = "fits" if found["fits"] else "DOES NOT FIT"
    lines += [
        f"  {'total':20} {found['total_bytes'] / 1e9:8.3f}   of {found['available_bytes'] / 1e9:.1f}: {verdict}",
        "",
    ]
    hours = found["seconds"] / 3600
    time = f"{hours:.1f} h" if hours >= 1 else f"{hours * 60:.1f} min"
    lines.append(
        f"time {time} for {found['tokens']:,.0f} tokens in {found['steps']:,} steps: "
        f"{found['tokens_per_second']:,.0f} tok/s, {found['flops']:.2e} FLOP at {found['mfu']:.0%} "
        f"{found['mfu_basis']}"
    )
    for remedy in found["remedies"]:
        lines.append(
            f"  {'' if remedy is found['remedies'][0] else 'and '}{remedy['change']}: "
            f"{remedy['total_gb']:.1f} GB{', fits' if remedy['fits'] else ''}"
        )
    if found["remedies"] and not found["remedies"][-1]["fits"]:
        lines.append("  still too much: a smaller block (shorter rows) or a smaller model")
    return "\n".join(lines)


def main(options: Options) -> int:
    found = plan(options)
    print(json.dumps(found, indent=2) if options.json else shown(found))
    return 0 if found["fits"] else 1


if __name__ == "__main__":
    run(main, Options)
