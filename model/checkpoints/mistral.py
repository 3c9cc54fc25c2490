"""Mistral's own files: `params.json`, `consolidated*.safetensors`, their names and their rotary layout.

The rotary layout is the trap. Native files (and GGUF's llama files) keep a head's rotary pairs side by side
(0 0' 1 1' 2 2'), transformers' files keep halves (0 1 2 0' 1' 2'). So rows of q and k move, head by head, each with
its own number of heads: k permuted with q's head count is a model that runs and is wrong.
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
BACK = {hf: native for native, hf in NAMES.items()}


def to_hf_name(name: str) -> str:
    """`layers.0.attention.wq.weight` → `model.layers.0.self_attn.q_proj.weight`; an unknown name stays."""
    found = re.fullmatch(r"(layers\.\d+\.)?(.+)\.(weight|bias)", name)
    if not found:
        return name
    layer, stem, leaf = found.groups()
    expert = re.fullmatch(r"feed_forward\.(experts\.\d+\.w[123])", stem)
    stem = f"block_sparse_moe.{expert[1]}" if expert else NAMES.get(stem, "")
    return f"model.{layer}{stem}.{leaf}" if stem and layer else f"{stem}.{leaf}" if stem else name


def to_native_name(name: str) -> str:
    """The other way; raises UserError for a tensor that native files have no name for."""
    found = re.fullmatch(r"(?:model\.(layers\.\d+\.))?(.+)\.(weight|bias)", name)
    layer, stem, leaf = found.groups() if found else ("", "", "")
    expert = re.fullmatch(r"block_sparse_moe\.(experts\.\d+\.w[123])", stem)
    stem = f"feed_forward.{expert[1]}" if expert else BACK.get(stem, "")
    if not stem:
        raise UserError(f"Mistral's native files have no name for {name!r}")
    return f"{layer or ''}{stem}.{leaf}"


def to_halves(x_ND: Tensor, head_dim: int) -> Tensor:
    """Rows of q or k (or of a bias, or of a LoRA B) from pairs side by side to halves; whole heads only."""
    heads = x_ND.shape[0] // head_dim
    return x_ND.view(heads, head_dim // 2, 2, *x_ND.shape[1:]).transpose(1, 2).reshape(x_ND.shape)


def to_pairs(x_ND: Tensor, head_dim: int) -> Tensor:
    """Rows of q or k from halves to pairs side by side: the inverse of `to_halves`."""
    heads = x_ND.shape[0] // head_dim
    return x_ND.view(heads, 2, head_dim // 2, *x_ND.shape[1:]).transpose(1, 2).reshape(x_ND.shape)


def permuted(stored: Stored, head_dim: int, permute: Callable[[Tensor, int], Tensor]) -> Stored:
    """A stored tensor whose rows come out permuted within each head, also when only some rows are asked for."""

    def read(rows: slice | None) -> Tensor:
        if rows is None:
            return permute(stored.read(None), head_dim)
        first, last = rows.start // head_dim * head_dim, -(-rows.stop // head_dim) * head_dim
        heads_ND = permute(stored.read(slice(first, last)), head_dim)
        return heads_ND[rows.start - first : rows.stop - first]

    return replace(stored, read=read)


def is_rotary(name: str) -> bool:
    """Whether a tensor's rows (under its transformers name) carry the rotary layout."""
    return re.search(r"\.self_attn\.[qk]_proj\.(weight|bias)$", name) is not None


def from_native(files: Mapping[str, Stored], config: Mapping[str, Any]) -> dict[str, Stored]:
    """Native tensors under transformers' names and in its rotary layout."""
    out = {}
    for name, stored in files.items():
        hf = to_hf_name(name)
        out[hf] = permuted(stored, config["head_dim"], to_halves) if is_rotary(hf) else stored
    return out


def head_size(width: Any, heads: Any) -> int:
    """A head's size where a file leaves it out. Raises UserError where the width does not divide."""
    if not isinstance(width, int) or not isinstance(heads, int) or heads < 1 or width % heads:
        raise UserError(f"a width of {width!r} does not divide by {heads!r} heads; the config is corrupt")
    return width // heads


# params.json's keys that are read, or that say nothing about the arithmetic; others are refused unless they are empty.
REQUIRED = ("dim", "n_layers", "n_heads", "hidden_dim", "vocab_size", "norm_eps")
KEYS = {
    *REQUIRED,
    "n_kv_heads",
    "head_dim",
    "rope_theta",
    "sliding_window",
    "tied_embeddings",
    "moe",
    "causal",
    "max_position_embeddings",
    "max_seq_len",
    "max_batch_size",
    "model_type",
}
MOE_KEYS = {"num_experts", "num_experts_per_tok"}


def native_config(params: Mapping[str, Any]) -> dict[str, Any]:
    """params.json in config.json's words. A native file without a window has none; nothing else is guessed."""
    missing = [key for key in REQUIRED if key not in params]
    if missing:
        raise UserError(f"params.json lacks {', '.join(missing)}")
    moe = params.get("moe") or {}
    for where, found, known in (("", params, KEYS), ("moe.", moe, MOE_KEYS)):
        if not isinstance(found, Mapping):
            raise UserError(f"params.json: {where[:-1]} is {found!r}; it must be an object")
        unknown = [key for key, value in found.items() if key not in known and value not in (None, False, {}, [])]
        if unknown:
            raise UserError(
                f"params.json: {where + unknown[0]!r} may change what the model computes; it is not covered"
            )
    if params.get("causal") not in (None, True):
        raise UserError("params.json: causal = false is not covered")
    if lacking := sorted(MOE_KEYS - moe.keys()) if moe else []:
        raise UserError(f"params.json: moe lacks {lacking[0]}")
    raw = {
        "model_type": "mixtral" if moe else "mistral",
        "hidden_size": params["dim"],
        "num_hidden_layers": params["n_layers"],
        "num_attention_heads": params["n_heads"],
        "num_key_value_heads": params.get("n_kv_heads", params["n_heads"]),
        "head_dim": params.get("head_dim") or head_size(params["dim"], params["n_heads"]),
        "intermediate_size": params["hidden_dim"],
        "vocab_size": params["vocab_size"],
        "rms_norm_eps": params["norm_eps"],
        "rope_theta": params.get("rope_theta"),
        "sliding_window": params.get("sliding_window"),
        "tie_word_embeddings": bool(params.get("tied_embeddings", False)),
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if params.get("max_position_embeddings"):
        raw["max_position_embeddings"] = params["max_position_embeddings"]
    if moe:
        raw |= {"num_local_experts": moe["num_experts"], "num_experts_per_tok": moe["num_experts_per_tok"]}
    return raw


def native_params(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json (as ModelConfig.to_dict writes it) in params.json's words, or a UserError for what they lack."""
    if config["model_type"] not in ("mistral", "mixtral"):
        raise UserError(f"Mistral's native files hold mistral and mixtral models, not {config['model_type']}")
    if config.get("rope_scaling"):
        raise UserError("Mistral's native files have no words for rope scaling")
    params = {
        "dim": config["hidden_size"],
        "n_layers": config["num_hidden_layers"],
        "head_dim": config["head_dim"],
        "hidden_dim": config["intermediate_size"],
        "n_heads": config["num_attention_heads"],
        "n_kv_heads": config["num_key_value_heads"],
        "norm_eps": config["rms_norm_eps"],
        "vocab_size": config["vocab_size"],
        "rope_theta": config["rope_theta"],
        "max_position_embeddings": config["max_position_embeddings"],
    }
    if config.get("sliding_window") is not None:
        params["sliding_window"] = config["sliding_window"]
    if config["tie_word_embeddings"]:
        params["tied_embeddings"] = True
    if config["model_type"] == "mixtral":
        params["moe"] = {
            "num_experts": config["num_local_experts"],
            "num_experts_per_tok": config["num_experts_per_tok"],
        }
    return params


def to_native(state: Mapping[str, Stored], head_dim: int) -> dict[str, Stored]:
    """Tensors under transformers' names as native ones, in the native rotary layout."""
    out = {}
    for name, stored in state.items():
        out[to_native_name(name)] = permuted(stored, head_dim, to_pairs) if is_rotary(name) else stored
    return out
