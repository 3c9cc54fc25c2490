"""Blockwise quantization to 8 or 4 bits with one scale per block, bit for bit as in bitsandbytes.

A block's values are divided by their largest magnitude (absmax), and each is stored as the index of the nearest entry
of a table. `dynamic_table` has few entries near 1 and many near 0 (arXiv 2110.02861); `NF4` holds quantiles of the
normal distribution (arXiv 2305.14314). Double quantization stores NF4's scales, minus their mean, in 8-bit blocks.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
# bitsandbytes' decision boundaries: rounded midpoints of the table
NF4_EDGES = (
    -0.8480964004993439,
    -0.6106329262256622,
    -0.4599952697753906,
    -0.33967943489551544,
    -0.23460740596055984,
    -0.13791173696517944,
    -0.045525018125772475,
    0.03979014977812767,
    0.1202552504837513,
    0.2035212516784668,
    0.2920137718319893,
    0.3893125355243683,
    0.5016634166240692,
    0.6427869200706482,
    0.8614784181118011,
)


def dynamic_table(signed: bool = True) -> Tensor:
    """The 256 entries of 8-bit dynamic quantization, ascending."""
    entries = [0.0, 1.0]
    for exponent in range(7):
        count = 2**exponent + 1 if signed else 2 ** (exponent + 1) + 1
        edges = torch.linspace(0.1, 1, count, dtype=torch.float32)
        means = 10.0 ** (exponent - 6) * ((edges[:-1] + edges[1:]) / 2.0)
        entries += means.tolist() + ((-means).tolist() if signed else [])
    return torch.tensor(sorted(entries), dtype=torch.float32)


def to_blocks(x: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """(values divided by their block's absmax, one block per row; absmax of each block), both fp32."""
    flat = x.detach().flatten().to(torch.float32)
    padded = F.pad(flat, (0, -len(flat) % block)).view(-1, block)
    absmax = padded.abs().amax(dim=1)
    return padded * (1.0 / absmax.clamp_min(1e-38))[:, None], absmax


def quantize(x: Tensor, table: Tensor, block: int, grid: bool = False) -> tuple[Tensor, Tensor]:
    """(uint8 indices into the ascending table, flat; absmax of each block in fp32).

    `grid` rounds to multiples of 1/32767 first, as bitsandbytes does on a CPU, to be bit-identical to it.
    """
    normed, absmax = to_blocks(x, block)
    if grid:
        normed = torch.floor((normed + 1) * 0.5 * 65535 + 0.5) / 65535 * 2 - 1
    edges = (table[1:] + table[:-1]) / 2
    return torch.bucketize(normed.flatten()[: x.numel()], edges.to(x.device)).to(torch.uint8), absmax


def dequantize(codes: Tensor, absmax: Tensor, table: Tensor, block: int) -> Tensor:
    """The inverse of `quantize`: flat fp32 values."""
    padded = F.pad(table.to(codes.device)[codes.int()], (0, -len(codes) % block)).view(-1, block)
    return (padded * absmax[:, None]).flatten()[: len(codes)]


def nf4_codes(weight: Tensor, block: int = 64) -> tuple[Tensor, Tensor]:
    """(two codes per byte, the first in the high half; absmax of each block in fp32)."""
    normed, absmax = to_blocks(weight, block)
    edges = torch.tensor(NF4_EDGES, device=weight.device)
    codes = torch.bucketize(normed.flatten()[: weight.numel()], edges).to(torch.uint8)
    codes = F.pad(codes, (0, len(codes) % 2))
    return (codes[::2] << 4) | codes[1::2], absmax


def quantize_scales(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Double quantization: (8-bit codes of the scales minus their mean, the codes' absmax, the mean)."""
    offset = absmax.mean()
    return *quantize(absmax - offset, dynamic_table(), 256, grid=True), offset


def dequantize_scales(codes: Tensor, absmax: Tensor, offset: Tensor) -> Tensor:
    """The inverse of `quantize_scales`: fp32 scales."""
    return dequantize(codes, absmax, dynamic_table(), 256) + offset
