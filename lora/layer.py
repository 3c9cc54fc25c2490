"""A linear layer with low-rank adapters (arXiv 2106.09685): frozen weight and adapters are siblings.

    y = x Wᵀ + b + s · (drop(x) Aᵀ) Bᵀ        A is R × in, B is out × R, s = α/R (rsLoRA: α/√R, arXiv 2312.03732)

`weight` keeps the name that it has in the checkpoint, so adding adapters renames nothing. Several adapters may be
loaded; one is active, or none. A starts uniform in ±1/√in (kaiming_uniform with a = √5) and B at zero, so a new
adapter changes nothing.

Dropout's mask is a function of (seed, step, record, branch, token, module, column): it does not depend on the batch
that a record sits in, on packing, on the number of ranks, or on the device. `DropoutPlan` carries what a forward pass
needs for that: a 64-bit key for each token, hashed together with a module's columns, four columns a word.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.quantize.linear import QuantizedWeight


def seed_of(*parts: object) -> int:
    """A 63-bit seed from any values, the same on every machine."""
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


GOLDEN = -7046029254386353131  # 2^64 / the golden ratio, as Weyl sequences step (a signed 64-bit number)
ROUNDS = ((32, -2960836687157067323), (29, -4658895280553007687), (32, 1))  # (shift, odd factor), as in splitmix64


def mixed(x: Tensor) -> Tensor:
    """A hash of 64-bit integers, in their own memory: a change of one bit changes about half of the result's."""
    for shift, factor in ROUNDS:
        high = (x >> shift).bitwise_and_(2 ** (64 - shift) - 1)  # torch shifts the sign in
        x.bitwise_xor_(high).mul_(factor)
    return x


def kept(keys_N: Tensor, module: str, width: int, p: float) -> Tensor:
    """Which of a module's inputs dropout keeps, bool (N, width): each is dropped with probability p, to 1 / 65,536."""
    words = torch.arange(1, -(-width // 4) + 1, device=keys_N.device) * GOLDEN + seed_of(module)
    drawn_ND = mixed(keys_N[:, None] ^ mixed(words)).view(torch.int16)[:, :width]
    return drawn_ND >= round(p * 2**16) - 2**15


@dataclass
class DropoutPlan:
    """Which record and branch each token of a row belongs to; set by `begin`, kept until the next forward pass."""

    seed: int = 0
    step: int = 0
    rows: Sequence[Sequence[tuple[str, int, int]]] = field(default_factory=tuple)
    held: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    def begin(self, step: int, rows: Sequence[Sequence[tuple[str, int, int]]]) -> None:
        """`rows` holds, for each row, (record, branch, tokens) in order; what is left of a row is padding."""
        self.step, self.rows, self.held = step, rows, {}

    def keys(self, B: int, T: int, device: torch.device) -> Tensor:
        """A key for each token, int64 (B, T)."""
        if (B, T) not in self.held:
            key_BT = torch.zeros(B, T, dtype=torch.int64)
            for row, branches in enumerate(self.rows):
                start = 0
                for record, branch, length in branches:
                    first = seed_of(self.seed, self.step, record, branch)
                    key_BT[row, start : start + length] = torch.arange(length) * GOLDEN + first
                    start += length
            self.held[B, T] = mixed(key_BT).to(device)
        return self.held[B, T]

    def mask(self, x_BTD: Tensor, p: float, module: str) -> Tensor:
        """1/(1−p) where a value is kept and 0 where it is dropped, in x's shape."""
        B, T, D = x_BTD.shape
        keep_ND = kept(self.keys(B, T, x_BTD.device).flatten(), module, D, p)
        return keep_ND.view(B, T, D).to(x_BTD.dtype) / (1 - p)


def first_a(shape: torch.Size, dtype: torch.dtype, seed: int, path: str) -> Tensor:
    """A new adapter's A_RD: uniform in ±1/√in, a function of (seed, the module's name)."""
    bound = 1 / math.sqrt(shape[1])
    generator = torch.Generator().manual_seed(seed_of(seed, path))
    return torch.empty(shape, dtype=dtype).uniform_(-bound, bound, generator=generator)


class QuantizedProduct(torch.autograd.Function):
    """x Wᵀ for a frozen, quantized W: what is kept for the backward pass is W's packed form."""

    @staticmethod
    def forward(ctx, x_ND: Tensor, weight: QuantizedWeight):  # type: ignore[override]
        ctx.weight = weight
        return weight.product(x_ND)

    @staticmethod
    def backward(ctx, grad_NO: Tensor):  # type: ignore[override]
        return grad_NO @ ctx.weight.dequantize(grad_NO.dtype), None


class LoRALinear(nn.Linear):
    """nn.Linear with adapters. `path` is the module's name in the model; weight and bias are frozen."""

    def __init__(self, linear: nn.Linear, path: str) -> None:
        with torch.device("meta"):
            super().__init__(linear.in_features, linear.out_features, bias=False)
        self.path = path
        # None where the base is quantized, or the layer has no bias
        self.weight = None if linear.weight is None else linear.weight.requires_grad_(False)  # type: ignore[assignment]
        self.bias = None if linear.bias is None else linear.bias.requires_grad_(False)  # type: ignore[assignment]
        self.lora_A, self.lora_B = nn.ParameterDict(), nn.ParameterDict()
        self.scale: dict[str, float] = {}
        self.dropout: dict[str, float] = {}
        self.active: str | None = None
        self.plan: DropoutPlan | None = None
        self.original: Tensor | None = None  # the weight before a merge, kept so that unmerging is exact
        # the weight's packed form, where the base is quantized (model/quantize/linear.py)
        self.quantized: QuantizedWeight | None = getattr(linear, "quantized", None)

    def add(self, name: str, r: int, scale: float, dropout: float, seed: int) -> None:
        """A new adapter of rank `r`, made active. Its start is a function of (seed, the module's name)."""
        held = self.weight if self.weight is not None else self.quantized.codes  # type: ignore[union-attr]
        dtype = torch.promote_types(held.dtype, torch.float32)  # quantized weights get fp32 adapters
        a_RD = torch.empty(r, self.in_features, dtype=dtype, device=held.device)
        if a_RD.device.type != "meta":
            a_RD.copy_(first_a(a_RD.shape, dtype, seed, self.path))
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
            # the product is added where the base's result already lies: no second tensor of the output's size
            y_NO.addmm_(low_NR, b_OR.t())
        return y_NO.view(*x_BTD.shape[:-1], self.out_features)

    def drop(self, x_BTD: Tensor, p: float) -> Tensor:
        if not self.training or p == 0.0:
            return x_BTD
        if self.plan is None or x_BTD.dim() != 3:
            return F.dropout(x_BTD, p)
        return x_BTD * self.plan.mask(x_BTD, p, self.path)

    def delta(self, name: str) -> Tensor:
        """s · B A in at least fp32: what the adapter adds to the weight."""
        wide = torch.promote_types(self.lora_A[name].dtype, torch.float32)
        return (self.lora_B[name].detach().to(wide) @ self.lora_A[name].detach().to(wide)) * self.scale[name]
