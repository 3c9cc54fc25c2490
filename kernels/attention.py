"""Attention of a few new tokens over a long cache, and over prefixes that several rows share: one launch a level.

A query at position i sees the key at position j when 0 ≤ j and i − W < j ≤ i. Slots carry absolute positions and may
be in any order (a rolling cache); a slot that nobody may see (empty, padding, another branch) has position −1.

* A query does 4 operations per key value read, so the time is the time of reading the cache once. The H/G query heads
  of a key/value head, times T queries, are rows of one tile: keys and values are read once for all of them.
* B · G programs (8 for Mistral and one row) cannot keep 108 SMs reading, so the keys are split among programs, each
  giving (o_i, L_i): o_i = Σ_j 2^(l_j − L_i) v_j with L_i = log₂ Σ_j 2^l_j, where l is the score times log₂ e: the
  hardware has 2^x, and e^x would be another multiplication a score.
* Results over disjoint keys merge exactly:  L = log₂ Σ_i 2^L_i,  o = Σ_i 2^(L_i − L) o_i. So splits and prefixes are
  the same thing: parts. A prefix's keys are stored once, and the queries of all rows below it pass over them
  together, as rows of one product (arXiv 2402.05099). One merge at the end reads all parts of a query at once.

A *level* holds the nodes of one depth of a tree of prompts: M prefixes, each seen by a range of consecutive rows, in
one launch. The rows' own keys are the deepest level: B nodes of one row each.

Two `dot`s that feed each other (scores, then values) make Triton put all warps along the query rows. With 16 rows, four
warps would each do all the work, so 16 rows get one warp and 64 rows four; bytes in flight come from the number of
programs instead (`test_machine_code.py` bounds mma per thread).

Sums are fp32 and added in a fixed order. A query that sees no key gives zeros. Prefill and training use torch's SDPA
and FlexAttention (model/flex.py), which have many-row kernels already.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels.launch import card, config, divide_up, jit, launch, power_of_2, runs_here, tl, width

MOST_QUERIES = 64  # queries a row; beyond, and for wider heads, the definition
WIDEST_HEAD = 128
LOG2_E = 1.4426950408889634


@dataclass(frozen=True)
class Level:
    """M prefixes: keys and values (M, G, P, K), absolute positions (M, P) int32 (−1: nobody's key), and which rows see
    each: `count_M` rows from row `first_M` on (int32, on the device). `most` bounds count_M: it sizes the grid."""

    k_MGPK: Tensor
    v_MGPK: Tensor
    position_MP: Tensor
    first_M: Tensor
    count_M: Tensor
    most: int


def seen_by_position(position_BT: Tensor, key_position_BS: Tensor, window: int | None) -> Tensor:
    """seen_BTS: 0 ≤ j and i − W < j ≤ i."""
    distance_BTS = position_BT[:, :, None] - key_position_BS[:, None, :]
    seen_BTS = (distance_BTS >= 0) & (key_position_BS >= 0)[:, None, :]
    return seen_BTS if window is None else seen_BTS & (distance_BTS < window)


def attention_definition(q_BHTK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, seen_BTS: Tensor) -> Tensor:
    """Softmax attention with the casts of the plain path; zeros where a query sees nothing."""
    repeats = q_BHTK.shape[1] // k_BGSK.shape[1]
    k_BHSK, v_BHSK = (x.repeat_interleave(repeats, dim=1) for x in (k_BGSK, v_BGSK))
    score_BHTS = (q_BHTK @ k_BHSK.transpose(2, 3)) * q_BHTK.shape[-1] ** -0.5
    wide = torch.promote_types(q_BHTK.dtype, torch.float32)
    score_BHTS = score_BHTS.to(wide).masked_fill(~seen_BTS[:, None], float("-inf"))
    pattern_BHTS = score_BHTS.softmax(-1).masked_fill(~seen_BTS[:, None], 0.0)
    return pattern_BHTS.to(q_BHTK.dtype) @ v_BHSK


def tree_attention_definition(
    q_BHTK: Tensor,
    k_BGSK: Tensor,
    v_BGSK: Tensor,
    position_BT: Tensor,
    key_position_BS: Tensor,
    window: int | None = None,
    levels: Sequence[Level] = (),
) -> Tensor:
    """Every row gets its own copy of the keys that it sees."""
    row_1B = torch.arange(len(q_BHTK), device=q_BHTK.device)[None]
    for level in levels:
        first_M1, count_M1 = level.first_M[:, None], level.count_M[:, None]
        below_MB = (row_1B >= first_M1) & (row_1B < first_M1 + count_M1)
        node_B = below_MB.int().argmax(0)  # no node: the first one, at nobody's positions
        place_BP = level.position_MP[node_B].masked_fill(~below_MB.any(0)[:, None], -1)
        k_BGSK = torch.cat([level.k_MGPK[node_B], k_BGSK], dim=2)
        v_BGSK = torch.cat([level.v_MGPK[node_B], v_BGSK], dim=2)
        key_position_BS = torch.cat([place_BP, key_position_BS], dim=1)
    return attention_definition(q_BHTK, k_BGSK, v_BGSK, seen_by_position(position_BT, key_position_BS, window))


@jit("S", "W", "T", "FIRST", "ROWS")
def _partial(
    q,
    k,
    v,
    position,
    key_position,
    first,
    count,
    out,
    logsum,
    S,
    K,
    W,
    T,
    G,
    FIRST,
    ROWS,
    scale,
    q_b,
    q_h,
    q_t,
    k_m,
    k_g,
    k_s,
    v_m,
    v_g,
    v_s,
    HEADS: tl.constexpr,
    OWN: tl.constexpr,
    WINDOW: tl.constexpr,
    BM: tl.constexpr,
    BS: tl.constexpr,
    BK: tl.constexpr,
):
    """(o, L) of BM query rows of node m and key/value head g over one share of the node's keys.

    Query row r of a node is (row of the batch, head of the group, query): r = (b · HEADS + h) · T + t.
    """
    m = tl.program_id(0) // G
    g = tl.program_id(0) % G
    split = tl.program_id(2)
    r = tl.program_id(1) * BM + tl.arange(0, BM)
    b_first, b_count = m, 1
    if not OWN:
        b_first, b_count = tl.load(first + m), tl.load(count + m)
    live = r < b_count * HEADS * T
    b = b_first + r // (HEADS * T)
    h = g * HEADS + r // T % HEADS
    t = r % T
    c = tl.arange(0, BK)
    in_c = c < K
    q_at = q + b.to(tl.int64)[:, None] * q_b + h[:, None] * q_h + t[:, None] * q_t + c[None, :]
    q_MK = tl.load(q_at, mask=live[:, None] & in_c[None, :], other=0.0)
    i = tl.load(position + b * T + t, mask=live, other=-1)
    m_i = tl.full([BM], float("-inf"), tl.float32)
    l_i = tl.zeros([BM], tl.float32)
    sum_MK = tl.zeros([BM, BK], tl.float32)
    share = tl.cdiv(tl.cdiv(S, BS), tl.num_programs(2)) * BS
    stop = min((split + 1) * share, S)
    if tl.program_id(1) * BM >= b_count * HEADS * T:  # a tile past the node's rows
        stop = 0
    k += m.to(tl.int64) * k_m + g * k_g
    v += m.to(tl.int64) * v_m + g * v_g
    for start in range(split * share, stop, BS):
        s = start + tl.arange(0, BS)
        in_s = s < S
        j = tl.load(key_position + m.to(tl.int64) * S + s, mask=in_s, other=-1)
        k_at = k + s[None, :].to(tl.int64) * k_s + c[:, None]
        k_KS = tl.load(k_at, mask=in_c[:, None] & in_s[None, :], other=0.0)
        score = tl.dot(q_MK, k_KS, input_precision="ieee") * scale
        seen = (j >= 0)[None, :] & (j[None, :] <= i[:, None])
        if WINDOW:
            seen = seen & (j[None, :] > i[:, None] - W)
        score = tl.where(seen, score, float("-inf"))
        m_new = tl.maximum(m_i, tl.max(score, axis=1))
        base = tl.where(m_new == float("-inf"), 0.0, m_new)  # nothing seen yet: 2^(−∞ − 0) = 0, not a NaN
        p = tl.exp2(score - base[:, None])
        alpha = tl.exp2(m_i - base)
        v_at = v + s[:, None].to(tl.int64) * v_s + c[None, :]
        v_SK = tl.load(v_at, mask=in_s[:, None] & in_c[None, :], other=0.0)
        l_i = l_i * alpha + tl.sum(p, axis=1)
        sum_MK = tl.dot(p.to(v_SK.dtype), v_SK, sum_MK * alpha[:, None], input_precision="ieee")
        m_i = m_new
    row = (FIRST + split) * ROWS + (b * (G * HEADS) + h) * T + t
    divisor = tl.where(l_i == 0.0, 1.0, l_i)
    out_at = out + row.to(tl.int64)[:, None] * K + c[None, :]
    tl.store(out_at, sum_MK / divisor[:, None], mask=live[:, None] & in_c[None, :])
    tl.store(logsum + row, m_i + tl.log2(divisor), mask=live)


@jit("ROWS", "PARTS")
def _merge(part, logsum, out, ROWS, K, PARTS, BP: tl.constexpr, BK: tl.constexpr):
    """out = Σ_i 2^(L_i − L) o_i for one query row: all parts at once. A part that nobody wrote has L = −∞."""
    row = tl.program_id(0)
    i = tl.arange(0, BP)
    c = tl.arange(0, BK)
    L = tl.load(logsum + i * ROWS + row, mask=i < PARTS, other=float("-inf"))
    highest = tl.max(L, axis=0)
    weight = tl.exp2(L - tl.where(highest == float("-inf"), 0.0, highest))
    at = part + (i * ROWS + row).to(tl.int64)[:, None] * K + c[None, :]
    part_PK = tl.load(at, mask=(weight > 0.0)[:, None] & (c < K)[None, :], other=0.0)
    total = tl.sum(weight, axis=0)
    merged = tl.sum(part_PK * weight[:, None], axis=0) / tl.where(total == 0.0, 1.0, total)
    tl.store(out + row.to(tl.int64) * K + c, merged, mask=c < K)


def _last_stride_1(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 else t.contiguous()


def _int32(t: Tensor) -> Tensor:
    return t.to(torch.int32).contiguous()


def tree_attention(
    q_BHTK: Tensor,
    k_BGSK: Tensor,
    v_BGSK: Tensor,
    position_BT: Tensor,
    key_position_BS: Tensor,
    window: int | None = None,
    levels: Sequence[Level] = (),
) -> Tensor:
    """Attention of up to 64 queries a row over the rows' own keys and shared prefixes: (B, H, T, K) in q's dtype.

    position_BT and key_position_BS hold absolute positions (−1 in a slot that is not to be seen); `window` is W or
    None. H is a multiple of G. Rows must not see two nodes of one level. No gradients. Shapes alone decide what is
    launched, so a step over static caches can be captured as a CUDA graph.
    """
    _check(q_BHTK, k_BGSK, v_BGSK, position_BT, key_position_BS, window)
    (B, H, T, K), G = q_BHTK.shape, k_BGSK.shape[1]
    shared = [held for level in levels for held in (level.k_MGPK, level.v_MGPK)]
    if T > MOST_QUERIES or K > WIDEST_HEAD or not runs_here(q_BHTK, k_BGSK, v_BGSK, *shared):
        return tree_attention_definition(q_BHTK, k_BGSK, v_BGSK, position_BT, key_position_BS, window, levels)
    if B * T == 0:
        return torch.empty_like(q_BHTK)
    q, position = _last_stride_1(q_BHTK), _int32(position_BT)
    own = Level(k_BGSK, v_BGSK, key_position_BS, position, position, 1)
    BK, HEADS, ROWS = max(16, power_of_2(K)), H // G, B * H * T
    plans = [_plan(level, T * HEADS, q) for level in (own, *levels)]
    parts = sum(splits for _, _, splits in plans)
    out = q.new_empty(parts, ROWS, K, dtype=torch.float32)
    logsum = q.new_full((parts, ROWS), float("-inf"), dtype=torch.float32)
    first = 0
    for level, (tiles, row_tiles, splits) in zip((own, *levels), plans, strict=True):
        k, v = _last_stride_1(level.k_MGPK), _last_stride_1(level.v_MGPK)
        arguments = dict(
            q=q,
            k=k,
            v=v,
            position=position,
            key_position=_int32(level.position_MP),
            first=level.first_M,
            count=level.count_M,
            out=out,
            logsum=logsum,
            S=k.shape[2],
            K=K,
            W=window or 0,
            T=T,
            G=G,
            FIRST=first,
            ROWS=ROWS,
            scale=K**-0.5 * LOG2_E,
            q_b=q.stride(0),
            q_h=q.stride(1),
            q_t=q.stride(2),
            k_m=k.stride(0),
            k_g=k.stride(1),
            k_s=k.stride(2),
            v_m=v.stride(0),
            v_g=v.stride(1),
            v_s=v.stride(2),
        )
        grid = (len(k) * G, row_tiles, splits)
        flags = dict(HEADS=HEADS, OWN=level is own, WINDOW=window is not None, BK=BK)
        launch(_partial, grid, arguments, **flags, **tiles)
        first += splits
    out_BHTK = q.new_empty(B, H, T, K)
    arguments = dict(part=out, logsum=logsum, out=out_BHTK, ROWS=ROWS, K=K, PARTS=parts)
    launch(_merge, (ROWS,), arguments, BP=power_of_2(parts), BK=BK, num_warps=4)
    return out_BHTK


def _plan(level: Level, queries: int, q: Tensor) -> tuple[dict[str, int], int, int]:
    """(tile sizes, tiles of query rows, splits of the keys) of a level's launch: from shapes and the card alone."""
    rows = level.most * queries
    shape_class = f"{'few' if rows <= 16 else 'many'}/{width(q.dtype)}"
    tiles = config("attention", shape_class, q.device)
    row_tiles, (M, G, S) = divide_up(rows, tiles["BM"]), level.k_MGPK.shape[:3]
    programs = tiles.pop("RESIDENT") * card(q.device)[1]
    splits = min(divide_up(S, tiles["BS"]), divide_up(programs, M * G * row_tiles), 64)
    return tiles, row_tiles, max(1, splits)


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
    if torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v)):
        raise ValueError("this attention has no backward pass: call it under torch.no_grad()")
