"""Table 6: rows with and without each retriever, missing weights named, interrupted runs continued, the guard."""

from __future__ import annotations

import json

import pytest
from answering_models import write_adapter, write_model

from eval.experiments.retrieval_table import Options, row, table, text, weights_of
from eval.experiments.steps import Run, extraction
from eval.questions import Question
from model.support.cli import UserError


def model_folder(folder):
    """A base and an adapter, as `weights` and `adapter` of the options."""
    weights = write_model(folder / "base")
    return {"weights": str(weights), "adapter": str(write_adapter(folder / "adapter", weights))}


def notes(path, start, count):
    sites = [("left breast", "C50.912"), ("colon", "C18.9")]
    rows = [
        {
            "id": f"n{i}",
            "patient": f"p{i // 2}",
            "text": f"Mass of the {sites[i % 2][0]}, seen on day {i} by us.",
            "phenotypes": {},
            "diagnosis": {"text": f"Neoplasm of {sites[i % 2][0]}", "code": sites[i % 2][1]},
        }
        for i in range(start, start + count)
    ]
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    return path


@pytest.mark.slow
def test_the_table_has_every_row_and_goes_on_where_it_stopped(tmp_path):
    folders = model_folder(tmp_path)
    train, heldout = notes(tmp_path / "train.jsonl", 0, 12), notes(tmp_path / "heldout.jsonl", 11, 3)
    options = Options(
        **folders,
        data=train,
        notes=heldout,
        out=tmp_path / "out",
        encoders=tmp_path / "encoders",
        limit=2,
        grounded=True,
    )
    result = table(options)
    names = ["none", "BM25", "MiniLM", "Contriever", "MedCPT", "SPECTER2", "SGPT"]
    minilm = weights_of("minilm", options.encoders) is not None
    assert [one["name"] for one in result["rows"]] == names
    assert [one["diagnosis"] is None for one in result["rows"]] == [False, False, not minilm, True, True, True, True]
    assert all("weights not given: put " in one["note"] for one in result["rows"][3:])
    assert result["rows"][1]["recall_at"]["10"] > 0 and 0 < result["rows"][1]["ndcg"] <= 1
    assert json.loads((tmp_path / "out" / "result.json").read_text()) == result
    assert "against none" in text(result)
    patients = {f"n{i}": f"p{i // 2}" for i in range(14)}
    for line in (tmp_path / "out" / "answers-bm25.jsonl").read_text().splitlines():
        record = json.loads(line)
        assert record["neighbours"] and patients[record["id"]] not in [patients[one] for one in record["neighbours"]]
    before = (tmp_path / "out" / "answers-bm25.jsonl").stat().st_mtime_ns
    (tmp_path / "out" / "result.json").unlink()
    assert table(options) == result and (tmp_path / "out" / "answers-bm25.jsonl").stat().st_mtime_ns == before


@pytest.mark.slow
def test_tuning_further_leaves_out_notes_without_a_diagnosis(tmp_path):
    folders = model_folder(tmp_path)
    train, heldout = notes(tmp_path / "train.jsonl", 0, 6), notes(tmp_path / "heldout.jsonl", 11, 1)
    checkup = {"id": "c", "patient": "pc", "text": "Check-up, no complaints.", "phenotypes": {}}
    train.write_text(train.read_text() + json.dumps(checkup) + "\n")
    out, encoders = tmp_path / "out", tmp_path / "encoders"
    options = Options(**folders, data=train, notes=heldout, out=out, encoders=encoders, tune_steps=1)
    shown = [one["name"] for one in table(options)["rows"] if one["diagnosis"]]
    assert {"none, tuned further without neighbours", "BM25, tuned further with neighbours"} <= set(shown)
    near = [json.loads(line)["id"] for line in (out / "near.jsonl").read_text().splitlines()]
    assert near == [f"n{i}" for i in range(6)]


def test_a_rows_difference_is_the_paired_one():
    none = [Question(f"r{i}", f"p{i}", "diagnosis", ("x (C1)",), ("y (C2)",)) for i in range(4)]
    shown = [Question(f"r{i}", f"p{i}", "diagnosis", ("x (C1)",), ("x (C1)",) if i else ("y (C2)",)) for i in range(4)]
    made = row(none, shown)
    assert made["diagnosis"]["exact_match"]["f1"] == 75 and made["difference"]["better"] == 3
    assert made["difference"]["difference"] == pytest.approx(made["diagnosis"]["average_f1"]["f1"])


def test_mistakes_are_named(tmp_path):
    (tmp_path / "n.jsonl").write_text(json.dumps({"id": "a", "text": "b", "phenotypes": {}}) + "\n")
    paths = {"data": tmp_path / "n.jsonl", "notes": tmp_path / "n.jsonl", "out": tmp_path / "o"}
    with pytest.raises(UserError, match="no note with a diagnosis"):
        table(Options(weights="w", adapter="a", **paths))
    with pytest.raises(UserError, match="--limit -1"):
        Options(weights="w", adapter="a", limit=-1, **paths)
    assert not (tmp_path / "o").exists()


@pytest.mark.slow
def test_a_note_that_cannot_be_answered_does_not_stop_an_experiment(tmp_path):
    """infer.extract exits 1 for it, every time: the step is done, and the record says why."""
    folders = model_folder(tmp_path)
    heldout, out = notes(tmp_path / "heldout.jsonl", 0, 3), tmp_path / "answers.jsonl"
    rows = [json.loads(line) for line in heldout.read_text().splitlines()]
    rows[1]["text"] = " "
    heldout.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = Run(tmp_path)
    how = {"task": "diagnosis", "max_new_diagnosis": 4}
    run.step("answers", extraction(folders["weights"], folders["adapter"], heldout, out, **how))
    answers = [json.loads(line) for line in out.read_text().splitlines()]
    assert [record.get("error") for record in answers] == [None, "the note is empty", None] and "answers" in run.steps
