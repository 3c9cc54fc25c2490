"""One adapter told step by step: how it starts, what it adds, what learns, how it merges. `python -m lora.tour`.

The layer is a real one of a nano model (or of --weights DIR), the steps use lora's own functions, and a number of each
is worked again by hand in fp64. Where one is not the program's, the exit code is 1.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lora.adapter import PREFIX, LoRAConfig, adapted, add_lora, load_adapter, no_adapter, read_adapter, save_adapter
from lora.fold import merge_lora, merged_weight, unmerge_lora
from lora.layer import LoRALinear, first_a
from model.config import ModelConfig
from model.lesson import Step, amount, dot, near, numbers, shape, source, tell
from model.support.cli import UserError, run
from model.tour import NANO, PROMPT
from model.transformer import Transformer

MODULE = "model.layers.0.self_attn.q_proj"


@dataclass(frozen=True)
class Options:
    """Tell what an adapter on one linear layer is, learns and becomes."""

    weights: str = ""
    """A model's folder or .gguf file (empty: a nano Mistral with random weights)."""
    module: str = MODULE
    """The linear layer to look at."""
    r: int = 8
    """The adapter's rank."""
    alpha: float = 16.0
    """The update is scaled by alpha / r."""
    html: str = ""
    """Write a page to this file in place of telling it in the terminal."""


@dataclass
class Seen:
    """The model with a new adapter on one layer, and a text that both read."""

    model: Transformer
    layer: LoRALinear
    module: str
    config: LoRAConfig
    tokens_1T: Tensor

    @property
    def a_RD(self) -> Tensor:
        return self.layer.lora_A["default"]

    @property
    def b_OR(self) -> Tensor:
        return self.layer.lora_B["default"]

    def loss(self) -> Tensor:
        logits_1TV = self.model(self.tokens_1T)
        return F.cross_entropy(logits_1TV[0, :-1], self.tokens_1T[0, 1:])


def prepare(options: Options) -> Seen:
    if options.weights:
        model = Transformer.from_pretrained(options.weights)
    else:
        model = Transformer(ModelConfig.from_dict(NANO)).init_weights(0).eval()
    config = LoRAConfig(options.r, options.alpha, target_modules=(options.module,))
    add_lora(model, config, seed=0)
    layer = adapted(model).get(options.module)
    if layer is None:
        raise UserError(f"--module {options.module!r}: give one layer's whole name, for example {MODULE}")
    ids = [byte % model.config.vocab_size for byte in PROMPT.encode()]
    return Seen(model, layer, options.module, config, torch.tensor([ids]))


def the_layer(seen: Seen) -> Step:
    w, a, b = seen.layer.weight, seen.a_RD, seen.b_OR
    small, large = a.numel() + b.numel(), w.numel()
    says = ("y = x Wᵀ + s · (x Aᵀ) Bᵀ. The layer's weight stays as it is; beside it stand two thin matrices whose "
            "product has the weight's shape but only rank R. They alone will learn.")  # fmt: skip
    facts = [("W", f"{shape(w)} (O × D), frozen"), ("A", f"{shape(a)} (R × D)"), ("B", f"{shape(b)} (O × R)"),
             ("they learn", f"{small:,} numbers beside {large:,}: {small / large:.1%}"),
             ("to train, in fp32", f"{amount(small * 16, 'B')} for numbers, gradients and AdamW's two averages, in "
              f"place of {amount(large * 16, 'B')}")]  # fmt: skip
    alpha, rank = seen.config.alpha, seen.config.r
    hand = near(f"s = α / R = {alpha:g} / {rank}", alpha / rank, seen.layer.scale["default"])
    return Step("The layer", says, source(LoRALinear.forward, "low_NR ="), facts, [hand],
                (2 * (small + large), 4 * (small + large)))  # fmt: skip


def the_start(seen: Seen) -> Step:
    a_RD = seen.a_RD.detach()
    bound = seen.layer.in_features**-0.5
    with torch.no_grad():
        adapted_logits = seen.model(seen.tokens_1T)
        with no_adapter(seen.model):
            base_logits = seen.model(seen.tokens_1T)
    moved = int((adapted_logits != base_logits).sum())
    facts = [("A", f"uniform in ±1/√D = ±{bound:.5f}: drawn {float(a_RD.min()):+.5f} … {float(a_RD.max()):+.5f}"),
             ("B", f"{int((seen.b_OR != 0).sum())} numbers other than 0")]  # fmt: skip
    hand = [near("logits that a new adapter changes", 0.0, float(moved))]
    says = ("B starts at zero, so a new adapter changes nothing, to the bit. A does not: were both zero, neither would "
            "ever get a gradient.")  # fmt: skip
    return Step("The start", says, source(first_a, "uniform_"), facts, hand)


def first_gradient(seen: Seen) -> Step:
    """Leaves the adapter after one step of plain gradient descent."""
    loss = seen.loss()
    grad_a, grad_b = torch.autograd.grad(loss, [seen.a_RD, seen.b_OR])
    frozen = sum(p.numel() for p in seen.model.parameters() if not p.requires_grad)
    rate = 0.05 * float(seen.a_RD.detach().norm() / grad_b.norm())
    with torch.no_grad():
        seen.b_OR.sub_(rate * grad_b)
        seen.a_RD.sub_(rate * grad_a)
    after = torch.autograd.grad(seen.loss(), seen.a_RD)[0]
    facts = [("frozen", f"{frozen:,} numbers without a gradient"),
             ("∂L/∂A, ∂L/∂B at the start", f"lengths {float(grad_a.norm()):.3g} and {float(grad_b.norm()):.3g}"),
             ("∂L/∂A after one step", f"length {float(after.norm()):.3g}"),
             ("loss", f"{loss.item():.6f} → {seen.loss().item():.6f}, lr {rate:.3g}")]  # fmt: skip
    hand = near("∂L/∂A = s · Bᵀ (∂L/∂y)ᵀ x with B = 0: its largest number", 0.0, float(grad_a.abs().max()))
    says = "A's gradient holds a factor B, which is zero: the first step moves B alone; then A begins to learn."
    return Step("The first step", says, source(LoRALinear.forward, "y_NO.addmm_"), facts, [hand])


def forward(seen: Seen) -> Step:
    layer = seen.layer
    x_D = torch.randn(layer.in_features, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        y_O = layer(x_D[None, None])[0, 0]
    delta_OD = layer.delta("default")
    low_R = seen.a_RD.detach().double() @ x_D.double()
    s, bias = layer.scale["default"], 0.0 if layer.bias is None else float(layer.bias[0])
    base = float(x_D.double() @ layer.weight[0].double()) + bias
    hand = dot(f"{base:+.6f} + {s:g} · Σ (x Aᵀ)_R · B[0], {len(low_R)} products", torch.cat((x_D.double(), low_R * s)),
               torch.cat((layer.weight[0], seen.b_OR[0])).detach(), y_O[0], bias)  # fmt: skip
    O, D, R = layer.out_features, layer.in_features, seen.config.r  # noqa: E741 - the notation's own letter
    facts = [("x Aᵀ", numbers(low_R)), ("y_O", numbers(y_O)),
             ("‖s·BA‖ / ‖W‖", f"{float(delta_OD.norm() / layer.weight.norm()):.2e}"),
             ("beside or merged", f"the thin products cost {(R * (O + D)) / (O * D):.1%} more FLOPs; merged, nothing")]
    says = "x Aᵀ squeezes D numbers into R, B spreads them over O. The large update B A is never formed."
    return Step("One token through it", says, source(LoRALinear.forward, "F.linear(dropped_ND"), facts, [hand])


def merging(seen: Seen) -> Step:
    layer, before = seen.layer, seen.layer.weight.detach().clone()
    delta = layer.delta("default")
    with torch.no_grad():
        beside = seen.model(seen.tokens_1T)
        merge_lora(seen.model)
        folded, weight = seen.model(seen.tokens_1T), layer.weight.detach().clone()
        unmerge_lora(seen.model)
    changed = int((layer.weight != before).sum())
    subtracted = ((weight - delta) != before).float().mean()
    narrow = before.bfloat16()
    kept = merged_weight(narrow, delta).double() - narrow.double()
    lost = float((kept - delta.double()).norm() / delta.double().norm())
    facts = [("logits", f"merged and beside differ by {float((beside - folded).abs().max()):.1e}: rounding"),
             ("taken out by subtracting", f"{float(subtracted):.1%} of the weights would not be what they were"),
             ("merged into bf16", f"{lost:.1%} of the update's length is lost to rounding")]  # fmt: skip
    place = divmod(int(delta.abs().argmax()), delta.shape[1])
    w, d = float(before[place]), float(delta[place])
    hand = [near(f"W{list(place)} + (s·BA){list(place)} = {w:+.6f} {d:+.6f}", w + d, weight[place], abs(w) + abs(d)),
            near("weights that differ after unmerging", 0.0, float(changed))]  # fmt: skip
    says = ("Merged, the layer is plain again and as fast as before. The sum is made in fp32 and the original is kept, "
            "so that taking the adapter out is exact.")  # fmt: skip
    return Step("Merging", says, source(merged_weight, "+ delta).to("), facts, hand)


def files(seen: Seen) -> Step:
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(seen.model, folder)
        tensors = read_adapter(folder)
        fresh = Transformer(seen.model.config)
        with torch.no_grad():
            base = {name: p for name, p in seen.model.state_dict().items() if ".lora_" not in name}
        fresh.load_state_dict(base)
        load_adapter(fresh.eval(), folder)
        with torch.no_grad():
            differ = int((fresh(seen.tokens_1T) != seen.model(seen.tokens_1T)).sum())
    rows = [["key in adapter_model.safetensors", "shape"], *([key, shape(t)] for key, t in tensors.items())]
    says = (f"An adapter is saved as PEFT's two files; a key is {PREFIX!r} and the module's own name. Loaded into the "
            "base again, it gives the same logits.")  # fmt: skip
    hand = near("logits that differ after saving and loading", 0.0, float(differ))
    return Step("On disk", says, source(save_adapter, "write_adapter"), hand=[hand], table=rows)


def steps(seen: Seen) -> Iterator[Step]:
    for part in (the_layer, the_start, first_gradient, forward, merging, files):
        yield part(seen)


def main(options: Options) -> int:
    seen = prepare(options)
    opening = (
        f"Layer {seen.module} of {options.weights or 'a nano Mistral, random weights'}. D is the layer's width in, O "
        "its width out, R the adapter's rank."
    )
    return tell("One adapter, step by step", opening, steps(seen), options.html or None)


if __name__ == "__main__":
    run(main, Options)
