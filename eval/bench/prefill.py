"""Prefill in tokens per second: against transformers, llama.cpp and the limit set by the measured GEMM rate."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from eval.bench import llama
from eval.bench.models import transformers_of
from eval.bench.row import Row
from infer.engine.forward import Layer
from infer.engine.generate import Generator
from infer.engine.load import load
from model.support.hardware import compute_dtype, int8_products, product, timed


def rows(weights: str, prompt_tokens: int = 1500, repeats: int = 3) -> list[Row]:
    """Prefill of one prompt in fp32 and, if it is the machine's compute dtype, in bf16."""
    found = [compare(weights, torch.float32, prompt_tokens, repeats)]
    if compute_dtype() == torch.bfloat16:
        found.append(compare(weights, torch.bfloat16, prompt_tokens, repeats))
        found.append(
            replace(
                found[1],
                name="prefill: as the probe chooses, bf16",
                peer=found[0].peer,
                peer_name="transformers forward, fp32",
            )
        )
    if Path(weights).suffix == ".gguf":
        found.append(against_llama_cpp(weights, found[-1], prompt_tokens, repeats))
    if int8_products():
        found.append(quantized(weights, "w8a8", found[0], prompt_tokens, repeats))
    return found


def quantized(weights: str, form: str, wide: Row, prompt_tokens: int, repeats: int) -> Row:
    """A quantized format in the machine's compute dtype, against transformers in fp32 (the peer of row `wide`)."""
    dtype = str(compute_dtype()).removeprefix("torch.")
    generator = Generator(*load(weights, dtype=dtype, form=form))
    best = max(ours_once(generator, prompt_tokens) for _ in range(repeats + 1))
    return replace(
        wide, name=f"prefill: {form} with {dtype}", ours=best, peer_name="transformers forward, fp32", limit=None
    )


def prompt_of(tokens: int) -> list[int]:
    return [100 + n % 150 for n in range(tokens)]


def ours_once(generator: Generator, prompt_tokens: int) -> float:
    """Prompt tokens per second, up to the first new token."""
    began = time.perf_counter()
    generator.generate([prompt_of(prompt_tokens)], max_new_tokens=1)
    return prompt_tokens / (time.perf_counter() - began)


def against_llama_cpp(weights: str, ours: Row, prompt_tokens: int, repeats: int) -> Row:
    """Row `ours` with llama.cpp's fastest prefill as its peer, over the formats that llama.cpp can write."""

    def measure(peer: Any, file: str, flash: bool) -> float:
        model = llama.opened(peer, file, flash)
        return max(llama.reading(model, prompt_of(prompt_tokens)) for _ in range(repeats + 1))

    name, rate = llama.fastest(weights, measure)
    dtype = ours.name.rsplit(" ", 1)[-1]
    return replace(ours, name=f"prefill: {dtype} against llama.cpp", peer=rate, peer_name=name)


def compare(weights: str, dtype: torch.dtype, prompt_tokens: int, repeats: int) -> Row:
    name = str(dtype).removeprefix("torch.")
    model, tokenizer = load(weights, dtype=name)
    peer = transformers_of(model, dtype)
    generator, ids = Generator(model, tokenizer), torch.tensor([prompt_of(prompt_tokens)])
    ours, theirs = [], []
    for _ in range(repeats + 1):  # in turns, so that other load affects both alike; the first turn is a warm-up
        ours.append(ours_once(generator, prompt_tokens))
        began = time.perf_counter()
        with torch.inference_mode():
            peer(ids, use_cache=True, logits_to_keep=1)
        theirs.append(prompt_tokens / (time.perf_counter() - began))
    limit = prompt_tokens / products(generator, prompt_tokens)
    best, peer_best = max(ours[1:]), max(theirs[1:])
    setting = (
        f"{prompt_tokens} tokens, last position's logits, best of {repeats}, {torch.get_num_threads()} threads; the "
        "limit is the blocks' products alone, without attention"
    )
    return Row(f"prefill: {name}", best, peer_best, "transformers forward", "tokens/s", setting, limit)


@torch.inference_mode()
def products(generator: Generator, tokens: int) -> float:
    """Seconds of the blocks' GEMMs alone, with the model's weights."""
    total = 0.0
    for layer in generator.engine.layers:
        assert isinstance(layer, Layer)
        for part in (layer.qkv, layer.out, layer.gate_up, layer.down):
            assert part.weight is not None
            x_ND = torch.ones(tokens, part.weight.shape[1], dtype=part.weight.dtype)
            total += min(timed(lambda x=x_ND, w=part.weight: product(x, w), "cpu", 0.0))
    return total
