"""Convert config.json to the fields of a ModelConfig, and back.

Two keys are required because programs differ in their defaults: `sliding_window` in a mistral or mixtral config (4,096
or none) and `rms_norm_eps` (1e-6, or 1e-5 as in Mistral's own files).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from model.rotary import RopeScaling
from model.support.checks import one_of, positive, whole
from model.support.cli import UserError

FAMILIES = ("mistral", "llama", "mixtral", "qwen2")
# Upper bounds of sizes (the lower is 1): a corrupt file must not make us allocate all memory.
UPPER_BOUNDS = {
    "vocab_size": 2**31,
    "hidden_size": 2**20,
    "intermediate_size": 2**20,
    "num_hidden_layers": 1024,
    "num_attention_heads": 2**20,
    "num_key_value_heads": 2**20,
    "head_dim": 2**20,
    "max_position_embeddings": 2**31,
}
EXPERTS = ("num_local_experts", "num_experts_per_tok")
REQUIRED = (*list(UPPER_BOUNDS)[:5], "rms_norm_eps")
# Supported values of keys that change the arithmetic.
SUPPORTED: dict[str, tuple[Any, ...]] = {
    "hidden_act": (None, "silu"),
    "quantization_config": (None, {}),
    "mlp_bias": (None, False),
    "attention_bias": (None, False, True),
    "tie_word_embeddings": (None, False, True),
    "use_sliding_window": (None, False, True),
}
# Rotary scaling: type → (required fields, optional fields).
ROPE_FIELDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "linear": (("factor",), ("original_max_position_embeddings",)),
    "dynamic": (("factor",), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"), ()),
    "yarn": (
        ("factor", "original_max_position_embeddings"),
        ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    ),
}


def read_fields(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of ModelConfig from the content of a config.json.

    Raises UserError for missing keys and for impossible or unsupported values.
    """
    family = one_of("model_type", raw.get("model_type"), FAMILIES)
    required = (*REQUIRED, *EXPERTS) if family == "mixtral" else REQUIRED
    missing = [name for name in required if raw.get(name) is None]
    if family != "llama" and "num_key_value_heads" not in raw:  # programs differ in the default
        missing.append("num_key_value_heads")
    if missing:
        raise UserError(f"config lacks {', '.join(missing)}; add the values that the model was trained with")
    for name, values in SUPPORTED.items():
        one_of(name, raw.get(name), values)
    if raw.get("attention_bias") and family in ("mistral", "mixtral"):
        raise UserError(f"config: attention_bias is not part of the {family} family")
    given = {name: value for name, value in raw.items() if value is not None}
    sizes = {name: whole(name, raw[name], 1, most) for name, most in UPPER_BOUNDS.items() if name in required}
    width, heads, layers = (sizes[name] for name in ("hidden_size", "num_attention_heads", "num_hidden_layers"))
    if "head_dim" not in given and width % heads:
        raise UserError(f"config lacks head_dim, and hidden_size {width} is not a multiple of {heads} heads")
    theta, scaling = _rope(raw)
    eos = raw.get("eos_token_id")
    eos_ids = [_token("eos_token_id", value) for value in (eos if isinstance(eos, list) else [eos])]
    return {
        **{name: raw[name] for name in required},
        "num_key_value_heads": given.get("num_key_value_heads", heads),
        "head_dim": given.get("head_dim", width // heads),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "windows": _windows(raw, layers),
        "model_type": family,
        "max_position_embeddings": given.get("max_position_embeddings", 32768),
        # transformers omits values that equal the family's default, which is untied for all four families
        "tie_word_embeddings": bool(raw.get("tie_word_embeddings")),
        "qkv_bias": family == "qwen2" or bool(raw.get("attention_bias")),
        "o_bias": family == "llama" and bool(raw.get("attention_bias")),
        "bos_token_id": _token("bos_token_id", raw.get("bos_token_id")),
        "eos_token_id": tuple(i for i in eos_ids if i is not None),
        "pad_token_id": _token("pad_token_id", raw.get("pad_token_id")),
    }


def write_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The content of config.json for transformers from the fields of ModelConfig, with old and new rotary keys."""
    renamed = {"windows", "qkv_bias", "o_bias", *EXPERTS}
    raw = {name: value for name, value in fields.items() if name not in renamed}
    family, windows, eos = fields["model_type"], list(fields["windows"]), list(fields["eos_token_id"])
    scaling = {name: value for name, value in (fields["rope_scaling"] or {}).items() if value is not None}
    raw |= {
        "architectures": [f"{family.capitalize()}ForCausalLM"],
        "hidden_act": "silu",
        "eos_token_id": eos if len(eos) > 1 else eos[0] if eos else None,
        "rope_scaling": scaling or None,
        "rope_parameters": {"rope_type": "default", "rope_theta": fields["rope_theta"], **scaling},
    }
    if family == "llama":
        raw["attention_bias"] = fields["qkv_bias"]
    if family in ("mistral", "mixtral"):
        raw["sliding_window"] = windows[0]
    if family == "mixtral":
        raw |= {name: fields[name] for name in EXPERTS}
    if family == "qwen2":
        raw |= {
            "use_sliding_window": any(windows),
            "sliding_window": next((w for w in windows if w is not None), None),
            "max_window_layers": windows.count(None),
            "layer_types": ["full_attention" if w is None else "sliding_attention" for w in windows],
        }
    return raw


def _token(name: str, value: Any) -> int | None:
    """A token id, or None for null and for the negative ids of some old files."""
    return value if value is not None and whole(name, value, -(2**31), 2**31) >= 0 else None


def _windows(raw: Mapping[str, Any], layers: int) -> tuple[int | None, ...]:
    """Each layer's window (None: full attention). Qwen2's first `max_window_layers` layers have none."""
    family, window = raw["model_type"], raw.get("sliding_window")
    if family == "llama" or family == "qwen2" and not raw.get("use_sliding_window"):
        return (None,) * layers
    if family != "qwen2":
        if "sliding_window" not in raw:
            raise UserError(
                "config lacks sliding_window: 4096 for Mistral-7B v0.1, null (none) for v0.2, v0.3, Mixtral"
            )
        return (window,) * layers
    kinds, full = raw.get("layer_types"), raw.get("max_window_layers")
    if isinstance(full, int) and not isinstance(kinds, list):
        kinds = ["full_attention" if layer < full else "sliding_attention" for layer in range(layers)]
    if window is None or not isinstance(kinds, list):
        raise UserError("config says use_sliding_window but lacks sliding_window or max_window_layers")
    for kind in kinds:
        one_of("layer_types", kind, ("sliding_attention", "full_attention"))
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _rope(raw: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """(theta, scaling) from `rope_parameters` (new) or `rope_theta` and `rope_scaling` (old)."""
    new, old = raw.get("rope_parameters") or {}, raw.get("rope_scaling") or {}
    if not isinstance(new, dict) or not isinstance(old, dict):
        raise UserError("config: rope_scaling and rope_parameters must be objects or null")
    theta = new.get("rope_theta", raw.get("rope_theta"))
    if theta is None and raw["model_type"] == "llama":
        theta = 1e4  # Llama-2's own config.json omits it; every program uses the paper's value
    if theta is None:
        raise UserError("config lacks rope_theta (1e4 for Mistral v0.1, 1e6 for v0.2, v0.3 and Mixtral)")
    if raw.get("rope_theta") not in (None, theta):
        raise UserError(f"config contradicts itself: rope_theta {raw['rope_theta']} and rope_parameters {theta}")
    theta, spec, trained = positive("rope_theta", theta), {**old, **new}, raw.get("max_position_embeddings")
    kind = one_of("rope_type", spec.get("rope_type", spec.get("type", "default")), list(ROPE_FIELDS))
    if spec.get("partial_rotary_factor", 1.0) != 1.0:
        raise UserError("config: partial_rotary_factor other than 1 is not supported")
    if kind == "default":
        return theta, None
    if kind == "dynamic" and trained is None:
        raise UserError("rope scaling 'dynamic' needs max_position_embeddings, the length the model was trained on")
    if kind in ("llama3", "yarn"):  # the default in transformers too
        spec.setdefault("original_max_position_embeddings", trained)
    needed, optional = ROPE_FIELDS[kind]
    known = {name: spec[name] for name in (*needed, *optional) if spec.get(name) is not None}
    if missing := [name for name in needed if name not in known]:
        raise UserError(f"rope scaling {kind!r} lacks {', '.join(missing)}")
    for name in known.keys() - {"truncate"}:
        positive(f"rope scaling {kind!r}: {name}", known[name])
    if kind == "yarn" and theta <= 1:
        raise UserError(f"rope scaling 'yarn' takes logarithms of rope_theta, which is {theta}; it must be above 1")
    if kind == "llama3" and known["low_freq_factor"] >= known["high_freq_factor"]:
        raise UserError("rope scaling 'llama3': low_freq_factor must be below high_freq_factor")
    if kind == "dynamic" and raw.get("head_dim") == 2:
        raise UserError("rope scaling 'dynamic' needs a head_dim above 2")
    return theta, RopeScaling(rope_type=kind, **known)
