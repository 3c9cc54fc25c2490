"""Continue a prompt: `python -m infer.generate --weights DIR [--adapter DIR] --prompt TEXT`."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Literal

from infer.engine.options import ModelOptions
from infer.engine.settings import Settings
from model.support.cli import UserError

COMPILE_PAYS = 26_000  # new tokens: 90 s of compilation at 3.4 ms saved a token


@dataclass(frozen=True)
class Options(ModelOptions):
    """Continue a prompt."""

    prompt: str
    """The text to continue, or with --chat the user's message."""
    chat: bool = False
    """Use the model's chat template."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Compile the decode step (on a GPU, also capture it as a CUDA graph), which takes a minute or more and saves a
    quarter of the time per token; auto: where it pays, from 26,000 new tokens on."""
    settings: Settings = Settings()
    json: bool = False
    """Print one JSON object: text, tokens, logprobs, finish_reason."""


def main(options: Options) -> int:
    from infer.engine.generate import generator_for
    from infer.engine.load import device_here, dtype_for, plan_for
    from lora.memory import Requests

    settings = options.settings
    if options.compile == "on" and options.fuse and device_here() == "cpu":
        raise UserError("--compile has nothing to compile in the kernels of --fuse on a CPU; leave one out")
    if options.compile == "on" and options.memory:
        raise UserError("--compile needs a larger cache than --memory plans; leave one out")
    size = len(options.prompt.encode("utf-8", "replace"))  # at least the number of tokens
    calls = [(min(512, 1 + size // 4), 1), (1, settings.max_new_tokens)]  # estimated: prefill, decode
    options = replace(options, dtype=dtype_for(options, calls))  # type: ignore[arg-type]
    plan = plan_for(options, Requests(size + 64, settings.max_new_tokens))
    generator = generator_for(options, plan, compile=compiles(options))
    prompt: str | list[int] = options.prompt
    if options.chat:
        prompt = generator.tokenizer.encode_chat([{"role": "user", "content": options.prompt}])
    if options.json:
        (out,) = generator.generate([prompt], settings)
        print(json.dumps(out.__dict__))
        return 0
    for text in generator.stream(prompt, settings):
        print(text, end="", flush=True)
    print()
    return 0


def compiles(options: Options) -> bool:
    """Whether the decode step is compiled: as asked, or with "auto" where the new tokens repay the time."""
    pays = options.settings.max_new_tokens >= COMPILE_PAYS and not (options.fuse or options.memory)
    return options.compile == "on" or (options.compile == "auto" and pays)


if __name__ == "__main__":
    from model.support.cli import run

    run(main, Options)
