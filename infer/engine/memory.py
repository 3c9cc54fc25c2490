"""What a job takes in memory, and the best way to run it in less: format, batch, cache and chunk, before loading.

    --memory 6GB      →  plan for 6.0 GB: int4-64, batch 8, cache float16, chunks of 512: weights 4.36 + cache 0.39 + …

The sum is of what is held at once: weights, adapters, keys and values, the activations of one chunk of a prompt,
logits, and the program itself. Ways are tried from the best answers to the least memory: wide weights before quantized
ones, and with each, a full batch before a smaller one. A plan is a function of its arguments alone, so that a job that
goes on after a kill goes on with the same one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

from lora.peft import read_config
from model import ModelConfig, Transformer
from model.quantize.linear import bytes_of, is_quantizable
from model.support.cli import UserError

UNITS = {"": 1, "B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
FORMATS = ("wide", "int8", "int4-32", "int4-64", "int4-128")  # from the best answers to the least memory
PROGRAM = {"cpu": 350_000_000, "cuda": 600_000_000}  # torch and tokenizer resident; a CUDA context on the device
PIECE = 1200  # bytes of a vocabulary's piece in the tree that grammars walk
LOADING = 100_000_000  # what a loader holds beside the model: a tensor's pieces in flight


@dataclass(frozen=True)
class Load:
    """What is asked of the model: it decides the cache and what is computed at once."""

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
class Plan:
    """How to run, and the bytes that it takes."""

    form: str
    batch: int
    cache: torch.dtype
    chunk: int
    parts: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    def describe(self, budget: float) -> str:
        parts = " + ".join(f"{name} {size / 1e9:.2f}" for name, size in self.parts.items())
        kind = str(self.cache).removeprefix("torch.")
        return (
            f"plan for {budget / 1e9:.1f} GB: {self.form}, batch {self.batch}, cache {kind}, chunks of {self.chunk}: "
            f"{parts} = {self.total / 1e9:.2f} GB"
        )


def read_size(text: str) -> float:
    """Bytes of "6GB", "5000 MB" or "4.5GiB". Raises UserError for anything else."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    unit = found and UNITS.get(found.group(2).upper())
    if not found or not unit or float(found.group(1)) <= 0:
        raise UserError(f"--memory {text!r} is not a size; write a number and MB or GB, for example 6GB")
    return float(found.group(1)) * unit


def fit(
    weights: str | Path,
    adapters: Sequence[str | Path],
    budget: float,
    job: Load,
    form: str,
    dtype: torch.dtype,
    device: str = "cpu",
) -> Plan:
    """The best plan within `budget` bytes; `form` "auto" tries every format. Raises UserError where none fits."""
    config = ModelConfig.from_pretrained(weights)
    least = None
    for chosen in FORMATS if form == "auto" else (form,):
        fixed = {"weights": weight_bytes(config, chosen, dtype), "adapter": adapter_bytes(config, adapters, chosen)}
        for cache in dict.fromkeys((dtype, torch.float16 if dtype.itemsize > 2 else dtype)):
            batch = job.batch
            while batch:
                for chunk in (2048, 512, 256):
                    parts = fixed | work(config, job, batch, cache, chunk, dtype, device, chosen)
                    plan = Plan(chosen, batch, cache, chunk, parts)
                    if plan.total <= budget:
                        return plan
                    least = plan if least is None or plan.total < least.total else least
                batch //= 2
    assert least is not None
    raise UserError(
        f"{weights}: --memory {budget / 1e9:.2f} GB is not enough: the least is {least.total / 1e9:.2f} GB "
        f"({least.form}, batch {least.batch}, {job.tokens} tokens a prompt); give more memory, a smaller model"
        f"{' or --format auto' if form != 'auto' else ''}"
    )


def notes_at_once(
    weights: str | Path,
    adapters: Sequence[str | Path],
    free: float,
    job: Load,
    form: str,
    dtype: torch.dtype,
    device: str = "cpu",
    ranks: int = 1,
) -> int:
    """The most requests at once, of `job.batch` or half as many, and so on, for which `free` bytes are enough, beside a
    model of which each of `ranks` processes holds a part. Raises UserError where a GPU has no room for one."""
    config = ModelConfig.from_pretrained(weights)
    fixed = weight_bytes(config, form, dtype) + adapter_bytes(config, adapters, form)
    batch = job.batch
    while True:
        need = (fixed + sum(work(config, job, batch, dtype, 2048, dtype, device, form).values())) / ranks
        if need <= free or (batch == 1 and device == "cpu"):  # a CPU's memory can be given back by others
            return batch
        if batch == 1:
            raise UserError(
                f"{weights}: {need / 1e9:.1f} GB are needed for one note, {free / 1e9:.1f} GB of the GPU are free; "
                "give --format int8 or int4, or --memory"
            )
        batch //= 2


def weight_bytes(config: ModelConfig, form: str, dtype: torch.dtype) -> int:
    """Bytes of a model's parameters with its linear layers in a format, embedding and norms in `dtype`."""
    with torch.device("meta"):
        model = Transformer(config)
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
    with torch.device("meta"):
        model = Transformer(config)
    wanted = [(p, m) for p, m in model.named_modules() if isinstance(m, torch.nn.Linear) and own.wants(p)]
    return sum(4 * own.rank(path) * (m.in_features + 2 * m.out_features) for path, m in wanted)


def work(
    config: ModelConfig,
    job: Load,
    batch: int,
    cache: torch.dtype,
    chunk: int,
    dtype: torch.dtype,
    device: str,
    form: str = "wide",
) -> dict[str, int]:
    """Bytes of the cache, of what is computed at once, and of the program."""
    L, D, H, G, K = (
        config.num_hidden_layers,
        config.hidden_size,
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
    )
    growth = 64 * job.answers + job.new // 4  # leaves grow by a quarter, and are copied while they do
    longest = whole = job.tokens + job.new
    slots = batch * (longest + growth)
    if config.window is not None:  # a node lets go of what is older than its window when a chunk has made it two
        longest = min(longest, 2 * config.window)
        slots = batch * (longest + growth) + min(chunk, whole - longest)
        whole = min(whole, config.window + chunk)
    if batch * job.answers == 1:  # a prompt by itself is one leaf, of which a layer at a time is copied
        slots = (whole + max(32, whole // 4)) * (L + 1) // L
    kept = slots * L * 2 * G * K * cache.itemsize
    rows = min(chunk, job.tokens) if batch == 1 else chunk
    width = (5 if form == "w8a8" else 4) * config.intermediate_size + 6 * D + 3 * (H + 2 * G) * K
    loading = LOADING
    if form == "w8a8":  # the largest matrix whose rows are mixed, before and after
        loading += 2 * 4 * D * max(config.intermediate_size, H * K)
    attended = 3 * longest * H * K * 4 + rows * longest * 5  # keys and values for every head in fp32; mask, scores
    computed = rows * width * max(4, dtype.itemsize) + attended
    logits = 3 * batch * job.answers * 8 * config.vocab_size * 4  # up to eight guessed positions an answer
    program = PROGRAM[device] + PIECE * config.vocab_size * job.grounded
    return {"cache": kept, "activations": max(computed, loading), "logits": logits, "program": program}


def rooflines(config: ModelConfig, form: str, tokens: int, read: float, products: float) -> tuple[float, float]:
    """(tokens a second that reading allows at batch 1 after `tokens`, seconds that their prefill's products take), at
    `read` bytes and `products` operations a second, with an fp16 cache and, where weights are wide, bf16."""
    with torch.device("meta"):
        model = Transformer(config)
    blocks = [tuple(p.shape) for name, p in model.named_parameters() if p.dim() == 2 and ".layers." in name]
    matrices = [*blocks, (config.vocab_size, config.hidden_size)]
    size = sum(2 * prod(shape) if form == "wide" else bytes_of(form, *shape) for shape in matrices)
    size += tokens * config.num_hidden_layers * 2 * config.num_key_value_heads * config.head_dim * 2
    return read / size, 2 * tokens * sum(map(prod, blocks)) / products
