"""Long prompts through a window: prefill time and memory against transformers' sdpa path on the same weights.

The plain path's attention costs O(T²) time and memory; the fast one's O(T·W) and O(T). In chunks through the cache, as
generation does a prefill, memory does not grow with T. The shape is the nano Mistral's: attention is most of its work.
"""

from __future__ import annotations

import tempfile
import time
from typing import Any

from eval.bench.process import in_own_process, resident
from eval.bench.row import Row
from model.support.init import init_weights

CONFIG = {
    "model_type": "mistral",
    "vocab_size": 2048,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e4,
    "max_position_embeddings": 65536,
}
CHUNK = 2048  # tokens of one pass through the cache, as infer/engine/tree.py reads prompts


def rows(tokens: int = 8192, window: int = 512, short: int = 256, repeats: int = 3) -> list[Row]:
    """Prefill of `tokens` and of twice as many, and of a short prompt; the best of `repeats` passes, one row each."""
    from model import ModelConfig, Transformer

    with tempfile.TemporaryDirectory() as folder:
        config = ModelConfig.from_dict({**CONFIG, "sliding_window": window})
        init_weights(Transformer(config), 0).save_pretrained(folder)

        def run(kind: str, T: int, times: int = repeats) -> tuple[float, float]:
            return in_own_process(measure, folder, kind, T, times)

        ours, twice, theirs = run("fast", tokens), run("fast", 2 * tokens), run("sdpa", tokens)
        chunks, chunks_twice = run("chunks", tokens), run("chunks", 2 * tokens)
        brief, their_brief = run("fast", short, 5 * repeats), run("sdpa", short, 5 * repeats)
    setting = f"window {window}, fp32, CPU, {config.num_hidden_layers} layers of {config.hidden_size}"
    in_chunks = f"{setting}, chunks of {CHUNK} through the cache"
    peer = "transformers sdpa"
    grown = f"time of {2 * tokens} over {tokens}"
    return [
        Row(f"prefill of {tokens}", ours[0], theirs[0], peer, "s", setting),
        Row(f"prefill of {tokens}", chunks[0], theirs[0], peer, "s", in_chunks),
        Row(f"peak memory of {tokens}", ours[1], theirs[1], peer, "MB", setting),
        Row(f"peak memory of {tokens}", chunks[1], theirs[1], peer, "MB", in_chunks),
        Row(f"prefill of {short}", brief[0], their_brief[0], peer, "s", setting),
        Row(grown, twice[0] / ours[0], 4.0, "quadratic", "×", setting, 2.0),
        Row(grown, chunks_twice[0] / chunks[0], 4.0, "quadratic", "×", in_chunks, 2.0),
    ]


def measure(folder: str, kind: str, T: int, repeats: int) -> tuple[float, float]:
    """(best seconds, megabytes that the peak rose above the loaded model) of prefilling T tokens in this process."""
    import torch

    tokens = torch.randint(0, CONFIG["vocab_size"], (1, T), generator=torch.Generator().manual_seed(0))  # type: ignore
    if kind == "sdpa":
        from transformers import AutoModelForCausalLM

        peer = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa", dtype=torch.float32).eval()

        def prefill(ids: torch.Tensor) -> Any:
            return peer(ids, logits_to_keep=1, use_cache=False)
    else:
        from model import KVCache, Transformer

        model = Transformer.from_pretrained(folder).use_attention("fast")

        def prefill(ids: torch.Tensor) -> Any:
            cache = KVCache(model.config, slack=CHUNK) if kind == "chunks" else None
            for part in ids.split(CHUNK if cache else ids.shape[1], dim=1):
                out = model(part, cache=cache, readout=lambda x_BTD, head: head(x_BTD[:, -1:]))
            return out

    best = float("inf")
    with torch.inference_mode():
        prefill(tokens[:, :64])
        before = resident(peak=True)
        for _ in range(repeats):
            start = time.perf_counter()
            prefill(tokens)
            best = min(best, time.perf_counter() - start)
    return best, resident(peak=True) - before
