"""8-bit weights: the error is at most half a step, the fast product is the plain one, generation runs on them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lora import LoRAConfig, add_lora
from model import ModelConfig, Transformer
from model.narrow import Int8Linear, dequantise, narrow, quantise

CONFIG = ModelConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, rms_norm_eps=1e-5, rope_theta=1e4, windows=(None, None),
)  # fmt: skip


@settings(deadline=None, max_examples=40)
@given(rows=st.integers(1, 9), columns=st.integers(1, 40), seed=st.integers(0, 999), size=st.floats(1e-6, 1e6))
def test_no_weight_is_off_by_more_than_half_a_step(rows, columns, seed, size):
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * size
    q, scale = quantise(weight)
    error = (dequantise(q, scale, torch.float64) - weight.double()).abs()
    assert bool((error <= scale.double()[:, None] * (0.5 + 1e-5)).all())


def test_a_row_of_zeros():
    q, scale = quantise(torch.zeros(2, 8))
    assert not q.any() and dequantise(q, scale, torch.float32).isfinite().all()


def test_the_packed_product_is_the_plain_one():
    """Judged in fp64: the packed bf16 product errs at most twice as much as a bf16 product of dequantised weights."""
    linear = Int8Linear(nn.Linear(64, 96, bias=False))
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    truth = x.double() @ dequantise(linear.weight, linear.scale, torch.float64).t()
    plain = x @ dequantise(linear.weight, linear.scale, torch.bfloat16).t()
    error, allowed = (linear(x).double() - truth).abs().max(), (plain.double() - truth).abs().max()
    assert error <= 2 * allowed


def test_a_narrow_model_is_near_and_smaller():
    model = Transformer(CONFIG).init_weights(0).requires_grad_(False)
    tokens = torch.arange(20)[None]
    before = model(tokens)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    narrow(model)
    held = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    assert held < 0.5 * size
    error = (model(tokens) - before).abs().max() / before.abs().max()
    assert 0 < error < 0.02


def test_adapters_are_merged_first():
    model = add_lora(Transformer(CONFIG).init_weights(0), LoRAConfig(r=2, alpha=4))
    with pytest.raises(ValueError, match="merge"):
        narrow(model)
