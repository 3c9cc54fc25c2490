"""FlexAttention: its mask function is model/mask.py's rule, its block mask holds exactly the blocks with visible pairs,
and it is compiled once per length. Forward only, on a CPU."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import flex_attention

from model.attention import PlainAttend
from model.flex import BLOCK, attend, block_mask, bucket, labels, mask_mod
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


@settings(max_examples=200, deadline=None)
@given(rows())
def test_the_mask_function_is_the_rule_for_every_pair_and_padding_is_masked(given_rows):
    visible, window = given_rows
    query_3BT = labels(visible.position_BT, visible.layout, -2)
    key_3BS = labels(visible.key_position_BS, visible.key_layout, -3)
    (_, B, T), S = query_3BT.shape, key_3BS.shape[2]
    b_B11, i_1T1, j_11S = (torch.arange(n) for n in (B, T, S))
    seen_BTS = mask_mod(query_3BT, key_3BS, window)(b_B11[:, None, None], b_B11, i_1T1[:, None], j_11S)
    expected_BTS = torch.zeros(B, T, S, dtype=torch.bool)
    own_BTS = visible.mask(window)
    expected_BTS[:, : own_BTS.shape[1], : own_BTS.shape[2]] = own_BTS
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
def test_other_rows_of_a_length_are_not_compiled_again():
    compiles = []

    def counted(graph, inputs):
        compiles.append(graph)
        return graph.forward

    torch._dynamo.reset()
    flex = torch.compile(flex_attention, dynamic=False, backend=counted)
    generator = torch.Generator().manual_seed(3)
    for lengths in ([100, 120], [60, 150], [200], [129]):
        visible = packed(lengths)
        T = sum(lengths)
        q, k, v = (torch.randn(1, 2, T, 16, dtype=torch.float64, generator=generator) for _ in range(3))
        ours, truth = attend(q, k, v, visible, None, flex), PlainAttend()(q, k, v, visible, None)
        assert float((ours - truth).abs().max()) <= 1e-12 * float(truth.abs().max())
    assert len(compiles) == 1
