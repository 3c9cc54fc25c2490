"""RMSNorm, alone and after a residual addition, forward and backward (arXiv 1910.07467).

    y = g · cast(x / √(mean(x²) + eps))          mean and root in fp32, the cast to x's dtype before g multiplies

Why a kernel: RMSNorm is memory-bound, with 4 operations per value. Eager PyTorch makes about six passes over memory
(upcast, square, mean, multiply, downcast, multiply) where one read and one write suffice: the kernel moves 2·N·D
values. One program takes one row and keeps it in registers between the statistic and the product.

Why the residual addition is fused: the next norm reads a block's h = x + attention(…) right after it is written. h must
be written, since it is needed later, but reading it back is saved: 4 passes over N·D values instead of 5.

Backward. With n = x·r, r = (mean(x²) + eps)^-½ and w = dy · g:

    dx = r · (w − n · mean(w · n))               row by row; r is saved by the forward pass
    dg = Σ_rows dy · cast(n)                     a sum over all rows

dg is summed in a fixed order: each of P programs takes rows p, p + P, p + 2P … and keeps its own fp32 sum of D values;
one reduction adds the P sums. Atomics would need less code, but give different bits on every run.

A row is one tile of the next power of two ≥ D, masked: D = 2049 costs a tile of 4096. Rows may have any stride; offsets
are 64-bit because N·D exceeds 2^31 at 524,288 tokens of width 4096.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.launch import card, config, jit, launch, power_of_2, rows, runs_here, tl

MAX_WIDTH = 65_536  # values of a row that fit one program's registers in the forward pass
MAX_BACKWARD_WIDTH = 8192  # three rows and a sum in registers; wider rows use autograd of the definition


def rms_norm_definition(x_ND: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    wide_ND = x_ND.to(torch.promote_types(x_ND.dtype, torch.float32))
    scaled_ND = wide_ND * torch.rsqrt(wide_ND.pow(2).mean(-1, keepdim=True) + eps)
    return weight_D * scaled_ND.to(x_ND.dtype)


def add_rms_norm_definition(x_ND: Tensor, residual_ND: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    sum_ND = x_ND + residual_ND
    return rms_norm_definition(sum_ND, weight_D, eps), sum_ND


@jit()
def _forward(x, residual, weight, y, total, rstd, x_row, r_row, D, eps, ADD: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK)
    inside = d < D
    value = tl.load(x + row * x_row + d, mask=inside, other=0.0)
    g = tl.load(weight + d, mask=inside, other=0.0)  # issued before the statistic needs x
    if ADD:
        other = tl.load(residual + row * r_row + d, mask=inside, other=0.0)
        value = (value.to(tl.float32) + other.to(tl.float32)).to(y.dtype.element_ty)
        tl.store(total + row * D + d, value, mask=inside)
    wide = value.to(tl.float32)
    r = 1.0 / tl.sqrt(tl.sum(wide * wide, axis=0) / D + eps)
    tl.store(rstd + row, r)
    n = (wide * r).to(y.dtype.element_ty)
    tl.store(y + row * D + d, n.to(tl.float32) * g.to(tl.float32), mask=inside)


@jit("N", "P")
def _backward(
    dy,
    dtotal,
    x,
    weight,
    rstd,
    dx,
    dg,
    dy_row,
    x_row,
    N,
    D,
    P,
    ADD: tl.constexpr,
    GAIN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    p = tl.program_id(0)
    d = tl.arange(0, BLOCK)
    inside = d < D
    sum_g = tl.zeros([BLOCK], tl.float32)
    for step in range(0, tl.cdiv(N - p, P)):
        row = (p + step * P).to(tl.int64)
        r = tl.load(rstd + row)
        n = tl.load(x + row * x_row + d, mask=inside, other=0.0).to(tl.float32) * r
        dy_row_d = tl.load(dy + row * dy_row + d, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(weight + d, mask=inside, other=0.0).to(tl.float32)  # reloaded from L1 each time to save registers
        w = dy_row_d * g
        grad = r * (w - n * (tl.sum(w * n, axis=0) / D))
        if ADD:
            grad += tl.load(dtotal + row * D + d, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx + row * D + d, grad, mask=inside)
        if GAIN:
            sum_g += dy_row_d * n.to(x.dtype.element_ty).to(tl.float32)
    if GAIN:
        tl.store(dg + p * D + d, sum_g, mask=inside)


def _config(x_ND: Tensor) -> dict[str, int]:
    D = x_ND.shape[1]
    return config("rms_norm", "narrow" if D <= 1024 else "wide" if D <= 8192 else "widest", x_ND.device)


def _run_forward(
    x_ND: Tensor, residual_ND: Tensor | None, weight_D: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    N, D = x_ND.shape
    y_ND = x_ND.new_empty(N, D)
    total_ND = x_ND.new_empty(N, D) if residual_ND is not None else x_ND
    rstd_N = x_ND.new_empty(N, dtype=torch.float32)
    other_ND = residual_ND if residual_ND is not None else x_ND
    arguments = dict(
        x=x_ND,
        residual=other_ND,
        weight=weight_D,
        y=y_ND,
        total=total_ND,
        rstd=rstd_N,
        x_row=x_ND.stride(0),
        r_row=other_ND.stride(0),
        D=D,
        eps=eps,
    )
    warps = _config(x_ND)["num_warps"]
    launch(_forward, (N,), arguments, ADD=residual_ND is not None, BLOCK=power_of_2(D), num_warps=warps)
    return y_ND, total_ND, rstd_N


def _run_backward(
    dy_ND: Tensor, dtotal_ND: Tensor | None, x_ND: Tensor, weight_D: Tensor, rstd_N: Tensor, gain: bool
) -> tuple[Tensor, Tensor | None]:
    """(dx_ND, dg_D or None) of `rms_norm` at x with 1/rms rstd_N; dtotal_ND, if given, is added to dx."""
    N, D = x_ND.shape
    tiles = _config(x_ND)
    programs = max(1, min(N, tiles["RESIDENT"] * card(x_ND.device)[1]))
    dx_ND = x_ND.new_empty(N, D)
    dg_PD = x_ND.new_zeros(programs, D, dtype=torch.float32) if gain else rstd_N
    arguments = dict(
        dy=dy_ND,
        dtotal=dtotal_ND if dtotal_ND is not None else dy_ND,
        x=x_ND,
        weight=weight_D,
        rstd=rstd_N,
        dx=dx_ND,
        dg=dg_PD,
        dy_row=dy_ND.stride(0),
        x_row=x_ND.stride(0),
        N=N,
        D=D,
        P=programs,
    )
    meta = dict(ADD=dtotal_ND is not None, GAIN=gain, BLOCK=power_of_2(D), num_warps=tiles["num_warps"])
    launch(_backward, (programs if N else 0,), arguments, **meta)
    return dx_ND, dg_PD.sum(0).to(weight_D.dtype) if gain else None


class _RMSNorm(torch.autograd.Function):
    """y, or (y, x + residual) with a residual."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor | None, weight_D: Tensor, eps: float) -> Any:
        y_ND, total_ND, rstd_N = _run_forward(
            rows(x), rows(residual) if residual is not None else None, weight_D.contiguous(), eps
        )
        ctx.save_for_backward(total_ND, weight_D, rstd_N)
        ctx.added = residual is not None
        return (y_ND.view(x.shape), total_ND.view(x.shape)) if ctx.added else y_ND.view(x.shape)

    @staticmethod
    def backward(ctx: Any, dy: Tensor, dtotal: Tensor | None = None) -> Any:
        total_ND, weight_D, rstd_N = ctx.saved_tensors
        gain = ctx.needs_input_grad[2]
        dtotal_ND = dtotal.reshape(total_ND.shape).contiguous() if dtotal is not None else None
        dx_ND, dg_D = _run_backward(rows(dy), dtotal_ND, total_ND, weight_D.contiguous(), rstd_N, gain)
        dx = dx_ND.view(dy.shape)
        return dx, dx if ctx.added else None, dg_D, None


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dimension: x (…, D) → (…, D) in x's dtype; weight_D of the same dtype.

    fp32, bf16 and fp16 run the kernel on CUDA; fp64, mixed dtypes and CPU tensors use the definition. Differentiable in
    x and weight. Source: arXiv 1910.07467; the cast is where Hugging Face's Llama and Mistral have it.
    """
    _check(x, weight_D)
    if _too_wide(x, weight_D) or not runs_here(x, weight_D):
        return rms_norm_definition(x, weight_D, eps)
    return _RMSNorm.apply(x, None, weight_D, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(rms_norm(x + residual), x + residual) in one pass: a residual addition and the next norm. Shapes and dtypes as
    in `rms_norm`; differentiable."""
    _check(x, weight_D)
    if x.shape != residual.shape:
        raise ValueError(f"x is {tuple(x.shape)} and the residual {tuple(residual.shape)}; they must agree")
    if _too_wide(x, weight_D, residual) or not runs_here(x, residual, weight_D):
        return add_rms_norm_definition(x, residual, weight_D, eps)
    return _RMSNorm.apply(x, residual, weight_D, eps)


def _too_wide(*tensors: Tensor) -> bool:
    needs_grad = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    return needs_grad and tensors[0].shape[-1] > MAX_BACKWARD_WIDTH


def _check(x: Tensor, weight_D: Tensor) -> None:
    if weight_D.dim() != 1 or x.shape[-1] != weight_D.shape[0]:
        raise ValueError(f"x is {tuple(x.shape)}, so the weight must be ({x.shape[-1]},), not {tuple(weight_D.shape)}")
    if x.shape[-1] > MAX_WIDTH:
        raise ValueError(f"x has rows of {x.shape[-1]} values; at most {MAX_WIDTH} are supported")
