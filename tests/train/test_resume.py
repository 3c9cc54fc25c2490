"""A run that is stopped and resumed ends with the same bytes; a corrupt checkpoint is named and skipped."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_runs import as_recipe, ends, in_step, sigterm

from lora.dropout import MASK_VERSION
from model.support.cli import UserError, guard
from model.support.files import read_json, sha256_file, write_json
from train.distributed.checkpoint import find_corruption, steps_saved
from train.distributed.sharding import Ranks
from train.session import prepare, train


@pytest.fixture(scope="module")
def whole(options, tmp_path_factory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("whole") / "run"
    train(as_recipe(options, out=str(out)), "instruct")
    return ends(out)


def test_a_stop_by_signal_saves_and_goes_on(options, whole, tmp_path, capsys):
    out, before = tmp_path / "run", signal.getsignal(signal.SIGTERM)
    made = prepare(as_recipe(options, out=str(out)), "instruct", Ranks())
    in_step(made, 3, sigterm)
    with pytest.raises(SystemExit) as stop:
        made.run()
    assert signal.getsignal(signal.SIGTERM) == before
    assert stop.value.code == 0 and "stopped at step 3 of 6" in capsys.readouterr().out
    assert (out / "checkpoints" / "step-000003" / "adapter" / "adapter_config.json").is_file()
    train(as_recipe(options, out=str(out)), "instruct")
    assert ends(out) == whole
    adapters = [file for file in whole if "adapter" in file]
    assert len(adapters) == 6 and all(whole[file] == whole[f"adapter/{Path(file).name}"] for file in adapters), (
        "a checkpoint holds the adapter as the run leaves it, in PEFT's form"
    )


@pytest.mark.parametrize("how", ["truncated", "flipped", "missing", "no manifest"])
def test_a_damaged_checkpoint_is_named_and_passed_over(options, whole, tmp_path, capsys, how):
    out = tmp_path / "run"
    train(as_recipe(options, out=str(out)), "instruct")
    last = steps_saved(out / "checkpoints")[-1]
    file = last / ("manifest.json" if how == "no manifest" else "optimizer.safetensors")
    content = file.read_bytes()
    if how == "truncated":
        file.write_bytes(content[:-1])
    elif how == "flipped":
        file.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    else:
        file.unlink()
    assert find_corruption(last)
    shutil.rmtree(out / "adapter")
    train(as_recipe(options, out=str(out)), "instruct")
    said = capsys.readouterr().err
    assert f"{last} skipped" in said
    assert ends(out) == whole and find_corruption(last) is None, "the damaged one is written again"


@pytest.mark.parametrize("file", ["trainable.safetensors", "optimizer.safetensors", "manifest.json"])
def test_disk_full_leaves_the_last_checkpoint_whole(options, whole, tmp_path, file):
    """The system refuses bytes of that file (RLIMIT_FSIZE): one line, exit 2, and the same command goes on."""
    import resource

    out, limit = tmp_path / "run", len(whole[f"checkpoints/step-000006/{file}"]) - 1
    train(as_recipe(options, out=str(out), steps=2, schedule="constant"), "instruct")
    step = out / "checkpoints" / "step-000002"
    child = os.fork()
    if child == 0:
        code = 1
        try:
            recipe = as_recipe(options, out=str(out), steps=4, schedule="constant", allow_changed=True)
            made = prepare(recipe, "instruct", Ranks())
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))  # the metrics are shorter
            with open(tmp_path / "said", "w") as said, contextlib.redirect_stderr(said):
                code = guard(made.run, "train.instruct")
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 2
    lines = [line for line in (tmp_path / "said").read_text().splitlines() if line.startswith("train.instruct: ")]
    assert len(lines) == 1 and "step 4 could not be saved" in lines[0] and "File too large" in lines[0]
    assert steps_saved(out / "checkpoints") == [step] and find_corruption(step) is None
    train(as_recipe(options, out=str(out), steps=4, schedule="constant", allow_changed=True), "instruct")
    assert find_corruption(steps_saved(out / "checkpoints")[-1]) is None


@pytest.mark.parametrize("optimizer", ["adamw8bit", "sgd", "muon"])
def test_other_optimizers_resume_to_the_same_bytes(options, tmp_path, optimizer):
    more = {"optimizer": optimizer, "dropout": 0.0, "valid_data": [], "full": optimizer == "muon"}
    one, two = tmp_path / "one", tmp_path / "two"
    trained = train(as_recipe(options, out=str(one), **more), "instruct")
    train(as_recipe(options, out=str(two), **more), "instruct")
    for path in steps_saved(two / "checkpoints")[1:]:
        shutil.rmtree(path)
    resumed = train(as_recipe(options, out=str(two), **more), "instruct")
    for file in trained.iterdir():
        assert file.read_bytes() == (resumed / file.name).read_bytes(), file.name


def test_a_resume_with_another_recipe_or_other_data_lists_what_changed(options, tmp_path):
    """Before the model is read: the weights' folder is gone, and the answer is still what changed."""
    out = str(tmp_path / "run")
    train(as_recipe(options, out=out, steps=2), "instruct")
    said = r"recipe.learning_rate was 0.01, is 0.02; recipe.r was 3, is 4.*--allow-changed,"
    with pytest.raises(UserError, match=said):
        train(as_recipe(options, out=out, steps=2, learning_rate=0.02, r=4), "instruct")
    with pytest.raises(UserError, match="holds other parameters than this run trains"):
        train(as_recipe(options, out=out, steps=2, r=4, allow_changed=True), "instruct")
    train(as_recipe(options, out=out, steps=2, learning_rate=0.02, allow_changed=True), "instruct")
    other = tmp_path / "notes.jsonl"
    other.write_bytes(Path(options["data"][0]).read_bytes() * 2)
    with pytest.raises(UserError, match=r"data.sources.\S+notes.jsonl was '\w+', is None.* recipe.data was"):
        train(as_recipe(options, out=out, steps=2, data=[str(other)]), "instruct")


def test_a_run_with_dropout_resumes_only_with_the_version_of_masks_that_it_began_with(options, tmp_path):
    """A checkpoint of a run with dropout is rewritten as one of an earlier version."""
    identities = {}
    for dropout in (0.0, 0.1):
        recipe = as_recipe(options, out=str(tmp_path / f"run-{dropout}"), steps=1, dropout=dropout)
        train(recipe, "instruct")
        checkpoint = steps_saved(Path(recipe.out) / "checkpoints")[-1]
        identities[dropout] = read_json(checkpoint / "state.json")["identity"]
    assert identities[0.1]["dropout_masks"] == MASK_VERSION and "dropout_masks" not in identities[0.0]
    continued = as_recipe(options, out=str(tmp_path / "more"), steps=1, adapter=f"{recipe.out}/adapter")  # its dropout
    train(continued, "instruct")
    state = read_json(steps_saved(tmp_path / "more" / "checkpoints")[-1] / "state.json")
    assert state["identity"]["dropout_masks"] == MASK_VERSION
    state, manifest = read_json(checkpoint / "state.json"), read_json(checkpoint / "manifest.json")
    state["identity"]["dropout_masks"] = MASK_VERSION - 1
    write_json(checkpoint / "state.json", state)
    write_json(checkpoint / "manifest.json", manifest | {"state.json": sha256_file(checkpoint / "state.json")})
    changed = f"dropout_masks was {MASK_VERSION - 1}, is {MASK_VERSION}"
    with pytest.raises(UserError, match=f"was made by another run: {changed}"):
        train(recipe, "instruct")


def test_a_run_whose_checkpoints_are_all_damaged_says_that_it_begins_again(options, tmp_path, capsys):
    out = tmp_path / "run"
    train(as_recipe(options, out=str(out), steps=1), "instruct")
    assert "begins again" not in capsys.readouterr().err
    for path in steps_saved(out / "checkpoints"):
        (path / "manifest.json").unlink()
    train(as_recipe(options, out=str(out), steps=1), "instruct")
    said = capsys.readouterr().err.splitlines()
    assert f"no checkpoint in {out / 'checkpoints'} is intact: the run begins again at step 0" in said
    train(as_recipe(options, out=str(out), steps=1, resume=False), "instruct")
    assert "begins again" not in capsys.readouterr().err


def test_a_refused_resume_leaves_the_other_runs_token_store_as_it_was(options, tmp_path):
    out, more = tmp_path / "run", {"steps": 1, "valid_data": [], "share_prefix": False}
    train(as_recipe(options, out=str(out), **more), "instruct")
    made = {file: file.stat().st_mtime_ns for file in (out / "tokens").rglob("*")}
    other = shutil.copy(options["data"][0], tmp_path / "others.jsonl")
    for changed, said in (({"data": [str(other)]}, "data.sources"), ({"template": "faithful"}, "data.template was")):
        with pytest.raises(UserError, match=f"was made by another run: .*{said}"):
            train(as_recipe(options, out=str(out), **more, **changed), "instruct")
        assert {file: file.stat().st_mtime_ns for file in (out / "tokens").rglob("*")} == made


def test_held_out_notes_that_changed_in_place_are_noticed_at_resume(options, tmp_path):
    held = shutil.copy(options["valid_data"][0], tmp_path / "held.jsonl")
    train(as_recipe(options, out=str(tmp_path / "run"), steps=2, valid_data=[str(held)]), "instruct")
    held.write_bytes(held.read_bytes() * 2)
    with pytest.raises(UserError, match=r"was made by another run: valid_data.sources.\S+held.jsonl was '\w+', is '"):
        train(as_recipe(options, out=str(tmp_path / "run"), steps=2, valid_data=[str(held)]), "instruct")


def test_a_tokenizer_of_a_larger_model_is_refused_before_the_model_is_read(options, data, tmp_path):
    weights = tmp_path / "weights"
    shutil.copytree(options["weights"], weights)
    config = json.loads((weights / "config.json").read_text())
    (weights / "config.json").write_text(json.dumps(config | {"vocab_size": 257}))
    recipe = as_recipe(options, out=str(tmp_path / "run"), weights=str(weights), tokenizer=str(data / "tok"))
    with pytest.raises(UserError, match="tok: gives token 257, and the model has 257: it is the tokenizer of another"):
        train(recipe, "instruct")


def test_the_last_ones_and_the_best_are_kept_and_a_run_given_up_is_not_gone_on_with(options, tmp_path):
    """The held-out loss is least after the second step, which save_every does not name: the notes held out are in
    capitals, which training makes ever less likely."""
    out, held = tmp_path / "run", tmp_path / "held.jsonl"
    notes = Path(options["data"][0]).read_text()
    held.write_text(re.sub(r'(?<="text": )".*?"', lambda text: text[0].upper(), notes))
    more = {"out": str(out), "valid_data": [str(held)], "full": True, "dropout": 0.0, "learning_rate": 0.1}
    train(as_recipe(options, **more, steps=9, save_every=4, valid_every=1, keep_last=1), "instruct")
    losses = [json.loads(line)["valid_loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert losses.index(min(losses)) == 1
    assert [path.name for path in steps_saved(out / "checkpoints")] == ["step-000002", "step-000009"]
    train(as_recipe(options, **more, steps=2, save_every=1, resume=False), "instruct")
    assert [path.name for path in steps_saved(out / "checkpoints")] == ["step-000001", "step-000002"]


def test_checkpoints_are_in_the_order_of_their_steps(tmp_path):
    for step in (999_999, 1_000_000, 20):
        (tmp_path / f"step-{step:06d}").mkdir()
    (tmp_path / "step-old").mkdir()
    assert [path.name for path in steps_saved(tmp_path)] == ["step-000020", "step-999999", "step-1000000"]


def test_a_loss_that_is_not_finite_stops_before_the_update_and_names_the_records(options, tmp_path):
    made = prepare(as_recipe(options, out=str(tmp_path / "a")), "instruct", Ranks())
    poisoned = next(layer for layer in made.model.modules() if hasattr(layer, "lora_B") and layer.scale)
    with torch.no_grad():
        poisoned.lora_B["default"].fill_(float("nan"))
    before = {name: p.clone() for name, p in made.model.named_parameters() if p.requires_grad}
    with pytest.raises(UserError, match=r"step 1: .* not finite; its records are note-\d+, note-\d+, note-\d+;"):
        made.run()
    for name, param in made.model.named_parameters():
        assert name not in before or torch.equal(param.nan_to_num(7.0), before[name].nan_to_num(7.0))


@pytest.mark.slow
def test_the_program_on_two_ranks_trains_what_one_does_and_goes_on_from_its_checkpoint(options, tmp_path):
    """`torchrun -m train.instruct` in fp32: four steps on one rank, resumed to six on two."""
    text = "".join(f"{key} = {json.dumps(value)}\n" for key, value in options.items())
    (tmp_path / "recipe.toml").write_text(text)
    out = tmp_path / "two"
    train(as_recipe(options, out=str(tmp_path / "one")), "instruct")
    train(as_recipe(options, out=str(out)), "instruct")
    shutil.rmtree(steps_saved(out / "checkpoints")[-1])  # step 4 is the newest now
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "train.instruct"]
    done = subprocess.run(
        [sys.executable, *command, str(tmp_path / "recipe.toml"), "--out", str(out)],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=Path(__file__).parents[2],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = (
        [json.loads(line) for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
        for run in ("one", "two")
    )
    assert [line["tokens"] for line in one] == [line["tokens"] for line in two]
    assert all(abs(a["loss"] - b["loss"]) < 1e-6 * a["loss"] for a, b in zip(one, two, strict=True))
    held_out = [[line.get("valid_loss", 0.0) for line in lines] for lines in (one, two)]
    assert held_out[0][5] > 0 and held_out[1] == pytest.approx(held_out[0], rel=1e-6)
    assert json.loads((out / "run.json").read_text())["ranks"] == 2
