"""Attention from absolute positions: windows, rolling caches, levels of shared prefixes, against fp64."""

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from kernels.attention import Level, tree_attention, tree_attention_definition
from kernels.launch import assume_card, recording
from kernels.proof.cases import Make, attention, wide

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
HEADS = [(1, 1), (4, 1), (6, 2), (4, 4)]


def normal(generator, *shape, dtype, device):
    return torch.randn(*shape, generator=generator).to(dtype).to(device)


def case(B, heads, T, S, K, dtype, device, P=0, seed=0):
    """A rolling cache with slots in random order, a fifth of them empty; queries at the last positions; two levels of
    prefixes."""
    H, G = heads
    generator = torch.Generator().manual_seed(seed + B * 7 + S * 13 + K)
    make = lambda *shape: normal(generator, *shape, dtype=dtype, device=device)  # noqa: E731
    slots = torch.stack([torch.randperm(S, generator=generator) for _ in range(B)]) + P if S else torch.zeros(B, 0)
    slots = slots.long().masked_fill(torch.rand(B, S, generator=generator) < 0.2, -1)
    positions = (torch.full((B, 1), P + S - T) + torch.arange(T)).clamp(min=0)
    levels = tree(B, P, lambda m, n: make(m, G, n, K), device) if P else ()
    return make(B, H, T, K), make(B, G, S, K), make(B, G, S, K), positions.to(device), slots.to(device), levels


def tree(B, P, make, device):
    """P tokens in two levels. All rows share the first; each half of the rows shares a node of the second. The second
    half's node is three tokens shorter, and of three or more rows the last one shares neither node."""
    cut, half = P // 3, B // 2
    int32 = lambda *values: torch.tensor(values, dtype=torch.int32, device=device)  # noqa: E731
    positions = torch.arange(cut, P, dtype=torch.int32, device=device).repeat(2, 1)
    positions[1, -3:] = -1
    first = Level(make(1, cut), make(1, cut), positions.new_tensor([[*range(cut)]]), int32(0), int32(B), B)
    last = B - (B > 2)
    second = Level(make(2, P - cut), make(2, P - cut), positions, int32(0, half), int32(half, last - half), B - half)
    return first, second


@settings(max_examples=24, deadline=None, derandomize=True, phases=[Phase.generate])
@given(
    st.sampled_from([1, 3, 20]),
    st.sampled_from(HEADS),
    st.sampled_from([1, 2, 5]),
    st.sampled_from([5, 33, 130]),
    st.sampled_from([64, 80, 128]),
    st.sampled_from(DTYPES),
    st.sampled_from([None, 1, 7, 64]),
    st.sampled_from([0, 50]),
    st.sampled_from([0, 12]),
)
def test_decoding_is_as_good_as_pytorchs(device, as_good_as, B, heads, T, S, K, dtype, window, P, sms):
    q, k, v, i, j, levels = case(B, heads, T, S, K, dtype, device, P)
    with assume_card(80, sms):  # no split of the keys, or many
        mine = tree_attention(q, k, v, i, j, window, levels)
    theirs = tree_attention_definition(q, k, v, i, j, window, levels)
    as_good_as(mine, theirs, tree_attention_definition(*map(wide, (q, k, v)), i, j, window, wide(levels)))


def test_a_window_of_w_sees_w_keys(device):
    """Values are one-hot by position, so the nonzero outputs are the attended positions."""
    S, W = 40, 7
    v = torch.eye(64, device=device)[:S][None, None]
    k, q = torch.zeros(1, 1, S, 64, device=device), torch.zeros(1, 1, 1, 64, device=device)
    for i in (3, 6, 7, 39):
        position, slots = torch.tensor([[i]], device=device), torch.arange(S, device=device)[None]
        attended = tree_attention(q, k, v, position, slots, W)[0, 0, 0].nonzero()[:, 0].tolist()
        assert attended == list(range(max(0, i - W + 1), i + 1))


def test_a_query_without_keys_returns_zeros(device):
    q, k, v, i, j, levels = case(3, (4, 2), 1, 33, 64, torch.float32, device, 50)
    empty = [Level(n.k_MGPK, n.v_MGPK, n.position_MP * 0 - 1, n.first_M, n.count_M, n.max_count) for n in levels]
    assert not tree_attention(q, k, v, i, torch.full_like(j, -1), None, empty).any()


def test_shared_prefixes_equal_copies_of_their_keys(device):
    """More rows than a tile has under one prefix, each half under another, and a window that starts in the first."""
    q, k, v, i, j, (trunk, halves) = case(20, (4, 2), 1, 9, 64, torch.float32, device, P=70)
    node_B = torch.tensor([0] * 10 + [1] * 10, device=device)
    keys, values = (
        torch.cat([getattr(trunk, name).expand(20, -1, -1, -1), getattr(halves, name)[node_B], own], 2)
        for name, own in (("k_MGPK", k), ("v_MGPK", v))
    )
    positions = halves.position_MP[node_B].clone()
    positions[19] = -1  # the last row shares neither half's prefix
    slots = torch.cat([trunk.position_MP.expand(20, -1), positions, j], dim=1)
    with assume_card(80, 4):
        shared = tree_attention(q, k, v, i, j, 60, (trunk, halves))
        copied = tree_attention(q, keys, values, i, slots, 60)
    assert torch.allclose(shared, copied, rtol=0, atol=2e-6)


def test_the_prefixes_of_a_level_are_one_launch():
    with recording() as calls:
        attention(Make("meta", torch.bfloat16), rows=16, own=256, prefix=1500)[0]()
    assert [call.kernel.__name__ for call in calls] == ["_partial", "_partial", "_merge"]


def test_mistakes_are_refused(device):
    q, k, v, i, j, _ = case(1, (4, 2), 1, 33, 64, torch.float32, device)
    with pytest.raises(ValueError, match="window 0 must be at least 1"):
        tree_attention(q, k, v, i, j, 0)
    with pytest.raises(ValueError, match="no backward pass"):
        tree_attention(q.requires_grad_(), k, v, i, j)
    with pytest.raises(ValueError, match="must be \\(B, H, T, K\\)"):
        tree_attention(q[:, :3].detach(), k, v, i, j)
