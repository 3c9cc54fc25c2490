"""RMSNorm: every shape, stride and dtype, forward and backward, against fp64."""

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from kernels.norm import add_rms_norm, add_rms_norm_definition, rms_norm, rms_norm_definition

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def tensors(seed, N, D, dtype, device, row_stride=0):
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(N, D + row_stride, generator=generator) * 3).to(dtype).to(device)[:, :D]
    r = torch.randn(N, D, generator=generator).to(dtype).to(device)
    g = (1 + 0.3 * torch.randn(D, generator=generator)).to(dtype).to(device)
    return x, r, g


def outputs_and_gradients(function, inputs, seed):
    """The results, and the gradients for a fixed random upstream gradient, in the inputs' dtype."""
    inputs = [t.detach().clone().requires_grad_() for t in inputs]
    out = function(*inputs)
    out = out if isinstance(out, tuple) else (out,)
    generator = torch.Generator().manual_seed(seed)
    ways = [torch.randn(o.shape, generator=generator).to(o.device) for o in out]
    grads = torch.autograd.grad(out, inputs, [w.bfloat16().to(o.dtype) for w, o in zip(ways, out, strict=True)])
    return [*(o.detach() for o in out), *grads]


@settings(max_examples=25, deadline=None, derandomize=True, phases=[Phase.generate])
@given(
    st.integers(0, 5),
    st.sampled_from([1, 2, 7, 64, 100, 129, 576, 2049]),
    st.sampled_from(DTYPES),
    st.sampled_from([0, 3, 16]),
    st.sampled_from([1e-6, 1e-5, 0.1]),
    st.booleans(),
)
def test_outputs_and_gradients_are_as_good_as_pytorchs(device, as_good_as, N, D, dtype, row_stride, eps, add):
    x, r, g = tensors(N * 7 + D, N, D, dtype, device, row_stride)
    ours, plain = (
        (lambda x, r, g: add_rms_norm(x, r, g, eps), lambda x, r, g: add_rms_norm_definition(x, r, g, eps))
        if add
        else (lambda x, g: rms_norm(x, g, eps), lambda x, g: rms_norm_definition(x, g, eps))
    )
    inputs = [x, r, g] if add else [x, g]
    truth = outputs_and_gradients(plain, [t.double() for t in inputs], 1)
    mine = outputs_and_gradients(ours, inputs, 1)
    theirs = outputs_and_gradients(plain, inputs, 1)
    results = (2 if add else 1) if D <= 2 else len(truth)  # for D ≤ 2 the gradient is a difference of rounding errors
    for a, b, c in list(zip(mine, theirs, truth, strict=True))[:results]:
        as_good_as(a, b, c)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_too_wide_for_the_backward_kernel_uses_autograd(device, as_good_as, dtype):
    x, r, g = tensors(4, 3, 9001, dtype, device)
    ours, plain = (
        (lambda x, r, g: add_rms_norm(x, r, g, 1e-5)),
        (lambda x, r, g: add_rms_norm_definition(x, r, g, 1e-5)),
    )
    truth = outputs_and_gradients(plain, [t.double() for t in (x, r, g)], 1)
    for a, b, c in zip(
        outputs_and_gradients(ours, [x, r, g], 1), outputs_and_gradients(plain, [x, r, g], 1), truth, strict=True
    ):
        as_good_as(a, b, c)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_residual_sum_is_rounded_once_and_used_rounded(device, dtype):
    x, r, g = tensors(3, 4, 96, dtype, device)
    y, total = add_rms_norm(x, r, g, 1e-5)
    assert torch.equal(total, x + r)
    assert torch.equal(y, rms_norm(total, g, 1e-5))


def test_the_weights_gradient_over_many_rows_is_summed_in_fp32_and_in_a_fixed_order(device, as_good_as):
    x, _, g = tensors(5, 300, 32, torch.bfloat16, device)
    mine = [outputs_and_gradients(lambda x, g: rms_norm(x, g, 1e-5), [x, g], 2)[2] for _ in range(2)]
    assert torch.equal(mine[0], mine[1])
    truth = outputs_and_gradients(lambda x, g: rms_norm_definition(x, g, 1e-5), [x.double(), g.double()], 2)[2]
    as_good_as(mine[0], truth.bfloat16(), truth)  # as good as rounding the exact sum once, unlike 300 bf16 additions


def test_a_weight_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"must be \(8,\)"):
        rms_norm(torch.ones(2, 8), torch.ones(9), 1e-5)


def test_fp64_and_cpu_definitions_need_no_kernel():
    x = torch.randn(3, 8, dtype=torch.float64)
    assert torch.equal(
        rms_norm(x, torch.ones(8, dtype=torch.float64), 1e-5), rms_norm_definition(x, torch.ones(8), 1e-5)
    )
