"""Held against peft itself: every field that it writes is understood or refused; one step has the same bits."""

import copy
import dataclasses
import json

import pytest
import torch
from tiny_adapters import CONFIG, TOKENS, base, trained

from lora import LoRAConfig, load_adapter, save_adapter
from lora.adapter import adapted
from lora.peft import HARMLESS, INITIALIZATIONS, LIMITED, READ, REFUSED, read_config
from model.support.cli import UserError

peft = pytest.importorskip("peft", reason="needs peft: make test installs it")
transformers = pytest.importorskip("transformers", reason="needs transformers: make test installs it")


def test_every_field_of_the_installed_peft_is_understood_or_refused_by_name():
    fields = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    known = [*READ, *LIMITED, *HARMLESS, *REFUSED]
    assert not fields - {*known}, "peft has new fields: read what they do, then name them here"
    assert len({*known}) == len(known)


def write(folder, **fields):
    """adapter_config.json as peft itself writes it, with some fields changed."""
    peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM").save_pretrained(folder)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    return folder


def test_what_peft_writes_by_default_is_read_and_each_refused_field_is_named(tmp_path):
    assert read_config(write(tmp_path)) == LoRAConfig(r=4, alpha=8.0, target_modules=("q_proj",))
    for key in REFUSED:
        with pytest.raises(UserError, match=f"{key} is not supported"):
            read_config(write(tmp_path, **{key: {"some": 1}}))
    for start in ("pissa", "pissa_niter_4", "olora", "corda", "loftq", "mica", "lora_ga"):
        with pytest.raises(UserError, match=f"init_lora_weights '{start}' is not supported; it changes the base"):
            read_config(write(tmp_path, init_lora_weights=start))
    assert all(read_config(write(tmp_path, init_lora_weights=start)).r == 4 for start in INITIALIZATIONS)
    for wrong, said in (
        ({"bias": "some"}, "bias 'some'"),
        ({"layers_pattern": "blocks"}, "layers_pattern 'blocks'"),
        ({"lora_alpha": [2]}, "has the wrong type"),
        ({"target_modules": [1, "a"]}, "has the wrong type"),
        ({"lora_alpha": 0}, "above 0"),
        ({"rank_pattern": {"(": 2}}, "not a regular expression"),
        ({"peft_type": "IA3"}, "only LoRA"),
        ({"r": None}, "lacks r"),
    ):
        with pytest.raises(UserError, match=said):
            read_config(write(tmp_path, **wrong))


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": "all-linear"},
        {"target_modules": r".*\.(q|down)_proj"},
        {"target_modules": ["q_proj", "mlp.up_proj"], "exclude_modules": ["layers.0.mlp.up_proj"]},
        {"target_modules": "all-linear", "exclude_modules": r".*\.1\..*"},
        {"target_modules": ["v_proj", "o_proj"], "layers_to_transform": [1], "rank_pattern": {"o_proj": 2, "v.*": 3}},
        {"target_modules": ["v_proj", "o_proj"], "alpha_pattern": {r"layers\.0\..*": 3}, "use_rslora": True},
        {"target_modules": ["v_proj"], "layers_to_transform": []},
    ],
)
def test_modules_ranks_and_scales_are_chosen_as_peft_chooses_them(fields, tmp_path):
    """peft builds and saves, we load and save again, and peft loads that: every module, rank, scale and number."""
    base().save_pretrained(tmp_path / "base")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", attn_implementation="eager")
    config = peft.LoraConfig(r=4, lora_alpha=6, task_type="CAUSAL_LM", init_lora_weights=False, **fields)
    theirs = peft.get_peft_model(theirs, config)
    theirs.save_pretrained(tmp_path / "adapter")
    ours = load_adapter(base(), tmp_path / "adapter")
    scales = scales_of(theirs)
    assert scales == {path: layer.scale["default"] for path, layer in adapted(ours).items()}
    assert 0 < len(scales) <= 7 * CONFIG.num_hidden_layers
    wrong = (ours(TOKENS) - theirs(TOKENS).logits).abs().max()
    assert wrong < 1e-5 * ours(TOKENS).abs().max()
    save_adapter(ours, tmp_path / "back")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", attn_implementation="eager")
    again = peft.PeftModel.from_pretrained(again, tmp_path / "back")
    assert scales_of(again) == scales and torch.equal(again(TOKENS).logits, theirs(TOKENS).logits)
    first, second = (peft.get_peft_model_state_dict(model) for model in (theirs, again))
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def scales_of(model):
    return {
        path.removeprefix("base_model.model."): module.scaling["default"]
        for path, module in model.named_modules()
        if hasattr(module, "lora_A")
    }


def loss_of(model, tokens):
    out = model(tokens)
    logits = out.logits if hasattr(out, "logits") else out
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    return logits.detach()


@pytest.mark.parametrize("alpha", [8.0, 5.0])
def test_forward_gradients_and_one_adamw_step_are_pefts(alpha, tmp_path):
    """Bit for bit in fp32 where s = alpha / r is a power of two; else the order of s · B A x rounds differently, and
    our error against fp64 is at most twice theirs."""
    base().save_pretrained(tmp_path / "base")
    save_adapter(trained(LoRAConfig(r=4, alpha=alpha)), tmp_path / "adapter")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", attn_implementation="eager")
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter", is_trainable=True)
    ours = load_adapter(base(), tmp_path / "adapter")
    judge = copy.deepcopy(ours).double()
    models = (ours, theirs, judge)
    steps = [torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=1e-2) for m in models]
    found = [[logits] for logits in (loss_of(m, TOKENS) for m in models)]
    for step in steps:
        step.step()
    for path, layer in adapted(ours).items():
        their_layer, true_layer = theirs.base_model.model.get_submodule(path), judge.get_submodule(path)
        for kind in ("lora_A", "lora_B"):
            pairs = (
                getattr(layer, kind)["default"],
                getattr(their_layer, kind)["default"].weight,
                getattr(true_layer, kind)["default"],
            )
            for values, param in zip(found, pairs, strict=True):
                values += [param.grad, param.detach()]
    for mine, other, truth in zip(*found, strict=True):
        assert truth.abs().max() > 0
        if alpha == 8.0:
            assert torch.equal(mine, other)
        assert (mine.double() - truth).abs().max() <= 2 * (other.double() - truth).abs().max()
    save_adapter(ours, tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    if alpha == 8.0:
        ours, theirs = ((tmp_path / who / "adapter_model.safetensors").read_bytes() for who in ("ours", "theirs"))
        from safetensors.torch import load

        ours, theirs = load(ours), load(theirs)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
