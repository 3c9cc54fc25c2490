"""Tokens through a cache in chunks give what they give at once; judged in fp64, at chunk sizes where rings break."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import FAMILIES, raw_config, some_tokens, tiny

from model import KVCache, Layout

# past the trained length, dynamic scaling turns old keys by another angle than new ones: cached ≠ uncached by design
CACHEABLE = [family for family in FAMILIES if family != "llama-dynamic"]


def in_chunks(model, tokens, sizes, cache=None, **layout_and_positions):
    cache = cache or KVCache(model.config)
    out, start = [], 0
    for size in sizes:
        part = slice(start, start + size)
        options = {"positions": layout_and_positions["positions"][:, part]} if layout_and_positions else {}
        if "layout" in layout_and_positions:
            whole = layout_and_positions["layout"]
            options["layout"] = Layout(whole.document_BT[:, part], whole.branch_BT[:, part])
        out.append(model(tokens[:, part], cache=cache, **options))
        start += size
    assert start == tokens.shape[1]
    return torch.cat(out, dim=1), cache


def chunks(first: int, size: int, T: int) -> list[int]:
    sizes = [first] if first else []
    sizes += [size] * ((T - first) // size)
    return sizes + ([T - sum(sizes)] if sum(sizes) < T else [])


def assert_same(got, wanted):
    assert (got - wanted).abs().max() <= 1e-12 * wanted.abs().max()


@pytest.mark.parametrize("slack", [0, 1, 5, 256])
@pytest.mark.parametrize("family", CACHEABLE)
def test_chunked_equals_uncached(family, slack):
    model = tiny(family)
    W = model.config.window or raw_config(family).get("sliding_window") or 6
    tokens = some_tokens(4 * W + 5)
    whole = model(tokens)
    for size in sorted({1, max(1, W - 1), W, W + 1}):
        for first in (0, 1, W, 2 * W + 1):
            got, _ = in_chunks(model, tokens, chunks(first, size, tokens.shape[1]), KVCache(model.config, slack=slack))
            assert_same(got, whole)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_chunks_any_offset_any_padding(data):
    family = data.draw(st.sampled_from(["mistral", "mistral-window-1", "qwen2-window", "llama-3", "odd-heads"]))
    kind = data.draw(st.sampled_from(["plain", "fast"]))
    model = tiny(family, num_hidden_layers=2).use_attention(kind)
    sizes = data.draw(st.lists(st.integers(1, 12), min_size=1, max_size=7))
    T, offset = sum(sizes), data.draw(st.integers(0, 30))
    pads = torch.tensor([data.draw(st.integers(0, T - 1)), 0])[:, None]
    steps = torch.arange(T)[None]
    positions = (steps - pads).clamp(min=0) + offset
    document = torch.where(steps < pads, -1, 0)
    layout = Layout(document, torch.zeros_like(document))
    tokens = some_tokens(T, seed=T)
    whole = model(tokens, positions=positions, layout=layout)
    cache = KVCache(model.config, slack=data.draw(st.integers(0, 9)))
    got, _ = in_chunks(model, tokens, sizes, cache, positions=positions, layout=layout)
    live = document >= 0
    assert_same(got[live], whole[live])


def test_plain_positions_continue_from_the_cache():
    model, tokens = tiny("llama"), some_tokens(12)
    cache = KVCache(model.config)
    model(tokens[:, :7], cache=cache)
    assert cache.next_position_B1.tolist() == [[7], [7]]
    assert_same(model(tokens[:, 7:], cache=cache), model(tokens)[:, 7:])


@pytest.mark.parametrize("family", ["mistral", "mistral-no-window"])
def test_questions_as_branches_of_one_cached_note(family):
    """A note's cache, then three questions decoded side by side, equals each question asked alone."""
    model, note = tiny(family), some_tokens(11, 1)
    cache = KVCache(model.config, slack=40)
    model(note, cache=cache)
    questions = [some_tokens(n, 1, seed=n) for n in (2, 4, 3)]
    branch = torch.cat([torch.full((1, q.shape[1]), i) for i, q in enumerate(questions, 1)], dim=1)
    positions = torch.cat([11 + torch.arange(q.shape[1]) for q in questions])[None]
    out = model(torch.cat(questions, dim=1), cache=cache, positions=positions, layout=Layout(0 * branch, branch))
    for number, question in enumerate(questions, 1):
        alone = model(torch.cat((note, question), dim=1))[:, 11:]
        assert_same(out[:, branch[0] == number], alone)


def test_the_cache_of_a_window_does_not_grow():
    model, tokens = tiny("mistral", num_hidden_layers=1), some_tokens(200, 1)
    cache = KVCache(model.config, slack=8)
    sizes = []
    for t in range(200):
        model(tokens[:, t : t + 1], cache=cache)
        sizes.append(cache.bytes())
    assert max(sizes) == 2 * 2 * 6 * 8 * (8 + 8)  # keys and values, 2 heads of 6, fp64, window + slack slots
    assert cache.length <= 16 and cache.dropped == 200 - cache.length


def test_another_number_of_rows_is_refused():
    model, tokens = tiny("mistral"), some_tokens(9, 3)
    cache = KVCache(model.config)
    model(tokens, cache=cache)
    with pytest.raises(ValueError, match="rows"):
        model(tokens[:1, :2], cache=cache, positions=torch.tensor([[9, 10]]))
