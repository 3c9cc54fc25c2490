"""Decoding one request, tokens per second: wide and quantized weights against transformers and llama.cpp.

The programs run in turns. A limit is the measured read rate over the bytes that a token reads: every weight once, in
its format. Shapes: the weights given (SmolLM2-135M), a random model of 500M parameters, and a random one with a short
window, whose cost per token must not grow with the text.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from eval.bench import llama
from eval.bench.row import Row
from infer.engine.generate import Generator
from infer.engine.load import load
from model import ModelConfig, Transformer
from model.quantize.linear import bytes_of, quantize_model
from model.support.hardware import int8_products, read_rate
from model.support.init import init_weights

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
    """Greedy decoding, batch 1. `large`: the 500M model too (2 GB in fp32, twice). w8a8 is left out where this machine
    has no products for it. `compiled`: forms whose step is compiled too (a minute and a half each)."""
    forms = tuple(form for form in forms if form != "w8a8" or int8_products())
    setting = f"prompt {prompt_tokens}, {new_tokens} new, best of {repeats}, {torch.get_num_threads()} threads"
    prompt = [100 + n % 150 for n in range(prompt_tokens)]
    model, tokenizer = load(weights)
    narrows = {form: load(weights, form=form)[0] for form in forms}
    few = setting.replace(f"{new_tokens} new", "16 new")
    with tempfile.TemporaryDirectory() as folder:
        files: dict[str, str] = {}
        peer = llama.installed()
        if Path(weights).suffix == ".gguf" and peer is None:
            setting += f"; {llama.MISSING}"
        elif Path(weights).suffix == ".gguf":
            files = dict(llama.requantized(peer, weights, Path(folder)))
        name = "SmolLM2-135M" if Path(weights).suffix == ".gguf" else Path(weights).name
        peers = {
            llama.named(peer, form): llama.decoding(llama.opened(peer, file), prompt, new_tokens)
            for form, file in files.items()
        }
        found = compare(name, model, tokenizer, narrows, peers, prompt, new_tokens, repeats, setting, compiled)
        del peers
        jobs = {llama.named(peer, form): partial(llama.rate, peer, file, prompt, 16) for form, file in files.items()}
        found += batched(name, {"fp32": model, **narrows}, jobs, tokenizer, prompt, 16, repeats, few)
    if large:
        del model, narrows
        with torch.device("meta"):
            model = Transformer(ModelConfig.from_dict(HALF_BILLION))
        model = init_weights(model.to_empty(device="cpu"), 0).requires_grad_(False).eval()
        narrows = {}
        for form in [form for form in ("int8", "w8a8", "int4") if form in forms]:
            base = init_weights(Transformer(model.config), 0).requires_grad_(False).eval()
            narrows[form] = quantize_model(base, form)
        found += compare("500M random", model, tokenizer, narrows, {}, prompt, new_tokens, repeats, setting)
    return [*found, past_the_window(tokenizer)]


def compare(
    name: str,
    model: Transformer,
    tokenizer: Any,
    narrows: dict[str, Transformer],
    peers: dict[str, Callable[[], float]],
    prompt: list[int],
    new: int,
    repeats: int,
    setting: str,
    compiled: tuple[str, ...] = (),
) -> list[Row]:
    """fp32 and the quantized models against transformers in fp32, and the quantized ones against the fastest of `peers`
    too."""
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(Path(folder) / "peer")
        theirs = AutoModelForCausalLM.from_pretrained(Path(folder) / "peer", dtype=torch.float32).eval()
    runs: dict[str, Callable[[], float]] = {
        "transformers generate, fp32": partial(theirs_once, theirs, torch.tensor([prompt]), new),
        **peers,
    }
    sizes = {}
    for form, own in {"fp32": model, **narrows}.items():
        sizes[form] = read_bytes(own.config, form)
        runs[form] = partial(ours_once, generator_of(own, tokenizer), [prompt], new)
        if form in compiled:
            sizes[f"{form}, compiled"] = sizes[form]
            runs[f"{form}, compiled"] = partial(ours_once, generator_of(own, tokenizer, True), [prompt], new)
            runs[f"{form}, compiled"]()
    best: dict[str, float] = {}
    for _ in range(repeats):  # in turns: other load on the machine then slows all of them alike
        for which, once in runs.items():
            best[which] = max(best.get(which, 0.0), once())
    rate, found = read_rate() * 1e9, []
    for form, size in sizes.items():
        fastest = [] if form.startswith("fp32") or not peers else [max(peers, key=best.__getitem__)]
        for peer in ("transformers generate, fp32", *fastest):
            found.append(
                Row(
                    f"decode {name}: {form}",
                    best[form],
                    best[peer],
                    peer,
                    "tokens/s",
                    f"{size / 1e6:.0f} MB a token, {setting}",
                    rate / size,
                )
            )
    return found


def batched(
    name: str,
    models: dict[str, Transformer],
    jobs: Mapping[str, Callable[[int, int], float]],
    tokenizer: Any,
    prompt: list[int],
    new: int,
    repeats: int,
    setting: str,
    sizes: tuple[int, ...] = (8, 72),
) -> list[Row]:
    """Steps of several rows, as a note's or eight notes' questions make them: each format against our fp32 and against
    the fastest of `jobs`, which give tokens a second for (rows, repeats)."""
    found = []
    generators = {form: generator_of(own, tokenizer) for form, own in models.items()}
    for size in sizes:
        prompts, best = [[*prompt, 100 + row] for row in range(size)], dict.fromkeys((*models, *jobs), 0.0)
        for _ in range(repeats):
            for form, generator in generators.items():
                best[form] = max(best[form], ours_once(generator, prompts, new))
        for name_of, job in jobs.items():
            best[name_of] = job(size, repeats)
        fastest = [max(jobs, key=best.__getitem__)] if jobs else []
        label = f"decode {name}, {size} rows"
        for form in models:
            for peer in (*(["fp32"] if form != "fp32" else []), *fastest):
                peer_name = "ours, fp32" if peer == "fp32" else peer
                found.append(Row(f"{label}: {form}", best[form], best[peer], peer_name, "tokens/s", setting))
    return found


def read_bytes(config: ModelConfig, form: str) -> int:
    """Bytes that a decoded token reads: the blocks' matrices and the head's, in a format or in fp32."""
    with torch.device("meta"):
        shapes = [tuple(p.shape) for n, p in Transformer(config).named_parameters() if ".layers." in n and p.dim() == 2]
    shapes.append((config.vocab_size, config.hidden_size))
    return sum(4 * a * b if form == "fp32" else bytes_of(form, a, b) for a, b in shapes)


def generator_of(model: Transformer, tokenizer: Any, compile: bool = False) -> Generator:
    generator = Generator(model, tokenizer, lookup=False, compile=compile)
    generator.stop_ids = frozenset()
    return generator


def ours_once(generator: Generator, prompts: list[list[int]], new: int) -> float:
    """Tokens per second after each prompt's first."""
    steps = generator.run(generator.states(prompts, None, {"max_new_tokens": new + 1}))
    next(steps)
    began = time.perf_counter()
    count = sum(1 for _ in steps)
    return count * len(prompts) / (time.perf_counter() - began)


class Clock:
    """A streamer for transformers' generate: records when the prompt and each token arrive."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, _: Any) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


@torch.inference_mode()
def theirs_once(peer: Any, ids: torch.Tensor, new: int) -> float:
    """Tokens per second after the first."""
    clock = Clock()
    peer.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new + 1,
        min_new_tokens=new + 1,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
        streamer=clock,
    )
    _, first, *_, last = clock.times
    return new / (last - first)


def past_the_window(tokenizer: Any, window: int = 256, new: int = 2048) -> Row:
    """Time of a token between six and eight windows over that between two and four: 1 where the cost is flat."""
    config = ModelConfig.from_dict({**SHORT, "sliding_window": window})
    generator = generator_of(init_weights(Transformer(config), 0).requires_grad_(False).eval(), tokenizer)
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
