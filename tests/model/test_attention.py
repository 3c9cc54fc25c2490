"""Masking, tested by changing one token and seeing which logits change; and the fast path against the plain path.

The plain path is the specification. Two paths are equal if they agree in fp64 to 1e-12 of the largest value, and if the
fast path's fp32 and bf16 error against fp64 is at most twice the plain path's, for the output and every gradient.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import FAMILIES, some_tokens, tiny

from model import KVCache, Layout
from model.attention import PlainAttend
from model.fast_attention import FastAttend, reach
from model.mask import Visible
from model.transformer import RMSNorm


def moved(model, tokens, changed: int, **options) -> list[int]:
    """Positions whose logits change when one token is changed."""
    other = tokens.clone()
    other[0, changed] = (tokens[0, changed] + 7) % 50 + 3
    assert other[0, changed] != tokens[0, changed]
    return ((model(tokens, **options) - model(other, **options)).abs().amax(-1)[0] > 0).nonzero().flatten().tolist()


@pytest.mark.parametrize("kind", ["plain", "fast"])
@pytest.mark.parametrize("window", [1, 2, 5, 40])
def test_a_window_of_w_sees_w_keys(window, kind):
    model = tiny("mistral", sliding_window=window, num_hidden_layers=1).use_attention(kind)
    assert moved(model, some_tokens(30, 1), 3) == list(range(3, min(30, 3 + window)))


def test_windows_add_up_over_layers_and_without_one_all_is_seen():
    assert moved(tiny("mistral", sliding_window=4), some_tokens(30, 1), 3) == list(range(3, 3 + 3 * 3 + 1))
    assert moved(tiny("mistral-no-window"), some_tokens(30, 1), 3) == list(range(3, 30))
    qwen = tiny("qwen2-window", max_window_layers=0, sliding_window=4)
    assert moved(qwen, some_tokens(30, 1), 3) == list(range(3, 3 + 3 * 3 + 1))


@pytest.mark.parametrize("kind", ["plain", "fast"])
def test_a_token_never_sees_another_document_nor_another_branch(kind):
    """a b c (prefix) p q (branch 1) r s (branch 2), then a second document x y z."""
    model = tiny("mistral-no-window").use_attention(kind)
    layout = Layout(torch.tensor([[0] * 7 + [1] * 3]), torch.tensor([[0, 0, 0, 1, 1, 2, 2, 0, 0, 0]]))
    positions = torch.tensor([[0, 1, 2, 3, 4, 3, 4, 0, 1, 2]])
    options = {"layout": layout, "positions": positions}
    tokens = some_tokens(10, 1)
    assert moved(model, tokens, 0, **options) == [0, 1, 2, 3, 4, 5, 6]
    assert moved(model, tokens, 3, **options) == [3, 4]
    assert moved(model, tokens, 5, **options) == [5, 6]
    assert moved(model, tokens, 8, **options) == [8, 9]
    alone = model(tokens[:, [0, 1, 2, 5, 6]])
    torch.testing.assert_close(model(tokens, **options)[:, 5:7], alone[:, 3:], rtol=1e-12, atol=1e-12)


def test_left_padding_changes_nothing():
    for family in ("mistral", "llama-3", "qwen2-window"):
        model, tokens = tiny(family), some_tokens(20, 1)
        padded = torch.cat((torch.zeros(1, 6, dtype=torch.int64), tokens), dim=1)
        positions = torch.cat((torch.zeros(6, dtype=torch.int64), torch.arange(20)))[None]
        document = torch.tensor([[-1] * 6 + [0] * 20])
        out = model(padded, positions=positions, layout=Layout(document, torch.zeros_like(document)))
        torch.testing.assert_close(out[:, 6:], model(tokens), rtol=1e-12, atol=1e-12)


def test_a_layout_without_positions_is_refused():
    zeros = torch.zeros(1, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match="positions"):
        tiny()(some_tokens(4, 1), layout=Layout(zeros, zeros))


def test_rms_norm_casts_before_the_weight():
    """x·rsqrt in fp32, cast to bf16, then times the weight. Multiplying in fp32 changes a quarter of the results."""
    generator = torch.Generator().manual_seed(0)
    norm, x = RMSNorm(64, 1e-5).bfloat16(), torch.randn(50, 64, generator=generator).bfloat16()
    norm.weight.data = torch.randn(64, generator=generator).bfloat16()
    scaled = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-5)
    assert torch.equal(norm(x), norm.weight * scaled.bfloat16())
    late = (norm.weight.float() * scaled).bfloat16()
    assert 0.1 < (norm(x) != late).float().mean() < 0.5


def case(data) -> tuple[Visible, int | None, list[torch.Tensor], int]:
    """A random attention call: (visible, window, [q, k, v], T)."""
    T = data.draw(st.integers(1, 90), "T")
    before = data.draw(st.integers(0, 40), "cached")
    window = data.draw(st.one_of(st.none(), st.integers(1, 100)), "window")
    B, H, G, K = data.draw(st.sampled_from([(1, 4, 2, 6), (2, 3, 3, 4), (2, 6, 1, 8)]), "shape")
    S = before + T
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99), "seed"))
    kind = data.draw(st.sampled_from(["plain", "padded", "packed", "branches", "strange"]), "kind")
    position = torch.arange(S).expand(B, S).clone()
    document, branch = torch.zeros_like(position), torch.zeros_like(position)
    if kind == "padded":  # each row with its own left padding
        for row in range(B):
            pad = data.draw(st.integers(0, S - 1), "pad")
            position[row] = (torch.arange(S) - pad).clamp(min=0)
            document[row, :pad] = -1
    if kind == "packed":
        restart = data.draw(st.booleans(), "positions restart")
        for row in range(B):
            starts = sorted(data.draw(st.sets(st.integers(1, S), max_size=3), "starts"))
            for number, start in enumerate(starts, 1):
                document[row, start:] = number
                if restart:
                    position[row, start:] = torch.arange(max(0, S - start))
    if kind == "branches":
        prefix = data.draw(st.integers(1, S), "prefix")
        branch[:, prefix:] = 1 + torch.arange(S - prefix) // 3
        position[:, prefix:] = prefix + torch.arange(S - prefix) % 3
    if kind == "strange":  # positions in random order and no layout: the mask depends on positions alone
        position = torch.randint(0, S, (B, S), generator=generator)
    layouts = (None, None)
    if kind not in ("plain", "strange"):
        layouts = (Layout(document[:, before:], branch[:, before:]), Layout(document, branch))
    visible = Visible((position[:, before:], layouts[0]), (position, layouts[1]), before)
    shapes = ((B, H, T, K), (B, G, S, K), (B, G, S, K))
    return visible, window, [2 * torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes], T


def results(attend, inputs, visible, window, dtype) -> list[torch.Tensor]:
    """The output and the gradients of a fixed weighting of it, as fp64."""
    inputs = [x.to(dtype).detach().requires_grad_() for x in inputs]
    out = attend(*inputs, visible, window)
    if visible.layout is not None:  # padding's output is undefined
        out = out * (visible.layout.document_BT >= 0)[:, None, :, None]
    weighting = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape)
    (out.double() * weighting).sum().backward()
    return [out.detach().double(), *(x.grad.double() for x in inputs)]


class SmallBlocks(FastAttend):
    """Fast attention with blocks small enough for these tests. Keeps every mask that it makes."""

    max_grouped, max_block, min_block = 4, 16, 4

    def __init__(self, masks=None) -> None:
        super().__init__()
        self.masks = [] if masks is None else masks

    def bias(self, *args) -> torch.Tensor:
        mask_B1TS = super().bias(*args)
        if not any(mask_B1TS is other for other in self.masks):
            self.masks.append(mask_B1TS)
        return mask_B1TS


def small_blocks(model) -> list[torch.Tensor]:
    """Give every layer SmallBlocks; returns the list that collects their masks."""
    masks: list[torch.Tensor] = []
    for block in model.model.layers:
        block.self_attn.attend = SmallBlocks(masks)
    return masks


@settings(max_examples=120, deadline=None)
@given(data=st.data())
def test_fast_equals_plain(data):
    attend = FastAttend()
    attend.max_block = data.draw(st.sampled_from([5, 16, 512]), "max_block")
    attend.min_block = data.draw(st.sampled_from([3, 128]), "min_block")
    attend.max_cached_mask = data.draw(st.sampled_from([0, 2**24]), "max_cached_mask")
    attend.max_grouped = data.draw(st.sampled_from([0, 4, 16]), "max_grouped")
    visible, window, inputs, _ = case(data)
    exact = results(PlainAttend(), inputs, visible, window, torch.float64)
    for _ in range(2):  # the second call uses the masks that the first one cached
        fast = results(attend, inputs, visible, window, torch.float64)
        for got, wanted in zip(fast, exact, strict=True):
            assert (got - wanted).abs().max() <= 1e-12 * wanted.abs().max().clamp(min=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 24])
@pytest.mark.parametrize("T", [3, 13, 100])
def test_fast_errs_at_most_twice_as_much_as_plain(T, window, dtype):
    generator = torch.Generator().manual_seed(T)
    inputs = [torch.randn(1, heads, T, 16, dtype=torch.float64, generator=generator) for heads in (4, 2, 2)]
    inputs = [x.to(dtype).double() for x in inputs]  # exact in `dtype`
    positions = torch.arange(T)[None]
    visible = Visible((positions, None), (positions, None), 0)
    exact = results(PlainAttend(), inputs, visible, window, torch.float64)
    plain = results(PlainAttend(), inputs, visible, window, dtype)
    fast = results(SmallBlocks(), inputs, visible, window, dtype)
    for name, e, p, f in zip(("out", "dq", "dk", "dv"), exact, plain, fast, strict=True):
        error, allowed = (f - e).square().mean().sqrt(), 2 * (p - e).square().mean().sqrt()
        assert error <= allowed, name


@pytest.mark.parametrize("family", FAMILIES)
def test_a_whole_model_on_the_fast_path(family):
    model, tokens = tiny(family), some_tokens(50)
    plain = model(tokens)
    assert (model.use_attention("fast")(tokens) - plain).abs().max() <= 1e-12 * plain.abs().max()
    small_blocks(model)
    assert (model(tokens) - plain).abs().max() <= 1e-12 * plain.abs().max()


def masks_made(model, tokens, **options) -> list[torch.Tensor]:
    """Every mask that a forward pass on the fast path makes, (B or 1, 1, queries, keys)."""
    masks = small_blocks(model)
    model(tokens, **options)
    return masks


def test_the_fast_path_never_holds_a_mask_of_all_queries():
    """O(T·W): with a window, a block's mask has fewer than W + block keys, and most blocks of all layers share one."""
    masks = masks_made(tiny("mistral"), some_tokens(400, 1))
    assert max(mask.shape[-1] for mask in masks) <= 4 + 8 - 1  # W = 8: blocks of 4 queries
    assert len(masks) == 3  # the first two blocks see fewer keys; all others share one mask


def test_a_text_within_the_window_needs_no_mask():
    assert masks_made(tiny("llama"), some_tokens(100, 1)) == []
    assert masks_made(tiny("mistral", sliding_window=50), some_tokens(50, 1)) == []
    assert masks_made(tiny("mistral", sliding_window=49), some_tokens(50, 1)) != []


def test_packed_documents_cost_their_own_squares():
    """Ten documents of 40 tokens in a row: a block of 16 queries sees keys of one or two of them."""
    document, position = torch.arange(400)[None] // 40, torch.arange(400)[None] % 40
    layout = Layout(document, torch.zeros_like(document))
    masks = masks_made(tiny("llama"), some_tokens(400, 1), positions=position, layout=layout)
    assert len(masks) == 25  # one per block, for all layers
    assert max(mask.shape[-1] for mask in masks) <= 80
    visible = Visible((position, layout), (position, layout), 0)
    assert reach(visible, None, slice(48, 64)) == slice(40, 64)
    assert reach(visible, 5, slice(48, 64)) == slice(44, 64)


def test_chunks_through_the_cache_equal_one_pass():
    """Chunked prefill of a long prompt."""
    model, tokens = tiny("mistral", sliding_window=9), some_tokens(70, 2)
    small_blocks(model)
    whole, cache = model(tokens), KVCache(model.config, slack=16)
    parts = torch.cat([model(part, cache=cache) for part in tokens.split(16, dim=1)], dim=1)
    assert (parts - whole).abs().max() <= 1e-12 * whole.abs().max()
