"""One batch, many adapters: row n of x goes through adapter index[n], or through none (−1).

    y_n = x_n Wᵀ + scale[e] · (x_n A[e]ᵀ) B[e]ᵀ,   e = index[n];   A is (E, R, D), B is (E, O, R)

Requests for different tunings of one base share its weights (Punica, arXiv 2310.18547; S-LoRA, arXiv 2311.03285). The
product with W does not care whose row is whose, so it stays one product over all rows. Only the adapters' parts differ.

Sorting rows by adapter would give tiles of one adapter each, but in decoding every such tile would read all of W again.
Instead a tile keeps its rows as they come, and for each adapter between its lowest and highest index that really
occurs in it, the other rows of u are set to zero and the product with that B is added:

    y += Σ_e (u · [index = e]) B[e]ᵀ

A row is nonzero in exactly one term, so the sum is exact whatever the order. With one adapter in the tile that is one
small product, as without this kernel; with 16 different ones in 16 rows it is 16 products of rank R, each reading a B
that some row needs anyway. The same trick computes u = scale · x A[e]ᵀ in a first launch, rank-tile by rank-tile.

An adapter of a lower rank is padded with zero rows of A and zero columns of B. Forward only; 64-bit offsets, since E
adapters of a 7B model's widest layer pass 2^31 values at E = 150 and R = 1,000, and N · O at 150,000 rows.
"""

from __future__ import annotations

# ruff: noqa: E741 - O is the output width
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.launch import config, divide_up, jit, launch, power_of_2, rows, runs_here, tl
from kernels.low_rank import shape_class


def multi_lora_linear_definition(
    x_ND: Tensor, weight_OD: Tensor, lora_a_ERD: Tensor, lora_b_EOR: Tensor, index_N: Tensor, scale_E: Tensor,
    bias_O: Tensor | None = None,
) -> Tensor:  # fmt: skip
    y_NO = F.linear(x_ND, weight_OD, bias_O)
    for e in range(lora_a_ERD.shape[0]):
        mine = (index_N == e).nonzero()[:, 0]
        delta_MO = F.linear(F.linear(x_ND[mine], lora_a_ERD[e]), lora_b_EOR[e])
        y_NO = y_NO.index_add(0, mine, delta_MO * scale_E[e].to(delta_MO.dtype))
    return y_NO


@jit
def _multi_shrink(
    x, a, index, scale, u, N, D, R, x_row, a_e, a_row, NONE,
    RANK: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * BN + tl.arange(0, BN)).to(tl.int64)
    live = row < N
    rank = tl.program_id(1) * RANK + tl.arange(0, RANK)
    in_r = rank < R
    who = tl.load(index + row, mask=live, other=-1)
    sum_u = tl.zeros([BN, RANK], tl.float32)
    for e in range(tl.min(tl.where(who < 0, NONE, who), axis=0), tl.max(who, axis=0) + 1):
        mine = who == e
        e_64 = tl.full([1], e, tl.int64)
        if tl.sum(mine.to(tl.int32), axis=0) > 0:
            part = tl.zeros([BN, RANK], tl.float32)
            for start in range(0, D, BD):
                d = start + tl.arange(0, BD)
                x_at = x + row[:, None] * x_row + d[None, :]
                x_ND = tl.load(x_at, mask=mine[:, None] & (d[None, :] < D), other=0.0)
                a_at = a + e_64[None, :] * a_e + rank[None, :] * a_row + d[:, None]
                a_DR = tl.load(a_at, mask=(d[:, None] < D) & in_r[None, :], other=0.0)
                part = tl.dot(x_ND, a_DR, part, input_precision="ieee")
            sum_u += part * tl.load(scale + e)
    tl.store(u + row[:, None] * R + rank[None, :], sum_u, mask=live[:, None] & in_r[None, :])


@jit
def _multi_linear(
    x, w, u, b, index, bias, y, N, D, O, R, x_row, w_row, b_e, b_row, NONE,
    BIAS: tl.constexpr, RANK: tl.constexpr, BN: tl.constexpr, BO: tl.constexpr, BD: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(O, BO)
    group = tl.program_id(0) // (GROUP * tiles)
    size = min(tl.cdiv(N, BN) - group * GROUP, GROUP)
    place = tl.program_id(0) % (GROUP * tiles)
    row = ((group * GROUP + place % size) * BN + tl.arange(0, BN)).to(tl.int64)
    live = row < N
    o = ((place // size) * BO + tl.arange(0, BO)).to(tl.int64)
    in_o = o < O
    sum_y = tl.zeros([BN, BO], tl.float32)
    for start in range(0, D, BD):
        d = start + tl.arange(0, BD)
        in_d = d < D
        x_ND = tl.load(x + row[:, None] * x_row + d[None, :], mask=live[:, None] & in_d[None, :], other=0.0)
        w_DO = tl.load(w + o[None, :] * w_row + d[:, None], mask=in_d[:, None] & in_o[None, :], other=0.0)
        sum_y = tl.dot(x_ND, w_DO, sum_y, input_precision="ieee")
    who = tl.load(index + row, mask=live, other=-1)
    for e in range(tl.min(tl.where(who < 0, NONE, who), axis=0), tl.max(who, axis=0) + 1):
        mine = who == e
        e_64 = tl.full([1], e, tl.int64)
        if tl.sum(mine.to(tl.int32), axis=0) > 0:
            for first in range(0, R, RANK):
                rank = first + tl.arange(0, RANK)
                in_r = rank < R
                u_NR = tl.load(u + row[:, None] * R + rank[None, :], mask=mine[:, None] & in_r[None, :], other=0.0)
                b_at = b + e_64[None, :] * b_e + o[None, :] * b_row + rank[:, None]
                b_RO = tl.load(b_at, mask=in_o[None, :] & in_r[:, None], other=0.0)
                sum_y = tl.dot(u_NR, b_RO, sum_y, input_precision="ieee")
    if BIAS:
        sum_y += tl.load(bias + o, mask=in_o, other=0.0).to(tl.float32)[None, :]
    tl.store(y + row[:, None] * O + o[None, :], sum_y, mask=live[:, None] & in_o[None, :])


def multi_lora_linear(
    x: Tensor, weight_OD: Tensor, lora_a_ERD: Tensor, lora_b_EOR: Tensor, index: Tensor, scale_E: Tensor,
    bias_O: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """x Wᵀ + bias plus each row's own adapter: x (…, D), index (…) int64 in [−1, E) → (…, O) in x's dtype.

    lora_a (E, R, D), lora_b (E, O, R), scale_E fp32 (α / R of each adapter); index −1 is the base alone. An index of E
    or more raises ValueError on a CPU; on CUDA it is not looked at, since that would make the host wait. No gradients.
    """
    E, R, D = lora_a_ERD.shape
    O = weight_OD.shape[0]
    if weight_OD.shape[1] != D or x.shape[-1] != D or lora_b_EOR.shape != (E, O, R) or scale_E.shape != (E,):
        raise ValueError(
            f"x {tuple(x.shape)}, weight {tuple(weight_OD.shape)}, lora_a {tuple(lora_a_ERD.shape)}, "
            f"lora_b {tuple(lora_b_EOR.shape)}, scale {tuple(scale_E.shape)} "
            "are not (…, D), (O, D), (E, R, D), (E, O, R), (E,)"
        )
    if index.shape != x.shape[:-1]:
        raise ValueError(f"index {tuple(index.shape)} must name an adapter for each of the rows {tuple(x.shape[:-1])}")
    if index.is_cpu and index.numel() and not -1 <= int(index.min()) <= int(index.max()) < E:
        raise ValueError(
            f"adapters {int(index.min())} to {int(index.max())} were asked for; there are {E} (−1 is none)"
        )
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, weight_OD, lora_a_ERD, lora_b_EOR)):
        raise ValueError("multi_lora_linear has no backward pass: call it under torch.no_grad()")
    x_ND, index_N = rows(x), index.reshape(-1)
    N = x_ND.shape[0]
    if not runs_here(x, weight_OD, lora_a_ERD, lora_b_EOR, bias_O):
        y_NO = multi_lora_linear_definition(x_ND, weight_OD, lora_a_ERD, lora_b_EOR, index_N, scale_E, bias_O)
        return y_NO.view(*x.shape[:-1], O)
    w, a, b = rows(weight_OD), lora_a_ERD.contiguous(), lora_b_EOR.contiguous()
    who_N = index_N.to(torch.int32).contiguous()
    kind = shape_class(N, x.dtype)
    u_NR, y_NO = x_ND.new_empty(N, R), x_ND.new_empty(N, O)

    tiles = dict(config("shrink", kind))
    rank_tile = min(max(16, power_of_2(R)), tiles.pop("MOST_RANK"))
    arguments = dict(
        x=x_ND, a=a, index=who_N, scale=scale_E.float().contiguous(), u=u_NR, N=N, D=D, R=R, x_row=x_ND.stride(0),
        a_e=a.stride(0), a_row=a.stride(1), NONE=E,
    )  # fmt: skip
    launch(_multi_shrink, (divide_up(N, tiles["BN"]), divide_up(R, rank_tile)), arguments, RANK=rank_tile, **tiles)

    tiles = dict(config("linear", kind))
    tiles.pop("RECOMPUTE")
    rank_tile = min(max(16, power_of_2(R)), tiles.pop("MOST_RANK"))
    arguments = dict(
        x=x_ND, w=w, u=u_NR, b=b, index=who_N, bias=x_ND if bias_O is None else bias_O.contiguous(), y=y_NO,
        N=N, D=D, O=O, R=R, x_row=x_ND.stride(0), w_row=w.stride(0), b_e=b.stride(0), b_row=b.stride(1), NONE=E,
    )  # fmt: skip
    grid = (divide_up(N, tiles["BN"]) * divide_up(O, tiles["BO"]),)
    launch(_multi_linear, grid, arguments, BIAS=bias_O is not None, RANK=rank_tile, **tiles)
    return y_NO.view(*x.shape[:-1], O)
