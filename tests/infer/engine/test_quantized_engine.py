"""Generation from quantized weights is the plain model with the weights that the codes stand for, adapters on top."""

import subprocess
import sys
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from answering_models import CONFIG, plain_greedy, tiny_model, write_model, write_tokenizer

from infer.engine.cache import Cache
from infer.engine.forward import Engine
from infer.engine.fuse import Int4Linear, fuse
from infer.engine.generate import Generator
from infer.engine.load import check_format, load, load_quantized
from infer.engine.tree import build_tree
from lora import LoRAConfig, add_lora, load_adapter, save_adapter
from lora.adapter import adapted
from model import Transformer
from model.quantize.linear import QuantizedLinear, QuantizedWeight, quantize_model
from model.quantize.rotation import mix, rotate
from model.support.cli import UserError
from model.support.hardware import onednn, use_onednn
from model.support.init import init_weights

WIDTHS = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
MIXTRAL = {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
FAMILIES = [{}, {"tie_word_embeddings": True}, {"model_type": "qwen2", "qkv_bias": True}, MIXTRAL]
PROMPTS = [[1, 2, 3], [1, 2, 3, *range(40)], [9]]


def dequantized(model):
    """The same model with ordinary layers that hold the dequantized weights."""
    for path, module in list(model.named_modules()):
        if type(module) is QuantizedLinear:
            linear = torch.nn.Linear(module.in_features, module.out_features, bias=False)
            linear.weight = torch.nn.Parameter(module.quantized.dequantize(torch.float64), requires_grad=False)
            linear.bias = module.bias
            parent, _, branch = path.rpartition(".")
            setattr(model.get_submodule(parent), branch, linear)
    return model


@pytest.mark.parametrize("form", ["int8", "int4", "nf4"])
@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"qkv_bias": True}, {"windows": (5, None)}])
def test_narrow_weights_generate(tokenizer, form, changes):
    model = quantize_model(tiny_model(**WIDTHS, **changes), form)
    outs = Generator(model, tokenizer).generate(PROMPTS, max_new_tokens=8)
    plain = dequantized(quantize_model(tiny_model(**WIDTHS, **changes), form))
    for prompt, out in zip(PROMPTS, outs, strict=True):
        tokens, logprobs = plain_greedy(plain, prompt, 8, tokenizer.stop_ids)
        assert out.tokens == tokens
        assert torch.allclose(torch.tensor(out.logprobs), torch.tensor(logprobs), rtol=0, atol=1e-9)


def adapters(folder: Path, weights: Path) -> list[Path]:
    """Two adapters, the second to be used on top of the first."""
    made = []
    for number in (1, 2):
        model, _ = load(weights, dtype="float64")
        add_lora(model, LoRAConfig(r=number + 1, alpha=4), seed=number)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)))
        save_adapter(model, folder / f"adapter{number}")
        made.append(folder / f"adapter{number}")
    return made


@pytest.mark.parametrize("form", ["int8", "int4-32", "nf4"])
@pytest.mark.parametrize("tied", [False, True])
def test_the_last_adapter_stays_exact_on_top_and_the_others_are_added_before_rounding(tmp_path, form, tied):
    weights = write_model(tmp_path / "model", **WIDTHS, tie_word_embeddings=tied)
    made = adapters(tmp_path, weights)
    model, tokenizer = load(weights, made, "float64", form=form)
    wide, _ = load(weights, made[:1], "float32")  # the first adapter merged in fp32
    names = [name for name, module in wide.named_modules() if type(module) is torch.nn.Linear]
    for name in names:
        weight = wide.get_submodule(name).weight
        expected = QuantizedWeight.quantize([weight], tuple(weight.shape), form).dequantize(torch.float64)
        assert torch.equal(model.get_submodule(name).quantized.dequantize(torch.float64), expected), name
    plain = quantize_model(wide, form).double()
    plain = dequantized(plain)
    load_adapter(plain, made[1])
    for prompt, out in zip(PROMPTS, Generator(model, tokenizer).generate(PROMPTS, max_new_tokens=8), strict=True):
        assert out.tokens == plain_greedy(plain, prompt, 8, tokenizer.stop_ids)[0]


def test_an_unknown_format_is_refused_before_anything_is_read(tmp_path):
    with pytest.raises(UserError, match="did you mean 'int4"):
        load(tmp_path / "nothing", form="int-4")


PEAK = """
import sys
from infer.engine.load import load
from infer.engine.cache import Cache
from infer.engine.tree import build_tree

def most():  # kB, of this program alone: getrusage's would begin with that of the program that started it
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))

load(sys.argv[2], form="int8")  # what is imported and measured once is not the loader's
before = most()
model, _ = load(sys.argv[1], dtype="bfloat16", form="int4")
kept = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
print((most() - before) * 1024 - kept)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is read as Linux reports it")
def test_loading_holds_one_tensor_at_a_time(tmp_path, weights):
    """A checkpoint of 200 MB in bf16 (its largest tensor 17 MB) is read with 100 MB beside the quantized model."""
    model = tiny_model(
        dtype=torch.bfloat16,
        windows=(None,) * 4,
        num_hidden_layers=4,
        hidden_size=1024,
        intermediate_size=8192,
        head_dim=128,
    )
    model.save_pretrained(tmp_path / "large")
    write_tokenizer(tmp_path / "large")
    assert sum(p.numel() * 2 for p in model.parameters()) > 200e6
    del model
    said = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path / "large"), str(weights)], capture_output=True, text=True, check=True
    )
    assert int(said.stdout.split()[-1]) < 100e6


@pytest.mark.parametrize("bias", [False, True])
def test_onednns_product_of_one_row_is_as_exact_as_the_plain_one(bias):
    """In fp32, judged in fp64 over many rows: at most twice the default product's error."""
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(96, 576, generator=generator), torch.randn(200, 576, generator=generator)
    bias_O = torch.randn(96, generator=generator) if bias else None
    truth = torch.nn.functional.linear(x.double(), weight.double(), None if bias_O is None else bias_O.double())
    ours = torch.cat([onednn(row, weight, bias_O) for row in x.split(1)])
    plain = torch.cat([torch.nn.functional.linear(row, weight, bias_O) for row in x.split(1)])
    assert (ours.double() - truth).abs().max() <= 2 * (plain.double() - truth).abs().max()
    assert not use_onednn(x.double(), weight.double()) and not use_onednn(x.bfloat16(), weight.bfloat16())


@pytest.mark.parametrize("rows", [1, 4, 48])
def test_onednns_products_give_logits_as_exact_as_the_plain_path(rows, monkeypatch):
    """SmolLM2's widths, three layers, 48 tokens entered so many at a time: the logits' error against fp64 is at most
    twice the plain path's, the largest and the mean."""
    monkeypatch.setattr("model.support.hardware.prefers_onednn", lambda: True)
    widths = {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "num_hidden_layers": 3,
        "windows": (None,) * 3,
    }
    exact = init_weights(Transformer(replace(CONFIG, **widths)), 0).requires_grad_(False)
    for parameter in exact.parameters():
        if parameter.dim() > 1:
            parameter.mul_(2)  # attention that is not uniform
    fp32, exact = deepcopy(exact), exact.double()
    ids_1T = torch.randint(0, 250, (1, 48), generator=torch.Generator().manual_seed(0))
    prefixes, branches = build_tree([ids_1T[0].tolist()])
    engine = Engine(fp32)
    cache = Cache(engine, prefixes, branches)
    x_TD = torch.cat([cache.step(part, torch.tensor([rows]))[0] for part in ids_1T.split(rows, dim=1)])
    truth_TV = exact(ids_1T)[0]
    ours, plain = ((logits.double() - truth_TV).abs() for logits in (engine.logits(x_TD), fp32(ids_1T)[0]))
    assert ours.max() <= 2 * plain.max() and ours.square().mean().sqrt() <= 2 * plain.square().mean().sqrt()


@pytest.mark.parametrize("form", ["int4", "nf4"])
def test_the_kernels_take_narrow_layers_as_they_are(form):
    """fuse() hands a layer's own codes to kernels/int4.py; here their definitions run."""
    model = tiny_model(**WIDTHS)
    for path, module in list(model.named_modules()):
        if type(module) is torch.nn.Linear:
            weight = module.weight.detach()
            quantized = QuantizedWeight.quantize([weight], tuple(weight.shape), form)
            model.set_submodule(path, QuantizedLinear(quantized, module.bias))
    tokens = torch.arange(30)[None]
    plain = model(tokens)
    fused = fuse(model)
    assert isinstance(fused.model.layers[0].mlp.down_proj, Int4Linear) == (form == "int4")
    assert (fused(tokens) - plain).abs().max() <= 1e-12 * plain.abs().max()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_rotated_as_it_is_read_is_the_model_rotated_in_memory(tmp_path, family):
    """Codes, norms, embedding, biases and routers; and the function is near the plain model's."""
    weights = write_model(tmp_path / "model", **WIDTHS, **family)
    plain = Transformer.from_pretrained(weights).requires_grad_(False)
    for name, parameter in plain.named_parameters():
        if parameter.dim() == 1:  # gains and biases that count
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
    plain.save_pretrained(weights)
    read = load_quantized(weights, (), "w8a8", torch.float64, "cpu")
    held = quantize_model(deepcopy(plain), "w8a8").double()
    tokens = torch.arange(60)[None]
    truth = plain.double()(tokens)
    assert (read(tokens) - held(tokens)).abs().max() <= 1e-5 * truth.abs().max()
    error, size = (read(tokens) - truth).norm(dim=-1), truth.norm(dim=-1)
    assert error.median() <= 0.05 * size.median()  # of most tokens: rounding may change a router's choice


@pytest.mark.parametrize("tied", [False, True])
def test_adapters_turn_with_a_rotated_base(tmp_path, tokenizer, tied):
    """The first adapter is added before rounding, the last is exact beside the codes: what it adds to each layer is
    what it adds to the plain one, seen in the layer's new basis."""
    weights = write_model(tmp_path / "model", **WIDTHS, tie_word_embeddings=tied)
    made = adapters(tmp_path, weights)
    model = load_adapter(load_quantized(weights, made[:1], "w8a8", torch.float64, "cpu"), made[1])
    wide = rotate(load(weights, made[:1], "float64")[0])
    load_adapter(wide, made[1])
    for path, layer in adapted(wide).items():
        own = model.get_submodule(path)
        assert (own.delta("default") - layer.delta("default")).abs().max() <= 1e-6 * layer.delta("default").abs().max()
        weight = own.quantized.dequantize(torch.float64)
        near = mix(layer.weight) if own.quantized.mixed else layer.weight
        assert (weight - near).abs().max() <= 0.51 * own.quantized.scales.max()
        x_ND = torch.randn(7, own.in_features, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
        beside = own.double()(x_ND.double()) - own.quantized.product(x_ND.double())  # exact, not through the codes
        assert torch.allclose(beside, x_ND.double() @ own.delta("default").t(), rtol=0, atol=1e-12)
    for prompt, out in zip(PROMPTS, Generator(model, tokenizer).generate(PROMPTS, max_new_tokens=8), strict=True):
        assert out.tokens == plain_greedy(model, prompt, 8, tokenizer.stop_ids)[0]  # the engine's are the modules'
    tokens = torch.arange(60)[None]
    assert (wide(tokens) - load(weights, made, "float64")[0](tokens)).abs().max() <= 1e-6


@pytest.mark.parametrize("changes", [{}, {"qkv_bias": True}, {"windows": (5, None)}])
def test_w8a8_generates_the_plain_paths_tokens(tokenizer, changes):
    """In fp64 the engine's joint products are the modules' own."""
    model = quantize_model(tiny_model(**WIDTHS, **changes), "w8a8")
    again = quantize_model(tiny_model(**WIDTHS, **changes), "w8a8")
    for prompt, out in zip(PROMPTS, Generator(model, tokenizer).generate(PROMPTS, max_new_tokens=8), strict=True):
        assert out.tokens == plain_greedy(again, prompt, 8, tokenizer.stop_ids)[0]


def test_a_rotated_model_generates_the_plain_models_tokens(tokenizer):
    plain, turned = tiny_model(**WIDTHS), rotate(tiny_model(**WIDTHS))
    texts = [
        [out.tokens for out in Generator(model, tokenizer).generate(PROMPTS, max_new_tokens=12)]
        for model in (plain, turned)
    ]
    assert texts[0] == texts[1]


def test_w8a8_is_refused_by_name_without_integer_products():
    check_format("w8a8", "cpu", "flags : avx2 avx512_vnni")
    check_format("int8", "cpu", "flags : avx2")
    with pytest.raises(UserError, match="take int8 or int4"):
        check_format("w8a8", "cpu", "flags : avx2 fma f16c")
