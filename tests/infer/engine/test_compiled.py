"""The step over static slots equals the plain model, eagerly and compiled; a compiler that fails costs one line."""

import contextlib
from copy import deepcopy

import pytest
import torch
from answering_models import make_mistake, plain_greedy, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

from infer import generate
from infer.engine import compiled
from infer.engine.fuse import fuse
from infer.engine.generate import Generator
from infer.engine.settings import Settings
from lora import LoRAConfig, add_lora
from model.quantize.linear import QuantizedLinear, quantize_model
from model.support.cli import UserError
from model.support.hardware import int8_products

KINDS = {
    "full": tiny_model(),
    "window": tiny_model(windows=(6, 6)),
    "mixed": tiny_model(windows=(5, None)),
    "bias": tiny_model(qkv_bias=True, tie_word_embeddings=True),
    "fused": fuse(tiny_model(windows=(5, None))),
}


def check(kind, lengths, news, tokenizer):
    """Prompts that share a beginning, each with its own end and number of new tokens."""
    model = KINDS[kind]
    prompts = [
        [(7 * i) % 250 for i in range(20)] + [(11 * i + row) % 250 for i in range(n)] for row, n in enumerate(lengths)
    ]
    each = [Settings(max_new_tokens=new) for new in news]
    outs = Generator(model, tokenizer, chunk=16, compile=True).generate(prompts, each)
    for prompt, new, out in zip(prompts, news, outs, strict=True):
        tokens, logprobs = plain_greedy(model, prompt, new, tokenizer.stop_ids)
        assert out.tokens == tokens
        assert torch.allclose(torch.tensor(out.logprobs), torch.tensor(logprobs), atol=1e-9)


@settings(deadline=None, max_examples=15)
@given(
    kind=st.sampled_from(list(KINDS)),
    sizes=st.lists(st.tuples(st.integers(1, 90), st.integers(1, 12)), min_size=1, max_size=6),
)
def test_the_step_over_static_slots_is_the_plain_models(kind, sizes, tokenizer):
    """Rows that end leave it. The function runs eagerly here."""
    with torch.compiler.set_stance("force_eager"):
        check(kind, [size for size, _ in sizes], [new for _, new in sizes], tokenizer)


MISTAKES = {  # of decode_step, StaticCache or copy_to_slots
    "a key's slot off by one": ("decode_step", "k_BGSK[row_B, :, position_B]", "k_BGSK[row_B, :, position_B - 1]"),
    "a value's slot off by one": ("decode_step", "v_BGSK[row_B, :, position_B]", "v_BGSK[row_B, :, position_B - 1]"),
    "an empty slot is seen": ("decode_step", "slot_S <= position_B[:, None]", "slot_S <= position_B[:, None] + 1"),
    "the mask of another row": (
        "decode_step",
        "slot_S <= position_B[:, None]",
        "slot_S <= position_B[:, None].roll(1, 0)",
    ),
    "the window is ignored": ("decode_step", "if window is None", "if True"),
    "the window is wider by one": ("decode_step", "- window", "- window - 1"),
    "a position used twice": ("step", "self.next_B + count_B", "self.next_B"),
    "the slots of an ended request": ("retain", "self.row_B[rows]", "self.row_B[: len(rows)]"),
    "the position of an ended request": ("retain", "self.next_B[rows]", "self.next_B[: len(rows)]"),
    "a prefix's slots off by one": ("copy_to_slots", "first : first + length]", "first + 1 : first + 1 + length]"),
    "another branch's keys": ("copy_to_slots", "own_BGCK[row,", "own_BGCK[row - 1,"),
}


@pytest.mark.parametrize("mistake", [None, *MISTAKES])
def test_a_mistake_in_the_step_is_noticed(mistake, tokenizer, monkeypatch):
    if mistake is None:
        seen = contextlib.nullcontext()
    else:
        name, right, wrong = MISTAKES[mistake]
        owner = compiled if hasattr(compiled, name) else compiled.StaticCache
        make_mistake(monkeypatch, owner, name, right, wrong)
        seen = pytest.raises(AssertionError)
    with torch.compiler.set_stance("force_eager"), seen:
        check("mixed", [3, 30, 5], [9, 4, 9], tokenizer)


def test_auto_compiles_where_the_new_tokens_repay_it():
    def compiles(new, **options):
        given = generate.Options(prompt="a", weights="w", settings=Settings(max_new_tokens=new), **options)
        return generate.compiles(given)

    few, many = generate.COMPILE_PAYS - 1, generate.COMPILE_PAYS
    assert compiles(many) and not compiles(few)
    assert compiles(few, compile="on") and not compiles(many, compile="off")
    assert not compiles(many, fuse=True) and not compiles(many, memory="6GB")


@pytest.mark.parametrize("other", [{"fuse": True}, {"memory": "6GB"}])
def test_options_that_do_not_go_together_are_refused(other):
    with pytest.raises(UserError, match="--compile .*; leave one out"):
        generate.main(generate.Options(prompt="a", weights="none", compile="on", **other))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full", "mixed"])
def test_the_compiled_step_is_the_plain_models(kind, tokenizer):
    check(kind, [3, 70, 5], [9, 4, 9], tokenizer)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", ["mixed", "fused"])
def test_the_step_as_a_cuda_graph_gives_the_eager_ones_tokens(kind, tokenizer):
    model = deepcopy(KINDS[kind]).cuda()
    eager, ours = (Generator(model, tokenizer, compile=how).generate(PROMPTS, max_new_tokens=12) for how in (0, 1))
    assert [out.tokens for out in ours] == [out.tokens for out in eager]


FORMS = ("wide", "int8", "int4", "w8a8")
PROMPTS = [[*range(20), *range(100, 105 + 20 * row)] for row in range(3)]


def adapted_model(form, dtype):
    """One layer with a window, quantized and packed as load_quantized does it, and an adapter on top."""
    widths = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    model = tiny_model(windows=(6,), num_hidden_layers=1, dtype=dtype, **widths)
    for module in () if form == "wide" else quantize_model(model, form).modules():
        if isinstance(module, QuantizedLinear):
            module.quantized.pack()
    for name, parameter in add_lora(model, LoRAConfig(r=4, alpha=8), seed=1).named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1, generator=torch.Generator().manual_seed(2))
    return model.requires_grad_(False)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_the_compiled_step_gives_the_eager_ones_tokens(form, tokenizer, capsys):
    """In fp64, with an adapter: greedy, sampled, and up to a stop string."""
    torch.compiler.reset()
    model = adapted_model(form, torch.float64)
    text = Generator(model, tokenizer).generate(PROMPTS[2:], max_new_tokens=12)[0].text
    each = [Settings(12), Settings(12, temperature=1.0, top_p=0.9, seed=5), Settings(12, stop=(text[3:5],))]
    eager, ours = (Generator(model, tokenizer, compile=how).generate(PROMPTS, each) for how in (False, True))
    assert ours[2].finish_reason == "stop_string"
    for one, other in zip(ours, eager, strict=True):
        assert (one.tokens, one.text, one.finish_reason) == (other.tokens, other.text, other.finish_reason)
        assert torch.allclose(torch.tensor(one.logprobs), torch.tensor(other.logprobs), rtol=0, atol=1e-9)
    assert not capsys.readouterr().err  # it was compiled


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "dtype"), [*((form, torch.float32) for form in FORMS), ("wide", torch.bfloat16), ("w8a8", torch.bfloat16)]
)
def test_the_compiled_step_errs_at_most_twice_as_much_as_the_eager_one(form, dtype, tokenizer, capsys):
    """The error of the answers' log-probabilities against fp64, root mean square."""
    if form == "w8a8" and not int8_products():
        pytest.skip("this processor's sums of 8-bit products saturate")
    torch.compiler.reset()
    model = adapted_model(form, dtype)
    exact = deepcopy(model).double()
    errors = []
    for how in (True, False):
        outs = Generator(model, tokenizer, compile=how).generate(PROMPTS, max_new_tokens=24)
        squares = []
        for prompt, out in zip(PROMPTS, outs, strict=True):
            ids, answer = torch.tensor([prompt + out.tokens]), slice(len(prompt) - 1, -1)
            truth_TV = exact(ids)[0, answer].log_softmax(-1)
            truth_T = truth_TV.gather(-1, torch.tensor(out.tokens)[:, None])[:, 0]
            squares.append((torch.tensor(out.logprobs, dtype=torch.float64) - truth_T).square())
        errors.append(float(torch.cat(squares).mean().sqrt()))
    assert 0 < errors[0] <= 2 * errors[1]
    assert not capsys.readouterr().err  # it was compiled


@pytest.mark.slow
def test_more_sizes_than_torch_compiles_run_uncompiled(tokenizer, capsys):
    torch.compiler.reset()
    with torch._dynamo.config.patch(recompile_limit=1):
        for sizes in ([4], [4, 5, 6]):
            check("full", sizes, [5] * len(sizes), tokenizer)
    assert capsys.readouterr().err.count("--compile: the step cannot be compiled") == 1
    torch.compiler.reset()


@pytest.mark.slow
def test_without_a_compiler_the_step_runs_uncompiled(tokenizer, capsys):
    torch.compiler.reset()
    with torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",), "force_disable_caches": True}):
        check("full", [4], [5], tokenizer)
    said = capsys.readouterr().err
    assert said.startswith("--compile: the step cannot be compiled and runs uncompiled (") and said.count("\n") == 1
