"""The fused linear layer: LoRA, the norm before it, several outputs at once; forward and backward, against fp64."""

import pytest
import torch
from hypothesis import Phase, assume, given, settings
from hypothesis import strategies as st

from kernels.linear import lora_linear, lora_linear_definition, rms_norm_lora_linear, rms_norm_lora_linear_definition

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def layer(N, D, sizes, ranks, dtype, device, bias=False, padding=0):
    """Inputs of a layer with one adapter per output (rank 0: none), sized as trained ones are."""
    generator = torch.Generator().manual_seed(N * 1009 + D * 31 + sum(sizes) + sum(ranks))

    def normal(*shape, std=1.0):
        return (torch.randn(*shape, generator=generator) * std).to(dtype).to(device)

    x = normal(N, D + padding, std=2.0)[:, :D]
    gain = 1 + normal(D, std=0.2)
    weights = [normal(size, D, std=D**-0.5) for size in sizes]
    a = [normal(r, D, std=D**-0.5) if r else None for r in ranks]
    b = [normal(size, r, std=r**-0.5) if r else None for size, r in zip(sizes, ranks, strict=True)]
    c = [normal(size) if bias else None for size in sizes]
    return x, gain, weights, a, b, c


def results(function, x, gain, a, b, cast):
    """Outputs and gradients for x, gain, A and B of a fixed functional of the outputs."""
    leaf = lambda t: None if t is None else cast(t.detach().clone()).requires_grad_()  # noqa: E731
    x, gain, a, b = leaf(x), leaf(gain), [leaf(t) for t in a], [leaf(t) for t in b]
    out = function(x, gain, a, b)
    generator = torch.Generator().manual_seed(7)
    ways = [cast(torch.randn(o.shape, generator=generator).bfloat16().to(o.device)).to(o.dtype) for o in out]
    kinds = [[x], [gain], [t for t in a if t is not None], [t for t in b if t is not None]]
    found = [torch.autograd.grad(out, leaves, ways, retain_graph=True, allow_unused=True) for leaves in kinds if leaves]
    return [joined(out), *map(joined, found)]


def joined(tensors):
    """What is of one kind as one vector (None: nothing depends on it): a mean square of few numbers says little."""
    flat = [t.detach().flatten() for t in tensors if t is not None]
    return torch.cat(flat) if flat else None


def compare(check, N, D, sizes, ranks, dtype, device, norm, bias, padding=0, gradients=True):
    x, gain, weights, a, b, c = layer(N, D, sizes, ranks, dtype, device, bias, padding)
    scale, eps = 1.7, 1e-5

    def ours(x, gain, a, b):
        if norm:
            return rms_norm_lora_linear(x, gain, weights, a, b, scale, eps, c)
        return lora_linear(x, weights, a, b, scale, c)

    def plain(x, gain, a, b):
        cast = lambda t: None if t is None else t.to(x.dtype)  # noqa: E731
        return tuple(
            rms_norm_lora_linear_definition(x, gain, cast(weights[i]), a[i], b[i], scale, eps, cast(c[i]))
            if norm
            else lora_linear_definition(x, cast(weights[i]), a[i], b[i], scale, cast(c[i]))
            for i in range(len(weights))
        )

    truth = results(plain, x, gain, a, b, torch.Tensor.double)
    theirs = results(plain, x, gain, a, b, lambda t: t)
    if gradients:
        mine = results(ours, x, gain, a, b, lambda t: t)
    else:
        with torch.no_grad():
            mine = [joined(ours(x, gain, a, b))]
        theirs, truth = theirs[:1], truth[:1]
    for m, p, t in zip(mine, theirs, truth, strict=True):
        if t is not None:  # nothing depends on the gain where there is no norm
            check(m, p, t)


@settings(max_examples=30, deadline=None, derandomize=True, phases=[Phase.generate])
@given(
    st.sampled_from([0, 1, 3, 16, 17, 70]), st.sampled_from([32, 65, 160]),
    st.lists(st.sampled_from([1, 24, 48, 130]), min_size=1, max_size=3),
    st.lists(st.sampled_from([0, 1, 8, 16, 40]), min_size=3, max_size=3),
    st.sampled_from(DTYPES), st.booleans(), st.booleans(), st.sampled_from([0, 5]), st.booleans(),
)  # fmt: skip
def test_outputs_and_gradients_are_as_good_as_pytorchs(
    device, as_good_as, N, D, sizes, ranks, dtype, norm, bias, padding, gradients
):
    values = [N * sum(sizes), sum(size * rank for size, rank in zip(sizes, ranks, strict=False))]
    assume(all(count == 0 or count >= 24 for count in values))
    compare(as_good_as, N, D, sizes, ranks[: len(sizes)], dtype, device, norm, bias, padding, gradients)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [1, 64, 256])
@pytest.mark.parametrize("N", [1, 33])
def test_every_rank_up_to_256(device, as_good_as, N, rank, dtype):
    compare(as_good_as, N, 96, [40], [rank], dtype, device, True, False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_odd_width_is_masked(device, as_good_as, dtype):
    compare(as_good_as, 2, 2049, [33], [8], dtype, device, True, False, gradients=False)


def test_one_launch_and_two_give_the_same_layer(device):
    """Without gradients and at a small rank n Aᵀ is computed along the way, with gradients by a first launch."""
    x, gain, weights, a, b, _ = layer(5, 64, [48], [8], torch.float32, device)
    with torch.no_grad():
        along = rms_norm_lora_linear(x, gain, weights[0], a[0], b[0], 2.0, 1e-5)
    first = rms_norm_lora_linear(x.requires_grad_(), gain, weights[0], a[0], b[0], 2.0, 1e-5)
    assert torch.allclose(along, first, rtol=0, atol=4e-6)


def test_leading_dimensions_are_kept(device):
    x, gain, weights, a, b, _ = layer(6, 32, [24, 8], [4, 0], torch.float32, device)
    q, k = rms_norm_lora_linear(x.view(2, 3, 32), gain, weights, a, b, 1.0, 1e-5)
    assert q.shape == (2, 3, 24) and k.shape == (2, 3, 8)
    assert q.view(2, 3, 4, 6).shape == (2, 3, 4, 6)  # heads can be split off a slice of the common buffer


def test_mistakes_are_refused():
    x, w = torch.ones(2, 8), torch.ones(4, 8)
    with pytest.raises(ValueError, match=r"must be \(R, 8\) and \(4, R\)"):
        lora_linear(x, w, torch.ones(2, 8), torch.ones(4, 3), 1.0)
    with pytest.raises(ValueError, match="both lora_a and lora_b"):
        lora_linear(x, w, torch.ones(2, 8), None, 1.0)
    with pytest.raises(ValueError, match="frozen"):
        lora_linear(x, w.requires_grad_())
