"""Quantization error with and without rotation, on synthetic notes: of the logits in w8a8, int8 and int4, and of an
adapter's gradients over a quantized base.

The reference is the same weights, in fp32 for logits and in fp64 for gradients. docs/quantization.md has the logits'
table and the algebra.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy

import torch
import torch.nn.functional as F
from torch import Tensor

from eval.bench.row import Row
from infer.tasks import prefix
from lora import LoRAConfig, add_lora
from lora.adapter import adapted
from lora.quantized import quantize_base
from model import Tokenizer, Transformer
from model.quantize.linear import quantize_layers, quantize_model
from model.quantize.rotation import rotate
from train.clinic.program import patient_notes

WAYS: dict[str, Callable[[Transformer], object]] = {
    "rotated, fp32": rotate,
    "int8": lambda model: quantize_layers(model, "int8"),
    "int8, rotated": lambda model: quantize_layers(rotate(model), "int8"),
    "w8a8, not rotated": lambda model: quantize_layers(model, "w8a8"),
    "w8a8, rotated, down_proj's inputs not mixed": lambda model: quantize_layers(rotate(model), "w8a8"),
    "w8a8": lambda model: quantize_model(model, "w8a8"),
    "int4-64": lambda model: quantize_layers(model, "int4-64"),
    "int4-64, rotated": lambda model: quantize_layers(rotate(model), "int4-64"),
}


def narrowed(model: Transformer) -> Transformer:
    """The model with its frozen weights in bf16."""
    for p in model.parameters():
        if not p.requires_grad:
            p.data = p.data.to(torch.bfloat16)
    return model


BASES: dict[str, Callable[[Transformer], Transformer]] = {
    "fp32": lambda model: model,
    "bf16": narrowed,
    "int8": lambda model: quantize_base(model, "int8"),
    "nf4": lambda model: quantize_base(model, "nf4"),
}
B_STD = 0.01  # standard deviation of the adapter's B matrices


def rows(weights: str, notes: int = 8) -> list[Row]:
    """A row for each of WAYS: RMS error of the logits in percent of the fp32 logits' standard deviation. A row for each
    of BASES: error of the adapter's gradients in percent of their norm in fp64.

    `notes` is the number of synthetic patients, one note each.
    """
    tokenizer, model = Tokenizer.from_pretrained(weights), Transformer.from_pretrained(weights).requires_grad_(False)
    texts = [next(patient_notes("p", number, 0))["text"] for number in range(notes)]
    prompts = [torch.tensor([tokenizer.encode(prefix(text), bos=True)]) for text in texts]

    return logit_rows(model, prompts) + gradient_rows(model, prompts)


@torch.inference_mode()
def logit_rows(model: Transformer, prompts: list[Tensor]) -> list[Row]:
    def logits(own: Transformer) -> Tensor:
        return torch.cat([own(tokens_1T)[0] for tokens_1T in prompts])

    true_NV = logits(model)
    spread, errors, found = true_NV.std().item(), {}, []
    for name, change in WAYS.items():
        own = deepcopy(model)
        change(own)
        own_NV = logits(own)
        agree = (own_NV.argmax(-1) == true_NV.argmax(-1)).double().mean().item()
        errors[name] = 100 * own_NV.sub_(true_NV).square_().mean().sqrt().item() / spread
        setting = f"the likeliest token is fp32's in {100 * agree:.1f} %; {len(prompts)} notes, {len(true_NV)} tokens"
        int8 = errors.get("int8")
        peer_name = None if int8 is None else "int8 weights"
        found.append(Row(f"logits: {name}", errors[name], int8, peer_name, "% of the logits' spread (rms)", setting))
    return found


def gradient_rows(model: Transformer, prompts: list[Tensor]) -> list[Row]:
    tuned = deepcopy(model)
    add_lora(tuned, LoRAConfig(r=16))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in adapted(tuned).values():
            layer.lora_B["default"].normal_(0, B_STD, generator=generator)

    def gradients(own: Transformer) -> Tensor:
        for tokens_1T in prompts:
            logits_TV = own(tokens_1T)[0, :-1]
            logits_TV = logits_TV.to(torch.promote_types(logits_TV.dtype, torch.float32))
            F.cross_entropy(logits_TV, tokens_1T[0, 1:]).backward()
        return torch.cat([p.grad.double().flatten() for p in own.parameters() if p.grad is not None])

    true, found = gradients(deepcopy(tuned).double()), []
    for name, change in BASES.items():
        ours = gradients(change(deepcopy(tuned)))
        cosine = float(F.cosine_similarity(ours, true, dim=0))
        error = 100 * float((ours - true).norm() / true.norm())
        setting = f"cosine {cosine:.5f}; {len(prompts)} notes, rank 16 on every linear layer"
        found.append(Row(f"adapter's gradients: {name}", error, None, None, "% of their norm", setting))
    return found
