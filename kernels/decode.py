"""Attention of a few new tokens over a long cache: split, grouped, windowed, with shared prefixes.

A query at position i sees the key at position j when 0 ≤ j and i − W < j ≤ i. Slots carry absolute positions and may
stand in any order (a rolling cache); a slot that a row must not see (empty, padding, another branch) has position −1.

Three observations make the kernel.

* One query does 4 operations per key value read, so the time is the time of reading the cache once. All H/G query heads
  of a key/value head (times T queries) are rows of one tile, so keys and values are read once for all of them.
* B · G tiles (8 for Mistral and one row) cannot fill 108 processors. So the cache is split among programs, each giving
  a partial result o_i = Σ_j exp(l_j − t_i) v_j / s_i with t_i the largest score and s_i = Σ_j exp(l_j − t_i).
* Partial results over disjoint keys merge exactly, from o_i and L_i = t_i + log s_i alone:

      o = Σ_i exp(L_i − L) o_i,      L = log Σ_i exp(L_i)

  Merging is associative, so it also joins a prefix that several rows share: its keys are stored once, and the queries
  of all those rows go over it together, as rows of one matrix product, instead of once a row (arXiv 2402.05099).
  Prefixes are merged one after another into the running (o, L) of their rows: a tree of prompts (infer/engine/tree.py)
  costs two launches a node, and no node's parts are held longer than its turn.

The sums are fp32, and the split depends on the shapes and on configs.json, never on the card: the same bits everywhere.
A query that sees no key gives zeros (o_i = 0, L_i = −∞).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kernels.launch import config, divide_up, jit, launch, power_of_2, runs_here, tl, width

MOST_QUERIES = 64  # queries a row; beyond, prefill_attention
Prefix = tuple[slice, Tensor, Tensor, Tensor]  # rows of the batch; the k_GPK, v_GPK and position_P that they share


def seen_by_position(position_BT: Tensor, key_position_BS: Tensor, window: int | None) -> Tensor:
    """seen_BTS: 0 ≤ j and i − W < j ≤ i."""
    distance_BTS = position_BT[:, :, None] - key_position_BS[:, None, :]
    seen_BTS = (distance_BTS >= 0) & (key_position_BS >= 0)[:, None, :]
    return seen_BTS if window is None else seen_BTS & (distance_BTS < window)


def attention_definition(q_BHTK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, seen_BTS: Tensor) -> Tensor:
    """Softmax attention with the casts of the plain path; zeros where a query sees nothing."""
    B, H, T, K = q_BHTK.shape
    G, S = k_BGSK.shape[1:3]
    k_BHSK = k_BGSK[:, :, None].expand(B, G, H // G, S, K).reshape(B, H, S, K)
    v_BHSK = v_BGSK[:, :, None].expand(B, G, H // G, S, K).reshape(B, H, S, K)
    score_BHTS = (q_BHTK @ k_BHSK.transpose(2, 3)) * K**-0.5
    wide = torch.promote_types(q_BHTK.dtype, torch.float32)
    score_BHTS = score_BHTS.to(wide).masked_fill(~seen_BTS[:, None], float("-inf"))
    pattern_BHTS = score_BHTS.softmax(-1).masked_fill(~seen_BTS[:, None], 0.0)
    return pattern_BHTS.to(q_BHTK.dtype) @ v_BHSK


def decode_attention_definition(
    q_BHTK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, position_BT: Tensor, key_position_BS: Tensor,
    window: int | None = None, prefixes: Sequence[Prefix] = (),
) -> Tensor:  # fmt: skip
    B = q_BHTK.shape[0]
    for rows, k_GPK, v_GPK, position_P in prefixes:
        k_BGSK = torch.cat([k_GPK.expand(B, -1, -1, -1), k_BGSK], dim=2)
        v_BGSK = torch.cat([v_GPK.expand(B, -1, -1, -1), v_BGSK], dim=2)
        position_BP = position_P.new_full((B, len(position_P)), -1)  # nobody's
        position_BP[rows] = position_P
        key_position_BS = torch.cat([position_BP, key_position_BS], dim=1)
    return attention_definition(q_BHTK, k_BGSK, v_BGSK, seen_by_position(position_BT, key_position_BS, window))


@jit
def _partial(
    q, k, v, position, key_position, out, logsum, M, S, K, W, SHARE, G, scale,
    q_b, q_g, q_m, k_b, k_g, k_s, v_b, v_g, v_s, p_b, kp_b,
    WINDOW: tl.constexpr, BM: tl.constexpr, BS: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """The attention of BM query rows over one share of the keys of one row and one key/value head."""
    b = (tl.program_id(0) // G).to(tl.int64)
    g = (tl.program_id(0) % G).to(tl.int64)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    split = tl.program_id(2)
    c = tl.arange(0, BK)
    in_m, in_c = m < M, c < K
    q_MK = tl.load(q + b * q_b + g * q_g + m[:, None] * q_m + c[None, :], mask=in_m[:, None] & in_c[None, :], other=0.0)
    i = tl.load(position + b * p_b + m, mask=in_m, other=-1)
    top = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    sum_MK = tl.zeros([BM, BK], tl.float32)
    for first in range(split * SHARE, min((split + 1) * SHARE, S), BS):
        s = first + tl.arange(0, BS)
        in_s = s < S
        j = tl.load(key_position + b * kp_b + s, mask=in_s, other=-1)
        k_at = k + b * k_b + g * k_g + s[None, :].to(tl.int64) * k_s + c[:, None]
        k_KS = tl.load(k_at, mask=in_c[:, None] & in_s[None, :], other=0.0)
        score = tl.dot(q_MK, k_KS, input_precision="ieee") * scale
        seen = (j >= 0)[None, :] & (j[None, :] <= i[:, None])
        if WINDOW:
            seen = seen & (j[None, :] > i[:, None] - W)
        score = tl.where(seen, score, float("-inf"))
        higher = tl.maximum(top, tl.max(score, axis=1))
        base = tl.where(higher == float("-inf"), 0.0, higher)  # nothing seen yet: exp(−∞ − 0) = 0, not a NaN
        share = tl.exp(score - base[:, None])
        fade = tl.exp(top - base)
        v_at = v + b * v_b + g * v_g + s[:, None].to(tl.int64) * v_s + c[None, :]
        v_SK = tl.load(v_at, mask=in_s[:, None] & in_c[None, :], other=0.0)
        total = total * fade + tl.sum(share, axis=1)
        sum_MK = tl.dot(share.to(v_SK.dtype), v_SK, sum_MK * fade[:, None], input_precision="ieee")
        top = higher
    row = (split * tl.num_programs(0) + tl.program_id(0)).to(tl.int64) * M + m
    divisor = tl.where(total == 0.0, 1.0, total)
    tl.store(out + row[:, None] * K + c[None, :], sum_MK / divisor[:, None], mask=in_m[:, None] & in_c[None, :])
    tl.store(logsum + row, top + tl.log(divisor), mask=in_m)


@jit
def _merge(part, logsum, out, out_logsum, ROWS, K, PARTS, M, G, OWN, FIRST, AGAIN: tl.constexpr, BK: tl.constexpr):
    """out = Σ_i exp(L_i − L) o_i for one query row, parts in order; AGAIN: what `out` holds is one of them.

    Row r of head g is query r % OWN of batch row FIRST + r // OWN: several batch rows went over a prefix as one.
    """
    row = tl.program_id(0).to(tl.int64)
    r = row % M
    b = FIRST + row // (G * M) + r // OWN
    at = (b * G + row // M % G) * OWN + r % OWN
    c = tl.arange(0, BK)
    top = tl.load(logsum + row)
    for i in range(1, PARTS):
        top = tl.maximum(top, tl.load(logsum + i * ROWS + row))
    if AGAIN:
        before = tl.load(out_logsum + at)
        top = tl.maximum(top, before)
    base = tl.where(top == float("-inf"), 0.0, top)
    total = base * 0.0
    sum_K = tl.zeros([BK], tl.float32)
    if AGAIN:
        total += tl.exp(before - base)
        sum_K += total * tl.load(out + at * K + c, mask=c < K, other=0.0)
    for i in range(0, PARTS):
        share = tl.exp(tl.load(logsum + i * ROWS + row) - base)
        total += share
        sum_K += share * tl.load(part + (i * ROWS + row) * K + c, mask=c < K, other=0.0)
    divisor = tl.where(total == 0.0, 1.0, total)
    tl.store(out + at * K + c, sum_K / divisor, mask=c < K)
    tl.store(out_logsum + at, top + tl.log(divisor))


def _parts(
    q_BGMK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, position_BM: Tensor, key_position_BS: Tensor, window: int | None
) -> tuple[Tensor, Tensor]:
    """Partial results (parts, B, G, M, K) and their log-sums (parts, B, G, M), fp32."""
    B, G, M, K = q_BGMK.shape
    S = k_BGSK.shape[2]
    BK = max(16, power_of_2(K))
    shape_class = f"{'few' if M <= 16 else 'many'}/{width(q_BGMK.dtype)}/{'256' if BK > 128 else '128'}"
    tiles = dict(config("decode_attention", shape_class))
    row_tiles, key_tiles = divide_up(M, tiles["BM"]), divide_up(S, tiles["BS"])
    splits = max(1, min(key_tiles, divide_up(tiles.pop("PROGRAMS"), max(1, B * G * row_tiles))))
    share = divide_up(key_tiles, splits) * tiles["BS"]
    splits = max(1, divide_up(S, share)) if S else 1
    out = q_BGMK.new_empty(splits, B, G, M, K, dtype=torch.float32)
    logsum = q_BGMK.new_empty(splits, B, G, M, dtype=torch.float32)
    arguments = dict(
        q=q_BGMK, k=k_BGSK, v=v_BGSK, position=position_BM, key_position=key_position_BS, out=out, logsum=logsum,
        M=M, S=S, K=K, W=window or 0, SHARE=share, G=G, scale=K**-0.5,
        q_b=q_BGMK.stride(0), q_g=q_BGMK.stride(1), q_m=q_BGMK.stride(2),
        k_b=k_BGSK.stride(0), k_g=k_BGSK.stride(1), k_s=k_BGSK.stride(2),
        v_b=v_BGSK.stride(0), v_g=v_BGSK.stride(1), v_s=v_BGSK.stride(2),
        p_b=position_BM.stride(0), kp_b=key_position_BS.stride(0),
    )  # fmt: skip
    launch(_partial, (B * G, row_tiles, splits), arguments, WINDOW=window is not None, BK=BK, **tiles)
    return out, logsum


def last_stride_1(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 else t.contiguous()


def decode_attention(
    q_BHTK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, position_BT: Tensor, key_position_BS: Tensor,
    window: int | None = None, prefixes: Sequence[Prefix] = (),
) -> Tensor:  # fmt: skip
    """Attention of up to 64 queries a row over a cache: (B, H, T, K) in q's dtype; no gradients.

    position_BT and key_position_BS hold absolute positions (−1 in a slot that is not to be seen); `window` is W or
    None. H is a multiple of G. Each of `prefixes` is (rows, k_GPK, v_GPK, position_P): keys stored once, which the
    batch's `rows` (a slice) see as they see their own.
    """
    _check(q_BHTK, k_BGSK, v_BGSK, position_BT, key_position_BS, window)
    (B, H, T, K), G = q_BHTK.shape, k_BGSK.shape[1]
    shared = [held for prefix in prefixes for held in prefix[1:3]]
    if T > MOST_QUERIES or not runs_here(q_BHTK, k_BGSK, v_BGSK, *shared):
        return decode_attention_definition(q_BHTK, k_BGSK, v_BGSK, position_BT, key_position_BS, window, prefixes)
    M = H // G * T
    q_BGMK = last_stride_1(q_BHTK).reshape(B, G, M, K)
    place_BM = position_BT.to(torch.int32)[:, None].expand(B, H // G, T).reshape(B, M).contiguous()
    key_BS = key_position_BS.to(torch.int32).contiguous()
    out_BGMK = q_BHTK.new_empty(B, G, M, K, dtype=torch.float32 if prefixes else q_BHTK.dtype)
    logsum_BGM = q_BHTK.new_empty(B, G, M, dtype=torch.float32)

    def attend(q: Tensor, k: Tensor, v: Tensor, place: Tensor, key_position: Tensor, first: int, again: bool) -> None:
        part, logsum = _parts(q, last_stride_1(k), last_stride_1(v), place, key_position, window)
        rows = logsum[0].numel()
        arguments = dict(
            part=part, logsum=logsum, out=out_BGMK, out_logsum=logsum_BGM, ROWS=rows, K=K, PARTS=len(part),
            M=q.shape[2], G=G, OWN=M, FIRST=first,
        )  # fmt: skip
        launch(_merge, (rows,), arguments, AGAIN=again, BK=max(16, power_of_2(K)), num_warps=1)

    attend(q_BGMK, k_BGSK, v_BGSK, place_BM, key_BS, 0, False)
    q_GBMK = q_BGMK.transpose(0, 1).contiguous() if prefixes else q_BGMK
    for rows, k_GPK, v_GPK, position_P in prefixes:
        # the queries of all these rows over the one prefix: rows of one product, a batch of one
        q_1GNK, place_1N = q_GBMK[:, rows].flatten(1, 2)[None], place_BM[rows].reshape(1, -1)
        key_1P = position_P.to(torch.int32).reshape(1, -1).contiguous()
        attend(q_1GNK, k_GPK[None], v_GPK[None], place_1N, key_1P, rows.indices(B)[0], True)
    return out_BGMK.view(B, H, T, K).to(q_BHTK.dtype)


def _check(q: Any, k: Any, v: Any, position: Any, key_position: Any, window: int | None) -> None:
    (B, H, T, K), (_, G, S, _) = q.shape, k.shape
    if k.shape != v.shape or k.shape != (B, G, S, K) or H % G:
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} are not (B, H, T, K), (B, G, S, K) × 2"
        )
    if position.shape != (B, T) or key_position.shape != (B, S):
        raise ValueError(
            f"positions {tuple(position.shape)} and {tuple(key_position.shape)} must be {(B, T)} and {(B, S)}"
        )
    if window is not None and window < 1:
        raise ValueError(f"a window sees at least the query's own key: {window} < 1")
    if K > 256:
        raise ValueError(f"heads of {K}: at most 256 fit a tile")
    if torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v)):
        raise ValueError("this attention has no backward pass: call it under torch.no_grad()")
