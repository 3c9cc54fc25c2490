"""A linear layer with low-rank adapters (arXiv 2106.09685); the frozen weight and the adapters are siblings.

    y = x Wᵀ + b + s · (drop(x) Aᵀ) Bᵀ        A is R × in, B is out × R, s = α/R (rsLoRA: α/√R, arXiv 2312.03732)

`weight` keeps its name in the checkpoint, so adding an adapter renames no parameter. Several adapters may be loaded; at
most one is active. A is initialized uniformly in ±1/√in (kaiming_uniform with a = √5) and B to zero, so a new adapter
does not change the output.

Dropout's masks come from a plan (lora/dropout.py).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora.dropout import DropoutPlan, seed_of
from model.quantize.linear import QuantizedWeight


def init_a(shape: torch.Size, dtype: torch.dtype, seed: int, path: str) -> Tensor:
    """A new adapter's a_RD, uniform in ±1/√D; a function of (seed, module name)."""
    bound = 1 / math.sqrt(shape[1])
    generator = torch.Generator().manual_seed(seed_of(seed, path))
    return torch.empty(shape, dtype=dtype).uniform_(-bound, bound, generator=generator)


class QuantizedProduct(torch.autograd.Function):
    """x Wᵀ for a frozen, quantized W; saves the packed weight, not a dequantized copy, for the backward pass."""

    @staticmethod
    def forward(ctx, x_ND: Tensor, weight: QuantizedWeight):  # type: ignore[override]
        ctx.weight = weight
        return weight.product(x_ND)

    @staticmethod
    def backward(ctx, grad_NO: Tensor):  # type: ignore[override]
        return ctx.weight.product_backward(grad_NO), None


class LoRALinear(nn.Linear):
    """nn.Linear with adapters; weight and bias are frozen. `path`: the module's name in the model."""

    def __init__(self, linear: nn.Linear, path: str) -> None:
        with torch.device("meta"):
            super().__init__(linear.in_features, linear.out_features, bias=False)
        self.path = path
        # weight is None if the base is quantized
        self.weight = None if linear.weight is None else linear.weight.requires_grad_(False)  # type: ignore[assignment]
        self.bias = None if linear.bias is None else linear.bias.requires_grad_(False)  # type: ignore[assignment]
        self.lora_A, self.lora_B = nn.ParameterDict(), nn.ParameterDict()
        self.scale: dict[str, float] = {}
        self.dropout: dict[str, float] = {}
        self.active: str | None = None
        self.plan: DropoutPlan | None = None
        self.original: Tensor | None = None  # the weight before a merge, so that unmerging is exact
        # the packed weight if the base is quantized (model/quantize/linear.py)
        self.quantized: QuantizedWeight | None = getattr(linear, "quantized", None)

    def add(self, name: str, r: int, scale: float, dropout: float, seed: int) -> None:
        """Add an adapter of rank `r` and make it active. Its initial A is a function of (seed, module name)."""
        held = self.weight if self.weight is not None else self.quantized.codes  # type: ignore[union-attr]
        dtype = torch.promote_types(held.dtype, torch.float32)  # quantized weights get fp32 adapters
        a_RD = torch.empty(r, self.in_features, dtype=dtype, device=held.device)
        if a_RD.device.type != "meta":
            a_RD.copy_(init_a(a_RD.shape, dtype, seed, self.path))
        self.lora_A[name] = nn.Parameter(a_RD)
        self.lora_B[name] = nn.Parameter(torch.zeros(self.out_features, r, dtype=dtype, device=held.device))
        self.scale[name], self.dropout[name], self.active = scale, dropout, name

    def base(self, x_ND: Tensor) -> Tensor:
        if self.quantized is not None:
            y_NO = QuantizedProduct.apply(x_ND, self.quantized)
            return y_NO if self.bias is None else y_NO + self.bias
        return F.linear(x_ND, self.weight, self.bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_ND = x_BTD.flatten(0, -2)
        y_NO = self.base(x_ND)
        if self.active is not None and self.original is None:
            a_RD, b_OR = self.lora_A[self.active].to(x_ND.dtype), self.lora_B[self.active].to(x_ND.dtype)
            dropped_ND = self.drop(x_BTD, self.dropout[self.active]).flatten(0, -2)
            low_NR = F.linear(dropped_ND, a_RD) * self.scale[self.active]
            # in place: no second tensor of the output's size
            y_NO.addmm_(low_NR, b_OR.t())
        return y_NO.view(*x_BTD.shape[:-1], self.out_features)

    def drop(self, x_BTD: Tensor, p: float) -> Tensor:
        if not self.training or p == 0.0:
            return x_BTD
        if self.plan is None or x_BTD.dim() != 3:
            return F.dropout(x_BTD, p)
        return x_BTD * self.plan.mask(x_BTD, p, self.path)

    def delta(self, name: str) -> Tensor:
        """The adapter's update of the weight, s · B A, in at least fp32."""
        wide = torch.promote_types(self.lora_A[name].dtype, torch.float32)
        return (self.lora_B[name].detach().to(wide) @ self.lora_A[name].detach().to(wide)) * self.scale[name]
