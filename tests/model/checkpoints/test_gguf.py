"""GGUF files: written by the public package, read under transformers' names; corrupt ones refused in one line."""

import struct

import gguf
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_models import some_tokens, tiny

from model import Transformer
from model.checkpoints.gguf import open_gguf
from model.checkpoints.mistral import is_rotary, to_pairs
from model.checkpoints.weights import open_checkpoint
from model.support.cli import UserError

HF = {
    "model.embed_tokens": "token_embd",
    "lm_head": "output",
    "model.norm": "output_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "block_sparse_moe.gate": "ffn_gate_inp",
}


def write_gguf(model: Transformer, path, family: str, kind=None, **fields):
    """The model as llama.cpp would keep it: its names, q and k in pairs for llama files, experts stacked."""
    config = model.config
    writer = gguf.GGUFWriter(str(path), family)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_context_length(config.max_position_embeddings)
    if config.window:
        writer.add_sliding_window(config.window)
    if config.num_local_experts:
        writer.add_expert_count(config.num_local_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
    for key, value in fields.items():
        writer.add_array(f"{family}.{key}".replace("__", "."), value)
    stacks: dict[str, list] = {}
    for name, parameter in model.named_parameters():
        tensor = parameter.detach()
        layer = name.split(".")[2] if ".layers." in name else None
        stem, leaf = (name.split(".", 3)[3] if layer else name).rsplit(".", 1)
        if ".experts." in name:
            w = {"w1": "ffn_gate_exps", "w2": "ffn_down_exps", "w3": "ffn_up_exps"}[stem[-2:]]
            stacks.setdefault(f"blk.{layer}.{w}.weight", []).append(tensor.numpy())
            continue
        if family == "llama" and is_rotary(name):
            tensor = to_pairs(tensor, config.head_dim)
        full = f"blk.{layer}.{HF[stem]}.{leaf}" if layer else f"{HF[stem]}.{leaf}"
        array = np.ascontiguousarray(tensor.numpy())
        if kind is not None and array.ndim == 2:
            writer.add_tensor(full, gguf.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(full, array)
    for full, arrays in stacks.items():
        writer.add_tensor(full, np.stack(arrays))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    "family, arch",
    [
        ("llama", "llama"),
        ("llama-tied", "llama"),
        ("mistral", "llama"),
        ("mistral-wide-heads", "llama"),
        ("mixtral", "llama"),
        ("qwen2", "qwen2"),
        ("qwen2-tied", "qwen2"),
    ],
)
def test_every_family_reads_bit_for_bit(family, arch, tmp_path):
    model = tiny(family, torch.float32)
    path = write_gguf(model, tmp_path / "m.gguf", arch)
    again = Transformer.from_pretrained(path)
    assert again.config.windows == model.config.windows and again.config.rms_norm_eps == pytest.approx(1e-5)
    assert again.state_dict().keys() == model.state_dict().keys()
    for (name, a), b in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert torch.equal(Transformer.from_pretrained(tmp_path)(some_tokens(9)), again(some_tokens(9)))  # its folder too


@pytest.mark.parametrize("kind", [gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.Q4_1])
def test_blocks_come_out_as_the_public_package_dequantizes_them(kind, tmp_path):
    model = tiny("llama", torch.float32, hidden_size=64, head_dim=16, intermediate_size=96)
    checkpoint = open_checkpoint(write_gguf(model, tmp_path / "m.gguf", "llama", kind))
    up = model.model.layers[0].mlp.up_proj.weight.detach().numpy()
    exact = torch.from_numpy(gguf.dequantize(gguf.quantize(up, kind), kind))
    assert torch.equal(checkpoint.read("model.layers.0.mlp.up_proj.weight"), exact)
    assert torch.equal(checkpoint.read("model.layers.0.mlp.up_proj.weight", slice(5, 40)), exact[5:40])
    whole = checkpoint.read("model.layers.0.self_attn.k_proj.weight")
    assert torch.equal(checkpoint.read("model.layers.0.self_attn.k_proj.weight", slice(7, 20)), whole[7:20])
    assert (whole - model.model.layers[0].self_attn.k_proj.weight).abs().max() < 0.1


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    model = tiny("llama", torch.float32, num_hidden_layers=1)
    return write_gguf(model, tmp_path_factory.mktemp("gguf") / "m.gguf", "llama")


def header(*fields: bytes, tensors: int = 0) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, len(fields)) + b"".join(fields)


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


HOSTILE = {
    "empty": (b"", "not a GGUF"),
    "other magic": (b"GGML" + b"\0" * 40, "not a GGUF"),
    "version 9": (b"GGUF" + struct.pack("<IQQ", 9, 0, 0), "version"),
    "fields without end": (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**60), "past the end"),
    "text longer than the file": (header(struct.pack("<Q", 2**62) + b"abc"), "past the end"),
    "array longer than the file": (header(text(b"a") + struct.pack("<IIQ", 9, 4, 2**61)), "past the end"),
    "array of texts without end": (header(text(b"a") + struct.pack("<IIQ", 9, 8, 2**61)), "longer than the file"),
    "arrays in arrays": (
        header(text(b"a") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 5000),
        "array of arrays",
    ),
    "unknown kind": (header(text(b"a") + struct.pack("<I", 99)), "value type"),
    "field twice": (header(*[text(b"a") + struct.pack("<II", 4, 1)] * 2), "twice"),
    "alignment 0": (header(text(b"general.alignment") + struct.pack("<II", 4, 0)), "alignment"),
    "tensor past the end": (
        header(tensors=1) + text(b"a") + struct.pack("<IQIQ", 1, 1000, 0, 0),
        "past the end of the file",
    ),
    "tensor of no known kind": (header(tensors=1) + text(b"a") + struct.pack("<IQIQ", 1, 32, 77, 0), "type 77"),
    "shape that overflows": (
        header(tensors=1) + text(b"a") + struct.pack("<IQQIQ", 2, 2**40, 2**40, 0, 0),
        "impossible",
    ),
}


@pytest.mark.parametrize("why", HOSTILE)
def test_hostile_headers_are_refused(why, tmp_path):
    raw, message = HOSTILE[why]
    (tmp_path / "m.gguf").write_bytes(raw)
    with pytest.raises(UserError, match=message):
        open_gguf(tmp_path / "m.gguf")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_damage_is_refused_or_changes_only_values(whole, data, tmp_path):
    raw = bytearray(whole.read_bytes())
    at = data.draw(st.integers(0, min(len(raw), 3000) - 1))
    if data.draw(st.booleans()):
        del raw[at:]
    else:
        raw[at] = data.draw(st.integers(0, 255))
    (tmp_path / "m.gguf").write_bytes(bytes(raw))
    try:
        model = Transformer.from_pretrained(tmp_path / "m.gguf")
    except UserError:
        return
    assert {name: p.shape for name, p in model.named_parameters()} == {
        name: p.shape for name, p in Transformer(model.config).named_parameters()
    }


def test_values_that_differ_by_layer_are_refused(tmp_path):
    path = write_gguf(tiny("llama", torch.float32), tmp_path / "m.gguf", "llama", expert_count=[1, 2, 3])
    with pytest.raises(UserError, match="llama.expert_count has a value for each layer"):
        Transformer.from_pretrained(path)


def test_two_files_in_a_folder_have_to_be_told_apart(tmp_path, whole):
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(whole.read_bytes())
    with pytest.raises(UserError, match="2 GGUF models .a.gguf, b.gguf."):
        Transformer.from_pretrained(tmp_path)


def test_a_header_is_parsed_once_while_its_file_stays_the_same(tmp_path):
    path = write_gguf(tiny("llama", torch.float32), tmp_path / "m.gguf", "llama")
    first = open_gguf(path)
    assert open_gguf(path) is first
    write_gguf(tiny("llama-tied", torch.float32), path, "llama")
    assert "output.weight" in first.tensors and "output.weight" not in open_gguf(path).tensors
