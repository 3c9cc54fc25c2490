"""One, two and three ranks train the same model: losses and whole gradients, before clipping, to 1e-12 in fp64."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file
from tiny_runs import RECIPE, run_case, trainer

from train.data.dataset import Rows
from train.data.store import Encoding, TokenStore, build_store
from train.distributed.sharding import Ranks

# five rows a step in micro-batches of one: ranks get 3 + 2, or 2 + 2 + 1 rows; A has 5 rows, sharded unevenly
SHARED = {"r": 5, "batch_rows": 5, "steps": 20, "clip": 0.5}


def launch(ranks: int, cases: dict, folder: Path, program: str = "tiny_runs.py") -> dict:
    folder.mkdir(exist_ok=True)
    (folder / "cases.json").write_text(json.dumps(cases))
    worker, out = str(next(Path(__file__).parents[1].rglob(program))), folder / f"{ranks}.safetensors"
    start = [sys.executable]
    if ranks > 1:
        start += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [*start, worker, str(folder / "cases.json"), str(out)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "returned a view tensor" not in done.stderr, "FSDP2 warns of a block whose result is a view"
    return load_file(out)


MANY = {"r": 5, "steps": 20, "clip": 0.1}
OPTIMIZERS = {"sgd": {"optimizer": "sgd", "learning_rate": 0.5}, "adamw": {"optimizer": "adamw", "learning_rate": 1e-2}}


@pytest.fixture(scope="module")
def few_notes(data, tmp_path_factory) -> TokenStore:
    encoding = Encoding("instruct", str(data / "tok"))
    return build_store([str(data / "notes.jsonl")], encoding, tmp_path_factory.mktemp("stores") / "notes", 3)


@pytest.fixture(scope="module")
def few_documents(data, tmp_path_factory) -> TokenStore:
    encoding = Encoding("pretrain", str(data / "tok"))
    return build_store([str(data / "documents.jsonl")], encoding, tmp_path_factory.mktemp("stores") / "documents", 8)


def largest_difference(a: dict, b: dict) -> float:
    """The largest difference of any tensor, relative to that tensor's largest value."""
    assert a.keys() == b.keys()
    return max(float((a[key] - b[key]).abs().max() / b[key].abs().max().clamp_min(1e-300)) for key in b)


def same_training(*runs: dict) -> None:
    """Losses, norms and gradients before clipping at every step, and the weights at the end, to 1e-12."""
    assert len(runs[0]["loss"]) == 20 and runs[0]["loss"].std() > 0.002, "nothing was learnt"
    assert "grad10.model.layers.0.self_attn.q_proj.lora_A.default" in runs[0]
    assert runs[0]["norm"].max() > MANY["clip"] > runs[0]["norm"].min(), "some steps are clipped"
    assert all(largest_difference(other, runs[0]) < 1e-12 for other in runs[1:])


@pytest.mark.slow
def test_any_number_of_ranks_gives_the_same_losses_and_gradients(notes, documents, tmp_path):
    sgd = {**SHARED, "optimizer": "sgd", "learning_rate": 0.5}
    cases = {
        "sgd and dropout": ({**sgd, "dropout": 0.2}, str(notes.path), "instruct"),
        "adamw": ({**SHARED, "optimizer": "adamw", "learning_rate": 1e-2}, str(notes.path), "instruct"),
        "whole": ({**sgd, "dropout": 0.2, "sharded": False}, str(notes.path), "instruct"),
        "packed": ({**sgd, "steps": 3, "packing": "documents"}, str(documents.path), "pretrain"),
        "full": ({**sgd, "steps": 3, "full": True, "learning_rate": 0.05}, str(documents.path), "pretrain"),
    }
    alone = launch(1, cases, tmp_path / "1")
    assert all(alone[f"{name}/loss"].std() > 0.002 for name in cases), "nothing was learnt"
    for ranks in (2, 3):
        assert largest_difference(launch(ranks, cases, tmp_path / str(ranks)), alone) < 1e-12


@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_take_turns_at_the_same_micro_batches(notes, world):
    """Cut by length into micro_rows rows, whatever the number of ranks; who is left without computes an empty row."""
    made = trainer({"batch_rows": 8, "micro_rows": 2, "steps": 1}, str(notes.path), "instruct", Ranks())
    rows = [made.rows[i] for i in range(7)]
    parts, _ = made.micro_batches(rows)
    assert [len(part) for part in parts] == [2, 2, 2, 1]
    lengths = [len(row) for part in parts for row in part]
    assert lengths == sorted(map(len, rows), reverse=True)
    shares = []
    for rank in range(world):
        made.ranks = Ranks(rank, world)
        assert made.micro_batches(rows)[0] == parts
        shares.append(made.micro_batches(rows)[1])
    assert {len(share) for share in shares} == {-(-4 // world)}, "as many turns for each"
    taken = [part for turn in zip(*shares, strict=True) for part in turn]
    assert taken[:4] == parts and all(len(part) == 1 and len(part[0]) == 0 for part in taken[4:])


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_accumulation_does_not_change_loss_or_gradients(few_notes, optimizer):
    """One row at a time, or two at once; blocks kept, or computed again. With dropout under SGD."""
    base = {**MANY, **OPTIMIZERS[optimizer], "batch_rows": 2, "dropout": 0.2 * (optimizer == "sgd")}
    found = [
        run_case({**base, **case}, str(few_notes.path), "instruct", Ranks(), every=True)
        for case in ({}, {"micro_rows": 2}, {"checkpoint_blocks": True})
    ]
    same_training(*found)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_packing_does_not_change_loss_or_gradients(few_documents, optimizer):
    """All documents in each step: a row each, or packed rows with masks between them. With dropout under SGD."""
    base = {**MANY, **OPTIMIZERS[optimizer], "dropout": 0.2 * (optimizer == "sgd")}
    rows = {
        packing: len(Rows(few_documents, replace(RECIPE, packing=packing), "pretrain"))
        for packing in ("none", "documents")
    }
    assert rows["documents"] < rows["none"] / 2
    found = [
        run_case(
            {**base, "packing": packing, "batch_rows": count}, str(few_documents.path), "pretrain", Ranks(), every=True
        )
        for packing, count in rows.items()
    ]
    same_training(*found)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_branches_that_share_a_note_train_as_separate_rows_do(few_notes, optimizer):
    """All notes in each step: each once with its four questions, or four times with one. Window and all."""
    base = {**MANY, **OPTIMIZERS[optimizer], "dropout": 0.0}
    shared, apart = (Rows(few_notes, replace(RECIPE, share_prefix=share), "instruct") for share in (True, False))
    assert len(apart) == 4 * len(shared) == 12
    tokens = [sum(len(rows[i]) for i in range(len(rows))) for rows in (shared, apart)]
    assert tokens[0] < tokens[1] / 1.5
    found = [
        run_case(
            {**base, "share_prefix": rows is shared, "batch_rows": len(rows), "micro_rows": 3},
            str(few_notes.path),
            "instruct",
            Ranks(),
            every=True,
        )
        for rows in (shared, apart)
    ]
    same_training(*found)
