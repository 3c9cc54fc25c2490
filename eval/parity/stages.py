"""The intermediate values of a forward pass, ours and transformers', under the same names.

    embedding · layer 0 norm · layer 0 q, k (after rotary) · layer 0 v · layer 0 attention · layer 0 second norm ·
    layer 0 MLP (or experts) · … · final norm · logits · loss

`ours(model, tokens)` and `theirs(model, tokens)` return {stage: tensor}, ours in that order. Nothing is re-implemented:
forward hooks on the modules, and a wrapper around transformers' eager attention function, record the values. So the
first stage that differs is the one that is wrong.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from model import Transformer
from model.attention import split_heads

Stages = dict[str, Tensor]


def ours(model: Transformer, tokens_BT: Tensor) -> tuple[Stages, Tensor]:
    """Stages (on the CPU) and loss (with its autograd graph) of one forward pass."""
    core = model.model
    watched: dict[str, nn.Module] = {"embedding": core.embed_tokens}
    for number, block in enumerate(core.layers):
        attention, feed_forward = block.self_attn, "experts" if model.config.num_local_experts else "MLP"
        parts = {
            "norm": block.input_layernorm,
            "q": attention.rotate_q,
            "k": attention.rotate_k,
            "v": attention.v_proj,
            "attention": attention,
            "second norm": block.post_attention_layernorm,
            feed_forward: block.feed_forward,
        }
        watched |= {f"layer {number} {name}": part for name, part in parts.items()}
    watched["final norm"] = core.norm
    with _recording(watched) as seen:
        logits_BTV = model(tokens_BT)
    loss = F.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), tokens_BT[:, 1:].flatten())
    found = {
        name: split_heads(seen[name], model.config.head_dim) if name.endswith(" v") else seen[name] for name in watched
    }
    return {**found, "logits": _snapshot(logits_BTV), "loss": _snapshot(loss)}, loss


def theirs(model: Any, tokens_BT: Tensor) -> tuple[Stages, Tensor]:
    """The same for a transformers model with eager attention, or a peft model around one."""
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    core = causal.model
    watched: dict[str, nn.Module] = {"embedding": core.embed_tokens, "final norm": core.norm}
    for number, block in enumerate(core.layers):
        parts = {
            "norm": block.input_layernorm,
            "attention": block.self_attn,
            "second norm": block.post_attention_layernorm,
            "experts" if hasattr(block.mlp, "experts") else "MLP": block.mlp,
        }
        watched |= {f"layer {number} {name}": part for name, part in parts.items()}
    with _recording(watched) as seen, _eager_attention(core, seen):
        out = model(tokens_BT, labels=tokens_BT, use_cache=False)
    return {**seen, "logits": _snapshot(out.logits), "loss": _snapshot(out.loss)}, out.loss


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """Gradients by checkpoint name; transformers' fused expert matrices are split into Mixtral's w1, w2, w3."""
    model.zero_grad()
    loss.backward()
    found: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            continue
        grad, stem = parameter.grad.detach().cpu(), name.replace(".mlp.", ".block_sparse_moe.")
        if name.endswith("mlp.experts.gate_up_proj"):
            for expert, both in enumerate(grad):
                w1, w3 = both.chunk(2)
                found |= {stem.replace("gate_up_proj", f"{expert}.{w}.weight"): g for w, g in (("w1", w1), ("w3", w3))}
        elif name.endswith("mlp.experts.down_proj"):
            found |= {stem.replace("down_proj", f"{expert}.w2.weight"): g for expert, g in enumerate(grad)}
        else:
            found[stem if name.endswith("mlp.gate.weight") else name] = grad
    model.zero_grad()
    return found


def _snapshot(x: Tensor) -> Tensor:
    return x.detach().cpu().clone()


@contextlib.contextmanager
def _recording(watched: dict[str, nn.Module]) -> Iterator[Stages]:
    """Record the modules' outputs while the context is open (the first element of a tuple)."""
    seen: Stages = {}

    def hook(name: str) -> Any:
        return lambda _module, _inputs, out: seen.update({name: _snapshot(out[0] if isinstance(out, tuple) else out)})

    with contextlib.ExitStack() as stack:
        for name, module in watched.items():
            stack.callback(module.register_forward_hook(hook(name)).remove)
        yield seen


@contextlib.contextmanager
def _eager_attention(core: Any, seen: Stages) -> Iterator[None]:
    """Record the inputs of transformers' eager attention function: queries and keys after rotary, and values."""
    source = sys.modules[type(core.layers[0].self_attn).__module__]
    original = source.eager_attention_forward

    def recording(module: Any, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **options: Any) -> Any:
        parts = {"q": query, "k": key, "v": value}
        seen.update({f"layer {module.layer_idx} {name}": _snapshot(x) for name, x in parts.items()})
        return original(module, query, key, value, *rest, **options)

    source.eager_attention_forward = recording  # type: ignore[attr-defined]
    try:
        yield
    finally:
        source.eager_attention_forward = original  # type: ignore[attr-defined]
