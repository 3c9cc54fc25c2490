"""The output matrix and the cross-entropy after it, without all logits ever being in memory.

    loss = Σ_n (log Σ_v exp(x_n · W_v) − x_n · W_target(n)) / count

For 4,096 tokens and 32,000 words the logits are 524 MB in fp32, and their gradient as much again, for a result of one
number. So the rows are taken a few hundred at a time: `torch.mm` (cuBLAS) makes their logits, one kernel walks over a
row twice (a running maximum m and sum s of exp(l − m), where a new maximum m' turns s into s · exp(m − m'); then
softmax − one-hot, written over the logits), and `torch.mm` twice more makes their part of dx and dW.

The gradient is made in the forward pass, for an upstream gradient of 1, and scaled in the backward pass: a loss is a
scalar at the end of a step, so nothing is computed twice and no logit is kept. Without gradients only the first walk
runs. Rows are added in one order: the same bits each run.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.launch import config, jit, launch, rows, runs_here, tl

CHUNK = 2**24  # logits that exist at once


def linear_cross_entropy_definition(
    x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, ignore_index: int = -100, reduction: str = "mean"
) -> Tensor:
    logits_NV = F.linear(x_ND, weight_VD)
    logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
    return F.cross_entropy(logits_NV, targets_N, ignore_index=ignore_index, reduction=reduction)


@jit()
def _softmax_loss(logits, targets, weight, loss, V, row_stride, GRAD: tl.constexpr, BLOCK: tl.constexpr):
    """loss[n] = weight[n] · (log Σ exp − target's logit); GRAD: logits become weight[n] · (softmax − one-hot)."""
    n = tl.program_id(0).to(tl.int64)
    row = logits + n * row_stride
    target = tl.load(targets + n)
    w = tl.load(weight + n)
    m = tl.full([BLOCK], float("-inf"), tl.float32)
    s = tl.zeros([BLOCK], tl.float32)
    for first in range(0, V, BLOCK):
        v = first + tl.arange(0, BLOCK)
        value = tl.load(row + v, mask=v < V, other=float("-inf")).to(tl.float32)
        m_new = tl.maximum(m, value)
        base = tl.where(m_new == float("-inf"), 0.0, m_new)
        s = s * tl.exp(m - base) + tl.exp(value - base)
        m = m_new
    top = tl.max(m, axis=0)
    log_s = tl.log(tl.sum(s * tl.exp(m - top), axis=0))
    chosen = tl.load(row + target, mask=target >= 0, other=0.0).to(tl.float32)
    # top + log s, added up first, would lose digits of both
    tl.store(loss + n, w * (log_s + (top - chosen)))
    if GRAD:
        for first in range(0, V, BLOCK):
            v = first + tl.arange(0, BLOCK)
            value = tl.load(row + v, mask=v < V, other=float("-inf")).to(tl.float32)
            share = tl.exp((value - top) - log_s) - tl.where(v == target, 1.0, 0.0)
            tl.store(row + v, share * w, mask=v < V)


class _LinearCrossEntropy(torch.autograd.Function):
    """The sum over rows of weight_N · loss; weight_N carries the mean's divisor and is 0 for ignored rows."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, weight_N: Tensor) -> Tensor:
        x_ND, weight_VD = rows(x_ND), rows(weight_VD)
        (N, D), V = x_ND.shape, weight_VD.shape[0]
        wants_x, wants_w = ctx.needs_input_grad[:2]
        loss_N = x_ND.new_zeros(N, dtype=torch.float32)
        dx_ND = torch.empty_like(x_ND) if wants_x else None
        dw_VD = weight_VD.new_zeros(V, D, dtype=torch.float32) if wants_w else None
        step = max(1, CHUNK // V)
        for first in range(0, N, step):
            some = slice(first, min(first + step, N))
            logits_nV = torch.mm(x_ND[some], weight_VD.t())
            arguments = dict(
                logits=logits_nV, targets=targets_N[some], weight=weight_N[some], loss=loss_N[some], V=V, row_stride=V
            )
            grid = (some.stop - some.start,)
            launch(_softmax_loss, grid, arguments, GRAD=wants_x or wants_w, **config("softmax", "any", x_ND.device))
            if dx_ND is not None:
                torch.mm(logits_nV, weight_VD, out=dx_ND[some])
            if dw_VD is not None:
                dw_VD += torch.mm(logits_nV.t(), x_ND[some])
        ctx.save_for_backward(dx_ND, dw_VD)
        ctx.dtype = weight_VD.dtype
        return loss_N.sum()

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor) -> Any:
        dx_ND, dw_VD = ctx.saved_tensors
        dx = None if dx_ND is None else dx_ND * d_loss.to(dx_ND.dtype)
        return dx, None if dw_VD is None else (dw_VD * d_loss).to(ctx.dtype), None, None


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
