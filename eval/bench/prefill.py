"""Reading a prompt, tokens per second: against transformers, llama.cpp and the measured rate of matrix products."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from eval.bench.decode import open_llama_cpp
from infer.engine.generate import Generator
from infer.engine.load import load
from model.support.hardware import compute_dtype, product, timed


def rows(weights: str, prompt_tokens: int = 1500, repeats: int = 3) -> list[dict[str, Any]]:
    """Time to the first token of a prompt, in fp32 and, where the machine's probe chooses it, in bf16."""
    found = compare(weights, torch.float32, prompt_tokens, repeats)
    if compute_dtype() == torch.bfloat16:
        found += compare(weights, torch.bfloat16, prompt_tokens, repeats)
        fp32, bf16 = found[0], found[1]
        found.append({**bf16, "name": "prefill: as the probe chooses, bf16", "peer": fp32["peer"],
                      "peer_name": "transformers forward, fp32", "ratio": bf16["ours"] / fp32["peer"]})  # fmt: skip
    if Path(weights).suffix == ".gguf":
        found.append(beside_llama_cpp(weights, found[-1], prompt_tokens, repeats))
    return found


def beside_llama_cpp(weights: str, ours: dict[str, Any], prompt_tokens: int, repeats: int) -> dict[str, Any]:
    """Our last row beside llama.cpp's reading of the same prompt from the same file."""
    opened, best = open_llama_cpp(weights), None
    name = "llama.cpp: not installed (pip install -c constraints.txt -e .[bench])"
    if opened is not None:
        name, model = opened
        best = 0.0
        for _ in range(repeats + 1):
            model.reset()
            began = time.perf_counter()
            model.eval([100 + n % 150 for n in range(prompt_tokens)])
            best = max(best, prompt_tokens / (time.perf_counter() - began))
    dtype = ours["name"].rsplit(" ", 1)[-1]
    return {**ours, "name": f"prefill: {dtype} beside llama.cpp", "peer": best, "peer_name": name,
            "ratio": ours["ours"] / best if best else None}  # fmt: skip


def compare(weights: str, dtype: torch.dtype, prompt_tokens: int, repeats: int) -> list[dict[str, Any]]:
    from transformers import AutoModelForCausalLM

    name = str(dtype).removeprefix("torch.")
    model, tokenizer = load(weights, dtype=name)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(Path(folder) / "peer")
        peer = AutoModelForCausalLM.from_pretrained(Path(folder) / "peer", dtype=dtype).eval()
    prompt = [100 + n % 150 for n in range(prompt_tokens)]
    generator, ids = Generator(model, tokenizer), torch.tensor([prompt])
    ours, theirs = [], []
    for _ in range(repeats + 1):  # in turns, so that both meet the same machine; the first turn warms up
        began = time.perf_counter()
        generator.generate([prompt], max_new_tokens=1)
        ours.append(prompt_tokens / (time.perf_counter() - began))
        began = time.perf_counter()
        with torch.inference_mode():
            peer(ids, use_cache=True, logits_to_keep=1)
        theirs.append(prompt_tokens / (time.perf_counter() - began))
    limit = prompt_tokens / products(generator, prompt_tokens)
    best, peer_best = max(ours[1:]), max(theirs[1:])
    return [
        {
            "name": f"prefill: {name}", "ours": best, "peer": peer_best, "peer_name": "transformers forward",
            "ratio": best / peer_best, "limit": limit, "share_of_limit": best / limit, "unit": "tokens/s",
            "setting": f"{prompt_tokens} tokens, last position's logits, best of {repeats}, "
            f"{torch.get_num_threads()} threads; the limit is the blocks' products by themselves, without attention",
        }
    ]  # fmt: skip


@torch.inference_mode()
def products(generator: Generator, tokens: int) -> float:
    """Seconds that the blocks' matrix products take by themselves, on the model's own weights."""
    total = 0.0
    for layer in generator.engine.layers:
        for part in (layer.qkv, layer.out, layer.gate_up, layer.down):
            x_ND = torch.ones(tokens, part.weight.shape[1], dtype=part.weight.dtype)
            total += min(timed(lambda x=x_ND, w=part.weight: product(x, w), "cpu", 0.0))
    return total
