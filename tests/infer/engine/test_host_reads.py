"""How often a step waits for its device: every number that the host reads from it is such a wait."""

import pytest
import torch
from answering_models import tiny_model
from torch.overrides import TorchFunctionMode

from infer.engine.generate import Generator
from infer.engine.settings import Settings


class HostReads(TorchFunctionMode):
    """Counts reads by the host of tensors that depend on `origin` (the weights), as all that a step computes does."""

    READS = {"item", "tolist", "__bool__", "__int__", "__float__", "__index__", "nonzero", "numpy", "cpu"}

    def __init__(self, origin) -> None:
        super().__init__()
        self.computed = {id(tensor): tensor for tensor in origin}  # kept, so that an id stays one tensor's
        self.count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        flat = [each for arg in args for each in (arg if isinstance(arg, (list, tuple)) else [arg])]
        computed = any(id(each) in self.computed for each in flat)
        self.count += computed and func.__name__ in self.READS
        out = func(*args, **(kwargs or {}))
        if computed:
            for each in out if isinstance(out, (list, tuple)) else [out]:
                if isinstance(each, torch.Tensor):
                    self.computed[id(each)] = each
        return out


class Allowed:
    """A constraint that allows half of the vocabulary."""

    ids = torch.arange(10, 200)

    def allowed(self, tokens):
        return self.ids


def second_step(generator, prompts, **sampling):
    """(reads of the host, the largest number of tokens that a request gained) in the second step."""
    settings = Settings(max_new_tokens=12, constraint=Allowed(), **sampling)
    states = generator.states(prompts, settings, {})
    steps = generator.run(states)
    next(steps)
    with HostReads(generator.engine.model.parameters()) as reads:
        next(steps)
    assert len(reads.computed) > 100
    return reads.count, max(len(state.tokens) for state in states) - 1


def generator_for(windows, tokenizer):
    generator = Generator(tiny_model(windows=windows), tokenizer)
    generator.stop_ids = frozenset()
    return generator


PROMPTS = [[5 + note, *range(20, 60 + note), 200 + question, 7] for note in range(3) for question in range(4)]


@pytest.mark.parametrize("windows", [(None, None), (16, 16), (None, 16)])
def test_a_step_waits_for_its_device_once(windows, tokenizer):
    assert second_step(generator_for(windows, tokenizer), PROMPTS) == (1, 1)


def test_a_sampled_step_waits_for_its_device_once(tokenizer):
    sampling = dict(temperature=0.7, top_k=40, top_p=0.9, min_p=0.01)
    assert second_step(generator_for((None, 16), tokenizer), PROMPTS, **sampling) == (1, 1)


@pytest.mark.parametrize("temperature", [0.0, 0.01])
def test_a_step_that_checks_draft_tokens_waits_for_its_device_once(temperature, tokenizer):
    generator = generator_for((16, 16), tokenizer)
    generator.row_cost = 0.0  # drafts always pay
    answers = generator.generate(PROMPTS, max_new_tokens=12, constraint=Allowed())
    repeated = [[*prompt, *out.tokens, *prompt] for prompt, out in zip(PROMPTS, answers, strict=True)]
    reads, tokens = second_step(generator, repeated, temperature=temperature)
    assert reads == 1 and tokens > 1
