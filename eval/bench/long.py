"""Long prompts through a window: prefill time and memory against transformers' sdpa path on the same weights.

The plain path's attention costs O(T²) time and memory; the fast one's O(T·W) and O(T), and read in chunks through the
cache, as generation reads a prompt, memory does not grow with T at all. Each measurement runs in a process of its own,
so that peak memory is its own. The shape is the nano Mistral's: attention is most of its work.
"""

from __future__ import annotations

import multiprocessing
import resource
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from model.support.init import init_weights

CONFIG = {
    "model_type": "mistral", "vocab_size": 2048, "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "rms_norm_eps": 1e-5, "rope_theta": 1e4,
    "max_position_embeddings": 65536,
}  # fmt: skip
CHUNK = 2048  # tokens of one pass through the cache, as infer/engine/tree.py reads prompts


def rows(tokens: int = 8192, window: int = 512, short: int = 256, repeats: int = 3) -> list[dict[str, Any]]:
    """Prefill of `tokens` and of twice as many, and of a short prompt; the best of `repeats` passes, one row each."""
    from model import ModelConfig, Transformer

    with tempfile.TemporaryDirectory() as folder:
        config = ModelConfig.from_dict({**CONFIG, "sliding_window": window})
        init_weights(Transformer(config), 0).save_pretrained(folder)

        def run(kind: str, T: int, times: int = repeats) -> tuple[float, float]:
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                return pool.submit(measure, folder, kind, T, times).result()

        ours, twice, theirs = run("fast", tokens), run("fast", 2 * tokens), run("sdpa", tokens)
        chunks, chunks_twice = run("chunks", tokens), run("chunks", 2 * tokens)
        brief, their_brief = run("fast", short, 5 * repeats), run("sdpa", short, 5 * repeats)
    setting = f"window {window}, fp32, CPU, {config.num_hidden_layers} layers of {config.hidden_size}"
    in_chunks = f"{setting}, chunks of {CHUNK} through the cache"
    return [
        row(f"prefill of {tokens}", "s", ours[0], theirs[0], setting),
        row(f"prefill of {tokens}", "s", chunks[0], theirs[0], in_chunks),
        row(f"peak memory of {tokens}", "MB", ours[1], theirs[1], setting),
        row(f"peak memory of {tokens}", "MB", chunks[1], theirs[1], in_chunks),
        row(f"prefill of {short}", "s", brief[0], their_brief[0], setting),
        growth(tokens, twice[0] / ours[0], setting),
        growth(tokens, chunks_twice[0] / chunks[0], in_chunks),
    ]


def growth(tokens: int, times: float, setting: str) -> dict[str, Any]:
    return {"name": f"time of {2 * tokens} over {tokens}", "ours": times, "peer": 4.0, "peer_name": "quadratic",
            "ratio": 4.0 / times, "limit": 2.0, "share_of_limit": 2.0 / times, "unit": "×", "setting": setting}


def row(name: str, unit: str, ours: float, peer: float, setting: str) -> dict[str, Any]:
    return {"name": name, "ours": ours, "peer": peer, "peer_name": "transformers sdpa", "ratio": peer / ours,
            "limit": None, "share_of_limit": None, "unit": unit, "setting": setting}  # fmt: skip


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
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for _ in range(repeats):
            start = time.perf_counter()
            prefill(tokens)
            best = min(best, time.perf_counter() - start)
    return best, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
