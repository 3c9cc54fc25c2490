"""No program replaces what a user had: each one that takes an output refuses what is there in one line."""

import re
from pathlib import Path

import pytest

from eval import calibration, perplexity
from eval import run as eval_run
from eval.bench import __main__ as bench
from eval.experiments import adapter, demo, demo_ner, retrieval_table, scores, tables
from eval.parity import program as parity
from eval.robustness.canaries import Canaries, run_canaries
from eval.robustness.labels import Labels, run_labels
from eval.robustness.misspelling import Misspelling, run_misspelling
from infer import trace, view
from infer.extract import program as extract
from infer.retrieval import index
from lora import merge
from model.checkpoints import convert
from model.support.cli import guard
from model.support.files import write_json, write_jsonl
from train import recipe, session
from train.clinic import program as clinic
from train.data import neighbours, tokenizer
from train.importers import brat, conll, table

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """Inputs that every program gets past on its way to its output."""
    folder = tmp_path_factory.mktemp("given")
    note = {
        "id": "a",
        "text": "Mass of 2 cm.",
        "phenotypes": {"tumor_size": [{"text": "2 cm"}]},
        "diagnosis": {"text": "Mass", "code": "C50.912"},
    }
    write_jsonl(folder / "notes.jsonl", [note | {"id": name} for name in "abcdefghij"])
    answer = {"answers": [{"text": "2 cm", "logprob": -0.1}], "logprob": -0.1}
    write_jsonl(folder / "answers.jsonl", [{"id": name, "phenotypes": {"tumor_size": answer}} for name in "abcdefghij"])
    (folder / "tags.tsv").write_text("Flu\tB-Disease\n\n")
    (folder / "table.csv").write_text('text,type,answer\n"Mass of 2 cm.",tumor_size,2 cm\n')
    (folder / "brat").mkdir()
    (folder / "brat" / "a.txt").write_text("Mass of 2 cm.")
    (folder / "brat" / "a.ann").write_text("T1\tSize 8 12\t2 cm\n")
    index.build(index.Options(out=folder / "index", notes=folder / "notes.jsonl"))
    for name in ("base/model", "pretrained/adapter", "tuned/adapter", "data/train.jsonl"):
        (folder / "demo" / name).mkdir(parents=True)
    write_json(folder / "demo" / "run.json", {})
    write_json(folder / "demo" / "made-of.json", {"scale": "tiny"})
    (folder / "demo" / "report.html").touch()
    (folder / "released").mkdir()
    (folder / "released" / "adapter_model.safetensors").touch()
    (folder / "model").mkdir()
    (folder / "model" / "tokenizer.json").write_text("{}")
    write_json(
        folder / "model" / "config.json",
        {
            "model_type": "mistral",
            "vocab_size": 8,
            "hidden_size": 8,
            "intermediate_size": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
            "num_key_value_heads": 1,
            "head_dim": 8,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e4,
            "max_position_embeddings": 64,
            "sliding_window": None,
        },
    )
    return folder


def experiment(kind, run):
    return lambda g, out: run(
        kind(
            weights=str(g / "model"),
            notes=g / "notes.jsonl",
            out=out,
            **{
                Labels: {"recipe": str(ROOT / "train/recipes/tiny-instruct.toml"), "data": g / "notes.jsonl"},
                Misspelling: {"lexicon": g / "notes.jsonl"},
                retrieval_table.Options: {"adapter": str(g / "model"), "data": g / "notes.jsonl"},
            }[kind],
        )
    )


def trained(g, out):
    new = {"init": str(g / "model" / "config.json"), "tokenizer": str(g / "model"), "full": True, "block": 32}
    return session.train(recipe.Recipe(data=(str(g / "notes.jsonl"),), out=str(out), **new), "instruct")


PROGRAMS = {  # module: (whether its output is a folder, the program)
    "eval.bench": (False, lambda g, out: bench.main(["plan", "--json", str(out)])),
    "eval.calibration": (
        False,
        lambda g, out: calibration.main(calibration.Options(g / "answers.jsonl", g / "notes.jsonl", out)),
    ),
    "eval.experiments.adapter": (True, lambda g, out: adapter.main(adapter.Options(out))),
    "eval.experiments.demo": (True, lambda g, out: demo.main(demo.Options("tiny", out))),
    "eval.experiments.demo_ner": (True, lambda g, out: demo_ner.main(demo_ner.Options(out))),
    "eval.experiments.retrieval_table": (True, experiment(retrieval_table.Options, retrieval_table.table)),
    "eval.experiments.scores": (True, lambda g, out: scores.main(scores.Options(g / "released", out))),
    "eval.experiments.tables": (True, lambda g, out: tables.main(tables.Options("tiny", g / "demo", out))),
    "eval.parity.program": (False, lambda g, out: parity.main(parity.Options("none", json=str(out)))),
    "eval.perplexity": (
        False,
        lambda g, out: perplexity.main(perplexity.Options(g / "none", g / "notes.jsonl", out=out)),
    ),
    "eval.robustness.canaries": (
        True,
        lambda g, out: run_canaries(
            Canaries(str(g / "model"), str(ROOT / "train/recipes/tiny-pretrain.toml"), g / "notes.jsonl", out, (0, 1))
        ),
    ),
    "eval.robustness.labels": (True, experiment(Labels, run_labels)),
    "eval.robustness.misspelling": (True, experiment(Misspelling, run_misspelling)),
    "eval.run": (
        True,
        lambda g, out: eval_run.main(eval_run.Options(data=g / "notes.jsonl", out=out, weights=str(g / "model"))),
    ),
    "infer.extract.program": (
        False,
        lambda g, out: extract.main(extract.Options(g / "notes.jsonl", out, weights=str(g / "model"))),
    ),
    "infer.retrieval.index": (True, lambda g, out: index.build(index.Options(out, notes=g / "notes.jsonl"))),
    "infer.trace": (False, lambda g, out: trace.main(trace.Options(out=out, weights=str(g / "model"), prompt="a"))),
    "infer.view": (False, lambda g, out: view.main(view.Options(g / "notes.jsonl", g / "notes.jsonl", out))),
    "lora.merge": (True, lambda g, out: merge.main(merge.Options(str(g / "model"), str(g / "none"), str(out)))),
    "model.checkpoints.convert": (True, lambda g, out: convert.main(convert.Options(str(g / "model"), str(out)))),
    "train.clinic.program": (True, lambda g, out: clinic.main(clinic.Options(out, patients=20))),
    "train.data.neighbours": (
        False,
        lambda g, out: neighbours.main(neighbours.Options(g / "notes.jsonl", g / "index", g / "model", out)),
    ),
    "train.data.tokenizer": (
        True,
        lambda g, out: tokenizer.main(tokenizer.Options((str(g / "notes.jsonl"),), str(out))),
    ),
    "train.importers.brat": (
        False,
        lambda g, out: brat.main(brat.Options(g / "brat", out, types=("Size=tumor_size",))),
    ),
    "train.importers.conll": (False, lambda g, out: conll.main(conll.Options(g / "tags.tsv", out))),
    "train.importers.table": (False, lambda g, out: table.main(table.Options(g / "table.csv", out))),
    "train.recipe": (True, trained),
}
OTHERS = {"eval.experiments.steps", "infer.quick"}  # no program; one that says that it replaces its two files


def test_no_program_that_takes_an_output_is_missing_here():
    found = set()
    for package in ("model", "lora", "infer", "train", "eval"):
        for file in (ROOT / package).rglob("*.py"):
            if re.search(r"^    (out|target|json): (Annotated\[)?(Path|str)\b(?!.*,$)", file.read_text(), re.MULTILINE):
                found.add(".".join(file.relative_to(ROOT).with_suffix("").parts))
    assert found - OTHERS == set(PROGRAMS) - {"eval.bench"}


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        if path.is_file()
        else path.readlink()
        if path.is_symlink()
        else None
        for path in sorted(folder.rglob("*"))
    }


@pytest.mark.parametrize("there", ["a file", "a folder", "a link", "a link to nothing"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_what_is_there_stays_and_one_line_says_so(given, tmp_path, monkeypatch, capsys, name, there):
    monkeypatch.chdir(ROOT)
    folder, program = PROGRAMS[name]
    theirs = tmp_path / "theirs"
    if there == "a file" or (there == "a link" and not folder):
        theirs.write_text("mine")
    elif there != "a link to nothing":
        theirs.mkdir()
        for mine in ("thesis.tex", "steps.json", "data.jsonl"):
            (theirs / mine).write_text("mine")
    out = theirs
    if "link" in there:
        out = tmp_path / "link"
        out.symlink_to("theirs")
    before = contents(tmp_path)
    assert guard(lambda: program(given, out), name) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "experimental" not in line]
    assert line.startswith(f"{name}: ") and str(out) in line
    assert re.search("exists|symbolic link|a folder|cannot write|not written by a job|no index|no encoder", line), line
    assert contents(tmp_path) == before
