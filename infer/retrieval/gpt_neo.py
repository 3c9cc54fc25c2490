"""GPT-Neo (Black et al., 2021): pre-norm, learned positions, local attention in every second layer, unscaled scores.

Module names are those of the public checkpoint. A window of W sees W keys, the query's own included. Scores are at
least fp32. Same operations in the same order as transformers' eager path.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


class SelfAttention(nn.Module):
    def __init__(self, config: Mapping[str, Any], window: int | None) -> None:
        super().__init__()
        width = config["hidden_size"]
        self.heads, self.window = config["num_heads"], window
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x_BTD: Tensor, mask_BT: Tensor) -> Tensor:
        def split(y_BTD: Tensor) -> Tensor:
            return y_BTD.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        wide = torch.promote_types(x_BTD.dtype, torch.float32)
        q_BHTK, k_BHTK, v_BHTK = split(self.q_proj(x_BTD)), split(self.k_proj(x_BTD)), split(self.v_proj(x_BTD))
        scores_BHTT = q_BHTK.to(wide) @ k_BHTK.to(wide).transpose(2, 3)
        i_T = torch.arange(x_BTD.shape[1], device=x_BTD.device)
        seen_TT = i_T[None, :] <= i_T[:, None]
        if self.window is not None:
            seen_TT = seen_TT & (i_T[None, :] > i_T[:, None] - self.window)
        scores_BHTT = scores_BHTT.masked_fill(~seen_TT, torch.finfo(wide).min)
        scores_BHTT = scores_BHTT.masked_fill(~mask_BT[:, None, None, :], torch.finfo(wide).min)
        y_BHTK = scores_BHTT.softmax(-1).to(v_BHTK.dtype) @ v_BHTK
        return self.out_proj(y_BHTK.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, config: Mapping[str, Any], window: int | None) -> None:
        super().__init__()
        width, inner = config["hidden_size"], config["intermediate_size"] or 4 * config["hidden_size"]
        self.ln_1 = nn.LayerNorm(width, eps=config["layer_norm_epsilon"])
        self.attn = nn.ModuleDict({"attention": SelfAttention(config, window)})
        self.ln_2 = nn.LayerNorm(width, eps=config["layer_norm_epsilon"])
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, inner), "c_proj": nn.Linear(inner, width)})

    def forward(self, x_BTD: Tensor, mask_BT: Tensor) -> Tensor:
        x_BTD = x_BTD + self.attn["attention"](self.ln_1(x_BTD), mask_BT)
        return x_BTD + self.mlp["c_proj"](gelu_new(self.mlp["c_fc"](self.ln_2(x_BTD))))


def gelu_new(x: Tensor) -> Tensor:
    """GELU's tanh approximation, in the original order of operations."""
    return 0.5 * x * (1.0 + torch.tanh(0.7978845608028654 * (x + 0.044715 * torch.pow(x, 3.0))))


class GPTNeo(nn.Module):
    """tokens_BT, mask_BT (False for padding, on the right) → normed hidden states x_BTD."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.wte = nn.Embedding(config["vocab_size"], config["hidden_size"])
        self.wpe = nn.Embedding(config["max_position_embeddings"], config["hidden_size"])
        kinds = [kind for pattern, times in config["attention_types"] for kind in pattern * times]
        windows = [config["window_size"] if kind == "local" else None for kind in kinds]
        self.h = nn.ModuleList(Block(config, window) for window in windows)
        self.ln_f = nn.LayerNorm(config["hidden_size"], eps=config["layer_norm_epsilon"])

    def forward(self, tokens_BT: Tensor, mask_BT: Tensor, types_BT: Tensor) -> Tensor:
        x_BTD = self.wte(tokens_BT) + self.wpe(torch.arange(tokens_BT.shape[1], device=tokens_BT.device))
        for block in self.h:
            x_BTD = block(x_BTD, mask_BT)
        return self.ln_f(x_BTD)
