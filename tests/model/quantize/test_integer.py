"""Products of 8-bit integers: exact sums, rounding by half a step, one scale a row, equal rows beside any others."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from model.quantize import integer
from model.quantize.integer import integer_linear, integer_product, pad_for_int_mm, row_codes
from model.quantize.linear import QuantizedWeight
from model.quantize.rotation import mix
from model.support.hardware import host, instruction_sets, int8_products

exact_here = pytest.mark.skipif(not int8_products(), reason="this processor's sums of 8-bit products saturate")


def drawn(rows, columns, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def codes(rows, columns, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-127, 128, (rows, columns), generator=generator).to(torch.int8)


@exact_here
@settings(deadline=None, max_examples=50)
@given(
    N=st.integers(0, 30), O=st.integers(1, 40), D=st.integers(1, 300), seed=st.integers(0, 99), extreme=st.booleans()
)
@example(N=1, O=2, D=1, seed=0, extreme=False)
def test_sums_are_exact(N, O, D, seed, extreme):
    a_ND, b_OD = codes(N, D, seed), codes(O, D, seed + 1)
    if extreme:  # where 16 bits do not hold two products
        a_ND, b_OD = a_ND.sign() * 127, b_OD.sign() * 127
    truth_NO = a_ND.double() @ b_OD.double().t()
    assert torch.equal(integer_product(a_ND, b_OD).double(), truth_NO)
    padded_a, padded_b = pad_for_int_mm(a_ND, b_OD)
    assert len(padded_a) > 16 and padded_a.shape[1] % 8 == len(padded_b) % 8 == 0
    assert torch.equal(torch._int_mm(padded_a, padded_b.t())[:N, :O].double(), truth_NO)


def test_a_weight_that_needs_no_padding_is_not_copied():
    a_ND, b_OD = codes(20, 64, 0), codes(24, 64, 1)
    kept = [padded.data_ptr() for padded in pad_for_int_mm(a_ND, b_OD)]
    assert kept == [a_ND.data_ptr(), b_OD.data_ptr()]
    assert pad_for_int_mm(a_ND[:1], b_OD)[1].data_ptr() == b_OD.data_ptr()


@exact_here
@pytest.mark.parametrize("stride", [0, 1, 512])
def test_the_stride_of_a_single_row_does_not_matter(stride):
    a_1D, b_OD = codes(1, 512, 0), codes(64, 512, 1)
    truth_1O = a_1D.double() @ b_OD.double().t()
    assert torch.equal(integer_product(a_1D.as_strided((1, 512), (stride, 1)), b_OD).double(), truth_1O)
    assert torch.equal(integer_product(b_OD, a_1D.as_strided((1, 512), (stride, 1))).double(), truth_1O.t())


@settings(deadline=None, max_examples=50)
@given(rows=st.integers(1, 9), columns=st.integers(1, 70), seed=st.integers(0, 99), size=st.floats(1e-6, 1e6))
def test_no_input_is_off_by_more_than_half_a_step(rows, columns, seed, size):
    x_ND = drawn(rows, columns, seed) * size * torch.logspace(-3, 3, rows)[:, None]
    a_ND, s_N1 = row_codes(x_ND)
    assert bool(((a_ND * s_N1 - x_ND).abs() <= s_N1 * (0.5 + 1e-4)).all())
    assert bool((a_ND.abs().amax(1) == 127).all())  # each row by its own largest magnitude


def test_a_row_of_zeros_gives_zeros_and_nan_is_not_hidden():
    x_ND = torch.zeros(2, 8)
    x_ND[1, 3] = torch.nan
    y_NO = integer_linear(x_ND, codes(5, 8, 0), torch.ones(5))
    assert bool((y_NO[0] == 0).all()) and bool(y_NO[1].isnan().all())


def error_of(x_ND, own):
    """(largest error of the product against fp64's of what the codes stand for, the sums' largest)."""
    a_ND, s_N1 = row_codes(mix(x_ND) if own.mixed else x_ND)
    truth_NO = (a_ND.double() * s_N1.double()) @ own.dequantize(torch.float64).t()
    return (own.product(x_ND).double() - truth_NO).abs().max().item(), truth_NO.abs().max().item()


@exact_here
@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 4, 5, 20, 515])
def test_the_product_is_the_codes_product(rows, mixed):
    """Every row by its own scale, every output by its own; the rest is fp32's rounding of three numbers."""
    own = QuantizedWeight.quantize([drawn(24, 96) * torch.logspace(-2, 2, 24)[:, None]], (24, 96), "w8a8", mixed)
    x_ND = drawn(rows, 96, 1) * torch.logspace(-2, 2, rows)[:, None]
    error, largest = error_of(x_ND, own)
    assert error <= 4 * 2**-24 * largest
    half, wide = own.product(x_ND.bfloat16()), own.product(x_ND.bfloat16().float())
    assert half.dtype == torch.bfloat16
    assert mixed or (half.float() - wide).abs().max() <= 2**-8 * largest  # rounded once, at the end


@exact_here
def test_joined_weights_are_the_same_weights_and_parts_of_their_joint_one():
    """Signs and both ends of the range too; a part's own product is its rows of the joint one."""
    wides = [drawn(rows, 96, rows) for rows in (24, 8, 8)]
    plain = [QuantizedWeight.quantize([wide], tuple(wide.shape), "w8a8") for wide in wides]
    parts = [QuantizedWeight.quantize([wide], tuple(wide.shape), "w8a8") for wide in wides]
    joint, x_ND = QuantizedWeight.join(parts), drawn(7, 96, 1)
    for before, after in zip(plain, parts, strict=True):
        assert torch.equal(before.dequantize(torch.float64), after.dequantize(torch.float64))
        assert torch.equal(before.dequantize(torch.float32, slice(2, 5)), after.dequantize(torch.float32, slice(2, 5)))
        assert torch.allclose(before.product(x_ND), after.product(x_ND), rtol=2**-20, atol=0)
    whole_ND = torch.cat([before.product(x_ND) for before in plain], dim=1)
    assert torch.allclose(joint.product(x_ND), whole_ND, rtol=2**-20, atol=0)


@exact_here
def test_another_rows_scale_is_noticed(monkeypatch):
    own = QuantizedWeight.quantize([drawn(24, 96)], (24, 96), "w8a8")
    x_ND = drawn(20, 96, 1) * torch.logspace(-1, 1, 20)[:, None]
    a_ND, s_N1 = row_codes(x_ND)
    monkeypatch.setattr(integer, "row_codes", lambda x_ND: (a_ND, s_N1.roll(1, 0)))
    error, largest = error_of(x_ND, own)
    assert error > 1e-3 * largest


@exact_here
def test_a_row_is_the_same_alone_and_among_others():
    own = QuantizedWeight.quantize([drawn(64, 128)], (64, 128), "w8a8")
    x_ND = drawn(40, 128, 1)
    alone = torch.cat([own.product(row_1D) for row_1D in x_ND.split(1)])
    assert torch.equal(own.product(x_ND), alone) and torch.equal(own.product(x_ND[:3]), alone[:3])


def test_mixed_inputs_in_fp64_are_the_plain_product():
    weight_OD, x_ND = drawn(16, 96).double(), drawn(5, 96, 1).double()
    own = QuantizedWeight.quantize([weight_OD], (16, 96), "w8a8", mixed=True)
    plain = mix(x_ND) @ own.dequantize(torch.float64).t()
    assert torch.allclose(own.product(x_ND), plain, rtol=0, atol=1e-12)
    assert (plain - x_ND @ weight_OD.t()).abs().max() < 0.02 * plain.abs().max()  # W mixed, x mixed: W · x


@pytest.mark.parametrize("mixed", [False, True])
def test_the_backward_product_in_fp64_is_the_transposed_of_the_product(mixed):
    own = QuantizedWeight.quantize([drawn(16, 96).double()], (16, 96), "w8a8", mixed=mixed)
    x_ND, g_NO = drawn(5, 96, 1).double().requires_grad_(), drawn(5, 16, 2).double()
    own.product(x_ND).backward(g_NO)
    assert torch.allclose(own.product_backward(g_NO), x_ND.grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("said", "fast"),
    [
        ("flags : fpu avx2 fma", False),
        ("flags : avx512f avx512bw avx512_bf16", False),
        ("flags : avx2 avx_vnni", True),
        ("flags : avx512f avx512_vnni", True),
        ("flags : amx_int8 amx_tile", True),
        ("flags : my_avx_vnni_not", False),
    ],
)
def test_only_vnni_and_amx_multiply_integers_fast(said, fast):
    assert int8_products("cpu", said) is fast


def test_a_host_names_the_instruction_sets_that_matter():
    said = "flags : fpu avx avx2 avx512f amx_tile amx_int8 my_avx_vnni_not"
    assert instruction_sets(said) == ["avx2", "avx512f", "amx_int8"]
    assert host()["instruction_sets"] == instruction_sets()
