"""Decoding one request, tokens per second: wide and quantized weights against transformers and llama.cpp.

The competitors are measured in turns. A limit is the measured memory bandwidth over the bytes that a token reads: every
weight once, in its format. Models: the given weights (SmolLM2-135M), a random one of 500M parameters, and a random one
with a short sliding window, whose time per token must not grow with the text.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import torch

from eval.bench import llama
from eval.bench.models import generator_of, read_bytes, transformers_of, transformers_tokens
from eval.bench.row import Row
from infer.engine.generate import Generator
from infer.engine.load import load
from model import ModelConfig, Transformer
from model.quantize.linear import quantize_model
from model.support.hardware import compute_dtype, int8_products, read_rate
from model.support.init import init_weights

SIZES = (8, 72)  # rows of a note's questions, and of eight notes'
HALF_BILLION = {
    "model_type": "mistral",
    "vocab_size": 32000,
    "hidden_size": 1280,
    "intermediate_size": 3584,
    "num_hidden_layers": 24,
    "num_attention_heads": 20,
    "num_key_value_heads": 5,
    "head_dim": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e4,
    "sliding_window": None,
    "max_position_embeddings": 4096,
}
SHORT = HALF_BILLION | {
    "vocab_size": 2048,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
}


def rows(
    weights: str,
    prompt_tokens: int = 64,
    new_tokens: int = 64,
    repeats: int = 3,
    large: bool = True,
    forms: tuple[str, ...] = ("int8", "w8a8", "int4", "int4-32", "int4-128", "nf4"),
    compiled: tuple[str, ...] = (),
) -> list[Row]:
    """Greedy decoding, batch 1, and a few batch sizes. `large` includes the 500M model (2 GB in fp32, twice). Besides
    fp32 and `forms`, bf16 is measured if this machine's GEMMs are faster in it; w8a8 is skipped if this machine has no
    int8 GEMM for it. `compiled`: forms that are also measured with torch.compile (90 seconds each)."""
    forms = tuple(form for form in forms if form != "w8a8" or int8_products())
    prompt = [100 + n % 150 for n in range(prompt_tokens)]
    model, tokenizer = load(weights)
    models = {"fp32": model}
    if compute_dtype() == torch.bfloat16:
        models["bf16"] = load(weights, dtype="bfloat16")[0]
    models |= {form: load(weights, form=form)[0] for form in forms}
    is_gguf = Path(weights).suffix == ".gguf"
    name = "SmolLM2-135M" if is_gguf else Path(weights).name
    peer = llama.installed() if is_gguf else None
    if is_gguf and peer is None:
        print(llama.MISSING, file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        files = {} if peer is None else dict(llama.requantized(peer, weights, Path(folder)))
        by_name = {llama.named(peer, form): file for form, file in files.items()}
        jobs = {who: llama.decoding(llama.opened(peer, file), prompt, new_tokens) for who, file in by_name.items()}
        found = compare(name, models, tokenizer, jobs, prompt, new_tokens, repeats, compiled=compiled)
        for size in SIZES:
            jobs = {
                who: partial(llama.Job(peer, file, size + 1).rate, prompt, size, 16) for who, file in by_name.items()
            }
            found += compare(f"{name}, {size} rows", models, tokenizer, jobs, prompt, 16, repeats, size)
    if large:
        del model, models
        with torch.device("meta"):
            model = Transformer(ModelConfig.from_dict(HALF_BILLION))
        models = {"fp32": init_weights(model.to_empty(device="cpu"), 0).requires_grad_(False).eval()}
        if compute_dtype() == torch.bfloat16:
            models["bf16"] = deepcopy(models["fp32"]).to(torch.bfloat16)
        for form in [form for form in ("int8", "w8a8", "int4") if form in forms]:
            base = init_weights(Transformer(model.config), 0).requires_grad_(False).eval()
            models[form] = quantize_model(base, form)
        found += compare("500M random", models, tokenizer, {}, prompt, new_tokens, repeats)
    return [*found, past_the_window(tokenizer)]


def compare(
    name: str,
    models: dict[str, Transformer],
    tokenizer: Any,
    peers: Mapping[str, Callable[[], float]],
    prompt: list[int],
    new: int,
    repeats: int,
    size: int = 1,
    compiled: tuple[str, ...] = (),
) -> list[Row]:
    """Rows for every format of `models` with `size` prompts in the batch (SIZES: the questions of one and of several
    notes).

    Peers are the fastest of `peers`, functions that return tokens per second, and transformers in fp32 at batch 1, our
    own fp32 at larger ones. Only batch 1 has a limit.
    """
    prompts = [[*prompt, 100 + row] for row in range(size)]
    runs = {
        form: partial(ours_once, generator_of(own, tokenizer, lookup=False), prompts, new)
        for form, own in models.items()
    }
    for form in (form for form in compiled if form in models):
        whole = generator_of(models[form], tokenizer, lookup=False, compile=True)
        runs[f"{form}, compiled"] = partial(ours_once, whole, prompts, new)
        ours_once(whole, prompts, new)  # warm-up: compiles
    measured: dict[str, Callable[[], float]] = {**runs, **peers}
    plain = "ours, fp32"
    if size == 1:
        plain = "transformers generate, fp32"
        theirs = transformers_of(models["fp32"], torch.float32)
        measured[plain] = partial(theirs_once, theirs, torch.tensor(prompts), new)
    best = dict.fromkeys(measured, 0.0)
    for _ in range(repeats):  # in turns, so that other load on the machine affects all alike
        for which, once in measured.items():
            best[which] = max(best[which], once())
    best.setdefault(plain, best["fp32"])
    setting = f"prompt {len(prompt)}, {new} new, best of {repeats}, {torch.get_num_threads()} threads"
    rate, found = read_rate() * 1e9, []
    for form in runs:
        read = read_bytes(models["fp32"].config, form.removesuffix(", compiled"))
        limit, about = (rate / read, f"{read / 1e6:.0f} MB a token, {setting}") if size == 1 else (None, setting)
        for peer in (plain, *([max(peers, key=best.__getitem__)] if peers else ())):
            if (form, peer) != ("fp32", "ours, fp32"):
                found.append(Row(f"decode {name}: {form}", best[form], best[peer], peer, "tokens/s", about, limit))
    return found


def ours_once(generator: Generator, prompts: list[list[int]], new: int) -> float:
    """Tokens per second, without each prompt's first token."""
    steps = generator.run(generator.states(prompts, None, {"max_new_tokens": new + 1}))
    next(steps)
    began = time.perf_counter()
    count = sum(1 for _ in steps)
    return count * len(prompts) / (time.perf_counter() - began)


class Clock:
    """A streamer for transformers' generate that records the times of the prompt and of each token."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, _: Any) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


@torch.inference_mode()
def theirs_once(peer: Any, ids: torch.Tensor, new: int) -> float:
    """Tokens per second, without the first token."""
    clock = Clock()
    transformers_tokens(peer, ids, torch.ones_like(ids), new + 1, streamer=clock)
    _, first, *_, last = clock.times
    return new / (last - first)


def past_the_window(tokenizer: Any, window: int = 256, new: int = 2048) -> Row:
    """Time per token six to eight windows into the text against two to four: a ratio of 1 means constant cost."""
    config = ModelConfig.from_dict({**SHORT, "sliding_window": window})
    model = init_weights(Transformer(config), 0).requires_grad_(False).eval()
    generator = generator_of(model, tokenizer, lookup=False)
    steps, taken = generator.run(generator.states([[100] * 16], None, {"max_new_tokens": new})), []
    began = time.perf_counter()
    for _ in steps:
        now = time.perf_counter()
        taken.append(now - began)
        began = now
    early, late = (statistics.median(taken[a * window : b * window]) for a, b in ((2, 4), (6, 8)))
    return Row(
        "decode past the window",
        late * 1e3,
        early * 1e3,
        "ours, 2 to 4 windows",
        "ms/token",
        f"6 to 8 windows of {window} into the text, median",
    )
