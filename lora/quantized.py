"""A frozen base in NF4 or int8 under fp32 adapters (QLoRA, arXiv 2305.14314).

`quantize_base(model, "nf4")` quantizes the weight of every adapted layer. Forward and backward passes dequantize one
layer's weight for one matmul and free it. An adapter cannot be merged into a quantized base; merge it into the original
checkpoint (`python -m lora.merge`).
"""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from lora.adapter import adapted
from model.quantize.linear import QuantizedWeight
from model.support.cli import UserError

Model = TypeVar("Model", bound=nn.Module)


def quantize_base(model: Model, kind: str) -> Model:
    """Quantize the adapted layers' frozen weights in place to "nf4" or "int8". Returns the model."""
    if kind not in ("nf4", "int8"):
        raise UserError(f"base is {kind!r}; choose nf4 or int8")
    for layer in adapted(model).values():
        layer.quantized = QuantizedWeight.quantize([layer.weight], tuple(layer.weight.shape), kind)
        layer.weight = None  # type: ignore[assignment]
    return model
