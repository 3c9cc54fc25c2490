"""A folder gives one model or is refused; a cast is checked as the file was; DST has its name when it is whole."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_convert import as_bins
from tiny_models import some_tokens, tiny

from lora import LoRAConfig, add_lora, load_adapter, save_adapter
from lora.merge import merge_folders
from model import ModelConfig, Transformer
from model.checkpoints.convert import Options, main, open_any
from model.checkpoints.mistral import KEYS, MOE_KEYS, native_config
from model.checkpoints.weights import open_checkpoint
from model.support.cli import UserError

TOKENS = some_tokens(9)


def logits(path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return Transformer.from_pretrained(path)(TOKENS)


@pytest.mark.parametrize("shards", ["gone", "there"])
def test_a_whole_file_beside_an_index_of_others_is_refused_and_both_are_named(shards, tmp_path):
    tiny("mistral", torch.float32).save_pretrained(tmp_path / "m", max_shard_bytes=20_000)
    tiny("mistral", torch.float32, seed=1).save_pretrained(tmp_path / "new")
    (tmp_path / "new" / "model.safetensors").rename(tmp_path / "m" / "model.safetensors")
    if shards == "gone":
        for file in (tmp_path / "m").glob("model-*"):
            file.unlink()
    with pytest.raises(UserError, match="model.safetensors, and model-00001-of.* of model.safetensors.index.json"):
        Transformer.from_pretrained(tmp_path / "m")


def test_an_index_of_the_one_file_is_no_other_answer(tmp_path):
    model = tiny("llama", torch.float32)
    model.save_pretrained(tmp_path)
    index = {"weight_map": dict.fromkeys(model.state_dict(), "model.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert torch.equal(logits(tmp_path), model(TOKENS))


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_an_index_may_name_a_tied_head_and_rotary_buffers_or_not(data, tmp_path_factory):
    """Writers have listed what they did not write, and written what they did not list; what a model needs is both."""
    folder = tmp_path_factory.mktemp("index")
    model = tiny("llama-tied", torch.float32)
    model.save_pretrained(folder, max_shard_bytes=20_000)
    index = folder / "model.safetensors.index.json"
    raw = json.loads(index.read_text())
    file = folder / raw["weight_map"]["model.embed_tokens.weight"]
    tensors = load_file(file)
    extra = {
        "lm_head.weight": tensors["model.embed_tokens.weight"].clone(),
        "model.layers.1.self_attn.rotary_emb.inv_freq": torch.ones(3),
    }
    for name, tensor in extra.items():
        if data.draw(st.booleans(), label=f"{name} listed"):
            raw["weight_map"][name] = file.name
        if data.draw(st.booleans(), label=f"{name} written"):
            tensors[name] = tensor
    save_file(tensors, file)
    index.write_text(json.dumps(raw))
    assert torch.equal(logits(folder), model(TOKENS))
    del raw["weight_map"]["model.norm.weight"]
    index.write_text(json.dumps(raw))
    with pytest.raises(UserError, match="lacks 'model.norm.weight'"):
        Transformer.from_pretrained(folder)


def test_a_tied_file_that_keeps_only_its_head_loads_converts_and_merges(tmp_path):
    """safetensors' own save_model keeps the alphabetically first name of a shared tensor."""
    model = tiny("llama-tied", torch.float32)
    model.save_pretrained(tmp_path / "m")
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, tmp_path / "m" / "model.safetensors")
    assert torch.equal(logits(tmp_path / "m"), model(TOKENS))
    main(Options(str(tmp_path / "m"), str(tmp_path / "new")))
    assert "lm_head.weight" not in open_checkpoint(tmp_path / "new").tensors
    assert torch.equal(logits(tmp_path / "new"), model(TOKENS))
    save_adapter(add_lora(tiny("llama-tied", torch.float32), LoRAConfig(r=2)), tmp_path / "a")  # B = 0: no change
    merge_folders(str(tmp_path / "m"), str(tmp_path / "a"), str(tmp_path / "merged"))
    assert torch.equal(logits(tmp_path / "merged"), model(TOKENS))
    raw = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps(raw | {"tie_word_embeddings": False}))
    with pytest.raises(UserError, match="missing model.embed_tokens.weight"):
        Transformer.from_pretrained(tmp_path / "m")


@pytest.mark.parametrize("values, lost", [([1e5, -2e5, 1.0], 2), ([65504.0, 65519.0, 0.0], 0)])
def test_numbers_that_a_dtype_cannot_hold_are_named_with_their_count(values, lost, tmp_path):
    model = tiny("llama", torch.float32)
    name = "model.layers.1.mlp.down_proj.weight"
    with torch.no_grad():
        model.get_parameter(name).view(-1)[: len(values)] = torch.tensor(values)
    model.save_pretrained(tmp_path / "m")
    save_adapter(add_lora(tiny("llama", torch.float32), LoRAConfig(r=2)), tmp_path / "a")
    said = f"{name} has {lost} numbers beyond float16's largest, 65504"
    base, adapter = str(tmp_path / "m"), str(tmp_path / "a")
    written = {
        "convert": lambda out: main(Options(base, out, dtype="float16")),
        "merge": lambda out: merge_folders(base, adapter, out, torch.float16),
    }
    for how, write in written.items():
        if lost:
            with pytest.raises(UserError, match=said):
                write(str(tmp_path / how))
            assert not (tmp_path / how).exists()
        else:
            write(str(tmp_path / how))
            assert all(p.isfinite().all() for p in load_file(tmp_path / how / "model.safetensors").values())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Transformer.from_pretrained(tmp_path / "m", dtype=torch.float16)
    assert [said in str(warning.message) for warning in caught] == [True] * bool(lost)


def test_a_merge_that_leaves_the_bases_dtype_is_named(tmp_path):
    """The sum is looked at before it is rounded: base and adapter are each within fp16."""
    model = tiny("llama", torch.float16)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.fill_(60000.0)
    model.save_pretrained(tmp_path / "m")
    adapted = add_lora(tiny("llama", torch.float32), LoRAConfig(r=1, alpha=1.0, target_modules=("up_proj",)))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if ".lora_" in name:
                parameter.fill_(100.0)
    save_adapter(adapted, tmp_path / "a")
    with pytest.raises(UserError, match="layers.0.mlp.up_proj.weight has 960 numbers beyond float16's largest"):
        merge_folders(str(tmp_path / "m"), str(tmp_path / "a"), str(tmp_path / "out"))


def as_pth(folder: Path, **changes):
    """Mistral's first files: params.json and one pickled state."""
    model = tiny("mistral", torch.bfloat16)
    model.save_pretrained(folder / "hf")
    main(Options(str(folder / "hf"), str(folder / "native"), to="native"))
    file = folder / "native" / "consolidated.safetensors"
    torch.save(load_file(file), folder / "native" / "consolidated.00.pth")
    file.unlink()
    return model


def test_mistrals_pickled_files_are_converted(tmp_path):
    model = as_pth(tmp_path)
    with pytest.raises(UserError, match="python -m model.checkpoints.convert"):
        Transformer.from_pretrained(tmp_path / "native")
    main(Options(str(tmp_path / "native"), str(tmp_path / "new")))
    again = Transformer.from_pretrained(tmp_path / "new", dtype=torch.bfloat16)
    assert again.config.windows == model.config.windows
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    (tmp_path / "native" / "consolidated.01.pth").write_bytes(b"x")
    with pytest.raises(UserError, match="tensor-parallel shards for 2 devices"):
        open_any(tmp_path / "native")


def test_a_broken_file_is_not_passed_over_for_a_pickle_beside_it(tmp_path):
    as_bins(tiny("mistral", torch.float32), tmp_path / "m", shards=1)
    (tmp_path / "m" / "model.safetensors").write_bytes(b"not one")
    with pytest.raises(UserError, match="model.safetensors: not a safetensors file"):
        open_any(tmp_path / "m")


def test_an_adapters_pickle_is_named_by_loaders_and_converted(tmp_path):
    model = add_lora(tiny("llama", torch.float32), LoRAConfig(r=2))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B" in name:
                parameter.fill_(0.1)
    save_adapter(model, tmp_path / "a")
    file = tmp_path / "a" / "adapter_model.safetensors"
    torch.save(load_file(file), tmp_path / "a" / "adapter_model.bin")
    file.unlink()
    with pytest.raises(UserError, match="convert it: python -m model.checkpoints.convert"):
        load_adapter(tiny("llama", torch.float32), tmp_path / "a")
    main(Options(str(tmp_path / "a"), str(tmp_path / "b")))
    assert torch.equal(load_adapter(tiny("llama", torch.float32), tmp_path / "b")(TOKENS), model(TOKENS))
    with pytest.raises(UserError, match="an adapter, not a model"):
        Transformer.from_pretrained(tmp_path / "a")


NATIVE = {
    "dim": 24,
    "n_layers": 1,
    "n_heads": 4,
    "hidden_dim": 40,
    "vocab_size": 61,
    "norm_eps": 1e-5,
    "rope_theta": 1e4,
}
WORD = st.from_regex(r"[a-z_]{1,16}", fullmatch=True).filter(lambda key: key not in KEYS | MOE_KEYS)
VALUE = st.one_of(st.just(True), st.integers(1, 9), st.floats(0.1, 2), st.just([None, 8]), st.just({"beta": 1}))


@settings(max_examples=60, deadline=None)
@given(WORD, WORD, VALUE)
def test_any_key_of_params_json_that_is_not_known_is_refused(key, inner, value):
    assert ModelConfig.from_dict(native_config({**NATIVE, key: None}))
    with pytest.raises(UserError, match=f"'{key}' may change"):
        native_config({**NATIVE, key: value})
    with pytest.raises(UserError, match=f"'moe.{inner}' may change"):
        native_config({**NATIVE, "moe": {"num_experts": 2, "num_experts_per_tok": 1, inner: value}})


@pytest.mark.parametrize(
    "change",
    [
        {"causal": False},
        {"moe": 3},
        {"moe": {"num_experts": 2}},
        {"dim": "24"},
        {"n_heads": 0},
        {"dim": None},
        {"sliding_window": [None, 8]},
        {"sliding_window": "8"},
        {"rope_theta": None},
    ],
)
def test_a_params_json_of_another_shape_is_a_user_error(change):
    with pytest.raises(UserError):
        ModelConfig.from_dict(native_config({**NATIVE, **change}))


WATCH = """
import os, sys
from pathlib import Path
from model.checkpoints.convert import Options, main

target = Path(sys.argv[2])


def hook(event, arguments):  # at every change of a name, the folder is not there, or is whole
    if event == "os.rename" or event.startswith("open"):
        assert not target.exists() or (target / "tokenizer.json").exists(), event


sys.addaudithook(hook)
main(Options(sys.argv[1], sys.argv[2]))
"""


def test_a_converted_folder_has_its_name_when_its_tokenizer_is_there(tmp_path):
    tiny("llama", torch.float32).save_pretrained(tmp_path / "m")
    (tmp_path / "m" / "tokenizer.json").write_text(
        json.dumps(
            {
                "version": "1.0",
                "truncation": None,
                "padding": None,
                "added_tokens": [],
                "normalizer": None,
                "pre_tokenizer": None,
                "post_processor": None,
                "decoder": None,
                "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []},
            }
        )
    )
    done = subprocess.run(
        [sys.executable, "-c", WATCH, str(tmp_path / "m"), str(tmp_path / "new")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-500:]
    assert sorted(os.listdir(tmp_path / "new")) == ["config.json", "model.safetensors", "tokenizer.json"]
