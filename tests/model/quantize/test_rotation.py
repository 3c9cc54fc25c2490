"""A rotated model is the same function, whatever the family; a rotation of one side only is not."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora import LoRAConfig, add_lora
from model import ModelConfig, Transformer
from model.quantize import rotation
from model.quantize.rotation import Rotation, kronecker_factors, rotate, turn
from model.support.init import init_weights

BASE = ModelConfig(
    vocab_size=80,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=12,
    rms_norm_eps=1e-5,
    rope_theta=1e4,
    windows=(7, None),
)
FAMILIES = {
    "mistral": {"windows": (5, 5)},
    "llama": {"model_type": "llama", "windows": (None, None), "qkv_bias": True, "o_bias": True},
    "llama tied": {"model_type": "llama", "windows": (None, None), "tie_word_embeddings": True},
    "qwen2": {"model_type": "qwen2", "qkv_bias": True, "tie_word_embeddings": True, "num_key_value_heads": 6},
    "mixtral": {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
}
TOKENS = torch.randint(0, 80, (2, 20), generator=torch.Generator().manual_seed(1))


def drawn_model(changes, adapted=False):
    """fp64, every parameter random: norms' gains and biases too."""
    model = init_weights(Transformer(replace(BASE, **changes)), 0).double().requires_grad_(False)
    if adapted:
        add_lora(model, LoRAConfig(r=3, alpha=6), seed=0)
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith("bias") or "lora_B" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model.eval()


def error(model, truth):
    return ((model(TOKENS) - truth).abs().max() / truth.abs().max()).item()


@settings(deadline=None, max_examples=40)
@given(size=st.integers(1, 200), seed=st.integers(0, 99))
def test_a_turn_is_a_product_with_one_orthogonal_matrix(size, seed):
    signs_D = rotation.signs((size,), torch.Generator().manual_seed(seed))
    matrix = turn(torch.eye(size, dtype=torch.float64), signs_D)
    assert torch.allclose(matrix @ matrix.t(), torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-13)
    left, right = kronecker_factors(size, torch.float64, torch.device("cpu"))
    assert torch.allclose(matrix, signs_D[:, None] * torch.kron(left, right), rtol=0, atol=1e-13)
    assert matrix.abs().max() <= 2 / size**0.5 + 1e-12  # an outlier is spread over all coordinates


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_function_is_unchanged(family, adapted):
    model = drawn_model(FAMILIES[family], adapted)
    truth, before = model(TOKENS), model.model.layers[0].self_attn.q_proj.weight.clone()
    rotate(model, seed=3)
    assert error(model, truth) <= 1e-12
    assert (model.model.layers[0].self_attn.q_proj.weight - before).abs().max() > 0.01
    assert all(bool((p == 1).all()) for n, p in model.named_parameters() if "norm" in n)


def test_a_rotated_model_is_saved_as_any_other(tmp_path):
    model = rotate(drawn_model(FAMILIES["llama tied"]))
    model.save_pretrained(tmp_path / "m")
    again = Transformer.from_pretrained(tmp_path / "m", dtype=torch.float64)
    assert torch.equal(again(TOKENS), model(TOKENS))


def test_outliers_are_spread():
    """One channel of the stream 100 times the others: after the rotation no channel is three times their mean."""
    x_ND = torch.randn(500, 48, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x_ND[:, 5] *= 100
    size_D = turn(x_ND, rotation.signs((48,), torch.Generator().manual_seed(1))).abs().mean(0)
    assert size_D.max() < 3 * size_D.mean()


MUTATIONS = {
    "the writers are not turned": ("mixes_rows", lambda path: path.endswith(".v_proj")),
    "the values are not turned": ("mixes_rows", lambda path: path.endswith((".o_proj", ".down_proj", ".w2"))),
    "gains are left out": ("norm_before", lambda path: None),
    "the last norm's gains": ("norm_before", lambda path: None if "embed" in path else "model.norm.weight"),
}


@pytest.mark.parametrize("wrong", MUTATIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_rotation_of_one_side_only_is_noticed(family, wrong, monkeypatch):
    model = drawn_model(FAMILIES[family], adapted=True)
    truth = model(TOKENS)
    name, body = MUTATIONS[wrong]
    monkeypatch.setattr(rotation, name, body)
    assert error(rotate(model), truth) > 1e-3


def test_an_adapter_that_is_not_turned_is_noticed(monkeypatch):
    model = drawn_model(FAMILIES["mistral"], adapted=True)
    truth = model(TOKENS)
    monkeypatch.setattr(Rotation, "turn_adapter", lambda self, path, a_RD, b_OR: (a_RD, b_OR))
    assert error(rotate(model), truth) > 1e-3


def test_a_merged_adapter_is_refused():
    from lora import merge_lora

    model = drawn_model(FAMILIES["mistral"], adapted=True)
    merge_lora(model, keep=True)
    with pytest.raises(ValueError, match="rotate before"):
        rotate(model)
