"""A fused model is the plain model: kernels interpreted (or compiled, where there is a device), judged in fp64."""

import copy

import pytest
import torch
from torch import nn

from infer.engine.compiled import decode_step, slots
from infer.engine.forward import Engine
from infer.engine.fuse import Int4Linear, fuse
from lora import LoRAConfig, add_lora
from model import KVCache, ModelConfig, Transformer
from model.mask import Layout
from model.support.init import init_weights

BASE = {
    "model_type": "mistral",
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 61,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "sliding_window": 5,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
FAMILIES = {
    "mistral": {},
    "qwen2": {"model_type": "qwen2", "sliding_window": None},
    "mixtral": {"model_type": "mixtral", "num_local_experts": 3, "num_experts_per_tok": 2, "num_hidden_layers": 1},
}


def tiny(dtype, device, adapted=True, **changes) -> Transformer:
    """Random weights and adapters whose B is not zero."""
    model = init_weights(Transformer(ModelConfig.from_dict({**BASE, **changes})), 3)
    if adapted:
        feed = "w3" if model.config.num_local_experts else "up_proj"
        add_lora(model, LoRAConfig(r=3, alpha=6, dropout=0.0, target_modules=("q_proj", "v_proj", "o_proj", feed)))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(parameter + noise * (0.05 if parameter.dim() > 1 else 0.2))
    return model.to(device, dtype).requires_grad_(False).eval()


def tokens_of(device, rows=2, count=9):
    return torch.randint(0, 61, (rows, count), generator=torch.Generator().manual_seed(1)).to(device)


@torch.inference_mode()
def whole(model, tokens_BT):
    return model(tokens_BT)


@torch.inference_mode()
def step_by_step(model, tokens_BT):
    """A prompt of four tokens, then one at a time from the cache."""
    cache = KVCache(model.config, slack=2)
    parts = [model(tokens_BT[:, :4], cache=cache)]
    parts += [model(tokens_BT[:, i : i + 1], cache=cache) for i in range(4, tokens_BT.shape[1])]
    return torch.cat(parts, dim=1)


@torch.inference_mode()
def packed(model, tokens_BT):
    """Two documents in a row, the second with a branch."""
    row = lambda *values: torch.tensor([values] * len(tokens_BT), device=tokens_BT.device)  # noqa: E731
    layout = Layout(row(0, 0, 0, 0, 1, 1, 1, 1, 1), row(0, 0, 0, 0, 0, 0, 1, 1, 2))
    return model(tokens_BT, positions=row(0, 1, 2, 3, 0, 1, 2, 3, 2), layout=layout)


@torch.inference_mode()
def branched(model, tokens_BT):
    """A trunk of five tokens in the cache, then two branches side by side."""
    row = lambda *values: torch.tensor([values] * len(tokens_BT), device=tokens_BT.device)  # noqa: E731
    cache = KVCache(model.config, slack=16)
    none = row(0, 0, 0, 0, 0)
    trunk = model(tokens_BT[:, :5], positions=row(0, 1, 2, 3, 4), layout=Layout(none, none), cache=cache)
    layout = Layout(row(0, 0, 0, 0), row(1, 1, 2, 2))
    return torch.cat([trunk, model(tokens_BT[:, 5:], positions=row(5, 6, 5, 6), layout=layout, cache=cache)], dim=1)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("way", [whole, step_by_step, packed, branched])
def test_fp64_logits_are_the_plain_models(device, family, way):
    plain = tiny(torch.float64, device, **FAMILIES[family])
    fused = fuse(copy.deepcopy(plain))
    truth, ours = way(plain, tokens_of(device)), way(fused, tokens_of(device))
    assert float((ours - truth).abs().max()) <= 1e-12 * float(truth.abs().max())


@pytest.mark.parametrize("way", [whole, step_by_step, packed])
def test_fp32_logits_are_as_good_as_the_plain_models(device, as_good_as, way):
    plain = tiny(torch.float32, device, **FAMILIES["qwen2"], num_hidden_layers=1)
    truth = way(copy.deepcopy(plain).double(), tokens_of(device))
    as_good_as(way(fuse(copy.deepcopy(plain)), tokens_of(device)), way(plain, tokens_of(device)), truth)


def test_gradients_of_adapters_are_the_plain_models(device):
    plain = tiny(torch.float64, device)
    fused = fuse(copy.deepcopy(plain))
    found = []
    for model in (plain, fused):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" in name)
        model(tokens_of(device)).square().mean().backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() and found[0]
    for name, truth in found[0].items():
        assert float((found[1][name] - truth).abs().max()) <= 1e-12 * float(truth.abs().max()), name


def test_names_and_weights_stay(device):
    plain = tiny(torch.float32, device)
    before = plain.state_dict()
    after = fuse(fuse(plain)).state_dict()  # once more changes nothing
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_int4_is_the_plain_model_with_the_rounded_weights(device, as_good_as, dtype):
    rounded = tiny(dtype, device, num_hidden_layers=1)
    fused = fuse(copy.deepcopy(rounded), four_bit=True)
    held = {name: m for name, m in fused.named_modules() if isinstance(m, Int4Linear)}
    assert len(held) == 7
    exact = copy.deepcopy(rounded).double()
    for name, module in held.items():
        rounded.get_submodule(name).weight.data = module.weight.dequantize(dtype)
        exact.get_submodule(name).weight.data = module.weight.dequantize(torch.float64)
    truth, ours = step_by_step(exact, tokens_of(device)), step_by_step(fused, tokens_of(device))
    if dtype == torch.float64:
        assert float((ours - truth).abs().max()) <= 1e-12 * float(truth.abs().max())
    else:
        as_good_as(ours, step_by_step(rounded, tokens_of(device)), truth)


class Stepping(nn.Module):
    """The decode step over static slots, as a module whose buffers are the cache."""

    def __init__(self, model, rows, count):
        super().__init__()
        self.model, self.engine = model, Engine(model)
        self.step = decode_step(self.engine, count)
        for kind, layers in zip("kv", slots(self.engine, rows, count), strict=True):
            for layer, tensor in enumerate(layers):
                self.register_buffer(f"{kind}{layer}", tensor)

    def forward(self, tokens_B, position_B):
        layers = range(len(self.engine.layers))
        keys, values = ([getattr(self, f"{kind}{layer}") for layer in layers] for kind in "kv")
        return self.engine.logits(self.step(tokens_B, position_B, keys, values))


@torch.inference_mode()
def stepped(model, tokens_BT):
    """All tokens of the rows, one at a time, over static slots."""
    step, places = Stepping(model, *tokens_BT.shape), range(tokens_BT.shape[1])
    return torch.stack([step(tokens_BT[:, i], torch.full_like(tokens_BT[:, i], i)) for i in places], dim=1)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("four_bit", [False, True])
def test_a_static_step_is_the_plain_model(device, family, four_bit):
    """Twelve tokens: beyond the window, where there is one."""
    plain = tiny(torch.float64, device, **FAMILIES[family])
    fused = fuse(copy.deepcopy(plain), four_bit)
    for name, module in fused.named_modules():
        if isinstance(module, Int4Linear):
            plain.get_submodule(name).weight.data = module.weight.dequantize(torch.float64)
    tokens = tokens_of(device, count=12)
    truth, ours = whole(plain, tokens), stepped(fused, tokens)
    assert float((ours - truth).abs().max()) <= 1e-12 * float(truth.abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_static_step_by_the_kernels_is_as_good_as_the_plain_model(device, as_good_as, dtype):
    plain = tiny(dtype, device, num_hidden_layers=1)
    tokens = tokens_of(device, count=7)
    truth = whole(copy.deepcopy(plain).double(), tokens)
    as_good_as(stepped(fuse(copy.deepcopy(plain)), tokens), whole(plain, tokens), truth)


@pytest.mark.parametrize("four_bit", [False, True])
def test_a_static_step_exports_whole(four_bit):
    """What torch.export accepts has no branch on data and reads nothing back: a CUDA graph can capture it. fp64, so
    that the definitions are traced; the wrappers decide by shapes and dtypes in the same lines for the kernels."""
    step = Stepping(fuse(tiny(torch.float64, "cpu"), four_bit), 2, 12).eval()
    tokens, places = torch.tensor([3, 4]), torch.tensor([0, 0])
    exported = torch.export.export(step, (tokens, places), strict=False)
    reads = [node for node in exported.graph.nodes if "_local_scalar_dense" in str(node.target)]
    assert not reads
    module, again = exported.module(), Stepping(step.model, 2, 12)
    for place in range(9):  # positions are data: the trace of the first serves the ninth
        places = torch.full((2,), place)
        assert torch.equal(module(tokens + place, places), again(tokens + place, places))


def test_a_weight_that_is_trained_stays_with_torch(device):
    model = fuse(tiny(torch.float32, device, adapted=False, num_hidden_layers=1)).requires_grad_(True)
    model(tokens_of(device)).square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())
