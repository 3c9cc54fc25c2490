"""A linear layer with its LoRA adapter, and with the RMSNorm before it, as one kernel.

    n = cast(x / √(mean(x²) + eps)) · g            (or n = x)
    y = n Wᵀ + s · (n Aᵀ) Bᵀ + c                   A is (R, D), B is (O, R), arXiv 2106.09685

What is saved. The unfused sequence writes n and reads it back once per projection, writes and reads n Aᵀ, writes
s·(…)Bᵀ, reads it and y, and writes y again. Here n lives in registers: a tile of x is loaded, scaled, cast and
multiplied by its share of W before the next one arrives. `kernels/compiled.md` counts the bytes of both.

n cannot be factored out of the sum (Σ x·r·g·W = r·Σ x·g·W), because the plain path casts x·r to bf16 before g
multiplies, and we give its numbers. So r must be known before the first product: a program first runs over its rows
of x once for the statistic. Those rows come from L2 afterwards, since every column tile of the same rows wants them.

One launch or two. n Aᵀ is wanted by every column tile. Computed anew in each, it adds R/BO of the product's arithmetic,
and for few rows it adds reads of A from L2: R/BO of the bytes of W. Computed once by a first launch (`_shrink`, which
also leaves r for the backward pass), it costs a launch and another read of x. `RECOMPUTE` in configs.json is the
largest (padded) rank that is recomputed; kernels/README.md has the break-even.

Several outputs in one launch. q, k and v share n, so their column tiles share one grid; a program picks its weight by
its tile's number. Results are column slices of one buffer. Each output has its own adapter or none.

Backward, W and g frozen, t = s · dy B, u = s · n Aᵀ:

    dn = dy W + t A        the same kernel, with Wᵀ as the weight, Aᵀ as B, and t in place of u
    dA = tᵀ n              `_outer`: rank-sized sums over the rows, n computed again from x and r
    dB = dyᵀ u             `_outer` once more, with dy in place of n
    dx = RMSNorm's backward of dn

Sums over rows are split over programs whose partial sums are added in a fixed order: no atomics, the same bits each
run.
"""

# ruff: noqa: E741 - O is the output width

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.launch import config, divide_up, jit, launch, power_of_2, rows, runs_here, tl, width
from kernels.norm import rms_norm_backward, rms_norm_definition

FEW_ROWS = 16  # up to so many rows the product waits for the weights, beyond for the arithmetic
MOST_OUTPUTS = 3


def lora_linear_definition(
    x: Tensor,
    weight_OD: Tensor,
    lora_a_RD: Tensor | None,
    lora_b_OR: Tensor | None,
    scale: float,
    bias_O: Tensor | None = None,
) -> Tensor:
    y = F.linear(x, weight_OD, bias_O)
    if lora_a_RD is None or lora_b_OR is None:
        return y
    return y + scale * F.linear(F.linear(x, lora_a_RD), lora_b_OR)


def rms_norm_lora_linear_definition(
    x: Tensor, norm_weight_D: Tensor, weight_OD: Tensor, lora_a_RD: Tensor | None, lora_b_OR: Tensor | None,
    scale: float, eps: float, bias_O: Tensor | None = None,
) -> Tensor:  # fmt: skip
    n = rms_norm_definition(x, norm_weight_D, eps)
    return lora_linear_definition(n, weight_OD, lora_a_RD, lora_b_OR, scale, bias_O)


@jit
def _pick(which, first, second, third):
    chosen = first
    if which == 1:
        chosen = second
    if which == 2:
        chosen = third
    return chosen


@jit
def _statistic(x, row, live, D, x_row, eps, BN: tl.constexpr, BD: tl.constexpr):
    """1/√(mean(x²) + eps) of BN rows."""
    square = tl.zeros([BN, BD], tl.float32)
    for start in range(0, D, BD):
        d = start + tl.arange(0, BD)
        tile = tl.load(x + row[:, None] * x_row + d[None, :], mask=live[:, None] & (d[None, :] < D), other=0.0)
        square += tile.to(tl.float32) * tile.to(tl.float32)
    return 1.0 / tl.sqrt(tl.sum(square, axis=1) / D + eps)


@jit
def _rows_of(x, gain, r, row, live, start, D, x_row, NORM: tl.constexpr, BD: tl.constexpr):
    """A tile of n: rows × BD columns of x from `start`, normed, cast and scaled as the plain path does it."""
    d = start + tl.arange(0, BD)
    tile = tl.load(x + row[:, None] * x_row + d[None, :], mask=live[:, None] & (d[None, :] < D), other=0.0)
    if NORM:
        g = tl.load(gain + d, mask=d < D, other=0.0).to(tl.float32)
        normed = (tile.to(tl.float32) * r[:, None]).to(tile.dtype).to(tl.float32)
        tile = (normed * g[None, :]).to(tile.dtype)
    return tile


@jit
def _linear(
    x, gain, rstd, u, y, w0, w1, w2, a0, a1, a2, b0, b1, b2, c0, c1, c2,
    N, D, O0, O1, O2, R0, R1, R2, s0, s1, s2, x_row, w_row, w_col, a_row, b_row, b_col, u_row, u_out, y_row, eps,
    NORM: tl.constexpr, LORA: tl.constexpr, BIAS: tl.constexpr, ADD: tl.constexpr, OUTPUTS: tl.constexpr,
    RANK: tl.constexpr, BN: tl.constexpr, BO: tl.constexpr, BD: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """y = n Wᵀ (+ y where ADD). NORM "here": computes the statistic, "given": rstd. LORA "here": from A, "given": u."""
    # neighbouring programs share weights: GROUP row tiles go through a column tile before the next column tile
    row_tiles = tl.cdiv(N, BN)
    tiles0 = tl.cdiv(O0, BO)
    tiles1 = tl.cdiv(O1, BO) if OUTPUTS > 1 else 0
    tiles2 = tl.cdiv(O2, BO) if OUTPUTS > 2 else 0
    per_group = GROUP * (tiles0 + tiles1 + tiles2)
    group = tl.program_id(0) // per_group
    size = min(row_tiles - group * GROUP, GROUP)
    place = tl.program_id(0) % per_group
    row_tile = group * GROUP + place % size
    tile = place // size

    which, O, R, s, y_start = 0, O0, R0, s0, 0
    w, a, b, c = w0, a0, b0, c0
    if OUTPUTS > 1:
        which = (tile >= tiles0).to(tl.int32) + (tile >= tiles0 + tiles1).to(tl.int32)
        O, R, s = _pick(which, O0, O1, O2), _pick(which, R0, R1, R2), _pick(which, s0, s1, s2)
        w, a, b, c = (
            _pick(which, w0, w1, w2),
            _pick(which, a0, a1, a2),
            _pick(which, b0, b1, b2),
            _pick(which, c0, c1, c2),
        )
        tile -= _pick(which, 0, tiles0, tiles0 + tiles1)
        y_start = _pick(which, 0, O0, O0 + O1)

    row = (row_tile * BN + tl.arange(0, BN)).to(tl.int64)
    live = row < N
    o = tile * BO + tl.arange(0, BO)
    in_o = o < O
    rank = tl.arange(0, RANK)
    r = tl.zeros([BN], tl.float32)
    if NORM == "here":
        r = _statistic(x, row, live, D, x_row, eps, BN, BD)
    if NORM == "given":
        r = tl.load(rstd + row, mask=live, other=0.0)

    sum_y = tl.zeros([BN, BO], tl.float32)
    sum_u = tl.zeros([BN, RANK], tl.float32)
    for start in range(0, D, BD):
        d = start + tl.arange(0, BD)
        in_d = d < D
        n = _rows_of(x, gain, r, row, live, start, D, x_row, NORM != "no", BD)
        w_at = w + o[None, :].to(tl.int64) * w_row + d[:, None].to(tl.int64) * w_col
        w_DO = tl.load(w_at, mask=in_d[:, None] & in_o[None, :], other=0.0)
        sum_y = tl.dot(n, w_DO, sum_y, input_precision="ieee")
        if LORA == "here":
            a_at = a + rank[None, :] * a_row + d[:, None]
            a_DR = tl.load(a_at, mask=in_d[:, None] & (rank[None, :] < R), other=0.0)
            sum_u = tl.dot(n, a_DR, sum_u, input_precision="ieee")

    if LORA == "here":
        b_at = b + o[None, :].to(tl.int64) * b_row + rank[:, None] * b_col
        b_RO = tl.load(b_at, mask=in_o[None, :] & (rank[:, None] < R), other=0.0)
        sum_y = tl.dot((sum_u * s).to(b_RO.dtype), b_RO, sum_y, input_precision="ieee")
    if LORA == "given":
        for first in range(0, R, RANK):
            k = first + rank
            u_at = u + row[:, None] * u_row + which * u_out + k[None, :]
            u_NR = tl.load(u_at, mask=live[:, None] & (k[None, :] < R), other=0.0)
            b_at = b + o[None, :].to(tl.int64) * b_row + k[:, None].to(tl.int64) * b_col
            b_RO = tl.load(b_at, mask=in_o[None, :] & (k[:, None] < R), other=0.0)
            sum_y = tl.dot(u_NR, b_RO, sum_y, input_precision="ieee")
    if BIAS:
        sum_y += tl.load(c + o, mask=in_o, other=0.0).to(tl.float32)[None, :]
    y_at = y + row[:, None] * y_row + (y_start + o)[None, :]
    inside = live[:, None] & in_o[None, :]
    if ADD:
        sum_y += tl.load(y_at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_at, sum_y, mask=inside)


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
        R, s, a = _pick(which, R0, R1, R2), _pick(which, s0, s1, s2), _pick(which, a0, a1, a2)
    rank = tl.program_id(2) * RANK + tl.arange(0, RANK)
    r = tl.zeros([BN], tl.float32)
    if NORM:
        r = _statistic(x, row, live, D, x_row, eps, BN, BD)
        if which + tl.program_id(2) == 0:
            tl.store(rstd + row, r, mask=live)
    sum_u = tl.zeros([BN, RANK], tl.float32)
    for start in range(0, D, BD):
        d = start + tl.arange(0, BD)
        n = _rows_of(x, gain, r, row, live, start, D, x_row, NORM, BD)
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
        n = _rows_of(x, gain, r, row, live, start, D, x_row, NORM, BD)
        t_RN = tl.load(t + row[None, :] * t_row + rank[:, None], mask=live[None, :] & (rank[:, None] < R), other=0.0)
        total = tl.dot(t_RN, n, total, input_precision="ieee")
    out_at = out + (split * R + rank[:, None]).to(tl.int64) * D + d[None, :]
    tl.store(out_at, total, mask=(rank[:, None] < R) & (d[None, :] < D))


def _same_strides(tensors: Sequence[Tensor | None], stand_in: Tensor) -> tuple[list[Tensor], tuple[int, int]]:
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


def _three(values: Sequence[Any], empty: Any) -> list[Any]:
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
    a, (a_row, a_col) = _same_strides(lora_a, x_ND)
    R, s = _three(ranks, 0), _three(scales, 0.0)
    arguments = dict(
        x=x_ND, gain=x_ND if gain_D is None else gain_D, rstd=rstd_N, u=u_NCR, a0=a[0], a1=a[1], a2=a[2], N=N, D=D,
        R0=R[0], R1=R[1], R2=R[2], s0=s[0], s1=s[1], s2=s[2], x_row=x_ND.stride(0), a_row=a_row, a_col=a_col,
        u_row=u_NCR.stride(0), u_out=u_NCR.stride(1), eps=eps,
    )  # fmt: skip
    grid = (divide_up(N, tiles["BN"]), len(ranks), divide_up(most, rank_tile))
    meta = {k: v for k, v in tiles.items() if k != "MOST_RANK"}
    launch(_shrink, grid, arguments, NORM=gain_D is not None, OUTPUTS=len(ranks), RANK=rank_tile, **meta)
    return rstd_N, u_NCR


def run_linear(
    x_ND: Tensor, weights: Sequence[Tensor], y_NO: Tensor, *, gain_D: Tensor | None = None, eps: float = 0.0,
    rstd_N: Tensor | None = None, lora_a: Sequence[Tensor | None] = (), lora_b: Sequence[Tensor | None] = (),
    scales: Sequence[float] = (), u_NCR: Tensor | None = None, biases: Sequence[Tensor] = (), add: bool = False,
) -> None:  # fmt: skip
    """y (+)= n Wᵀ + u Bᵀ + c, where u comes from a first launch (u_NCR) or is computed along (lora_a)."""
    (N, D), count = x_ND.shape, len(weights)
    ranks = [0 if b is None else b.shape[1] for b in lora_b] or [0] * count
    tiles = dict(config("linear", shape_class(N, x_ND.dtype)))
    tiles.pop("RECOMPUTE")
    lora = "no" if max(ranks) == 0 else "here" if u_NCR is None else "given"
    rank_tile = max(16, power_of_2(max(ranks)))
    rank_tile = min(rank_tile, tiles["MOST_RANK"]) if lora == "given" else rank_tile
    tiles.pop("MOST_RANK")
    w, (w_row, w_col) = _same_strides(weights, x_ND)
    a, (a_row, _) = _same_strides(lora_a if lora == "here" else [None] * count, x_ND)
    b, (b_row, b_col) = _same_strides(lora_b or [None] * count, x_ND)
    c = _three([t.contiguous() for t in biases], None) if biases else [x_ND] * MOST_OUTPUTS
    c = [c[0] if t is None else t for t in c]
    O, R, s = (
        _three([t.shape[0] for t in weights], 0), _three(ranks, 0), _three(scales or [0.0] * count, 0.0)
    )  # fmt: skip
    u = x_ND if u_NCR is None or lora == "no" else u_NCR
    arguments = dict(
        x=x_ND, gain=x_ND if gain_D is None else gain_D, rstd=x_ND if rstd_N is None else rstd_N, u=u, y=y_NO,
        w0=w[0], w1=w[1], w2=w[2], a0=a[0], a1=a[1], a2=a[2], b0=b[0], b1=b[1], b2=b[2], c0=c[0], c1=c[1], c2=c[2],
        N=N, D=D, O0=O[0], O1=O[1], O2=O[2], R0=R[0], R1=R[1], R2=R[2], s0=s[0], s1=s[1], s2=s[2],
        x_row=x_ND.stride(0), w_row=w_row, w_col=w_col, a_row=a_row, b_row=b_row, b_col=b_col,
        u_row=u.stride(0), u_out=u.stride(1), y_row=y_NO.stride(0), eps=eps,
    )  # fmt: skip
    grid = (divide_up(N, tiles["BN"]) * sum(divide_up(n, tiles["BO"]) for n in O),)
    norm = "no" if gain_D is None else "here" if rstd_N is None else "given"
    launch(
        _linear, grid, arguments, NORM=norm, LORA=lora, BIAS=bool(biases), ADD=add, OUTPUTS=count, RANK=rank_tile,
        **tiles,
    )  # fmt: skip


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


class _Linear(torch.autograd.Function):
    """tensors: the outputs' weights, then A, then B, then biases (None where there is none); a y for each output."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gain_D: Tensor | None, eps: float, scales: Sequence[float], *tensors: Tensor | None
    ) -> Any:
        count = len(scales)
        weights, lora_a, lora_b, biases = (tensors[i * count : (i + 1) * count] for i in range(4))
        x_ND = rows(x)
        sizes = [w.shape[0] for w in weights]
        y_NO = x_ND.new_empty(x_ND.shape[0], sum(sizes))
        ranks = [0 if a is None else a.shape[0] for a in lora_a]
        limit = config("linear", shape_class(x_ND.shape[0], x_ND.dtype))["RECOMPUTE"]
        rstd_N = u_NCR = None
        wants_gradient = any(ctx.needs_input_grad)
        if wants_gradient or (max(ranks) and max(16, power_of_2(max(ranks))) > limit):
            rstd_N, u_NCR = run_shrink(x_ND, gain_D, lora_a, scales, eps)
        present = [c for c in biases if c is not None]
        run_linear(
            x_ND, weights, y_NO, gain_D=gain_D, eps=eps, rstd_N=rstd_N if gain_D is not None else None, lora_a=lora_a,
            lora_b=lora_b, scales=scales, u_NCR=u_NCR, biases=present,
        )  # fmt: skip
        ctx.save_for_backward(x, gain_D, rstd_N, u_NCR, *tensors)
        ctx.scales = scales
        outs = tuple(y.unflatten(0, x.shape[:-1]) if x.dim() != 2 else y for y in y_NO.split(sizes, dim=1))
        return outs if count > 1 else outs[0]

    @staticmethod
    def backward(ctx: Any, *dys: Tensor | None) -> Any:
        x, gain_D, rstd_N, u_NCR, *tensors = ctx.saved_tensors
        scales, count = ctx.scales, len(ctx.scales)
        weights, lora_a, lora_b, biases = (tensors[i * count : (i + 1) * count] for i in range(4))
        x_ND = rows(x)
        wants_x, wants_gain = ctx.needs_input_grad[:2]
        dn_ND = x_ND.new_zeros(x_ND.shape, dtype=torch.float32)
        grads: list[list[Tensor | None]] = [[None] * count for _ in range(4)]
        for i, dy in enumerate(dys):
            if dy is None:
                continue
            dy_NO, a, b = rows(dy), lora_a[i], lora_b[i]
            t_N1R = None
            if a is not None and b is not None:
                t_N1R = run_shrink(dy_NO, None, [b.t()], [scales[i]], 0.0)[1]
                grads[1][i] = run_outer(t_N1R[:, 0], x_ND, gain_D, rstd_N).to(a.dtype)
                grads[2][i] = run_outer(u_NCR[:, i, : b.shape[1]], dy_NO).t().to(b.dtype)
            if wants_x or wants_gain:
                a_DR = None if a is None else a.t()
                run_linear(dy_NO, [weights[i].t()], dn_ND, lora_b=[a_DR], u_NCR=t_N1R, add=True)
            if biases[i] is not None:
                grads[3][i] = dy_NO.sum(0, dtype=torch.float32).to(biases[i].dtype)
        flat = [g for group in grads for g in group]
        if gain_D is None:
            return dn_ND.to(x.dtype).view(x.shape) if wants_x else None, None, None, None, *flat
        dx_ND, d_gain_D = rms_norm_backward(dn_ND, None, x_ND, gain_D, rstd_N, wants_gain)
        return dx_ND.view(x.shape), d_gain_D, None, None, *flat


def _apply(
    x: Tensor, gain_D: Tensor | None, eps: float, weight: Any, lora_a: Any, lora_b: Any, scale: Any, bias: Any
) -> Any:
    """The kernel for one output or several, or the definition where there is no kernel for these tensors."""
    several = not isinstance(weight, Tensor)
    weights = list(weight) if several else [weight]
    count = len(weights)
    as_list = lambda v: list(v) if several and isinstance(v, (list, tuple)) else [v] * count  # noqa: E731
    lora_a, lora_b, scales, biases = as_list(lora_a), as_list(lora_b), [float(s) for s in as_list(scale)], as_list(bias)
    for w, a, b in zip(weights, lora_a, lora_b, strict=True):
        _check(x, w, a, b)
    if torch.is_grad_enabled() and any(w.requires_grad for w in weights):
        raise ValueError("the weight is frozen here: detach it, or use torch's own linear to train it")
    some_biases = any(c is not None for c in biases)
    if some_biases:
        biases = [w.new_zeros(w.shape[0]) if c is None else c for w, c in zip(weights, biases, strict=True)]
    tensors = (*weights, *lora_a, *lora_b, *biases)
    if count > MOST_OUTPUTS or not runs_here(x, gain_D, *tensors):
        n = x if gain_D is None else rms_norm_definition(x, gain_D, eps)
        parts = zip(weights, lora_a, lora_b, scales, biases, strict=True)
        outs = tuple(lora_linear_definition(n, w, a, b, s, c) for w, a, b, s, c in parts)
        return outs if several else outs[0]
    outs = _Linear.apply(x, gain_D, eps, scales, *tensors)
    return (outs if count > 1 else (outs,)) if several else outs


def _check(x: Tensor, weight_OD: Tensor, lora_a_RD: Tensor | None, lora_b_OR: Tensor | None) -> None:
    O, D = weight_OD.shape
    if x.shape[-1] != D:
        raise ValueError(f"x is {tuple(x.shape)} and the weight {tuple(weight_OD.shape)}: their last sizes must agree")
    if (lora_a_RD is None) != (lora_b_OR is None):
        raise ValueError("an adapter has both lora_a and lora_b, or neither")
    if lora_a_RD is not None and lora_b_OR is not None:
        R = lora_a_RD.shape[0]
        if lora_a_RD.shape != (R, D) or lora_b_OR.shape != (O, R):
            raise ValueError(
                f"lora_a {tuple(lora_a_RD.shape)} and lora_b {tuple(lora_b_OR.shape)} do not fit a weight of "
                f"{tuple(weight_OD.shape)}: they must be (R, {D}) and ({O}, R)"
            )


def lora_linear(
    x: Tensor, weight: Tensor | Sequence[Tensor], lora_a: Any = None, lora_b: Any = None, scale: Any = 1.0,
    bias: Any = None,
) -> Any:  # fmt: skip
    """x Wᵀ + scale · (x Aᵀ) Bᵀ + bias: x (…, D), weight (O, D), lora_a (R, D), lora_b (O, R) → (…, O) in x's dtype.

    With a list of up to three weights (and lists of the rest; None: no adapter) all outputs come from one launch, as a
    tuple. Differentiable in x, lora_a, lora_b and bias; the weight is frozen. Source: arXiv 2106.09685.
    """
    return _apply(x, None, 0.0, weight, lora_a, lora_b, scale, bias)


def rms_norm_lora_linear(
    x: Tensor, norm_weight_D: Tensor, weight: Tensor | Sequence[Tensor], lora_a: Any, lora_b: Any, scale: Any,
    eps: float, bias: Any = None,
) -> Any:  # fmt: skip
    """lora_linear(rms_norm(x, norm_weight_D, eps), …) without the normed rows ever being written to memory.

    Shapes as in `lora_linear`; lora_a and lora_b may be None. Differentiable in x, norm_weight, lora_a, lora_b, bias.
    """
    if norm_weight_D.shape != x.shape[-1:]:
        raise ValueError(f"x is {tuple(x.shape)}, so the norm's weight must be ({x.shape[-1]},)")
    return _apply(x, norm_weight_D, eps, weight, lora_a, lora_b, scale, bias)
