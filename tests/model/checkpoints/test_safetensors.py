"""untrusted safetensors: whole files read bit for bit, contradictory ones are refused before a tensor is read."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_models import some_tokens, tiny

from model import Transformer
from model.checkpoints.safetensors import open_safetensors
from model.checkpoints.weights import open_checkpoint
from model.support.cli import UserError


def write_raw(path: Path, header, body: bytes = b"", length: int | None = None) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(raw) if length is None else length).to_bytes(8, "little") + raw + body)
    return path


def entry(shape=(2,), begin=0, end=8, dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


HOSTILE = {
    "empty file": (None, b"", "truncated"),
    "header longer than the file": ({"a": entry()}, b"\0" * 8, "truncated"),
    "header not JSON": (b"{not json", b"", "not JSON"),
    "header a list": ([1], b"", "not a JSON object"),
    "header of endless digits": (b'{"a": ' + b"1" * 5000 + b"}", b"", "not JSON"),
    "header nested deep": (b'{"a":' + b"[" * 100_000, b"", "not JSON"),
    "name twice": (b'{"a":%s,"a":%s}' % ((json.dumps(entry()).encode(),) * 2), b"\0" * 8, "twice"),
    "name escapes": ({"../../x": entry()}, b"\0" * 8, "not a tensor's name"),
    "name with a slash": ({"a/b": entry()}, b"\0" * 8, "not a tensor's name"),
    "name empty": ({"": entry()}, b"\0" * 8, "not a tensor's name"),
    "past the end": ({"a": entry((4,), 0, 16)}, b"\0" * 8, "past the end"),
    "bytes do not fit the shape": ({"a": entry((3,))}, b"\0" * 8, "do not match shape"),
    "shape overflows": ({"a": entry((2**40, 2**40))}, b"\0" * 8, "impossible shape"),
    "negative": ({"a": entry((-2,))}, b"\0" * 8, "impossible"),
    "true is no size": ({"a": entry((True, 2))}, b"\0" * 8, "impossible"),
    "end before begin": ({"a": entry((2,), 8, 0)}, b"\0" * 8, "do not match shape"),
    "overlap": ({"a": entry(), "b": entry()}, b"\0" * 8, "does not begin"),
    "hole": ({"a": entry(), "b": entry((2,), 12, 20)}, b"\0" * 20, "does not begin"),
    "bytes left over": ({"a": entry()}, b"\0" * 9, "after the last"),
    "unknown dtype": ({"a": entry(dtype="F7")}, b"\0" * 8, "dtype is 'F7'"),
    "dtype a list": ({"a": entry(dtype=[])}, b"\0" * 8, "dtype"),
    "entry a number": ({"a": 3}, b"", "lacks dtype"),
    "three offsets": ({"a": {**entry(), "data_offsets": [0, 4, 8]}}, b"\0" * 8, "lacks dtype"),
}


@pytest.mark.parametrize("why", HOSTILE)
def test_hostile_headers_are_refused(why, tmp_path):
    header, body, message = HOSTILE[why]
    path = tmp_path / "model.safetensors"
    if header is None:
        path.write_bytes(b"")
    else:
        write_raw(path, header, body, 10**9 if why.startswith("header longer") else None)
    with pytest.raises(UserError, match=message) as caught:
        open_safetensors(path)
    assert str(path) in str(caught.value)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_damage_is_refused_or_changes_only_values(data, tmp_path_factory):
    """One byte changed or the file cut anywhere: a UserError, or the same names and shapes as before."""
    folder = tmp_path_factory.mktemp("damage")
    path = folder / "model.safetensors"
    save_file({"a.weight": torch.arange(6.0).view(2, 3), "b": torch.arange(4)}, path)
    raw = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, len(raw) - 1))
    if data.draw(st.booleans()):
        del raw[at:]
    else:
        raw[at] = data.draw(st.integers(0, 255))
    path.write_bytes(bytes(raw))
    try:
        for stored in open_safetensors(path).values():
            assert tuple(stored.read(None).shape) == stored.shape
    except UserError:
        pass


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_reads_what_the_public_package_writes_whole_or_by_rows(dtype, tmp_path):
    tensors = {"w.weight": torch.randn(7, 3, 2).to(dtype), "one": torch.tensor(2.0), "none": torch.empty(0, 4)}
    save_file(tensors, tmp_path / "model.safetensors")
    stored = open_safetensors(tmp_path / "model.safetensors")
    for name, tensor in tensors.items():
        assert torch.equal(stored[name].read(None), tensor)
    assert torch.equal(stored["w.weight"].read(slice(2, 5)), tensors["w.weight"][2:5])


@pytest.fixture
def saved(tmp_path) -> Path:
    tiny("qwen2", torch.float32).save_pretrained(tmp_path / "m")
    return tmp_path / "m"


def rewrite(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_every_wrong_name_and_shape_is_listed_at_once(saved):
    def change(tensors):
        tensors["model.layers.0.self_attn.q_projj.weight"] = tensors.pop("model.layers.0.self_attn.q_proj.weight")
        del tensors["model.norm.weight"]
        tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(2, 2)

    rewrite(saved, change)
    with pytest.raises(UserError) as caught:
        Transformer.from_pretrained(saved)
    message = str(caught.value)
    assert "missing model.layers.0.self_attn.q_proj.weight" in message and "missing model.norm.weight" in message
    assert "unexpected model.layers.0.self_attn.q_projj.weight (did you mean" in message
    assert "model.layers.1.mlp.up_proj.weight has shape [2, 2], but the config asks for [40, 24]" in message


def test_a_missing_output_matrix_says_that_it_may_be_tied(saved):
    rewrite(saved, lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(UserError, match="tie_word_embeddings"):
        Transformer.from_pretrained(saved)


def test_a_tied_checkpoint_may_repeat_the_embedding_but_not_contradict_it(tmp_path):
    model = tiny("llama-tied", torch.float32)
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in open_checkpoint(tmp_path).tensors
    embedding = model.model.embed_tokens.weight.detach()
    rewrite(tmp_path, lambda tensors: tensors.update({"lm_head.weight": embedding.clone()}))
    assert torch.equal(Transformer.from_pretrained(tmp_path)(some_tokens(5)), model(some_tokens(5)))
    rewrite(tmp_path, lambda tensors: tensors.update({"lm_head.weight": embedding + 1}))
    with pytest.raises(UserError, match="not the embedding"):
        Transformer.from_pretrained(tmp_path)


def test_nan_is_a_warning_with_the_tensors_name(saved):
    rewrite(saved, lambda tensors: tensors["model.layers.2.mlp.up_proj.weight"].view(-1)[3].fill_(float("nan")))
    with pytest.warns(UserWarning, match="model.layers.2.mlp.up_proj.weight holds NaN"):
        Transformer.from_pretrained(saved)
    with pytest.warns(UserWarning, match="holds NaN"):
        Transformer.from_pretrained(saved, dtype=torch.bfloat16)


def test_integers_are_no_weights(saved):
    rewrite(saved, lambda tensors: tensors.update({"model.norm.weight": torch.ones(24, dtype=torch.int8)}))
    with pytest.raises(UserError, match="I8, not floating point"):
        Transformer.from_pretrained(saved)


def test_old_rotary_buffers_are_passed_over(saved):
    rewrite(saved, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(3)}))
    Transformer.from_pretrained(saved)


@pytest.fixture
def sharded(tmp_path) -> Path:
    tiny("mixtral", torch.float32).save_pretrained(tmp_path / "s", max_shard_bytes=20_000)
    return tmp_path / "s"


def test_shards_are_bounded_and_read_back(sharded):
    files = sorted(sharded.glob("*.safetensors"))
    assert len(files) > 2 and max(file.stat().st_size for file in files) < 20_000 + 4096
    tokens = some_tokens(9)
    assert torch.equal(Transformer.from_pretrained(sharded)(tokens), tiny("mixtral", torch.float32)(tokens))


BAD_PLACES = ["../model-00001-of-00004.safetensors", "/etc/passwd", "sub/x.safetensors", "..", "", "x.bin", 3, None]


@pytest.mark.parametrize("place", BAD_PLACES)
def test_an_index_entry_that_escapes_the_folder_is_refused(sharded, place):
    index = sharded / "model.safetensors.index.json"
    raw = json.loads(index.read_text())
    raw["weight_map"]["model.norm.weight"] = place
    index.write_text(json.dumps(raw))
    with pytest.raises(UserError, match="not a safetensors file of this folder"):
        Transformer.from_pretrained(sharded)


def test_an_index_that_disagrees_with_its_files_is_refused(sharded):
    index = sharded / "model.safetensors.index.json"
    raw = json.loads(index.read_text())
    places, good = raw["weight_map"], index.read_text()
    other = next(file for file in places.values() if file != places["model.norm.weight"])

    def refused(text: str, message: str) -> None:
        index.write_text(text)
        with pytest.raises(UserError, match=message):
            Transformer.from_pretrained(sharded)

    refused(json.dumps({"weight_map": {**places, "model.norm.weight": other}}), "is not in")
    fewer = {name: file for name, file in places.items() if name != "model.norm.weight"}
    refused(json.dumps({"weight_map": fewer}), "lacks 'model.norm")
    refused(json.dumps({"weight_map": {}}), "weight_map")
    refused('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', "twice")
    refused(good[:-20], "not JSON")
    index.write_text(good)
    next(sharded.glob("*00002-of*")).unlink()
    with pytest.raises(UserError, match="no such file"):
        Transformer.from_pretrained(sharded)


def test_a_folder_says_what_it_lacks(tmp_path):
    with pytest.raises(UserError, match="no such file or folder"):
        Transformer.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(UserError, match="holds no weights"):
        Transformer.from_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(UserError, match="python -m model.checkpoints.convert"):
        Transformer.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"x")
    with pytest.raises(UserError, match="config.json: no such file"):
        Transformer.from_pretrained(tmp_path)


def test_a_save_that_fails_leaves_the_old_model_whole(saved, monkeypatch):
    before = {file.name: file.read_bytes() for file in saved.iterdir()}

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError):
        tiny("mistral", torch.float32).save_pretrained(saved)
    assert {file.name: file.read_bytes() for file in saved.iterdir()} == before
    assert [entry.name for entry in saved.parent.iterdir()] == ["m"]


def test_a_save_over_a_model_keeps_the_tokenizer_and_drops_old_shards(sharded):
    (sharded / "tokenizer.json").write_text("{}")
    (sharded / "notes").mkdir()
    (sharded / "notes" / "a.txt").write_text("a")
    model = tiny("mistral", torch.float32)
    model.save_pretrained(sharded)
    found = {str(p.relative_to(sharded)) for p in sharded.rglob("*") if p.is_file()}
    assert found == {"config.json", "model.safetensors", "tokenizer.json", "notes/a.txt"}
    assert torch.equal(Transformer.from_pretrained(sharded)(some_tokens(9)), model(some_tokens(9)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_round_trip_is_bit_identical(dtype, tmp_path):
    model = tiny("mixtral", dtype)
    model.save_pretrained(tmp_path / "m")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = Transformer.from_pretrained(tmp_path / "m", dtype=dtype)
    for (name, a), (other, b) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert name == other and a.dtype == b.dtype and torch.equal(a, b)
    assert again.config == model.config


def test_rows_for_a_ranks_shard(saved):
    checkpoint = open_checkpoint(saved)
    whole = checkpoint.read("lm_head.weight")
    assert torch.equal(torch.cat([checkpoint.read("lm_head.weight", slice(a, a + 20)) for a in (0, 20, 40, 60)]), whole)
    pieces = torch.cat([piece for _, piece in checkpoint.stream("lm_head.weight")])
    assert torch.equal(pieces, whole)
