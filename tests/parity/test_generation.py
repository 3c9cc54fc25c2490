"""Greedy text is transformers' generate's: the same weights, prompts of unequal length in one left-padded batch."""

import pytest
import torch
from answering_models import tiny_tokenizer

from infer.engine.generate import Generator
from model import Transformer

NEW = 40


def prompts() -> list[list[int]]:
    """Unequal, longer than every window, some with a beginning in common, one that repeats (guesses abound)."""
    draw = torch.Generator().manual_seed(3)
    one, *others = (torch.randint(3, 61, (n,), generator=draw).tolist() for n in (70, 1, 9, 33, 52))
    return [one, *others, one[:40] + others[1], one[:40] + others[2], [5, 9, 7, 30] * 8]


@torch.inference_mode()
def theirs(folder, asked: list[list[int]]) -> list[list[int]]:
    from transformers import AutoModelForCausalLM

    peer = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    longest = max(map(len, asked))
    ids_BT = torch.tensor([[0] * (longest - len(p)) + p for p in asked])
    mask_BT = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in asked])
    out_BT = peer.generate(ids_BT, attention_mask=mask_BT, max_new_tokens=NEW, do_sample=False, pad_token_id=0)
    rows = out_BT[:, longest:].tolist()
    return [row[: row.index(2) + 1] if 2 in row else row for row in rows]  # 2 ends a text, what follows is padding


def is_near_tie(folder, prompt: list[int], ours: list[int], other: list[int]) -> bool:
    """Whether the two lie, where they first differ, closer in fp64 than fp32's measured error: either may be taken."""
    at = next(n for n, (a, b) in enumerate(zip(ours, other, strict=False)) if a != b)
    ids_1T = torch.tensor([prompt + ours[:at]])
    exact_V, fp32_V = (
        Transformer.from_pretrained(folder, dtype=dtype)(ids_1T)[0, -1].double().detach()
        for dtype in (torch.float64, torch.float32)
    )
    return bool((exact_V[ours[at]] - exact_V[other[at]]).abs() <= 2 * (exact_V - fp32_V).abs().max())


@pytest.mark.parametrize(
    "family", ["mistral", "mistral-no-window", "llama", "llama-3", "llama-tied", "qwen2", "qwen2-window", "mixtral"]
)
def test_greedy_text_is_transformers(family, published, tmp_path):
    folder, asked = published(family, max_position_embeddings=256), prompts()
    generator = Generator(Transformer.from_pretrained(folder), tiny_tokenizer(tmp_path))
    ours = [out.tokens for out in generator.generate(asked, max_new_tokens=NEW)]
    different = [n for n, pair in enumerate(zip(ours, theirs(folder, asked), strict=True)) if pair[0] != pair[1]]
    assert len(different) <= 1, different
    for n in different:
        assert is_near_tie(folder, asked[n], ours[n], theirs(folder, asked)[n])
    assert len({tuple(tokens) for tokens in ours}) > 4  # texts that say something
