"""Model configuration, validated. Families (Mistral, Llama, Mixtral, Qwen2) differ in these values only.

model/checkpoints/config_json.py reads and writes config.json.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from model.checkpoints.config_json import EXPERTS, FAMILIES, UPPER_BOUNDS, read_fields, write_fields
from model.rotary import RopeScaling
from model.support.checks import one_of, positive, whole
from model.support.cli import UserError


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a decoder. Field names are config.json's; `windows` has one entry per layer (None: full attention).

    Raises UserError if a value is invalid or not supported.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    windows: tuple[int | None, ...]
    model_type: str = "mistral"
    rope_scaling: RopeScaling | None = None
    max_position_embeddings: int = 32768
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    num_local_experts: int = 0
    num_experts_per_tok: int = 0
    bos_token_id: int | None = None
    eos_token_id: tuple[int, ...] = ()
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        one_of("model_type", self.model_type, FAMILIES)
        for name, limit in UPPER_BOUNDS.items():
            whole(name, getattr(self, name), 1, limit)
        for name in EXPERTS:
            whole(name, getattr(self, name), 0, 1024)
        for window in self.windows:
            if window is not None:
                whole("sliding_window", window, 1, 2**31)
        positive("rms_norm_eps", self.rms_norm_eps)
        positive("rope_theta", self.rope_theta)
        if self.num_attention_heads % self.num_key_value_heads:
            raise UserError("config: num_attention_heads must be a multiple of num_key_value_heads")
        if self.head_dim % 2:
            raise UserError(f"config: head_dim is {self.head_dim}; rotary embedding needs an even size")
        if len(self.windows) != self.num_hidden_layers:
            raise UserError(f"config: {len(self.windows)} windows (layer_types) for {self.num_hidden_layers} layers")
        if not min(self.num_local_experts, 1) <= self.num_experts_per_tok <= self.num_local_experts:
            raise UserError("config: num_experts_per_tok must be from 1 to num_local_experts (0 without experts)")

    @property
    def window(self) -> int | None:
        """Largest window of any layer, which bounds the KV cache; None if any layer has full attention."""
        return None if None in self.windows else max(w for w in self.windows if w is not None)

    @property
    def max_length(self) -> int:
        """Longest supported sequence in tokens: `max_position_embeddings`, or what rotary scaling extends it to."""
        scaling = self.rope_scaling
        if scaling is None or scaling.rope_type not in ("linear", "dynamic", "yarn"):
            return self.max_position_embeddings
        original = scaling.original_max_position_embeddings or self.max_position_embeddings
        return max(self.max_position_embeddings, int(min(scaling.factor * original, 2**31)))

    @property
    def is_dynamic(self) -> bool:
        """True if one sequence beyond the trained length changes the rotary angles of its whole batch."""
        return self.rope_scaling is not None and self.rope_scaling.rope_type == "dynamic"

    @property
    def batch_length(self) -> int:
        """Longest sequence whose result does not depend on the rest of its batch."""
        return self.max_position_embeddings if self.is_dynamic else self.max_length

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str]) -> ModelConfig:
        """Read the config of a checkpoint: config.json, Mistral's params.json, or a GGUF header."""
        from model.checkpoints.weights import config_dict

        try:
            return cls.from_dict(config_dict(path))
        except UserError as error:
            raise UserError(f"{path}: {str(error).removeprefix(f'{path}: ')}") from error

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> ModelConfig:
        """Read config.json's keys. Raises UserError for missing, invalid or unsupported values."""
        return cls(**read_fields(raw))

    def to_dict(self) -> dict[str, Any]:
        """config.json for transformers, with rotary settings under both the old and the new keys."""
        return write_fields(asdict(self))
