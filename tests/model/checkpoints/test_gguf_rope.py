"""GGUF: rotary scaling as llama.cpp reads it, unknown keys refused, and models in parts."""

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import some_tokens

from model import ModelConfig, Transformer
from model.checkpoints.gguf import KEYS
from model.rotary import RopeScaling, frequencies
from model.support.cli import UserError

SHAPES = {
    "token_embd.weight": (61, 24),
    "output_norm.weight": (24,),
    "output.weight": (61, 24),
    "blk.0.attn_norm.weight": (24,),
    "blk.0.ffn_norm.weight": (24,),
    "blk.0.attn_q.weight": (24, 24),
    "blk.0.attn_k.weight": (24, 24),
    "blk.0.attn_v.weight": (24, 24),
    "blk.0.attn_output.weight": (24, 24),
    "blk.0.ffn_gate.weight": (40, 24),
    "blk.0.ffn_up.weight": (40, 24),
    "blk.0.ffn_down.weight": (24, 40),
}
REQUIRED = {
    "block_count": 1,
    "embedding_length": 24,
    "feed_forward_length": 40,
    "attention.head_count": 4,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "context_length": 64,
    "rope.freq_base": 10000.0,
}
YARN = {"rope.scaling.type": "yarn", "rope.scaling.factor": 8.0, "rope.scaling.original_context_length": 16}


def write(path, fields, names=SHAPES, split=None):
    """A file with these fields of the architecture; `split`: (which part, of how many)."""
    writer = gguf.GGUFWriter(str(path), "llama")
    for key, value in fields.items():
        kind = {bool: "bool", int: "uint32", float: "float32", str: "string"}[type(value)]
        getattr(writer, f"add_{kind}")(f"llama.{key}", value)
    if split is not None:
        writer.add_uint16("split.no", split[0])
        writer.add_uint16("split.count", split[1])
        writer.add_int32("split.tensors.count", len(SHAPES))
    generator = np.random.default_rng(0)
    values = {name: generator.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}
    for name in names:
        writer.add_tensor(name, values[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def turned(path):
    config = ModelConfig.from_pretrained(path)
    return frequencies(config.head_dim, config.rope_theta, config.rope_scaling, torch.float64)


@pytest.mark.parametrize(
    "fields, scaling, gain",
    [
        ({}, None, 1.0),
        ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, None, 1.0),
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, RopeScaling("linear", 4.0), 1.0),
        ({"rope.scale_linear": 4.0}, RopeScaling("linear", 4.0), 1.0),
        ({"rope.scaling.factor": 4.0}, RopeScaling("linear", 4.0), 1.0),
        ({"rope.scaling.factor": 0.0, "rope.scale_linear": 4.0}, RopeScaling("linear", 4.0), 1.0),
        ({"rope.scaling.type": "linear"}, None, 1.0),
        (YARN, RopeScaling("yarn", 8.0, original_max_position_embeddings=16), 1.0),
        ({**YARN, "rope.scaling.attn_factor": 1.5}, RopeScaling("yarn", 8.0, original_max_position_embeddings=16), 1.5),
        (
            {**YARN, "rope.scaling.yarn_beta_fast": 16.0},
            RopeScaling("yarn", 8.0, original_max_position_embeddings=16, beta_fast=16.0),
            1.0,
        ),
    ],
)
def test_rotary_scaling_is_llama_cpps(fields, scaling, gain, tmp_path):
    frequency, own = turned(write(tmp_path / "m.gguf", REQUIRED | fields))
    expected, plain = frequencies(6, 1e4, scaling, torch.float64)
    assert torch.allclose(frequency, expected, rtol=1e-12) and own == pytest.approx(plain * gain, rel=1e-6)


@pytest.mark.parametrize(
    "fields, said",
    [
        ({"rope.scaling.attn_factor": 1.5}, "attn_factor 1.5 with"),
        ({"rope.scaling.type": "longrope", "rope.scaling.factor": 4.0}, "longrope"),
        ({"attention.causal": False}, "attention.causal is False"),
        ({"attention.value_length": 4}, "value_length"),
    ],
)
def test_what_is_not_covered_is_named(fields, said, tmp_path):
    with pytest.raises(UserError, match=said):
        ModelConfig.from_pretrained(write(tmp_path / "m.gguf", REQUIRED | fields))


KEY = st.from_regex(r"[a-z_]{1,12}(\.[a-z_]{1,12}){0,2}", fullmatch=True).filter(lambda key: key not in KEYS)


@settings(max_examples=30, deadline=None)
@given(KEY, st.one_of(st.floats(0.5, 8.0, width=32), st.integers(1, 9), st.just(True), st.text("ab", min_size=1)))
def test_any_key_of_the_architecture_that_is_not_known_is_refused(tmp_path_factory, key, value):
    path = write(tmp_path_factory.mktemp("key") / "m.gguf", REQUIRED | {key: value})
    with pytest.raises(UserError, match=f"llama.{key} = .* not supported"):
        ModelConfig.from_pretrained(path)


def parts(folder, cuts):
    """The model in files of the names up to each cut."""
    names, edges = list(SHAPES), [0, *cuts, len(SHAPES)]
    return [
        write(
            folder / f"m-{n + 1:05d}-of-{len(edges) - 1:05d}.gguf",
            REQUIRED if n == 0 else {},
            names[a:b],
            (n, len(edges) - 1),
        )
        for n, (a, b) in enumerate(zip(edges, edges[1:], strict=False))
    ]


@settings(max_examples=15, deadline=None)
@given(st.sets(st.integers(1, len(SHAPES) - 1), min_size=1, max_size=4).map(sorted))
def test_a_model_in_parts_is_the_model(tmp_path_factory, cuts):
    folder = tmp_path_factory.mktemp("parts")
    whole = Transformer.from_pretrained(write(folder / "whole.gguf", REQUIRED))(some_tokens(9))
    (folder / "split").mkdir()
    files = parts(folder / "split", cuts)
    for path in (folder / "split", *files):
        assert torch.equal(Transformer.from_pretrained(path)(some_tokens(9)), whole)
    lost = files[-1].rename(folder / "lost.gguf")
    with pytest.raises(UserError, match=f"{files[-1].name}: no such file"):
        Transformer.from_pretrained(folder / "split")
    files[0].rename(folder / "split" / "renamed.gguf")
    for path, said in ((folder / "split" / "renamed.gguf", "give the first, NAME-00001-of"), (lost, "give the first")):
        with pytest.raises(UserError, match=said):
            Transformer.from_pretrained(path)


def test_parts_of_two_models_are_refused(tmp_path):
    files = parts(tmp_path, [4, 8])
    names = list(SHAPES)
    for split, held, said in (
        ((2, 3), names[4:8], "is not part 2 of 3"),
        ((1, 3), names[3:8], "m-00001-of-00003.gguf too"),
        ((1, 3), names[4:7], "11 tensors, not 12"),
    ):
        write(files[1], {}, held, split)
        with pytest.raises(UserError, match=said):
            Transformer.from_pretrained(tmp_path)


def test_a_folder_with_a_split_model_and_another_asks_which(tmp_path):
    parts(tmp_path, [4])
    write(tmp_path / "b.gguf", REQUIRED)
    with pytest.raises(UserError, match="2 GGUF models .b.gguf, m-00001-of-00002.gguf.; name one"):
        Transformer.from_pretrained(tmp_path)
