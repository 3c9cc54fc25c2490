"""Who sees whom, measured by changing one token and watching which outputs move; and the fast path against the plain.

The plain path is the specification. Equal means: in fp64 to 1e-12 of the largest value; in fp32 and bf16 the fast
path's error against fp64 is at most twice the plain path's, for outputs and for every gradient.
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
    """Positions whose logits move when one token is changed."""
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
    """x·rsqrt in fp32, cast to bf16, then times the weight: multiplying in fp32 rounds a quarter otherwise."""
    generator = torch.Generator().manual_seed(0)
    norm, x = RMSNorm(64, 1e-5).bfloat16(), torch.randn(50, 64, generator=generator).bfloat16()
    norm.weight.data = torch.randn(64, generator=generator).bfloat16()
    scaled = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-5)
    assert torch.equal(norm(x), norm.weight * scaled.bfloat16())
    late = (norm.weight.float() * scaled).bfloat16()
    assert 0.1 < (norm(x) != late).float().mean() < 0.5


def case(data) -> tuple[Visible, int | None, list[torch.Tensor], int]:
    """A random attention call: queries, keys, values, the mask's facts, the window."""
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
    if kind == "strange":  # positions in no order at all, and no layout: what is seen is a matter of positions alone
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
    if visible.layout is not None:  # what padding sees is nobody's business
        out = out * (visible.layout.document_BT >= 0)[:, None, :, None]
    weighting = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape)
    (out.double() * weighting).sum().backward()
    return [out.detach().double(), *(x.grad.double() for x in inputs)]


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr("model.fast_attention.BLOCK", 16)
    monkeypatch.setattr("model.fast_attention.LEAST", 4)
    monkeypatch.setattr(FastAttend, "few", 4)


@settings(max_examples=120, deadline=None)
@given(data=st.data())
def test_fast_equals_plain(data):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("model.fast_attention.BLOCK", data.draw(st.sampled_from([5, 16, 512]), "block"))
        patch.setattr("model.fast_attention.LEAST", data.draw(st.sampled_from([3, 128]), "least"))
        patch.setattr("model.fast_attention.KEPT", data.draw(st.sampled_from([0, 2**24]), "kept"))
        patch.setattr(FastAttend, "few", data.draw(st.sampled_from([0, 4, 16]), "few"))
        visible, window, inputs, _ = case(data)
        exact = results(PlainAttend(), inputs, visible, window, torch.float64)
        for _ in range(2):  # the second layer finds what the first one kept
            fast = results(FastAttend(), inputs, visible, window, torch.float64)
            for got, wanted in zip(fast, exact, strict=True):
                assert (got - wanted).abs().max() <= 1e-12 * wanted.abs().max().clamp(min=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 24])
@pytest.mark.parametrize("T", [3, 13, 100])
def test_fast_errs_at_most_twice_as_much_as_plain(T, window, dtype, small_blocks):
    generator = torch.Generator().manual_seed(T)
    inputs = [torch.randn(1, heads, T, 16, dtype=torch.float64, generator=generator) for heads in (4, 2, 2)]
    inputs = [x.to(dtype).double() for x in inputs]  # the same numbers for all three
    positions = torch.arange(T)[None]
    visible = Visible((positions, None), (positions, None), 0)
    exact = results(PlainAttend(), inputs, visible, window, torch.float64)
    plain = results(PlainAttend(), inputs, visible, window, dtype)
    fast = results(FastAttend(), inputs, visible, window, dtype)
    for name, e, p, f in zip(("out", "dq", "dk", "dv"), exact, plain, fast, strict=True):
        error, allowed = (f - e).square().mean().sqrt(), 2 * (p - e).square().mean().sqrt()
        assert error <= allowed, name


@pytest.mark.parametrize("family", FAMILIES)
def test_a_whole_model_on_the_fast_path(family, small_blocks):
    model, tokens = tiny(family), some_tokens(50)
    plain = model(tokens)
    assert (model.use_attention("fast")(tokens) - plain).abs().max() <= 1e-12 * plain.abs().max()


def blocks_asked(monkeypatch, model, tokens, **options) -> list[tuple[slice, slice]]:
    """The (queries, keys) of every mask that a pass on the fast path makes."""
    asked = []
    block = Visible.block
    monkeypatch.setattr(
        Visible, "block", lambda self, w, rows, columns: asked.append((rows, columns)) or block(self, w, rows, columns)
    )
    model.use_attention("fast")(tokens, **options)
    return asked


def test_the_fast_path_never_holds_a_mask_of_all_queries(monkeypatch, small_blocks):
    """O(T·W): with a window, no block asks for more than W + block keys; two masks serve all blocks of all layers."""
    asked = blocks_asked(monkeypatch, tiny("mistral"), some_tokens(400, 1))
    assert max(columns.stop - columns.start for _, columns in asked) <= 4 + 8 - 1  # W = 8: blocks of 4 queries
    assert len(asked) == 3  # the text's first two blocks, whose window reaches over its beginning, and all others


def test_a_text_that_sees_all_that_came_before_needs_no_mask(monkeypatch, small_blocks):
    assert blocks_asked(monkeypatch, tiny("llama"), some_tokens(100, 1)) == []
    assert blocks_asked(monkeypatch, tiny("mistral", sliding_window=50), some_tokens(50, 1)) == []
    assert blocks_asked(monkeypatch, tiny("mistral", sliding_window=49), some_tokens(50, 1)) != []


def test_packed_documents_cost_their_own_squares(monkeypatch, small_blocks):
    """Ten documents of 40 tokens in a row: a block of 16 queries meets the keys of one or two of them."""
    document, position = torch.arange(400)[None] // 40, torch.arange(400)[None] % 40
    layout = Layout(document, torch.zeros_like(document))
    asked = blocks_asked(monkeypatch, tiny("llama"), some_tokens(400, 1), positions=position, layout=layout)
    assert len(asked) == 25  # once a block, whatever the number of layers
    assert max(columns.stop - columns.start for _, columns in asked) <= 80
    visible = Visible((position, layout), (position, layout), 0)
    assert reach(visible, None, slice(48, 64)) == slice(40, 64)
    assert reach(visible, 5, slice(48, 64)) == slice(44, 64)


def test_chunks_through_the_cache_equal_one_pass(small_blocks):
    """A long prompt read in pieces, as generation reads it."""
    model, tokens = tiny("mistral", sliding_window=9).use_attention("fast"), some_tokens(70, 2)
    whole, cache = model(tokens), KVCache(model.config, slack=16)
    parts = torch.cat([model(part, cache=cache) for part in tokens.split(16, dim=1)], dim=1)
    assert (parts - whole).abs().max() <= 1e-12 * whole.abs().max()
