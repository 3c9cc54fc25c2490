"""Bytes that a model with an adapter takes, when it answers and when it is trained: one model of memory for both.

    weights + adapters + activations + logits + program                 of both
    + keys and values                                                   of inference
    + gradients + optimizer state + gathered shards + fragmentation     of training

Sizes of weights and adapters are those of the model built without memory (meta tensors). `infer.engine.memory` chooses
a way to run a job within a budget by it, `train.report.plan` says whether a recipe fits. `python -m eval.bench plan`
and `python -m eval.bench seven-b` hold it against measured memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from lora.adapter import LoRAConfig, adapted, add_lora
from lora.peft import read_config
from model import ModelConfig, Transformer
from model.quantize.linear import bytes_of, is_quantizable

PROGRAM = {"cpu": 350_000_000, "cuda": 1_000_000_000}  # torch and tokenizer resident; a CUDA context and workspaces
PIECE = 1200  # bytes of a vocabulary's piece in the tree that grammars walk
LOADING = 100_000_000  # what a loader holds beside the model: a tensor's pieces in flight
MAPPED = 32 * 2**20  # glibc gives larger blocks a mapping of their own, which goes back when they are freed


@dataclass(frozen=True)
class Requests:
    """What is asked of the model at once: it decides the cache and the activations."""

    tokens: int
    """Tokens of a request's prompt."""
    new: int
    """New tokens of all answers to a request, their questions included."""
    answers: int = 1
    """Answers that grow side by side for a request."""
    batch: int = 1
    """Requests at once, at most."""
    grounded: bool = False
    """Whether a grammar allows an answer's tokens: the vocabulary is held as a tree."""


@dataclass(frozen=True)
class Step:
    """What a training step computes on one process."""

    tokens: int
    """Tokens of a micro-batch of the longest rows."""
    logits: int
    """Supervised tokens whose logits are held at once."""
    dtype: torch.dtype
    """Of what is computed."""
    stored: torch.dtype
    """Of the parameters: float32 where full training keeps masters."""
    lora: LoRAConfig | None
    """The adapters that are trained; None: all weights."""
    seed: int = 0
    """Of the adapters."""
    base: str = ""
    """The format of the frozen weights below adapters; empty: not quantized."""
    optimizer: str = "adamw"
    """adamw, sgd, adamw8bit or muon."""
    plain: bool = False
    """Whether the plain block runs (model/transformer.py) in place of the fast one (train/fast/block.py)."""
    recomputed: bool = False
    """Whether blocks are computed again in the backward pass."""
    dropout: bool = False
    """Whether adapters' inputs are masked."""
    heap: bool = False
    """Whether tensors lie on glibc's heap (on a CPU)."""


def on_meta(config: ModelConfig) -> Transformer:
    """The model without memory: shapes alone."""
    with torch.device("meta"):
        return Transformer(config)


def weight_bytes(config: ModelConfig, form: str, dtype: torch.dtype) -> int:
    """Bytes of a model's parameters with its linear layers in a format, embedding and norms in `dtype`."""
    model = on_meta(config)
    linears = (path for path, module in model.named_modules() if isinstance(module, torch.nn.Linear))
    linear = {f"{path}.weight" for path in linears if is_quantizable(path)}
    size = 0
    for name, parameter in model.named_parameters():
        if form != "wide" and name in linear:
            size += bytes_of(form, *parameter.shape)
        elif form != "wide" and name.endswith("embed_tokens.weight"):
            size += parameter.numel() * (8 if dtype == torch.float64 else 2)
        else:
            size += parameter.numel() * dtype.itemsize
    if form != "wide" and model.lm_head is None:
        size += bytes_of(form, config.vocab_size, config.hidden_size)
    return size


def adapter_bytes(config: ModelConfig, adapters: Sequence[str | Path], form: str) -> int:
    """Bytes of the adapter that stays beside quantized weights: in fp32, and B once more, scaled."""
    if form == "wide" or not adapters:
        return 0
    own = read_config(adapters[-1])
    model = on_meta(config)
    wanted = [(p, m) for p, m in model.named_modules() if isinstance(m, torch.nn.Linear) and own.wants(p)]
    return sum(4 * own.rank(path) * (m.in_features + 2 * m.out_features) for path, m in wanted)


def inference(
    config: ModelConfig,
    asked: Requests,
    batch: int,
    cache: torch.dtype,
    chunk: int,
    dtype: torch.dtype,
    device: str,
    form: str = "wide",
) -> dict[str, int]:
    """Bytes beside the weights while `batch` requests are answered: {"cache", "activations", "logits", "program"}."""
    L, D, H, G, K = (
        config.num_hidden_layers,
        config.hidden_size,
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
    )
    growth = 64 * asked.answers + asked.new // 4  # leaves grow by a quarter, and are copied while they do
    longest = whole = asked.tokens + asked.new
    slots = batch * (longest + growth)
    if config.window is not None:  # a node lets go of what is older than its window when a chunk has made it two
        longest = min(longest, 2 * config.window)
        slots = batch * (longest + growth) + min(chunk, whole - longest)
        whole = min(whole, config.window + chunk)
    if batch * asked.answers == 1:  # a prompt by itself is one leaf, of which a layer at a time is copied
        slots = (whole + max(32, whole // 4)) * (L + 1) // L
    kept = slots * L * 2 * G * K * cache.itemsize
    rows = min(chunk, asked.tokens) if batch == 1 else chunk
    width = (5 if form == "w8a8" else 4) * config.intermediate_size + 6 * D + 3 * (H + 2 * G) * K
    loading = LOADING
    if form == "w8a8":  # the largest matrix whose rows are mixed, before and after
        loading += 2 * 4 * D * max(config.intermediate_size, H * K)
    attended = 3 * longest * H * K * 4 + rows * longest * 5  # keys and values for every head in fp32; mask, scores
    computed = rows * width * max(4, dtype.itemsize) + attended
    logits = 3 * batch * asked.answers * 8 * config.vocab_size * 4  # up to eight guessed positions an answer
    program = PROGRAM[device] + PIECE * config.vocab_size * asked.grounded
    return {"cache": kept, "activations": max(computed, loading), "logits": logits, "program": program}


def trained_model(config: ModelConfig, step: Step) -> Transformer:
    """The model with the adapters that are trained, on meta: sizes without memory."""
    model = on_meta(config).to(step.stored)
    if step.lora is None:
        return model.requires_grad_(True)
    add_lora(model, step.lora, seed=step.seed)
    return model


def training(config: ModelConfig, step: Step, ranks: int = 1) -> dict[str, float]:
    """Bytes on each of `ranks` processes at a step's peak: {"weights", "adapters", "gradients", "optimizer",
    "activations", "logits", "gathered"}, and "fragmentation" on a heap."""
    model, e = trained_model(config, step), step.dtype.itemsize
    adapters = adapted(model)
    block = root = largest = 0.0
    for name, p in model.named_parameters():
        if "lora_" in name:
            continue
        layer = adapters.get(name.removesuffix(".weight"))
        size = bytes_of(step.base, *p.shape) if step.base and layer is not None else p.nbytes
        if step.base == "w8a8" and layer is not None:  # its codes twice on one rank, and never a wide weight
            size += p.numel() * (ranks == 1)
        elif step.base and layer is not None:
            largest = max(largest, p.numel() * e)
        block, root = (block + size, root) if ".layers." in name else (block, root + size)
    trained = [p for p in model.parameters() if p.requires_grad]
    width = sum(p.nbytes for p in trained)
    count = sum(p.numel() for p in trained)
    matrices = sum(
        p.nbytes for name, p in model.named_parameters() if p.requires_grad and p.dim() == 2 and ".layers." in name
    )
    state = {"adamw": 2 * width, "sgd": 0.0, "adamw8bit": count * (2 + 2 * 4 / 256), "muon": 2 * width - matrices}
    layers, active = config.num_hidden_layers, active_layers(config, step)
    inside, passing = block_bytes(config, step)
    kept = layers * config.hidden_size * e + inside if step.recomputed else active * inside
    beside = e if e >= 4 else 4 + e  # narrow numbers are widened beside themselves
    made = {
        "weights": block + root,
        "adapters": 0.0 if step.lora is None else width,
        "gradients": width,
        "optimizer": state[step.optimizer],
        "activations": step.tokens * (kept + passing),
        "logits": config.vocab_size * beside * (step.logits + (config.hidden_size if step.lora is None else 0)),
        "gathered": largest,
    }
    if step.heap:
        made["fragmentation"] = heap_fragmentation(config, step)
    if ranks > 1 or step.stored != step.dtype:  # FSDP: shards, the root's group whole, two blocks gathered at a time
        made |= {key: made[key] / ranks for key in ("adapters", "gradients", "optimizer")}
        made["weights"] = (block + root) / ranks
        numbers = (root + 2 * block / layers) / step.stored.itemsize
        made["gathered"] += numbers * e * (1 + 1 / ranks)  # what is gathered, beside this process's part of it
        if step.lora is None:  # whole gradients, and in fp32 while they are reduced
            made["gathered"] += numbers * (e + 4)
    return made


def heap_fragmentation(config: ModelConfig, step: Step) -> float:
    """Bytes between kept tensors that glibc's heap cannot use again.

    torch asks for aligned blocks (posix_memalign), and for those glibc needs a free chunk larger than the block: the
    chunk that a freed tensor leaves never serves the next tensor of its size. Each fast or recomputed block frees one
    tensor of the feed-forward's width between tensors that are kept. MALLOC_MMAP_THRESHOLD_=1048576 in the environment
    avoids it, for a twelfth more time.
    """
    size = config.intermediate_size * step.tokens * step.dtype.itemsize
    if (step.plain and not step.recomputed) or size >= MAPPED:
        return 0.0
    return active_layers(config, step) * size


def active_layers(config: ModelConfig, step: Step) -> int:
    """Layers that keep anything: those from the first adapter on."""
    first = 0 if step.lora is None or step.lora.layers is None else min(step.lora.layers)
    return config.num_hidden_layers - first


def block_bytes(config: ModelConfig, step: Step) -> tuple[float, float]:
    """(bytes a token that a block keeps for its backward pass, bytes a token of what passes through at the peak)."""
    D, F = config.hidden_size, config.intermediate_size * max(1, config.num_experts_per_tok or 1)
    Q, G = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    e = step.dtype.itemsize
    wide = max(e, 4)
    low = 0 if step.lora is None else 7 * step.lora.r
    if not step.plain:
        # two inputs, turned q and k, v, attention's result, gate, up, the low-rank products, log-sums and 1/rms
        return e * (2 * D + 2 * Q + 2 * G + 2 * F + low) + wide * (config.num_attention_heads + 2), e * (4 * F + 2 * D)
    # norms' inputs widened and their results, q and the repeated k and v, the result, gate, silu, up and their product
    kept = 2 * wide * D + e * (2 * D + 4 * Q + 4 * F + low) + wide * config.num_attention_heads
    if step.lora is None:  # RMSNorm's unit vectors, for the gradient of its weight
        kept += 2 * e * D
    if step.dropout:  # each layer's mask and masked input
        kept += e * (2 * 5 * D + 2 * Q + 2 * F)
    return kept, e * (3 * F + 2 * D)
