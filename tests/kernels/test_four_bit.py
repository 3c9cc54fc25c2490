"""4-bit linear layers: the layout is what it says, and the result is as good as dequantizing first, against fp64."""

# ruff: noqa: E741 - O is the output width

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from kernels.four_bit import (
    NF4_LEVELS,
    int4_lora_linear,
    int4_lora_linear_definition,
    int4_weight,
    nf4_lora_linear,
    nf4_lora_linear_definition,
    nf4_weight,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def case(N, D, O, R, group, dtype, device, padding=0):
    generator = torch.Generator().manual_seed(N * 97 + D + O * 5 + R)

    def normal(*shape, std=1.0):
        return (torch.randn(*shape, generator=generator) * std).to(dtype).to(device)

    x = normal(N, D + padding)[:, :D]
    packed = torch.randint(0, 256, (O, D // 2), generator=generator, dtype=torch.uint8).to(device)
    scales = (torch.rand(O, D // group, generator=generator) * 0.1 + 0.01).to(dtype).to(device)
    zeros = normal(O, D // group, std=0.05)
    a, b = (normal(R, D, std=D**-0.5), normal(O, R)) if R else (None, None)
    return x, packed, scales, zeros, a, b, normal(O), (1 + normal(D, std=0.2), 1e-5)


def wide(value):
    if isinstance(value, tuple):
        return tuple(wide(v) for v in value)
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def compare(check, function, definition, arguments):
    truth = definition(*map(wide, arguments))
    check(function(*arguments), definition(*arguments), truth)


@settings(max_examples=30, deadline=None, derandomize=True, phases=[Phase.generate])
@given(
    st.sampled_from([0, 1, 5, 16, 40]), st.sampled_from([1, 2, 3]), st.sampled_from([1, 33, 64, 130]),
    st.sampled_from([0, 1, 8, 48]), st.sampled_from([32, 64, 128]), st.sampled_from(DTYPES), st.booleans(),
    st.booleans(), st.booleans(), st.sampled_from([0, 3]),
)  # fmt: skip
def test_int4_and_nf4_are_as_good_as_dequantizing_first(
    device, as_good_as, N, groups, O, R, group, dtype, nf4, normed, zero, padding
):
    x, packed, scales, zeros, a, b, bias, norm = case(N, groups * group, O, R, group, dtype, device, padding)
    norm = norm if normed else None
    if nf4:
        compare(as_good_as, nf4_lora_linear, nf4_lora_linear_definition, (x, packed, scales, a, b, 0.5, bias, norm))
    else:
        arguments = (x, packed, scales, a, b, 0.5, bias, zeros if zero else None, norm)
        compare(as_good_as, int4_lora_linear, int4_lora_linear_definition, arguments)


def test_the_layout_is_what_the_page_says():
    packed = torch.tensor([[0x2F, *[0x88] * 15]], dtype=torch.uint8)  # low half 15, high half 2
    one = torch.ones(1, 1)
    assert int4_weight(packed, one, None, torch.float32)[0, :4].tolist() == [7.0, -6.0, 0.0, 0.0]
    assert int4_weight(packed, one * 2, one, torch.float32)[0, :2].tolist() == [15.0, -11.0]
    assert torch.equal(nf4_weight(packed, one, torch.float32)[0, :2], torch.tensor([NF4_LEVELS[2], NF4_LEVELS[15]]))


def test_nf4_reads_what_bitsandbytes_writes():
    functional = pytest.importorskip("bitsandbytes.functional", reason="needs bitsandbytes")
    weight = torch.randn(24, 128, generator=torch.Generator().manual_seed(1))
    packed, state = functional.quantize_4bit(weight, quant_type="nf4", blocksize=64)
    theirs = functional.dequantize_4bit(packed, state)
    ours = nf4_weight(packed.view(24, 64), state.absmax.view(24, 2), torch.float32)
    assert torch.equal(ours, theirs)


def test_each_group_has_its_own_scale(device):
    """Codes of one, so the output is the sum of the groups' scales: a scale of the neighbour would show."""
    packed = torch.full((4, 64), 0x99, dtype=torch.uint8, device=device)
    scales = torch.tensor([[1.0, 10.0, 100.0, 1000.0]], device=device) * torch.arange(1, 5, device=device)[:, None]
    x = torch.zeros(4, 128, device=device)
    for g in range(4):
        x[g, 32 * g] = 1
    assert torch.equal(int4_lora_linear(x, packed, scales), scales.t())


def test_mistakes_are_refused():
    x, packed = torch.ones(2, 64), torch.zeros(4, 32, dtype=torch.uint8)
    with pytest.raises(ValueError, match="group of 32, 64 or 128"):
        int4_lora_linear(x, packed, torch.ones(4, 4))
    with pytest.raises(ValueError, match="uint8"):
        nf4_lora_linear(x, packed.int(), torch.ones(4, 1))
    with pytest.raises(ValueError, match="no backward"):
        nf4_lora_linear(x.requires_grad_(), packed, torch.ones(4, 1))
