"""Decoder-only transformer for Llama, Mistral, Mixtral and Qwen2: embedding, L blocks, final norm, LM head.

Module names are those of Hugging Face checkpoints (`model.layers.0.self_attn.q_proj.weight`), so keys need no mapping.
A tensor's name ends in its shape, a letter per dimension (model/README.md). Unusual here:

* Masks come from absolute positions (mask.py), not from token indices.
* RMSNorm casts to the input's dtype before multiplying by its weight, as transformers does.
* Logits are at least fp32 whatever the weights' dtype.
* `readout` receives the final hidden states and the head, so that a caller computes only the logits it needs.
"""

from __future__ import annotations

import os
from collections.abc import Callable, MutableSequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.attention import Attention, PlainAttend
from model.cache import KVCache
from model.config import ModelConfig
from model.mask import Layout, Visible
from model.rotary import Rotary

Readout = Callable[[Tensor, Callable[[Tensor], Tensor]], Any]


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) in at least fp32, cast to x's dtype, times the weight (arXiv 1910.07467)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def scale(self, wide_BTD: Tensor) -> Tensor:
        """1 / sqrt(mean(x²) + eps) of each token, scale_BT1."""
        return torch.rsqrt(wide_BTD.pow(2).mean(-1, keepdim=True) + self.eps)

    def forward(self, x_BTD: Tensor) -> Tensor:
        wide_BTD = x_BTD.to(torch.promote_types(x_BTD.dtype, torch.float32))
        scaled_BTD = wide_BTD * self.scale(wide_BTD)
        return self.weight * scaled_BTD.to(x_BTD.dtype)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) · up(x)) (arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        D, F_ = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(D, F_, bias=False)
        self.up_proj = nn.Linear(D, F_, bias=False)
        self.down_proj = nn.Linear(F_, D, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x_BTD)) * self.up_proj(x_BTD))


class Expert(nn.Module):
    """One SwiGLU expert under Mixtral's names: w1 gate, w3 up, w2 down."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        D, F_ = config.hidden_size, config.intermediate_size
        self.w1 = nn.Linear(D, F_, bias=False)
        self.w2 = nn.Linear(F_, D, bias=False)
        self.w3 = nn.Linear(D, F_, bias=False)

    def forward(self, x_ND: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x_ND)) * self.w3(x_ND))


class Experts(nn.Module):
    """Mixtral's mixture of experts (arXiv 2401.04088): each token goes to its top-k experts, weighted by the router."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.gate = nn.Linear(config.hidden_size, config.num_local_experts, bias=False)
        self.experts = nn.ModuleList(Expert(config) for _ in range(config.num_local_experts))

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_ND = x_BTD.flatten(0, 1)
        logits_NE = self.gate(x_BTD).flatten(0, 1)
        # as in Mixtral: softmax over all experts, then top-k, then renormalize
        probability_NE = F.softmax(logits_NE, dim=-1, dtype=torch.promote_types(logits_NE.dtype, torch.float32))
        weight_Nk, chosen_Nk = torch.topk(probability_NE, self.top_k, dim=-1)
        weight_Nk = weight_Nk / weight_Nk.sum(dim=-1, keepdim=True)
        out_ND = torch.zeros_like(x_ND)
        for index, expert in enumerate(self.experts):  # a fixed order of summation
            token_M, choice_M = (chosen_Nk == index).nonzero(as_tuple=True)
            y_MD = expert(x_ND[token_M]) * weight_Nk[token_M, choice_M, None]
            out_ND = out_ND.index_add(0, token_M, y_MD.to(out_ND.dtype))
        return out_ND.view_as(x_BTD)


class Block(nn.Module):
    """Pre-norm block: h = x + attention(norm(x)); h + feed_forward(norm(h))."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if config.num_local_experts:
            self.block_sparse_moe = Experts(config)
        else:
            self.mlp = MLP(config)
        self.resid_mid = nn.Identity()  # for hooks: the residual stream between attention and feed-forward

    @property
    def feed_forward(self) -> nn.Module:
        return self.block_sparse_moe if hasattr(self, "block_sparse_moe") else self.mlp

    def forward(
        self, x_BTD: Tensor, rotary: tuple[Tensor, Tensor], visible: Visible, cache: KVCache | None = None
    ) -> Tensor:
        x_BTD = self.resid_mid(x_BTD + self.self_attn(self.input_layernorm(x_BTD), rotary, visible, cache))
        return x_BTD + self.feed_forward(self.post_attention_layernorm(x_BTD))


class Decoder(nn.Module):
    """The model without its LM head: token ids to normed final hidden states."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        # nn.Embedding's own init on the meta device would import torch's compiler (140 MB, seconds)
        weight_VD = torch.zeros(config.vocab_size, config.hidden_size)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, _weight=weight_VD)
        blocks = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.layers = cast(MutableSequence[Block], blocks)  # for the type checker
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary = Rotary(config.head_dim, config.rope_theta, config.rope_scaling, config.max_position_embeddings)
        self.checkpoint_blocks = False  # activation checkpointing: recompute each block in the backward pass

    def forward(
        self, tokens_BT: Tensor, positions_BT: Tensor | None, cache: KVCache | None, layout: Layout | None
    ) -> Tensor:
        if positions_BT is None:
            positions_BT = plain_positions(tokens_BT, cache, layout)
        if cache is None:
            visible = Visible((positions_BT, layout), (positions_BT, layout), 0)
        else:
            visible = cache.extend(positions_BT, layout)
        x_BTD = self.embed_tokens(tokens_BT)
        rotary = self.rotary(positions_BT, x_BTD.dtype)
        for layer in self.layers:
            if self.checkpoint_blocks and torch.is_grad_enabled():
                x_BTD = checkpoint(layer, x_BTD, rotary, visible, use_reentrant=False)
            else:
                x_BTD = layer(x_BTD, rotary, visible, cache)
        return self.norm(x_BTD)


def plain_positions(tokens_BT: Tensor, cache: KVCache | None, layout: Layout | None) -> Tensor:
    """0, 1, 2, … for each row, continuing from the cache."""
    if layout is not None:
        raise ValueError("a layout needs positions: pass positions=, restarting at 0 in each document")
    steps_1T = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)[None]
    if cache is None or cache.length == 0:
        return steps_1T.expand(tokens_BT.shape)
    return cache.next_position_B1 + steps_1T


class Transformer(nn.Module):
    """A causal language model of the Llama, Mistral, Mixtral or Qwen2 family.

    `model(tokens_BT)` returns logits_BTV in fp32 (fp64 for an fp64 model). Keyword arguments:

    positions  (B, T) int64; default: 0, 1, 2, … continuing from the cache
    cache      a KVCache, to which the tokens are appended
    layout     documents and branches (mask.py); requires positions
    readout    called with (final hidden states x_BTD, head); its result is returned instead of the logits
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = None if config.tie_word_embeddings else nn.Linear(config.hidden_size, config.vocab_size, False)

    def forward(
        self,
        tokens_BT: Tensor,
        *,
        positions: Tensor | None = None,
        cache: KVCache | None = None,
        layout: Layout | None = None,
        readout: Readout | None = None,
    ) -> Any:
        x_BTD = self.model(tokens_BT, positions, cache, layout)
        return self.head(x_BTD) if readout is None else readout(x_BTD, self.head)

    def head(self, x_BTD: Tensor) -> Tensor:
        """Logits in at least fp32. Tied models use the embedding matrix."""
        out = self.lm_head(x_BTD) if self.lm_head is not None else F.linear(x_BTD, self.model.embed_tokens.weight)
        return out.to(torch.promote_types(out.dtype, torch.float32))

    def use_attention(self, kind: str) -> Transformer:
        """Use "plain" (the specification) or "fast" attention in every block; returns the model."""
        from model.fast_attention import FastAttend

        attend = {"plain": PlainAttend, "fast": FastAttend}[kind]
        for module in self.modules():
            if isinstance(module, Attention):
                module.attend = attend()
        return self

    @property
    def device(self) -> torch.device:
        return self.model.norm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the residual stream."""
        return self.model.norm.weight.dtype

    @classmethod
    def from_pretrained(
        cls, path: str | os.PathLike[str], dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
    ) -> Transformer:
        """Load a checkpoint (safetensors, Mistral's native files, or GGUF), streamed into `dtype` on `device`.

        Raises UserError if files are missing, corrupt, or disagree with the config.
        """
        from model.checkpoints.weights import load_weights

        config = ModelConfig.from_pretrained(path)
        with torch.device("meta"):
            model = cls(config)
        load_weights(model, path, dtype=dtype, device=device)
        return model.eval()

    def save_pretrained(self, path: str | os.PathLike[str], max_shard_bytes: int = 5 * 2**30) -> None:
        """Write safetensors shards and config.json as transformers reads them, atomically."""
        from model.checkpoints.weights import save_weights

        save_weights(self.state_dict(), self.config.to_dict(), path, max_shard_bytes)
