"""Decode attention: a few new tokens over a long KV cache and over prefixes that several rows share.

A query at position i attends to a key at position j if j ≥ 0 and i − W < j ≤ i. Cache slots carry absolute positions
in any order (a rolling cache); an empty slot, padding, or a slot of another branch has position −1.

* Decode attention does 4 operations per key value read, so its time is that of reading the cache once. The H/G query
  heads of a key/value head, times T queries, are the rows of one tile: each key and value is read once for all of them.
* B · G programs (8 for Mistral at batch 1) cannot saturate the memory of 108 SMs, so the keys are split among programs
  (split-K). Each returns (o_i, L_i): o_i = Σ_j 2^(l_j − L_i) v_j and L_i = log₂ Σ_j 2^l_j, where l is the score times
  log₂ e, because the hardware has 2^x and e^x would cost another multiplication per score.
* Partial results over disjoint keys merge exactly:  L = log₂ Σ_i 2^L_i,  o = Σ_i 2^(L_i − L) o_i. A split of the cache
  and a shared prefix are therefore the same thing, a *part*. A prefix is stored once, and the queries of all rows that
  share it are rows of one product (arXiv 2402.05099). One merge at the end combines all parts of a query.

A *level* is one depth of the prefix tree: M nodes (prefixes), each shared by a range of consecutive rows. It takes one
launch. The rows' own keys are the deepest level: B nodes of one row each.

With two dependent `dot`s (scores, then values) Triton puts all warps along the query rows. At 16 rows, each of four
warps would repeat the whole product, so 16 rows get one warp and 64 rows four; bytes in flight come from the number of
programs instead (`test_machine_code.py` bounds the mma instructions per thread).

Sums are fp32 and added in a fixed order. A query that attends to no key returns zeros. Prefill and training use torch's
SDPA and FlexAttention (model/flex.py), which have kernels for many rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels.launch import card, config, divide_up, jit, launch, power_of_2, runs_here, tl, width

MAX_QUERIES = 64  # per row; more queries, or wider heads, use the PyTorch definition
MAX_HEAD_DIM = 128
LOG2_E = 1.4426950408889634


@dataclass(frozen=True)
class Level:
    """M prefixes of one depth of the prefix tree: keys and values (M, G, P, K), absolute positions (M, P) int32 (−1: an
    empty slot). Prefix m is shared by rows first_M[m] … first_M[m] + count_M[m] − 1 (int32, on the device).

    `max_count` is an upper bound of count_M, known on the host: it sizes the grid."""

    k_MGPK: Tensor
    v_MGPK: Tensor
    position_MP: Tensor
    first_M: Tensor
    count_M: Tensor
    max_count: int


def mask_from_positions(position_BT: Tensor, key_position_BS: Tensor, window: int | None) -> Tensor:
    """mask_BTS: True where j ≥ 0 and i − W < j ≤ i."""
    distance_BTS = position_BT[:, :, None] - key_position_BS[:, None, :]
    mask_BTS = (distance_BTS >= 0) & (key_position_BS >= 0)[:, None, :]
    return mask_BTS if window is None else mask_BTS & (distance_BTS < window)


def attention_definition(q_BHTK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, mask_BTS: Tensor) -> Tensor:
    """Softmax attention with the casts of model/attention.py; zeros for a query that attends to no key."""
    repeats = q_BHTK.shape[1] // k_BGSK.shape[1]
    k_BHSK, v_BHSK = (x.repeat_interleave(repeats, dim=1) for x in (k_BGSK, v_BGSK))
    score_BHTS = (q_BHTK @ k_BHSK.transpose(2, 3)) * q_BHTK.shape[-1] ** -0.5
    wide = torch.promote_types(q_BHTK.dtype, torch.float32)
    score_BHTS = score_BHTS.to(wide).masked_fill(~mask_BTS[:, None], float("-inf"))
    probs_BHTS = score_BHTS.softmax(-1).masked_fill(~mask_BTS[:, None], 0.0)
    return probs_BHTS.to(q_BHTK.dtype) @ v_BHSK


def tree_attention_definition(
    q_BHTK: Tensor,
    k_BGSK: Tensor,
    v_BGSK: Tensor,
    position_BT: Tensor,
    key_position_BS: Tensor,
    window: int | None = None,
    levels: Sequence[Level] = (),
) -> Tensor:
    """tree_attention in PyTorch: every row gets its own copy of its prefixes' keys and values."""
    row_1B = torch.arange(len(q_BHTK), device=q_BHTK.device)[None]
    for level in levels:
        first_M1, count_M1 = level.first_M[:, None], level.count_M[:, None]
        shares_MB = (row_1B >= first_M1) & (row_1B < first_M1 + count_M1)
        node_B = shares_MB.int().argmax(0)  # a row without a node gets node 0, masked by position −1
        prefix_position_BP = level.position_MP[node_B].masked_fill(~shares_MB.any(0)[:, None], -1)
        k_BGSK = torch.cat([level.k_MGPK[node_B], k_BGSK], dim=2)
        v_BGSK = torch.cat([level.v_MGPK[node_B], v_BGSK], dim=2)
        key_position_BS = torch.cat([prefix_position_BP, key_position_BS], dim=1)
    return attention_definition(q_BHTK, k_BGSK, v_BGSK, mask_from_positions(position_BT, key_position_BS, window))


@jit()
def _load_queries(q, b, h, t, valid, K, q_b, q_h, q_t, BK):
    """Query rows (BM, BK): the vectors of batch rows b, heads h and query indices t; zeros where not valid."""
    c = tl.arange(0, BK)
    at = q + b.to(tl.int64)[:, None] * q_b + h[:, None] * q_h + t[:, None] * q_t + c[None, :]
    return tl.load(at, mask=valid[:, None] & (c < K)[None, :], other=0.0)


@jit()
def _mask(i, j, W, WINDOW):
    """(BM, BS): True where the query at position i attends to the key at position j."""
    mask = (j >= 0)[None, :] & (j[None, :] <= i[:, None])
    if WINDOW:
        mask = mask & (j[None, :] > i[:, None] - W)
    return mask


@jit()
def _online_softmax(score, m_i):
    """(new maximum, probabilities p = 2^(score − maximum), alpha = factor that rescales the sums so far).

    A row with no key so far has maximum −∞; subtracting 0 instead gives p = alpha = 0, not NaN.
    """
    m_new = tl.maximum(m_i, tl.max(score, axis=1))
    base = tl.where(m_new == float("-inf"), 0.0, m_new)
    p = tl.exp2(score - base[:, None])
    alpha = tl.exp2(m_i - base)
    return m_new, p, alpha


@jit()
def _attend(q_MK, i, k, v, key_position, start, stop, S, K, W, scale, k_s, v_s, WINDOW, BM, BS, BK):
    """Attention of BM query rows at positions i over slots start … stop of one node and key/value head.

    Returns (Σ p v (BM, BK), maximum score (BM), Σ p (BM)), not yet normalized.
    """
    c = tl.arange(0, BK)
    in_c = c < K
    m_i = tl.full([BM], float("-inf"), tl.float32)
    l_i = tl.zeros([BM], tl.float32)
    sum_MK = tl.zeros([BM, BK], tl.float32)
    for first in range(start, stop, BS):
        s = first + tl.arange(0, BS)
        in_s = s < S
        j = tl.load(key_position + s, mask=in_s, other=-1)
        k_at = k + s[None, :].to(tl.int64) * k_s + c[:, None]
        k_KS = tl.load(k_at, mask=in_c[:, None] & in_s[None, :], other=0.0)
        score = tl.dot(q_MK, k_KS, input_precision="ieee") * scale
        score = tl.where(_mask(i, j, W, WINDOW), score, float("-inf"))
        m_i, p, alpha = _online_softmax(score, m_i)
        v_at = v + s[:, None].to(tl.int64) * v_s + c[None, :]
        v_SK = tl.load(v_at, mask=in_s[:, None] & in_c[None, :], other=0.0)
        l_i = l_i * alpha + tl.sum(p, axis=1)
        sum_MK = tl.dot(p.to(v_SK.dtype), v_SK, sum_MK * alpha[:, None], input_precision="ieee")
    return sum_MK, m_i, l_i


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
    """(o, L) of BM query rows of node m and key/value head g over one split of the node's keys: part FIRST + split.

    The query rows of a node are ordered by (batch row, head of the group, query): r = (b · HEADS + h) · T + t.
    """
    m = tl.program_id(0) // G
    g = tl.program_id(0) % G
    split = tl.program_id(2)
    r = tl.program_id(1) * BM + tl.arange(0, BM)
    b_first, b_count = m, 1
    if not OWN:
        b_first, b_count = tl.load(first + m), tl.load(count + m)
    valid = r < b_count * HEADS * T
    b = b_first + r // (HEADS * T)
    h = g * HEADS + r // T % HEADS
    t = r % T
    q_MK = _load_queries(q, b, h, t, valid, K, q_b, q_h, q_t, BK)
    i = tl.load(position + b * T + t, mask=valid, other=-1)
    split_keys = tl.cdiv(tl.cdiv(S, BS), tl.num_programs(2)) * BS
    stop = min((split + 1) * split_keys, S)
    if tl.program_id(1) * BM >= b_count * HEADS * T:  # no valid row in this tile
        stop = 0
    k += m.to(tl.int64) * k_m + g * k_g
    v += m.to(tl.int64) * v_m + g * v_g
    key_position += m.to(tl.int64) * S
    sum_MK, m_i, l_i = _attend(
        q_MK, i, k, v, key_position, split * split_keys, stop, S, K, W, scale, k_s, v_s, WINDOW, BM, BS, BK
    )
    row = (FIRST + split) * ROWS + (b * (G * HEADS) + h) * T + t
    divisor = tl.where(l_i == 0.0, 1.0, l_i)
    c = tl.arange(0, BK)
    out_at = out + row.to(tl.int64)[:, None] * K + c[None, :]
    tl.store(out_at, sum_MK / divisor[:, None], mask=valid[:, None] & (c < K)[None, :])
    tl.store(logsum + row, m_i + tl.log2(divisor), mask=valid)


@jit("ROWS", "PARTS")
def _merge(part, logsum, out, ROWS, K, PARTS, BP: tl.constexpr, BK: tl.constexpr):
    """out = Σ_i 2^(L_i − L) o_i for one query row, all parts at once. A part without keys of this row has L = −∞."""
    row = tl.program_id(0)
    i = tl.arange(0, BP)
    c = tl.arange(0, BK)
    L = tl.load(logsum + i * ROWS + row, mask=i < PARTS, other=float("-inf"))
    L_max = tl.max(L, axis=0)
    weight = tl.exp2(L - tl.where(L_max == float("-inf"), 0.0, L_max))
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
    """Attention of up to 64 queries per row over the rows' own keys and shared prefixes: (B, H, T, K) in q's dtype.

    position_BT and key_position_BS hold absolute positions (−1: a slot to ignore); `window` is W, or None for no limit.
    H is a multiple of G. A row shares at most one prefix of a level. No gradients. The launches depend on shapes alone,
    so a step over static caches can be captured as a CUDA graph.
    """
    _check(q_BHTK, k_BGSK, v_BGSK, position_BT, key_position_BS, window)
    (B, H, T, K), G = q_BHTK.shape, k_BGSK.shape[1]
    shared = [kept for level in levels for kept in (level.k_MGPK, level.v_MGPK)]
    if T > MAX_QUERIES or K > MAX_HEAD_DIM or not runs_here(q_BHTK, k_BGSK, v_BGSK, *shared):
        return tree_attention_definition(q_BHTK, k_BGSK, v_BGSK, position_BT, key_position_BS, window, levels)
    if B * T == 0:
        return torch.empty_like(q_BHTK)
    q, position = _last_stride_1(q_BHTK), _int32(position_BT)
    own = Level(k_BGSK, v_BGSK, key_position_BS, position, position, 1)  # first_M and count_M are not read
    plans = [_plan(level, T * H // G, q) for level in (own, *levels)]
    parts = sum(splits for _, _, splits in plans)
    out = q.new_empty(parts, B * H * T, K, dtype=torch.float32)
    logsum = q.new_full((parts, B * H * T), float("-inf"), dtype=torch.float32)
    first_part = 0
    for level, (tiles, row_tiles, splits) in zip((own, *levels), plans, strict=True):
        grid = (len(level.k_MGPK) * G, row_tiles, splits)
        arguments = _partial_arguments(q, position, level, window, out, logsum, first_part)
        flags = dict(HEADS=H // G, OWN=level is own, WINDOW=window is not None, BK=_head_tile(K))
        launch(_partial, grid, arguments, **flags, **tiles)
        first_part += splits
    out_BHTK = q.new_empty(B, H, T, K)
    arguments = dict(part=out, logsum=logsum, out=out_BHTK, ROWS=B * H * T, K=K, PARTS=parts)
    launch(_merge, (B * H * T,), arguments, BP=power_of_2(parts), BK=_head_tile(K), num_warps=4)
    return out_BHTK


def _partial_arguments(
    q: Tensor, position: Tensor, level: Level, window: int | None, out: Tensor, logsum: Tensor, first_part: int
) -> dict[str, Any]:
    k, v, K = _last_stride_1(level.k_MGPK), _last_stride_1(level.v_MGPK), q.shape[-1]
    return dict(
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
        T=q.shape[2],
        G=k.shape[1],
        FIRST=first_part,
        ROWS=out.shape[1],
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


def _head_tile(K: int) -> int:
    return max(16, power_of_2(K))  # `dot` needs 16


def _plan(level: Level, queries: int, q: Tensor) -> tuple[dict[str, int], int, int]:
    """(tile sizes, tiles of query rows, splits of the keys) of a level's launch; a function of shapes and the GPU."""
    rows = level.max_count * queries
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
            f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} must be (B, H, T, K), (B, G, S, K) and k's"
        )
    if position.shape != (B, T) or key_position.shape != (B, S):
        raise ValueError(
            f"positions {tuple(position.shape)} and {tuple(key_position.shape)} must be {(B, T)} and {(B, S)}"
        )
    if window is not None and window < 1:
        raise ValueError(f"window {window} must be at least 1: a query attends to its own key")
    if torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v)):
        raise ValueError("tree_attention has no backward pass; call it under torch.no_grad()")
