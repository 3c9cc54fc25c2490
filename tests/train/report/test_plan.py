"""A plan's sizes are those of the model that is then built, and a mistake costs one line."""

import json
from dataclasses import replace

import pytest
from tiny_runs import CONFIG, RECIPE, tiny

from lora.adapter import adapted
from model.config import ModelConfig
from model.support.cli import UserError
from model.support.files import read_json
from train.recipe import Recipe, read_toml
from train.report.plan import Options, main, memory, plan
from train.session import empty_model

PAPER = Options(
    "train/recipes/cancerllm.toml",
    config="train/recipes/mistral-7b.json",
    gpus=10,
    gpu="a100-80gb",
    documents=3_192_166,
    document_tokens=600,
)
TUNE = replace(PAPER, recipe="train/recipes/cancerllm-tune-faithful.toml", gpus=1, gpu="l4-24gb", documents=10_635)


@pytest.mark.parametrize("full", [False, True])
def test_weights_adapters_gradients_and_state_are_the_built_models(full):
    recipe = replace(RECIPE, full=full, dtype="float64", r=3)
    made, model = memory(CONFIG, recipe, 1, 100, 20), tiny(recipe)
    size = {trained: sum(p.nbytes for p in model.parameters() if p.requires_grad == trained) for trained in (0, 1)}
    assert made["weights"] == (size[1] if full else size[0])
    assert made["gradients"] == size[1] and made["optimizer"] == 2 * size[1]
    assert made["adapters"] == (0 if full else size[1])


def test_masters_are_counted_in_fp32_and_the_blocks_gathered_beside_them_in_bf16():
    recipe = replace(RECIPE, full=True)
    wide, masters = (memory(CONFIG, replace(recipe, dtype=dtype), 1, 100, 20) for dtype in ("float32", "bfloat16"))
    assert all(masters[name] == wide[name] for name in ("weights", "gradients", "optimizer"))
    numbers = wide["weights"] / 4  # both blocks of two and the root
    assert wide["gathered"] == 0
    assert masters["gathered"] == numbers * (2 + 2 + 2 + 4), "cast, gathered; gradients in both dtypes"


@pytest.mark.parametrize(
    ("base", "hidden", "kinds"),
    [("nf4", 64, {"nf4"}), ("nf4", 96, {"nf4", "int8"}), ("int8", 96, {"int8"})],
)
def test_a_quantized_base_is_counted_as_it_is_kept(base, hidden, kinds):
    """A width that 64 does not divide is kept in int8, whatever was asked for."""
    config = replace(CONFIG, hidden_size=hidden, intermediate_size=128, head_dim=16)
    recipe = replace(RECIPE, base=base, r=3)
    model, _ = empty_model(recipe, config)
    assert {layer.quantized.kind for layer in adapted(model).values()} == kinds
    held = [*model.named_parameters(), *model.named_buffers()]
    size = sum(tensor.nbytes for name, tensor in held if "lora_" not in name and "inv_freq" not in name)
    assert memory(config, recipe, 1, 100, 20)["weights"] == pytest.approx(size, rel=2e-3)


def test_mistral_7b_has_its_published_number_of_weights():
    config, recipe = ModelConfig.from_dict(read_json(PAPER.config)), Recipe(**read_toml(PAPER.recipe))
    assert memory(config, recipe, 1, 3000, 3000)["weights"] == 2 * 7_241_732_096


def test_more_rows_cost_activations_only_and_more_ranks_share_what_is_sharded():
    config, recipe = ModelConfig.from_dict(read_json(PAPER.config)), Recipe(**read_toml(PAPER.recipe))
    one, ten = (memory(config, recipe, ranks, 3000, 3000) for ranks in (1, 10))
    assert all(ten[name] == one[name] / 10 for name in ("weights", "adapters", "gradients", "optimizer"))
    assert ten["gathered"] > one["gathered"] and ten["activations"] == one["activations"]
    wider = memory(config, replace(recipe, batch_rows=80, micro_rows=2), 1, 3000, 3000)
    assert {name for name in one if wider[name] != one[name]} == {"activations"}
    assert wider["activations"] == 2 * one["activations"]


def test_the_papers_run_fits_ten_a100s_and_time_is_arithmetic_over_the_stated_rate():
    found = plan(PAPER)
    assert found["fits"] and found["remedies"] == [] and found["steps"] == round(found["data"]["rows"] * 0.5 / 80)
    half, fifth = found["seconds"]
    assert half == pytest.approx(found["flops"] / (10 * 312e12 * 0.5)) and fifth == pytest.approx(half * 2.5)
    assert plan(replace(PAPER, mfu=0.6))["seconds"] == pytest.approx([half * 0.5 / 0.6])


def test_a_measured_runs_share_of_the_peak_takes_the_place_of_the_range(tmp_path, capsys):
    card = tmp_path / "run.json"
    card.write_text(json.dumps({"model_flop_utilisation": 0.41}))
    assert main(PAPER) == main(replace(PAPER, like=str(card))) == 0
    assumed, measured = capsys.readouterr().out.split("time ")[1:]
    assert "at 50% to 20% of 312 TFLOP/s (assumed" in assumed and f"at 41% of 312 TFLOP/s ({card})" in measured
    for held, changes, said in (
        ("{}", {}, "no model_flop_utilisation"),
        ('{"model_flop_utilisation": null}', {}, "finished training run"),
        ("[1]", {}, "no model_flop_utilisation"),
        ("{}", {"mfu": 0.3}, "leave one out"),
    ):
        card.write_text(held)
        with pytest.raises(UserError, match=said):
            plan(replace(PAPER, like=str(card), **changes))


def test_what_does_not_fit_exits_1_and_says_what_would(capsys):
    long = replace(TUNE, row_tokens=20_000)
    assert main(long) == 1
    assert "DOES NOT FIT" in capsys.readouterr().out
    assert plan(long)["remedies"][-1]["fits"]


@pytest.mark.parametrize("gpus", [1, 2])
def test_remedies_add_up_and_never_take_back_8_bit_state(gpus):
    """Each remedy keeps those before it, whatever the number of ranks: no total is above the one before it."""
    found = plan(replace(TUNE, gpus=gpus, gpu="a100-40gb", row_tokens=400_000))
    totals = [found["total_bytes"] / 1e9, *(remedy["total_gb"] for remedy in found["remedies"])]
    assert len(totals) > 3 and totals == sorted(totals, reverse=True)
    recipe = replace(Recipe(**read_toml(TUNE.recipe)), base="nf4", checkpoint_blocks=True, optimizer="adamw8bit")
    config = ModelConfig.from_dict(read_json(TUNE.config))
    last = memory(config, replace(recipe, micro_rows=1), 32, 400_000, 400_000)
    assert found["remedies"][-1]["total_gb"] == pytest.approx((sum(last.values()) + 1e9) / 1e9)


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"gpu": "a100-80"}, "did you mean 'a100-80gb'"),
        ({"gpus": 0}, "at least 1"),
        ({"mfu": 1.5}, "--mfu"),
        ({"document_tokens": 0}, "both --documents"),
        ({"config": ""}, "--config"),
        ({"documents": 0, "document_tokens": 0}, "notes.jsonl: no such file"),
        ({"config": "train/recipes"}, "holds no weights"),
        ({"recipe": "train/recipes"}, "train/recipes: a folder, not a file"),
    ],
)
def test_a_mistake_is_named(changes, said):
    with pytest.raises(UserError, match=said):
        plan(replace(PAPER, **changes))


def test_unpacked_documents_are_a_row_each():
    assert plan(replace(TUNE, recipe="train/recipes/cancerllm-tune.toml"))["steps"] == round(5 * 10_635 / 4)


def test_what_a_recipe_of_ones_own_leaves_out_is_asked_for(tmp_path, data):
    """No weights, or data without the tokenizer that would count it."""
    (tmp_path / "mine.toml").write_text(f'data = ["{data / "notes.jsonl"}"]\nsteps = 3\n')
    (tmp_path / "list.json").write_text("[1]")
    mine = replace(PAPER, recipe=str(tmp_path / "mine.toml"))
    assert plan(mine)["steps"] == 3
    for changes, said in (
        ({"config": ""}, "names no weights.* give the model's shape with --config"),
        ({"documents": 0, "document_tokens": 0}, "names no weights.*--documents N"),
        ({"config": str(tmp_path / "list.json")}, "not a JSON object"),
    ):
        with pytest.raises(UserError, match=said):
            plan(replace(mine, **changes))
