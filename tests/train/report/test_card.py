"""A run's card says what was run, on what, and at what cost; its arithmetic is what torch counts."""

import hashlib
import json
import shutil
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from tiny_runs import CONFIG, RECIPE, as_recipe, in_step, tiny
from torch.utils.flop_counter import FlopCounterMode

from model.mask import Visible
from model.support.cli import UserError
from train import session
from train.data.rows import ANSWER, Row, collate, count, note_document, order
from train.data.store import TokenStore
from train.distributed.sharding import Ranks
from train.loss import batch_loss
from train.report import card, provenance
from train.report.plan import Load, arithmetic
from train.report.provenance import records_of


def test_the_card_of_a_run_that_went_on(options, tmp_path):
    out = tmp_path / "run"
    session.train(as_recipe(options, out=str(out), steps=2, schedule="constant"), "instruct")
    session.train(as_recipe(options, out=str(out), steps=5, schedule="constant", allow_changed=True), "instruct")
    run_card = json.loads((out / "run.json").read_text())
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert run_card["steps"] == 5 and run_card["steps_of_this_process"] == 3
    assert run_card["tokens"] == lines[-1]["tokens"]
    assert run_card["tokens_of_this_process"] == lines[-1]["tokens"] - lines[1]["tokens"]
    assert run_card["tokens_per_second"] == run_card["tokens_of_this_process"] / run_card["training_seconds"]
    assert run_card["recipe"]["save_every"] == 2 and run_card["recipe"]["dropout"] == 0.1, "also unimportant ones"
    data = Path(options["data"][0])
    assert hashlib.sha256(data.read_bytes()).hexdigest() in json.dumps(run_card["data"])
    assert run_card["data"] == TokenStore(out / "tokens" / "train").manifest["identity"]
    assert run_card["packages"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert 0 < run_card["model_flop_utilisation"] < 1 and "measured products in float32" in run_card["utilisation_of"]
    assert run_card["peak_memory_bytes"] > 2**26 and run_card["seconds"] >= run_card["training_seconds"] > 0
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    session.train(as_recipe(options, out=str(out), steps=5, schedule="constant", allow_changed=True), "instruct")
    assert json.loads((out / "run.json").read_text()) == run_card, "at its end already: the card stays"


def test_the_records_of_a_step_are_those_that_made_it(options, tmp_path, capsys):
    """Against the batch that the loop takes, and its token count against the metrics'."""
    out, recipe = tmp_path / "run", as_recipe(options, out=str(tmp_path / "run"), steps=3)
    session.train(recipe, "instruct")
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    made = session.prepare(as_recipe(options, out=str(tmp_path / "run"), steps=3), "instruct", Ranks())
    rows = [made.rows[i] for i in order(recipe.seed, 1, len(made.rows), recipe.batch_rows)]
    found = records_of(out, 2)
    assert [row["record"] for row in found] == [document.record for row in rows for document in row.documents]
    assert sum(row["tokens"] for row in found) == lines[1]["tokens"] - lines[0]["tokens"]
    assert sum(row["targets"] for row in found) == count(rows)[ANSWER]
    capsys.readouterr()
    assert provenance.main(provenance.Options(str(out), 2)) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [row["record"] for row in found]
    with pytest.raises(UserError, match="--step 4: the run .* has steps 1 to 3"):
        records_of(out, 4)


def test_every_text_of_a_running_row_is_named_with_its_own_tokens_and_targets(options, data, tmp_path):
    """Texts run together and cut: the last token of a row is the only one without a target."""
    out = tmp_path / "run"
    recipe = as_recipe(
        options,
        out=str(out),
        data=[str(data / "documents.jsonl")],
        valid_data=[],
        batch_rows=2,
        packing="concatenate",
        steps=1,
    )
    session.train(recipe, "pretrain")
    store = TokenStore(out / "tokens" / "train")
    texts = {name: len(pieces[0]) for name, pieces in (store[index] for index in range(len(store)))}
    ends = dict(zip(texts, accumulate(texts.values()), strict=True))
    rows = order(recipe.seed, 0, sum(texts.values()) // recipe.block, 2)
    tokens, targets = Counter(), Counter()
    for row in rows:
        for place in range(row * recipe.block, (row + 1) * recipe.block):
            name = next(name for name, end in ends.items() if place < end)
            tokens[name] += 1
            targets[name] += place + 1 < (row + 1) * recipe.block
    found = records_of(out, 1)
    assert len(found) > 4 and {each["record"]: (each["tokens"], each["targets"]) for each in found} == {
        name: (tokens[name], targets[name]) for name in tokens
    }
    made = session.prepare(recipe, "pretrain", Ranks())
    message = made.bad_step(0, float("nan"), 1.0)
    assert f"its records are {', '.join(each['record'] for each in found)};" in message


def test_records_that_a_later_change_has_made_others_are_not_shown(options, tmp_path):
    out, changed = tmp_path / "run", tmp_path / "notes.jsonl"
    changed.write_bytes(b"".join(Path(options["data"][0]).read_bytes().splitlines(keepends=True)[:4]))
    session.train(as_recipe(options, out=str(out), steps=2), "instruct")
    session.train(as_recipe(options, out=str(out), steps=4, data=[str(changed)], allow_changed=True), "instruct")
    assert len(records_of(out, 4)) == 3
    with pytest.raises(UserError, match="step 1 took .* tokens, and .* by the run's recipe: data or recipe changed"):
        records_of(out, 1)
    run_card = json.loads((out / "run.json").read_text())
    for changes, said in (
        ({"stage": "demo"}, "not the card of a training run"),
        ({"recipe": 3}, "not the card of"),
        ({"recipe": run_card["recipe"] | {"batch_rows": "3"}}, "batch_rows is '3'; it must be a whole"),
        ({"data": None}, "not the card of a training run"),
    ):
        (out / "run.json").write_text(json.dumps(run_card | changes))
        with pytest.raises(UserError, match=f"run.json: {said}"):
            records_of(out, 4)


def test_the_records_of_a_run_that_did_not_end_are_known_from_its_checkpoint(options, tmp_path):
    """Killed in its fourth step: the second is saved, the third has a line in metrics.jsonl only."""
    out = tmp_path / "run"
    made = session.prepare(as_recipe(options, out=str(out)), "instruct", Ranks())
    in_step(made, 4, lambda: signal.default_int_handler(signal.SIGINT, None))
    with pytest.raises(KeyboardInterrupt):
        made.run()
    found = [records_of(out, step) for step in (1, 2, 3)]
    with pytest.raises(UserError, match="--step 4: the run .* has steps 1 to 3"):
        records_of(out, 4)
    session.train(as_recipe(options, out=str(out)), "instruct")
    assert found == [records_of(out, step) for step in (1, 2, 3)]
    shutil.rmtree(out / "checkpoints")
    (out / "run.json").unlink()
    with pytest.raises(UserError, match="run: holds neither run.json nor an intact checkpoint"):
        records_of(out, 1)


def test_records_that_are_left_out_are_counted_on_one_line_and_in_the_card(options, tmp_path, capsys):
    data = tmp_path / "notes.jsonl"
    data.write_bytes(Path(options["data"][0]).read_bytes() * 20 + b'{"id": "bad"}\n')
    session.train(as_recipe(options, out=str(tmp_path / "run"), data=[str(data)], steps=1), "instruct")
    said = [line for line in capsys.readouterr().err.splitlines() if "left out" in line]
    where = tmp_path / "run" / "tokens" / "train" / "rejects.jsonl"
    assert said == [f"1 of 201 records cannot be used and are left out: {where} names them"] and where.is_file()
    run_card = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (run_card["records"], run_card["rejected_records"]) == (200, 1)


def test_a_base_that_nf4_cannot_hold_is_said_to_be_int8(options, tmp_path, capsys):
    """This model's layers are all 16 or 24 wide."""
    session.prepare(as_recipe(options, out=str(tmp_path), base="nf4"), "instruct", Ranks())
    said = [line for line in capsys.readouterr().err.splitlines() if "int8" in line]
    assert said == [
        "base = nf4: 14 of 14 matrices are kept in int8, since 64 does not divide their width: "
        "model.layers.0.self_attn.q_proj"
    ]
    session.prepare(as_recipe(options, out=str(tmp_path), base="int8"), "instruct", Ranks())
    assert "int8" not in capsys.readouterr().err


def test_without_matplotlib_one_line_says_so(options, tmp_path, monkeypatch, capsys):
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"] + ["matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    session.train(as_recipe(options, out=str(tmp_path), steps=1), "instruct")
    assert capsys.readouterr().err.count("loss.png left out: matplotlib is not installed") == 1
    assert (tmp_path / "run.json").is_file() and not (tmp_path / "loss.png").exists()


def test_the_codes_version_is_its_commit_and_whether_it_was_changed(tmp_path):
    (tmp_path / "model").mkdir()
    file = tmp_path / "model" / "one.py"
    file.write_text("a = 1\n")
    bare = card.code_version(tmp_path)
    assert bare == {"hash": card.code_hash(tmp_path), "version": card.version("cancerllm-reference")}
    who = ("-c", "user.name=n", "-c", "user.email=e@example.org")
    for words in (("init", "-q"), ("add", "."), (*who, "commit", "-q", "-m", "one")):
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True)
    clean = card.code_version(tmp_path)
    assert len(clean["commit"]) == 40 and clean["dirty"] is False and clean["hash"] == bare["hash"]
    file.write_text("a = 2\n")
    changed = card.code_version(tmp_path)
    assert changed["dirty"] is True and changed["commit"] == clean["commit"] and changed["hash"] != clean["hash"]


def test_gpus_are_known_by_their_drivers_names():
    names = ("NVIDIA A100-SXM4-80GB", "NVIDIA H100 80GB HBM3", "NVIDIA L4", "NVIDIA L40S", "NVIDIA H100 PCIe")
    assert [card.sheet_peak(name) for name in names] == [312e12, 989e12, 121e12, None, None]


@pytest.mark.parametrize("full", [False, True])
def test_the_arithmetic_is_what_torch_counts(full, notes):
    """Products of matrices in one step, attention's own left out: none for frozen weights' gradients, none below the
    first adapter, and no logits of tokens without a target."""
    recipe = replace(RECIPE, full=full, dtype="float64", r=3)
    model, name, pieces = tiny(recipe), *notes[0]
    row = Row((note_document(name, pieces),))
    with FlopCounterMode(display=False) as counted:
        batch_loss(model, collate([row]), count([row]))[0].backward()
    found = sum(
        flops
        for call, flops in counted.get_flop_counts()["Global"].items()
        if "bmm" not in str(call) and "attention" not in str(call)
    )
    # torch's counter does not know addmm_, by which a layer adds B's product and the loss the head's gradient
    targets, head = sum(count([row]).values()), CONFIG.vocab_size * CONFIG.hidden_size
    found += sum(2 * len(row) * p.numel() for name, p in model.named_parameters() if "lora_B" in name)
    found += 2 * targets * head * full
    asked = arithmetic(CONFIG, recipe, Load(len(row), targets, len(row), 1, 0.0, ""))
    if not full:  # the first block's input needs no gradient: three products less, and their adapters'
        first = model.model.layers[0].self_attn
        for linear in (first.q_proj, first.k_proj, first.v_proj):
            asked -= 2 * len(row) * (linear.weight.numel() + linear.lora_A["default"].numel())
    assert found == asked
    batch = collate([row])
    here = (batch.positions, batch.layout)
    assert row.pairs() == int(Visible(here, here, 0).mask(None).sum())
