"""Reading a prompt, tokens per second: against transformers and against the measured rate of matrix products."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from infer.generate import Generator
from infer.load import load
from model.machine import product_rate


def rows(weights: str, prompt_tokens: int = 1500, repeats: int = 3) -> list[dict[str, Any]]:
    """Measure the time to the first token of a prompt in fp32."""
    from transformers import AutoModelForCausalLM

    model, tokenizer = load(weights)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(Path(folder) / "peer")
        peer = AutoModelForCausalLM.from_pretrained(Path(folder) / "peer", dtype=torch.float32).eval()
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
    blocks = sum(p.numel() for name, p in model.named_parameters() if ".layers." in name and p.dim() == 2)
    limit = product_rate(torch.float32) * 1e9 / (2 * blocks)
    best, peer_best = max(ours[1:]), max(theirs[1:])
    return [
        {
            "name": "prefill: fp32", "ours": best, "peer": peer_best, "peer_name": "transformers forward",
            "ratio": best / peer_best, "limit": limit, "share_of_limit": best / limit, "unit": "tokens/s",
            "setting": f"{prompt_tokens} tokens, last position's logits, best of {repeats}, "
            f"{torch.get_num_threads()} threads; the limit counts the blocks' products only",
        }
    ]  # fmt: skip
