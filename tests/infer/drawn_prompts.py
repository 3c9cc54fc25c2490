"""Models with and without windows, and hypothesis strategies of prompts, for the tests of generation."""

import random
from functools import lru_cache

from answering_models import tiny_model
from hypothesis import strategies as st

MODELS = {"full": tiny_model(), "window": tiny_model(windows=(7, 7)), "mixed": tiny_model(windows=(None, 5))}
KINDS = {
    "plain": {},
    "mixed": {},
    "tied-bias": {"tie_word_embeddings": True, "qkv_bias": True, "model_type": "qwen2"},
    "experts": {"model_type": "mixtral", "num_local_experts": 3, "num_experts_per_tok": 2},
}


@lru_cache
def windowed(kind, window):
    return tiny_model(windows=(None if kind == "mixed" else window, window), **KINDS[kind])


@st.composite
def trees(draw) -> list[list[int]]:
    """Prompts that share beginnings of many lengths, some long, some the same, of many different tokens or of few."""
    words, most = random.Random(draw(st.integers(0, 999))), draw(st.sampled_from([2, 250]))

    def text(length):
        return [words.randint(0, most) for _ in range(length)]

    trunk = text(draw(st.integers(0, 90)))
    prompts = []
    for _ in range(draw(st.integers(1, 6))):
        kept = trunk[: draw(st.integers(0, len(trunk)))]
        prompts.append(kept + text(draw(st.integers(1, 80))))
    return prompts + prompts[: draw(st.integers(0, 1))]


@st.composite
def readings(draw) -> tuple[int | None, int]:
    """A window, and a prefill's chunk that falls before, on or after its edge."""
    window = draw(st.sampled_from([1, 2, 7, 40, None]))
    edges = [] if window is None else [max(1, window - 1), window, window + 1]
    return window, draw(st.sampled_from([1, *edges, 64]))
