"""Rotary position embedding (RoFormer, arXiv 2104.09864) in transformers' half-split layout.

Channels n and n + K/2 of a head form a pair, which is rotated by the angle position · θ^(−2n/K). Angles are computed in
fp32 (fp64 for an fp64 model): in bf16 they can be off by half a turn from position 1,024 on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class RopeScaling:
    """Scaling of rotary frequencies for long context. Field names are those of config.json's `rope_scaling`."""

    rope_type: str
    factor: float = 1.0
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_max_position_embeddings: int | None = None
    attention_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool | None = None


class Rotary(nn.Module):
    """Cosine and sine tables for given positions. Computed on the fly: a buffer would be lost on the meta device."""

    def __init__(self, head_dim: int, theta: float, scaling: RopeScaling | None, trained_length: int) -> None:
        super().__init__()
        self.head_dim, self.theta, self.scaling, self.trained_length = head_dim, theta, scaling, trained_length

    def forward(self, positions_BT: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(cos_BTK, sin_BTK) in `dtype`, computed in at least fp32."""
        wide = torch.promote_types(dtype, torch.float32)
        theta = self.theta
        if self.scaling is not None and self.scaling.rope_type == "dynamic":
            theta = dynamic_theta(theta, self.head_dim, self.scaling, self.trained_length, positions_BT)
        frequency, gain = frequencies(self.head_dim, theta, self.scaling, wide)
        angle_BTK2 = positions_BT[..., None].to(wide) * frequency.to(positions_BT.device)
        angle_BTK = torch.cat((angle_BTK2, angle_BTK2), dim=-1)
        return (angle_BTK.cos() * gain).to(dtype), (angle_BTK.sin() * gain).to(dtype)


class Rotate(nn.Module):
    """Rotate queries or keys by their positions' angles. A module, so that forward hooks can read its output."""

    def forward(self, x_BHTK: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        cos_B1TK, sin_B1TK = rotary[0].unsqueeze(1), rotary[1].unsqueeze(1)
        first, second = x_BHTK.chunk(2, dim=-1)
        return x_BHTK * cos_B1TK + torch.cat((-second, first), dim=-1) * sin_B1TK


def dynamic_theta(theta: float, size: int, scaling: RopeScaling, trained_length: int, positions_BT: Tensor) -> float:
    """Base of dynamic NTK scaling: θ up to the trained length, larger for longer sequences."""
    length = max(int(positions_BT.max()) + 1, trained_length)
    return theta * (scaling.factor * length / trained_length - (scaling.factor - 1)) ** (size / (size - 2))


def frequencies(size: int, theta: float, scaling: RopeScaling | None, dtype: torch.dtype) -> tuple[Tensor, float]:
    """(frequency_K2, gain): radians per position for each pair; factor on cos and sin (1 except for YaRN)."""
    frequency = 1.0 / (theta ** (torch.arange(0, size, 2, dtype=dtype) / size))
    if scaling is None or scaling.rope_type == "dynamic":
        return frequency, 1.0
    if scaling.rope_type == "linear":
        return frequency / scaling.factor, 1.0
    if scaling.rope_type == "llama3":
        return _llama3(frequency, scaling), 1.0
    return _yarn(size, theta, scaling, dtype)


def _llama3(frequency: Tensor, scaling: RopeScaling) -> Tensor:
    """Llama 3.1: divide low frequencies by `factor`, keep high ones, interpolate in between."""
    assert scaling.low_freq_factor and scaling.high_freq_factor and scaling.original_max_position_embeddings
    length, low, high = scaling.original_max_position_embeddings, scaling.low_freq_factor, scaling.high_freq_factor
    wavelength = 2 * math.pi / frequency
    scaled = torch.where(wavelength > length / low, frequency / scaling.factor, frequency)
    keep = (length / wavelength - low) / (high - low)
    blended = (1 - keep) * scaled / scaling.factor + keep * scaled
    between = ~(wavelength < length / high) & ~(wavelength > length / low)
    return torch.where(between, blended, scaled)


def _yarn(size: int, theta: float, scaling: RopeScaling, dtype: torch.dtype) -> tuple[Tensor, float]:
    """YaRN (arXiv 2309.00071): divide low frequencies by `factor`, keep high ones, ramp in between."""
    length, factor = scaling.original_max_position_embeddings, scaling.factor
    assert length is not None

    def pair_index(turns: float) -> float:  # of the pair that makes this many turns over the trained length
        return size * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair_index(scaling.beta_fast or 32), pair_index(scaling.beta_slow or 1)
    if scaling.truncate is None or scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    if low == high:
        high += 0.001
    ramp = torch.clamp((torch.arange(size // 2, dtype=dtype) - low) / (high - low), 0, 1)
    power = theta ** (torch.arange(0, size, 2).to(dtype) / size)
    keep = 1 - ramp
    frequency = 1.0 / (factor * power) * (1 - keep) + 1.0 / power * keep

    def gain(weight: float = 1.0) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if scaling.attention_factor is not None:
        return frequency, scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        return frequency, float(gain(scaling.mscale) / gain(scaling.mscale_all_dim))
    return frequency, gain()
