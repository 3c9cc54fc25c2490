"""Between formats nothing but names, layout and dtype changes; pickles give up their tensors and nothing else."""

import base64
import json
import os
import re
import warnings
import zipfile

import pytest
import torch
from tiny_models import some_tokens, tiny

from model import ModelConfig, Tokenizer, Transformer
from model.checkpoints.convert import Options, main, open_any
from model.checkpoints.mistral import to_native
from model.checkpoints.safetensors import in_memory
from model.support.cli import UserError


def logits(path, dtype=torch.float32):
    return Transformer.from_pretrained(path, dtype=dtype)(some_tokens(20))


@pytest.mark.parametrize("family", ["mistral", "mistral-wide-heads", "mistral-no-window", "mixtral"])
def test_to_mistrals_native_files_and_back(family, tmp_path):
    model = tiny(family, torch.float32)
    model.save_pretrained(tmp_path / "hf")
    main(Options(str(tmp_path / "hf"), str(tmp_path / "native"), to="native"))
    assert (tmp_path / "native" / "params.json").is_file() and not (tmp_path / "native" / "config.json").exists()
    assert torch.equal(logits(tmp_path / "native"), model(some_tokens(20)))  # native files load as they are
    main(Options(str(tmp_path / "native"), str(tmp_path / "back")))
    again = Transformer.from_pretrained(tmp_path / "back")
    assert again.config.windows == model.config.windows
    for (name, a), b in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_native_layout_moves_rows_within_each_head():
    model = tiny("mistral", torch.float32)
    state = {name: in_memory(p.detach()) for name, p in model.named_parameters()}
    native = to_native(state, 6)
    q, k = (native[f"layers.0.attention.w{x}.weight"].read(None) for x in "qk")
    ours = model.model.layers[0].self_attn
    assert torch.equal(q[1], ours.q_proj.weight[3]) and torch.equal(q[7], ours.q_proj.weight[9])
    assert torch.equal(k[1], ours.k_proj.weight[3]) and torch.equal(k[7], ours.k_proj.weight[9])
    assert torch.equal(native["layers.0.attention.wk.weight"].read(slice(4, 9)), k[4:9])  # rows across two heads


def test_the_native_format_refuses_what_it_has_no_words_for(tmp_path):
    tiny("llama", torch.float32).save_pretrained(tmp_path / "hf")
    with pytest.raises(UserError, match="native files hold mistral"):
        main(Options(str(tmp_path / "hf"), str(tmp_path / "native"), to="native"))
    assert not (tmp_path / "native").exists()


def as_bins(model, folder, shards=2, **extra):
    model.save_pretrained(folder)
    os.remove(folder / "model.safetensors")
    state = {**model.state_dict(), **extra}
    names = list(state)
    for number in range(shards):
        part = {name: state[name].clone() for name in names[number::shards]}
        torch.save(part, folder / f"pytorch_model-{number + 1:05d}-of-{shards:05d}.bin")
    return folder


def test_bin_files_become_safetensors(tmp_path):
    model = tiny("mistral", torch.bfloat16)
    as_bins(model, tmp_path / "bin", **{"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(3)})
    with pytest.raises(UserError, match="python -m model.checkpoints.convert"):
        Transformer.from_pretrained(tmp_path / "bin")
    main(Options(str(tmp_path / "bin"), str(tmp_path / "new")))
    again = Transformer.from_pretrained(tmp_path / "new", dtype=torch.bfloat16)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert json.loads((tmp_path / "new" / "config.json").read_text())["dtype"] == "bfloat16"
    main(Options(str(tmp_path / "bin"), str(tmp_path / "wide"), dtype="float32", max_shard_gb=2e-5))
    assert (tmp_path / "wide" / "model.safetensors.index.json").is_file()
    assert torch.equal(logits(tmp_path / "wide", torch.bfloat16), logits(tmp_path / "new", torch.bfloat16))


def test_a_tokenizer_that_cannot_be_read_is_said_and_the_weights_are_written(tmp_path, capsys):
    tiny("mistral", torch.bfloat16).save_pretrained(tmp_path / "m")
    for content, said in (("{", "new/tokenizer.json: not a tokenizer.json"), (None, "m: holds no tokenizer")):
        (tmp_path / "m" / "tokenizer.json").unlink(missing_ok=True)
        if content is not None:
            (tmp_path / "m" / "tokenizer.json").write_text(content)
        main(Options(str(tmp_path / "m"), str(tmp_path / "new"), overwrite=True))
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("without a tokenizer that can be read: ") and said in line
        assert (tmp_path / "new" / "model.safetensors").is_file()


class Exploit:
    def __reduce__(self):
        return os.mkdir, ("ran",)


def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    as_bins(tiny("mistral", torch.float32), tmp_path / "bin", shards=1)
    torch.save({"model.norm.weight": Exploit()}, tmp_path / "bin" / "pytorch_model-00001-of-00001.bin")
    with pytest.raises(UserError, match="could run code"):
        main(Options(str(tmp_path / "bin"), str(tmp_path / "new")))
    assert not (tmp_path / "ran").exists() and not (tmp_path / "new").exists()


@pytest.mark.parametrize("content", [b"", b"garbage", b"PK\x03\x04 not a zip"])
def test_a_damaged_bin_is_one_line(content, tmp_path):
    as_bins(tiny("mistral", torch.float32), tmp_path / "bin", shards=1)
    (tmp_path / "bin" / "pytorch_model-00001-of-00001.bin").write_bytes(content)
    with pytest.raises(UserError, match="pytorch_model-00001"):
        main(Options(str(tmp_path / "bin"), str(tmp_path / "new")))


def test_a_bin_that_is_packed_inside_is_refused(tmp_path):
    """A mapped tensor is a place in the file: a compressed member would be read as the noise that it looks like."""
    source = as_bins(tiny("mistral", torch.float32), tmp_path / "bin", shards=1)
    file = next(source.glob("*.bin"))
    with zipfile.ZipFile(file) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    with pytest.raises(UserError, match="compressed or encrypted"):
        open_any(source)
    with zipfile.ZipFile(file, "w") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, data in [*members.items(), *members.items()]:
            archive.writestr(name, data)
    with pytest.raises(UserError, match="two archive members"):
        open_any(source)


STRANGE = {
    "complex": lambda x: x.to(torch.complex64),
    "sparse": lambda x: x.to_sparse(),
    "rows": lambda x: x.to_sparse_csr(),
    "without data": lambda x: x.to("meta"),
    "unsigned": lambda x: torch.zeros(x.shape, dtype=torch.uint16),
}


@pytest.mark.parametrize("kind", STRANGE)
@pytest.mark.filterwarnings("ignore:Sparse")
def test_a_tensor_that_is_no_matrix_of_numbers_is_refused(kind, tmp_path):
    source = as_bins(tiny("mistral", torch.float32), tmp_path / "bin", shards=1)
    file = next(source.glob("*.bin"))
    state = torch.load(file, weights_only=True)
    name = next(name for name in state if state[name].dim() == 2)
    torch.save({**state, name: STRANGE[kind](state[name])}, file)
    with pytest.raises(UserError, match=re.escape(name)):
        open_any(source)
    torch.save({**state, "a\nb": state[name]}, file)
    with pytest.raises(UserError, match="not a tensor's name"):
        open_any(source)


def test_bins_that_disagree_with_the_config_or_the_index(tmp_path):
    folder = as_bins(tiny("mistral", torch.float32), tmp_path / "bin")
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"a": "pytorch_model-9.bin"}}))
    with pytest.raises(UserError, match="lacks pytorch_model-9.bin"):
        main(Options(str(folder), str(tmp_path / "new")))
    (folder / "pytorch_model.bin.index.json").unlink()
    (folder / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(UserError, match="missing model.layers"):
        main(Options(str(folder), str(tmp_path / "new")))


def as_qwen_1(model, folder):
    """A tiny Qwen2 under the names and config of Qwen-7B's first version."""
    config, back = model.config, {}
    names = {
        "model.embed_tokens": "transformer.wte",
        "model.norm": "transformer.ln_f",
        "lm_head": "lm_head",
        "input_layernorm": "ln_1",
        "post_attention_layernorm": "ln_2",
        "self_attn.o_proj": "attn.c_proj",
        "mlp.up_proj": "mlp.w1",
        "mlp.gate_proj": "mlp.w2",
        "mlp.down_proj": "mlp.c_proj",
    }
    state = {name: p.detach().clone() for name, p in model.named_parameters()}
    for layer in range(config.num_hidden_layers):
        for leaf in ("weight", "bias"):
            at = f"model.layers.{layer}.self_attn"
            parts = [state.pop(f"{at}.{part}_proj.{leaf}") for part in "qkv"]
            back[f"transformer.h.{layer}.attn.c_attn.{leaf}"] = torch.cat(parts)
    for name, tensor in state.items():
        stem, leaf = name.rsplit(".", 1)
        parts = stem.split(".", 3)
        if stem.startswith("model.layers."):
            back[f"transformer.h.{parts[2]}.{names[parts[3]]}.{leaf}"] = tensor
        else:
            back[f"{names[stem]}.{leaf}"] = tensor
    back["transformer.rotary_emb.inv_freq"] = torch.ones(3)
    folder.mkdir()
    raw = {
        "model_type": "qwen",
        "vocab_size": 61,
        "hidden_size": 24,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "kv_channels": 6,
        "layer_norm_epsilon": 1e-5,
        "rotary_emb_base": 10000,
        "rotary_pct": 1.0,
        "no_bias": True,
        "seq_length": 64,
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(raw))
    torch.save(back, folder / "pytorch_model.bin")
    return folder


def test_qwens_first_version_becomes_qwen2(tmp_path):
    model = tiny("qwen2", torch.float32, num_key_value_heads=4)
    folder = as_qwen_1(model, tmp_path / "v1")
    lines = [base64.b64encode(bytes([byte])) + b" %d" % byte for byte in range(256)]
    (folder / "qwen.tiktoken").write_bytes(b"\n".join(lines))
    main(Options(str(folder), str(tmp_path / "v2")))
    assert Tokenizer.from_pretrained(tmp_path / "v2").encode("aé") == [97, 0xC3, 0xA9]
    again = Transformer.from_pretrained(tmp_path / "v2")
    assert again.config.model_type == "qwen2"
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert torch.equal(again(some_tokens(20)), model(some_tokens(20)))
    checkpoint, _ = open_any(tmp_path / "v1")
    rows = checkpoint.read("model.layers.1.self_attn.k_proj.weight", slice(5, 9))
    assert torch.equal(rows, model.model.layers[1].self_attn.k_proj.weight[5:9])


def test_an_incomplete_qwen_is_refused(tmp_path):
    folder = as_qwen_1(tiny("qwen2", torch.float32, num_key_value_heads=4), tmp_path / "v1")
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({k: v for k, v in raw.items() if k != "rotary_emb_base"}))
    with pytest.raises(UserError, match="rotary_emb_base"):
        main(Options(str(folder), str(tmp_path / "v2")))


def test_source_and_target_must_differ(tmp_path):
    tiny("llama", torch.float32).save_pretrained(tmp_path / "m")
    with pytest.raises(UserError, match="is itself read"):
        main(Options(str(tmp_path / "m"), str(tmp_path / "m")))
    assert ModelConfig.from_pretrained(tmp_path / "m")
