"""Grouped-query attention with a sliding window, documents and branches (model/mask.py).

`PlainAttend` is the specification, bit-identical to transformers' eager path. fast_attention.py gives the same result
up to rounding in O(T·W) time and O(T) memory.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.cache import KVCache
from model.config import ModelConfig
from model.mask import Visible
from model.rotary import Rotate


class Scores(nn.Module):
    """q·k/√K for every query and key; masked scores are the dtype's minimum."""

    def forward(self, q_BHTK: Tensor, k_BGSK: Tensor, visible: Visible, window: int | None) -> Tensor:
        score_BHTS = torch.matmul(q_BHTK, repeat_kv(k_BGSK, q_BHTK.shape[1]).transpose(2, 3)) * q_BHTK.shape[-1] ** -0.5
        unseen_B1TS = ~visible.mask(window)[:, None]
        return score_BHTS.masked_fill(unseen_B1TS, torch.finfo(score_BHTS.dtype).min)


class Pattern(nn.Module):
    """Softmax of the scores over the keys, computed in at least fp32, returned in the scores' dtype."""

    def forward(self, score_BHTS: Tensor) -> Tensor:
        wide = torch.promote_types(score_BHTS.dtype, torch.float32)
        return F.softmax(score_BHTS, dim=-1, dtype=wide).to(score_BHTS.dtype)


class PlainAttend(nn.Module):
    """Softmax attention with all scores in memory. `scores` and `pattern` are modules so that forward hooks can record
    and replace their outputs (infer/inspect/recording.py)."""

    def __init__(self) -> None:
        super().__init__()
        self.scores, self.pattern = Scores(), Pattern()

    def forward(self, q_BHTK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, visible: Visible, window: int | None) -> Tensor:
        pattern_BHTS = self.pattern(self.scores(q_BHTK, k_BGSK, visible, window))
        return torch.matmul(pattern_BHTS, repeat_kv(v_BGSK, q_BHTK.shape[1]))


def repeat_kv(x_BGSK: Tensor, heads: int) -> Tensor:
    """Repeat each key/value head for its group of query heads: (B, G, S, K) → (B, H, S, K), H = `heads`."""
    B, G, S, K = x_BGSK.shape
    return x_BGSK[:, :, None].expand(B, G, heads // G, S, K).reshape(B, heads, S, K) if heads != G else x_BGSK


def split_heads(x_BTD: Tensor, size: int) -> Tensor:
    """(B, T, heads · K) → (B, heads, T, K)."""
    B, T, _ = x_BTD.shape
    return x_BTD.view(B, T, -1, size).transpose(1, 2)


class Attention(nn.Module):
    """Project to q, k and v, rotate q and k, attend, project back. `use_attention` replaces `attend`."""

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
