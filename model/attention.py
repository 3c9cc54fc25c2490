"""Grouped-query attention with a sliding window, documents and branches.

What a query may see is decided in one place, from absolute positions and never from indices:

    same document,  and  key's branch is the trunk or the query's own,  and  i − W < j ≤ i  (W keys, itself included).

Documents share a row when short texts are packed for training; branches are continuations of one trunk (a note and
its questions) that do not see each other, in training and in decoding alike. Padding is document −1.

Worked example: a note "a b c" with two questions "p q" and "r" in one row:

    token     a  b  c  p  q  r
    branch    0  0  0  1  1  2        q sees a b c p q;  r sees a b c r
    position  0  1  2  3  4  3

`PlainAttend` is the specification (bit-identical to transformers' eager path); fast_attention.py computes the same in
O(T·W) time and O(T) memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.cache import KVCache
from model.config import ModelConfig
from model.rotary import Rotate


@dataclass(frozen=True)
class Layout:
    """Which document and branch each token belongs to: int64 tensors of shape (B, T). Document −1 is padding."""

    document_BT: Tensor
    branch_BT: Tensor


class Visible:
    """Who sees whom, for one forward pass. Masks are built per window, when asked for."""

    def __init__(self, query: tuple[Tensor, Layout | None], key: tuple[Tensor, Layout | None], offset: int) -> None:
        (self.position_BT, self.layout), (self.key_position_BS, self.key_layout) = query, key
        self.offset = offset  # index of the first query among the keys
        self.memo: dict[Any, Any] = {}  # masks by window; what the fast path finds out once a pass

    def mask(self, window: int | None) -> Tensor:
        """The whole mask_BTS (bool, True: seen), kept for the layers that share the window."""
        if window not in self.memo:
            T, S = self.position_BT.shape[1], self.key_position_BS.shape[1]
            self.memo[window] = self.block(window, slice(0, T), slice(0, S))
        return self.memo[window]

    def block(self, window: int | None, rows: slice, columns: slice) -> Tensor:
        """The part of the mask for some queries and some keys."""
        distance_BTS = self.position_BT[:, rows, None] - self.key_position_BS[:, None, columns]
        seen_BTS = distance_BTS >= 0
        if window is not None:
            seen_BTS &= distance_BTS < window
        if self.layout is not None and self.key_layout is not None:
            document_B1S = self.key_layout.document_BT[:, None, columns]
            branch_B1S = self.key_layout.branch_BT[:, None, columns]
            seen_BTS &= self.layout.document_BT[:, rows, None] == document_B1S
            seen_BTS &= (branch_B1S == 0) | (branch_B1S == self.layout.branch_BT[:, rows, None])
        return seen_BTS


class Scores(nn.Module):
    """q·k/√K of every query and key, the lowest number where a query does not see the key."""

    def forward(self, q_BHTK: Tensor, k_BGSK: Tensor, visible: Visible, window: int | None) -> Tensor:
        score_BHTS = torch.matmul(q_BHTK, share(k_BGSK, q_BHTK.shape[1]).transpose(2, 3)) * q_BHTK.shape[-1] ** -0.5
        unseen_B1TS = ~visible.mask(window)[:, None]
        return score_BHTS.masked_fill(unseen_B1TS, torch.finfo(score_BHTS.dtype).min)


class Pattern(nn.Module):
    """Each query's weights over the keys: a softmax of its scores in at least fp32, in the scores' dtype."""

    def forward(self, score_BHTS: Tensor) -> Tensor:
        wide = torch.promote_types(score_BHTS.dtype, torch.float32)
        return F.softmax(score_BHTS, dim=-1, dtype=wide).to(score_BHTS.dtype)


class PlainAttend(nn.Module):
    """Softmax attention as the definition has it: all scores in memory. `scores` and `pattern` are modules of their own
    so that what they give can be observed and overwritten (infer/recording.py)."""

    def __init__(self) -> None:
        super().__init__()
        self.scores, self.pattern = Scores(), Pattern()

    def forward(self, q_BHTK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, visible: Visible, window: int | None) -> Tensor:
        k_BGSK, v_BGSK = k_BGSK.to(q_BHTK.dtype), v_BGSK.to(q_BHTK.dtype)  # a cache may keep them narrower
        pattern_BHTS = self.pattern(self.scores(q_BHTK, k_BGSK, visible, window))
        return torch.matmul(pattern_BHTS, share(v_BGSK, q_BHTK.shape[1]))


def share(x_BGSK: Tensor, heads: int) -> Tensor:
    """Give each of `heads` query heads its group's keys or values: (B, G, S, K) → (B, H, S, K)."""
    B, G, S, K = x_BGSK.shape
    return x_BGSK[:, :, None].expand(B, G, heads // G, S, K).reshape(B, heads, S, K) if heads != G else x_BGSK


def split_heads(x_BTD: Tensor, size: int) -> Tensor:
    """(B, T, heads · K) → (B, heads, T, K)."""
    B, T, _ = x_BTD.shape
    return x_BTD.view(B, T, -1, size).transpose(1, 2)


class Attention(nn.Module):
    """Project, turn by position, attend, project back. `rotate_q`, `rotate_k` and `attend` can be observed by hooks."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        D, K = config.hidden_size, config.head_dim
        self.layer, self.head_dim, self.window = layer, K, config.windows[layer]
        self.q_proj = nn.Linear(D, config.num_attention_heads * K, bias=config.qkv_bias)
        self.k_proj = nn.Linear(D, config.num_key_value_heads * K, bias=config.qkv_bias)
        self.v_proj = nn.Linear(D, config.num_key_value_heads * K, bias=config.qkv_bias)
        self.o_proj = nn.Linear(config.num_attention_heads * K, D, bias=config.o_bias)
        self.rotate_q, self.rotate_k = Rotate(), Rotate()
        self.attend: nn.Module = PlainAttend()

    def forward(
        self, x_BTD: Tensor, rotary: tuple[Tensor, Tensor], visible: Visible, cache: KVCache | None = None
    ) -> Tensor:
        q_BHTK = self.rotate_q(split_heads(self.q_proj(x_BTD), self.head_dim), rotary)
        k_BGSK = self.rotate_k(split_heads(self.k_proj(x_BTD), self.head_dim), rotary)
        v_BGSK = split_heads(self.v_proj(x_BTD), self.head_dim)
        if cache is not None:
            k_BGSK, v_BGSK = cache.append(self.layer, k_BGSK, v_BGSK)
        out_BHTK = self.attend(q_BHTK, k_BGSK, v_BGSK, visible, self.window)
        return self.o_proj(out_BHTK.transpose(1, 2).flatten(2))
