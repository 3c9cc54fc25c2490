"""A user's mistakes in recipes are one clear line before any work."""

import codecs
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from model.support.cli import UserError
from model.support.init import init_weights
from train.distributed.sharding import Ranks
from train.optim.optimizer import rate
from train.recipe import Recipe, parse, read_toml

GOOD = {"data": ("x",), "out": "x", "weights": "x"}


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"r": 0}, "r is 0; it must lie in .1, 1e9"),
        ({"threads": 100_000}, "threads"),
        ({"steps": 5, "warmup": 6}, "warmup of 6 steps is longer than the run of 5"),
        ({"warmup": 1, "warmup_share": 0.1}, "either warmup"),
        ({"warmup_share": 1.5}, "warmup_share is 1.5"),
        ({"batch_rows": 5, "micro_rows": 2}, "batch_rows 5 is not a multiple of micro_rows 2"),
        ({"learning_rate": -1.0}, "learning_rate"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"epochs": 0.0}, "epochs"),
        ({"init": "y"}, "either weights"),
        ({"full": True, "base": "nf4"}, "full trains all weights"),
        ({"optimizer": "muon"}, "muon is for full training"),
        ({"merge_adapter": True}, "merge_adapter needs adapter"),
        ({"template": "faithful"}, "set share_prefix = false"),
        ({"data": ()}, "give --data FILE.jsonl"),
        ({"out": ""}, "give --out FOLDER"),
        ({"seed": -1}, "seed is -1"),
        ({"alpha": 0.0}, "alpha is 0.0"),
        ({"alpha": float("nan")}, "alpha is nan"),
        ({"betas": (0.9, 1.0)}, "betas are"),
        ({"betas": (0.9,)}, "betas are"),
        ({"epochs": float("inf")}, "epochs is inf"),
        ({"epochs": 1e300}, "epochs is 1e.300; it must lie in .0, 1e9"),
        ({"steps": 2**70}, "steps is"),
        ({"batch_rows": 10**12}, "batch_rows is"),
        ({"seed": 10**400}, "seed is"),
        ({"empty_kept": 2.0}, "empty_kept is 2.0; it must lie in .0, 1"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"valid_rows": 0}, "valid_rows is 0"),
        ({"keep_last": 0}, "keep_last is 0"),
    ],
)
def test_impossible_recipes_are_refused(wrong, said):
    Recipe(**GOOD)
    with pytest.raises(UserError, match=said):
        Recipe(**{**GOOD, **wrong})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("learning_rat = 1.0", "unknown key 'learning_rat' .did you mean 'learning_rate'"),
        ("r = 'eight'", "r is 'eight'; it must be a whole number"),
        ("r = true", "whole number"),
        (f"learning_rate = 1{'0' * 400}", "learning_rate is 10+; it must be a number"),
        ("r = = 2", "not a TOML"),
    ],
)
def test_recipe_files_are_checked_key_by_key(tmp_path, text, said):
    (tmp_path / "r.toml").write_text(text)
    with pytest.raises(UserError, match=said):
        read_toml(tmp_path / "r.toml")


def test_a_recipe_as_an_editor_saves_it(tmp_path):
    """With a byte order mark and carriage returns; in UTF-8 only. A folder is not a file that is missing."""
    (tmp_path / "r.toml").write_bytes(codecs.BOM_UTF8 + b"# \xc3\xa9\r\nr = 2\r\n")
    assert read_toml(tmp_path / "r.toml") == {"r": 2}
    (tmp_path / "r.toml").write_bytes(b"# \xe9\n")
    with pytest.raises(UserError, match=r"r.toml: not UTF-8 text \(byte 2\); save it as UTF-8"):
        read_toml(tmp_path / "r.toml")
    with pytest.raises(UserError, match="a folder, not a file"):
        read_toml(tmp_path)


def test_a_device_that_is_not_there_is_named(tmp_path, monkeypatch):
    (tmp_path / "r.toml").write_text('data = ["a"]\nout = "o"\nweights = "w"\n')
    (tmp_path / "wrong.toml").write_text('device = "cudaa"\n')
    with pytest.raises(UserError, match="wrong.toml: device is 'cudaa' .did you mean 'cuda'"):
        parse([str(tmp_path / "wrong.toml")], "instruct")
    with pytest.raises(UserError, match="invalid choice 'cudaa' for argument '--device'"):
        parse([str(tmp_path / "r.toml"), "--device", "cudaa"], "instruct")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1000")
    with pytest.raises(UserError, match="1000 processes on this machine, where torch can use"):
        Ranks.join("cuda")
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(UserError, match="RANK=0, WORLD_SIZE=two in the environment: not a rank of a world"):
        Ranks.join("cpu")


def test_the_command_line_overrides_the_file(tmp_path):
    (tmp_path / "r.toml").write_text('data = ["a"]\nout = "o"\nweights = "w"\nr = 4\nlearning_rate = 1\n')
    recipe = parse([str(tmp_path / "r.toml"), "--r", "16", "--base", "nf4"], "instruct")
    assert (recipe.r, recipe.base, recipe.learning_rate, recipe.out) == (16, "nf4", 1.0, "o")
    with pytest.raises(UserError, match="no such file"):
        parse([str(tmp_path / "none.toml")], "instruct")
    for flags in (["--allow-changed"], ["--allow-changed", "--r", "2"], ["--r", "2", "--allow_changed", "True"]):
        assert parse([str(tmp_path / "r.toml"), *flags], "instruct").allow_changed
    assert not parse([str(tmp_path / "r.toml"), "--resume", "False"], "instruct").resume


def test_an_adapter_that_is_continued_keeps_its_own_rank_scale_and_dropout(tmp_path):
    from tiny_runs import CONFIG

    from lora import LoRAConfig, add_lora, save_adapter
    from lora.adapter import adapted
    from lora.peft import adapter_state
    from model.transformer import Transformer
    from train.session import empty_model

    held = add_lora(init_weights(Transformer(CONFIG), 1), LoRAConfig(r=2, alpha=6.0, dropout=0.25))
    save_adapter(held, tmp_path / "adapter")
    model, tensors = empty_model(Recipe(**GOOD, adapter=str(tmp_path / "adapter"), r=8, dropout=0.5), CONFIG)
    for layer in adapted(model).values():
        assert (len(layer.lora_A["default"]), layer.scale["default"], layer.dropout["default"]) == (2, 3.0, 0.25)
    assert all(tensors[key].equal(value) for key, value in adapter_state(held).items())


def test_dropout_of_experts_adapters_is_refused():
    """A token's place among its expert's tokens depends on the batch, so its mask would too."""
    from tiny_runs import CONFIG

    from train.session import empty_model

    experts = replace(CONFIG, num_local_experts=2, num_experts_per_tok=1)
    with pytest.raises(UserError, match="dropout 0.1 with adapters on experts"):
        empty_model(Recipe(**GOOD, dropout=0.1), experts)
    empty_model(Recipe(**GOOD, dropout=0.1, target_modules=("q_proj",)), experts)
    empty_model(Recipe(**GOOD), experts)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"target_modules": ("q_prj",)}, "target module 'q_prj' is not in this model .did you mean 'q_proj'"),
        ({"target_modules": ()}, "target_modules is empty"),
        ({"adapter": "none"}, "no such file; an adapter is a folder"),
        ({"adapter": "none", "merge_adapter": True}, "none/adapter_model.safetensors: no such file"),
        ({"valid_data": ("none.jsonl",)}, "none.jsonl: no such file"),
        ({"weights": None}, "holds no weights"),
        ({"adapter": "another's"}, "was trained on another base than"),
    ],
)
def test_a_mistake_costs_no_work_and_leaves_nothing(options, tmp_path, wrong, said):
    from tiny_runs import as_recipe, tiny

    from lora import save_adapter
    from train.session import train

    if wrong.get("adapter") == "another's":
        save_adapter(tiny(as_recipe(options, out="x")), tmp_path / "adapter", base=options["weights"])
        mark = tmp_path / "adapter" / "trained_on.json"
        mark.write_text(mark.read_text().replace('"norms": "', '"norms": "another'))
        wrong = {"adapter": str(tmp_path / "adapter")}
    if "weights" in wrong:  # a download that broke off
        wrong = {"weights": str(shutil.copytree(options["weights"], tmp_path / "w"))}
        (tmp_path / "w" / "model.safetensors").unlink()
    with pytest.raises(UserError, match=said):
        train(as_recipe(options, out=str(tmp_path / "run"), **wrong), "instruct")
    assert not (tmp_path / "run").exists()


def test_held_out_data_of_the_other_stage_is_refused_before_the_training_data_is_tokenised(options, data, tmp_path):
    from tiny_runs import as_recipe

    from train.session import train

    with pytest.raises(UserError, match="documents.jsonl:1: lacks 'phenotypes'"):
        train(as_recipe(options, out=str(tmp_path), valid_data=[str(data / "documents.jsonl")]), "instruct")
    assert [path.name for path in (tmp_path / "tokens").iterdir()] == ["valid-rejects.jsonl"]


def test_the_schedule_warms_up_and_falls_to_zero():
    recipe = Recipe(**GOOD, steps=10, warmup=2)
    rates = [rate(recipe, step, 10) for step in range(11)]
    assert rates[:3] == [0.5, 1.0, 1.0] and rates[10] == pytest.approx(0.0)
    shared = Recipe(**GOOD, steps=10, warmup_share=0.15)  # a share of a step is a step
    assert [rate(shared, step, 10) for step in range(11)] == rates
    assert all(a >= b for a, b in zip(rates[2:], rates[3:], strict=False))


# what the paper's scripts do: recipe → what it must say
SCRIPTS = {
    "cancerllm-faithful": {
        "r": 8,
        "alpha": 16.0,
        "dropout": 0.05,
        "learning_rate": 2e-4,
        "warmup_share": 0.05,
        "weight_decay": 0.01,
        "epochs": 0.5,
        "block": 3000,
        "dtype": "bfloat16",
        "checkpoint_blocks": True,
        "packing": "concatenate",
        "target_modules": ("all-linear",),
    },
    "cancerllm-tune-faithful": {
        "base": "nf4",
        "optimizer": "adamw8bit",
        "learning_rate": 2e-4,
        "epochs": 5.0,
        "clip": 0.3,
        "warmup_share": 0.03,
        "r": 64,
        "alpha": 16.0,
        "dropout": 0.1,
        "block": 4000,
        "template": "faithful",
        "loss_on": "all",
        "append_eos": False,
        "batch_rows": 4,
        "micro_rows": 1,
    },
}
SOUND = {
    "cancerllm": SCRIPTS["cancerllm-faithful"] | {"packing": "documents"},
    "cancerllm-tune": SCRIPTS["cancerllm-tune-faithful"]
    | {"template": "note-first", "loss_on": "answer", "append_eos": True, "share_prefix": True},
}


@pytest.mark.parametrize("file", sorted(Path("train/recipes").glob("*.toml")), ids=lambda file: file.stem)
def test_every_recipe_that_ships_is_one_and_the_faithful_ones_say_what_the_scripts_do(file):
    raw = read_toml(file)
    recipe = Recipe(
        **{**({} if "init" in raw else {"weights": "x"}), "data": ("x",), "out": "x", **raw}
        | ({"init": "x", "tokenizer": "x", "weights": ""} if raw.get("full") else {})
    )
    expected = SCRIPTS.get(file.stem, {})
    assert {key: getattr(recipe, key) for key in expected} == expected
    sound = SOUND.get(file.stem, {})
    assert {key: getattr(recipe, key) for key in sound} == sound
