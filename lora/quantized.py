"""A frozen base in NF4, int8 or w8a8 under fp32 adapters (QLoRA, arXiv 2305.14314).

`quantize_base(model, "nf4")` quantizes the weight of every adapted layer. With nf4 and int8, forward and backward
passes dequantize one layer's weight for one matmul and free it. With w8a8 both passes multiply integers: inputs and
gradients are quantized to 8 bits by row, inputs after `mix` (model/quantize/rotation.py), which spreads outliers. An
adapter cannot be merged into a quantized base; merge it into the original checkpoint (`python -m lora.merge`).
"""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from lora.adapter import adapted
from model.quantize.linear import QuantizedWeight
from model.support.cli import UserError

Model = TypeVar("Model", bound=nn.Module)


def quantize_base(model: Model, kind: str) -> Model:
    """Quantize the adapted layers' frozen weights in place to "nf4", "int8" or "w8a8". Returns the model."""
    if kind not in ("nf4", "int8", "w8a8"):
        raise UserError(f"base is {kind!r}; choose nf4, int8 or w8a8")
    for layer in adapted(model).values():
        shape = tuple(layer.weight.shape)
        layer.quantized = QuantizedWeight.quantize([layer.weight], shape, kind, mixed=kind == "w8a8")
        layer.weight = None  # type: ignore[assignment]
    return model
