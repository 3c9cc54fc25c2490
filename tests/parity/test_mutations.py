"""Small wrongs put into the model on purpose: the parity check catches each and names the stage where it begins.

Each is a mistake that public code has made. Equal greedy text or a bf16 tolerance would miss most of them.
"""

import types
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from their_models import make_theirs
from tiny_models import raw_config, some_tokens

from eval.parity import stages
from eval.parity.checks import compare_all
from model import ModelConfig, Transformer
from model.checkpoints.mistral import to_halves, to_pairs
from model.rotary import Rotary


def first_difference(family, wrong, tmp_path, **changes) -> str | None:
    """The first stage that differs from transformers' after `wrong(model)`; None where all are equal."""
    peer = make_theirs(family, **changes)
    peer.save_pretrained(tmp_path)
    model = wrong(Transformer.from_pretrained(tmp_path))
    tokens = some_tokens(40, 1)
    with torch.no_grad():
        rows = compare_all("stage", stages.ours(model, tokens)[0], stages.theirs(peer, tokens)[0])
    return next((row.name for row in rows if not row.ok), None)


def windows(change):
    def wrong(model):
        for block in model.model.layers:
            block.self_attn.window = change(block.self_attn.window)
        return model

    return wrong


def each(kind: str, change):
    """Apply `change` to every module of that class name."""

    def wrong(model):
        for module in model.modules():
            if type(module).__name__ == kind:
                change(module)
        return model

    return wrong


def weights(ending: str, change):
    def wrong(model):
        for name, parameter in model.named_parameters():
            if name.endswith(ending):
                parameter.data = change(parameter.data)
        return model

    return wrong


def eps(value):
    return each("RMSNorm", lambda norm: setattr(norm, "eps", value))


def config_change(**changes):
    """The same weights under a config that differs."""

    def wrong(model):
        other = Transformer(replace(model.config, **changes)).eval()
        other.load_state_dict(model.state_dict())
        return other

    return wrong


def late_cast(self, x):
    wide = x.float()
    return (self.weight.float() * wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


def interleaved(self, x, rotary):
    """The rotary layout of Mistral's native files on weights that are in halves."""
    cos, sin = (t[..., : x.shape[-1] // 2].repeat_interleave(2, -1).unsqueeze(1) for t in rotary)
    turned = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
    return x * cos + turned * sin


def shifted(model):
    """Positions off by one only for what follows: as left padding without explicit positions does."""
    forward = model.model.rotary.forward
    model.model.rotary.forward = lambda positions, dtype: forward(positions + (positions >= 7), dtype)
    return model


def softmax_after_top_k(self, x_BTD):
    x = x_BTD.flatten(0, 1)
    value, chosen = torch.topk(self.gate(x), self.top_k)
    weight = value.softmax(-1)
    out = torch.zeros_like(x)
    for index, expert in enumerate(self.experts):
        token, place = (chosen == index).nonzero(as_tuple=True)
        out = out.index_add(0, token, expert(x[token]) * weight[token, place, None])
    return out.view_as(x_BTD)


def unnormalised(self, x_BTD):
    x = x_BTD.flatten(0, 1)
    value, chosen = torch.topk(self.gate(x).float().softmax(-1), self.top_k)
    out = torch.zeros_like(x)
    for index, expert in enumerate(self.experts):
        token, place = (chosen == index).nonzero(as_tuple=True)
        out = out.index_add(0, token, expert(x[token]) * value[token, place, None])
    return out.view_as(x_BTD)


def swapped_heads(x_BGSK, heads):
    """Key/value head g % G for query head g, where groups are neighbours."""
    return x_BGSK.repeat(1, heads // x_BGSK.shape[1], 1, 1)


def method(kind, function, name="forward"):
    return each(kind, lambda module: setattr(module, name, types.MethodType(function, module)))


Q, K, V, A = "layer 0 q", "layer 0 k", "layer 0 v", "layer 0 attention"
MUTATIONS = {
    "window one wider": ("mistral", windows(lambda w: w + 1), A),
    "window one narrower": ("mistral", windows(lambda w: w - 1), A),
    "window ignored": ("mistral", windows(lambda w: None), A),
    "window given to a model without": ("mistral-no-window", windows(lambda w: 39), A),
    "window of the wrong layers": ("qwen2-window", config_change(windows=(7, 7, None)), A),
    "eps 1e-6 for 1e-5": ("mistral", eps(1e-6), "layer 0 norm"),
    "theta x 1.001": ("mistral", config_change(rope_theta=1e4 * 1.001), Q),
    "rotary layouts swapped": ("mistral", method("Rotate", interleaved), Q),
    "q left in the native layout": ("llama", weights("q_proj.weight", lambda q: to_pairs(q, 6)), Q),
    "positions off by one after padding": ("mistral", shifted, Q),
    "positions from one": (
        "llama-3",
        lambda m: (
            setattr(
                m.model.rotary,
                "forward",
                types.MethodType(lambda self, p, d: Rotary.forward(self, p + 1, d), m.model.rotary),
            ),
            m,
        )[1],
        Q,
    ),
    "Llama-3's scaling ignored": ("llama-3", config_change(rope_scaling=None), Q),
    "linear scaling ignored": ("llama-linear", config_change(rope_scaling=None), Q),
    "yarn's scaling ignored": ("llama-yarn", config_change(rope_scaling=None), Q),
    "q bias dropped": ("qwen2", weights("q_proj.bias", torch.zeros_like), Q),
    "k bias dropped": ("qwen2", weights("k_proj.bias", torch.zeros_like), K),
    "v bias dropped": ("qwen2", weights("v_proj.bias", torch.zeros_like), V),
    "router softmax after the choice": ("mixtral", method("Experts", softmax_after_top_k), "layer 0 experts"),
    "router weights not made to sum to one": ("mixtral", method("Experts", unnormalised), "layer 0 experts"),
    "gate and up swapped": (
        "llama",
        lambda m: (
            [
                setattr(
                    b.mlp,
                    "forward",
                    types.MethodType(
                        lambda self, x: self.down_proj(F.silu(self.up_proj(x)) * self.gate_proj(x)), b.mlp
                    ),
                )
                for b in m.model.layers
            ],
            m,
        )[1],
        "layer 0 MLP",
    ),
    "gelu for silu": (
        "llama",
        lambda m: (
            [
                setattr(
                    b.mlp,
                    "forward",
                    types.MethodType(
                        lambda self, x: self.down_proj(F.gelu(self.gate_proj(x)) * self.up_proj(x)), b.mlp
                    ),
                )
                for b in m.model.layers
            ],
            m,
        )[1],
        "layer 0 MLP",
    ),
    "the final norm left out": ("llama", lambda m: (setattr(m.model.norm, "forward", lambda x: x), m)[1], "final norm"),
    "one row of the output matrix": (
        "llama",
        weights("lm_head.weight", lambda w: w.index_fill(0, torch.tensor([5]), 0.0)),
        "logits",
    ),
}


@pytest.mark.parametrize("what", MUTATIONS)
def test_a_wrong_is_caught_and_named(what, tmp_path):
    family, wrong, stage = MUTATIONS[what]
    assert first_difference(family, lambda model: model, tmp_path / "right") is None
    assert first_difference(family, wrong, tmp_path / "wrong") == stage


def test_key_value_heads_in_the_wrong_order(tmp_path, monkeypatch):
    monkeypatch.setattr("model.attention.repeat_kv", swapped_heads)
    assert first_difference("mistral", lambda model: model, tmp_path) == A


def test_k_permuted_with_qs_head_count(tmp_path):
    """From the native layout with four heads of 4 where there are two of 8: it runs, and it is wrong."""

    def permuted(size):
        return weights("k_proj.weight", lambda k: to_halves(to_pairs(k, 8), size))

    assert first_difference("mistral", permuted(8), tmp_path / "right", head_dim=8) is None
    assert first_difference("mistral", permuted(4), tmp_path / "wrong", head_dim=8) == K


def test_the_norms_cast_order(tmp_path):
    """In fp32 the two orders are the same arithmetic; in bf16 they are not, and the check runs there too."""
    peer = make_theirs("mistral").bfloat16()
    peer.save_pretrained(tmp_path)
    model = Transformer.from_pretrained(tmp_path, dtype=torch.bfloat16)
    tokens = some_tokens(40, 1)

    def norm_row():
        with torch.no_grad():
            rows = compare_all("stage", stages.ours(model, tokens)[0], stages.theirs(peer, tokens)[0])
        return next(row for row in rows if row.name == "layer 0 norm")

    assert norm_row().ok
    method("RMSNorm", late_cast)(model)
    assert not norm_row().ok


def test_a_config_read_with_the_wrong_default(tmp_path):
    """transformers takes 4,096 where a mistral config leaves the window out; we refuse, and here is why it matters."""
    raw = raw_config("mistral", sliding_window=None)
    assert ModelConfig.from_dict(raw).window is None
    assert first_difference("mistral", windows(lambda w: 4096), tmp_path) == A
