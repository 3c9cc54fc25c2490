"""Weights in 8 bits: each row of a matrix as int8 numbers and one fp32 scale, quantised a layer at a time.

    W[o, d] = q[o, d] · scale[o],   q in −127 … 127,   scale[o] = max_d |W[o, d]| / 127

A decoded token reads every weight once, so a quarter of fp32's bytes is up to four times the rate where unpacking keeps
up. torch's `_weight_int8pack_mm` does on processors with bf16 inputs; other dtypes take the plain product, which
is the specification: x · (q · scale)ᵀ with q · scale in x's dtype. A weight is off by at most half a step, scale / 2.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Int8Linear(nn.Module):
    """nn.Linear with int8 weights; `weight` is q_OD, `scale` scale_O (fp32). Forward only."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        q_OD, scale_O = quantise(linear.weight.detach())
        self.register_buffer("weight", q_OD)
        self.register_buffer("scale", scale_O)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())
        self.in_features, self.out_features = linear.in_features, linear.out_features

    def forward(self, x_BTD: Tensor) -> Tensor:
        if x_BTD.dtype == torch.bfloat16 and x_BTD.device.type == "cpu":
            x_ND = x_BTD.flatten(0, -2).contiguous()
            y_NO = torch._weight_int8pack_mm(x_ND, self.weight, self.scale.to(x_BTD.dtype))
            y_BTO = y_NO.unflatten(0, x_BTD.shape[:-1])
            return y_BTO if self.bias is None else y_BTO + self.bias
        return F.linear(x_BTD, dequantise(self.weight, self.scale, x_BTD.dtype), self.bias)


def quantise(weight_OD: Tensor) -> tuple[Tensor, Tensor]:
    """(q_OD int8, scale_O fp32) of a weight of any float dtype; a row of zeros has scale 0."""
    wide_OD = weight_OD.float()
    scale_O = wide_OD.abs().amax(dim=1) / 127
    q_OD = torch.round(wide_OD / torch.where(scale_O > 0, scale_O, 1.0)[:, None]).clamp_(-127, 127)
    return q_OD.to(torch.int8), scale_O


def dequantise(q_OD: Tensor, scale_O: Tensor, dtype: torch.dtype) -> Tensor:
    """q · scale, multiplied in fp32 (fp64 for fp64)."""
    wide = torch.promote_types(dtype, torch.float32)
    return (q_OD.to(wide) * scale_O.to(wide)[:, None]).to(dtype)


def narrow(model: nn.Module) -> nn.Module:
    """Replace the linear layers of a model's blocks by 8-bit ones, in place, a layer at a time; returns the model.

    Embedding, norms and output matrix stay. Merge adapters first: an adapted layer is refused with a ValueError.
    """
    for path, module in list(model.named_modules()):
        if not isinstance(module, nn.Linear) or ".layers." not in f".{path}":
            continue
        if type(module) is not nn.Linear:
            raise ValueError(f"{path} carries an adapter; merge it before the weights are made narrow")
        parent, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(parent), leaf, Int8Linear(module))
    return model
