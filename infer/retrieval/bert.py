"""BERT's encoder (Devlin et al., 2019): post-norm, with optional bottleneck adapters after each feed-forward block.

Module names are those of the public checkpoints, so that their tensors load without a mapping. B batch, T tokens,
D width, H heads, K head size. Bit-identical to transformers' eager path: the same operations in the same order.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Embeddings(nn.Module):
    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        width = config["hidden_size"]
        self.word_embeddings = nn.Embedding(config["vocab_size"], width)
        self.position_embeddings = nn.Embedding(config["max_position_embeddings"], width)
        self.token_type_embeddings = nn.Embedding(config["type_vocab_size"], width)
        self.LayerNorm = nn.LayerNorm(width, eps=config["layer_norm_eps"])

    def forward(self, tokens_BT: Tensor, types_BT: Tensor) -> Tensor:
        positions_T = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
        x_BTD = self.word_embeddings(tokens_BT) + self.token_type_embeddings(types_BT)
        return self.LayerNorm(x_BTD + self.position_embeddings(positions_T))


class SelfAttention(nn.Module):
    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        width = config["hidden_size"]
        self.heads = config["num_attention_heads"]
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x_BTD: Tensor, bias_B11T: Tensor) -> Tensor:
        def split(y_BTD: Tensor) -> Tensor:
            return y_BTD.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        q_BHTK, k_BHTK, v_BHTK = split(self.query(x_BTD)), split(self.key(x_BTD)), split(self.value(x_BTD))
        scores_BHTT = q_BHTK @ k_BHTK.transpose(2, 3) * (1 / math.sqrt(q_BHTK.shape[-1])) + bias_B11T
        y_BHTK = scores_BHTT.softmax(-1) @ v_BHTK
        return y_BHTK.transpose(1, 2).flatten(2)


class Bottleneck(nn.Module):
    """A "Pfeiffer" adapter: up(relu(down(x))). Residual and norms are in `Output`."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.adapter_down = nn.Sequential(nn.Linear(width, inner), nn.ReLU())
        self.adapter_up = nn.Linear(inner, width)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.adapter_up(self.adapter_down(x_BTD))


class Output(nn.Module):
    """norm(h + x) with h = dense(y); with an adapter norm(adapter(norm(h + x)) + h + x), the adapters library's
    `seq_bn`."""

    def __init__(self, inner: int, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.dense = nn.Linear(inner, config["hidden_size"])
        self.LayerNorm = nn.LayerNorm(config["hidden_size"], eps=config["layer_norm_eps"])
        self.adapter: Bottleneck | None = None

    def forward(self, y_BTF: Tensor, x_BTD: Tensor) -> Tensor:
        h_BTD = self.dense(y_BTF)
        if self.adapter is None:
            return self.LayerNorm(h_BTD + x_BTD)
        return self.LayerNorm(self.adapter(self.LayerNorm(h_BTD + x_BTD)) + h_BTD + x_BTD)


class Layer(nn.Module):
    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        attend, output = SelfAttention(config), Output(config["hidden_size"], config)
        self.attention = nn.ModuleDict({"self": attend, "output": output})
        inner = nn.Linear(config["hidden_size"], config["intermediate_size"])
        self.intermediate = nn.ModuleDict({"dense": inner})
        self.output = Output(config["intermediate_size"], config)

    def forward(self, x_BTD: Tensor, bias_B11T: Tensor) -> Tensor:
        x_BTD = self.attention["output"](self.attention["self"](x_BTD, bias_B11T), x_BTD)
        return self.output(F.gelu(self.intermediate["dense"](x_BTD)), x_BTD)


class Bert(nn.Module):
    """tokens_BT, mask_BT (False for padding), types_BT → the last layer's hidden states x_BTD."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.embeddings = Embeddings(config)
        layers = nn.ModuleList(Layer(config) for _ in range(config["num_hidden_layers"]))
        self.encoder = nn.ModuleDict({"layer": layers})

    @property
    def layers(self) -> Iterable[Layer]:
        return cast(Iterable[Layer], self.encoder["layer"])

    def forward(self, tokens_BT: Tensor, mask_BT: Tensor, types_BT: Tensor) -> Tensor:
        x_BTD = self.embeddings(tokens_BT, types_BT)
        bias_B11T = torch.zeros(mask_BT.shape, dtype=x_BTD.dtype).masked_fill(~mask_BT, torch.finfo(x_BTD.dtype).min)
        for layer in self.layers:
            x_BTD = layer(x_BTD, bias_B11T[:, None, None, :])
        return x_BTD
