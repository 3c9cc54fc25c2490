"""Decoding one request, tokens per second: against transformers' generate and against the rate of reading memory."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from infer.generate import Generator
from infer.load import load
from model.machine import read_rate


def rows(weights: str, prompt_tokens: int = 64, new_tokens: int = 64, repeats: int = 3) -> list[dict[str, Any]]:
    """Measure greedy decoding in fp32; the limit is the measured read rate over the bytes of all weights."""
    from transformers import AutoModelForCausalLM

    model, tokenizer = load(weights)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(Path(folder) / "peer")
        peer = AutoModelForCausalLM.from_pretrained(Path(folder) / "peer", dtype=torch.float32).eval()
    prompt = [100 + n % 150 for n in range(prompt_tokens)]
    generator = Generator(model, tokenizer, lookup=False)
    generator.stop_ids = frozenset()
    ids = torch.tensor([prompt])
    ours, theirs = [], []
    for _ in range(repeats):  # in turns, so that both meet the same machine
        ours.append(ours_once(generator, prompt, new_tokens))
        long, short = (theirs_once(peer, ids, n) for n in (new_tokens + 1, 1))
        theirs.append(new_tokens / (long - short))
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    if not model.config.tie_word_embeddings:  # one row of the embedding is read
        size -= model.model.embed_tokens.weight.numel() * model.dtype.itemsize
    limit = read_rate() * 1e9 / size
    best, peer_best = max(ours), max(theirs)
    return [
        {
            "name": "decode: batch 1, fp32", "ours": best, "peer": peer_best, "peer_name": "transformers generate",
            "ratio": best / peer_best, "limit": limit, "share_of_limit": best / limit, "unit": "tokens/s",
            "setting": f"{size / 1e6:.0f} MB of weights, prompt {prompt_tokens}, {new_tokens} new, best of {repeats}, "
            f"{torch.get_num_threads()} threads",
        }
    ]  # fmt: skip


def ours_once(generator: Generator, prompt: list[int], new: int) -> float:
    """Tokens per second after the first."""
    steps = generator.run(generator.states([prompt], None, {"max_new_tokens": new + 1}))
    next(steps)
    began = time.perf_counter()
    count = sum(1 for _ in steps)
    return count / (time.perf_counter() - began)


@torch.inference_mode()
def theirs_once(peer: Any, ids: torch.Tensor, new: int) -> float:
    """Seconds of reading the prompt and `new` tokens."""
    began = time.perf_counter()
    peer.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new, do_sample=False,
        pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    return time.perf_counter() - began
