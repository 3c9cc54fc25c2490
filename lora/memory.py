"""Estimate the memory of a model with an adapter, in inference and in training.

    weights + adapters + activations + logits + program                 both
    + KV cache                                                          inference
    + gradients + optimizer state + gathered shards + fragmentation     training

Sizes of weights and adapters are counted on a model of meta tensors. `infer.engine.memory` uses the estimate to choose
format and batch within a budget, `train.report.plan` to tell whether a recipe fits. `python -m eval.bench plan` and
`python -m eval.bench seven-b` compare it with measured memory.
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

PROGRAM = {"cpu": 350_000_000, "cuda": 1_000_000_000}  # torch and tokenizer; on a GPU also CUDA context and workspaces
PIECE = 1200  # bytes that a grammar's vocabulary tree takes for each piece
LOADING = 100_000_000  # the loader's buffers
MMAP_THRESHOLD = 32 * 2**20  # glibc maps larger blocks separately and returns them to the system when freed


@dataclass(frozen=True)
class Requests:
    """An inference job: determines the size of the KV cache and the activations."""

    tokens: int
    """Prompt tokens of a request."""
    new: int
    """New tokens of all answers to a request, including the tokens of their questions."""
    answers: int = 1
    """Answers to a request that are decoded in parallel."""
    batch: int = 1
    """Most requests in a batch."""
    grounded: bool = False
    """True if a grammar constrains decoding; it holds the vocabulary as a tree."""


@dataclass(frozen=True)
class Step:
    """A training step on one process."""

    tokens: int
    """Tokens of a micro-batch of the longest rows."""
    logits: int
    """Tokens in a chunk of the loss, whose logits exist at the same time."""
    dtype: torch.dtype
    """Compute dtype."""
    stored: torch.dtype
    """Parameter dtype: float32 if full training keeps master weights."""
    lora: LoRAConfig | None
    """Adapters to train; None: full training."""
    seed: int = 0
    """Seed of the adapters' initial values."""
    base: str = ""
    """Format of the frozen weights under adapters; empty: not quantized."""
    optimizer: str = "adamw"
    """adamw, sgd, adamw8bit or muon."""
    plain: bool = False
    """True for the plain block (model/transformer.py), False for the fast one (train/fast/block.py)."""
    recomputed: bool = False
    """True if blocks are recomputed in the backward pass (activation checkpointing)."""
    dropout: bool = False
    """True if adapters have dropout."""
    heap: bool = False
    """True if tensors are allocated on glibc's heap (on a CPU)."""


def on_meta(config: ModelConfig) -> Transformer:
    """The model with meta tensors."""
    with torch.device("meta"):
        return Transformer(config)


def weight_bytes(config: ModelConfig, form: str, dtype: torch.dtype) -> int:
    """Bytes of a model's parameters with its linear layers in a format ("wide": not quantized)."""
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
    """Bytes of the last adapter, which is not merged into quantized weights: A, B and a scaled copy of B, in fp32."""
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
    """Bytes in addition to the weights while `batch` requests are answered, with prefill in chunks of `chunk` tokens.

    Returns {"cache", "activations", "logits", "program"}.
    """
    L, D, H, G, K = (
        config.num_hidden_layers,
        config.hidden_size,
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
    )
    slots, longest = cache_slots(config, asked, batch, chunk)
    rows = min(chunk, asked.tokens) if batch == 1 else chunk
    width = (5 if form == "w8a8" else 4) * config.intermediate_size + 6 * D + 3 * (H + 2 * G) * K
    attended = 3 * longest * H * K * 4 + rows * longest * 5  # keys and values for every head in fp32; mask, scores
    computed = rows * width * max(4, dtype.itemsize) + attended
    loading = LOADING
    if form == "w8a8":  # the largest matrix whose rows are mixed, before and after
        loading += 2 * 4 * D * max(config.intermediate_size, H * K)
    return {
        "cache": slots * L * 2 * G * K * cache.itemsize,
        "activations": max(computed, loading),
        "logits": 3 * batch * asked.answers * 8 * config.vocab_size * 4,  # up to eight draft positions an answer
        "program": PROGRAM[device] + PIECE * config.vocab_size * asked.grounded,
    }


def cache_slots(config: ModelConfig, asked: Requests, batch: int, chunk: int) -> tuple[int, int]:
    """(slots of the KV cache for `batch` requests, most keys that one token sees)."""
    L = config.num_hidden_layers
    growth = 64 * asked.answers + asked.new // 4  # leaves grow by a quarter, and growing copies them
    longest = whole = asked.tokens + asked.new
    slots = batch * (longest + growth)
    if config.window is not None:  # a node frees keys older than its window once it holds two windows
        longest = min(longest, 2 * config.window)
        slots = batch * (longest + growth) + min(chunk, whole - longest)
        whole = min(whole, config.window + chunk)
    if batch * asked.answers == 1:  # a single prompt is one leaf, which is copied layer by layer
        slots = (whole + max(32, whole // 4)) * (L + 1) // L
    return slots, longest


def trained_model(config: ModelConfig, step: Step) -> Transformer:
    """The model of a training step, with its adapters, as meta tensors."""
    model = on_meta(config).to(step.stored)
    if step.lora is None:
        return model.requires_grad_(True)
    add_lora(model, step.lora, seed=step.seed)
    return model


def training(config: ModelConfig, step: Step, ranks: int = 1) -> dict[str, float]:
    """Bytes on each of `ranks` processes at a step's peak.

    Returns {"weights", "adapters", "gradients", "optimizer", "activations", "logits", "gathered"}, with `step.heap`
    also "fragmentation".
    """
    model, e = trained_model(config, step), step.dtype.itemsize
    block, root, largest = frozen_bytes(model, step)
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    layers, active = config.num_hidden_layers, active_layers(config, step)
    saved, transient = block_bytes(config, step)
    saved = layers * config.hidden_size * e + saved if step.recomputed else active * saved
    logit = e if e >= 4 else 4 + e  # bf16 logits are also held in fp32
    made = {
        "weights": block + root,
        "adapters": 0.0 if step.lora is None else trained,
        "gradients": trained,
        "optimizer": optimizer_bytes(model, step.optimizer),
        "activations": step.tokens * (saved + transient),
        "logits": config.vocab_size * logit * (step.logits + (config.hidden_size if step.lora is None else 0)),
        "gathered": largest,
    }
    if step.heap:
        made["fragmentation"] = heap_fragmentation(config, step)
    if ranks > 1 or step.stored != step.dtype:  # FSDP gathers the root's parameters and two blocks at a time
        made |= {key: made[key] / ranks for key in ("adapters", "gradients", "optimizer")}
        made["weights"] = (block + root) / ranks
        gathered = (root + 2 * block / layers) / step.stored.itemsize  # parameters
        made["gathered"] += gathered * e * (1 + 1 / ranks)  # all of them, and this process's shard in compute dtype
        if step.lora is None:  # unsharded gradients, and their fp32 copies while they are reduced
            made["gathered"] += gathered * (e + 4)
    return made


def frozen_bytes(model: Transformer, step: Step) -> tuple[float, float, float]:
    """(bytes of all blocks' weights, bytes of the other weights, bytes of the largest weight once dequantized).

    Adapters are not counted; in full training these weights are the trained ones.
    """
    adapters = adapted(model)
    block = root = largest = 0.0
    for name, p in model.named_parameters():
        if "lora_" in name:
            continue
        layer = adapters.get(name.removesuffix(".weight"))
        size = bytes_of(step.base, *p.shape) if step.base and layer is not None else p.nbytes
        if step.base and layer is not None:
            largest = max(largest, p.numel() * step.dtype.itemsize)
        block, root = (block + size, root) if ".layers." in name else (block, root + size)
    return block, root, largest


def optimizer_bytes(model: Transformer, optimizer: str) -> float:
    """Bytes of the optimizer's state: two moments for AdamW, one for Muon's matrices."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    size, count = sum(p.nbytes for p in trained.values()), sum(p.numel() for p in trained.values())
    matrices = sum(p.nbytes for name, p in trained.items() if p.dim() == 2 and ".layers." in name)
    state = {"adamw": 2 * size, "sgd": 0.0, "adamw8bit": count * (2 + 2 * 4 / 256), "muon": 2 * size - matrices}
    return state[optimizer]


def heap_fragmentation(config: ModelConfig, step: Step) -> float:
    """Bytes of free chunks in glibc's heap that cannot be reused.

    torch allocates aligned blocks (posix_memalign), for which glibc needs a free chunk larger than the block, so the
    chunk of a freed tensor is never reused for a tensor of the same size. Each fast or recomputed block frees one
    tensor of the feed-forward width between tensors that stay allocated. MALLOC_MMAP_THRESHOLD_=1048576 in the
    environment avoids this, and a step takes a twelfth longer.
    """
    size = config.intermediate_size * step.tokens * step.dtype.itemsize
    if (step.plain and not step.recomputed) or size >= MMAP_THRESHOLD:
        return 0.0
    return active_layers(config, step) * size


def active_layers(config: ModelConfig, step: Step) -> int:
    """Number of layers that save activations: those from the first adapter on."""
    first = 0 if step.lora is None or step.lora.layers is None else min(step.lora.layers)
    return config.num_hidden_layers - first


def block_bytes(config: ModelConfig, step: Step) -> tuple[float, float]:
    """Bytes for each token of a block: (saved for the backward pass, transient at the peak)."""
    D, F = config.hidden_size, config.intermediate_size * max(1, config.num_experts_per_tok or 1)
    Q, G = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    e = step.dtype.itemsize
    wide = max(e, 4)
    low = 0 if step.lora is None else 7 * step.lora.r
    if not step.plain:
        # the two norms' inputs, rotated q and k, v, attention's output, gate, up, x Aᵀ products, logsumexp and 1/rms
        return e * (2 * D + 2 * Q + 2 * G + 2 * F + low) + wide * (config.num_attention_heads + 2), e * (4 * F + 2 * D)
    # the norms' inputs in fp32 and outputs, q, repeated k and v, attention's output, gate, silu, up and their product
    kept = 2 * wide * D + e * (2 * D + 4 * Q + 4 * F + low) + wide * config.num_attention_heads
    if step.lora is None:  # x / rms(x), for the gradient of RMSNorm's weight
        kept += 2 * e * D
    if step.dropout:  # each linear layer's mask and masked input
        kept += e * (2 * 5 * D + 2 * Q + 2 * F)
    return kept, e * (3 * F + 2 * D)
