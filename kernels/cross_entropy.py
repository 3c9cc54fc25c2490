"""The output matrix and the cross-entropy after it, without the logits ever being in memory.

    loss = Σ_n (log Σ_v exp(x_n · W_v) − x_n · W_target(n)) / count

For 4,096 tokens and 32,000 words the logits are 524 MB in fp32, and their gradient as much again, for a result of one
number. Forward, a program takes a tile of rows and a share of the vocabulary, computes logits tile by tile, and folds
each tile into a running (maximum m, sum s of exp(l − m)); a new maximum m' turns s into s · exp(m − m'). The shares'
pairs are then combined by the same rule. Logits stay fp32 from the product to the sum.

Backward, softmax is computed again from x, W and the saved m and log s, for one chunk of the vocabulary at a time:

    G = (exp(l − m − log s) − [v = target]) · dloss / count        (N, CHUNK), in x's dtype
    dx += G W_chunk       fp32, over all chunks in order         dW_chunk = Gᵀ x

so the most that exists at once is N · CHUNK values: 34 MB for the case above. The logits are computed twice, which adds
a third to the arithmetic of the three products; in exchange memory does not grow with the vocabulary. A chunk's
dW is complete when it is written, dx is added up in one order: no atomics, the same bits each run.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.launch import config, divide_up, jit, launch, rows, runs_here, tl, width
from kernels.linear import run_linear
from kernels.low_rank import run_outer


def linear_cross_entropy_definition(
    x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, ignore_index: int = -100, reduction: str = "mean"
) -> Tensor:
    logits_NV = F.linear(x_ND, weight_VD)
    logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
    return F.cross_entropy(logits_NV, targets_N, ignore_index=ignore_index, reduction=reduction)


@jit
def _logits(x, w, row, live, v, D, V, x_row, w_row, BN: tl.constexpr, BV: tl.constexpr, BD: tl.constexpr):
    """A tile of x Wᵀ in fp32; columns past the vocabulary are −inf."""
    logits = tl.zeros([BN, BV], tl.float32)
    in_v = v < V
    for start in range(0, D, BD):
        d = start + tl.arange(0, BD)
        x_at = x + row[:, None] * x_row + d[None, :]
        x_ND = tl.load(x_at, mask=live[:, None] & (d[None, :] < D), other=0.0)
        w_at = w + v[None, :].to(tl.int64) * w_row + d[:, None]
        w_DV = tl.load(w_at, mask=(d[:, None] < D) & in_v[None, :], other=0.0)
        logits = tl.dot(x_ND, w_DV, logits, input_precision="ieee")
    return tl.where(in_v[None, :], logits, float("-inf"))


@jit
def _forward(
    x, w, targets, largest, total, chosen, N, D, V, SHARE, x_row, w_row,
    BN: tl.constexpr, BV: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * BN + tl.arange(0, BN)).to(tl.int64)
    live = row < N
    split = tl.program_id(1)
    target = tl.load(targets + row, mask=live, other=-1)
    m = tl.full([BN], float("-inf"), tl.float32)
    s = tl.zeros([BN], tl.float32)
    found = tl.zeros([BN], tl.float32)
    for first in range(split * SHARE, min((split + 1) * SHARE, V), BV):
        v = first + tl.arange(0, BV)
        logits = _logits(x, w, row, live, v, D, V, x_row, w_row, BN, BV, BD)
        higher = tl.maximum(m, tl.max(logits, axis=1))
        s = s * tl.exp(m - higher) + tl.sum(tl.exp(logits - higher[:, None]), axis=1)
        m = higher
        found += tl.sum(tl.where(v[None, :] == target[:, None], logits, 0.0), axis=1)
    at = split * N + row
    tl.store(largest + at, m, mask=live)
    tl.store(total + at, s, mask=live)
    tl.store(chosen + at, found, mask=live)


@jit
def _gradient(
    x, w, targets, largest, log_total, upstream, out, N, D, V, first, x_row, w_row, out_row,
    BN: tl.constexpr, BV: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """out = (softmax − one-hot) · upstream for one chunk of the vocabulary, whose first word is `first` of `w`'s."""
    row = (tl.program_id(0) * BN + tl.arange(0, BN)).to(tl.int64)
    live = row < N
    v = tl.program_id(1) * BV + tl.arange(0, BV)
    logits = _logits(x, w, row, live, v, D, V, x_row, w_row, BN, BV, BD)
    target = tl.load(targets + row, mask=live, other=-1) - first
    m = tl.load(largest + row, mask=live, other=0.0)
    log_s = tl.load(log_total + row, mask=live, other=0.0)
    up = tl.load(upstream + row, mask=live, other=0.0)
    share = tl.exp((logits - m[:, None]) - log_s[:, None]) - tl.where(v[None, :] == target[:, None], 1.0, 0.0)
    tl.store(out + row[:, None] * out_row + v[None, :], share * up[:, None], mask=live[:, None] & (v[None, :] < V))


def _log_sums(x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(m, log Σ exp(l − m), the target's logit) of each row, (N,) fp32: m + log Σ would round away digits of both."""
    (N, D), V = x_ND.shape, weight_VD.shape[0]
    tiles = dict(config("cross_entropy", width(x_ND.dtype)))
    tiles.pop("CHUNK")
    share = divide_up(divide_up(V, tiles.pop("SPLITS")), tiles["BV"]) * tiles["BV"]
    splits = divide_up(V, share)
    largest_SN, total_SN, chosen_SN = (x_ND.new_empty(splits, N, dtype=torch.float32) for _ in range(3))
    arguments = dict(
        x=x_ND, w=weight_VD, targets=targets_N, largest=largest_SN, total=total_SN, chosen=chosen_SN, N=N, D=D, V=V,
        SHARE=share, x_row=x_ND.stride(0), w_row=weight_VD.stride(0),
    )  # fmt: skip
    launch(_forward, (divide_up(N, tiles["BN"]), splits), arguments, **tiles)
    largest_N = largest_SN.amax(0)
    total_N = (total_SN * (largest_SN - largest_N).exp()).sum(0)
    return largest_N, total_N.log(), chosen_SN.sum(0)


class _LinearCrossEntropy(torch.autograd.Function):
    """The sum over rows of weight_N · loss; weight_N carries the mean's divisor and leaves ignored rows out."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, weight_N: Tensor) -> Tensor:
        x_ND, weight_VD = rows(x_ND), rows(weight_VD)
        largest_N, log_total_N, chosen_N = _log_sums(x_ND, weight_VD, targets_N)
        ctx.save_for_backward(x_ND, weight_VD, targets_N, weight_N, largest_N, log_total_N)
        return ((log_total_N + (largest_N - chosen_N)) * weight_N).sum()

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor) -> Any:
        x_ND, weight_VD, targets_N, weight_N, largest_N, log_total_N = ctx.saved_tensors
        (N, D), V = x_ND.shape, weight_VD.shape[0]
        tiles = dict(config("cross_entropy", width(x_ND.dtype)))
        tiles.pop("SPLITS")
        chunk = tiles.pop("CHUNK")
        wants_x, wants_w = ctx.needs_input_grad[:2]
        dx_ND = x_ND.new_zeros(N, D, dtype=torch.float32)
        dw_VD = torch.empty_like(weight_VD) if wants_w else None
        upstream_N = (weight_N * d_loss).contiguous()
        for first in range(0, V, chunk):
            part_CD = weight_VD[first : first + chunk]
            C = part_CD.shape[0]
            g_NC = x_ND.new_empty(N, C)
            arguments = dict(
                x=x_ND, w=part_CD, targets=targets_N, largest=largest_N, log_total=log_total_N, upstream=upstream_N,
                out=g_NC, N=N, D=D, V=C, first=first, x_row=x_ND.stride(0), w_row=part_CD.stride(0),
                out_row=g_NC.stride(0),
            )  # fmt: skip
            launch(_gradient, (divide_up(N, tiles["BN"]), divide_up(C, tiles["BV"])), arguments, **tiles)
            if wants_x:
                run_linear(g_NC, [part_CD.t()], dx_ND, add=True)
            if dw_VD is not None:
                dw_VD[first : first + chunk] = run_outer(g_NC, x_ND).to(dw_VD.dtype)
        return dx_ND.to(x_ND.dtype) if wants_x else None, dw_VD, None, None


def linear_cross_entropy(
    x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, ignore_index: int = -100, reduction: str = "mean"
) -> Tensor:
    """Cross-entropy of the logits x Wᵀ against targets_N (int64): a scalar, fp32 (fp64 for fp64 inputs).

    x (N, D), weight (V, D). Rows whose target is `ignore_index` count for nothing; "mean" divides by the others (and is
    not a number when there are none, as in PyTorch), "sum" by one. Differentiable in x and the weight. Any other target
    must lie in [0, V): ValueError on a CPU, unchecked on CUDA, where the check would make the host wait.
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction is 'mean' or 'sum', not {reduction!r}")
    if x_ND.dim() != 2 or x_ND.shape[1] != weight_VD.shape[1] or targets_N.shape != x_ND.shape[:1]:
        raise ValueError(
            f"x {tuple(x_ND.shape)}, weight {tuple(weight_VD.shape)} and targets {tuple(targets_N.shape)} "
            "must be (N, D), (V, D) and (N,)"
        )
    counted_N = targets_N != ignore_index
    if x_ND.is_cpu and bool(((targets_N < 0) | (targets_N >= weight_VD.shape[0]))[counted_N].any()):
        raise ValueError(f"a target lies outside [0, {weight_VD.shape[0]}) and is not {ignore_index}")
    if not runs_here(x_ND, weight_VD):
        return linear_cross_entropy_definition(x_ND, weight_VD, targets_N, ignore_index, reduction)
    weight_N = counted_N.float()
    if reduction == "mean":
        weight_N = weight_N / weight_N.sum()
    # an ignored row looks for no word: −1 is never equal to a column
    wanted_N = targets_N.masked_fill(~counted_N, -1).contiguous()
    return _LinearCrossEntropy.apply(x_ND, weight_VD, wanted_N, weight_N)
