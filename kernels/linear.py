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

from kernels.launch import config, divide_up, jit, launch, power_of_2, rows, runs_here, tl
from kernels.low_rank import (
    MOST_OUTPUTS,
    pick,
    run_outer,
    run_shrink,
    same_strides,
    shape_class,
    statistic,
    three,
    tile_of_rows,
)
from kernels.norm import rms_norm_backward, rms_norm_definition


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
def _place(rows, columns, GROUP: tl.constexpr):
    """(row tile, column tile) of this program. Neighbouring programs share weights: GROUP row tiles go through a column
    tile before the next column tile."""
    group = tl.program_id(0) // (GROUP * columns)
    place = tl.program_id(0) % (GROUP * columns)
    size = min(rows - group * GROUP, GROUP)
    return group * GROUP + place % size, place // size


@jit
def _across(matrix, o, k, o_stride, k_stride, O, K):
    """A tile of a matrix (O, K), K down and O across, as the products want it; zeros outside."""
    at = matrix + o[None, :].to(tl.int64) * o_stride + k[:, None].to(tl.int64) * k_stride
    return tl.load(at, mask=(k[:, None] < K) & (o[None, :] < O), other=0.0)


@jit
def _linear(
    x, gain, rstd, u, y, w0, w1, w2, a0, a1, a2, b0, b1, b2, c0, c1, c2,
    N, D, O0, O1, O2, R0, R1, R2, s0, s1, s2, x_row, w_row, w_col, a_row, a_col, b_row, b_col, u_row, u_out, y_row, eps,
    NORM: tl.constexpr, LORA: tl.constexpr, BIAS: tl.constexpr, ADD: tl.constexpr, OUTPUTS: tl.constexpr,
    RANK: tl.constexpr, BN: tl.constexpr, BO: tl.constexpr, BD: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """y = n Wᵀ (+ y where ADD). NORM "here": computes the statistic, "given": rstd. LORA "here": from A, "given": u."""
    tiles0 = tl.cdiv(O0, BO)
    tiles1 = tl.cdiv(O1, BO) if OUTPUTS > 1 else 0
    tiles2 = tl.cdiv(O2, BO) if OUTPUTS > 2 else 0
    row_tile, tile = _place(tl.cdiv(N, BN), tiles0 + tiles1 + tiles2, GROUP)

    which, O, R, s, y_start = 0, O0, R0, s0, 0
    w, a, b, c = w0, a0, b0, c0
    if OUTPUTS > 1:
        which = (tile >= tiles0).to(tl.int32) + (tile >= tiles0 + tiles1).to(tl.int32)
        O, R, s = pick(which, O0, O1, O2), pick(which, R0, R1, R2), pick(which, s0, s1, s2)
        w, a = pick(which, w0, w1, w2), pick(which, a0, a1, a2)
        b, c = pick(which, b0, b1, b2), pick(which, c0, c1, c2)
        tile -= pick(which, 0, tiles0, tiles0 + tiles1)
        y_start = pick(which, 0, O0, O0 + O1)

    row = (row_tile * BN + tl.arange(0, BN)).to(tl.int64)
    live = row < N
    o = tile * BO + tl.arange(0, BO)
    rank = tl.arange(0, RANK)
    r = tl.zeros([BN], tl.float32)
    if NORM == "here":
        r = statistic(x, row, live, D, x_row, eps, BN, BD)
    if NORM == "given":
        r = tl.load(rstd + row, mask=live, other=0.0)

    sum_y = tl.zeros([BN, BO], tl.float32)
    sum_u = tl.zeros([BN, RANK], tl.float32)
    for start in range(0, D, BD):
        d = start + tl.arange(0, BD)
        n = tile_of_rows(x, gain, r, row, live, start, D, x_row, NORM != "no", BD)
        sum_y = tl.dot(n, _across(w, o, d, w_row, w_col, O, D), sum_y, input_precision="ieee")
        if LORA == "here":
            sum_u = tl.dot(n, _across(a, rank, d, a_row, a_col, R, D), sum_u, input_precision="ieee")

    if LORA == "here":
        b_RO = _across(b, o, rank, b_row, b_col, O, R)
        sum_y = tl.dot((sum_u * s).to(b_RO.dtype), b_RO, sum_y, input_precision="ieee")
    if LORA == "given":
        for first in range(0, R, RANK):
            k = first + rank
            u_at = u + row[:, None] * u_row + which * u_out + k[None, :]
            u_NR = tl.load(u_at, mask=live[:, None] & (k[None, :] < R), other=0.0)
            sum_y = tl.dot(u_NR, _across(b, o, k, b_row, b_col, O, R), sum_y, input_precision="ieee")
    if BIAS:
        sum_y += tl.load(c + o, mask=o < O, other=0.0).to(tl.float32)[None, :]
    y_at = y + row[:, None] * y_row + (y_start + o)[None, :]
    inside = live[:, None] & (o < O)[None, :]
    if ADD:
        sum_y += tl.load(y_at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_at, sum_y, mask=inside)


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
    w, (w_row, w_col) = same_strides(weights, x_ND)
    a, (a_row, a_col) = same_strides(lora_a if lora == "here" else [None] * count, x_ND)
    b, (b_row, b_col) = same_strides(lora_b or [None] * count, x_ND)
    c = three([t.contiguous() for t in biases], None) if biases else [x_ND] * MOST_OUTPUTS
    c = [c[0] if t is None else t for t in c]
    O, R, s = (
        three([t.shape[0] for t in weights], 0), three(ranks, 0), three(scales or [0.0] * count, 0.0)
    )  # fmt: skip
    u = x_ND if u_NCR is None or lora == "no" else u_NCR
    arguments = dict(
        x=x_ND, gain=x_ND if gain_D is None else gain_D, rstd=x_ND if rstd_N is None else rstd_N, u=u, y=y_NO,
        w0=w[0], w1=w[1], w2=w[2], a0=a[0], a1=a[1], a2=a[2], b0=b[0], b1=b[1], b2=b[2], c0=c[0], c1=c[1], c2=c[2],
        N=N, D=D, O0=O[0], O1=O[1], O2=O[2], R0=R[0], R1=R[1], R2=R[2], s0=s[0], s1=s[1], s2=s[2],
        x_row=x_ND.stride(0), w_row=w_row, w_col=w_col, a_row=a_row, a_col=a_col, b_row=b_row, b_col=b_col,
        u_row=u.stride(0), u_out=u.stride(1), y_row=y_NO.stride(0), eps=eps,
    )  # fmt: skip
    grid = (divide_up(N, tiles["BN"]) * sum(divide_up(n, tiles["BO"]) for n in O),)
    norm = "no" if gain_D is None else "here" if rstd_N is None else "given"
    launch(
        _linear, grid, arguments, NORM=norm, LORA=lora, BIAS=bool(biases), ADD=add, OUTPUTS=count, RANK=rank_tile,
        **tiles,
    )  # fmt: skip


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
