"""Run under torchrun: generate with models held by all ranks together; the first writes what came of it."""

import json
import sys

from infer.engine.generate import Generator
from infer.engine.parallel import load_parallel, wait


def main(cases: str, out: str) -> None:
    import torch.distributed as dist

    found = {}
    with open(cases) as file:
        asked = json.load(file)
    for name, (weights, adapters, prompts) in asked.items():
        wait()
        model, tokenizer = load_parallel(weights, adapters, "float64", dist.get_world_size())
        held = sum((p.to_local() if hasattr(p, "to_local") else p).numel() for p in model.parameters())
        outs = Generator(model, tokenizer).generate(prompts, max_new_tokens=12, temperature=0.5)
        found[name] = {"held": held, "outs": [(o.tokens, o.logprobs) for o in outs]}
    if dist.get_rank() == 0:
        with open(out, "w") as file:
            json.dump(found, file)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
