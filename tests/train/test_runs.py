"""One training at a time in a folder, which holds nothing else; what killed calls left there of notes is removed."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_runs import as_recipe, ends

from model.support.cli import UserError
from model.support.lock import hold
from train.distributed.sharding import Ranks
from train.session import prepare, train


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_second_training_in_a_folder_is_refused_and_changes_nothing(options, tmp_path):
    out = tmp_path / "run"
    recipe = as_recipe(options, out=str(out), steps=2)
    with hold(out), pytest.raises(UserError, match=f"{out}: process {os.getpid()} on .* is writing it"):
        train(recipe, "instruct")
    assert not out.exists()
    train(recipe, "instruct")
    before = contents(tmp_path)
    with hold(out):
        held = contents(tmp_path)
        for changed in ({}, {"steps": 3, "allow_changed": True}, {"resume": False}):
            with pytest.raises(UserError, match="is writing it"):
                train(as_recipe(options, out=str(out), **{"steps": 2, **changed}), "instruct")
        assert contents(tmp_path) == held
    assert contents(tmp_path) == before


@pytest.mark.slow
def test_ranks_are_refused_together_and_the_first_says_it(options, tmp_path):
    out = tmp_path / "run"
    text = "\n".join(
        f"{key} = {str(value).lower() if isinstance(value, bool) else repr(value)}" for key, value in options.items()
    )
    (tmp_path / "recipe.toml").write_text(text)
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "train.instruct"]
    with hold(out):
        done = subprocess.run(
            [sys.executable, *command, str(tmp_path / "recipe.toml"), "--out", str(out)],
            capture_output=True,
            text=True,
            timeout=120,
            cwd=Path(__file__).parents[2],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
    assert done.returncode != 0 and not out.exists()
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("train.instruct: ")]
    assert f"process {os.getpid()} on" in line


@pytest.mark.parametrize("resume", [True, False])
def test_a_folder_of_something_else_is_left_alone(options, tmp_path, resume):
    out = tmp_path / "run"
    for mine in ("metrics.jsonl", "adapter/adapter_config.json", "checkpoints/step-000001/thesis.tex"):
        (out / mine).parent.mkdir(parents=True, exist_ok=True)
        (out / mine).write_text('{"mine": 1}')
    before = contents(tmp_path)
    with pytest.raises(UserError, match="run: exists and was not written by a job"):
        train(as_recipe(options, out=str(out), resume=resume), "instruct")
    assert contents(tmp_path) == before


def test_what_killed_and_refused_calls_left_of_notes_goes_with_the_next(options, tmp_path):
    """Half-written tokens and checkpoints, the list of rejected records, and the tokens of held-out notes that the
    next call does not read."""
    out, whole = tmp_path / "run", tmp_path / "whole"
    train(as_recipe(options, out=str(whole)), "instruct")
    train(as_recipe(options, out=str(out)), "instruct")
    assert (out / "tokens" / "valid").is_dir()
    tokens = (out / "tokens" / "train" / "0.tokens.npy").read_bytes()
    for left in ("tokens/.train.abcdefg1.part", "checkpoints/.step-000001.abcdefg1.part", ".adapter.abcdefg1.old/was"):
        (out / left).mkdir(parents=True)
        (out / left / "0.tokens.npy").write_bytes(tokens)
    (out / ".metrics.jsonl.abcdefg1.part").write_text("half")
    (out / "tokens" / "train-rejects.jsonl").write_text("{}")
    train(as_recipe(options, out=str(out)), "instruct")
    assert ends(out) == ends(whole)
    assert contents(out).keys() == contents(whole).keys()
    shutil.rmtree(out / "checkpoints")
    train(as_recipe(options, out=str(out), valid_data=[], steps=1, schedule="constant"), "instruct")
    assert [path.name for path in (out / "tokens").iterdir()] == ["train"]


def test_progress_is_printed_to_a_log(options, tmp_path, capsys):
    trainer = prepare(as_recipe(options, out=str(tmp_path / "run"), steps=2), "instruct", Ranks())
    trainer.log_seconds = 0.0
    trainer.run()
    said = capsys.readouterr().err
    assert "step 1 of 2: loss " in said and "step 2 of 2: loss " in said and "tok/s" in said
