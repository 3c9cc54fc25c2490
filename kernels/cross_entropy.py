"""Fused output projection and cross-entropy: the logits of all tokens are never in memory at once.

    loss = Σ_n (log Σ_v exp(x_n · W_v) − x_n · W_target(n)) / count

For 4,096 tokens and a vocabulary of 32,000 the logits are 524 MB in fp32, and their gradient as much again. So the rows
are processed in chunks of a few hundred: `torch.mm` (cuBLAS) computes a chunk's logits; one kernel passes twice over
each row (a running maximum m and sum s of exp(l − m), rescaled by exp(m − m') for a new maximum m'; then softmax −
one-hot, written over the logits); two more `torch.mm` give the chunk's part of dx and dW.

The gradient is computed in the forward pass for an upstream gradient of 1, and scaled in the backward pass: the loss is
a scalar, so nothing is computed twice and no logits are kept. Without gradients the kernel's second pass is skipped.
Chunks are added in a fixed order: the same bits each run.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.launch import config, jit, launch, rows, runs_here, tl

MAX_LOGITS = 2**24  # in memory at once


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
    m_row = tl.max(m, axis=0)
    log_s = tl.log(tl.sum(s * tl.exp(m - m_row), axis=0))
    target_logit = tl.load(row + target, mask=target >= 0, other=0.0).to(tl.float32)
    # the maximum and the target's logit cancel first: adding log_s to either of them would round it
    tl.store(loss + n, w * (log_s + (m_row - target_logit)))
    if GRAD:
        for first in range(0, V, BLOCK):
            v = first + tl.arange(0, BLOCK)
            value = tl.load(row + v, mask=v < V, other=float("-inf")).to(tl.float32)
            grad = tl.exp((value - m_row) - log_s) - tl.where(v == target, 1.0, 0.0)
            tl.store(row + v, grad * w, mask=v < V)


class _LinearCrossEntropy(torch.autograd.Function):
    """Σ_n weight_N · loss_N; weight_N is 1 / the mean's divisor (or 1), and 0 for ignored rows."""

    @staticmethod
    def forward(
        ctx: Any, x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, weight_N: Tensor, max_logits: int
    ) -> Tensor:
        x_ND, weight_VD = rows(x_ND), rows(weight_VD)
        (N, D), V = x_ND.shape, weight_VD.shape[0]
        x_grad, w_grad = ctx.needs_input_grad[:2]
        loss_N = x_ND.new_zeros(N, dtype=torch.float32)
        dx_ND = torch.empty_like(x_ND) if x_grad else None
        dw_VD = weight_VD.new_zeros(V, D, dtype=torch.float32) if w_grad else None
        step = max(1, max_logits // V)
        for first in range(0, N, step):
            chunk = slice(first, min(first + step, N))
            logits_nV = torch.mm(x_ND[chunk], weight_VD.t())
            arguments = dict(
                logits=logits_nV,
                targets=targets_N[chunk],
                weight=weight_N[chunk],
                loss=loss_N[chunk],
                V=V,
                row_stride=V,
            )
            grid = (chunk.stop - chunk.start,)
            launch(_softmax_loss, grid, arguments, GRAD=x_grad or w_grad, **config("softmax", "any", x_ND.device))
            if dx_ND is not None:
                torch.mm(logits_nV, weight_VD, out=dx_ND[chunk])
            if dw_VD is not None:
                dw_VD += torch.mm(logits_nV.t(), x_ND[chunk])
        ctx.save_for_backward(dx_ND, dw_VD)
        ctx.dtype = weight_VD.dtype
        return loss_N.sum()

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor) -> Any:
        dx_ND, dw_VD = ctx.saved_tensors
        dx = None if dx_ND is None else dx_ND * d_loss.to(dx_ND.dtype)
        return dx, None if dw_VD is None else (dw_VD * d_loss).to(ctx.dtype), None, None, None


def linear_cross_entropy(
    x_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    ignore_index: int = -100,
    reduction: str = "mean",
    max_logits: int = MAX_LOGITS,
) -> Tensor:
    """Cross-entropy of the logits x Wᵀ with targets_N (int64): a scalar, fp32 (fp64 for fp64 inputs).

    x is (N, D), the weight (V, D). Rows whose target is `ignore_index` are ignored; "mean" divides by the number of the
    others (NaN if there are none, as in PyTorch). All other targets must lie in [0, V): ValueError on a CPU, unchecked
    on CUDA, where the check would synchronize. The kernel has at most `max_logits` logits in memory at once, or one
    row. Differentiable in x and the weight.
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction {reduction!r} must be 'mean' or 'sum'")
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
    masked_N = targets_N.masked_fill(~counted_N, -1).contiguous()  # −1 equals no column of the vocabulary
    return _LinearCrossEntropy.apply(x_ND, weight_VD, masked_N, weight_N, max_logits)
