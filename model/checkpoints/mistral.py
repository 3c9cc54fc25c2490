"""Mistral's native files: `params.json` and `consolidated*.safetensors`, with their own names and rotary layout.

Native files (and GGUF's llama files) store a head's rotary pairs interleaved (0 0' 1 1' 2 2'), transformers stores
them as halves (0 1 2 0' 1' 2'). So the rows of q and k are permuted within each head. k has fewer heads than q:
permuting it with q's head count gives a model that runs and is wrong.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from model.checkpoints.safetensors import Stored
from model.support.cli import UserError

NAMES = {
    "tok_embeddings": "model.embed_tokens",
    "norm": "model.norm",
    "output": "lm_head",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "feed_forward.gate": "block_sparse_moe.gate",
}
NATIVE_NAMES = {hf: native for native, hf in NAMES.items()}


def split_name(name: str, layers: str) -> tuple[str, str, str]:
    """With layers = "blk": `blk.3.attn_q.weight` → (`model.layers.3.`, `attn_q`, `weight`), `output.weight` → (``,
    `output`, `weight`). A name that ends in neither weight nor bias gives (``, name, ``)."""
    found = re.fullmatch(rf"(?:{layers}\.(\d+)\.)?(.+)\.(weight|bias)", name)
    if not found:
        return "", name, ""
    return (f"model.layers.{found[1]}." if found[1] else ""), found[2], found[3]


def to_hf_name(name: str) -> str:
    """`layers.0.attention.wq.weight` → `model.layers.0.self_attn.q_proj.weight`; unknown names are unchanged."""
    layer, stem, leaf = split_name(name, "layers")
    stem = re.sub(r"^feed_forward(\.experts\.\d+\.w[123])$", r"block_sparse_moe\1", stem)
    hf = stem if stem.startswith("block_sparse_moe") else NAMES.get(stem)
    return f"{layer}{hf}.{leaf}" if hf else name


def to_native_name(name: str) -> str:
    """The inverse of `to_hf_name`. Raises UserError for a tensor that native files have no name for."""
    layer, stem, leaf = split_name(name, r"model\.layers")
    stem = re.sub(r"^block_sparse_moe(\.experts\.\d+\.w[123])$", r"feed_forward\1", stem)
    native = stem if stem.startswith("feed_forward") else NATIVE_NAMES.get(stem)
    if not native:
        raise UserError(f"Mistral's native files have no name for {name!r}")
    return f"{layer.removeprefix('model.')}{native}.{leaf}"


def to_halves(x_ND: Tensor, head_dim: int) -> Tensor:
    """Permute rows of q or k (or their bias, or a LoRA B) from interleaved pairs to halves; whole heads only."""
    heads = x_ND.shape[0] // head_dim
    return x_ND.view(heads, head_dim // 2, 2, *x_ND.shape[1:]).transpose(1, 2).reshape(x_ND.shape)


def to_pairs(x_ND: Tensor, head_dim: int) -> Tensor:
    """Permute rows of q or k from halves to interleaved pairs: the inverse of `to_halves`."""
    heads = x_ND.shape[0] // head_dim
    return x_ND.view(heads, 2, head_dim // 2, *x_ND.shape[1:]).transpose(1, 2).reshape(x_ND.shape)


def permuted(stored: Stored, head_dim: int, permute: Callable[[Tensor, int], Tensor]) -> Stored:
    """A stored tensor whose rows are permuted within each head when read, whole or in part."""

    def read(rows: slice | None) -> Tensor:
        if rows is None:
            return permute(stored.read(None), head_dim)
        first, last = rows.start // head_dim * head_dim, -(-rows.stop // head_dim) * head_dim
        heads_ND = permute(stored.read(slice(first, last)), head_dim)
        return heads_ND[rows.start - first : rows.stop - first]

    return replace(stored, read=read)


def is_rotary(name: str) -> bool:
    """True if the rows of the tensor (under its transformers name) are in rotary layout: q and k."""
    return re.search(r"\.self_attn\.[qk]_proj\.(weight|bias)$", name) is not None


def from_native(files: Mapping[str, Stored], config: Mapping[str, Any]) -> dict[str, Stored]:
    """Native tensors under transformers' names and in its rotary layout."""
    out = {}
    for name, stored in files.items():
        hf = to_hf_name(name)
        out[hf] = permuted(stored, config["head_dim"], to_halves) if is_rotary(hf) else stored
    return out


def head_size(width: Any, heads: Any) -> int:
    """The default head_dim, width / heads. Raises UserError if it is not a whole number."""
    if not isinstance(width, int) or not isinstance(heads, int) or heads < 1 or width % heads:
        raise UserError(f"a width of {width!r} is not divisible by {heads!r} heads; the config is corrupt")
    return width // heads


# config.json's key → params.json's key; the first six are required.
PARAMS = {
    "hidden_size": "dim",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "intermediate_size": "hidden_dim",
    "vocab_size": "vocab_size",
    "rms_norm_eps": "norm_eps",
    "num_key_value_heads": "n_kv_heads",
    "head_dim": "head_dim",
    "rope_theta": "rope_theta",
    "sliding_window": "sliding_window",
    "max_position_embeddings": "max_position_embeddings",
}
REQUIRED = list(PARAMS.values())[:6]
# Keys that are read or do not affect the arithmetic; any other key must be empty.
KEYS = {*PARAMS.values(), "tied_embeddings", "moe", "causal", "max_seq_len", "max_batch_size", "model_type"}
MOE_KEYS = {"num_experts", "num_experts_per_tok"}


def native_config(params: Mapping[str, Any]) -> dict[str, Any]:
    """Convert params.json to config.json's keys. Without `sliding_window` the model has no window."""
    if missing := [key for key in REQUIRED if key not in params]:
        raise UserError(f"params.json lacks {', '.join(missing)}")
    moe = params.get("moe") or {}
    for where, found, known in (("", params, KEYS), ("moe.", moe, MOE_KEYS)):
        if not isinstance(found, Mapping):
            raise UserError(f"params.json: {where[:-1]} is {found!r}; it must be an object")
        for key, value in found.items():
            if key not in known and value not in (None, False, {}, []):
                raise UserError(f"params.json: {where + key!r} may change what the model computes; it is not supported")
    if params.get("causal") not in (None, True):
        raise UserError("params.json: causal = false is not supported")
    if moe and (lacking := sorted(MOE_KEYS - moe.keys())):
        raise UserError(f"params.json: moe lacks {lacking[0]}")
    raw: dict[str, Any] = {
        "model_type": "mixtral" if moe else "mistral",
        "sliding_window": None,
        "tie_word_embeddings": bool(params.get("tied_embeddings", False)),
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    raw |= {hf: params[native] for hf, native in PARAMS.items() if params.get(native) is not None}
    raw.setdefault("num_key_value_heads", params["n_heads"])
    if not raw.get("head_dim"):
        raw["head_dim"] = head_size(params["dim"], params["n_heads"])
    if moe:
        raw |= {"num_local_experts": moe["num_experts"], "num_experts_per_tok": moe["num_experts_per_tok"]}
    return raw


def native_params(config: Mapping[str, Any]) -> dict[str, Any]:
    """Convert config.json (of ModelConfig.to_dict) to params.json's keys. Raises UserError for a model that
    params.json cannot describe."""
    if config["model_type"] not in ("mistral", "mixtral"):
        raise UserError(f"Mistral's native files hold mistral and mixtral models, not {config['model_type']}")
    if config.get("rope_scaling"):
        raise UserError("Mistral's native files have no key for rope scaling")
    params: dict[str, Any] = {native: config[hf] for hf, native in PARAMS.items() if config.get(hf) is not None}
    if config["tie_word_embeddings"]:
        params["tied_embeddings"] = True
    if config["model_type"] == "mixtral":
        experts, chosen = config["num_local_experts"], config["num_experts_per_tok"]
        params["moe"] = {"num_experts": experts, "num_experts_per_tok": chosen}
    return params


def to_native(state: Mapping[str, Stored], head_dim: int) -> dict[str, Stored]:
    """Tensors under native names and in the native rotary layout: the inverse of `from_native`."""
    out = {}
    for name, stored in state.items():
        out[to_native_name(name)] = permuted(stored, head_dim, to_pairs) if is_rotary(name) else stored
    return out
