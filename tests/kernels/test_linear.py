"""Linear layers with LoRA, norm, several outputs, residual and gate, for few and many rows, against fp64."""

import pytest
import torch
from hypothesis import Phase, assume, given, settings
from hypothesis import strategies as st

from kernels import launch
from kernels.launch import divide_up, splits_that_fill, tiles_of
from kernels.linear import lora_linear, lora_linear_definition, rms_norm_lora_linear, rms_norm_lora_linear_definition

DTYPES = [torch.float32, torch.bfloat16]
SCALE, EPS = 1.7, 1e-5


def layer(N, D, sizes, ranks, dtype, device, bias=False, padding=0):
    """Inputs of a layer with one adapter per output (rank 0: none), scaled like trained ones."""
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


def joined(tensors):
    """Several results as one vector: the rms of a few numbers is too noisy to bound."""
    return torch.cat([t.detach().flatten() for t in tensors])


def as_double(value):
    if isinstance(value, list):
        return [as_double(v) for v in value]
    return None if value is None else value.double()


def plain(x, gain, weights, a, b, c):
    outs = zip(weights, a, b, c, strict=True)
    if gain is None:
        return [lora_linear_definition(x, w, a, b, SCALE, c) for w, a, b, c in outs]
    return [rms_norm_lora_linear_definition(x, gain, w, a, b, SCALE, EPS, c) for w, a, b, c in outs]


def ours(x, gain, weights, a, b, c):
    if gain is None:
        return lora_linear(x, weights, a, b, SCALE, c)
    return rms_norm_lora_linear(x, gain, weights, a, b, SCALE, EPS, c)


@settings(max_examples=40, deadline=None, derandomize=True, phases=[Phase.generate])
@given(
    st.sampled_from([0, 1, 3, 16, 17]),
    st.sampled_from([32, 65, 160, 700]),
    st.lists(st.sampled_from([1, 24, 48, 130]), min_size=1, max_size=3),
    st.lists(st.sampled_from([0, 1, 8, 16, 40]), min_size=3, max_size=3),
    st.sampled_from(DTYPES),
    st.booleans(),
    st.booleans(),
    st.sampled_from([0, 5]),
)
def test_outputs_are_as_good_as_pytorchs(device, as_good_as, N, D, sizes, ranks, dtype, norm, bias, padding):
    assume(N == 0 or N * sum(sizes) >= 24)
    x, gain, *rest = layer(N, D, sizes, ranks[: len(sizes)], dtype, device, bias, padding)
    arguments = [x, gain if norm else None, *rest]
    launch.used_configs.clear()
    mine = ours(*arguments)
    assert (("linear", launch.width(dtype)) in launch.used_configs) == (0 < N <= 16)  # more rows go to cuBLAS
    as_good_as(joined(mine), joined(plain(*arguments)), joined(plain(*map(as_double, arguments))))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [1, 64, 256])
def test_every_rank_up_to_256(device, as_good_as, rank, dtype):
    arguments = layer(2, 96, [40], [rank], dtype, device)
    as_good_as(joined(ours(*arguments)), joined(plain(*arguments)), joined(plain(*map(as_double, arguments))))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [0, 8])
def test_gate_up_and_residual(device, as_good_as, rank, dtype):
    """silu(gate) · up in the epilogue; a residual is added before the result is rounded once."""
    x, gain, weights, a, b, c = layer(3, 300, [70, 70], [rank, rank], dtype, device, bias=True)

    def gated(*arguments):
        gate, up = plain(*arguments)
        return torch.nn.functional.silu(gate) * up

    arguments = [x, gain, weights, a, b, c]
    mine = rms_norm_lora_linear(x, gain, weights, a, b, SCALE, EPS, c, gated=True)
    as_good_as(mine, gated(*arguments), gated(*map(as_double, arguments)))
    residual = (x[:, :70] * 3).contiguous()
    mine = lora_linear(x, weights[0], a[0], b[0], SCALE, residual=residual)
    one = [x, None, weights[:1], a[:1], b[:1], [None]]
    truth = residual.double() + plain(*map(as_double, one[:1]), None, *map(as_double, one[2:]))[0]
    as_good_as(mine, residual + plain(*one)[0], truth)


@pytest.mark.parametrize("N", [3, 40])
def test_gradients_are_as_good_as_pytorchs(device, as_good_as, N):
    """Under autograd the layer is torch's GEMMs after the RMSNorm kernel, for any number of rows."""
    x, gain, weights, a, b, c = layer(N, 64, [48, 32], [8, 4], torch.float32, device)

    def gradients(function, cast):
        leaves = [cast(t.clone()).requires_grad_() for t in (x, gain, *a, *b)]
        out = function(leaves[0], leaves[1], [cast(w) for w in weights], leaves[2:4], leaves[4:], c)
        return [joined(torch.autograd.grad([o.square().sum() for o in out], leaves))]

    truth, theirs = gradients(plain, torch.Tensor.double), gradients(plain, lambda t: t)
    as_good_as(gradients(ours, lambda t: t)[0], theirs[0], truth[0])


def test_leading_dimensions_are_kept(device):
    x, gain, weights, a, b, _ = layer(6, 32, [24, 8], [4, 0], torch.float32, device)
    q, k = rms_norm_lora_linear(x.view(2, 3, 32), gain, weights, a, b, 1.0, EPS)
    assert q.shape == (2, 3, 24) and k.shape == (2, 3, 8)
    assert q.view(2, 3, 4, 6).shape == (2, 3, 4, 6)  # a slice of the common buffer can be viewed as heads


@pytest.mark.parametrize("card", [(80, 108), (90, 132)])
@pytest.mark.parametrize("kernel", [("linear", "16"), ("int4", "128")])
@pytest.mark.parametrize(("outputs", "width"), [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)])
def test_the_grids_fill_an_a100_and_an_h100(card, kernel, outputs, width):
    """Mistral-7B's four GEMMs use at least 79 % of the steps that the slots of all waves could take."""
    tiles = tiles_of(*kernel, card)
    slots, count, steps = tiles["RESIDENT"] * card[1], outputs // tiles["BO"], width // tiles["BD"]
    splits = splits_that_fill(count, steps, slots)
    waves = divide_up(count * splits, slots)
    assert count * steps / (waves * slots * divide_up(steps, splits)) >= 0.79


def test_mistakes_are_refused():
    x, w = torch.ones(2, 8), torch.ones(4, 8)
    with pytest.raises(ValueError, match=r"must be \(R, 8\) and \(4, R\)"):
        lora_linear(x, w, torch.ones(2, 8), torch.ones(4, 3), 1.0)
    with pytest.raises(ValueError, match="needs both lora_a and lora_b"):
        lora_linear(x, w, torch.ones(2, 8), None, 1.0)
    with pytest.raises(ValueError, match="exactly one output"):
        lora_linear(x, [w, w], residual=x)
    with pytest.raises(ValueError, match="gate and up"):
        rms_norm_lora_linear(x, torch.ones(8), w, None, None, 1.0, EPS, gated=True)
