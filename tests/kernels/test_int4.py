"""int4 weights: repacking keeps every value, and the kernel is as accurate as dequantizing first."""

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from kernels import launch
from kernels.int4 import int4_linear, repack_int4
from kernels.linear import rms_norm_lora_linear_definition
from model.quantize.linear import QuantizedWeight

EPS = 1e-5


def quantized(O, D, group, seed=0):
    """(model/quantize's int4 weight, the weight in fp64)."""
    wide = torch.randn(O, D, generator=torch.Generator().manual_seed(seed + O + D)) * D**-0.5
    held = QuantizedWeight.quantize([wide], (O, D), f"int4-{group}")
    assert held.kind == "int4" and held.group == group
    return held, held.dequantize(torch.float64)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 70), st.sampled_from([32, 64, 128]), st.integers(1, 3))
def test_repacking_keeps_every_weight(size, group, groups):
    D = groups * max(group, 64)
    held, wide = quantized(size, D, group)
    weight = repack_int4(held.codes, held.scales)
    assert (weight.shape, weight.group) == ((size, D), group)
    assert torch.equal(weight.dequantize(torch.float64), wide)


def test_every_code_becomes_the_bf16_number_1_plus_q_over_16():
    """The shifts, mask and constant of int4.py's `_plane`, over all 16-bit words."""
    words = torch.arange(2**16, dtype=torch.int32)
    for i, shifted in enumerate((words << 3, words >> 1, words >> 5, words >> 9)):
        numbers = ((shifted & 0x78) | 0x3F80).to(torch.int16).view(torch.bfloat16)
        assert torch.equal(numbers.float(), 1 + (words >> 4 * i & 15) / 16)


def bf16(generator, *shape, std=1.0):
    return (torch.randn(*shape, generator=generator) * std).bfloat16()


@settings(max_examples=25, deadline=None, derandomize=True, phases=[Phase.generate])
@given(
    st.sampled_from([1, 5, 16, 17, 65]),
    st.sampled_from([1, 3, 6]),
    st.sampled_from([32, 64, 128]),
    st.lists(st.sampled_from([24, 33, 130]), min_size=1, max_size=3),
    st.sampled_from([0, 1, 8, 48]),
    st.booleans(),
    st.booleans(),
)
def test_int4_is_as_good_as_dequantizing_first(device, as_good_as, N, groups, group, sizes, R, normed, bias):
    D = groups * max(group, 64)
    parts = [quantized(size, D, group, seed) for seed, size in enumerate(sizes)]
    weights = [repack_int4(held.codes.to(device), held.scales.to(device)) for held, _ in parts]
    g = torch.Generator().manual_seed(N + D + R)
    x, gain = bf16(g, N, D).to(device), 1 + bf16(g, D, std=0.2).to(device)
    a = [bf16(g, R, D, std=D**-0.5).to(device) if R else None for _ in sizes]
    b = [bf16(g, size, R).to(device) if R else None for size in sizes]
    c = [bf16(g, size).to(device) if bias else None for size in sizes]

    def plain(dtype):
        cast = lambda t: None if t is None else t.to(dtype)  # noqa: E731
        outs = []
        for held, own_a, own_b, own_c in zip(weights, a, b, c, strict=True):
            n, w = cast(x), held.dequantize(dtype)
            given = (w, cast(own_a), cast(own_b), 0.5)
            if normed:
                outs.append(rms_norm_lora_linear_definition(n, cast(gain), *given, EPS, cast(own_c)))
            else:
                y = n @ w.t() if own_c is None else n @ w.t() + cast(own_c)
                outs.append(y if own_a is None else y + 0.5 * (n @ cast(own_a).t()) @ cast(own_b).t())
        return torch.cat(outs, dim=1)

    launch.used_configs.clear()
    mine = torch.cat(int4_linear(x, weights, a, b, 0.5, c, norm=(gain, EPS) if normed else None), dim=1)
    ran = ("int4", str(weights[0].words.shape[2] * 4)) in launch.used_configs
    assert ran == (N <= 64)
    as_good_as(mine, plain(torch.bfloat16), plain(torch.float64))


def test_gate_up_and_residual(device, as_good_as):
    g = torch.Generator().manual_seed(3)
    parts = [quantized(70, 256, 64, seed) for seed in range(2)]
    weights = [repack_int4(held.codes.to(device), held.scales.to(device)) for held, _ in parts]
    x, gain, residual = bf16(g, 4, 256).to(device), 1 + bf16(g, 256, std=0.2).to(device), bf16(g, 4, 70).to(device)

    def plain(dtype):
        gate, up = (
            rms_norm_lora_linear_definition(x.to(dtype), gain.to(dtype), w.dequantize(dtype), None, None, 1.0, EPS)
            for w in weights
        )
        return torch.nn.functional.silu(gate) * up

    as_good_as(int4_linear(x, weights, norm=(gain, EPS), gated=True), plain(torch.bfloat16), plain(torch.float64))
    w16, w64 = (weights[0].dequantize(dtype) for dtype in (torch.bfloat16, torch.float64))
    mine = int4_linear(x, weights[0], residual=residual)
    as_good_as(mine, residual + x @ w16.t(), residual.double() + x.double() @ w64.t())


def test_mistakes_are_refused():
    held, _ = quantized(4, 128, 64)
    weight = repack_int4(held.codes, held.scales)
    with pytest.raises(ValueError, match="last sizes must agree"):
        int4_linear(torch.ones(2, 64), weight)
    with pytest.raises(ValueError, match="no backward"):
        int4_linear(torch.ones(2, 128).requires_grad_(), weight)
    with pytest.raises(ValueError, match="groups of 32, 64 or 128"):
        repack_int4(torch.zeros(4, 48, dtype=torch.uint8), torch.ones(6, 4, 2))
