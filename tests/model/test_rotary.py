"""Rotary positions: only distances count, long texts are stretched as each scaling says, phases are exact."""

import math

import pytest
import torch
from tiny_models import FAMILIES, raw_config

from model import ModelConfig
from model.checkpoints.mistral import to_halves, to_pairs
from model.rotary import RopeScaling, Rotary, Rotate, frequencies


def tables(family: str, positions: list[int], dtype=torch.float64, **changes):
    config = ModelConfig.from_dict(raw_config(family, **changes))
    rotary = Rotary(config.head_dim, config.rope_theta, config.rope_scaling, config.max_position_embeddings)
    return rotary(torch.tensor([positions]), dtype)


@pytest.mark.parametrize("family", FAMILIES)
def test_only_the_distance_counts(family):
    size = raw_config(family)["head_dim"]
    q, k = torch.randn(2, 1, 1, 1, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def score(i: int, j: int) -> float:
        rotated = [Rotate()(x, tables(family, [p], max_position_embeddings=64)) for x, p in ((q, i), (k, j))]
        return float((rotated[0] * rotated[1]).sum())

    assert score(9, 4) == pytest.approx(score(25, 20), rel=1e-12)
    assert score(9, 4) != pytest.approx(score(9, 5), rel=1e-6)


def test_each_pair_turns_by_its_angle():
    cos, sin = tables("mistral", [0, 5])
    angle = [5 * 1e4 ** (-2 * n / 6) for n in range(3)] * 2
    torch.testing.assert_close(cos[0, 1], torch.tensor(angle, dtype=torch.float64).cos(), rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(sin[0, 1], torch.tensor(angle, dtype=torch.float64).sin(), rtol=1e-14, atol=1e-14)
    assert torch.equal(cos[0, 0], torch.ones(6, dtype=torch.float64))


def test_phases_are_fp32_even_for_bf16_models():
    """At 4,096 positions a bf16 phase is off by turns; the table may only carry bf16's own rounding."""
    positions = list(range(4000, 4096))
    narrow, exact = tables("mistral", positions, torch.bfloat16)[0], tables("mistral", positions)[0]
    assert narrow.dtype == torch.bfloat16
    assert (narrow.double() - exact).abs().max() < 2**-8 + 1e-3


def test_halves_and_pairs_are_inverse_and_per_head():
    x = torch.arange(12.0)[:, None]  # two heads of size 6
    assert to_pairs(x, 6)[:, 0].tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]
    assert torch.equal(to_halves(to_pairs(x, 6), 6), x)
    assert not torch.equal(to_pairs(x, 6), to_pairs(x, 12))  # the wrong number of heads is another permutation


def test_linear_scaling_divides_positions():
    stretched, plain = tables("llama-linear", [10])[0], tables("llama", [5])[0]
    torch.testing.assert_close(stretched, plain, rtol=1e-14, atol=1e-14)


def test_dynamic_scaling_begins_past_the_trained_length():
    within = tables("llama-dynamic", list(range(12)))[0]
    assert torch.equal(within, tables("llama", list(range(12)))[0])
    beyond = tables("llama-dynamic", list(range(24)))[0]
    base = 1e4 * (3 * 24 / 12 - 2) ** (6 / 4)  # the paper's rule at twice the trained length
    torch.testing.assert_close(beyond[0, 23, 1], torch.tensor(23 * base ** (-2 / 6), dtype=torch.float64).cos())


def test_llama_3_keeps_short_waves_and_stretches_long_ones():
    rule = RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)
    scaled, gain = frequencies(128, 5e5, rule, torch.float64)
    plain, _ = frequencies(128, 5e5, None, torch.float64)
    wave, ratio = 2 * math.pi / plain, plain / scaled
    assert gain == 1
    assert bool((ratio[wave < 8192 / 4] == 1).all())
    torch.testing.assert_close(ratio[wave > 8192], torch.full_like(ratio[wave > 8192], 8))
    between = ratio[(wave > 8192 / 4) & (wave < 8192)]
    assert len(between) and bool((between.diff() > 0).all()) and 1 < between.min() and between.max() < 8


def test_yarn_gain_and_ends():
    rule = RopeScaling("yarn", 4.0, original_max_position_embeddings=4096)
    scaled, gain = frequencies(128, 1e4, rule, torch.float64)
    plain, _ = frequencies(128, 1e4, None, torch.float64)
    assert gain == pytest.approx(0.1 * math.log(4) + 1)
    assert plain[0] == scaled[0] and plain[-1] / scaled[-1] == pytest.approx(4)
