"""A frozen base in NF4 or int8 under wide adapters (QLoRA, arXiv 2305.14314).

`narrow_base(model, "nf4")` turns the weight of every adapted layer into packed numbers. A forward or backward pass
widens one layer's weight for one product and forgets it, so no wide copy stays. Merging needs the wide base: merge
into the original checkpoint (`python -m lora.merge`).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora.adapter import adapted
from lora.blockwise import DoubleNF4, from_nf4, to_nf4
from model.command import UserError


class NarrowWeight(nn.Module):
    """A matrix as buffers. `wide(dtype)` gives it back, rounded."""

    def __init__(self, weight_OD: Tensor, kind: str) -> None:
        super().__init__()
        self.kind, self.shape = kind, weight_OD.shape
        if kind == "nf4":
            held = to_nf4(weight_OD.cpu())
            parts = {key: getattr(held, key) for key in ("packed", "absmax_codes", "absmax_absmax", "offset")}
        else:  # int8: one scale a row
            wide_OD = weight_OD.detach().to(torch.float32)
            scale_O1 = wide_OD.abs().amax(dim=1, keepdim=True).clamp_min(1e-30) / 127
            parts = {"codes": (wide_OD / scale_O1).round().to(torch.int8), "scale": scale_O1}
        for key, value in parts.items():
            self.register_buffer(key, value.to(weight_OD.device), persistent=False)

    def wide(self, dtype: torch.dtype) -> Tensor:
        if self.kind == "nf4":
            held = DoubleNF4(self.packed, self.absmax_codes, self.absmax_absmax, self.offset, self.shape)
            return from_nf4(held).to(dtype)
        return (self.codes * self.scale).to(dtype)


class NarrowProduct(torch.autograd.Function):
    """x Wᵀ for a frozen narrow W: what is kept for the backward pass is W's packed form."""

    @staticmethod
    def forward(ctx, x_ND: Tensor, weight: NarrowWeight):  # type: ignore[override]
        ctx.weight = weight
        return F.linear(x_ND, weight.wide(x_ND.dtype))

    @staticmethod
    def backward(ctx, grad_NO: Tensor):  # type: ignore[override]
        return grad_NO @ ctx.weight.wide(grad_NO.dtype), None


def narrow_base(model: nn.Module, kind: str) -> nn.Module:
    """Keep the adapted layers' base in "nf4" or "int8", in place. Raises UserError for another kind."""
    if kind not in ("nf4", "int8"):
        raise UserError(f"base {kind!r}; it is nf4 or int8")
    for layer in adapted(model).values():
        layer.narrow = NarrowWeight(layer.weight, kind)
        layer.weight = None  # type: ignore[assignment]
    return model
