"""A config is read from either spelling, written so that it reads back, and refused where it would have to guess."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import FAMILIES, LLAMA3, raw_config

from model import ModelConfig
from model.support.cli import UserError


@pytest.mark.parametrize("family", FAMILIES)
def test_reads_back_what_it_writes(family):
    config = ModelConfig.from_dict(raw_config(family))
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_both_rotary_spellings_say_the_same():
    old = raw_config("llama-3")
    new = {k: v for k, v in old.items() if k not in ("rope_theta", "rope_scaling")}
    new["rope_parameters"] = {"rope_theta": old["rope_theta"], **old["rope_scaling"]}
    assert ModelConfig.from_dict(old) == ModelConfig.from_dict(new)
    older = {**old, "rope_scaling": {("type" if k == "rope_type" else k): v for k, v in old["rope_scaling"].items()}}
    assert ModelConfig.from_dict(older) == ModelConfig.from_dict(new)


def test_windows_of_each_family():
    def windows(family, **changes):
        return ModelConfig.from_dict(raw_config(family, **changes)).windows

    assert windows("mistral") == (8, 8, 8)
    assert windows("mistral", sliding_window=None) == (None,) * 3
    assert windows("llama", sliding_window=4) == (None,) * 3  # not part of the family
    assert windows("qwen2-window") == (None, 7, 7)  # the first max_window_layers layers see everything
    assert windows("qwen2-window", use_sliding_window=False) == (None,) * 3
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    mixed = ModelConfig.from_dict(raw_config("qwen2-window", layer_types=kinds))
    assert mixed.windows == (7, None, 7)
    assert ModelConfig.from_dict(mixed.to_dict()) == mixed


@pytest.mark.parametrize(
    "family, changes, tokens",
    [
        ("llama", {}, 64),
        ("llama-linear", {}, 128),  # 2 × 64
        ("llama-dynamic", {}, 36),  # 3 × 12
        ("llama-yarn", {}, 64),  # 4 × 16, as the file says too
        ("llama-yarn", {"max_position_embeddings": 16}, 64),
        ("llama-3", {}, 64),  # Llama-3's files give the scaled length: 131,072 for 8 × 8,192
    ],
)
def test_rotary_scaling_extends_the_longest_sequence(family, changes, tokens):
    config = ModelConfig.from_dict(raw_config(family, **changes))
    assert config.max_length == tokens
    assert config.batch_length == (12 if family == "llama-dynamic" else tokens)


def without(family: str, *names: str) -> dict:
    return {k: v for k, v in raw_config(family).items() if k not in names}


REFUSED = {
    "window not said": (without("mistral", "sliding_window"), "sliding_window"),
    "eps not said": (without("mistral", "rms_norm_eps"), "rms_norm_eps"),
    "theta not said": (without("mistral", "rope_theta"), "rope_theta"),
    "kv heads not said": (without("mistral", "num_key_value_heads"), "num_key_value_heads"),
    "several missing": (without("mistral", "hidden_size", "vocab_size"), "vocab_size, hidden_size"),
    "another family": (raw_config("mistral", model_type="mistrall"), "did you mean 'mistral'"),
    "no family": (without("mistral", "model_type"), "model_type"),
    "window 0": (raw_config("mistral", sliding_window=0), "sliding_window"),
    "window text": (raw_config("mistral", sliding_window="4096"), "sliding_window"),
    "heads do not divide": (raw_config("mistral", num_key_value_heads=3), "multiple"),
    "width does not divide": (raw_config("mistral", head_dim=None, hidden_size=26), "head_dim"),
    "odd head": (raw_config("mistral", head_dim=5), "even"),
    "zero layers": (raw_config("mistral", num_hidden_layers=0), "num_hidden_layers"),
    "a million layers": (raw_config("mistral", num_hidden_layers=10**6), "num_hidden_layers"),
    "width is text": (raw_config("mistral", hidden_size="24"), "hidden_size"),
    "eps is text": (raw_config("mistral", rms_norm_eps="1e-5"), "rms_norm_eps"),
    "eps is nan": (raw_config("mistral", rms_norm_eps=float("nan")), "rms_norm_eps"),
    "eps is beyond all floats": (raw_config("mistral", rms_norm_eps=10**400), "rms_norm_eps"),
    "theta is beyond all floats": (raw_config("mistral", rope_theta=10**400), "rope_theta"),
    "theta is a list": (raw_config("mistral", rope_theta=[1e4]), "rope_theta"),
    "two thetas": (raw_config("llama", rope_parameters={"rope_theta": 5.0}), "contradicts"),
    "longrope": (raw_config("llama", rope_scaling={"rope_type": "longrope", "factor": 2.0}), "longrope"),
    "yarn without factor": (raw_config("llama", rope_scaling={"rope_type": "yarn"}), "factor"),
    "factor of nothing": (raw_config("llama", rope_scaling={"rope_type": "linear", "factor": 0}), "factor"),
    "rope is text": (raw_config("llama", rope_scaling="linear"), "rope_scaling"),
    "partial rotary": (raw_config("llama", rope_parameters={"partial_rotary_factor": 0.5}), "partial_rotary"),
    "gelu": (raw_config("llama", hidden_act="gelu"), "hidden_act"),
    "quantized": (raw_config("llama", quantization_config={"bits": 4}), "quantiz"),
    "mlp bias": (raw_config("llama", mlp_bias=True), "mlp_bias"),
    "mistral with bias": (raw_config("mistral", attention_bias=True), "attention_bias"),
    "mixtral without experts": (without("mixtral", "num_local_experts"), "num_local_experts"),
    "more experts than there are": (raw_config("mixtral", num_experts_per_tok=5), "num_experts_per_tok"),
    "layer kinds short": (raw_config("qwen2-window", layer_types=["sliding_attention"]), "layer"),
    "sliding without a width": (raw_config("qwen2-window", sliding_window=None), "sliding_window"),
    "a width of two thousand million": (raw_config("mistral", hidden_size=2**31 - 2), "hidden_size"),
    "a thousand million experts": (raw_config("mixtral", num_local_experts=10**9), "num_local_experts"),
    "experts in words": (raw_config("mixtral", num_local_experts="8"), "num_local_experts"),
    "experts yes": (raw_config("mixtral", num_local_experts=True, num_experts_per_tok=True), "num_local_experts"),
    "tied in words": (raw_config("llama", tie_word_embeddings="false"), "tie_word_embeddings"),
    "windows in words": (raw_config("qwen2-window", use_sliding_window="no"), "use_sliding_window"),
    "end token in words": (raw_config("llama", eos_token_id="</s>"), "eos_token_id"),
    "end tokens in lists": (raw_config("llama", eos_token_id=[[2]]), "eos_token_id"),
    "half a pad token": (raw_config("llama", pad_token_id=3.5), "pad_token_id"),
    "yarn of theta 1": (raw_config("llama-yarn", rope_theta=1.0), "above 1"),
    "llama3's factors swapped": (raw_config("llama-3", rope_scaling={**LLAMA3, "low_freq_factor": 4.0}), "below"),
    "dynamic, one pair": (raw_config("llama-dynamic", head_dim=2), "head_dim"),
    "dynamic, trained length not said": (without("llama-dynamic", "max_position_embeddings"), "max_position"),
}


@pytest.mark.parametrize("why", REFUSED)
def test_refused_by_name(why):
    raw, named = REFUSED[why]
    with pytest.raises(UserError, match=named):
        ModelConfig.from_dict(raw)


def test_llama_2_as_published_needs_no_theta():
    """Llama-2's own config.json says no rope_theta and (7B) no key/value heads; readers take 1e4 and all heads."""
    config = ModelConfig.from_dict(without("llama", "rope_theta", "num_key_value_heads"))
    assert config.rope_theta == 1e4 and config.num_key_value_heads == 4


junk = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 70),
    st.floats(),
    st.text(max_size=4),
    st.lists(st.integers(), max_size=2),
    st.dictionaries(st.sampled_from(("rope_type", "factor", "rope_theta")), st.integers(0, 3)),
)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(sorted(FAMILIES)), st.data())
def test_any_wrong_value_is_a_user_error(family, data):
    raw = raw_config(family)
    for name in data.draw(st.lists(st.sampled_from(sorted([*raw, "rope_scaling", "layer_types"])), max_size=3)):
        raw[name] = data.draw(junk)
    try:
        config = ModelConfig.from_dict(raw)
    except UserError:
        return
    json.dumps(config.to_dict())  # what is accepted can be written


def test_the_files_name_is_in_the_message(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(without("mistral", "sliding_window")))
    with pytest.raises(UserError, match=str(tmp_path)):
        ModelConfig.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(UserError, match="not a JSON object"):
        ModelConfig.from_pretrained(tmp_path)


def test_a_negative_token_is_none_as_in_some_old_files():
    config = ModelConfig.from_dict(raw_config("llama", pad_token_id=-1, eos_token_id=[2, -1], bos_token_id=None))
    assert (config.pad_token_id, config.eos_token_id, config.bos_token_id) == (None, (2,), None)
