"""Products of 8-bit integers: x · Wᵀ with rows of x and rows of W as integers times one scale each.

    x[n, d] ≈ a[n, d] · s[n]     W[o, d] ≈ b[o, d] · t[o]     y[n, o] = (Σ_d a[n, d] · b[o, d]) · s[n] · t[o]

The sum is exact: |a|, |b| ≤ 127, so that int32 holds 133,000 terms. It pays where the processor multiplies such
integers (`model.support.hardware.int8_products`).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def integer_linear(x_ND: Tensor, codes_OD: Tensor, scales_O: Tensor) -> Tensor:
    """x · Wᵀ in x's dtype, x rounded to 8 bits a row."""
    a_ND, s_N1 = row_codes(x_ND)
    return integer_product(a_ND, codes_OD).to(torch.float32).mul_(scales_O).mul_(s_N1).to(x_ND.dtype)


def integer_backward(g_NO: Tensor, codes_DO: Tensor, scales_O: Tensor) -> Tensor:
    """g · W in g's dtype, g times W's scales rounded to 8 bits a row; `codes_DO` are W's, the other way round."""
    a_NO, s_N1 = row_codes(g_NO * scales_O)
    return integer_product(a_NO, codes_DO).to(torch.float32).mul_(s_N1).to(g_NO.dtype)


def row_codes(x_ND: Tensor) -> tuple[Tensor, Tensor]:
    """(a_ND int8 in −127 … 127, s_N1 fp32) with x ≈ a · s: off by at most half of s. A row with NaN has s = NaN."""
    x_ND = x_ND.to(torch.float32)
    s_N1 = x_ND.abs().amax(dim=1, keepdim=True).div_(127).clamp_min_(1e-30)
    return (x_ND / s_N1).round_().to(torch.int8), s_N1


def integer_product(a_ND: Tensor, b_OD: Tensor) -> Tensor:
    """a · bᵀ of int8 matrices, exact in int32."""
    # torch 2.13 reads garbage where a dimension of size 1 has another stride than a new matrix's (pytorch 195066)
    a_ND, b_OD = (matrix.flatten().view(matrix.shape) for matrix in (a_ND, b_OD))
    if a_ND.device.type == "cuda" or a_ND.shape[1] == 1:
        wide_a, wide_b = padded(a_ND, b_OD)
        return torch._int_mm(wide_a, wide_b.t())[: len(a_ND), : len(b_OD)]
    return torch._int_mm(a_ND, b_OD.t())


def padded(a_ND: Tensor, b_OD: Tensor) -> tuple[Tensor, Tensor]:
    """Both with zeros as torch._int_mm wants them on CUDA: more than 16 rows of a, D and O multiples of 8."""
    D = -a_ND.shape[1] % 8
    return F.pad(a_ND, (0, D, 0, max(0, 17 - len(a_ND)))), F.pad(b_OD, (0, D, 0, -len(b_OD) % 8))
