"""Continue a prompt: `python -m infer.generate --weights DIR [--adapter DIR] --prompt TEXT`."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace

from infer.engine.options import ModelOptions
from infer.engine.settings import Settings
from model.support.cli import UserError


@dataclass(frozen=True)
class Options(ModelOptions):
    """Continue a prompt."""

    prompt: str
    """The text to continue, or with --chat the user's message."""
    chat: bool = False
    """Use the model's chat template."""
    compile: bool = False
    """Compile the decode step: takes a minute or more, saves a quarter of the time per token, pays from 26,000 tokens
    on."""
    settings: Settings = Settings()
    json: bool = False
    """Print one JSON object: text, tokens, logprobs, finish_reason."""


def main(options: Options) -> int:
    from infer.engine.generate import generator_for
    from infer.engine.load import dtype_for, plan_for
    from lora.memory import Requests

    settings = options.settings
    if options.compile and options.fuse:
        raise UserError("--compile cannot compile the kernels of --fuse; leave one out")
    if options.compile and options.memory:
        raise UserError("--compile needs a larger cache than --memory plans; leave one out")
    size = len(options.prompt.encode("utf-8", "replace"))  # at least the number of tokens
    calls = [(min(512, 1 + size // 4), 1), (1, settings.max_new_tokens)]  # estimated: prefill, decode
    options = replace(options, dtype=dtype_for(options, calls))  # type: ignore[arg-type]
    plan = plan_for(options, Requests(size + 64, settings.max_new_tokens))
    generator = generator_for(options, plan)
    prompt: str | list[int] = options.prompt
    if options.chat:
        prompt = generator.tokenizer.encode_chat([{"role": "user", "content": options.prompt}])
    if options.json:
        (out,) = generator.generate([prompt], settings)
        print(json.dumps(out.__dict__, ensure_ascii=False))
        return 0
    for text in generator.stream(prompt, settings):
        print(text, end="", flush=True)
    print()
    return 0


if __name__ == "__main__":
    from model.support.cli import run

    run(main, Options)
