"""Fused output projection and cross-entropy: loss and gradients against fp64; ignored rows have no effect."""

import math

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from kernels.cross_entropy import linear_cross_entropy, linear_cross_entropy_definition


def case(N, D, V, dtype, device, ignored=0.3):
    generator = torch.Generator().manual_seed(N * 101 + D * 7 + V)
    x = torch.randn(N, D, generator=generator).to(dtype).to(device)
    w = (torch.randn(V, D, generator=generator) * 3 * D**-0.5).to(dtype).to(device)
    targets = torch.randint(0, V, (N,), generator=generator)
    targets[torch.rand(N, generator=generator) < ignored] = -100
    if N:
        targets[0] = V - 1
    return x, w, targets.to(device)


def results(function, x, w, targets, cast, reduction="mean", **options):
    x, w = cast(x.detach()).requires_grad_(), cast(w.detach()).requires_grad_()
    loss = function(x, w, targets, -100, reduction, **options)
    return [loss.detach(), *torch.autograd.grad(loss * 1.5, (x, w))]


@settings(max_examples=20, deadline=None, derandomize=True, phases=[Phase.generate])
@given(
    st.sampled_from([1, 2, 40, 65]),
    st.sampled_from([16, 48, 65]),
    st.sampled_from([2, 33, 300]),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.sampled_from(["mean", "sum"]),
)
def test_loss_and_gradients_are_as_good_as_pytorchs(device, as_good_as, N, D, V, dtype, reduction):
    x, w, targets = case(N, D, V, dtype, device)
    truth = results(linear_cross_entropy_definition, x, w, targets, torch.Tensor.double, reduction)
    theirs = results(linear_cross_entropy_definition, x, w, targets, lambda t: t, reduction)
    mine = results(linear_cross_entropy, x, w, targets, lambda t: t, reduction)
    for m, p, t in zip(mine, theirs, truth, strict=True):
        as_good_as(m, p, t)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_maximum_may_rise_from_tile_to_tile(device, as_good_as, dtype):
    x, w, targets = case(3, 16, 9000, dtype, device)
    w *= torch.linspace(0.1, 3, 9000).to(w)[:, None]
    truth = results(linear_cross_entropy_definition, x, w, targets, torch.Tensor.double)
    theirs = results(linear_cross_entropy_definition, x, w, targets, lambda t: t)
    for m, p, t in zip(results(linear_cross_entropy, x, w, targets, lambda t: t), theirs, truth, strict=True):
        as_good_as(m, p, t)


def test_chunks_of_rows_add_up(device, as_good_as):
    x, w, targets = case(20, 32, 300, torch.float32, device)
    one_chunk = results(linear_cross_entropy, x, w, targets, lambda t: t)
    chunks = results(linear_cross_entropy, x, w, targets, lambda t: t, max_logits=7 * 300)  # 7, 7 and 6 rows
    truth = results(linear_cross_entropy_definition, x, w, targets, torch.Tensor.double)
    for mine, one, t in zip(chunks, one_chunk, truth, strict=True):
        as_good_as(mine, one, t)


def test_an_ignored_row_has_no_effect_and_no_gradient(device):
    x, w, targets = case(12, 16, 50, torch.float32, device, ignored=0.0)
    targets[4] = -100
    loss, dx, dw = results(linear_cross_entropy, x, w, targets, lambda t: t)
    x[4] = 1e4
    again = results(linear_cross_entropy, x, w, targets, lambda t: t)
    assert torch.equal(loss, again[0]) and torch.equal(dw, again[2])
    assert not dx[4].any() and not again[1][4].any()


def test_large_logits_do_not_overflow(device):
    x, w = torch.full((2, 16), 60.0, device=device), torch.eye(16, device=device) * 5
    w[3] *= -1
    loss = linear_cross_entropy(x, w, torch.tensor([3, 0], device=device))
    assert float(loss) == pytest.approx((600 + 2 * math.log(15)) / 2, rel=1e-6)


def test_no_counted_row_gives_what_pytorch_gives(device):
    x, w, targets = case(3, 16, 10, torch.float32, device, ignored=1.1)
    assert math.isnan(linear_cross_entropy(x[1:], w, targets[1:]))
    assert float(linear_cross_entropy(x[1:], w, targets[1:], reduction="sum")) == 0.0


def test_mistakes_are_refused():
    x, w = torch.ones(2, 4), torch.ones(5, 4)
    with pytest.raises(ValueError, match=r"outside \[0, 5\)"):
        linear_cross_entropy(x, w, torch.tensor([0, 5]))
    with pytest.raises(ValueError, match=r"\(N, D\), \(V, D\) and \(N,\)"):
        linear_cross_entropy(x, w, torch.tensor([0]))
