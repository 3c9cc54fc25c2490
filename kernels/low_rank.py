"""The products of a rank's size beside a linear layer, and the tile of normed rows that all of them start from.

    u = s · n Aᵀ         `run_shrink`, for up to three adapters at once; also each row's 1/√(mean(x²) + eps)
    tᵀ n                 `run_outer`, the gradients of A and B: sums over the rows

n = cast(x · r) · g, or x where there is no norm (linear.py says why n is computed again rather than kept). Sums over
rows are split over programs whose partial sums are added in a fixed order: no atomics, the same bits each run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.launch import config, divide_up, jit, launch, power_of_2, tl, width

FEW_ROWS = 16  # up to so many rows a product waits for the weights, beyond for the arithmetic
MOST_OUTPUTS = 3


@jit
def pick(which, first, second, third):
    chosen = first
    if which == 1:
        chosen = second
    if which == 2:
        chosen = third
    return chosen


@jit
def statistic(x, row, live, D, x_row, eps, BN: tl.constexpr, BD: tl.constexpr):
    """1/√(mean(x²) + eps) of BN rows."""
    square = tl.zeros([BN, BD], tl.float32)
    for start in range(0, D, BD):
        d = start + tl.arange(0, BD)
        tile = tl.load(x + row[:, None] * x_row + d[None, :], mask=live[:, None] & (d[None, :] < D), other=0.0)
        square += tile.to(tl.float32) * tile.to(tl.float32)
    return 1.0 / tl.sqrt(tl.sum(square, axis=1) / D + eps)


@jit
def tile_of_rows(x, gain, r, row, live, start, D, x_row, NORM: tl.constexpr, BD: tl.constexpr):
    """A tile of n: rows × BD columns of x from `start`, normed, cast and scaled as the plain path does it."""
    d = start + tl.arange(0, BD)
    tile = tl.load(x + row[:, None] * x_row + d[None, :], mask=live[:, None] & (d[None, :] < D), other=0.0)
    if NORM:
        g = tl.load(gain + d, mask=d < D, other=0.0).to(tl.float32)
        normed = (tile.to(tl.float32) * r[:, None]).to(tile.dtype).to(tl.float32)
        tile = (normed * g[None, :]).to(tile.dtype)
    return tile


@jit
def _shrink(
    x, gain, rstd, u, a0, a1, a2, N, D, R0, R1, R2, s0, s1, s2, x_row, a_row, a_col, u_row, u_out, eps,
    NORM: tl.constexpr, OUTPUTS: tl.constexpr, RANK: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """u = s · n Aᵀ for each output, and the statistic of each row."""
    row = (tl.program_id(0) * BN + tl.arange(0, BN)).to(tl.int64)
    live = row < N
    which = tl.program_id(1)
    R, s, a = R0, s0, a0
    if OUTPUTS > 1:
        R, s, a = pick(which, R0, R1, R2), pick(which, s0, s1, s2), pick(which, a0, a1, a2)
    rank = tl.program_id(2) * RANK + tl.arange(0, RANK)
    r = tl.zeros([BN], tl.float32)
    if NORM:
        r = statistic(x, row, live, D, x_row, eps, BN, BD)
        if which + tl.program_id(2) == 0:
            tl.store(rstd + row, r, mask=live)
    sum_u = tl.zeros([BN, RANK], tl.float32)
    for start in range(0, D, BD):
        d = start + tl.arange(0, BD)
        n = tile_of_rows(x, gain, r, row, live, start, D, x_row, NORM, BD)
        a_at = a + rank[None, :].to(tl.int64) * a_row + d[:, None].to(tl.int64) * a_col
        a_DR = tl.load(a_at, mask=(d[:, None] < D) & (rank[None, :] < R), other=0.0)
        sum_u = tl.dot(n, a_DR, sum_u, input_precision="ieee")
    u_at = u + row[:, None] * u_row + which * u_out + rank[None, :]
    tl.store(u_at, sum_u * s, mask=live[:, None] & (rank[None, :] < R))


@jit
def _outer(
    t, x, gain, rstd, out, N, D, R, t_row, x_row, SPLITS,
    NORM: tl.constexpr, RANK: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """out[split] = tᵀ n over this split's rows: (R, D) in fp32."""
    start = tl.program_id(0) * BD
    rank = tl.program_id(1) * RANK + tl.arange(0, RANK)
    split = tl.program_id(2)
    d = start + tl.arange(0, BD)
    total = tl.zeros([RANK, BD], tl.float32)
    tiles = tl.cdiv(N, BN)
    for tile in range(split, tiles, SPLITS):
        row = (tile * BN + tl.arange(0, BN)).to(tl.int64)
        live = row < N
        r = tl.zeros([BN], tl.float32)
        if NORM:
            r = tl.load(rstd + row, mask=live, other=0.0)
        n = tile_of_rows(x, gain, r, row, live, start, D, x_row, NORM, BD)
        t_RN = tl.load(t + row[None, :] * t_row + rank[:, None], mask=live[None, :] & (rank[:, None] < R), other=0.0)
        total = tl.dot(t_RN, n, total, input_precision="ieee")
    out_at = out + (split * R + rank[:, None]).to(tl.int64) * D + d[None, :]
    tl.store(out_at, total, mask=(rank[:, None] < R) & (d[None, :] < D))


def same_strides(tensors: Sequence[Tensor | None], stand_in: Tensor) -> tuple[list[Tensor], tuple[int, int]]:
    """Three matrices that share strides, for one stride argument; `stand_in` fills the empty places.

    Weights of one layer nearly always agree as they are. Adapters of different ranks are padded with zero columns.
    """
    present = [t for t in tensors if t is not None]
    if not present:
        return [stand_in] * MOST_OUTPUTS, (0, 1)
    if len({t.stride() for t in present}) > 1:
        widest = max(t.shape[1] for t in present)
        tensors = [None if t is None else F.pad(t, (0, widest - t.shape[1])).contiguous() for t in tensors]
        present = [t for t in tensors if t is not None]
    filled = [t if t is not None else present[0] for t in tensors]
    return (filled + [present[0]] * MOST_OUTPUTS)[:MOST_OUTPUTS], (present[0].stride(0), present[0].stride(1))


def three(values: Sequence[Any], empty: Any) -> list[Any]:
    return [*values, *[empty] * (MOST_OUTPUTS - len(values))]


def shape_class(N: int, dtype: torch.dtype) -> str:
    return f"{'decode' if N <= FEW_ROWS else 'prefill'}/{width(dtype)}"


def run_shrink(
    x_ND: Tensor, gain_D: Tensor | None, lora_a: Sequence[Tensor | None], scales: Sequence[float], eps: float
) -> tuple[Tensor, Tensor]:
    """(rstd_N, u_NCR): the rows' statistic (where there is a norm) and s · n Aᵀ for each of C outputs."""
    N, D = x_ND.shape
    ranks = [0 if a is None else a.shape[0] for a in lora_a]
    most = max(*ranks, 1)
    rstd_N = x_ND.new_empty(N, dtype=torch.float32)
    u_NCR = x_ND.new_zeros(N, len(ranks), most)
    tiles = config("shrink", shape_class(N, x_ND.dtype))
    rank_tile = min(max(16, power_of_2(most)), tiles["MOST_RANK"])
    a, (a_row, a_col) = same_strides(lora_a, x_ND)
    R, s = three(ranks, 0), three(scales, 0.0)
    arguments = dict(
        x=x_ND, gain=x_ND if gain_D is None else gain_D, rstd=rstd_N, u=u_NCR, a0=a[0], a1=a[1], a2=a[2], N=N, D=D,
        R0=R[0], R1=R[1], R2=R[2], s0=s[0], s1=s[1], s2=s[2], x_row=x_ND.stride(0), a_row=a_row, a_col=a_col,
        u_row=u_NCR.stride(0), u_out=u_NCR.stride(1), eps=eps,
    )  # fmt: skip
    grid = (divide_up(N, tiles["BN"]), len(ranks), divide_up(most, rank_tile))
    meta = {k: v for k, v in tiles.items() if k != "MOST_RANK"}
    launch(_shrink, grid, arguments, NORM=gain_D is not None, OUTPUTS=len(ranks), RANK=rank_tile, **meta)
    return rstd_N, u_NCR


def run_outer(t_NR: Tensor, x_ND: Tensor, gain_D: Tensor | None = None, rstd_N: Tensor | None = None) -> Tensor:
    """tᵀ n as (R, D) fp32; n is x, or x normed where a gain is given."""
    (N, D), R = x_ND.shape, t_NR.shape[1]
    tiles = dict(config("outer", f"{'rank' if R <= 256 else 'weight'}/{width(x_ND.dtype)}"))
    splits = max(1, min(tiles.pop("SPLITS"), divide_up(N, tiles["BN"])))
    rank_tile = min(max(16, power_of_2(R)), tiles.pop("MOST_RANK"))
    out_SRD = x_ND.new_zeros(splits, R, D, dtype=torch.float32)
    arguments = dict(
        t=t_NR, x=x_ND, gain=x_ND if gain_D is None else gain_D, rstd=x_ND if rstd_N is None else rstd_N, out=out_SRD,
        N=N, D=D, R=R, t_row=t_NR.stride(0), x_row=x_ND.stride(0), SPLITS=splits,
    )  # fmt: skip
    grid = (divide_up(D, tiles["BD"]), divide_up(R, rank_tile), splits if N else 0)
    launch(_outer, grid, arguments, NORM=gain_D is not None, RANK=rank_tile, **tiles)
    return out_SRD.sum(0)
