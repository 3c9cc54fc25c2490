"""Attention from absolute positions: windows, rolling caches, shared prefixes, documents and branches, against fp64."""

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from kernels.decode import decode_attention, decode_attention_definition
from kernels.launch import CONFIGS
from kernels.prefill import blocks_in_reach, prefill_attention, prefill_attention_definition

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
HEADS = [(1, 1), (4, 1), (6, 2), (4, 4)]


def normal(generator, *shape, dtype, device):
    return torch.randn(*shape, generator=generator).to(dtype).to(device)


def decode_case(B, heads, T, S, K, dtype, device, P=0, seed=0):
    """A rolling cache: slots in random order, a fifth of them empty, the queries after them."""
    H, G = heads
    generator = torch.Generator().manual_seed(seed + B * 7 + S * 13 + K)
    make = lambda *shape: normal(generator, *shape, dtype=dtype, device=device)  # noqa: E731
    slots = torch.stack([torch.randperm(S, generator=generator) for _ in range(B)]) + P if S else torch.zeros(B, 0)
    slots = slots.long().masked_fill(torch.rand(B, S, generator=generator) < 0.2, -1)
    positions = (torch.full((B, 1), P + S - T) + torch.arange(T)).clamp(min=0)
    prefixes = tree(B, P, lambda n: make(G, n, K), device) if P else ()
    return make(B, H, T, K), make(B, G, S, K), make(B, G, S, K), positions.to(device), slots.to(device), prefixes


def tree(B, P, make, device):
    """P tokens in two stretches: the first is everybody's, the second has another copy for the last rows."""
    cut = P // 3
    first, second = torch.arange(cut).to(device), torch.arange(cut, P).to(device)
    one = (slice(None), make(cut), make(cut), first)
    parts = [rows for rows in (slice(0, B // 2), slice(B // 2, B)) if rows.stop > rows.start]
    return (one, *((rows, make(P - cut), make(P - cut), second) for rows in parts))


def wide(value):
    if isinstance(value, tuple):
        return tuple(wide(v) for v in value)
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


@settings(max_examples=30, deadline=None, derandomize=True, phases=[Phase.generate])
@given(
    st.sampled_from([1, 3]), st.sampled_from(HEADS), st.sampled_from([1, 2, 5]), st.sampled_from([5, 33, 130, 300]),
    st.sampled_from([64, 80, 128]), st.sampled_from(DTYPES), st.sampled_from([None, 1, 7, 64]),
    st.sampled_from([0, 50]), st.sampled_from([1, 432]),
)  # fmt: skip
def test_decoding_is_as_good_as_pytorchs(device, as_good_as, B, heads, T, S, K, dtype, window, P, programs):
    q, k, v, i, j, prefixes = decode_case(B, heads, T, S, K, dtype, device, P)
    with pytest.MonkeyPatch.context() as patch:  # one program walks all keys, or each one block
        for tiles in CONFIGS["decode_attention"].values():
            patch.setitem(tiles, "PROGRAMS", programs)
        mine = decode_attention(q, k, v, i, j, window, prefixes)
    theirs = decode_attention_definition(q, k, v, i, j, window, prefixes)
    as_good_as(mine, theirs, decode_attention_definition(*map(wide, (q, k, v)), i, j, window, wide(prefixes)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_heads_of_256(device, as_good_as, dtype):
    q, k, v, i, j, prefixes = decode_case(2, (2, 1), 1, 40, 256, dtype, device, 20)
    truth = decode_attention_definition(*map(wide, (q, k, v)), i, j, 16, wide(prefixes))
    as_good_as(
        decode_attention(q, k, v, i, j, 16, prefixes), decode_attention_definition(q, k, v, i, j, 16, prefixes), truth
    )
    truth = prefill_attention_definition(*map(wide, (q, k, v)), i, j, 16)
    as_good_as(prefill_attention(q, k, v, i, j, 16), prefill_attention_definition(q, k, v, i, j, 16), truth)


def test_a_window_of_w_sees_w_keys(device):
    """Values are one-hot by position, so the output names the keys that were seen."""
    S, W = 40, 7
    v = torch.eye(64, device=device)[:S][None, None]
    k, q = torch.zeros(1, 1, S, 64, device=device), torch.zeros(1, 1, 1, 64, device=device)
    for i in (3, 6, 7, 39):
        place, slots = torch.tensor([[i]], device=device), torch.arange(S, device=device)[None]
        for attend in (decode_attention, prefill_attention):
            seen = attend(q, k, v, place, slots, W)[0, 0, 0].nonzero()[:, 0].tolist()
            assert seen == list(range(max(0, i - W + 1), i + 1))


def test_a_query_that_sees_nothing_gives_zeros(device):
    q, k, v, i, j, _ = decode_case(1, (4, 2), 1, 33, 64, torch.float32, device)
    for attend in (decode_attention, prefill_attention):
        assert not attend(q, k, v, i, torch.full_like(j, -1)).any()


def test_shared_prefixes_are_the_same_keys_stored_once(device):
    """More rows than a tile holds over one prefix, each half over one more, a window that begins in the first."""
    q, k, v, i, j, prefixes = decode_case(20, (4, 2), 1, 9, 64, torch.float32, device, P=70)
    assert [rows for rows, *_ in prefixes] == [slice(None), slice(0, 10), slice(10, 20)]
    (_, *trunk), *halves = prefixes
    keys, values = (
        torch.cat([trunk[n].expand(20, -1, -1, -1), torch.cat([p[1 + n].expand(10, -1, -1, -1) for p in halves]), t], 2)
        for n, t in enumerate((k, v))
    )
    slots = torch.cat([torch.arange(70, device=device).expand(20, 70), j], dim=1)
    together = decode_attention(q, k, v, i, j, 60, prefixes)
    assert torch.allclose(together, decode_attention(q, keys, values, i, slots, 60), rtol=0, atol=2e-6)


def packed(lengths, T, device):
    """Documents one after another, positions restarting, the rest padding."""
    document = torch.cat([torch.full((n,), d) for d, n in enumerate(lengths)] + [torch.full((T - sum(lengths),), -1)])
    position = torch.cat([torch.arange(n) for n in lengths] + [torch.zeros(T - sum(lengths)).long()])
    return position[None].to(device), document[None].to(device), torch.zeros(1, T, dtype=torch.int64, device=device)


@settings(max_examples=25, deadline=None, derandomize=True, phases=[Phase.generate])
@given(
    st.sampled_from([1, 2]), st.sampled_from(HEADS), st.sampled_from([1, 33, 130]), st.sampled_from([0, 1, 70]),
    st.sampled_from([64, 80]), st.sampled_from(DTYPES), st.sampled_from([None, 1, 16, 63, 64, 65]),
)  # fmt: skip
def test_prefill_from_any_start_is_as_good_as_pytorchs(device, as_good_as, B, heads, T, start, K, dtype, window):
    (H, G), S = heads, start + T
    generator = torch.Generator().manual_seed(T * 7 + S)
    q = normal(generator, B, T, H, K, dtype=dtype, device=device).transpose(1, 2)  # heads split off a projection
    k, v = (normal(generator, B, G, S, K, dtype=dtype, device=device) for _ in range(2))
    i = torch.arange(start, S, device=device).expand(B, T)
    j = torch.arange(S, device=device).expand(B, S)
    mine, theirs = prefill_attention(q, k, v, i, j, window), prefill_attention_definition(q, k, v, i, j, window)
    as_good_as(mine, theirs, prefill_attention_definition(*map(wide, (q, k, v)), i, j, window))


@settings(max_examples=12, deadline=None, derandomize=True, phases=[Phase.generate])
@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=6), st.sampled_from(DTYPES), st.sampled_from([None, 5, 40]),
    st.integers(0, 9),
)  # fmt: skip
def test_documents_and_branches_are_as_good_as_pytorchs(device, as_good_as, lengths, dtype, window, padding):
    T = sum(lengths) + padding
    generator = torch.Generator().manual_seed(T)
    q, k, v = (normal(generator, 1, h, T, 64, dtype=dtype, device=device) for h in (4, 2, 2))
    i, document, branch = packed(lengths, T, device)
    for start in range(0, T, 11):  # some stretches are branches of their document
        branch[0, start : start + 5] = start % 4
    layout = (document, branch)
    mine = prefill_attention(q, k, v, i, i, window, layout, layout)
    theirs = prefill_attention_definition(q, k, v, i, i, window, layout, layout)
    as_good_as(mine, theirs, prefill_attention_definition(*map(wide, (q, k, v)), i, i, window, layout, layout))
    assert not mine[:, :, T - padding :].any()


def test_a_token_never_sees_another_document(device):
    T = 90
    q, k, v = (
        normal(torch.Generator().manual_seed(n), 1, 2, T, 64, dtype=torch.float32, device=device) for n in range(3)
    )
    i, document, branch = packed([40, 50], T, device)
    before = prefill_attention(q, k, v, i, i, None, (document, branch), (document, branch))
    k[:, :, :40], v[:, :, :40] = 1e3, 1e3
    after = prefill_attention(q, k, v, i, i, None, (document, branch), (document, branch))
    assert torch.equal(before[:, :, 40:], after[:, :, 40:]) and not torch.equal(before, after)


def test_blocks_out_of_reach_are_never_read(device):
    """Not a number farther away than the window and a block would spoil any sum that it enters."""
    tiles = CONFIGS["prefill_attention"]["32/128"]
    T, W = 400, 20
    q, k, v = (
        normal(torch.Generator().manual_seed(n), 1, 1, T, 64, dtype=torch.float32, device=device) for n in range(3)
    )
    i = torch.arange(T, device=device)[None]
    whole = prefill_attention(q, k, v, i, i, W)
    reach = 300 - W - 2 * max(tiles["BT"], tiles["BS"])
    k[:, :, :reach], v[:, :, :reach] = float("nan"), float("nan")
    assert torch.equal(prefill_attention(q, k, v, i, i, W)[:, :, 300:], whole[:, :, 300:])


def test_the_cost_of_a_window_grows_with_the_window_and_of_packing_with_the_documents():
    T, block = 4096, 64
    i = torch.arange(T)[None]

    def visited(window, documents, position=i):
        first, last = blocks_in_reach(position, position, window, documents, block, block)
        return int((last - first).sum())

    blocks = T // block
    assert visited(None, None) == blocks * (blocks + 1) // 2
    assert visited(512, None) <= blocks * (512 // block + 1)
    document = i // 256
    assert visited(None, (document, document), i % 256) <= blocks * (256 // block)


def test_mistakes_are_refused(device):
    q, k, v, i, j, _ = decode_case(1, (4, 2), 1, 33, 64, torch.float32, device)
    with pytest.raises(ValueError, match="at least the query's own key"):
        decode_attention(q, k, v, i, j, 0)
    with pytest.raises(ValueError, match="no backward pass"):
        prefill_attention(q.requires_grad_(), k, v, i, j)
    with pytest.raises(ValueError, match="not \\(B, H, T, K\\)"):
        decode_attention(q[:, :3].detach(), k, v, i, j)
