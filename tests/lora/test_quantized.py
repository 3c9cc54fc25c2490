"""4- and 8-bit numbers equal bitsandbytes' bit for bit, and a quantized base trains as its widened weights do."""

import pytest
import torch
from torch import nn

from lora import LoRAConfig, add_lora, merge_lora
from lora.quantized import quantize_base
from model.quantize.blockwise import dequantize, dynamic_table, quantize
from model.quantize.linear import QuantizedWeight
from model.support.cli import UserError

bnb = pytest.importorskip("bitsandbytes.functional", reason="needs bitsandbytes: make test installs it")


@pytest.mark.parametrize("shape", [(64, 64), (96, 320), (256, 1024)])
def test_nf4_with_double_quantization_is_bitsandbytes(shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 0.05
    theirs, state = bnb.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    ours = QuantizedWeight.quantize([weight], shape, "nf4")
    assert torch.equal(ours.codes.flatten(), theirs.flatten())
    assert torch.equal(ours.scales, state.absmax.flatten())
    assert torch.equal(ours.scales_absmax, state.state2.absmax)
    assert torch.equal(ours.scales_mean, state.offset)
    assert torch.equal(ours.dequantize(torch.float32), bnb.dequantize_4bit(theirs, state))


@pytest.mark.parametrize("signed", [True, False])
def test_eight_bit_blocks_are_bitsandbytes(signed):
    table = dynamic_table(signed)
    assert torch.equal(table, bnb.create_dynamic_map(signed))
    x = torch.randn(5000, generator=torch.Generator().manual_seed(2))
    x = x if signed else x.abs()
    theirs, state = bnb.quantize_blockwise(x, code=table, blocksize=256)
    codes, absmax = quantize(x, table, 256, grid=True)
    assert torch.equal(codes, theirs) and torch.equal(absmax, state.absmax)
    assert torch.equal(dequantize(codes, absmax, table, 256), bnb.dequantize_blockwise(theirs, state))
    exact, _ = quantize(x, table, 256)
    off, nearest = dequantize(exact, absmax, table, 256) - x, dequantize(codes, absmax, table, 256) - x
    assert (off.abs() <= nearest.abs() + 1e-6).all() and not torch.equal(exact, codes)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantized_base_gives_the_widened_weights_results_and_gradients(kind):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96, bias=True), nn.Linear(96, 64, bias=False))
    add_lora(model, LoRAConfig(r=4, target_modules=("0", "1")))
    with torch.no_grad():
        for name, param in model.named_parameters():
            if "lora_B" in name:
                param.normal_()
    before = {path: layer.weight.clone() for path, layer in model.named_children()}
    quantize_base(model, kind)
    x_BTD = torch.randn(2, 5, 64, requires_grad=True)
    y_BTD = model(x_BTD)
    y_BTD.square().sum().backward()
    found = [x_BTD.grad, *(p.grad for p in model.parameters() if p.requires_grad)]
    x2_BTD = x_BTD.detach().clone().requires_grad_()
    for path, layer in model.named_children():
        wide = layer.quantized.dequantize(torch.float32)
        assert 0 < float((wide - before[path]).norm() / before[path].norm()) < (0.15 if kind == "nf4" else 0.02)
        layer.weight, layer.quantized = nn.Parameter(wide, requires_grad=False), None
    model.zero_grad()
    y2_BTD = model(x2_BTD)
    y2_BTD.square().sum().backward()
    assert torch.equal(y_BTD, y2_BTD)
    for ours, theirs in zip(
        found, [x2_BTD.grad, *(p.grad for p in model.parameters() if p.requires_grad)], strict=True
    ):
        assert torch.equal(ours, theirs)
    quantize_base(model, kind)
    with pytest.raises(UserError, match="the base is quantized"):
        merge_lora(model)
