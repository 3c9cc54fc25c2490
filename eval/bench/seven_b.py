"""Mistral-7B's exact shape on two cores within 5,000 MB: 1,500 tokens read, 50 decoded, memory counted.

Writes a checkpoint of random bf16 weights (14.5 GB, eval/bench/load_7b.py) and an adapter of rank 8 on every linear
layer, and runs them in a process of its own as `infer.extract --memory` does: the plan, weights streamed into 4 bits,
the prompt in chunks, keys and values in fp16, a 4-bit head. The paper's phenotype run took 5,550 MB of a GPU.
"""

from __future__ import annotations

import resource
import shutil
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from eval.bench.load_7b import alone, drop_cache, write

PAPER = 5550.0  # MB
A100 = {"read": 2.0e12, "products": 312e12}  # bytes and bf16 operations a second


def rows(
    layers: int = 32, width: int = 4096, tokens: int = 1500, new: int = 50, memory: str = "5000MB", form: str = "auto",
    folder: str | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Peak memory, time to the first token, and decoding, each with its limit.

    Fewer `layers` or a smaller `width` try it out; `folder` is where there is room (default: the system's temporary).
    """
    with tempfile.TemporaryDirectory(dir=folder, prefix="seven-b-") as scratch:
        path = Path(scratch) / "model"
        size = write(path, layers, width)
        write_tokenizer(path)
        write_adapter(path, Path(scratch) / "adapter")
        drop_cache(path)
        (Path(scratch) / "asked").write_text(f"{tokens} {new} {memory} {form}")
        found = alone(measure, Path(scratch))
    print(found["a100"], file=sys.stderr)
    setting = (
        f"{layers} layers of {width}, {size / 1e9:.1f} GB in bf16 streamed into {found['form']} in "
        f"{found['load']:.0f} s, LoRA r 8 on all linear layers, {tokens} tokens in, {new} out, {found['cache']} cache, "
        f"chunks of {found['chunk']}, {found['threads']} threads"
    )
    common = {"setting": setting}
    return [
        {"name": "peak resident memory", "ours": found["peak"], "peer": PAPER, "peer_name": "the paper's GPU memory",
         "ratio": PAPER / found["peak"], "limit": found["kept"], "share_of_limit": found["kept"] / found["peak"],
         "unit": "MB (limit: weights)", **common},
        {"name": "decode", "ours": found["decode"], "peer": None, "peer_name": None, "ratio": None,
         "limit": found["decode_limit"], "share_of_limit": found["decode"] / found["decode_limit"],
         "unit": "tokens/s", **common},
        {"name": "prefill", "ours": found["prefill"], "peer": None, "peer_name": None, "ratio": None,
         "limit": found["prefill_limit"], "share_of_limit": found["prefill_limit"] / found["prefill"],
         "unit": "s to the first token", **common},
    ]  # fmt: skip


def write_tokenizer(path: Path) -> None:
    """Mistral's own tokenizer of 32,000 pieces, out of the public package."""
    import mistral_common

    (source,) = Path(mistral_common.__file__).parent.rglob("tokenizer.model.v1")
    shutil.copy(source, path / "tokenizer.model")


def write_adapter(path: Path, out: Path, r: int = 8) -> None:
    """A random adapter of rank `r` on every linear layer of the model at `path`."""
    import torch

    from lora.adapter import PREFIX, LoRAConfig
    from lora.adapter import write_adapter as write_files
    from model import ModelConfig, Transformer

    config, generator, state = LoRAConfig(r=r, alpha=2.0 * r), torch.Generator().manual_seed(0), {}
    with torch.device("meta"):
        model = Transformer(ModelConfig.from_pretrained(path))
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and config.wants(name):
            for kind, shape in (("A", (r, module.in_features)), ("B", (module.out_features, r))):
                state[f"{PREFIX}{name}.lora_{kind}.weight"] = torch.randn(shape, generator=generator) * 0.01
    out.mkdir()
    write_files(out, config, state)


def measure(scratch: Path) -> dict[str, Any]:
    """In a process of its own: plan, load, read, decode; what it took."""
    import torch

    from infer.engine.generate import Generator
    from infer.engine.load import DTYPES, load, plan_for
    from infer.engine.memory import Load, fit, rooflines
    from model.support.hardware import product_rate, read_rate

    tokens, new, memory, form = (scratch / "asked").read_text().split()
    path, adapter, asked = str(scratch / "model"), (str(scratch / "adapter"),), Load(int(tokens), int(new))
    options = SimpleNamespace(weights=path, adapter=adapter, dtype="float32", format=form, memory=memory, fuse=False)
    plan = plan_for(options, asked)
    began = time.perf_counter()
    model, tokenizer = load(path, adapter, "float32", "cpu", plan.form)
    loaded = time.perf_counter() - began
    generator = Generator(model, tokenizer, lookup=False, cache_dtype=plan.cache, chunk=plan.chunk)
    generator.stop_ids = frozenset()
    prompt = [1 + (7919 * n) % 30000 for n in range(asked.tokens)]
    steps = generator.run(generator.states([prompt], None, {"max_new_tokens": asked.new}))
    began = time.perf_counter()
    next(steps)
    first = time.perf_counter()
    count = sum(1 for _ in steps)
    decoded = time.perf_counter() - first
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    rates = {"read": read_rate() * 1e9, "products": product_rate(torch.bfloat16) * 1e9}
    on_gpu = fit(path, adapter, PAPER * 1e6, asked, "auto", DTYPES["bfloat16"], "cuda")
    here, there = (rooflines(model.config, form, asked.tokens, **rate)
                   for form, rate in ((plan.form, rates), (on_gpu.form, A100)))  # fmt: skip
    held = {t.data_ptr(): t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers())}
    return {
        "cache": str(plan.cache).removeprefix("torch."), "form": plan.form, "chunk": plan.chunk, "load": loaded,
        "peak": peak,
        "prefill": first - began, "prefill_limit": here[1], "threads": torch.get_num_threads(),
        "decode": count / decoded, "decode_limit": here[0], "kept": sum(held.values()) / 1e6,
        "a100": f"on an A100 (not run): {on_gpu.describe(PAPER * 1e6)}; limits {there[0]:.0f} tokens/s, "
        f"{there[1] * 1e3:.0f} ms to the first token",
    }  # fmt: skip
