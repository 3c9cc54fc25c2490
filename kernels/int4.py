"""A linear layer with int4 weights for 1 to 16 rows, norm and LoRA inside: a quarter of the bytes, and no conversions.

    W[o, d] = (q[o, d] − 8) · scale[g, o] + zero[g, o]        g the group of 32, 64 or 128 columns that holds d

These are the CPU's weights, value for value (q, scale and zero of an int4 checkpoint); `repack_int4` only moves
the codes, once, when the model is loaded.

The trick. An integer-to-float conversion (I2F) runs at a quarter of the rate of a logic operation, and one a weight
takes longer than reading 4 bits. But a bf16 number with exponent 0 is 1.mmmmmmm, so a code put into the upper four of
its seven mantissa bits *is* a number:

    bits 0 01111111 qqqq000  =  1 + q/16,        (q − 8) · scale = 16 · scale · (1 + q/16) − 24 · scale

A mask and an or (one instruction, LOP3) make two of them in a 32-bit register, one shift before: one instruction a
weight. The constant leaves the sum over d as the zero does: with S_g = Σ_{d in g} n_d,

    y[o] = Σ_g 16 · scale · Σ_{d in g} n_d (1 + q/16)  +  Σ_g S_g · (zero − 24 · scale)

and the second sum is a product of N × G numbers, made in the epilogue (linear.py). 1 + q/16 and every product with
bf16 are exact, so the sums are those of unrounded weights: nearer to fp64 than the plain path, which rounds each
weight to bf16.

The layout, words (D / BD, O, BD / 4) int16. A program multiplies BD columns a step (128, or 64 where D is no multiple
of 128). Bits 4i … 4i + 3 of word p hold the code of column i · BD/4 + p of the step: plane i of the words, masked, is
the tile of W for the i-th quarter of x's columns, with no element moving between threads. The BO rows of a step lie
side by side, so a program's read of a step is one range of memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kernels.launch import jit, tl
from kernels.linear import as_list, choose, compute, few_rows, find, statistics, walk

GROUPS = (32, 64, 128)
MOST_ROWS = 64  # in passes of 16, each over a quarter of the bytes that dequantized weights would be


@dataclass(frozen=True)
class Int4Weight:
    """A weight (O, D): words as above, scales and zeros (D / group, O) bf16."""

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
    """From the CPU's form: codes (O, D / 2) uint8 with the even column in the low half, and steps (D / group, O, 2)
    bf16, scale and zero. ValueError where D is no multiple of 64 in groups of 32, 64 or 128."""
    codes_OD = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(1)
    (O, D), G = codes_OD.shape, steps_GO2.shape[0]
    if D % 64 or D % G or D // G not in GROUPS:
        raise ValueError(f"{D} columns in {G} groups: a multiple of 64, in groups of 32, 64 or 128")
    step = 64 if D % 128 else 128
    planes = codes_OD.view(O, D // step, 4, step // 4).int()
    word = planes[:, :, 0] | planes[:, :, 1] << 4 | planes[:, :, 2] << 8 | planes[:, :, 3] << 12
    scales_GO, zeros_GO = (steps.contiguous() for steps in steps_GO2.unbind(-1))
    return Int4Weight(word.to(torch.int16).transpose(0, 1).contiguous(), scales_GO, zeros_GO)


@jit()
def _plane(words, i: tl.constexpr, ASM: tl.constexpr):
    """Codes i of the words as bf16 numbers 1 + q/16. ASM: two neighbours in a register at a time, by the instructions
    themselves, since LLVM would work on each by itself; bits that a shift moves across neighbours are masked away."""
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
def _times_words(x, gain, words, scales, O, o, start, stop, N, x_row, GROUP, BN, BO, BD, ASM):
    """Σ_g 16 · scale · Σ_{d in g} (x·g)[n, d] (1 + q/16), fp32 (BN, BO); columns start … stop are whole steps."""
    n = tl.arange(0, BN)
    p = tl.arange(0, BD // 4)
    total = tl.zeros([BN, BO], tl.float32)
    in_o = o < O
    next_scale = tl.load(scales + start // GROUP * O + o, mask=in_o, other=0.0)  # one step ahead, as the gain in `walk`
    for first in range(start, stop, BD):
        at = words + first // BD * O * (BD // 4) + o[None, :] * (BD // 4) + p[:, None]
        words_PO = tl.load(at, mask=in_o[None, :], other=0)
        partial = tl.zeros([BN, BO], tl.float32)
        for i in tl.static_range(4):
            d = first + i * (BD // 4) + p
            tile = tl.load(x + n[:, None] * x_row + d[None, :], mask=(n < N)[:, None], other=0.0)
            if gain is not None:
                g = tl.load(gain + d)
                tile = (tile.to(tl.float32) * g.to(tl.float32)[None, :]).to(tile.dtype)
            partial = tl.dot(tile, _plane(words_PO, i, ASM), partial)
            if (i + 1) * (BD // 4) % GROUP == 0 or i == 3:  # a group, or the step, ends here
                scale = next_scale
                group = (first + i * (BD // 4)) // GROUP + 1
                next_scale = tl.load(scales + group * O + o, mask=in_o & (group * GROUP < stop), other=0.0)
                total += partial * (16.0 * scale.to(tl.float32))[None, :]
                partial = tl.zeros([BN, BO], tl.float32)
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
    SHARE,
    GROUP: tl.constexpr,
    BN: tl.constexpr,
    BO: tl.constexpr,
    BD: tl.constexpr,
    BS: tl.constexpr,
    ASM: tl.constexpr,
):
    """As linear.py's: tile −1 makes Σ x² and S_g, then come the tiles of W, then A's."""
    split = tl.program_id(0)
    tile = tl.program_id(1) - 1
    start = split * SHARE
    stop = min(start + SHARE, D)
    n = tl.arange(0, BN)
    at = part + (split * N + n)[:, None] * C + (tile * BO + tl.arange(0, BO))[None, :]
    i, first, edge = find(tile, O, 0, BO)
    if tile < 0:
        statistics(x, gain, squares, sums, split, start, stop, N, D, x_row, GROUP, BN, BS)
    elif tile < edge:
        o = (tile - first) * BO + tl.arange(0, BO)
        words, scale, size = choose(i, weights), choose(i, scales), choose(i, O)
        total = _times_words(x, gain, words, scale, size, o, start, stop, N, x_row, GROUP, BN, BO, BD, ASM)
        tl.store(at, total, mask=(n < N)[:, None])
    elif a is not None:
        i, first, edge = find(tile, R, edge, BO)
        r = (tile - first) * BO + tl.arange(0, BO)
        total = walk(x, gain, choose(i, a), choose(i, R), r, start, stop, N, D, x_row, BN, BO, 64)
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
    """x (…, D) times int4 weights, plus adapters, biases and a residual → (…, O) in x's dtype; lists and `gated` as in
    linear.py. `norm` is (weight_D, eps) of an RMSNorm of x. No gradients.

    bf16 runs the kernel on CUDA for up to 64 rows; otherwise the weights are dequantized first.
    """
    several = not isinstance(weight, Int4Weight)
    weights = [weight] if isinstance(weight, Int4Weight) else list(weight)
    for w in weights:
        if x.shape[-1] != w.shape[1]:
            raise ValueError(f"x is {tuple(x.shape)} and the weight {w.shape}: their last sizes must agree")
    adapters = (*as_list(lora_a, 1), *as_list(lora_b, 1))
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *adapters)):
        raise ValueError("int4 layers have no backward pass: call them under torch.no_grad()")
    kernel = partial(
        few_rows,
        _int4_products,
        ("int4", str(weights[0].words.shape[2] * 4)),
        weights=[w.words for w in weights],
        steps=[(w.scales_GO, w.zeros_GO) for w in weights],
    )
    same = x.dtype == torch.bfloat16 and len({w.scales_GO.shape[0] for w in weights}) == 1
    outs = compute(
        x,
        norm,
        [w.shape[0] for w in weights],
        lora_a,
        lora_b,
        scale,
        bias,
        residual,
        gated,
        MOST_ROWS * same,
        lambda: [w.dequantize(x.dtype) for w in weights],
        kernel,
    )
    return tuple(outs) if several and not gated else outs[0]
