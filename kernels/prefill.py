"""Attention of many tokens at once, with a window and documents, reading only the blocks that can be seen.

Key j of document e and branch c is seen by query i of document d and branch b when

    e = d ≥ 0,   c = 0 or c = b,   0 ≤ j,   i − W < j ≤ i          (i, j absolute positions)

A mask of T × S decides nothing by itself: what saves time is not computing what it hides. For 4,096 tokens and a window
of 512, 13 % of the causal half is visible. So before the launch each block of queries gets the first and the last block
of keys that it can reach, from the ranges of positions and documents that the blocks hold: a block of keys is out of
reach when all its positions lie after the queries' last, or at or before the queries' first minus W, or when its
documents' range does not meet theirs. The program then walks only those blocks; the exact mask is applied inside. The
cost is O(T · (W + block)) and, for packed rows, O(Σ length²) of the documents instead of (Σ length)².

Nothing is assumed about the order of positions: chunks from any start, packed documents that restart at 0, and branches
that continue one trunk give ranges that are merely less tight.

Within a block it is flash attention (arXiv 2205.14135): running maximum and sum, as in decode_attention. Forward only.
A query that sees no key (padding) gives zeros.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.decode import _check, attention_definition, last_stride_1, seen_by_position
from kernels.launch import config, divide_up, jit, launch, power_of_2, runs_here, tl, width

FAR = 2**30  # past every position and document


def prefill_attention_definition(
    q_BHTK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, position_BT: Tensor, key_position_BS: Tensor,
    window: int | None = None, layout: tuple[Tensor, Tensor] | None = None,
    key_layout: tuple[Tensor, Tensor] | None = None,
) -> Tensor:  # fmt: skip
    seen_BTS = seen_by_position(position_BT, key_position_BS, window)
    if layout is not None and key_layout is not None:
        (document_BT, branch_BT), (key_document_BS, key_branch_BS) = layout, key_layout
        seen_BTS &= (document_BT[:, :, None] == key_document_BS[:, None]) & (key_document_BS >= 0)[:, None]
        seen_BTS &= (key_branch_BS == 0)[:, None] | (branch_BT[:, :, None] == key_branch_BS[:, None])
    return attention_definition(q_BHTK, k_BGSK, v_BGSK, seen_BTS)


@jit
def _prefill(
    q, k, v, out, position, key_position, document, key_document, branch, key_branch, first, last,
    T, S, K, W, H, SHARE, scale, q_b, q_h, q_t, k_b, k_g, k_s, v_b, v_g, v_s, o_b, o_h, o_t,
    WINDOW: tl.constexpr, LAYOUT: tl.constexpr, BT: tl.constexpr, BS: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    b = (tl.program_id(1) // H).to(tl.int64)
    h = (tl.program_id(1) % H).to(tl.int64)
    g = h // SHARE
    tile = tl.program_id(0)
    t = tile * BT + tl.arange(0, BT)
    c = tl.arange(0, BK)
    in_t, in_c = t < T, c < K
    q_at = q + b * q_b + h * q_h + t[:, None].to(tl.int64) * q_t + c[None, :]
    q_TK = tl.load(q_at, mask=in_t[:, None] & in_c[None, :], other=0.0)
    i = tl.load(position + b * T + t, mask=in_t, other=-1)
    if LAYOUT:
        d = tl.load(document + b * T + t, mask=in_t, other=-1)
        own = tl.load(branch + b * T + t, mask=in_t, other=0)
    top = tl.full([BT], float("-inf"), tl.float32)
    total = tl.zeros([BT], tl.float32)
    sum_TK = tl.zeros([BT, BK], tl.float32)
    bounds = b * tl.num_programs(0) + tile
    for block in range(tl.load(first + bounds), tl.load(last + bounds)):
        s = block * BS + tl.arange(0, BS)
        in_s = s < S
        j = tl.load(key_position + b * S + s, mask=in_s, other=-1)
        k_at = k + b * k_b + g * k_g + s[None, :].to(tl.int64) * k_s + c[:, None]
        k_KS = tl.load(k_at, mask=in_c[:, None] & in_s[None, :], other=0.0)
        score = tl.dot(q_TK, k_KS, input_precision="ieee") * scale
        seen = (j >= 0)[None, :] & (j[None, :] <= i[:, None])
        if WINDOW:
            seen = seen & (j[None, :] > i[:, None] - W)
        if LAYOUT:
            e = tl.load(key_document + b * S + s, mask=in_s, other=-1)
            other = tl.load(key_branch + b * S + s, mask=in_s, other=0)
            seen = seen & (e[None, :] == d[:, None]) & (e >= 0)[None, :]
            seen = seen & ((other == 0)[None, :] | (other[None, :] == own[:, None]))
        score = tl.where(seen, score, float("-inf"))
        higher = tl.maximum(top, tl.max(score, axis=1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        share = tl.exp(score - base[:, None])
        fade = tl.exp(top - base)
        v_at = v + b * v_b + g * v_g + s[:, None].to(tl.int64) * v_s + c[None, :]
        v_SK = tl.load(v_at, mask=in_s[:, None] & in_c[None, :], other=0.0)
        total = total * fade + tl.sum(share, axis=1)
        sum_TK = tl.dot(share.to(v_SK.dtype), v_SK, sum_TK * fade[:, None], input_precision="ieee")
        top = higher
    divisor = tl.where(total == 0.0, 1.0, total)
    out_at = out + b * o_b + h * o_h + t[:, None].to(tl.int64) * o_t + c[None, :]
    tl.store(out_at, sum_TK / divisor[:, None], mask=in_t[:, None] & in_c[None, :])


def _range(value_BN: Tensor, live_BN: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """(least, greatest) live value in each block of columns; (FAR, −FAR) where a block holds none."""
    B, N = value_BN.shape
    padding = (0, divide_up(N, block) * block - N)
    low = torch.nn.functional.pad(value_BN.masked_fill(~live_BN, FAR), padding, value=FAR)
    high = torch.nn.functional.pad(value_BN.masked_fill(~live_BN, -FAR), padding, value=-FAR)
    return low.view(B, -1, block).amin(2), high.view(B, -1, block).amax(2)


def blocks_in_reach(
    position_BT: Tensor, key_position_BS: Tensor, window: int | None, documents: tuple[Tensor, Tensor] | None,
    block_t: int, block_s: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(first, last) block of keys for each block of queries, as int32 (B, query blocks); first = last: none."""
    live_BT, live_BS = position_BT >= 0, key_position_BS >= 0
    if documents is not None:
        live_BT, live_BS = live_BT & (documents[0] >= 0), live_BS & (documents[1] >= 0)
    low_q, high_q = (r[:, :, None] for r in _range(position_BT, live_BT, block_t))
    low_k, high_k = (r[:, None, :] for r in _range(key_position_BS, live_BS, block_s))
    reach = low_k <= high_q
    if window is not None:
        reach &= high_k > low_q - window
    if documents is not None:
        low_d, high_d = (r[:, :, None] for r in _range(documents[0], live_BT, block_t))
        low_e, high_e = (r[:, None, :] for r in _range(documents[1], live_BS, block_s))
        reach &= (low_e <= high_d) & (high_e >= low_d)
    some, blocks = reach.any(2), reach.shape[2]
    first = reach.int().argmax(2)
    last = blocks - reach.flip(2).int().argmax(2)
    return torch.where(some, first, 0).int(), torch.where(some, last, 0).int()


def prefill_attention(
    q_BHTK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, position_BT: Tensor, key_position_BS: Tensor,
    window: int | None = None, layout: tuple[Tensor, Tensor] | None = None,
    key_layout: tuple[Tensor, Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """Attention of many queries: (B, H, T, K) in q's dtype; no gradients.

    position_BT and key_position_BS hold absolute positions (−1: a key that nobody sees); `window` is W or None;
    `layout` and `key_layout` are (document, branch) of the queries and of the keys (int64, (B, T) and (B, S); document
    −1 is padding), both or neither. The visibility rule stands at the top of this file.
    """
    _check(q_BHTK, k_BGSK, v_BGSK, position_BT, key_position_BS, window)
    if (layout is None) != (key_layout is None):
        raise ValueError("a layout is given for queries and keys, or for neither")
    if not runs_here(q_BHTK, k_BGSK, v_BGSK):
        return prefill_attention_definition(
            q_BHTK, k_BGSK, v_BGSK, position_BT, key_position_BS, window, layout, key_layout
        )
    (B, H, T, K), (G, S) = q_BHTK.shape, k_BGSK.shape[1:3]
    BK = max(16, power_of_2(K))
    tiles = config("prefill_attention", f"{width(q_BHTK.dtype)}/{'256' if BK > 128 else '128'}")
    documents = None if layout is None or key_layout is None else (layout[0], key_layout[0])
    first, last = blocks_in_reach(position_BT, key_position_BS, window, documents, tiles["BT"], tiles["BS"])
    q, k, v = last_stride_1(q_BHTK), last_stride_1(k_BGSK), last_stride_1(v_BGSK)
    narrow = lambda t: t.to(torch.int32).contiguous()  # noqa: E731
    i, j = narrow(position_BT), narrow(key_position_BS)
    d, own, e, other = (i, i, j, j) if layout is None else map(narrow, (*layout, *key_layout))
    out_BHTK = q.new_empty(B, T, H, K).transpose(1, 2)  # as the output projection wants it: heads side by side
    arguments = dict(
        q=q, k=k, v=v, out=out_BHTK, position=i, key_position=j, document=d, key_document=e, branch=own,
        key_branch=other, first=first, last=last, T=T, S=S, K=K, W=window or 0, H=H, SHARE=H // G, scale=K**-0.5,
        q_b=q.stride(0), q_h=q.stride(1), q_t=q.stride(2), k_b=k.stride(0), k_g=k.stride(1), k_s=k.stride(2),
        v_b=v.stride(0), v_g=v.stride(1), v_s=v.stride(2),
        o_b=out_BHTK.stride(0), o_h=out_BHTK.stride(1), o_t=out_BHTK.stride(2),
    )  # fmt: skip
    meta = dict(WINDOW=window is not None, LAYOUT=layout is not None, BK=BK, **tiles)
    launch(_prefill, (divide_up(T, tiles["BT"]), B * H), arguments, **meta)
    return out_BHTK
