"""Generation from a fused model is the plain model's: here in fp64, where the kernels' definitions always compute.

tests/kernels/test_generation.py holds the kernels themselves to it.
"""

import json
from copy import deepcopy

import pytest
import torch
from answering_models import tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

from infer import generate
from infer.engine.fuse import FusedBlock, Int4Linear, fuse
from infer.engine.generate import Generator
from infer.engine.load import load
from infer.engine.settings import Hidden, Settings
from infer.extract import program as extract
from infer.extract.ask import Asker, Limits
from infer.extract.notes import Note
from lora import LoRAConfig, add_lora, save_adapter
from model.quantize.linear import QuantizedLinear, QuantizedWeight
from model.support.cli import UserError

MODELS = {
    "full": {},
    "window": {"windows": (7, 7)},
    "mixed": {"windows": (None, 5)},
    "tied-bias": {"tie_word_embeddings": True, "qkv_bias": True, "model_type": "qwen2"},
    "experts": {"model_type": "mixtral", "num_local_experts": 3, "num_experts_per_tok": 2},
}
token = st.integers(0, 250)


def pair(tokenizer, model, **options) -> tuple[Generator, Generator]:
    """(plain, fused) generators over the same weights."""
    return Generator(deepcopy(model), tokenizer, **options), Generator(fuse(deepcopy(model)), tokenizer, **options)


def adapted(model):
    """Adapters on every linear layer, B not zero, their scale a power of two: fp32 B times it is exact."""
    add_lora(model, LoRAConfig(r=4, alpha=8, target_modules="all-linear"), seed=1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)) / 4
    return model


def alike(plain: Generator, fused: Generator, prompts, **options) -> None:
    theirs, ours = (generator.generate(prompts, max_new_tokens=10, **options) for generator in (plain, fused))
    for a, b in zip(theirs, ours, strict=True):
        assert a.tokens == b.tokens
        assert torch.allclose(torch.tensor(a.logprobs), torch.tensor(b.logprobs), rtol=0, atol=1e-9)


@st.composite
def trees(draw) -> list[list[int]]:
    """Prompts that share beginnings of two depths, and one that shares nothing."""
    trunk, branch = (draw(st.lists(token, min_size=0, max_size=60)) for _ in range(2))
    ends = draw(st.lists(st.lists(token, min_size=1, max_size=70), min_size=1, max_size=5))
    starts = [trunk, trunk + branch, trunk + branch, [], trunk]
    return [start + end for start, end in zip(starts, ends, strict=False)]


@pytest.mark.parametrize("kind", MODELS)
@settings(deadline=None, max_examples=8)
@given(prompts=trees(), chunk=st.sampled_from([16, 2048]))
def test_greedy_tokens_are_the_plain_models(kind, prompts, chunk, tokenizer):
    alike(*pair(tokenizer, tiny_model(**MODELS[kind]), chunk=chunk), prompts)


@pytest.mark.parametrize("kind", ["full", "window", "mixed"])
def test_what_is_hidden_is_hidden_from_kernels_too(kind, tokenizer):
    text = [(3 * i) % 250 for i in range(60)]
    prompts = [[*text, 7, 8], [*text, 7, 9], [*text, 11]]
    hidden = [Hidden(20, 30, 60), None, Hidden(50, 58, 60)]
    each = [Settings(max_new_tokens=10, hidden=one) for one in hidden]
    plain, fused = pair(tokenizer, tiny_model(**MODELS[kind]))
    for a, b in zip(plain.generate(prompts, each), fused.generate(prompts, each), strict=True):
        assert torch.allclose(torch.tensor(a.logprobs), torch.tensor(b.logprobs), rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", ["full", "window", "mixed"])
def test_text_far_beyond_the_window(kind, tokenizer):
    """Leaves let old slots go and grow by new ones; one of them ends before the others."""
    plain, fused = pair(tokenizer, tiny_model(**MODELS[kind]))
    prompts = [[(step * i) % 200 for i in range(length)] for step, length in ((3, 150), (5, 40), (3, 99))]
    theirs, ours = (
        generator.generate(prompts, [generate.Settings(max_new_tokens=n) for n in (90, 60, 5)])
        for generator in (plain, fused)
    )
    assert [out.tokens for out in ours] == [out.tokens for out in theirs]


@pytest.mark.parametrize("form", ["int4", "nf4", "int8"])
def test_narrow_weights_keep_their_codes_and_adapters_stay_beside_them(form, tokenizer):
    model = tiny_model(hidden_size=64, intermediate_size=128, head_dim=16, qkv_bias=True)
    for path, module in list(model.named_modules()):  # not packed: no CPU's, as a GPU gets them
        if type(module) is torch.nn.Linear and path != "lm_head":
            weight = module.weight.detach()
            quantized = QuantizedWeight.quantize([weight], tuple(weight.shape), form)
            model.set_submodule(path, QuantizedLinear(quantized, module.bias))
    plain, fused = pair(tokenizer, adapted(model))
    assert isinstance(fused.engine.layers[0].mlp.down_proj, Int4Linear) == (form == "int4")
    alike(plain, fused, [[1, 2, 3, *range(40)], [1, 2, 3], [*range(40), 7]])


@settings(deadline=None, max_examples=10)
@given(period=st.integers(2, 30), prompts=st.integers(1, 4))
def test_prompt_lookup_loses_nothing(period, prompts, tokenizer):
    for kind in ("full", "window"):
        plain, fused = pair(tokenizer, tiny_model(**MODELS[kind]))
        fused.row_cost = 0.0  # guesses are always worth checking
        alike(plain, fused, [[(11 * i + n) % period for i in range(60)] for n in range(prompts)])


def test_grounded_records_are_the_plain_models(tokenizer):
    notes = [Note("a", "Tumor of 2.5 cm, left breast. ER+."), Note("b", "Grade 2 of the right lung " * 6)]
    plain, fused = (
        Asker(generator, "both", "template", Limits(1500, 8, 20), grounded=True).records(notes)
        for generator in pair(tokenizer, tiny_model(windows=(None, 40)))
    )
    assert [extract_texts(record) for record in fused] == [extract_texts(record) for record in plain]


def extract_texts(record: dict) -> list:
    answers = [[a["text"] for a in asked["answers"]] for asked in record["phenotypes"].values()]
    return [*answers, record["diagnosis"]["text"], record["tokens"]]


def test_the_programs_fuse_when_asked(weights, tmp_path, capsys):
    """The same answers, by fused blocks; a job goes on only as it began."""
    model, tokenizer = load(weights, dtype="float64")
    save_adapter(adapted(model.float()), tmp_path / "adapter")
    assert isinstance(load(weights, [tmp_path / "adapter"], "bfloat16", fused=True)[0].model.layers[0], FusedBlock)
    assert not isinstance(load(weights, [tmp_path / "adapter"])[0].model.layers[0], FusedBlock)
    (tmp_path / "n.jsonl").write_text('{"id": "a", "text": "Tumor of 2.5 cm"}\n{"id": "b", "text": "Left breast."}\n')
    said = {}
    for fused in (False, True):
        given = {"weights": str(weights), "adapter": (str(tmp_path / "adapter"),), "dtype": "float64", "fuse": fused}
        out = tmp_path / f"{fused}.jsonl"
        options = extract.Options(notes=tmp_path / "n.jsonl", out=out, max_new_tokens=5, max_new_diagnosis=5, **given)
        assert extract.main(options) == 0
        options = generate.Options(prompt="Tumor of 2", settings=Settings(max_new_tokens=8), json=True, **given)
        assert generate.main(options) == 0
        tokens = json.loads(capsys.readouterr().out.splitlines()[-1])["tokens"]
        said[fused] = [extract_texts(json.loads(line)) for line in out.read_text().splitlines()], tokens
    assert said[True] == said[False] and said[True][1]
    with pytest.raises(UserError, match="another job"):
        extract.main(
            extract.Options(
                notes=tmp_path / "n.jsonl",
                out=tmp_path / "True.jsonl",
                max_new_tokens=5,
                max_new_diagnosis=5,
                **{**given, "fuse": False},
            )
        )


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_memory_is_not_planned_for_definitions(weights, tmp_path):
    for program, options in (
        (generate, generate.Options("Tumor", weights=str(weights), memory="6GB", fuse=True)),
        (extract, extract.Options(tmp_path / "n", tmp_path / "o", weights=str(weights), memory="6GB", fuse=True)),
    ):
        with pytest.raises(UserError, match="leave one out"):
            program.main(options)
