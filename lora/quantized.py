"""A frozen base in NF4, int8 or w8a8 under wide adapters (QLoRA, arXiv 2305.14314).

`quantize_base(model, "nf4")` turns the weight of every adapted layer into packed numbers. A forward or backward pass
dequantizes one layer's weight for one product and frees it. "w8a8" multiplies integers both ways: inputs and gradients
are rounded to 8 bits a row, inputs after `mix` (model/quantize/rotation.py), since a few are far larger than the rest.
Merging needs the unquantized base: merge
into the original checkpoint (`python -m lora.merge`).
"""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from lora.adapter import adapted
from model.quantize.linear import QuantizedWeight
from model.support.cli import UserError

Model = TypeVar("Model", bound=nn.Module)


def quantize_base(model: Model, kind: str) -> Model:
    """Keep the adapted layers' base in "nf4", "int8" or "w8a8", in place. Raises UserError for another kind."""
    if kind not in ("nf4", "int8", "w8a8"):
        raise UserError(f"base {kind!r}; it is nf4, int8 or w8a8")
    for layer in adapted(model).values():
        shape = tuple(layer.weight.shape)
        layer.quantized = QuantizedWeight.quantize([layer.weight], shape, kind, mixed=kind == "w8a8")
        layer.weight = None  # type: ignore[assignment]
    return model
