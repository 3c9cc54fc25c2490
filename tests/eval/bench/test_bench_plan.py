"""The planner's benchmark asks for what the planner says, leaves no category out, and trains on the longest row."""

import pytest

from eval.bench import extract
from eval.bench.__main__ import options_of, result
from eval.bench.plan import GROUPS, SETTINGS, STEPS, recipe_file, rows
from eval.bench.train import config_of
from model.support.cli import UserError
from train.recipe import Recipe, read_toml
from train.report.plan import memory


@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_is_a_recipe_of_which_all_rows_are_trained_on(name, tmp_path):
    stage, changes = SETTINGS[name]
    recipe = Recipe(**read_toml(recipe_file(tmp_path, 0, stage, changes, "x")))
    assert {key: getattr(recipe, key) for key in changes} == changes
    assert recipe.steps == STEPS and (stage == "pretrain" or recipe.records == STEPS * recipe.batch_rows)


def test_the_groups_hold_every_category_once():
    planned = memory(config_of("tiny"), Recipe(data=("x",), out="x", weights="x"), 1, 100, 20, "cpu")
    grouped = [part for parts in GROUPS.values() for part in parts]
    assert sorted(grouped) == sorted(planned)


def test_an_unknown_setting_is_named():
    with pytest.raises(UserError, match="tuning, fp32"):
        rows(only="tuninng")


def test_a_result_names_the_machine_and_the_commit():
    found = result([{"name": "x"}])
    assert found["rows"] == [{"name": "x"}] and found["code"]["hash"] and found["host"]["cores"]


def test_a_benchmarks_options_are_the_arguments_of_its_rows():
    defaults = {"notes": 4, "note_tokens": 400, "new_tokens": 16, "repeats": 2}
    assert options_of(extract.rows, ["--weights", "w"], "bench") == {"weights": "w", **defaults}
    given = options_of(extract.rows, ["--weights", "v", "--notes", "2"], "bench")
    assert given == {"weights": "v", **defaults, "notes": 2}
