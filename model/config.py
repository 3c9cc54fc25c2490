"""What a checkpoint's config.json says about the architecture, checked; families differ by these values alone.

Two things are refused rather than guessed, because public readers guess them differently: a missing `sliding_window`
in a mistral or mixtral config (4,096 to some readers, none to others) and a missing `rms_norm_eps` (1e-6 to some, 1e-5
in Mistral's own files).
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from model.rotary import RopeScaling
from model.support.cli import UserError, nearest

FAMILIES = ("mistral", "llama", "mixtral", "qwen2")
# What each kind of rotary scaling must say beside its type, and what it may say.
ROPE_FIELDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "dynamic": (("factor",), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"), ()),
    "yarn": (
        ("factor", "original_max_position_embeddings"),
        ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    ),
}


# The largest sizes that are believed (2**20 where nothing is said): a corrupt file must not fill the memory.
MOST = {"num_hidden_layers": 1024, "num_local_experts": 1024, "vocab_size": 2**31, "max_position_embeddings": 2**31,
        "sliding_window": 2**31}  # fmt: skip


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a decoder. Names are config.json's; `windows` holds one entry a layer (None: sees everything).

    Raises UserError where values are impossible, or where this implementation does not cover what they ask for.
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
        for name in (
            "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "head_dim", "max_position_embeddings",
        ):  # fmt: skip
            _count(name, getattr(self, name))
        if self.model_type not in FAMILIES:
            raise UserError(
                f"config: model_type {self.model_type!r} is not covered{nearest(str(self.model_type), FAMILIES)}; "
                f"covered are {', '.join(FAMILIES)}"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise UserError(
                f"config: {self.num_attention_heads} query heads cannot share {self.num_key_value_heads} key/value "
                "heads: num_attention_heads must be a multiple of num_key_value_heads"
            )
        if self.head_dim % 2:
            raise UserError(f"config: head_dim is {self.head_dim}; rotary positions need an even size")
        _positive("rms_norm_eps", self.rms_norm_eps)
        _positive("rope_theta", self.rope_theta)
        if len(self.windows) != self.num_hidden_layers:
            raise UserError(f"config: windows (layer_types) for {len(self.windows)} of {self.num_hidden_layers} layers")
        for window in self.windows:
            if window is not None:
                _count("sliding_window", window)
        for name in ("num_local_experts", "num_experts_per_tok"):
            if getattr(self, name) != 0 or isinstance(getattr(self, name), bool):
                _count(name, getattr(self, name))
        if self.num_experts_per_tok > self.num_local_experts:
            raise UserError(
                f"config: num_experts_per_tok {self.num_experts_per_tok} of num_local_experts {self.num_local_experts}"
            )
        if self.num_local_experts and not self.num_experts_per_tok:
            raise UserError("config: num_experts_per_tok must be at least 1 where there are experts")

    @property
    def window(self) -> int | None:
        """The widest window of any layer; None where some layer sees everything. It bounds the cache."""
        return None if None in self.windows else max(w for w in self.windows if w is not None)

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str]) -> ModelConfig:
        """The config of a checkpoint: config.json (old `rope_theta` or new `rope_parameters`), params.json or GGUF."""
        from model.checkpoints.weights import config_dict

        try:
            return cls.from_dict(config_dict(path))
        except UserError as error:
            raise UserError(f"{path}: {error}") from error

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> ModelConfig:
        """Read config.json's keys. Raises UserError for what is missing, impossible or not covered."""
        family = raw.get("model_type")
        if family not in FAMILIES:
            raise UserError(
                f"model_type {family!r} is not covered{nearest(str(family), FAMILIES)}; "
                f"covered are {', '.join(FAMILIES)}"
            )
        required = (
            "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "rms_norm_eps",
        )  # fmt: skip
        moe = family == "mixtral"
        asked = (*required, "num_local_experts", "num_experts_per_tok") if moe else required
        missing = [name for name in asked if raw.get(name) is None]
        if family != "llama" and "num_key_value_heads" not in raw:  # 8, 32 or all of them, by the reader's default
            missing.append("num_key_value_heads")
        if missing:
            raise UserError(f"config lacks {', '.join(missing)}; add what the model was trained with")
        _refuse_uncovered(raw)
        width, heads = (_count(name, raw[name]) for name in ("hidden_size", "num_attention_heads"))
        if raw.get("head_dim") is None and width % heads:
            raise UserError(f"config lacks head_dim, and hidden_size {width} is no multiple of {heads} heads")
        theta, scaling = _rope(raw)
        eos = raw.get("eos_token_id")
        eos = eos if isinstance(eos, list) else [eos]
        return cls(
            **{name: raw[name] for name in required},
            num_key_value_heads=heads if raw.get("num_key_value_heads") is None else raw["num_key_value_heads"],
            head_dim=width // heads if raw.get("head_dim") is None else raw["head_dim"],
            rope_theta=theta,
            rope_scaling=scaling,
            windows=_windows(raw),
            model_type=family,
            max_position_embeddings=32768 if (most := raw.get("max_position_embeddings")) is None else most,
            # transformers writes only what differs from its family default, which is untied for all four
            tie_word_embeddings=bool(raw.get("tie_word_embeddings")),
            qkv_bias=family == "qwen2" or bool(raw.get("attention_bias")),
            o_bias=family == "llama" and bool(raw.get("attention_bias")),
            num_local_experts=raw["num_local_experts"] if moe else 0,
            num_experts_per_tok=raw["num_experts_per_tok"] if moe else 0,
            bos_token_id=_token("bos_token_id", raw.get("bos_token_id")),
            eos_token_id=tuple(i for i in (_token("eos_token_id", value) for value in eos) if i is not None),
            pad_token_id=_token("pad_token_id", raw.get("pad_token_id")),
        )

    def to_dict(self) -> dict[str, Any]:
        """config.json as transformers reads it, in both rotary spellings."""
        scaling = {k: v for k, v in asdict(self.rope_scaling).items() if v is not None} if self.rope_scaling else {}
        eos = self.eos_token_id
        raw: dict[str, Any] = {
            "architectures": [f"{self.model_type.capitalize()}ForCausalLM"],
            "model_type": self.model_type,
            "hidden_act": "silu",
            **{
                name: getattr(self, name)
                for name in (
                    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                    "num_key_value_heads", "head_dim", "rms_norm_eps", "rope_theta", "max_position_embeddings",
                    "tie_word_embeddings", "bos_token_id", "pad_token_id",
                )
            },
            "eos_token_id": None if not eos else eos[0] if len(eos) == 1 else list(eos),
            "rope_scaling": scaling or None,
            "rope_parameters": {"rope_type": "default", "rope_theta": self.rope_theta, **scaling},
        }  # fmt: skip
        if self.model_type == "llama":
            raw["attention_bias"] = self.qkv_bias
        if self.model_type in ("mistral", "mixtral"):
            raw["sliding_window"] = self.windows[0]
        if self.model_type == "mixtral":
            raw |= {"num_local_experts": self.num_local_experts, "num_experts_per_tok": self.num_experts_per_tok}
        if self.model_type == "qwen2":
            wide = sum(window is None for window in self.windows)
            some = wide < self.num_hidden_layers
            raw |= {
                "use_sliding_window": some,
                "sliding_window": next((w for w in self.windows if w is not None), None),
                "max_window_layers": wide,
                "layer_types": ["full_attention" if w is None else "sliding_attention" for w in self.windows],
            }
        return raw


def _count(name: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"config: {name} is {value!r}; it must be a whole number of at least 1")
    most = MOST.get(name, 2**20)
    if value > most:
        raise UserError(f"config: {name} is {value}, more than {most}; the file is corrupt")
    return value


def _token(name: str, value: Any) -> int | None:
    """A token's id; null, and the negative ids of some old files, stand for none."""
    if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
        raise UserError(f"config: {name} is {value!r}; it must be a token's id (a whole number) or null")
    return value if value is not None and value >= 0 else None


def _positive(name: str, value: Any) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < math.inf:
        raise UserError(f"config: {name} is {value!r}; it must be a number above 0")
    return float(value)


def _windows(raw: Mapping[str, Any]) -> tuple[int | None, ...]:
    """Each layer's window. Qwen2's first `max_window_layers` layers see everything."""
    family, layers = raw["model_type"], _count("num_hidden_layers", raw["num_hidden_layers"])
    window = raw.get("sliding_window")
    if family == "llama" or family == "qwen2" and not raw.get("use_sliding_window"):
        return (None,) * layers
    if family in ("mistral", "mixtral"):
        if "sliding_window" not in raw:
            raise UserError(
                "config lacks sliding_window; say 4096 for Mistral-7B v0.1 or null for none "
                "(v0.2, v0.3 and Mixtral): readers guess it differently"
            )
        return (window,) * layers
    kinds, wide = raw.get("layer_types"), raw.get("max_window_layers")
    if window is None or not isinstance(kinds, list) and not isinstance(wide, int):
        raise UserError("config says use_sliding_window but lacks sliding_window or max_window_layers")
    if isinstance(kinds, list):
        if strange := [kind for kind in kinds if kind not in ("sliding_attention", "full_attention")]:
            raise UserError(f"config: layer_types holds {strange[0]!r}, which is not covered")
        return tuple(window if kind == "sliding_attention" else None for kind in kinds)
    assert isinstance(wide, int)
    return tuple(window if layer >= wide else None for layer in range(layers))


def _rope(raw: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """(theta, scaling) from `rope_parameters` (new) or `rope_theta` and `rope_scaling` (old)."""
    new, old = raw.get("rope_parameters") or {}, raw.get("rope_scaling") or {}
    if not isinstance(new, dict) or not isinstance(old, dict):
        raise UserError("config: rope_scaling and rope_parameters must be objects or null")
    theta = new.get("rope_theta", raw.get("rope_theta"))
    if theta is None and raw["model_type"] == "llama":
        theta = 1e4  # Llama-2's own config.json leaves it out, and every reader takes the paper's
    if theta is None:
        raise UserError("config lacks rope_theta (1e4 for Mistral v0.1, 1e6 for v0.2, v0.3 and Mixtral)")
    if raw.get("rope_theta") not in (None, theta):
        raise UserError(f"config contradicts itself: rope_theta {raw['rope_theta']} and rope_parameters {theta}")
    spec = {**old, **new}
    kind = spec.get("rope_type", spec.get("type", "default"))
    if spec.get("partial_rotary_factor", 1.0) != 1.0:
        raise UserError("config: partial_rotary_factor other than 1 is not covered")
    if not isinstance(kind, str) or kind not in ROPE_FIELDS:
        raise UserError(f"rope scaling {kind!r} is not covered; covered are {', '.join(ROPE_FIELDS)}")
    if kind == "default":
        return _positive("rope_theta", theta), None
    needed, optional = ROPE_FIELDS[kind]
    trained = raw.get("max_position_embeddings")
    if kind == "dynamic" and trained is None:
        raise UserError("rope scaling 'dynamic' needs max_position_embeddings, the length the model was trained on")
    if kind in ("llama3", "yarn"):  # transformers falls back to the model's own length
        spec.setdefault("original_max_position_embeddings", trained)
    missing = [name for name in needed if spec.get(name) is None]
    if missing:
        raise UserError(f"rope scaling {kind!r} lacks {', '.join(missing)}")
    known = {name: spec[name] for name in (*needed, *optional) if spec.get(name) is not None}
    for name in known.keys() - {"truncate"}:
        _positive(f"rope scaling {kind!r}: {name}", known[name])
    if kind == "yarn" and _positive("rope_theta", theta) <= 1:
        raise UserError(f"rope scaling 'yarn' takes logarithms of rope_theta, which is {theta}; it must be above 1")
    if kind == "llama3" and known["low_freq_factor"] >= known["high_freq_factor"]:
        raise UserError("rope scaling 'llama3': low_freq_factor must be below high_freq_factor")
    if kind == "dynamic" and raw.get("head_dim") == 2:
        raise UserError("rope scaling 'dynamic' needs a head_dim above 2")
    return _positive("rope_theta", theta), RopeScaling(rope_type=kind, **known)


def _refuse_uncovered(raw: Mapping[str, Any]) -> None:
    """Refuse by name what would change the arithmetic and is not implemented."""
    for name in ("tie_word_embeddings", "attention_bias", "use_sliding_window", "mlp_bias"):
        if not isinstance(raw.get(name), (bool, type(None))):
            raise UserError(f"config: {name} is {raw[name]!r}; it must be true or false")
    if raw.get("hidden_act", "silu") != "silu":
        raise UserError(f"config: hidden_act {raw['hidden_act']!r} is not covered; these families use silu")
    if raw.get("quantization_config"):
        raise UserError("config: quantized checkpoints (quantization_config) are not covered; give the full weights")
    if raw.get("mlp_bias"):
        raise UserError("config: mlp_bias is not covered")
    if raw.get("attention_bias") and raw["model_type"] in ("mistral", "mixtral"):
        raise UserError(f"config: attention_bias is not part of the {raw['model_type']} family")
