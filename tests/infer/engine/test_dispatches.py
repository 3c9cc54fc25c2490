"""How many operations a step gives to torch: it must not grow with the number of notes that are decoded together."""

import pytest
import torch
from answering_models import tiny_model
from torch.utils._python_dispatch import TorchDispatchMode

from infer.engine.cache import Cache
from infer.engine.forward import Engine
from infer.engine.tree import build_tree

LAYERS = 2


class Count(TorchDispatchMode):
    """Counts operations; views are free and are left out."""

    VIEWS = (
        "view",
        "transpose",
        "slice",
        "select",
        "unsqueeze",
        "expand",
        "permute",
        "_unsafe_view",
        "split",
        "t.",
        "alias",
        "detach",
        "chunk",
        "unbind",
        "as_strided",
        "squeeze",
    )

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not str(func).removeprefix("aten.").startswith(self.VIEWS):
            self.total += 1
        return func(*args, **(kwargs or {}))


def decode_dispatches(notes: int, questions: int, layers: int, window: int | None = None) -> int:
    """Operations of one decoding step of `notes` notes, each with `questions` questions."""
    model = tiny_model(windows=(window,) * layers, dtype=torch.float32, num_hidden_layers=layers)
    prompts = [
        [5 + note, *range(20, 60 + note), 200 + question, 7, 8]
        for note in range(notes)
        for question in range(questions)
    ]
    prefixes, branches = build_tree(prompts)
    with torch.inference_mode():
        cache = Cache(Engine(model), prefixes, branches)
        longest = max(len(branch.tokens) for branch in branches)
        tokens_NT = torch.tensor([[*branch.tokens, *[0] * (longest - len(branch.tokens))] for branch in branches])
        cache.step(tokens_NT, torch.tensor([len(branch.tokens) for branch in branches]))
        with Count() as count:
            cache.step(torch.full((len(branches), 1), 9), torch.ones(len(branches), dtype=torch.int64))
    return count.total


@pytest.mark.parametrize("window", [None, 16])
def test_a_layer_of_a_step_of_72_rows_takes_at_most_60_dispatches(window):
    per_layer = (decode_dispatches(8, 9, 4, window) - decode_dispatches(8, 9, 2, window)) / 2
    assert 10 < per_layer <= 60


def test_more_notes_take_no_more_dispatches():
    assert decode_dispatches(8, 9, 2) == decode_dispatches(2, 9, 2)


class Names(TorchDispatchMode):
    """Notes every operation's name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("prompts", [1, 2])
def test_a_prompt_is_read_by_flash_attention_in_fp32(prompts):
    """Not by a product that holds all scores, which SDPA falls back to for keys in another layout."""
    engine = Engine(tiny_model(dtype=torch.float32))
    prefixes, branches = build_tree([[(3 * i + n) % 250 for i in range(100)] for n in range(prompts)])
    with torch.no_grad(), Names() as seen:
        cache = Cache(engine, prefixes, branches)
        longest = max(len(branch.tokens) for branch in branches)
        tokens_BT = torch.tensor([branch.tokens for branch in branches])
        cache.step(tokens_BT, torch.full((prompts,), longest))
    flash = [name for name in seen.names if "flash_attention_for_cpu" in name]
    assert len(flash) == LAYERS * prompts
