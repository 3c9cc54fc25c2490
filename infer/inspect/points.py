"""The names of recording.py: the module whose input or output each value of a forward pass is."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from model import Transformer
from model.attention import Attention, split_heads
from model.transformer import RMSNorm

View = Callable[[Any, Tensor], Tensor]  # (the module, its input or output)


@dataclass(frozen=True)
class Point:
    """A named value: a module's first input (`side` "in") or its output ("out"), transformed by `view` if given.
    `derived` values are computed from it and cannot be overwritten."""

    name: str
    shape: str
    what: str
    module: str
    side: str
    view: View | None = None
    derived: bool = False


class Names(dict[str, str]):
    """Name → shape and meaning. Prints as a table with one row for all layers (`layers.N.`)."""

    def __str__(self) -> str:
        rows = {re.sub(r"^layers\.\d+", "layers.N", name): what for name, what in self.items()}
        width = max(map(len, rows), default=0)
        return "\n".join(f"{name:{width}}  {what}" for name, what in rows.items())

    __repr__ = __str__


def _scale(norm: RMSNorm, x_BTD: Tensor) -> Tensor:
    return norm.scale(x_BTD.to(torch.promote_types(x_BTD.dtype, torch.float32)))


def _heads(attention: Attention, v_BTD: Tensor) -> Tensor:
    return split_heads(v_BTD, attention.head_dim)


def head_results(attention: Attention, z_BHTK: Tensor) -> Tensor:
    """What each head adds to the residual stream: o_proj of its output alone, without bias → result_BHTD."""
    z_BTD = z_BHTK.transpose(1, 2).flatten(2)
    bias_11D = attention.o_proj(torch.zeros_like(z_BTD[:1, :1]))
    results = []
    for head in range(z_BHTK.shape[1]):
        columns = slice(head * attention.head_dim, (head + 1) * attention.head_dim)
        alone_BTD = torch.zeros_like(z_BTD)
        alone_BTD[..., columns] = z_BTD[..., columns]
        results.append(attention.o_proj(alone_BTD) - bias_11D)
    return torch.stack(results, dim=1)


def _norm(name: str, module: str, what: str) -> list[Point]:
    return [
        Point(f"{name}.in", "BTD", f"input of the {what}", module, "in"),
        Point(f"{name}.scale", "BT1", f"factor of the {what}, 1/√(mean(x²) + eps)", module, "in", _scale, True),
        Point(f"{name}.out", "BTD", f"output of the {what}: in · scale · weight", module, "out"),
    ]


def points(model: Transformer) -> dict[str, Point]:
    """All points of a model by name, in the order in which a forward pass computes them."""
    found = [Point("embed", "BTD", "token embeddings", "model.embed_tokens", "out")]
    for number, block in enumerate(model.model.layers):
        name, at = f"layers.{number}", f"model.layers.{number}"
        attn, attend = f"{at}.self_attn", f"{at}.self_attn.attend"
        found += [Point(f"{name}.resid_pre", "BTD", "residual stream before the block", at, "in")]
        found += _norm(f"{name}.attn_norm", f"{at}.input_layernorm", "norm before attention")
        found += [
            Point(f"{name}.attn.q", "BHTK", "queries before rotary", f"{attn}.rotate_q", "in"),
            Point(f"{name}.attn.k", "BGTK", "keys before rotary", f"{attn}.rotate_k", "in"),
            Point(f"{name}.attn.v", "BGTK", "values", f"{attn}.v_proj", "out", _heads),
            Point(f"{name}.attn.q_rot", "BHTK", "queries after rotary", f"{attn}.rotate_q", "out"),
            Point(f"{name}.attn.k_rot", "BGTK", "keys after rotary", f"{attn}.rotate_k", "out"),
            Point(f"{name}.attn.scores", "BHTS", "q·k/√K; the dtype's minimum if masked", f"{attend}.scores", "out"),
            Point(f"{name}.attn.pattern", "BHTS", "attention weights, softmax(scores)", f"{attend}.pattern", "out"),
            Point(f"{name}.attn.z", "BHTK", "head outputs, pattern · v", attend, "out"),
            Point(
                f"{name}.attn.result",
                "BHTD",
                "what each head adds to the residual stream, without bias",
                attend,
                "out",
                head_results,
                True,
            ),
            Point(f"{name}.attn.out", "BTD", "what attention adds to the residual stream", attn, "out"),
            Point(f"{name}.resid_mid", "BTD", "residual stream after attention", f"{at}.resid_mid", "out"),
        ]
        found += _norm(f"{name}.mlp_norm", f"{at}.post_attention_layernorm", "norm before feed-forward")
        found += _feed_forward(name, at, block) + [
            Point(f"{name}.resid_post", "BTD", "residual stream after the block", at, "out")
        ]
    found += _norm("final_norm", "model.norm", "final norm")
    found += [Point("logits", "BTV", "logits of the next token", "", "out")]
    return {point.name: point for point in found}


def _feed_forward(name: str, at: str, block: nn.Module) -> list[Point]:
    if hasattr(block, "block_sparse_moe"):
        moe = f"{at}.block_sparse_moe"
        return [
            Point(f"{name}.mlp.router", "BTE", "router logits over the experts", f"{moe}.gate", "out"),
            Point(f"{name}.mlp.out", "BTD", "what the experts add to the residual stream", moe, "out"),
        ]
    mlp = f"{at}.mlp"
    return [
        Point(f"{name}.mlp.gate", "BTF", "gate projection before silu", f"{mlp}.gate_proj", "out"),
        Point(f"{name}.mlp.up", "BTF", "up projection", f"{mlp}.up_proj", "out"),
        Point(f"{name}.mlp.hidden", "BTF", "silu(gate) · up", f"{mlp}.down_proj", "in"),
        Point(f"{name}.mlp.out", "BTD", "what the MLP adds to the residual stream", mlp, "out"),
    ]
