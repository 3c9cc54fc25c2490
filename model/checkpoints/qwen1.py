"""The first version of Qwen-7B: GPT-2's module names, a joint qkv matrix, gate and up named w2 and w1."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from model.checkpoints.mistral import split_name
from model.checkpoints.safetensors import Stored
from model.checkpoints.weights import Checkpoint
from model.support.cli import UserError

QWEN = {
    "transformer.wte": "model.embed_tokens",
    "transformer.ln_f": "model.norm",
    "lm_head": "lm_head",
    "ln_1": "input_layernorm",
    "ln_2": "post_attention_layernorm",
    "attn.c_proj": "self_attn.o_proj",
    "mlp.w1": "mlp.up_proj",
    "mlp.w2": "mlp.gate_proj",
    "mlp.c_proj": "mlp.down_proj",
}
SAME = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
RENAMED = {"layer_norm_epsilon": "rms_norm_eps", "rotary_emb_base": "rope_theta"}


def from_qwen(checkpoint: Checkpoint, raw: Mapping[str, Any]) -> Checkpoint:
    """The checkpoint under Qwen2's names. Unknown names are kept, so that they are reported as unexpected."""
    third = raw.get("kv_channels", 128) * raw.get("num_attention_heads", 0)
    out: dict[str, Stored] = {}
    for name, stored in checkpoint.tensors.items():
        layer, stem, leaf = split_name(name, r"transformer\.h")
        if stem == "attn.c_attn":
            for number, part in enumerate(("q_proj", "k_proj", "v_proj")):
                out[f"{layer}self_attn.{part}.{leaf}"] = _rows(stored, number * third, third)
        elif stem in QWEN:
            out[f"{layer}{QWEN[stem]}.{leaf}"] = stored
        elif not name.endswith("rotary_emb.inv_freq"):
            out[name] = stored
    return replace(checkpoint, tensors=out, format="qwen")


def _rows(stored: Stored, first: int, count: int) -> Stored:
    """A stored tensor's rows `first` to `first + count` as a Stored."""

    def read(rows: slice | None) -> Tensor:
        rows = slice(0, count) if rows is None else rows
        return stored.read(slice(first + rows.start, first + rows.stop))

    shape = (max(0, min(count, stored.shape[0] - first)), *stored.shape[1:])
    return replace(stored, shape=shape, read=read)


def qwen2_config(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Convert Qwen-7B's config.json to Qwen2's keys. Its `intermediate_size` is the width of gate and up together."""
    if missing := [name for name in (*SAME, *RENAMED) if raw.get(name) is None]:
        raise UserError(f"config lacks {', '.join(missing)}; the config of Qwen's first version has them")
    if raw.get("rotary_pct", 1.0) != 1.0 or not raw.get("no_bias", True):
        raise UserError("config: Qwen with partial rotary embedding, or with biases on all layers, is not supported")
    return {
        "model_type": "qwen2",
        **{name: raw[name] for name in SAME},
        **{RENAMED[name]: raw[name] for name in RENAMED},
        "intermediate_size": raw["intermediate_size"] // 2,
        "num_key_value_heads": raw["num_attention_heads"],
        "head_dim": raw.get("kv_channels", 128),
        "max_position_embeddings": raw.get("seq_length") or raw.get("max_position_embeddings"),
        "use_sliding_window": False,
        "tie_word_embeddings": bool(raw.get("tie_word_embeddings", False)),
        "bos_token_id": raw.get("bos_token_id"),
        "eos_token_id": raw.get("eos_token_id"),
    }
