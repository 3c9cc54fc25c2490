"""What each stage of a forward pass computes, ours and transformers', under the same names.

    embedding · layer 0 norm · layer 0 q, k (turned by position) · layer 0 v · layer 0 attention · layer 0 second norm ·
    layer 0 MLP (or experts) · … · final norm · logits · loss

`ours(model, tokens)` and `theirs(model, tokens)` return {stage: tensor} in that order. Nothing is re-implemented here:
the values are picked up by hooks from the modules that compute them, and from transformers' own eager attention
function, so a stage that differs is the stage that is wrong.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from model import Transformer
from model.attention import split_heads

Stages = dict[str, Tensor]


def ours(model: Transformer, tokens_BT: Tensor) -> tuple[Stages, Tensor]:
    """(stages on the CPU, the loss with its graph) of one plain forward pass."""
    core, K = model.model, model.config.head_dim
    watched: dict[str, tuple[nn.Module, Callable[[Tensor], Tensor]]] = {"embedding": (core.embed_tokens, _same)}
    for index, block in enumerate(core.layers):
        at = f"layer {index}"
        attention = block.self_attn
        watched[f"{at} norm"] = (block.input_layernorm, _same)
        watched[f"{at} q"], watched[f"{at} k"] = (attention.rotate_q, _same), (attention.rotate_k, _same)
        watched[f"{at} v"] = (attention.v_proj, lambda x: split_heads(x, K))
        watched[f"{at} attention"] = (attention, _same)
        watched[f"{at} second norm"] = (block.post_attention_layernorm, _same)
        watched[f"{at} {'experts' if model.config.num_local_experts else 'MLP'}"] = (block.feed_forward, _same)
    watched["final norm"] = (core.norm, _same)
    with _watching(watched) as seen:
        logits_BTV = model(tokens_BT)
    loss = cross_entropy(logits_BTV, tokens_BT)
    return {**_in_order(watched, seen), "logits": _kept(logits_BTV), "loss": _kept(loss)}, loss


def theirs(model: Any, tokens_BT: Tensor) -> tuple[Stages, Tensor]:
    """The same of a transformers model of one of our families (eager attention), or of a peft model around one."""
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    core = causal.model
    watched: dict[str, tuple[nn.Module, Callable[[Any], Tensor]]] = {"embedding": (core.embed_tokens, _same)}
    order = ["embedding"]
    for index, block in enumerate(core.layers):
        at = f"layer {index}"
        feed = f"{at} {'experts' if hasattr(block.mlp, 'experts') else 'MLP'}"
        watched[f"{at} norm"] = (block.input_layernorm, _same)
        watched[f"{at} attention"] = (block.self_attn, lambda out: out[0])
        watched[f"{at} second norm"] = (block.post_attention_layernorm, _same)
        watched[feed] = (block.mlp, _same)
        order += [f"{at} {part}" for part in ("norm", "q", "k", "v", "attention", "second norm")] + [feed]
    watched["final norm"] = (core.norm, _same)
    with _watching(watched) as seen, _eager_attention(core, seen):
        out = model(tokens_BT, labels=tokens_BT, use_cache=False)
    named = {name: seen[name] for name in [*order, "final norm"]}
    return {**named, "logits": _kept(out.logits), "loss": _kept(out.loss)}, out.loss


def cross_entropy(logits_BTV: Tensor, tokens_BT: Tensor) -> Tensor:
    """Mean next-token loss, in the logits' precision."""
    return F.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), tokens_BT[:, 1:].flatten())


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """Gradients by checkpoint name; transformers' fused expert matrices are taken apart into Mixtral's w1, w2, w3."""
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


def _same(x: Tensor) -> Tensor:
    return x


def _kept(x: Tensor) -> Tensor:
    return x.detach().cpu().clone()


def _in_order(names: Any, seen: Stages) -> Stages:
    return {name: seen[name] for name in names}


@contextlib.contextmanager
def _watching(watched: dict[str, tuple[nn.Module, Callable[[Any], Tensor]]]) -> Iterator[Stages]:
    seen: Stages = {}

    def hook(name: str, pick: Callable[[Any], Tensor]) -> Any:
        return lambda _module, _inputs, output: seen.__setitem__(name, _kept(pick(output)))

    handles = [module.register_forward_hook(hook(name, pick)) for name, (module, pick) in watched.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def _eager_attention(core: Any, seen: Stages) -> Iterator[None]:
    """Note what transformers hands its eager attention function: queries and keys already turned, and values."""
    place = sys.modules[type(core.layers[0].self_attn).__module__]
    original = place.eager_attention_forward

    def noted(module: Any, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **options: Any) -> Any:
        for name, x in (("q", query), ("k", key), ("v", value)):
            seen[f"layer {module.layer_idx} {name}"] = _kept(x)
        return original(module, query, key, value, *rest, **options)

    place.eager_attention_forward = noted  # type: ignore[attr-defined]
    try:
        yield
    finally:
        place.eager_attention_forward = original  # type: ignore[attr-defined]
