"""Adapters from elsewhere: the tensors are what counts, what is harmless loads as in peft, and no file costs more than
it should."""

import json
import os
import signal
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_adapters import TOKENS, base, trained

from lora import LoRAConfig, add_lora, load_adapter, save_adapter
from lora.merge import merge_folders
from lora.peft import AdapterFile, read_config
from model import Transformer
from model.support.cli import UserError

CONFIG = LoRAConfig(r=2, target_modules=("q_proj", "v_proj"))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(the base's folder, an adapter's folder, the logits of both together)."""
    folder = tmp_path_factory.mktemp("made")
    base().save_pretrained(folder / "base")
    model = trained(CONFIG)
    save_adapter(model, folder / "a")
    return folder / "base", folder / "a", model(TOKENS)


def changed(source, folder, fields=None, rename=None, extra=None):
    """A copy of an adapter with other fields, names, or more tensors."""
    folder.mkdir()
    raw = json.loads((source / "adapter_config.json").read_text()) | (fields or {})
    (folder / "adapter_config.json").write_text(json.dumps(raw))
    tensors = load_file(source / "adapter_model.safetensors")
    save_file(
        {(rename or str)(key): value for key, value in tensors.items()} | (extra or {}),
        folder / "adapter_model.safetensors",
    )
    return folder


HARMLESS = {
    "absent target": {"fields": {"target_modules": ["q_proj", "v_proj", "query_key_value"]}},
    "adapter's name in the keys": {"rename": lambda key: key.replace(".weight", ".default.weight")},
    "fan_in_fan_out": {"fields": {"fan_in_fan_out": True}},
    "biases of a model without": {"fields": {"bias": "lora_only"}},
    "a later number": {"fields": {"some_future_field": 3}},
}


@pytest.mark.parametrize("case", HARMLESS)
@pytest.mark.filterwarnings("ignore:.*some_future_field")
def test_what_changes_nothing_loads_and_merges_as_in_peft(case, made, tmp_path):
    weights, adapter, expected = made
    folder = changed(adapter, tmp_path / "b", **HARMLESS[case])
    assert torch.equal(load_adapter(base(), folder)(TOKENS), expected)
    merge_folders(str(weights), str(folder), str(tmp_path / "merged"))
    assert torch.allclose(Transformer.from_pretrained(tmp_path / "merged")(TOKENS), expected, atol=1e-5)
    peft, transformers = (
        pytest.importorskip("peft", reason="needs peft: make test installs it"),
        pytest.importorskip("transformers", reason="needs transformers: make test installs it"),
    )
    theirs = transformers.AutoModelForCausalLM.from_pretrained(weights, attn_implementation="eager")
    assert torch.allclose(peft.PeftModel.from_pretrained(theirs, folder)(TOKENS).logits, expected, atol=1e-5)


@pytest.mark.parametrize(
    "key, name",
    [
        ("lm_head.weight", "lm_head.weight"),
        ("lm_head.base_layer.weight", "lm_head.weight"),
        ("lm_head.modules_to_save.weight", "lm_head.weight"),
        ("model.embed_tokens.weight", "model.embed_tokens.weight"),
        ("model.embed_tokens.modules_to_save.default.weight", "model.embed_tokens.weight"),
    ],
)
def test_a_copy_of_the_bases_weight_loads_and_a_trained_one_is_refused(key, name, made, tmp_path):
    weights, adapter, expected = made
    weight = base().get_parameter(name).detach().clone()
    saved = {"modules_to_save": [name.split(".")[-2]]}
    folder = changed(adapter, tmp_path / "b", saved, extra={f"base_model.model.{key}": weight})
    assert torch.equal(load_adapter(base(), folder)(TOKENS), expected)
    merge_folders(str(weights), str(folder), str(tmp_path / "merged"))
    weight[0, 0] += 1
    other = changed(adapter, tmp_path / "c", saved, extra={f"base_model.model.{key}": weight})
    for load in (
        lambda: load_adapter(base(), other),
        lambda: merge_folders(str(weights), str(other), str(tmp_path / "no")),
    ):
        with pytest.raises(UserError, match="is not the base's"):
            load()
    longer = {f"base_model.model.{key}": torch.cat([weight, weight[:1]])}
    with pytest.raises(UserError, match="no place for"):
        load_adapter(base(), changed(adapter, tmp_path / "d", saved, extra=longer))


def test_an_adapter_on_the_head_is_refused_everywhere(made, tmp_path):
    _, adapter, _ = made
    with pytest.raises(UserError, match="lm_head is not supported"):
        add_lora(base(), LoRAConfig(target_modules=("q_proj", "lm_head")))
    head = {
        "base_model.model.lm_head.lora_A.weight": torch.zeros(2, 24),
        "base_model.model.lm_head.lora_B.weight": torch.zeros(61, 2),
    }
    for targets in (["q_proj", "v_proj", "lm_head"], ".*(q_proj|v_proj|lm_head)"):
        folder = changed(adapter, tmp_path / str(len(targets)), {"target_modules": targets}, extra=head)
        with pytest.raises(UserError, match="lm_head is not supported"):
            load_adapter(base(), folder)


@pytest.mark.parametrize("field", ["target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"])
def test_an_expression_that_would_never_end_is_refused(field, tmp_path, made):
    pattern = r"(?:(\w|\.)\1?|\w\.|.)+[^a-z_.0-9]"  # tries some 3^30 ways to read a module's name
    value = {pattern: 2} if field.endswith("pattern") else pattern
    signal.alarm(60)  # a hang is a failure
    try:
        with pytest.raises(UserError, match="takes too long to match"):
            load_adapter(base(), changed(made[1], tmp_path / "b", {field: value}))
    finally:
        signal.alarm(0)


def claims(folder, header, size):
    raw = json.dumps(header).encode()
    with open(folder / "adapter_model.safetensors", "wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + size)  # a sparse file, which takes no disk


@pytest.mark.parametrize(
    "shape, size, said",
    [
        ([10**10], 40 * 10**9, "it was made for another model"),
        ([10**30, 0], 0, "impossible shape"),
        ([10**10], 0, "past the end of the file"),
    ],
)
def test_a_size_that_a_file_claims_is_not_believed(shape, size, said, made, tmp_path):
    _, adapter, _ = made
    folder = changed(adapter, tmp_path / "b")
    key = sorted(load_file(adapter / "adapter_model.safetensors"))[0]
    tensors = load_file(adapter / "adapter_model.safetensors")
    header, begin = {}, 0
    for name, tensor in tensors.items():
        own, took = (
            (shape, 4 * torch.Size(shape).numel() if 0 not in shape else 0)
            if name == key
            else (list(tensor.shape), 4 * tensor.numel())
        )
        header[name] = {"dtype": "F32", "shape": own, "data_offsets": [begin, begin + took]}
        begin += took
    claims(folder, header, begin if size or said.startswith("impossible") else 100)
    with pytest.raises(UserError, match=said):
        load_adapter(base(), folder)


def test_other_programs_adapters_are_named(made, tmp_path):
    _, adapter, _ = made
    for name, said in (
        ("adapter_model.bin", "model.checkpoints.convert"),
        ("adapters.safetensors", "MLX"),
        ("adapters.npz", "MLX"),
        ("lora.safetensors", "mistral-finetune"),
    ):
        folder = changed(adapter, tmp_path / name)
        os.rename(folder / "adapter_model.safetensors", folder / name)
        for read in (AdapterFile, lambda path: load_adapter(base(), path)):
            with pytest.raises(UserError, match=said):
                read(folder)


def test_an_unknown_number_is_a_warning_and_an_unknown_flag_an_error(made, tmp_path):
    _, adapter, _ = made
    with pytest.warns(UserWarning, match="'future' = 3 is ignored"):
        read_config(changed(adapter, tmp_path / "b", {"future": 3}))
    with pytest.raises(UserError, match="unknown field 'future'"):
        read_config(changed(adapter, tmp_path / "c", {"future": True}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_config(changed(adapter, tmp_path / "d", {"future": False}))


@pytest.mark.parametrize("held", ["1", "null", "NaN", "[]", '"x"'])
def test_a_config_that_is_no_object_is_named(made, tmp_path, held):
    folder = changed(made[1], tmp_path / "a")
    (folder / "adapter_config.json").write_text(held)
    with pytest.raises(UserError, match="adapter_config.json: not a JSON object"):
        read_config(folder)
