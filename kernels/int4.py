"""Linear layers with int4 weights for decoding, with norm and LoRA fused: a quarter of bf16's bytes, no conversions.

    W[o, d] = (q[o, d] − 8) · scale[g, o] + zero[g, o]        g: the group of 32, 64 or 128 columns that contains d

The weights are those of model/quantize/linear.py, value for value (q, scale and zero of an int4 checkpoint);
`repack_int4` only rearranges the codes, once, when the model is loaded.

Dequantization without conversions. An integer-to-float conversion (I2F) runs at a quarter of the rate of a logic
operation, and one per weight takes longer than reading its 4 bits. But a bf16 number with exponent 0 is 1.mmmmmmm, so a
code in the upper four of the seven mantissa bits *is* a number:

    bits 0 01111111 qqqq000  =  1 + q/16,        (q − 8) · scale = 16 · scale · (1 + q/16) − 24 · scale

One instruction (LOP3: a mask and an or), after a shift, makes two such numbers in a 32-bit register: one instruction
per weight. The constant is factored out of the sum over d, as the zero is: with S_g = Σ_{d in g} n_d,

    y[o] = Σ_g 16 · scale · Σ_{d in g} n_d (1 + q/16)  +  Σ_g S_g · (zero − 24 · scale)

and the second sum is a product of N × G numbers, computed in the epilogue (linear.py). 1 + q/16 and its products with
bf16 are exact, so the sums are those of unrounded weights: closer to fp64 than the plain path, which rounds each
dequantized weight to bf16.

Layout: words (D / BD, O, BD / 4) int16. A program multiplies BD columns per step (128, or 64 if D is not a multiple of
128). Bits 4i … 4i + 3 of word p are the code of column i · BD/4 + p of the step: bit plane i of the words, masked, is
the tile of W for the i-th quarter of x's columns, without moving values between threads. The BO rows of a step are
adjacent, so a program reads one contiguous range of memory per step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kernels.launch import jit, tl
from kernels.linear import compute, few_rows, locate_tile, make_layer, select, statistics, tile_product

GROUPS = (32, 64, 128)
MAX_ROWS = 64  # in passes of 16 rows, each of which reads a quarter of the dequantized weights' bytes


@dataclass(frozen=True)
class Int4Weight:
    """A weight (O, D) in int4: words in the layout above (int16), scales and zeros (D / group, O) bf16."""

    words: Tensor
    scales_GO: Tensor
    zeros_GO: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.words.shape[1], self.words.shape[0] * self.words.shape[2] * 4

    @property
    def group(self) -> int:
        return self.shape[1] // self.scales_GO.shape[0]

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weight (O, D), computed in at least fp32 and rounded once."""
        wide = torch.promote_types(dtype, torch.float32)
        shifts = torch.arange(4, device=self.words.device, dtype=torch.int32) * 4
        codes_sOip = (self.words.int()[:, :, None, :] >> shifts[:, None]) & 15
        codes_OGg = codes_sOip.transpose(0, 1).reshape(self.shape[0], -1, self.group)
        scale_OG, zero_OG = self.scales_GO.t().to(wide), self.zeros_GO.t().to(wide)
        return ((codes_OGg.to(wide) - 8) * scale_OG[..., None] + zero_OG[..., None]).flatten(1).to(dtype)


def repack_int4(codes: Tensor, steps_GO2: Tensor) -> Int4Weight:
    """Int4Weight from model/quantize's layout: codes (O, D / 2) uint8, the even column in the low half, and steps
    (D / group, O, 2) bf16, scale and zero. Raises ValueError unless D is a multiple of 64 and groups are of 32, 64 or
    128 columns."""
    codes_OD = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(1)
    (O, D), G = codes_OD.shape, steps_GO2.shape[0]
    if D % 64 or D % G or D // G not in GROUPS:
        raise ValueError(f"{D} columns in {G} groups: int4 needs a multiple of 64, in groups of 32, 64 or 128")
    step = 64 if D % 128 else 128
    planes = codes_OD.view(O, D // step, 4, step // 4).int()
    word = planes[:, :, 0] | planes[:, :, 1] << 4 | planes[:, :, 2] << 8 | planes[:, :, 3] << 12
    scales_GO, zeros_GO = (steps.contiguous() for steps in steps_GO2.unbind(-1))
    return Int4Weight(word.to(torch.int16).transpose(0, 1).contiguous(), scales_GO, zeros_GO)


@jit()
def _plane(words, i: tl.constexpr, ASM: tl.constexpr):
    """Bit plane i of the words as bf16 numbers 1 + q/16. ASM: inline PTX on two words per register, which LLVM would
    process one by one; the mask removes bits that the shift moves from one word into the other."""
    if ASM:
        if i == 0:
            shift: tl.constexpr = "shl.b32 $0, $1, 3;"
        elif i == 1:
            shift: tl.constexpr = "shr.u32 $0, $1, 1;"
        elif i == 2:
            shift: tl.constexpr = "shr.u32 $0, $1, 5;"
        else:
            shift: tl.constexpr = "shr.u32 $0, $1, 9;"
        mask: tl.constexpr = " lop3.b32 $0, $0, 0x00780078, 0x3F803F80, 0xEA;"  # (shifted & 0x78) | 0x3F80
        return tl.inline_asm_elementwise(shift + mask, "=r,r", [words], dtype=tl.bfloat16, is_pure=True, pack=2)
    if i == 0:
        shifted = words << 3
    else:
        shifted = words >> (4 * i - 3)
    return ((shifted & 0x78) | 0x3F80).to(tl.int16).to(tl.bfloat16, bitcast=True)


@jit()
def _tile_product_int4(x, gain, words, scales, O, o, start, stop, N, x_row, GROUP, BN, BO, BD, ASM):
    """Σ_g 16 · scale · Σ_{d in g} (x·g)[n, d] (1 + q/16), fp32 (BN, BO); columns start … stop are whole steps of BD."""
    n = tl.arange(0, BN)
    p = tl.arange(0, BD // 4)
    total = tl.zeros([BN, BO], tl.float32)
    in_o = o < O
    next_scale = tl.load(
        scales + start // GROUP * O + o, mask=in_o, other=0.0
    )  # one step ahead, as g in `tile_product`
    for first in range(start, stop, BD):
        at = words + first // BD * O * (BD // 4) + o[None, :] * (BD // 4) + p[:, None]
        words_PO = tl.load(at, mask=in_o[None, :], other=0)
        group_sum = tl.zeros([BN, BO], tl.float32)
        for i in tl.static_range(4):
            d = first + i * (BD // 4) + p
            tile = tl.load(x + n[:, None] * x_row + d[None, :], mask=(n < N)[:, None], other=0.0)
            if gain is not None:
                g = tl.load(gain + d)
                tile = (tile.to(tl.float32) * g.to(tl.float32)[None, :]).to(tile.dtype)
            group_sum = tl.dot(tile, _plane(words_PO, i, ASM), group_sum)
            if (i + 1) * (BD // 4) % GROUP == 0 or i == 3:  # the end of a group or of the step
                scale = next_scale
                group = (first + i * (BD // 4)) // GROUP + 1
                next_scale = tl.load(scales + group * O + o, mask=in_o & (group * GROUP < stop), other=0.0)
                total += group_sum * (16.0 * scale.to(tl.float32))[None, :]
                group_sum = tl.zeros([BN, BO], tl.float32)
    return total


@jit("N")
def _int4_products(
    x,
    gain,
    part,
    squares,
    sums,
    weights,
    scales,
    a,
    N,
    D,
    C,
    O,
    R,
    x_row,
    SPLIT_COLUMNS,
    GROUP: tl.constexpr,
    BN: tl.constexpr,
    BO: tl.constexpr,
    BD: tl.constexpr,
    BS: tl.constexpr,
    ASM: tl.constexpr,
):
    """As linear.py's `_products`: tile −1 computes Σ x² and S_g, the next tiles are W's, the last A's."""
    split = tl.program_id(0)
    tile = tl.program_id(1) - 1
    start = split * SPLIT_COLUMNS
    stop = min(start + SPLIT_COLUMNS, D)
    n = tl.arange(0, BN)
    at = part + (split * N + n)[:, None] * C + (tile * BO + tl.arange(0, BO))[None, :]
    i, first, edge = locate_tile(tile, O, 0, BO)
    if tile < 0:
        statistics(x, gain, squares, sums, split, start, stop, N, D, x_row, GROUP, BN, BS)
    elif tile < edge:
        o = (tile - first) * BO + tl.arange(0, BO)
        words, scale, size = select(i, weights), select(i, scales), select(i, O)
        total = _tile_product_int4(x, gain, words, scale, size, o, start, stop, N, x_row, GROUP, BN, BO, BD, ASM)
        tl.store(at, total, mask=(n < N)[:, None])
    elif a is not None:
        i, first, edge = locate_tile(tile, R, edge, BO)
        r = (tile - first) * BO + tl.arange(0, BO)
        total = tile_product(x, gain, select(i, a), select(i, R), r, start, stop, N, D, x_row, BN, BO, 64)
        tl.store(at, total, mask=(n < N)[:, None])


def int4_linear(
    x: Tensor,
    weight: Int4Weight | Sequence[Int4Weight],
    lora_a: Any = None,
    lora_b: Any = None,
    scale: Any = 1.0,
    bias: Any = None,
    norm: tuple[Tensor, float] | None = None,
    residual: Tensor | None = None,
    gated: bool = False,
) -> Any:
    """x (…, D) times int4 weights, plus adapters, biases and a residual: (…, O) in x's dtype. Lists and `gated` as in
    linear.py; `norm` is (weight_D, eps) of an RMSNorm of x. No gradients.

    bf16 runs the kernel on CUDA for up to 64 rows; otherwise the weights are dequantized first.
    """
    several = not isinstance(weight, Int4Weight)
    weights = [weight] if isinstance(weight, Int4Weight) else list(weight)
    for w in weights:
        if x.shape[-1] != w.shape[1]:
            raise ValueError(f"x is {tuple(x.shape)} and the weight {w.shape}: their last sizes must agree")
    layer = make_layer(x, [w.shape[0] for w in weights], norm, lora_a, lora_b, scale, bias, gated)
    trainable = (x, *layer.lora_a, *layer.lora_b)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in trainable):
        raise ValueError("int4_linear has no backward pass; call it under torch.no_grad()")
    kernel = partial(
        few_rows,
        _int4_products,
        ("int4", str(weights[0].words.shape[2] * 4)),
        weights=[w.words for w in weights],
        scales_zeros=[(w.scales_GO, w.zeros_GO) for w in weights],
    )
    one_group = len({w.scales_GO.shape[0] for w in weights}) == 1
    max_rows = MAX_ROWS if x.dtype == torch.bfloat16 and one_group else 0
    outs = compute(x, layer, residual, max_rows, lambda: [w.dequantize(x.dtype) for w in weights], kernel)
    return tuple(outs) if several and not gated else outs[0]
