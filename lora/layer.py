"""A linear layer with low-rank adapters (arXiv 2106.09685): frozen weight and adapters are siblings.

    y = x Wᵀ + b + s · (drop(x) Aᵀ) Bᵀ        A is R × in, B is out × R, s = α/R (rsLoRA: α/√R, arXiv 2312.03732)

`weight` keeps the name that it has in the checkpoint, so adding adapters renames nothing. Several adapters may be
loaded; one is active, or none. A starts uniform in ±1/√in (kaiming_uniform with a = √5) and B at zero, so a new
adapter changes nothing.

Dropout's mask is a function of (seed, step, record, branch, token, module, column): it does not depend on the batch
that a record sits in, on packing, on the number of ranks, or on the device. `DropoutPlan` carries what a forward pass
needs for that: a key for each token, hashed together with those of a module's columns, two columns a word.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.quantize.linear import QuantizedWeight


def seed_of(*parts: object) -> int:
    """A 63-bit seed from any values, the same on every machine."""
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


GOLDEN = -7046029254386353131  # 2^64 / the golden ratio, as Weyl sequences step (a signed 64-bit number)
MASKS = 2  # the form of dropout's masks: a run goes on only with the form that it began with
FACTOR = 0x7FEB352D  # odd; bits of a 32-bit product spread well by it
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
ROUNDS = ((32, -2960836687157067323), (29, -4658895280553007687), (32, 1))  # (shift, odd factor), as in splitmix64


def mixed(x: Tensor) -> Tensor:
    """A hash of 64-bit integers, in their own memory: a change of one bit changes about half of the result's."""
    for shift, factor in ROUNDS:
        high = (x >> shift).bitwise_and_(2 ** (64 - shift) - 1)  # torch shifts the sign in
        x.bitwise_xor_(high).mul_(factor)
    return x


@lru_cache(maxsize=4096)
def column_keys(modules: tuple[str, ...], count: int, device: torch.device) -> Tensor:
    """Odd int32 keys of each module's columns, two columns a key, side by side."""
    step_W = torch.arange(1, count + 1) * GOLDEN
    keys_MW = torch.stack([mixed(step_W + seed_of(module)) for module in modules])
    return (keys_MW.flatten().to(torch.int32) | 1).to(device)


def keep_bits(key_N: Tensor, modules: tuple[str, ...], width: int, p: float) -> Tensor:
    """Which of its inputs dropout keeps for each module, int16 (N, modules, width): all bits where one is kept, none
    where it is dropped, which has probability p, to 1 / 32,768. `key_N`: odd int32 keys of the tokens.

    A token's key times a column's is hashed once more by a multiplication; its halves, 15 bits each, are drawn for two
    columns. Few passes over narrow integers: a mask may not cost what the product costs that it feeds.
    """
    count = -(-width // 2)
    hash_NW = key_N[:, None] * column_keys(modules, count, key_N.device)
    hash_NW.bitwise_xor_(hash_NW >> 16).mul_(FACTOR)
    drawn_NMD = hash_NW.view(torch.int16).bitwise_and_(2**15 - 1)
    keep_NMD = drawn_NMD.sub_(2**15 - max(1, round(p * 2**15))).bitwise_right_shift_(15)  # the sign, in every bit
    return keep_NMD.view(-1, len(modules), 2 * count)[..., :width]


def with_zeros(x_ND: Tensor, keep_ND: Tensor) -> Tensor:
    """x where its bits are kept, 0 where not."""
    bits = BITS[x_ND.itemsize]
    return (x_ND.view(bits) & keep_ND.to(bits)).view(x_ND.dtype)


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
        """A key for each token, odd int32 (B, T)."""
        if (B, T) not in self.held:
            key_BT = torch.zeros(B, T, dtype=torch.int64)
            for row, branches in enumerate(self.rows):
                start = 0
                for record, branch, length in branches:
                    first = seed_of(self.seed, self.step, record, branch)
                    key_BT[row, start : start + length] = torch.arange(length) * GOLDEN + first
                    start += length
            self.held[B, T] = (mixed(key_BT).to(torch.int32) | 1).to(device)
        return self.held[B, T]

    def mask(self, x_BTD: Tensor, p: float, module: str) -> Tensor:
        """1/(1−p) where a value is kept and 0 where it is dropped, in x's shape."""
        B, T, D = x_BTD.shape
        keep_ND = keep_bits(self.keys(B, T, x_BTD.device).flatten(), (module,), D, p)[:, 0]
        return keep_ND.reshape(B, T, D).neg().to(x_BTD.dtype) / (1 - p)


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
        return ctx.weight.product_backward(grad_NO), None


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
