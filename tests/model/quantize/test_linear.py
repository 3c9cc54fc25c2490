"""Narrow weights: near the weight, one weight whatever computes with it, products as exact as their dtype allows."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora import LoRAConfig, add_lora
from model import ModelConfig, Transformer
from model.quantize.linear import FORMATS, PACKED_ROWS, QuantizedWeight, bytes_of, format_of, quantize_model
from model.support.init import init_weights

CONFIG = ModelConfig(
    vocab_size=64,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    rms_norm_eps=1e-5,
    rope_theta=1e4,
    windows=(None, None),
)
NAMES = sorted(FORMATS)


def drawn(rows, columns, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def held(weight, form):
    return QuantizedWeight.quantize([weight], tuple(weight.shape), form)


@settings(deadline=None, max_examples=60)
@given(
    form=st.sampled_from(NAMES),
    rows=st.integers(1, 9),
    columns=st.sampled_from([32, 40, 64, 128, 192, 256]),
    seed=st.integers(0, 999),
    size=st.floats(1e-6, 1e6),
)
def test_no_weight_is_off_by_more_than_half_a_step(form, rows, columns, seed, size):
    weight = drawn(rows, columns, seed) * size
    own = held(weight, form)
    kind, group = format_of(form, columns)
    error = (own.dequantize(torch.float64) - weight.double()).abs()
    if kind in ("int8", "w8a8"):
        allowed = own.scales.double()[:, None] / 2
    elif kind == "int4":  # the end of a group may be off by what rounding its zero to bf16 moved it
        scale, zero = own.scales.double().transpose(0, 1).repeat_interleave(group, dim=1).unbind(-1)
        allowed = scale / 2 + zero.abs() * 2**-8
    else:  # the widest gap of NF4's table is 0.304 of the group's largest weight, whose scale is rounded to 8 bits
        most = weight.double().unflatten(1, (-1, group)).abs().amax(2).repeat_interleave(group, dim=1)
        allowed = most * 0.152 + (own.absmax().double().repeat_interleave(group, dim=1) - most).abs()
    assert bool((error <= allowed * (1 + 1e-5)).all())


@pytest.mark.parametrize("form", NAMES)
@pytest.mark.parametrize("value", [0.0, 0.5])
def test_a_matrix_of_one_value(form, value):
    wide = held(torch.full((2, 64), value), form).dequantize(torch.float32)
    assert torch.allclose(wide, torch.tensor(value), rtol=2**-7, atol=0)


@pytest.mark.parametrize("form", NAMES)
def test_pieces_change_nothing(form):
    weight = drawn(200, 128)
    whole, parts = held(weight, form), QuantizedWeight.quantize(iter(weight.split(7)), (200, 128), form)
    assert torch.equal(whole.dequantize(torch.float32), parts.dequantize(torch.float32))
    assert sum(t.numel() * t.element_size() for t in parts.buffers()) <= bytes_of(form, 200, 128)


@pytest.mark.parametrize("form", ["int8", "int4-32", "int4-64", "int4-128"])
@pytest.mark.parametrize("rows", [1, 3, PACKED_ROWS["int8"] + 1, PACKED_ROWS["int4"] + 1])
def test_packed_products_are_as_exact_as_plain_ones(form, rows):
    """The dequantized weight in fp64 judges: the packed product, with inputs in bf16, errs at most twice as much as
    the plain product in bf16. The weight itself is the same before and after packing."""
    own = held(drawn(192, 256), form)
    before = own.dequantize(torch.float64)
    assert own.pack().packed
    assert torch.equal(own.dequantize(torch.float64), before)
    assert torch.equal(own.dequantize(torch.float64, slice(64, 128)), before[64:128])
    x = drawn(rows, 256, 1).bfloat16()
    truth = x.double() @ before.t()
    allowed = ((x @ before.bfloat16().t()).double() - truth).abs().max()
    for dtype in (torch.bfloat16, torch.float32):
        y = own.product(x.to(dtype))
        assert y.dtype == dtype and (y.double() - truth).abs().max() <= 2 * allowed
    exact = own.product(x.double())
    assert (exact - truth).abs().max() <= 1e-13 * truth.abs().max()


PLAIN = [(form, dtype) for form in NAMES for dtype in (torch.float64, torch.float32)]
PLAIN.remove(("w8a8", torch.float32))  # rounds its inputs: test_integer.py


@pytest.mark.parametrize(("form", "dtype"), PLAIN)
def test_plain_products(form, dtype):
    own, x = held(drawn(96, 128), form), drawn(5, 128, 1).to(dtype)
    truth = x.double() @ own.dequantize(torch.float64).t()
    allowed = ((x @ own.dequantize(dtype).t()).double() - truth).abs().max()
    assert (own.product(x).double() - truth).abs().max() <= 2 * allowed + 1e-13 * truth.abs().max()


@pytest.mark.parametrize("form", ["int8", "int4"])
@pytest.mark.parametrize("pack", [False, True])
def test_joined_weights_are_the_weights_one_below_the_other(form, pack):
    parts = [held(drawn(rows, 128, rows), form) for rows in (128, 64, 192)]
    parts = [part.pack() for part in parts] if pack else parts
    x = drawn(4, 128).bfloat16()
    before, products = [part.dequantize(torch.float32) for part in parts], [part.product(x) for part in parts]
    joint = QuantizedWeight.join(parts)
    assert torch.equal(joint.dequantize(torch.float32), torch.cat(before))
    assert torch.equal(joint.product(x), torch.cat(products, dim=1))
    for part, was in zip(parts, before, strict=True):  # views of the joint one now
        assert torch.equal(part.dequantize(torch.float32), was) and part.codes.data_ptr() >= joint.codes.data_ptr()
        assert torch.equal(part.product(x), x @ was.bfloat16().t()) or pack


@pytest.mark.parametrize(("form", "size", "most"), [("int8", 0.30, 0.02), ("int4-32", 0.20, 0.2), ("nf4", 0.18, 0.2)])
def test_a_narrow_model_is_near_and_smaller(form, size, most):
    model = init_weights(Transformer(CONFIG), 0).requires_grad_(False)
    tokens = torch.arange(20)[None]
    before = model(tokens)
    wide = sum(p.numel() * p.element_size() for p in model.parameters() if p.dim() == 2) - 64 * 64 * 4
    quantize_model(model, form)
    kept = sum(t.numel() * t.element_size() for t in model.buffers())
    assert kept < size * wide
    error = (model(tokens) - before).norm() / before.norm()
    assert 0 < error < most


def test_adapters_are_put_on_the_narrow_model():
    model = add_lora(init_weights(Transformer(CONFIG), 0), LoRAConfig(r=2, alpha=4))
    with pytest.raises(ValueError, match="quantized model"):
        quantize_model(model)
    model = quantize_model(init_weights(Transformer(CONFIG), 0), "int4").requires_grad_(False)
    base = model(torch.arange(9)[None])
    add_lora(model, LoRAConfig(r=2, alpha=4))
    assert torch.equal(model(torch.arange(9)[None]), base)  # B starts at zero
    layer = model.model.layers[0].mlp.down_proj
    layer.quantized = held(drawn(64, 128), "int4")  # a plain one, so that its product is exact to fp32
    with torch.no_grad():
        layer.lora_B["default"].normal_()
    x = drawn(3, 128)
    with_adapter = layer(x) - layer.quantized.product(x)
    assert torch.allclose(with_adapter, x @ layer.delta("default").t(), rtol=1e-4, atol=1e-4)
