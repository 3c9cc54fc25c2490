"""Mistral-7B's exact shape within 5,000 MB: prefill of 1,500 tokens, 50 decoded, peak memory.

Writes a checkpoint of random bf16 weights (14.5 GB in shards of 5 GB) and an adapter of rank 8 on every linear layer,
and runs them like `infer.extract --memory`: weights quantized to 4 bits while they are read, chunked prefill, an fp16
KV cache, a 4-bit head. The paper's phenotype run took 5,550 MB of a GPU. The page cache is dropped first, so that the
weights are read from disk.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from eval.bench.models import block_matrices, generator_of, read_bytes
from eval.bench.process import in_own_process, resident
from eval.bench.row import Row
from infer.engine.load import check_format, load, plan_for
from lora import peft
from lora.adapter import LoRAConfig
from lora.memory import Requests
from model import ModelConfig, Transformer
from model.checkpoints.safetensors import Stored
from model.checkpoints.weights import Checkpoint, new_checkpoint, write_checkpoint
from model.support.cli import UserError
from model.support.files import read_json
from model.support.hardware import product_rate, read_rate

SHAPE = Path("train/recipes/mistral-7b.json")
PAPER = 5550.0  # MB
FIGURES = (
    ("peak", "peak resident memory", "MB (limit: weights)"),
    ("decode", "decode", "tokens/s"),
    ("prefill", "prefill", "s to the first token"),
)


def rows(
    layers: int = 32,
    tokens: int = 1500,
    new: int = 50,
    memory: str = "5000MB",
    w8a8: str = "",
    config: Path = SHAPE,
) -> list[Row]:
    """Peak memory, time to the first token, and decoding speed, each with its limit. `w8a8`: a memory such as 9GB, to
    measure w8a8 within it too, against the first run. Use fewer `layers`, or another model's `config`, for a trial."""
    if w8a8:
        check_format("w8a8", "cpu")
    runs = {"auto": memory} | ({"w8a8": w8a8} if w8a8 else {})
    with tempfile.TemporaryDirectory(prefix="seven-b-") as scratch:
        path, found = Path(scratch) / "model", []
        size = write(path, layers, config)
        write_tokenizer(path)
        write_adapter(path, Path(scratch) / "adapter")
        for form, budget in runs.items():
            drop_cache(path)
            found.append(in_own_process(measure, Path(scratch), tokens, new, budget, form))
    table, peers, peer = [], {"peak": PAPER}, "the paper's GPU memory"
    for run in found:
        setting = (
            f"{layers} layers, {size / 1e9:.1f} GB in bf16 streamed into {run['form']} in {run['load']:.0f} s, LoRA r "
            f"8 on all linear layers, {tokens} tokens in, {new} out, {run['cache']} cache, chunks of {run['chunk']}, "
            f"{run['threads']} threads"
        )
        for key, name, unit in FIGURES:
            known = peers.get(key)
            limit = run[f"{key}_limit"]
            table.append(Row(f"{name}, {run['form']}", run[key], known, peer if known else None, unit, setting, limit))
        peers, peer = run, f"ours, {run['form']}"
    return table


def write(path: Path, layers: int, shape: Path) -> int:
    """Write the checkpoint with one tensor in memory at a time; returns its size in bytes."""
    config = ModelConfig.from_dict({**read_json(shape), "num_hidden_layers": layers})
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in Transformer(config).named_parameters()}
    size = sum(2 * torch.Size(shape).numel() for shape in shapes.values())
    free = shutil.disk_usage(path.parent).free
    if free < size * 1.05:
        raise UserError(
            f"{path.parent}: {free / 1e9:.1f} GB free, {size / 1e9:.1f} GB needed; set TMPDIR to another folder"
        )
    noise = torch.randn(2**22, generator=torch.Generator().manual_seed(0)).mul_(0.02).to(torch.bfloat16)

    def stored(shape: tuple[int, ...]) -> Stored:
        def read(rows: slice | None) -> torch.Tensor:
            wanted = shape if rows is None else (rows.stop - rows.start, *shape[1:])
            count = torch.Size(wanted).numel()
            return noise.repeat(-(-count // noise.numel()))[:count].view(wanted)

        return Stored(shape, "BF16", "memory", read)

    checkpoint = Checkpoint(path, "memory", {name: stored(shape) for name, shape in shapes.items()})
    with new_checkpoint(path) as folder:
        write_checkpoint(checkpoint, config.to_dict(), folder, 5 * 10**9, None)
    return size


def drop_cache(path: Path) -> None:
    """Ask the system to drop the files from its page cache, if it can."""
    for file in path.glob("*.safetensors") if hasattr(os, "posix_fadvise") else ():
        with open(file, "rb") as data:
            os.fsync(data.fileno())
            os.posix_fadvise(data.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def write_tokenizer(path: Path) -> None:
    """Copy Mistral's tokenizer of 32,000 pieces from the package mistral_common."""
    import mistral_common

    (source,) = Path(mistral_common.__file__).parent.rglob("tokenizer.model.v1")
    shutil.copy(source, path / "tokenizer.model")


def write_adapter(path: Path, out: Path, r: int = 8) -> None:
    """A random adapter of rank `r` on every linear layer of the model at `path`."""
    config, generator = LoRAConfig(r=r, alpha=2.0 * r), torch.Generator().manual_seed(0)
    with torch.device("meta"):
        model = Transformer(ModelConfig.from_pretrained(path))
    shapes = peft.expected_shapes(model, config)
    state = {name: torch.randn(shape, generator=generator) * 0.01 for name, shape in shapes.items()}
    out.mkdir()
    peft.write_adapter(out, config, state)


def measure(scratch: Path, tokens: int, new: int, memory: str, form: str) -> dict[str, Any]:
    """Plan, load, prefill and decode; call it in a fresh process."""
    path, adapter, asked = str(scratch / "model"), (str(scratch / "adapter"),), Requests(tokens, new)
    options = SimpleNamespace(weights=path, adapter=adapter, dtype="float32", format=form, memory=memory, fuse=False)
    plan = plan_for(options, asked)
    began = time.perf_counter()
    model, tokenizer = load(path, adapter, "float32", "cpu", plan.form)
    loaded = time.perf_counter() - began
    generator = generator_of(model, tokenizer, lookup=False, cache_dtype=plan.cache, chunk=plan.chunk)
    prompt = [1 + (7919 * n) % 30000 for n in range(asked.tokens)]
    steps = generator.run(generator.states([prompt], None, {"max_new_tokens": asked.new}))
    began = time.perf_counter()
    next(steps)
    first = time.perf_counter()
    count = sum(1 for _ in steps)
    decoded = time.perf_counter() - first
    peak = resident(peak=True)
    config = model.config
    cached = asked.tokens * config.num_hidden_layers * 2 * config.num_key_value_heads * config.head_dim
    read = read_bytes(config, "fp32" if plan.form == "wide" else plan.form)
    operations = 2 * asked.tokens * sum(map(prod, block_matrices(config)))
    kept = {t.data_ptr(): t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers())}
    return {
        "cache": str(plan.cache).removeprefix("torch."),
        "form": plan.form,
        "chunk": plan.chunk,
        "load": loaded,
        "peak": peak,
        "prefill": first - began,
        "prefill_limit": None if form == "w8a8" else operations / (product_rate(torch.bfloat16) * 1e9),
        "threads": torch.get_num_threads(),
        "decode": count / decoded,
        "decode_limit": read_rate() * 1e9 / (read + cached * plan.cache.itemsize),
        "peak_limit": sum(kept.values()) / 1e6,
    }
