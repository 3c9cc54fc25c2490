"""make tables: from a finished demo only, its programs understand what they are given, and its results are shown."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tyro

from eval.experiments import retrieval_table
from eval.experiments.demo import SCALES
from eval.experiments.programs import experiment
from eval.experiments.steps import Run
from eval.experiments.tables import SIZES, Demo, Options, finished_demo, main, run_json
from eval.report.page import render
from eval.report.paper import PAPER
from eval.report.run_file import PARTS, read_parts
from eval.robustness.canaries import Canaries
from eval.robustness.labels import Labels
from eval.robustness.misspelling import Misspelling
from model.support.cli import UserError
from model.support.files import write_json

KINDS = {"labels": Labels, "misspelling": Misspelling, "canaries": Canaries}


@pytest.mark.parametrize("scale", SIZES)
def test_every_experiment_is_one_that_its_program_takes(scale, tmp_path):
    demo = Demo(tmp_path / "demo", scale)
    write_json(demo.folder / "dtype.json", "bfloat16")
    dtype = "bfloat16" if scale == "full" else "float32"
    seen = set()
    out = tmp_path / "tables"
    asked = [*SIZES[scale].items(), *SCALES[scale].experiments.items()]
    for program, *arguments in (experiment(demo, out, name, **how) for name, how in asked):
        if program == "eval.robustness":
            kind = KINDS[arguments[0]]
            options = tyro.cli(kind, args=arguments[1:], config=(tyro.conf.OmitArgPrefixes,))
            assert Path(options.out).parent == tmp_path / "tables" and options.weights == demo.weights
            assert getattr(options, "dtype", dtype) == dtype and getattr(options, "grounded", True)
            seen.add(kind)
        else:
            assert program == "eval.experiments.retrieval_table"
            near = tyro.cli(retrieval_table.Options, args=arguments, config=(tyro.conf.OmitArgPrefixes,))
            assert near.grounded and near.dtype == dtype and near.out.parent == tmp_path / "tables"
    assert seen == set(KINDS.values())
    assert all(Path(demo.recipe(stage)).is_file() for stage in ("instruct", "pretrain"))


def test_only_a_finished_demo_of_the_scale_will_do(tmp_path):
    with pytest.raises(UserError, match="no finished demo; run make demo SCALE=tiny first"):
        main(Options(scale="tiny", run=tmp_path, out=tmp_path / "out"))
    (tmp_path / "report.html").touch()
    write_json(tmp_path / "made-of.json", {"scale": "nano"})
    with pytest.raises(UserError, match="a demo of scale 'nano', not 'tiny'"):
        finished_demo(tmp_path, "tiny")
    write_json(tmp_path / "made-of.json", {"scale": "tiny"})
    with pytest.raises(UserError, match="base/model: missing"):
        finished_demo(tmp_path, "tiny")
    assert not (tmp_path / "out").exists()


def test_the_demos_files_are_named_as_seen_from_the_tables(tmp_path):
    demo = tmp_path / "demo"
    write_json(
        demo / "run.json",
        {
            "systems": [{"name": "a", "kind": "model", "predictions": {"heldout": "p/a.jsonl"}}],
            "references": {"heldout": "heldout.jsonl"},
            "curves": {"tuned": "t/m.jsonl"},
            "retrieval": "retrieval/result.json",
            "steps": {},
            "seconds": 1.0,
            "peak_mb": 2.0,
        },
    )
    out = tmp_path / "tables"
    given = run_json(Run(out, "tiny", {"s": {"seconds": 2.0, "peak_mb": 9.0}}), Demo(demo, "tiny"))
    assert (out / given["systems"][0]["predictions"]["heldout"]).resolve() == (demo / "p/a.jsonl").resolve()
    assert {key: given[key] for key in PARTS} == {key: f"{folder}/result.json" for key, folder in PARTS.items()}
    assert given["seconds"] == 3 and given["peak_mb"] == 9 and given["code"]["hash"]


def test_the_report_shows_and_plots_every_result(tmp_path, parts):
    for key, part in parts.items():
        write_json(tmp_path / f"{key}.json", part)
    read = read_parts(tmp_path, {key: f"{key}.json" for key in parts})
    assert read == json.loads(json.dumps(parts))
    assert read_parts(tmp_path, {}) == dict.fromkeys(parts)
    empty = {"title": "held out", "notes": 0, "patients": 0, "systems": [], "paired": []}
    bare = {
        "sets": {"heldout": empty},
        "curves": {},
        "examples": [],
        "ledger": [],
        "paper": PAPER,
        "title": "T",
        "seconds": None,
        "bits_per_byte": None,
        "confidence": {},
    }
    page = render({**bare, **read})
    assert page.count("<svg") == 3 and all(f'<h2 id="{name}"' in page for name in ("t3", "t4", "t6", "canaries"))
    for said in ("40 of 400", "recovered by repair", "2 of them were wrong", "1 of 1"):
        assert said in page
    assert "MedCPT" not in page and "0 (never planted)" in page
    without = render({**bare, **dict.fromkeys(parts)})
    assert not any(f'"{mark}{name}"' in without for name in ("t3", "t4", "t6", "canaries") for mark in ("", "#"))


def test_a_canary_fits_into_the_notes_of_its_scale():
    for sizes in SIZES.values():
        assert 0 in sizes["canaries"]["counts"] and max(sizes["canaries"]["counts"]) <= sizes["canaries"]["records"]
