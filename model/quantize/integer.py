"""Int8 GEMM (w8a8): x · Wᵀ with one scale per row of x and per row of W.

    x[n, d] ≈ a[n, d] · s[n]     W[o, d] ≈ b[o, d] · t[o]     y[n, o] = (Σ_d a[n, d] · b[o, d]) · s[n] · t[o]

The sum is exact in int32 up to 133,000 terms, because |a|, |b| ≤ 127. Faster than floating point only if the hardware
multiplies int8 (`model.support.hardware.int8_products`).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def integer_linear(x_ND: Tensor, codes_OD: Tensor, scales_O: Tensor) -> Tensor:
    """x · Wᵀ in x's dtype, with x quantized to int8 per row."""
    a_ND, s_N1 = row_codes(x_ND)
    return integer_product(a_ND, codes_OD).to(torch.float32).mul_(scales_O).mul_(s_N1).to(x_ND.dtype)


def row_codes(x_ND: Tensor) -> tuple[Tensor, Tensor]:
    """(a_ND int8 in −127 … 127, s_N1 fp32) with |x − a · s| ≤ s / 2. A row with NaN gets s = NaN."""
    x_ND = x_ND.to(torch.float32)
    s_N1 = x_ND.abs().amax(dim=1, keepdim=True).div_(127).clamp_min_(1e-30)
    return (x_ND / s_N1).round_().to(torch.int8), s_N1


def integer_product(a_ND: Tensor, b_OD: Tensor) -> Tensor:
    """a · bᵀ of int8 matrices, exact in int32."""
    # torch 2.13 reads garbage if a dimension of size 1 has an unusual stride (pytorch 195066): copy those
    a_ND, b_OD = (matrix.flatten().view(matrix.shape) for matrix in (a_ND, b_OD))
    if a_ND.device.type == "cuda" or a_ND.shape[1] == 1:
        padded_a, padded_b = pad_for_int_mm(a_ND, b_OD)
        return torch._int_mm(padded_a, padded_b.t())[: len(a_ND), : len(b_OD)]
    return torch._int_mm(a_ND, b_OD.t())


def pad_for_int_mm(a_ND: Tensor, b_OD: Tensor) -> tuple[Tensor, Tensor]:
    """Pad with zeros as torch._int_mm requires on CUDA: more than 16 rows of a, D and O multiples of 8."""
    D = -a_ND.shape[1] % 8
    return pad(a_ND, max(0, 17 - len(a_ND)), D), pad(b_OD, -len(b_OD) % 8, D)


def pad(matrix: Tensor, rows: int, columns: int) -> Tensor:
    """`matrix` with rows and columns of zeros added; itself if there are none (F.pad would copy it)."""
    return F.pad(matrix, (0, columns, 0, rows)) if rows or columns else matrix
