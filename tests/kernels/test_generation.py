"""Generation with the kernels: the plain engine's tokens, and log-probabilities as close to fp64 as the plain engine's.

Interpreted where there is no CUDA device; `python -m pytest -m gpu tests/kernels` adds wider models in bf16 on one.
tests/infer/engine/test_fused.py has more shapes of prompts, by the kernels' definitions.
"""

import contextlib
from copy import deepcopy

import pytest
import torch
from answering_models import tiny_model, tiny_tokenizer  # noqa: E402

from infer.engine.fuse import Int4Linear, fuse  # noqa: E402
from infer.engine.generate import Generator, Settings  # noqa: E402
from infer.extract.grounded import Grammar, Grounded, Vocabulary  # noqa: E402
from kernels import launch  # noqa: E402
from lora import LoRAConfig, add_lora  # noqa: E402
from model.quantize.linear import QuantizedLinear, QuantizedWeight  # noqa: E402

NOTE, OTHER = [(7 * n) % 240 for n in range(30)], [(11 * n) % 240 for n in range(20)]
TREE = [
    [*NOTE, 3, 4],
    [*NOTE, *OTHER, 9],
    [*NOTE, *OTHER, 5, 6, 7],
    [200, 201],
]  # two depths of shared prefixes, and a prompt that shares nothing
WIDTHS = {"hidden_size": 64, "intermediate_size": 64, "head_dim": 16}
SCENES = {  # (changes to the model, weights' format, prompts, new tokens)
    "shared prefixes": ({}, None, TREE, 6),
    "a window that leaves shared prefixes behind": ({"windows": (None, 5)}, None, TREE, 6),
    "a rolling cache": ({"windows": (6, 6)}, None, [[*range(70)]], 36),
    "biases, tied": ({"qkv_bias": True, "tie_word_embeddings": True}, None, TREE[:2], 6),
    "int4 and LoRA": (WIDTHS, "int4-32", TREE[1:], 6),
    "nf4 and LoRA": (WIDTHS, "nf4", TREE[1:], 6),
    "guesses": ({}, None, [[*NOTE, *[1, 2, 3, 4, 5] * 5], [*NOTE, *[6, 7, 8] * 9]], 6),
}


@pytest.fixture(autouse=True)
def few_programs(device):
    """Plan for four SMs in the interpreter, which runs programs one after another."""
    with launch.assume_card(80, 4) if device == "cpu" else contextlib.nullcontext():
        yield


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def made(changes, form, size=1.0):
    """A random fp32 model with an adapter on every linear layer of the blocks; `size` scales its matrices."""
    model = tiny_model(dtype=torch.float32, **changes)
    for parameter in model.parameters():
        parameter.mul_(size if parameter.dim() > 1 else 1)
    for path, module in list(model.named_modules()):
        if form is not None and type(module) is torch.nn.Linear and path != "lm_head":
            weight = module.weight.detach()
            quantized = QuantizedWeight.quantize([weight], tuple(weight.shape), form)
            model.set_submodule(path, QuantizedLinear(quantized, module.bias))
    add_lora(model, LoRAConfig(r=3, alpha=8, target_modules="all-linear"), seed=1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)) / 4
    return model


def generated(model, tokenizer, prompts, new, note=None):
    """(tokens, log-probabilities); grounded in a note where one is given."""
    generator = Generator(model, tokenizer)
    generator.row_cost = 0.0  # speculate whenever there is a guess
    grammar = note and Grammar(Vocabulary(tokenizer), tokenizer.stop_ids, note=note)
    asked = [Settings(max_new_tokens=new, constraint=note and Grounded(grammar)) for _ in prompts]
    outs = generator.generate(prompts, asked)
    logprobs = torch.tensor([value for out in outs for value in out.logprobs], dtype=torch.float64)
    return [out.tokens for out in outs], logprobs


def hold(check, model, tokenizer, *asked):
    """Compares the fused model in fp32 with the plain engine in fp32 and in fp64. Returns the kernels that ran."""
    tokens, truth = generated(deepcopy(model).double(), tokenizer, *asked)
    plain_tokens, plain = generated(deepcopy(model), tokenizer, *asked)
    launch.used_configs.clear()
    ours_tokens, ours = generated(fuse(deepcopy(model)), tokenizer, *asked)
    assert ours_tokens == tokens == plain_tokens
    check(ours.float(), plain.float(), truth)
    return {kernel for kernel, _ in launch.used_configs}


@pytest.mark.parametrize("scene", SCENES)
def test_tokens_are_the_plain_engines(scene, device, as_good_as, tokenizer):
    changes, form, prompts, new = SCENES[scene]
    ran = hold(as_good_as, made(changes, form).to(device), tokenizer, prompts, new)
    assert ran >= {"attention", "rms_norm"} | ({"linear"} if form is None else set())


def test_a_grounded_answer_is_the_plain_engines(device, as_good_as, tokenizer):
    note = "Tumor of 2.5 cm, left breast"
    prompts = [f"{note}\n{question}" for question in ("size", "side")]
    assert hold(as_good_as, made({}, None).to(device), tokenizer, prompts, 8, note)


def test_a_narrow_layer_is_computed_from_its_codes():
    model = fuse(made(WIDTHS, "int4-32"))
    layer = model.model.layers[0].mlp.down_proj
    assert isinstance(layer, Int4Linear) and layer.words.dtype == torch.int16 and layer.adapter[0] is not None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("form", [None, "int4", "nf4"])
@pytest.mark.parametrize("windows", [(None, None), (None, 300)])
def test_on_a_device_in_bf16(windows, form, tokenizer):
    """Wide enough for full tiles: notes of 700 tokens, eight questions each. In bf16 near ties may go either way, so
    the fused model's tokens are scored by the plain model in bf16 and in fp64."""
    widths = {"hidden_size": 1024, "intermediate_size": 2048, "num_attention_heads": 8, "head_dim": 128}
    model = made({**widths, "windows": windows}, form, 1 / 4).to("cuda", torch.bfloat16)
    notes = [[(step * n) % 240 for n in range(700)] for step in (7, 11)]
    prompts = [[*note, *range(start, start + 12)] for note in notes for start in range(8)]
    outs = Generator(fuse(deepcopy(model)), tokenizer).generate(prompts, max_new_tokens=12)
    errors, exact = [], deepcopy(model).double()
    for prompt, out in zip(prompts, outs, strict=True):
        ids, place = torch.tensor([prompt + out.tokens], device="cuda"), slice(len(prompt) - 1, -1)
        truth, plain = (
            own(ids)[0, place].double().log_softmax(-1).gather(-1, ids[0, len(prompt) :, None])[:, 0].cpu()
            for own in (exact, model)
        )
        ours = torch.tensor(out.logprobs, dtype=torch.float64)
        errors.append(torch.stack([(ours - truth).square().sum(), (plain - truth).square().sum()]))
    ours, plain = torch.stack(errors).sum(0).sqrt()
    assert 0 < ours <= 2 * plain
