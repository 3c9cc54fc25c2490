"""GGUF files (llama.cpp's format): config, and tensors under transformers' names, dequantized when read.

A file is a header of typed key/value pairs (config and tokenizer), a table of tensors, then their data in blocks; a
Q4_1 block is 32 numbers of 4 bits with one scale and one minimum. The `gguf` package dequantizes blocks. The header is
untrusted, so it is parsed here and every length in it is checked against the file's size. A model may be split into
several files; the first has the fields of the whole model.
"""

from __future__ import annotations

import math
import os
import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import gguf
import numpy as np
import torch
from torch import Tensor

from model.checkpoints.mistral import head_size, is_rotary, permuted, split_name, to_halves
from model.checkpoints.safetensors import Stored, merge_disjoint, reader
from model.support.checks import one_of, positive
from model.support.cli import UserError
from model.support.files import check_regular

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
PLAIN = {
    gguf.GGMLQuantizationType.F32: torch.float32,
    gguf.GGMLQuantizationType.F16: torch.float16,
    gguf.GGMLQuantizationType.BF16: torch.bfloat16,
    gguf.GGMLQuantizationType.F64: torch.float64,
}
FAMILIES = ("llama", "qwen2")  # llama.cpp writes Mistral and Mixtral as llama
NAMES = {
    "token_embd": "model.embed_tokens",
    "output": "lm_head",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "block_sparse_moe.gate",
}
EXPERT = {"gate": "w1", "down": "w2", "up": "w3"}
# config.json's key → the header's key without the architecture's prefix; the first five are required.
CONFIG = {
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "max_position_embeddings": "context_length",
    "rope_theta": "rope.freq_base",
    "sliding_window": "attention.sliding_window",
    "num_local_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count",
}
ROPE = {
    "factor": "rope.scaling.factor",
    "original_max_position_embeddings": "rope.scaling.original_context_length",
    "beta_fast": "rope.scaling.yarn_beta_fast",
    "beta_slow": "rope.scaling.yarn_beta_slow",
}
# Keys that are read or do not affect the arithmetic; any other key with the architecture's prefix is an error.
KEYS = {*CONFIG.values(), *ROPE.values(), "vocab_size", "tensor_data_layout", "attention.value_length"}
KEYS |= {"attention.layer_norm_epsilon", "attention.causal", "rope.dimension_count", "rope.scale_linear"}
KEYS |= {"rope.scaling.type", "rope.scaling.attn_factor", "rope.scaling.finetuned"}
DEQUANTIZED = 2**18  # numbers at a time: the package takes 16 rows, too few where rows are short


@dataclass(frozen=True)
class GGUF:
    """A file's key/value pairs (arrays of numbers are NumPy arrays) and its tensors under their names in the file."""

    path: Path
    fields: dict[str, Any]
    tensors: dict[str, Stored]


class _Header:
    """Parses the header's values in order. Raises UserError for a value that reaches past the end of the file."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path, self.file = path, file
        self.remaining = os.fstat(file.fileno()).st_size

    def take(self, count: int) -> bytes:
        self.remaining -= count
        data = self.file.read(count) if self.remaining >= 0 else b""
        if len(data) != count:
            raise UserError(f"{self.path}: the header reaches past the end of the file; it is truncated or corrupt")
        return data

    def number(self, kind: str) -> Any:
        return struct.unpack("<" + kind, self.take(struct.calcsize("<" + kind)))[0]

    def text(self) -> str:
        return self.take(self.number("Q")).decode("utf-8", errors="replace")

    def value(self, kind: int) -> Any:
        if kind in SCALARS:
            return self.number(SCALARS[kind])
        if kind == STRING:
            return self.text()
        if kind != ARRAY:
            raise UserError(f"{self.path}: unknown value type {kind} in the header; the file is corrupt")
        item, count = self.number("I"), self.number("Q")
        if item == ARRAY:
            raise UserError(f"{self.path}: an array of arrays in the header, which is not supported")
        if item in SCALARS:
            dtype = np.dtype("<" + SCALARS[item])
            return np.frombuffer(self.take(count * dtype.itemsize), dtype)
        if count > self.remaining:  # each string takes at least the eight bytes of its length
            raise UserError(f"{self.path}: an array longer than the file in the header; the file is corrupt")
        return [self.value(item) for _ in range(count)]


def open_gguf(path: Path) -> GGUF:
    """Parse the header of a file, or of all parts of a split model, given its first part.

    Raises UserError for a missing, corrupt or truncated file, and for a file that is not GGUF.
    """
    first = _open_file(path)
    count, total = first.fields.get("split.count", 1), first.fields.get("split.tensors.count")
    if not isinstance(count, int) or count <= 1:
        return first
    named = re.fullmatch(r"(.+)-00001-of-\d{5}\.gguf", path.name)
    if named is None or first.fields.get("split.no") != 0:
        raise UserError(
            f"{path}: one of {count} parts; give the first, NAME-00001-of-{count:05d}.gguf, beside the others"
        )
    parts = [first]
    for number in range(2, count + 1):
        part = _open_file(path.with_name(f"{named[1]}-{number:05d}-of-{count:05d}.gguf"))
        if part.fields.get("split.no") != number - 1 or part.fields.get("split.count") != count:
            raise UserError(f"{part.path}: is not part {number} of {count} of the model that {path.name} begins")
        parts.append(part)
    tensors = merge_disjoint((part.path, part.tensors) for part in parts)
    if total is not None and total != len(tensors):
        raise UserError(f"{path}: its {count} parts hold {len(tensors)} tensors, not {total}; one is of another model")
    return GGUF(path, first.fields, tensors)


def _open_file(path: Path) -> GGUF:
    check_regular(path)
    status = path.stat()
    return _parsed(path, (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns))


@lru_cache(maxsize=8)
def _parsed(path: Path, version: tuple[int, ...]) -> GGUF:
    """Parsed once per `version` of the file: config, weights and tokenizer each ask for the header."""
    with open(path, "rb") as file:
        header = _Header(path, file)
        if header.remaining < 24 or header.take(4) != b"GGUF":
            raise UserError(f"{path}: not a GGUF file, or truncated; download it again")
        if (version := header.number("I")) not in (2, 3):
            raise UserError(f"{path}: GGUF version {version} (or big-endian); versions 2 and 3 are supported")
        tensor_count, field_count = header.number("Q"), header.number("Q")
        fields: dict[str, Any] = {}
        for _ in range(field_count):
            key = header.text()
            if key in fields:
                raise UserError(f"{path}: {key!r} occurs twice in the header; the file is corrupt")
            fields[key] = header.value(header.number("I"))
        table = {}
        for _ in range(tensor_count):
            name = header.text()
            if name in table:
                raise UserError(f"{path}: {name!r} occurs twice in the header; the file is corrupt")
            dims = [header.number("Q") for _ in range(min(header.number("I"), 5))]
            table[name] = (tuple(reversed(dims)), header.number("I"), header.number("Q"))
        alignment = fields.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise UserError(f"{path}: general.alignment is {alignment!r}; the file is corrupt")
        start = -(-file.tell() // alignment) * alignment
        size = os.fstat(file.fileno()).st_size
    return GGUF(path, fields, {name: _stored(path, name, *entry, start, size) for name, entry in table.items()})


def _stored(path: Path, name: str, shape: tuple[int, ...], code: int, offset: int, start: int, size: int) -> Stored:
    """A tensor of the table. Raises UserError for an unknown type, or data beyond the file's `size`."""
    try:
        kind = gguf.GGMLQuantizationType(code)
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        if kind not in PLAIN:
            gguf.dequantize(np.zeros((1, block_bytes), dtype=np.uint8), kind)
    except (ValueError, KeyError, NotImplementedError) as error:
        raise UserError(f"{path}: {name!r} has type {code}, which the gguf package cannot read") from error
    if not shape or shape[-1] % block or not 0 < math.prod(shape) < 2**48:
        raise UserError(f"{path}: {name!r} has the impossible shape {shape} for {kind.name}; the file is corrupt")
    row_bytes = shape[-1] // block * block_bytes
    begin = start + offset
    if begin + math.prod(shape[:-1]) * row_bytes > size:
        raise UserError(f"{path}: {name!r} reaches past the end of the file; it is truncated")
    return Stored(shape, kind.name, path.name, _reader(path, kind, shape, begin, row_bytes))


def _reader(
    path: Path, kind: gguf.GGMLQuantizationType, shape: tuple[int, ...], begin: int, row_bytes: int
) -> Callable[[slice | None], Tensor]:
    """A function that reads the tensor, or rows of its first dimension; quantized types are dequantized to fp32."""
    if kind in PLAIN:
        return reader(path, PLAIN[kind], shape, begin)
    read_blocks = reader(path, torch.uint8, (*shape[:-1], row_bytes), begin)

    def read(rows: slice | None) -> Tensor:
        if len(shape) == 1 and rows is not None:  # blocks lie along the only dimension: dequantize all of it
            return read(None)[rows]
        blocks = read_blocks(rows)
        stored, values = blocks.numpy().reshape(-1, row_bytes), torch.empty(blocks[..., 0].numel(), shape[-1])
        size = max(1, DEQUANTIZED // shape[-1])
        for start in range(0, len(stored), size):
            part = gguf.dequantize(stored[start : start + size].reshape(1, -1), kind)  # as one row of blocks
            values[start : start + size].view(-1).copy_(torch.from_numpy(part[0]))
        return values.view(*blocks.shape[:-1], shape[-1])

    return read


def gguf_config(file: GGUF) -> dict[str, Any]:
    """The config under config.json's keys. llama.cpp stores no window for Mistral, so its files are read as llama."""
    family = one_of("the GGUF architecture", file.fields.get("general.architecture"), FAMILIES)
    found = {key.removeprefix(f"{family}."): v for key, v in file.fields.items() if key.startswith(f"{family}.")}
    for key, value in sorted(found.items()):
        if key not in KEYS:
            raise UserError(f"{family}.{key} = {value!r} may change what the model computes and is not supported")
        if isinstance(value, (list, np.ndarray)):
            raise UserError(f"{family}.{key} has a value for each layer, which is not supported")
    missing = [key for key in list(CONFIG.values())[:5] if key not in found]
    if missing or "token_embd.weight" not in file.tensors:
        raise UserError(f"the header lacks {', '.join(missing) or 'token_embd.weight'}; the file is corrupt")
    raw = {name: found[key] for name, key in CONFIG.items() if key in found}
    heads, experts = raw["num_attention_heads"], raw.get("num_local_experts")
    if not raw.get("head_dim"):
        raw["head_dim"] = head_size(raw["hidden_size"], heads)
    one_of("rope.dimension_count", found.get("rope.dimension_count", raw["head_dim"]), [raw["head_dim"]])
    one_of("attention.value_length", found.get("attention.value_length", raw["head_dim"]), [raw["head_dim"]])
    one_of("attention.causal", found.get("attention.causal", True), [True])
    if experts:
        raw["model_type"] = "mixtral"
    else:
        raw["model_type"] = "mistral" if family == "llama" and raw.get("sliding_window") else family
    raw |= {
        "num_key_value_heads": raw.get("num_key_value_heads", heads),
        "vocab_size": file.tensors["token_embd.weight"].shape[0],
        "rope_theta": raw.get("rope_theta", 10000.0),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "rope_scaling": _rope_scaling(file, found),
        "sliding_window": raw.get("sliding_window"),
    }
    if family == "llama" and "blk.0.attn_q.bias" in file.tensors:
        raw["attention_bias"] = True
    for name, kind in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        raw[f"{name}_token_id"] = file.fields.get(f"tokenizer.ggml.{kind}_token_id")
    return raw


def _rope_scaling(file: GGUF, found: Mapping[str, Any]) -> dict[str, Any] | None:
    """Rotary scaling as llama.cpp reads it: a factor without a type is linear, files of 2023 call it scale_linear, and
    attn_factor multiplies YaRN's own factor on cosine and sine."""
    scaling = {name: found[key] for name, key in ROPE.items() if key in found}
    factor = scaling["factor"] = scaling.get("factor") or found.get("rope.scale_linear")
    attention = found.get("rope.scaling.attn_factor", 1.0)
    kind = found.get("rope.scaling.type", "linear" if factor else "none")
    one_of("rope.scaling.type", kind, ("none", "linear", "yarn"))
    if kind != "yarn" and attention != 1.0:
        raise UserError(f"rope.scaling.attn_factor {attention!r} with rope scaling {kind!r} is not supported")
    if kind == "none" or kind == "linear" and factor in (None, 1.0):
        return _llama3(file, found) if "rope_freqs.weight" in file.tensors else None
    if attention != 1.0:
        gain = 0.1 * math.log(positive("rope.scaling.factor", factor)) + 1.0
        scaling["attention_factor"] = positive("rope.scaling.attn_factor", attention) * gain
    return {"rope_type": kind, **{name: value for name, value in scaling.items() if value is not None}}


def _llama3(file: GGUF, found: Mapping[str, Any]) -> dict[str, Any]:
    """Llama-3's rotary scaling from the frequency divisors that the file stores for each rotary pair.

    The file does not store the scaling's parameters. Those of all published Llama-3.1 to 3.3 models are assumed, and
    UserError is raised if they do not reproduce the file's divisors.
    """
    from model.rotary import RopeScaling, frequencies

    divisor = file.tensors["rope_freqs.weight"].read(None).double()
    scaling: dict[str, Any] = {
        "rope_type": "llama3",
        "factor": float(divisor.max()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    theta, size = found.get("rope.freq_base", 10000.0), 2 * len(divisor)
    scaled, _ = frequencies(size, theta, RopeScaling(**scaling), torch.float64)
    plain, _ = frequencies(size, theta, None, torch.float64)
    if not torch.allclose(plain / scaled, divisor, rtol=1e-4):
        raise UserError("rope_freqs.weight holds a rotary scaling other than Llama-3's, which is not supported")
    return scaling


def from_gguf(file: GGUF, config: Mapping[str, Any]) -> dict[str, Stored]:
    """Tensors under transformers' names and in its rotary layout."""
    interleaved = file.fields["general.architecture"] == "llama"  # qwen2 files store halves, as transformers does
    out: dict[str, Stored] = {}
    for name, stored in file.tensors.items():
        if name == "rope_freqs.weight":
            continue
        layer, stem, leaf = split_name(name, "blk")
        if (stacked := re.fullmatch(r"ffn_(gate|up|down)_exps", stem)) and len(stored.shape) == 3:
            for expert in range(stored.shape[0]):
                out[f"{layer}block_sparse_moe.experts.{expert}.{EXPERT[stacked[1]]}.{leaf}"] = _expert(stored, expert)
            continue
        single = re.fullmatch(r"ffn_(gate|up|down)\.(\d+)", stem)
        known = f"block_sparse_moe.experts.{single[2]}.{EXPERT[single[1]]}" if single else NAMES.get(stem)
        hf = f"{layer}{known}.{leaf}" if known else name
        out[hf] = permuted(stored, config["head_dim"], to_halves) if interleaved and is_rotary(hf) else stored
    return out


def _expert(stored: Stored, expert: int) -> Stored:
    """One expert's (F, D) matrix of the stacked tensor (E, F, D)."""
    _, F, D = stored.shape

    def read(rows: slice | None) -> Tensor:
        matrix = stored.read(slice(expert, expert + 1))[0]
        return matrix if rows is None else matrix[rows]

    return Stored((F, D), stored.dtype, stored.where, read)
