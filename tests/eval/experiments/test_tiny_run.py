"""make demo SCALE=tiny and make tables SCALE=tiny, as they are called: every table is filled, and a run that was ended
goes on where it stopped."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from eval.experiments.tables import SIZES
from eval.report.run_file import PARTS
from model.support.files import read_json

pytestmark = pytest.mark.slow


def call(*arguments):
    done = subprocess.run([sys.executable, "-m", *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "demo-tiny"
    call("eval.experiments.demo", "--scale", "tiny", "--out", out)
    return out


def report(folder):
    return json.loads((folder / "report.json").read_text())


def filled(found):
    """The retrieval table's rows; MiniLM's are there where its package is installed."""
    return [row["name"] for row in found["retrieval"]["rows"] if row["diagnosis"]]


def test_the_demo_fills_what_it_promises(demo):
    found = report(demo)
    assert len(found["sets"]["heldout"]["systems"]) == 6 and found["bits_per_byte"][0]["after"] > 0
    assert found["misspelling"]["rates"] == [0.0, 0.1] and set(found["misspelling"]["series"]) == {
        "as misspelled",
        "repaired",
    }
    assert [name for name in filled(found) if "MiniLM" not in name] == ["none", "BM25"]
    assert found["wrong_labels"] is None and found["canaries"] is None


def test_each_system_answers_with_its_own_adapter(demo):
    """The four systems differ in nothing but what the base was trained on, and how the untuned ones are asked."""

    def adapters(job):
        return [Path(place).parent.name for place, *_ in read_json(demo / f"{job}.jsonl.job.json")["adapter"]]

    models = [one for one in read_json(demo / "run.json")["systems"] if one["kind"] in ("base", "model")]
    jobs = {one["name"]: one["predictions"]["heldout"].removesuffix("-heldout.jsonl") for one in models}
    assert {name: adapters(job) for name, job in jobs.items()} == {
        "base": [],
        "base + continued pre-training": ["pretrained"],
        "base + tuning": ["tuned-only"],
        "base + continued pre-training + tuning": ["tuned"],
    }
    cards = {name: read_json(demo / name / "run.json") for name in ("pretrained", "tuned-only", "tuned")}
    assert {name: Path(card["recipe"]["adapter"]).parent.name for name, card in cards.items()} == {
        "pretrained": "",
        "tuned-only": "",
        "tuned": "pretrained",
    }
    assert [card["stage"] for card in cards.values()] == ["pretrain", "instruct", "instruct"]
    assert adapters("misspelling/plain") == adapters("misspelling/repaired") == ["tuned"]
    for one in models:
        job = read_json(demo / f"{jobs[one['name']]}.jsonl.job.json")
        assert job["grounded"] == one["grounded"] == (one["kind"] == "model")
        assert (job["form"] if one["kind"] == "base" else "template") == one["form"]
    steps = read_json(demo / "steps.json")
    assert all(steps[name]["peak_mb"] > 50 for name in steps if not name.startswith("baseline"))


def test_the_tables_are_filled_by_a_run_that_was_ended_once(demo, tmp_path):
    out, sizes = tmp_path / "tables", SIZES["tiny"]
    command = ["eval.experiments.tables", "--scale", "tiny", "--run", demo, "--out", out]
    with subprocess.Popen([sys.executable, "-m", *map(str, command)], stderr=subprocess.PIPE, text=True) as run:
        assert any(line.startswith("· rate-000: answers") for line in run.stderr)
        run.send_signal(signal.SIGTERM)
        rest = run.communicate()[1]
    assert run.returncode == 130 and rest.splitlines()[-1] == "eval.experiments.tables: interrupted"
    first = (out / "labels" / "rate-000" / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns
    call(*command)
    assert (out / "labels" / "rate-000" / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns == first
    found, page = report(out), (out / "report.html").read_text()
    assert all(found[part] for part in PARTS) and all(f'"#{name}"' in page for name in ("t3", "t4", "t6", "canaries"))
    assert found["wrong_labels"]["rates"] == sizes["labels"]["rates"] and found["wrong_labels"]["filter"]
    assert found["misspelling"]["rates"] == sizes["misspelling"]["rates"]
    for name in ("base", "planted", "deduplicated"):
        assert [row["count"] for row in found["canaries"]["rows"][name]] == sizes["canaries"]["counts"]
    names = [name for name in filled(found) if "MiniLM" not in name]
    assert len(names) == 5 and sum("neighbours" in name for name in names) == 3
    assert found["sets"] == report(demo)["sets"] and found["curves"].keys() == report(demo)["curves"].keys()
    again = call(*command)
    assert "·" not in again.stderr and report(out) | {"host": None} == found | {"host": None}
