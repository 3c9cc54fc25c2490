"""A linear layer whose weight is stored in 4 bits, with its LoRA adapter, and the norm before it if wanted.

    int4:  W[o, d] = (q[o, d] − 8) · scale[o, d // group] (+ zero[o, d // group]),  q in 0 … 15, even d in the low half
    nf4:   W[o, d] = LEVELS[q[o, d]] · absmax[o, d // group],                         even d in the high half

Packed tensors are (O, D / 2) uint8: two neighbours of a row share a byte. The nf4 layout is bitsandbytes' (its flat
blocks of 64 are groups of a row when 64 divides D), with the double quantisation of absmax already undone.

Why: a decoded token reads every weight once, so the time is the weights' bytes; 4.5 bits a weight instead of 16 can be
3.5 times sooner if unpacking keeps up. Three things keep it small:

* A byte is loaded once and gives both neighbours. Rather than interleaving them again, the rows of x are taken apart
  into even and odd columns, and Σ_d x_d W_d is the sum of two products.
* The scale is the same for a whole group of columns, so it multiplies the product, not the weights: a step of the loop
  stays within one group, sum += (x · levels) · scale. That is BN · BO multiplications a step instead of BD · BO, and it
  is more exact than multiplying first, since −8 … 7 need no rounding in bf16.
* Σ_d x_d · zero = zero · Σ_d x_d, so a zero point costs one sum per row and group.

The adapter is added in the same pass, in the dtype of x and exact, as in linear.py: n Aᵀ along the way while the rank
is small, else by a first launch. fp32 products say "ieee": TF32 would keep 10 of 23 bits. No atomics. Forward only.
"""

from __future__ import annotations

# ruff: noqa: E741 - O is the output width
from typing import Any

import torch
from torch import Tensor

from kernels.launch import config, divide_up, jit, launch, power_of_2, rows, runs_here, tl
from kernels.linear import lora_linear_definition
from kernels.low_rank import run_shrink, shape_class, statistic, tile_of_rows
from kernels.norm import rms_norm_definition

# the 16 quantiles of a standard normal, scaled to [−1, 1], of arXiv 2305.14314, in fp32 as bitsandbytes has them
NF4_LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
GROUPS = (32, 64, 128)


def unpack(packed: Tensor, high_first: bool) -> Tensor:
    """(O, D / 2) bytes as (O, D) codes 0 … 15."""
    low, high = packed & 15, packed >> 4
    return torch.stack((high, low) if high_first else (low, high), dim=-1).flatten(-2)


def int4_weight(packed: Tensor, scales_OG: Tensor, zeros_OG: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The weight that the codes stand for, (O, D), computed in at least fp32 and rounded once."""
    wide = torch.promote_types(dtype, torch.float32)
    group = packed.shape[1] * 2 // scales_OG.shape[1]
    weight = (unpack(packed, False).to(wide) - 8) * scales_OG.to(wide).repeat_interleave(group, dim=1)
    if zeros_OG is not None:
        weight = weight + zeros_OG.to(wide).repeat_interleave(group, dim=1)
    return weight.to(dtype)


def nf4_weight(packed: Tensor, absmax_OG: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight that the codes stand for, (O, D), computed in at least fp32 and rounded once."""
    wide = torch.promote_types(dtype, torch.float32)
    group = packed.shape[1] * 2 // absmax_OG.shape[1]
    levels = torch.tensor(NF4_LEVELS, dtype=wide, device=packed.device)
    weight = levels[unpack(packed, True).long()] * absmax_OG.to(wide).repeat_interleave(group, dim=1)
    return weight.to(dtype)


def _definition(x: Tensor, weight_OD: Tensor, lora_a: Any, lora_b: Any, scale: float, bias: Any, norm: Any) -> Tensor:
    n = x if norm is None else rms_norm_definition(x, *norm)
    return lora_linear_definition(n, weight_OD, lora_a, lora_b, scale, bias)


def int4_lora_linear_definition(
    x: Tensor, packed: Tensor, scales_OG: Tensor, lora_a_RD: Tensor | None = None, lora_b_OR: Tensor | None = None,
    scale: float = 1.0, bias_O: Tensor | None = None, zeros_OG: Tensor | None = None,
    norm: tuple[Tensor, float] | None = None,
) -> Tensor:  # fmt: skip
    weight_OD = int4_weight(packed, scales_OG, zeros_OG, x.dtype)
    return _definition(x, weight_OD, lora_a_RD, lora_b_OR, scale, bias_O, norm)


def nf4_lora_linear_definition(
    x: Tensor, packed: Tensor, absmax_OG: Tensor, lora_a_RD: Tensor | None = None, lora_b_OR: Tensor | None = None,
    scale: float = 1.0, bias_O: Tensor | None = None, norm: tuple[Tensor, float] | None = None,
) -> Tensor:  # fmt: skip
    return _definition(x, nf4_weight(packed, absmax_OG, x.dtype), lora_a_RD, lora_b_OR, scale, bias_O, norm)


@jit
def _levels(code, table, TABLE: tl.constexpr, dtype: tl.constexpr):
    if TABLE:
        return tl.load(table + code.to(tl.int32)).to(dtype)
    return (code.to(tl.int32) - 8).to(tl.float32).to(dtype)


@jit
def _four_bit(
    x, gain, u, y, packed, scales, zeros, table, a, b, bias,
    N, D, O, R, s, x_row, p_row, s_row, a_row, b_row, u_row, y_row, eps,
    NORM: tl.constexpr, LORA: tl.constexpr, BIAS: tl.constexpr, ZERO: tl.constexpr, TABLE: tl.constexpr,
    RANK: tl.constexpr, BN: tl.constexpr, BO: tl.constexpr, BD: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * BN + tl.arange(0, BN)).to(tl.int64)
    live = row < N
    o = (tl.program_id(1) * BO + tl.arange(0, BO)).to(tl.int64)
    in_o = o < O
    rank = tl.arange(0, RANK)
    half = tl.arange(0, BD // 2)
    r = tl.zeros([BN], tl.float32)
    if NORM:
        r = statistic(x, row, live, D, x_row, eps, BN, BD)
    sum_y = tl.zeros([BN, BO], tl.float32)
    sum_u = tl.zeros([BN, RANK], tl.float32)
    for start in range(0, D, BD):
        n = tile_of_rows(x, gain, r, row, live, start, D, x_row, NORM, BD)
        even, odd = tl.split(tl.reshape(n, (BN, BD // 2, 2)))
        p_at = packed + o[None, :] * p_row + (start // 2 + half)[:, None]
        both = tl.load(p_at, mask=in_o[None, :], other=0)
        low, high = both & 15, both >> 4
        first = _levels(high if TABLE else low, table, TABLE, n.dtype)
        second = _levels(low if TABLE else high, table, TABLE, n.dtype)
        part = tl.dot(even, first, input_precision="ieee")
        part = tl.dot(odd, second, part, input_precision="ieee")
        s_o = tl.load(scales + o * s_row + start // GROUP, mask=in_o, other=0.0).to(tl.float32)
        sum_y += part * s_o[None, :]
        if ZERO:
            z_o = tl.load(zeros + o * s_row + start // GROUP, mask=in_o, other=0.0).to(tl.float32)
            sum_y += tl.sum(n.to(tl.float32), axis=1)[:, None] * z_o[None, :]
        if LORA == "here":
            a_at = a + rank[None, :] * a_row + (start + tl.arange(0, BD))[:, None]
            a_DR = tl.load(a_at, mask=rank[None, :] < R, other=0.0)
            sum_u = tl.dot(n, a_DR, sum_u, input_precision="ieee")
    if LORA == "here":
        b_RO = tl.load(b + o[None, :] * b_row + rank[:, None], mask=in_o[None, :] & (rank[:, None] < R), other=0.0)
        sum_y = tl.dot((sum_u * s).to(b_RO.dtype), b_RO, sum_y, input_precision="ieee")
    if LORA == "given":
        for first_k in range(0, R, RANK):
            k = first_k + rank
            u_at = u + row[:, None] * u_row + k[None, :]
            u_NR = tl.load(u_at, mask=live[:, None] & (k[None, :] < R), other=0.0)
            b_RO = tl.load(b + o[None, :] * b_row + k[:, None], mask=in_o[None, :] & (k[:, None] < R), other=0.0)
            sum_y = tl.dot(u_NR, b_RO, sum_y, input_precision="ieee")
    if BIAS:
        sum_y += tl.load(bias + o, mask=in_o, other=0.0).to(tl.float32)[None, :]
    tl.store(y + row[:, None] * y_row + o[None, :], sum_y, mask=live[:, None] & in_o[None, :])


_tables: dict[torch.device, Tensor] = {}


def _table(device: torch.device) -> Tensor:
    if device not in _tables:
        _tables[device] = torch.tensor(NF4_LEVELS, dtype=torch.float32, device=device)
    return _tables[device]


def _run(
    x: Tensor, packed: Tensor, scales_OG: Tensor, zeros_OG: Tensor | None, lora_a: Tensor | None,
    lora_b: Tensor | None, scale: float, bias: Tensor | None, norm: tuple[Tensor, float] | None, table: bool,
) -> Tensor:  # fmt: skip
    x_ND = rows(x)
    (N, D), O = x_ND.shape, packed.shape[0]
    gain_D, eps = norm if norm is not None else (None, 0.0)
    group = D // scales_OG.shape[1]
    tiles = dict(config("four_bit", shape_class(N, x.dtype)))
    limit, most = tiles.pop("RECOMPUTE"), tiles.pop("MOST_RANK")
    tiles["BD"] = min(tiles["BD"], group)  # a step of the loop stays within a group
    R = 0 if lora_a is None else lora_a.shape[0]
    rank_tile = max(16, power_of_2(R))
    lora = "no" if R == 0 else "here" if rank_tile <= limit else "given"
    u = x_ND
    if lora == "given":
        u = run_shrink(x_ND, gain_D, [lora_a], [scale], eps)[1][:, 0]
        rank_tile = min(rank_tile, most)
    a = x_ND if lora_a is None else rows(lora_a)
    b = x_ND if lora_b is None else rows(lora_b)
    y_NO = x_ND.new_empty(N, O)
    scales_OG = scales_OG.contiguous()
    arguments = dict(
        x=x_ND, gain=x_ND if gain_D is None else gain_D, u=u, y=y_NO, packed=packed.contiguous(), scales=scales_OG,
        zeros=scales_OG if zeros_OG is None else zeros_OG.contiguous(),
        table=_table(x.device) if table else scales_OG, a=a, b=b, bias=x_ND if bias is None else bias.contiguous(),
        N=N, D=D, O=O, R=R, s=float(scale), x_row=x_ND.stride(0), p_row=D // 2,
        s_row=scales_OG.stride(0), a_row=a.stride(0), b_row=b.stride(0), u_row=u.stride(0), y_row=O, eps=float(eps),
    )  # fmt: skip
    launch(
        _four_bit, (divide_up(N, tiles["BN"]), divide_up(O, tiles["BO"])), arguments, NORM=norm is not None, LORA=lora,
        BIAS=bias is not None, ZERO=zeros_OG is not None, TABLE=table, RANK=rank_tile, GROUP=group, **tiles,
    )  # fmt: skip
    return y_NO.unflatten(0, x.shape[:-1]) if x.dim() != 2 else y_NO


def _check(x: Tensor, packed: Tensor, scales_OG: Tensor, others: tuple[Tensor | None, ...]) -> None:
    D = x.shape[-1]
    if packed.dtype != torch.uint8 or packed.shape[1] * 2 != D:
        raise ValueError(
            f"packed {packed.dtype} {tuple(packed.shape)} must be uint8 (O, {D // 2}) for x {tuple(x.shape)}"
        )
    if scales_OG.shape[0] != packed.shape[0] or D % scales_OG.shape[1] or D // scales_OG.shape[1] not in GROUPS:
        raise ValueError(
            f"scales {tuple(scales_OG.shape)} must be ({packed.shape[0]}, {D} / group) with a group of 32, 64 or 128"
        )
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *others)):
        raise ValueError("the 4-bit layers have no backward pass: call them under torch.no_grad()")


def int4_lora_linear(
    x: Tensor, packed: Tensor, scales_OG: Tensor, lora_a_RD: Tensor | None = None, lora_b_OR: Tensor | None = None,
    scale: float = 1.0, bias_O: Tensor | None = None, zeros_OG: Tensor | None = None,
    norm: tuple[Tensor, float] | None = None,
) -> Tensor:  # fmt: skip
    """x (…, D) times an int4 weight (layout at the top of this file) plus its adapter and bias → (…, O) in x's dtype.

    packed (O, D / 2) uint8; scales_OG, zeros_OG floating, one per group of 32, 64 or 128 columns. `norm` is
    (weight_D, eps) of an RMSNorm to apply to x first. No gradients.
    """
    others = (lora_a_RD, lora_b_OR, bias_O, norm[0] if norm else None)
    _check(x, packed, scales_OG, others)
    if not runs_here(x, *others):
        return int4_lora_linear_definition(x, packed, scales_OG, lora_a_RD, lora_b_OR, scale, bias_O, zeros_OG, norm)
    return _run(x, packed, scales_OG, zeros_OG, lora_a_RD, lora_b_OR, scale, bias_O, norm, table=False)


def nf4_lora_linear(
    x: Tensor, packed: Tensor, absmax_OG: Tensor, lora_a_RD: Tensor | None = None, lora_b_OR: Tensor | None = None,
    scale: float = 1.0, bias_O: Tensor | None = None, norm: tuple[Tensor, float] | None = None,
) -> Tensor:  # fmt: skip
    """x (…, D) times an nf4 weight (layout at the top of this file) plus its adapter and bias → (…, O) in x's dtype.

    packed (O, D / 2) uint8; absmax_OG floating, one per group of 32, 64 or 128 columns. No gradients.
    """
    others = (lora_a_RD, lora_b_OR, bias_O, norm[0] if norm else None)
    _check(x, packed, absmax_OG, others)
    if not runs_here(x, *others):
        return nf4_lora_linear_definition(x, packed, absmax_OG, lora_a_RD, lora_b_OR, scale, bias_O, norm)
    return _run(x, packed, absmax_OG, None, lora_a_RD, lora_b_OR, scale, bias_O, norm, table=True)
