"""Rows of one batch through different adapters: each row gets what it would get alone."""

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from kernels.linear import lora_linear
from kernels.multi_lora import multi_lora_linear, multi_lora_linear_definition


def case(N, D, out, E, R, dtype, device, seed=0):
    generator = torch.Generator().manual_seed(seed + N * 11 + D + R)

    def normal(*shape, std=1.0):
        return (torch.randn(*shape, generator=generator) * std).to(dtype).to(device)

    index = torch.randint(-1, E, (N,), generator=generator).to(device)
    scale = (torch.rand(E, generator=generator) + 0.5).to(device)
    return (
        normal(N, D), normal(out, D, std=D**-0.5), normal(E, R, D, std=D**-0.5), normal(E, out, R, std=R**-0.5),
        index, scale, normal(out),
    )  # fmt: skip


@settings(max_examples=20, deadline=None, derandomize=True, phases=[Phase.generate])
@given(
    st.sampled_from([0, 1, 5, 16, 40]), st.sampled_from([32, 65]), st.sampled_from([1, 48, 70]),
    st.sampled_from([1, 3, 7]), st.sampled_from([1, 8, 33]),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)  # fmt: skip
def test_as_good_as_pytorchs(device, as_good_as, N, D, out, E, R, dtype):
    arguments = case(N, D, out, E, R, dtype, device)
    truth = multi_lora_linear_definition(*(t.double() if t.is_floating_point() else t for t in arguments))
    as_good_as(multi_lora_linear(*arguments), multi_lora_linear_definition(*arguments), truth)


def test_a_row_does_not_depend_on_its_neighbours_adapters(device):
    x, w, a, b, index, scale, bias = case(16, 64, 48, 5, 8, torch.float32, device)
    y = multi_lora_linear(x, w, a, b, index, scale, bias)
    for n in range(16):
        other = torch.full_like(index, 4)
        other[n] = index[n]
        assert torch.equal(multi_lora_linear(x, w, a, b, other, scale, bias)[n], y[n])


def test_one_adapter_for_all_rows_is_the_lora_layer(device):
    x, w, a, b, index, scale, bias = case(6, 64, 48, 3, 8, torch.float32, device)
    y = multi_lora_linear(x.view(2, 3, 64), w, a, b, torch.full((2, 3), 1, device=device), scale, bias)
    alone = lora_linear(x.view(2, 3, 64), w, a[1], b[1], float(scale[1]), bias)
    assert torch.allclose(y, alone, rtol=0, atol=4e-6)


def test_mistakes_are_refused(device):
    x, w, a, b, index, scale, _ = case(6, 64, 48, 3, 8, torch.float32, "cpu")
    with pytest.raises(ValueError, match="there are 3"):
        multi_lora_linear(x, w, a, b, index + 2, scale)
    with pytest.raises(ValueError, match="each of the rows"):
        multi_lora_linear(x, w, a, b, index[:3], scale)
