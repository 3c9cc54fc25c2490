"""The numbers on the trace page, from one forward pass, as plain lists.

A *step* is a position whose prediction is examined: those that predicted the answer's tokens, or the last position if
there is no answer. For each step: the token that each layer would predict (logit lens), and the contribution of each
head and MLP to the logit of the actual next token (direct logit attribution). With the scale of the final norm fixed,
that logit is a sum over components c:

    logit = scale · Σ_c c · (w ∘ u)     c: embedding, every head's z W_O, output biases, every MLP's output
                                        w: the norm's weight, u: the token's row of the output matrix

A head's contribution is a sum over the tokens it attended to, pattern_s · v_s W_O · (w ∘ u). Both sums are computed in
fp64; `sum_error` is their difference from the logit of the pass.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from infer.inspect.recording import Tape, record
from lora.adapter import adapted
from lora.layer import LoRALinear
from model import Transformer
from model.support.cli import UserError

TOP = 5  # predictions shown per position
PATTERNS = "layers.*.attn.pattern"
VALUES = (
    "embed, layers.*.attn.v, layers.*.attn.z, layers.*.mlp.out, "
    "layers.0.resid_pre, layers.*.resid_post, final_norm.in, final_norm.scale, logits"
)


def measure(model: Transformer, ids: Sequence[int], start: int, rows: Sequence[int]) -> tuple[dict[str, Any], Tape]:
    """The page's values of one pass over `ids`, and the tape of its attention patterns.

    `start` is the index of the answer's first token, or len(ids) without an answer. `rows` are the positions whose
    attention and experts are kept; they include the steps. Raises UserError if the logits are not finite.
    """
    experts = bool(model.config.num_local_experts)
    lora = LoRAShare(model)
    names = VALUES + (", layers.*.mlp.router" if experts else "")
    with torch.no_grad(), lora, record(model, names) as tape, record(model, PATTERNS, positions=rows) as patterns:
        model(torch.tensor([list(ids)], device=model.device))
    steps = list(range(start - 1, len(ids) - 1)) if start < len(ids) else [len(ids) - 1]
    logits_TV = tape["logits"][0]
    if not logits_TV.isfinite().all():
        raise UserError("the model's logits are not finite: its weights are corrupt, or the dtype is too narrow")
    patterns_HNT = {name: patterns[name][0, :, [rows.index(t) for t in steps]].double() for name in patterns}
    targets = [ids[t + 1] if t + 1 < len(ids) else int(logits_TV[t].argmax()) for t in steps]
    values = {
        "steps": steps,
        "targets": targets,
        "predictions": predictions(logits_TV, [*ids[1:], targets[-1] if start == len(ids) else None]),
        "lens": lens(model, tape, steps, targets),
        "attribution": attribution(model, tape, patterns_HNT, steps, targets),
        "lora": lora.shares(steps),
        "experts": chosen_experts(model, tape, rows) if experts else None,
    }
    return values, patterns


def short(value: float) -> float | None:
    """A number rounded to four significant digits; None for NaN and infinity, which JSON lacks."""
    return float(f"{value:.4g}") if math.isfinite(value) else None


def shorts(values: Tensor) -> Any:
    """A tensor as nested lists of `short` numbers."""
    return [shorts(row) for row in values] if values.dim() > 1 else [short(value) for value in values.tolist()]


def predictions(logits_TV: Tensor, targets: Sequence[int | None]) -> list[dict[str, Any] | None]:
    """For each position, probability and rank of its target and the TOP likeliest tokens; None without a target."""
    found: list[dict[str, Any] | None] = []
    for logits_V, token in zip(logits_TV.double(), targets, strict=True):
        if token is None:
            found.append(None)
            continue
        probability_V = logits_V.softmax(-1)
        best, ids = probability_V.topk(min(TOP, len(probability_V)))
        found.append(
            {
                "p": short(float(probability_V[token])),
                "rank": rank(logits_V, token),
                "best": [[int(i), short(float(p))] for p, i in zip(best, ids, strict=True)],
            }
        )
    return found


def rank(logits_V: Tensor, token: int) -> int:
    """Rank of a token, 1 for the highest logit; ties go to the lower id, as in greedy decoding."""
    above = int((logits_V > logits_V[token]).sum()) + int((logits_V[:token] == logits_V[token]).sum())
    return above + 1


def lens(model: Transformer, tape: Tape, steps: list[int], targets: list[int]) -> list[list[list[Any]]]:
    """Logit lens. For each step, at the residual stream before layer 0 and after each layer: [best token, its
    probability, probability of the actual next token, its rank]. The final norm uses the scale of that stream."""
    L = model.config.num_hidden_layers
    streams = [tape["layers.0.resid_pre"], *(tape[f"layers.{n}.resid_post"] for n in range(L))]
    found: list[list[list[Any]]] = [[] for _ in steps]
    with torch.no_grad():
        for x_BTD in streams:
            logits_NV = model.head(model.model.norm(x_BTD[0, steps]))
            probability_NV = logits_NV.softmax(-1)
            for row, token in enumerate(targets):
                best = int(logits_NV[row].argmax())
                p_best, p_token = (short(float(probability_NV[row, i])) for i in (best, token))
                found[row].append([best, p_best, p_token, rank(logits_NV[row], token)])
    return found


def effective_weight(linear: torch.nn.Linear) -> Tensor:
    """The weight of a linear layer with its active adapter merged, in fp64."""
    weight_OD = linear.weight.detach().double()
    if isinstance(linear, LoRALinear) and linear.active is not None and linear.original is None:
        weight_OD = weight_OD + linear.delta(linear.active).double()
    return weight_OD


def attribution(
    model: Transformer, tape: Tape, patterns: dict[str, Tensor], steps: list[int], targets: list[int]
) -> dict[str, Any]:
    """Direct logit attribution of each step: to the logit of the actual next token, and to its margin over the
    likeliest other token (`rival`)."""
    logits_NV = tape["logits"][0, steps].double()
    others_NV = logits_NV.scatter(1, torch.tensor(targets, device=logits_NV.device)[:, None], float("-inf"))
    rival = others_NV.argmax(-1).tolist()
    head = model.lm_head if model.lm_head is not None else model.model.embed_tokens
    head_VD = effective_weight(head) if isinstance(head, LoRALinear) else head.weight.detach()
    weight_D = model.model.norm.weight.detach().double()
    scale_N1 = tape["final_norm.scale"][0, steps].double()
    token_ND, rival_ND = (head_VD[ids].double() * weight_D * scale_N1 for ids in (targets, rival))
    row_N = torch.arange(len(steps), device=logits_NV.device)
    logit_N, rival_N = (logits_NV[row_N, torch.tensor(ids, device=logits_NV.device)] for ids in (targets, rival))
    return {
        "rival": rival,
        "logit": components(model, tape, patterns, steps, token_ND, logit_N),
        "margin": components(model, tape, patterns, steps, token_ND - rival_ND, logit_N - rival_N),
    }


def components(
    model: Transformer,
    tape: Tape,
    patterns: dict[str, Tensor],
    steps: list[int],
    direction_ND: Tensor,
    expected_N: Tensor,
) -> dict[str, Any]:
    """Contributions of embedding, heads, attended tokens, biases and MLPs along one direction per step; their sum is
    compared with `expected_N` (`sum_error`)."""
    L, H = model.config.num_hidden_layers, model.config.num_attention_heads
    N, T = len(steps), tape["embed"].shape[1]
    embed_N = (tape["embed"][0, steps].double() * direction_ND).sum(-1)
    bias_N = torch.zeros_like(embed_N)
    head_NLH, mlp_NL = direction_ND.new_zeros(N, L, H), direction_ND.new_zeros(N, L)
    source_NT, strongest = direction_ND.new_zeros(N, T), torch.zeros(N, L, H, dtype=torch.int64)
    for n in range(L):
        attention = model.model.layers[n].self_attn
        into_NHK = (direction_ND @ effective_weight(attention.o_proj)).view(N, H, -1)
        head_NLH[:, n] = (tape[f"layers.{n}.attn.z"][0, :, steps].double().transpose(0, 1) * into_NHK).sum(-1)
        v_GTK = tape[f"layers.{n}.attn.v"][0].double()
        v_HTK = v_GTK.repeat_interleave(H // len(v_GTK), dim=0)
        read_NHT = torch.einsum("htk,nhk->nht", v_HTK, into_NHK)
        read_NHT *= patterns[f"layers.{n}.attn.pattern"].transpose(0, 1)
        source_NT += read_NHT.sum(1)
        strongest[:, n] = read_NHT.abs().argmax(-1).cpu()
        mlp_NL[:, n] = (tape[f"layers.{n}.mlp.out"][0, steps].double() * direction_ND).sum(-1)
        if attention.o_proj.bias is not None:
            bias_N += direction_ND @ attention.o_proj.bias.detach().double()
    sum_N = embed_N + bias_N + head_NLH.sum((1, 2)) + mlp_NL.sum(1)
    return {
        "embed": shorts(embed_N),
        "bias": shorts(bias_N),
        "heads": shorts(head_NLH),
        "mlps": shorts(mlp_NL),
        "sources": shorts(source_NT),
        "read": strongest.tolist(),
        "sum": sum_N.tolist(),
        "value": expected_N.tolist(),
        "sum_error": float((sum_N - expected_N).abs().max()),
    }


def chosen_experts(model: Transformer, tape: Tape, rows: Sequence[int]) -> list[list[list[list[float | None]]]]:
    """For each layer and position of `rows`, [expert, weight] of the experts that the router chose (as in Experts)."""
    found = []
    for n in range(model.config.num_hidden_layers):
        logits_NE = tape[f"layers.{n}.mlp.router"][0, list(rows)]
        probability_NE = F.softmax(logits_NE, dim=-1, dtype=torch.promote_types(logits_NE.dtype, torch.float32))
        weight_Nk, expert_Nk = torch.topk(probability_NE, model.config.num_experts_per_tok, dim=-1)
        weight_Nk = weight_Nk / weight_Nk.sum(dim=-1, keepdim=True)
        found.append(
            [
                [[expert, short(weight)] for expert, weight in zip(*chosen, strict=True)]
                for chosen in zip(expert_Nk.tolist(), weight_Nk.tolist(), strict=True)
            ]
        )
    return found


class LoRAShare:
    """Norms ‖s·B A x‖ and ‖W x‖ of every adapted module at every token, recorded by hooks."""

    def __init__(self, model: Transformer) -> None:
        self.layers = {name: layer for name, layer in adapted(model).items() if layer.active and layer.original is None}
        self.norms: dict[str, tuple[Tensor, Tensor]] = {}

    def __enter__(self) -> None:
        self.handles = [layer.register_forward_hook(self.hook(name)) for name, layer in self.layers.items()]

    def __exit__(self, *_: Any) -> None:
        for handle in self.handles:
            handle.remove()

    def hook(self, name: str) -> Any:
        def seen(layer: LoRALinear, inputs: tuple[Tensor], _output: Tensor) -> None:
            assert layer.active is not None
            x_TD = inputs[0].flatten(0, -2)
            a_RD, b_OR = (matrices[layer.active].to(x_TD.dtype) for matrices in (layer.lora_A, layer.lora_B))
            added_TO = F.linear(F.linear(x_TD, a_RD), b_OR) * layer.scale[layer.active]
            base_TO = F.linear(x_TD, layer.weight)
            self.norms[name] = (added_TO.double().norm(dim=-1).cpu(), base_TO.double().norm(dim=-1).cpu())

        return seen

    def shares(self, steps: list[int]) -> list[dict[str, Any]]:
        """For each module, ‖s·B A x‖ / ‖W x‖ over the whole text and at each step. Steps are None for experts, which
        get only a part of the tokens."""
        found = []
        for name, (added_T, base_T) in self.norms.items():
            has_steps = steps[-1] < len(added_T) and ".experts." not in name
            found.append(
                {
                    "module": name,
                    "all": short(float(added_T.norm() / base_T.norm().clamp_min(1e-300))),
                    "steps": shorts((added_T / base_T.clamp_min(1e-300))[steps]) if has_steps else None,
                }
            )
        return found
