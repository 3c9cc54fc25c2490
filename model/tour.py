"""A forward pass told step by step, with lines of code, real numbers and one token's cost: `python -m model.tour`.

Nothing here computes the model: the numbers are picked up by hooks from the modules that do, and one of each step is
worked again by hand in fp64. Where a number worked by hand is not the program's, the exit code is 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from model.attention import Attention, PlainAttend, Scores, share
from model.cache import KVCache
from model.config import ModelConfig
from model.lesson import Step, amount, dot, near, numbers, shape, source, tell
from model.mask import Visible
from model.rotary import Rotary, Rotate
from model.support.cli import UserError, run
from model.support.hardware import read_rate
from model.text.tokenizer import Tokenizer
from model.transformer import MLP, Block, Decoder, Experts, RMSNorm, Transformer

NANO = {
    "model_type": "mistral", "vocab_size": 512, "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "sliding_window": 24, "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0, "max_position_embeddings": 2048,
}  # fmt: skip
PROMPT = "Left breast: invasive ductal carcinoma, 2.5 cm. ER+"
LONGEST = 512  # tokens: the plain path keeps every score
FIRST = "model.layers.0"
OWN = f"{FIRST}.self_attn"


@dataclass(frozen=True)
class Options:
    """Tell a forward pass: what happens to the last token of a prompt, from its id to the next token's probability."""

    weights: str = ""
    """A model's folder or .gguf file (empty: a nano Mistral with random weights, which needs no files)."""
    prompt: str = PROMPT
    """The text to read."""
    html: str = ""
    """Write a page to this file in place of telling it in the terminal."""


@dataclass
class Seen:
    """One forward pass of one row of tokens, and what layer 0's modules took in and gave out."""

    model: Transformer
    tokenizer: Tokenizer | None
    ids: list[int]
    pieces: list[str]
    into: dict[str, tuple[Any, ...]]
    out: dict[str, Tensor]
    logits_V: Tensor

    @property
    def config(self) -> ModelConfig:
        return self.model.config

    @property
    def block(self) -> Block:
        return self.model.model.layers[0]  # type: ignore[return-value]

    def last(self, name: str) -> Tensor:
        """A module's output for the last token."""
        return self.out[name][0, -1]


def observe(model: Transformer, tokenizer: Tokenizer | None, ids: list[int], pieces: list[str]) -> Seen:
    into: dict[str, tuple[Any, ...]] = {}
    out: dict[str, Tensor] = {}

    def hook(name: str) -> Any:
        def keep(_module: nn.Module, taken: tuple[Any, ...], given: Tensor) -> None:
            into[name], out[name] = taken, given

        return keep

    handles = [module.register_forward_hook(hook(name)) for name, module in model.named_modules()]
    try:
        with torch.no_grad():
            logits_BTV = model(torch.tensor([ids]))
    finally:
        for handle in handles:
            handle.remove()
    return Seen(model, tokenizer, ids, pieces, into, out, logits_BTV[0, -1])


def linear(module: nn.Linear) -> tuple[int, int]:
    """(FLOPs, bytes of weights) of a linear layer for one token: every weight is read once, multiplied and added."""
    count = module.weight.numel()
    return 2 * count, count * module.weight.element_size()


def total(*costs: tuple[int, int]) -> tuple[int, int]:
    return sum(c[0] for c in costs), sum(c[1] for c in costs)


def to_tokens(seen: Seen) -> Step:
    if seen.tokenizer is None:
        says = "The nano model comes without a tokenizer: each byte of the text is a token, and its value the id."
        code = source(encoded, 'text.encode("utf-8")')
    else:
        says = "The tokenizer cuts the text into pieces of its vocabulary; the model sees only their numbers."
        code = source(Tokenizer.encode, "self.engine.ids(text)")
    shown = list(zip(seen.pieces, seen.ids, strict=True))[-8:]
    facts = [("text", repr("".join(seen.pieces))), ("tokens", f"{len(seen.ids)}; the last: "
             + "  ".join(f"{piece!r}={i}" for piece, i in shown))]  # fmt: skip
    return Step("Text to tokens", says, code, facts)


def embedding(seen: Seen) -> Step:
    x_BTD = seen.out["model.embed_tokens"]
    says = ("Each id picks its row of the embedding table. This vector is the start of the residual stream, to which "
            "every layer adds. From here on we follow the last token.")  # fmt: skip
    facts = [("table", f"{shape(seen.model.model.embed_tokens.weight)} (V × D)"), ("x_BTD", shape(x_BTD)),
             (f"row {seen.ids[-1]}", numbers(x_BTD[0, -1]))]  # fmt: skip
    size = seen.config.hidden_size * x_BTD.element_size()
    return Step("Embedding", says, source(Decoder.forward, "self.embed_tokens(tokens_BT)"), facts, cost=(0, size))


def norm(seen: Seen) -> Step:
    module, x_D = seen.block.input_layernorm, seen.out["model.embed_tokens"][0, -1]
    mean = float(x_D.double().square().mean())
    value = float(x_D[0].double()) / (mean + module.eps) ** 0.5 * float(module.weight[0])
    facts = [("mean(x²)", f"{mean:.6g}"), ("eps", f"{module.eps:g}"),
             ("n_D", numbers(seen.last(f"{FIRST}.input_layernorm")))]  # fmt: skip
    how = f"{float(x_D[0]):+.5f} / √({mean:.5g} + {module.eps:g}) × {float(module.weight[0]):.4g}"
    hand = near(how, value, seen.last(f"{FIRST}.input_layernorm")[0])
    says = "Layer 0 begins. RMSNorm brings the vector to length √D, so that what follows does not depend on its size."
    size = module.weight.numel()
    return Step("Norm", says, source(RMSNorm.scale, "rsqrt"), facts, [hand], (4 * size, 4 * size))


def projections(seen: Seen) -> Step:
    own = seen.block.self_attn
    n_D, q_O = seen.last(f"{FIRST}.input_layernorm"), seen.last(f"{OWN}.q_proj")
    bias = 0.0 if own.q_proj.bias is None else float(own.q_proj.bias[0])
    c = seen.config
    facts = [(f"W{name}", f"{shape(module.weight)} ({heads} heads of {c.head_dim})") for name, module, heads in (
        ("q", own.q_proj, c.num_attention_heads), ("k", own.k_proj, c.num_key_value_heads),
        ("v", own.v_proj, c.num_key_value_heads))]  # fmt: skip
    facts.append(("q_O", numbers(q_O)))
    plus = " + bias" if bias else ""
    hand = dot(f"Σ n_D · Wq[0]{plus}, {len(n_D)} products", n_D, own.q_proj.weight[0], q_O[0], bias)
    says = "Three products: the token's query (what it looks for), key (what it is found by) and value (what it says)."
    return Step("Queries, keys, values", says, source(Attention.forward, "self.rotate_q(split_heads"), facts, [hand],
                total(*(linear(m) for m in (own.q_proj, own.k_proj, own.v_proj))))  # fmt: skip


def rotary(seen: Seen) -> Step:
    c, p = seen.config, len(seen.ids) - 1
    before_BHTK, (cos_BTK, sin_BTK) = seen.into[f"{OWN}.rotate_q"]
    q_K, turned_K = before_BHTK[0, 0, -1], seen.out[f"{OWN}.rotate_q"][0, 0, -1]
    cos, sin, half = float(cos_BTK[0, -1, 1]), float(sin_BTK[0, -1, 1]), c.head_dim // 2
    value = float(q_K[1]) * cos - float(q_K[1 + half]) * sin
    hand = [near(f"{float(q_K[1]):+.4f} × {cos:+.4f} − {float(q_K[1 + half]):+.4f} × {sin:+.4f}", value, turned_K[1],
                 float(q_K.abs().max()))]  # fmt: skip
    if c.rope_scaling is None:
        angle = p * c.rope_theta ** (-2 / c.head_dim)
        how = f"cos({p} × {c.rope_theta:g}^(−2/{c.head_dim})) = cos({angle:.4f})"
        hand.insert(0, near(how, math.cos(angle), cos, 1 + angle))
    says = (f"Position {p} turns each pair of a query's and a key's numbers by an angle of its own, so that their "
            f"product depends on how far apart they stand. Pair 1: numbers 1 and {1 + half} of head 0.")  # fmt: skip
    table = source(Rotary.forward, "frequencies(")
    facts = [("angles", f"{table.file}:{table.line}"), ("q before", numbers(q_K)), ("q after", numbers(turned_K))]
    return Step("Rotary positions", says, source(Rotate.forward, "torch.cat((-second"), facts, hand,
                (3 * c.head_dim * (c.num_attention_heads + c.num_key_value_heads), 0))  # fmt: skip


def attended(seen: Seen) -> tuple[Tensor, Tensor, Tensor, Tensor, Visible, int | None]:
    """(q_K, k_SK, v_SK, pattern_S) of layer 0's first head and the last token; who sees whom; the window."""
    q, k, v, visible, window = seen.into[f"{OWN}.attend"]
    pattern_BHTS, heads = seen.out[f"{OWN}.attend.pattern"], q.shape[1]
    return q[0, 0, -1], share(k, heads)[0, 0], share(v, heads)[0, 0], pattern_BHTS[0, 0, -1], visible, window


def mask(seen: Seen) -> Step:
    *_, visible, window = attended(seen)
    row_S = visible.mask(window)[0, -1]
    first, p = int(row_S.int().argmax()), len(seen.ids) - 1
    says = ("A token sees itself and what came before it, through a window where the model has one: key j is seen from "
            "query i when i − W < j ≤ i. That is decided from positions, in one place.")  # fmt: skip
    facts = [("window", f"{window or 'none'}"), ("seen", f"keys {first} … {p}: {int(row_S.sum())} of {p + 1}"),
             ("as text", repr("".join(seen.pieces[first:])))]  # fmt: skip
    hand = near(f"min({p + 1}, W)", float(min(p + 1, window or p + 1)), float(row_S.sum()))
    code = source(Visible.block, "distance_BTS < window" if window else "distance_BTS >= 0")
    return Step("Who sees whom", says, code, facts, [hand])


def scores(seen: Seen) -> Step:
    q_K, k_SK, _, pattern_S, visible, window = attended(seen)
    row_S = visible.mask(window)[0, -1]
    score_S = (k_SK[row_S].double() @ q_K.double()) * len(q_K) ** -0.5
    best = int(pattern_S.argmax())
    place = int(row_S[:best].sum())
    weight = float(score_S.softmax(0)[place])
    hand = near(f"e^{float(score_S[place]):.4f} / Σ e^score over {len(score_S)} keys", weight, pattern_S[best],
                weight * (1 + float(score_S.abs().max())) * 4)  # fmt: skip
    bars = "▁▂▃▄▅▆▇█"
    line = "".join(bars[min(7, int(float(w) / float(pattern_S.max()) * 7.999))] for w in pattern_S[row_S])
    top = pattern_S.topk(min(3, int(row_S.sum())))
    facts = [("head 0 looks at", "  ".join(f"{seen.pieces[int(i)]!r} at {int(i)}: {float(w):.1%}" for w, i in
              zip(top.values, top.indices, strict=True))), ("every key", line)]  # fmt: skip
    says = ("The query's product with each key, over √K, says how much the key is wanted; softmax makes that a share "
            "of one. Random weights look everywhere alike; a trained head does not.")  # fmt: skip
    c, S = seen.config, int(row_S.sum())
    return Step("Scores and pattern", says, source(Scores.forward, "torch.matmul(q_BHTK"), facts, [hand],
                (2 * c.num_attention_heads * c.head_dim * S, c.num_key_value_heads * c.head_dim * S * 4))  # fmt: skip


def mix(seen: Seen) -> Step:
    _, _, v_SK, pattern_S, visible, window = attended(seen)
    out_K = seen.out[f"{OWN}.attend"][0, 0, -1]
    c, S = seen.config, int(visible.mask(window)[0, -1].sum())
    hand = dot(f"Σ pattern_S · v[:, 0], {S} seen keys", pattern_S, v_SK[:, 0], out_K[0])
    H, G = c.num_attention_heads, c.num_key_value_heads
    facts = [("head 0 gives", numbers(out_K)), ("all heads", f"{shape(seen.out[f'{OWN}.attend'])} (B H T K)")]
    says = (f"Each head gives the mean of the values, weighted by its pattern. {H} query heads share {G} key/value "
            f"heads, so the cache is {H // G} × smaller than with one for each.")  # fmt: skip
    return Step("Mix the values", says, source(PlainAttend.forward, "torch.matmul(pattern_BHTS"), facts, [hand],
                (2 * c.num_attention_heads * c.head_dim * S, c.num_key_value_heads * c.head_dim * S * 4))  # fmt: skip


def residual(seen: Seen) -> Step:
    o_proj, before_D = seen.block.self_attn.o_proj, seen.out["model.embed_tokens"][0, -1]
    heads_O = seen.into[f"{OWN}.o_proj"][0][0, -1]
    after_D = seen.into[f"{FIRST}.post_attention_layernorm"][0][0, -1]
    bias = 0.0 if o_proj.bias is None else float(o_proj.bias[0])
    hand = dot(f"{float(before_D[0]):+.5f} + Σ heads_O · Wo[0]", heads_O, o_proj.weight[0], after_D[0],
               float(before_D[0].double()) + bias)  # fmt: skip
    facts = [("Wo", shape(o_proj.weight)), ("x before", numbers(before_D)), ("x after", numbers(after_D))]
    says = "One more product joins the heads, and the result is added to the residual stream."
    return Step("Back into the stream", says, source(Block.forward, "self.self_attn("), facts, [hand], linear(o_proj))


def feed_forward(seen: Seen) -> Step:
    if seen.config.num_local_experts:
        return experts(seen)
    mlp, at = seen.block.mlp, f"{FIRST}.mlp"
    gate, up = (float(seen.last(f"{at}.{name}")[0].double()) for name in ("gate_proj", "up_proj"))
    inner_F = seen.into[f"{at}.down_proj"][0][0, -1]
    silu = float(torch.nn.functional.silu(torch.tensor(gate, dtype=torch.float64)))
    hand = near(f"{gate:+.5f} / (1 + e^{-gate:.5f}) × {up:+.5f}", silu * up, inner_F[0])
    facts = [("Wgate, Wup", shape(mlp.gate_proj.weight)), ("Wdown", shape(mlp.down_proj.weight)),
             ("inner_F", numbers(inner_F)), ("out_D", numbers(seen.last(at)))]  # fmt: skip
    says = ("After a second norm, each of F inner numbers is a gate (through silu) times a value; a last product "
            "makes them a vector of D for the stream. Most of the model's weights are here.")  # fmt: skip
    return Step("Feed-forward", says, source(MLP.forward, "self.down_proj("), facts, [hand],
                total(*(linear(m) for m in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))))  # fmt: skip


def experts(seen: Seen) -> Step:
    moe, c = seen.block.block_sparse_moe, seen.config
    logits_E = seen.out[f"{FIRST}.block_sparse_moe.gate"].reshape(-1, c.num_local_experts)[-1]
    share_E = logits_E.double().softmax(0)
    best = share_E.topk(c.num_experts_per_tok)
    weight = best.values / best.values.sum()
    facts = [("router", numbers(logits_E, 8)), ("chosen", "  ".join(
        f"expert {int(i)}: {float(w):.1%}" for w, i in zip(weight, best.indices, strict=True)))]  # fmt: skip
    says = (f"After a second norm, a router chooses {c.num_experts_per_tok} of {c.num_local_experts} feed-forward "
            "experts for the token and weighs them by their softmax, made to sum to one.")  # fmt: skip
    one = moe.experts[0]
    into: list[nn.Linear] = [one.w1, one.w2, one.w3]  # type: ignore[list-item]
    cost = total(linear(moe.gate), *([linear(m) for m in into] * c.num_experts_per_tok))
    return Step("Feed-forward of experts", says, source(Experts.forward, "torch.topk(share_NE"), facts, cost=cost)


def layers(seen: Seen) -> Step:
    rows = [["layer", "window", "|attention|", "|feed-forward|", "|stream| after"]]
    for number in range(seen.config.num_hidden_layers):
        at = f"model.layers.{number}"
        feed = "block_sparse_moe" if seen.config.num_local_experts else "mlp"
        sizes = [float(seen.last(name).norm()) for name in (f"{at}.self_attn", f"{at}.{feed}", at)]
        rows.append([str(number), str(seen.config.windows[number] or "none"), *(f"{size:.4f}" for size in sizes)])
    says = "The same again in every layer, with weights of its own. What each adds for the last token, as lengths:"
    return Step("The other layers", says, source(Decoder.forward, "layer(x_BTD, rotary, visible, cache)"), table=rows)


def next_token(seen: Seen) -> Step:
    head = seen.model.lm_head or seen.model.model.embed_tokens
    normed_D = seen.last("model.norm")
    probability_V = seen.logits_V.double().softmax(0)
    top = probability_V.topk(5)
    rows = [["id", "token", "logit", "probability"]]
    for p, i in zip(top.values.tolist(), top.indices.tolist(), strict=True):
        rows.append([str(i), repr(piece(seen.tokenizer, i)), f"{float(seen.logits_V[i]):.4f}", f"{p:.2%}"])
    best = int(top.indices[0])
    hand = [dot(f"Σ n_D · W[{best}]", normed_D, head.weight[best], seen.logits_V[best])]
    says = ("A last norm, then a product with one row for each token of the vocabulary. Softmax makes the logits "
            "probabilities of the next token." + (" The rows are the embedding's: the weights are tied."
                                                  if seen.model.lm_head is None else ""))  # fmt: skip
    facts, size = [("W", f"{shape(head.weight)} (V × D)")], head.weight.numel()
    return Step("The next token", says, source(Transformer.head, "out = "), facts, hand,
                (2 * size, size * head.weight.element_size()), rows)  # fmt: skip


def cached(seen: Seen) -> Step:
    cache = KVCache(seen.config)
    ids_1T = torch.tensor([seen.ids])
    with torch.no_grad():
        if len(seen.ids) > 1:
            seen.model(ids_1T[:, :-1], cache=cache)
        logits_V = seen.model(ids_1T[:, -1:], cache=cache)[0, -1]
    apart = float((logits_V - seen.logits_V).abs().max())
    c = seen.config
    size = 2 * sum(min(len(seen.ids), w or len(seen.ids)) for w in c.windows) * c.num_key_value_heads * c.head_dim * 4
    facts = [("kept of this prompt", f"{amount(size, 'B')} that a next token can see; a token adds "
              f"{amount(2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * 4, 'B')}"),
             ("largest difference", f"{apart:.1e} between the logits with and without it")]  # fmt: skip
    says = ("Keys and values of past tokens do not change, so they are kept, and a new token costs one pass over one "
            "token. Here the last token was run again that way.")  # fmt: skip
    return Step("The same token from the cache", says, source(Attention.forward, "cache.append("), facts)


def whole_cost(seen: Seen, told: list[Step]) -> Step:
    L = seen.config.num_hidden_layers
    often = {"Embedding": 1, "The next token": 1, "Norm": 2 * L + 1}
    rows, sums = [["part", "FLOPs", "bytes read", "share of bytes"]], []
    for step in told:
        if step.cost:
            times = often.get(step.title, L)
            name = step.title + ("" if times == 1 else f" × {times}")
            sums.append((name, step.cost[0] * times, step.cost[1] * times))
    flops, size = sum(s[1] for s in sums), sum(s[2] for s in sums)
    for name, f, b in sums:
        rows.append([name, amount(f, "FLOP"), amount(b, "B"), f"{b / size:.1%}"])
    rows.append(["all", amount(flops, "FLOP"), amount(size, "B"), "100.0%"])
    rate = read_rate()
    limit = f"{rate:.1f} GB/s, measured just now: at least {size / rate / 1e6:.2f} ms a token from memory"
    facts = [("FLOPs a byte", f"{flops / size:.2f}: a processor does many more in the time that a byte takes, so one "
              "token at a time waits for memory; the tokens of a prompt share the reading"),
             ("read rate here", limit + (" (a small model may stay in cache)" if size < 2**26 else ""))]  # fmt: skip
    says = "Products count 2 FLOPs a weight, norms 4 a number; softmax and silu are left out. Layers count as layer 0."
    return Step("What one token costs", says, source(linear, "2 * count"), facts, table=rows)


def steps(seen: Seen) -> Iterator[Step]:
    told = []
    parts = (to_tokens, embedding, norm, projections, rotary, mask, scores, mix, residual, feed_forward, layers)
    for part in (*parts, next_token, cached):
        told.append(part(seen))
        yield told[-1]
    yield whole_cost(seen, told)


def piece(tokenizer: Tokenizer | None, i: int) -> str:
    if tokenizer is None:
        return bytes([i]).decode("latin-1") if i < 256 else "–"
    return tokenizer.decode([i]) if i < tokenizer.vocab_size else "–"


def encoded(tokenizer: Tokenizer | None, text: str) -> tuple[list[int], list[str]]:
    """(ids, the piece of the text that each stands for)."""
    try:
        data = text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError("--prompt is not Unicode; give a text") from error
    if tokenizer is None:
        return list(data), [chr(byte) for byte in data]
    ids, spans = tokenizer.encode(text, offsets=True)
    return ids, [data[a:b].decode("utf-8", "replace") for a, b in spans]


def prepare(options: Options) -> Seen:
    """The model and its one forward pass. Raises UserError for files or a prompt that cannot be told."""
    if options.weights:
        tokenizer: Tokenizer | None = Tokenizer.from_pretrained(options.weights)
        model = Transformer.from_pretrained(options.weights)
    else:
        tokenizer, model = None, Transformer(ModelConfig.from_dict(NANO)).init_weights(0).eval()
    ids, pieces = encoded(tokenizer, options.prompt)
    if not ids:
        raise UserError("--prompt is empty; give a text")
    if len(ids) > LONGEST:
        raise UserError(f"--prompt has {len(ids)} tokens; a tour takes at most {LONGEST}: give a shorter text")
    if max(ids) >= model.config.vocab_size:
        raise UserError(f"{options.weights}: the tokenizer gives id {max(ids)}, the model has none such")
    return observe(model.requires_grad_(False), tokenizer, ids, pieces)


def main(options: Options) -> int:
    seen = prepare(options)
    c, count = seen.config, sum(p.numel() for p in seen.model.parameters())
    what = options.weights or "A nano Mistral with random weights (a model of your own: --weights DIR)"
    opening = (
        f"{what}: {c.num_hidden_layers} layers of width {c.hidden_size}, {count:,} parameters, in fp32. Names "
        "end in their shape: B batch, T tokens, S keys, D width, H heads, K head size, F inner width, V vocabulary."
    )
    return tell("A forward pass, step by step", opening, steps(seen), options.html or None)


if __name__ == "__main__":
    run(main, Options)
