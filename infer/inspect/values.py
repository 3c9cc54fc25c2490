"""The numbers of one forward pass that the trace page shows, as plain lists.

A *step* is a position whose prediction is studied: those that wrote the answer's tokens, or the last one where there is
no answer. Of every step: which token each layer would predict (logit lens), and what each head and MLP added to the
logit of the actual next token. The last norm is a multiplication once its scale is known, so that logit is a sum:

    logit = scale · Σ_c c · (w ∘ u)     c: embedding, every head's z W_O, output biases, every MLP's output
                                        w: the norm's weight, u: the token's row of the output matrix

and a head's part is again a sum over the tokens it read, pattern_s · v_s W_O · (w ∘ u): which token was read, by which
head, and its effect. Both sums are computed in fp64; `sum_error` is their difference from the logit of the pass.
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

ALTERNATIVES = 5
PATTERNS = "layers.*.attn.pattern"
ASKED = (
    "embed, layers.*.attn.v, layers.*.attn.z, layers.*.mlp.out, "
    "layers.0.resid_pre, layers.*.resid_post, final_norm.in, final_norm.scale, logits"
)


def measure(model: Transformer, ids: Sequence[int], start: int, rows: Sequence[int]) -> tuple[dict[str, Any], Tape]:
    """(the page's values of one pass over `ids`, the tape of its patterns). `start` is the index of the answer's first
    token, or len(ids); `rows` are the positions whose attention and experts are kept, steps among them.
    Raises UserError where the model computes no numbers."""
    experts = bool(model.config.num_local_experts)
    watched = LoRAShare(model)
    asked = ASKED + (", layers.*.mlp.router" if experts else "")
    with torch.no_grad(), watched, record(model, asked) as tape, record(model, PATTERNS, positions=rows) as patterns:
        model(torch.tensor([list(ids)], device=model.device))
    steps = list(range(start - 1, len(ids) - 1)) if start < len(ids) else [len(ids) - 1]
    logits_TV = tape["logits"][0]
    if not logits_TV.isfinite().all():
        raise UserError("the model's logits are not finite numbers: its weights are corrupt, or the dtype too narrow")
    at_steps = {name: patterns[name][0, :, [rows.index(t) for t in steps]].double() for name in patterns}
    targets = [ids[t + 1] if t + 1 < len(ids) else int(logits_TV[t].argmax()) for t in steps]
    values = {
        "steps": steps,
        "targets": targets,
        "predictions": predictions(logits_TV, [*ids[1:], targets[-1] if start == len(ids) else None]),
        "lens": lens(model, tape, steps, targets),
        "attribution": attribution(model, tape, at_steps, steps, targets),
        "lora": watched.shares(steps),
        "experts": chosen_experts(model, tape, rows) if experts else None,
    }
    return values, patterns


def short(value: float) -> float | None:
    """Four significant digits: what a page can show. None for what is no number."""
    return float(f"{value:.4g}") if math.isfinite(value) else None


def shorts(values: Tensor) -> Any:
    """The same of a tensor, as nested lists."""
    rows = values.tolist()
    return [shorts(row) for row in values] if values.dim() > 1 else [short(value) for value in rows]


def predictions(logits_TV: Tensor, targets: Sequence[int | None]) -> list[dict[str, Any] | None]:
    """For each position, its prediction of the next token: probability, rank (1 is best), and the best others."""
    found: list[dict[str, Any] | None] = []
    for logits_V, token in zip(logits_TV.double(), targets, strict=True):
        if token is None:
            found.append(None)
            continue
        share_V = logits_V.softmax(-1)
        best, order = share_V.topk(min(ALTERNATIVES, len(share_V)))
        found.append(
            {
                "p": short(float(share_V[token])),
                "rank": rank(logits_V, token),
                "best": [[int(i), short(float(p))] for p, i in zip(best, order, strict=True)],
            }
        )
    return found


def rank(logits_V: Tensor, token: int) -> int:
    """1 for the best token; of equals the lower id is the better, as in greedy decoding."""
    above = int((logits_V > logits_V[token]).sum()) + int((logits_V[:token] == logits_V[token]).sum())
    return above + 1


def lens(model: Transformer, tape: Tape, steps: list[int], targets: list[int]) -> list[list[list[Any]]]:
    """For each step and each level of the stream (before layer 0, after each): [best token, its probability, the
    probability and the rank of the actual next token], through the last norm with that level's own scale."""
    L = model.config.num_hidden_layers
    levels = [tape["layers.0.resid_pre"], *(tape[f"layers.{n}.resid_post"] for n in range(L))]
    found: list[list[list[Any]]] = [[] for _ in steps]
    with torch.no_grad():
        for level_BTD in levels:
            logits_NV = model.head(model.model.norm(level_BTD[0, steps]))
            share_NV = logits_NV.softmax(-1)
            for row, token in enumerate(targets):
                best = int(logits_NV[row].argmax())
                found[row].append(
                    [
                        best,
                        short(float(share_NV[row, best])),
                        short(float(share_NV[row, token])),
                        rank(logits_NV[row], token),
                    ]
                )
    return found


def effective_weight(linear: torch.nn.Linear) -> Tensor:
    """The matrix that a linear layer multiplies by, its active adapter included, in fp64."""
    weight_OD = linear.weight.detach().double()
    if isinstance(linear, LoRALinear) and linear.active is not None and linear.original is None:
        weight_OD = weight_OD + linear.delta(linear.active).double()
    return weight_OD


def attribution(
    model: Transformer, tape: Tape, patterns: dict[str, Tensor], steps: list[int], targets: list[int]
) -> dict[str, Any]:
    """Direct logit attribution of each step: to the logit of the actual next token, and to its margin over the best
    other one. Sums over components are checked against the pass's own logits (`sum_error`)."""
    logits_NV = tape["logits"][0, steps].double()
    others_NV = logits_NV.scatter(1, torch.tensor(targets, device=logits_NV.device)[:, None], float("-inf"))
    rival = others_NV.argmax(-1).tolist()
    unembed_VD = model.lm_head if model.lm_head is not None else model.model.embed_tokens
    rows_VD = effective_weight(unembed_VD) if isinstance(unembed_VD, LoRALinear) else unembed_VD.weight.detach()
    weight_D = model.model.norm.weight.detach().double()
    scale_N1 = tape["final_norm.scale"][0, steps].double()
    token_ND, rival_ND = (rows_VD[wanted].double() * weight_D * scale_N1 for wanted in (targets, rival))
    numbers = torch.arange(len(steps), device=logits_NV.device)
    logit_N = logits_NV[numbers, torch.tensor(targets, device=logits_NV.device)]
    rival_N = logits_NV[numbers, torch.tensor(rival, device=logits_NV.device)]
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
    wanted_N: Tensor,
) -> dict[str, Any]:
    """What embedding, heads (and the tokens that they read), biases and MLPs add along a direction of each step."""
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
        "value": wanted_N.tolist(),
        "sum_error": float((sum_N - wanted_N).abs().max()),
    }


def chosen_experts(model: Transformer, tape: Tape, rows: Sequence[int]) -> list[list[list[list[float | None]]]]:
    """For each layer and kept position, [expert, its weight] of those that the router chose, as Experts chooses."""
    found = []
    for n in range(model.config.num_hidden_layers):
        logits_NE = tape[f"layers.{n}.mlp.router"][0, list(rows)]
        share_NE = F.softmax(logits_NE, dim=-1, dtype=torch.promote_types(logits_NE.dtype, torch.float32))
        weight_Nk, chosen_Nk = torch.topk(share_NE, model.config.num_experts_per_tok, dim=-1)
        weight_Nk = weight_Nk / weight_Nk.sum(dim=-1, keepdim=True)
        found.append(
            [
                [[int(e), short(float(w))] for e, w in zip(*pair, strict=True)]
                for pair in zip(chosen_Nk, weight_Nk, strict=True)
            ]
        )
    return found


class LoRAShare:
    """‖s·B A x‖ and ‖W x‖ of every adapted module and token, taken by hooks while a pass runs."""

    def __init__(self, model: Transformer) -> None:
        self.layers = {name: layer for name, layer in adapted(model).items() if layer.active and layer.original is None}
        self.lengths: dict[str, tuple[Tensor, Tensor]] = {}

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
            self.lengths[name] = (added_TO.double().norm(dim=-1).cpu(), base_TO.double().norm(dim=-1).cpu())

        return seen

    def shares(self, steps: list[int]) -> list[dict[str, Any]]:
        """One row a module: the ratio over the whole text, and at each step (none for experts, which see a part)."""
        found = []
        for name, (added_T, base_T) in self.lengths.items():
            whole = steps[-1] < len(added_T) and ".experts." not in name
            found.append(
                {
                    "module": name,
                    "all": short(float(added_T.norm() / base_T.norm().clamp_min(1e-300))),
                    "steps": shorts((added_T / base_T.clamp_min(1e-300))[steps]) if whole else None,
                }
            )
        return found
