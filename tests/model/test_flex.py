"""FlexAttention: its mask function is model/mask.py's rule, its block mask holds exactly the blocks with visible pairs,
and it is compiled once per length. Forward only, on a CPU."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import flex_attention

from model.attention import PlainAttend
from model.flex import BLOCK, attend, block_mask, bucket, compiled
from model.mask import Layout, Visible


@st.composite
def rows(draw, most=10):
    """A pass over rows of any labels: positions in any order, documents and branches in pieces, or none at all."""
    B, T, before = draw(st.integers(1, 2)), draw(st.integers(1, most)), draw(st.integers(0, 4))
    S = before + T

    def numbers(low, high):
        return torch.tensor(
            draw(st.lists(st.lists(st.integers(low, high), min_size=S, max_size=S), min_size=B, max_size=B))
        )

    position_BS = numbers(0, 6)
    key, query = None, None
    if draw(st.booleans()):
        document_BS, branch_BS = numbers(-1, 2), numbers(0, 2)
        key, query = Layout(document_BS, branch_BS), Layout(document_BS[:, before:], branch_BS[:, before:])
    window = draw(st.sampled_from([None, 1, 2, 5]))
    return Visible((position_BS[:, before:], query), (position_BS, key), before), window


@settings(max_examples=100, deadline=None)
@given(rows())
def test_the_mask_function_is_the_rule_for_every_pair_and_padding_is_masked(given_rows):
    visible, window = given_rows
    own_BTS = visible.mask(window)
    B, T, S = own_BTS.shape
    expected_BTS = F.pad(own_BTS, (0, bucket(S) - S, 0, bucket(T) - T))
    b_B, i_T, j_S = (torch.arange(n) for n in expected_BTS.shape)
    seen_BTS = block_mask(visible, window).mask_mod(b_B[:, None, None], b_B, i_T[:, None], j_S)
    assert torch.equal(seen_BTS, expected_BTS)


def packed(lengths, branches=0, of=0):
    """One row of documents, each a prefix, the last with branches behind it."""
    document, branch, position = [], [], []
    for number, length in enumerate(lengths):
        document += [number] * length
        branch += [0] * length
        position += range(length)
    for number in range(1, branches + 1):
        document += [len(lengths) - 1] * of
        branch += [number] * of
        position += range(lengths[-1], lengths[-1] + of)
    layout = Layout(torch.tensor([document]), torch.tensor([branch]))
    return Visible((torch.tensor([position]), layout), (torch.tensor([position]), layout), 0)


@pytest.mark.parametrize(
    ("visible", "window", "most"),
    [
        (packed([512] * 8), None, 8 * 10),  # 4 · 5 / 2 blocks a document, of the row's 32²
        (packed([400], branches=8, of=40), None, 29),  # the prefix's triangle, then each branch on prefix and itself
        (packed([4096]), 256, 32 * 3),
    ],
)
def test_only_blocks_with_visible_pairs_are_computed(visible, window, most):
    blocks = block_mask(visible, window)
    assert blocks is block_mask(visible, window)  # once for all layers
    seen_TS = visible.mask(window)[0]
    size = bucket(len(seen_TS))
    padded_TS = torch.zeros(size, size, dtype=torch.bool)
    padded_TS[: len(seen_TS), : len(seen_TS)] = seen_TS
    needed = padded_TS.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK)).any(3).any(1)
    assert torch.equal(blocks.to_dense()[0, 0].bool(), needed)
    assert int(needed.sum()) <= most


@pytest.mark.parametrize("window", [None, 30])
@pytest.mark.parametrize("heads", [(4, 2), (3, 3)])
def test_attention_is_the_plain_one(window, heads):
    visible = packed([37, 90], branches=3, of=11)
    generator = torch.Generator().manual_seed(3)
    q, k, v = (
        torch.randn(1, n, 160, 16, dtype=torch.float64, generator=generator) for n in (heads[0], heads[1], heads[1])
    )
    truth = PlainAttend()(q, k, v, visible, window)
    ours = attend(q, k, v, visible, window, flex_attention)
    assert float((ours - truth).abs().max()) <= 1e-12 * float(truth.abs().max())


def test_lengths_are_few_and_at_most_an_eighth_more():
    lengths = [bucket(n) for n in range(1, 32769)]
    assert all(n <= length <= max(128, 9 * n // 8 + 128) and length % BLOCK == 0 for n, length in enumerate(lengths, 1))
    assert len(set(lengths)) <= 8 * 8 and bucket(4096) == 4096 and bucket(2048) == 2048


@pytest.mark.slow
def test_each_length_is_compiled_once_also_the_ninth():
    compiles, runs = [], []

    def counted(graph, inputs):
        compiles.append(graph)
        return lambda *given: runs.append(graph) or graph.forward(*given)

    torch._dynamo.reset()
    flex = compiled(counted)
    generator = torch.Generator().manual_seed(3)
    rows = [[100, 120], [60, 150], [200], [129], *([128 * n] for n in range(3, 13))]
    for lengths in rows:
        visible = packed(lengths)
        T = sum(lengths)
        q, k, v = (torch.randn(1, 2, T, 16, dtype=torch.float64, generator=generator) for _ in range(3))
        ours, truth = attend(q, k, v, visible, None, flex), PlainAttend()(q, k, v, visible, None)
        assert float((ours - truth).abs().max()) <= 1e-12 * float(truth.abs().max())
    assert len(compiles) == len({bucket(sum(lengths)) for lengths in rows}) > 8 and len(runs) == len(rows)
