"""Continue a prompt: `python -m infer.generate --weights DIR [--adapter DIR] --prompt TEXT`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import tyro

from infer.engine.generate import Generator
from infer.engine.settings import Settings


def main(options: Options) -> int:
    import json

    from infer.engine.load import dtype_for, load, plan_for
    from infer.engine.memory import Load

    settings = Settings(
        options.max_new_tokens, options.temperature, options.top_k, options.top_p, options.min_p, options.seed,
        tuple(options.stop),
    )  # fmt: skip
    options = replace(options, dtype=dtype_for(options, 1))
    letters = len(options.prompt.encode("utf-8", "replace"))  # no token is shorter than a byte
    how = plan_for(options, Load(letters + 64, options.max_new_tokens))
    model, tokenizer = load(options.weights, options.adapter, options.dtype, form=how.form, fused=options.fuse)
    tokenizer.put_begin(options.bos)
    prompt: str | list[int] = options.prompt
    if options.chat:
        prompt = tokenizer.encode_chat([{"role": "user", "content": options.prompt}])
    generator = Generator(model, tokenizer, cache_dtype=how.cache, chunk=how.chunk)
    if options.json:
        (out,) = generator.generate([prompt], settings)
        print(json.dumps(out.__dict__, ensure_ascii=False))
        return 0
    for piece in generator.stream(prompt, settings):
        print(piece, end="", flush=True)
    print()
    return 0


@dataclass(frozen=True)
class Options:
    """Continue a prompt."""

    weights: str
    """A model's folder or GGUF file."""
    prompt: str
    """The text to continue, or with --chat the user's message."""
    adapter: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """LoRA adapters (PEFT folders), merged in this order; one --adapter each."""
    chat: bool = False
    """Ask in the model's own chat form."""
    bos: Literal["auto", "yes", "no"] = "auto"
    """Put the begin token before the prompt; auto: as the tokenizer's files say. (A chat's form has its own.)"""
    max_new_tokens: int = 50
    """At most so many new tokens."""
    temperature: float = 0.0
    """0: greedy."""
    top_k: int = 0
    """Only the k likeliest tokens; 0: all."""
    top_p: float = 1.0
    """Only the likeliest tokens that reach this share of the probability."""
    min_p: float = 0.0
    """Only tokens at least this share as likely as the likeliest."""
    seed: int = 0
    """Seed of sampling."""
    stop: tuple[str, ...] = ()
    """Texts that end the generation."""
    dtype: Literal["auto", "float32", "bfloat16", "float64"] = "float32"
    """What the model computes in; auto: what this machine decodes soonest in, measured."""
    format: Literal["auto", "wide", "int8", "int4", "int4-32", "int4-64", "int4-128", "nf4"] = "auto"
    """How linear layers' weights are kept: in dtype (wide), in 8 or 4 bits (the number: columns that share a scale);
    auto: wide, or what fits --memory."""
    memory: str = ""
    """Run within so much memory, for example 6GB: choose format, cache and chunk, say so, and refuse before
    loading what cannot fit."""
    fuse: bool = False
    """On a CUDA device: compute by the Triton kernels (infer/engine/fuse.py). Elsewhere their definitions, slowly."""
    json: bool = False
    """Print one JSON object: text, tokens, logprobs, finish_reason."""


if __name__ == "__main__":
    from model.support.cli import run

    run(main, Options)
