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
from infer.engine.load import load, plan_for
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


def rows(layers: int = 32, tokens: int = 1500, new: int = 50, memory: str = "5000MB") -> list[Row]:
    """Peak memory, time to the first token, and decoding speed, each with its limit. Use fewer `layers` for a trial."""
    with tempfile.TemporaryDirectory(prefix="seven-b-") as scratch:
        path = Path(scratch) / "model"
        size = write(path, layers)
        write_tokenizer(path)
        write_adapter(path, Path(scratch) / "adapter")
        drop_cache(path)
        found = in_own_process(measure, Path(scratch), tokens, new, memory)
    setting = (
        f"{layers} layers, {size / 1e9:.1f} GB in bf16 streamed into {found['form']} in "
        f"{found['load']:.0f} s, LoRA r 8 on all linear layers, {tokens} tokens in, {new} out, {found['cache']} cache, "
        f"chunks of {found['chunk']}, {found['threads']} threads"
    )
    return [
        Row(
            "peak resident memory",
            found["peak"],
            PAPER,
            "the paper's GPU memory",
            "MB (limit: weights)",
            setting,
            found["kept"],
        ),
        Row("decode", found["decode"], None, None, "tokens/s", setting, found["decode_limit"]),
        Row("prefill", found["prefill"], None, None, "s to the first token", setting, found["prefill_limit"]),
    ]


def write(path: Path, layers: int) -> int:
    """Write the checkpoint with one tensor in memory at a time; returns its size in bytes."""
    config = ModelConfig.from_dict({**read_json(SHAPE), "num_hidden_layers": layers})
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
    config, generator, state = LoRAConfig(r=r, alpha=2.0 * r), torch.Generator().manual_seed(0), {}
    with torch.device("meta"):
        model = Transformer(ModelConfig.from_pretrained(path))
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and config.wants(name):
            for kind, shape in (("A", (r, module.in_features)), ("B", (module.out_features, r))):
                state[f"{peft.PREFIX}{name}.lora_{kind}.weight"] = torch.randn(shape, generator=generator) * 0.01
    out.mkdir()
    peft.write_adapter(out, config, state)


def measure(scratch: Path, tokens: int, new: int, memory: str) -> dict[str, Any]:
    """Plan, load, prefill and decode; call it in a fresh process."""
    path, adapter, asked = str(scratch / "model"), (str(scratch / "adapter"),), Requests(tokens, new)
    options = SimpleNamespace(weights=path, adapter=adapter, dtype="float32", format="auto", memory=memory, fuse=False)
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
    cached = asked.tokens * config.num_hidden_layers * 2 * config.num_key_value_heads * config.head_dim * 2  # in fp16
    operations = 2 * asked.tokens * sum(map(prod, block_matrices(config)))
    kept = {t.data_ptr(): t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers())}
    return {
        "cache": str(plan.cache).removeprefix("torch."),
        "form": plan.form,
        "chunk": plan.chunk,
        "load": loaded,
        "peak": peak,
        "prefill": first - began,
        "prefill_limit": operations / (product_rate(torch.bfloat16) * 1e9),
        "threads": torch.get_num_threads(),
        "decode": count / decoded,
        "decode_limit": read_rate() * 1e9 / (read_bytes(config, "fp32" if plan.form == "wide" else plan.form) + cached),
        "kept": sum(kept.values()) / 1e6,
    }
