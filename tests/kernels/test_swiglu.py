"""SwiGLU: every shape, stride and dtype, forward and backward, against fp64."""

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from kernels.activation import swiglu, swiglu_definition


@settings(max_examples=20, deadline=None, derandomize=True, phases=[Phase.generate])
@given(
    st.integers(0, 4),
    st.sampled_from([1, 5, 64, 1024, 2049]),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.booleans(),
)
def test_output_and_gradients_are_as_good_as_pytorchs(device, as_good_as, N, F, dtype, halves):
    generator = torch.Generator().manual_seed(N * 31 + F)
    both = (torch.randn(N, 2 * F, generator=generator) * 4).to(dtype).to(device)
    gate, up = both.chunk(2, dim=1) if halves else (both[:, :F].contiguous(), both[:, F:].contiguous())
    dy = torch.randn(N, F, generator=generator).to(dtype).to(device)

    def results(function, cast):
        inputs = [cast(t.detach()).requires_grad_() for t in (gate, up)]
        y = function(*inputs)
        return [y.detach(), *torch.autograd.grad(y, inputs, cast(dy))]

    mine, theirs = results(swiglu, lambda t: t), results(swiglu_definition, lambda t: t)
    for a, b, c in zip(mine, theirs, results(swiglu_definition, torch.Tensor.double), strict=True):
        as_good_as(a, b, c)


def test_large_gates_neither_overflow_nor_turn_to_nan(device):
    gate = torch.tensor([-1e4, -100.0, 0.0, 100.0, 1e4], device=device).requires_grad_()
    y = swiglu(gate, torch.ones(5, device=device))
    y.sum().backward()
    assert torch.equal(y, torch.tensor([0.0, 0.0, 0.0, 100.0, 1e4], device=device).copysign(y))
    assert torch.isfinite(gate.grad).all()


def test_shapes_that_differ_are_refused():
    with pytest.raises(ValueError, match="must agree"):
        swiglu(torch.ones(2, 3), torch.ones(2, 4))
