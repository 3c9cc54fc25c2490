"""Builds a run's report: `python -m eval.report RUN_DIR` writes report.html and report.json, with the paper's tables.

RUN_DIR/run.json lists the systems and test sets (paths relative to RUN_DIR):

    {"title", "scale", "seconds", "peak_mb", "host", "code", "references": {"heldout": path, "unseen": path},
     "systems": [{"name", "kind": "model"|"base"|"regex"|"majority", "predictions": {"heldout": path, "unseen": path},
                  "notes": number of notes it was given (default: all), "seconds", "peak_mb",
                  "family": systems of one family share errors (default: all models are one family),
                  "seen": number of training notes, for a point of a learning curve,
                  "form": "template" or the chat form of its prompts, "grounded": true|false}],
     "compare": [[name, name], …]: pairs of systems to test against each other,
     "curves": {name: metrics.jsonl}, "bits_per_byte": [{"name", "before", "after"}],
     optional, a result.json each: "wrong_labels", "misspelling", "canaries" (eval.robustness) and
     "retrieval": {"notes", "rows": [{"name", "note", "recall_at": {k: share}, "ndcg", "diagnosis": figures}]}}

Every figure is computed here from the predictions; answerable and unanswerable questions never share a mean. The report
quotes notes, so report.html and report.json are readable by their owner only (0600).
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from tqdm import tqdm

from eval.calibration import by_task, confidences, review_first, summary
from eval.failures import count_failures
from eval.metrics.ledger import ledger
from eval.questions import Question, figures, paired_f1, patient_of, spread
from eval.report.examples import examples
from eval.report.page import render, terminal_table
from eval.report.paper import PAPER
from eval.report.run_file import Asked, read_parts, read_run, read_set
from eval.score import groups
from infer.codes import lookup
from infer.tasks import PHENOTYPES
from model.support.cli import UserError
from model.support.files import read_jsonl, write_text

Json = dict[str, Any]
PAPER_PRESET = "cancerllm"
EXAMPLES = 10  # notes shown with their answers marked
SET_TITLES = {
    "heldout": "held-out patients",
    "unseen": "other patients, unseen styles",
    "written-sealed": "written by hand, sealed half",
    "written-open": "written by hand, open half",
}


@dataclass(frozen=True)
class Options:
    """Write a run's report (the paper's tables, plots, failures and examples) as HTML and JSON."""

    run: Annotated[Path, tyro.conf.Positional]
    """The run's folder, which holds run.json."""


def build(run: Path) -> Json:
    """The report of a run folder as JSON. Raises UserError if run.json, or a file that it names, is invalid."""
    given = read_run(run)
    report: Json = {key: given.get(key) for key in ("title", "scale", "seconds", "peak_mb", "host", "bits_per_byte")}
    report |= read_parts(run, given)
    report |= {"preset": "clinical", "second_preset": PAPER_PRESET, "paper": PAPER, "sets": {}}
    report |= {"confidence": {}, "examples": []}
    pairs: list[tuple[tuple[str, ...], tuple[str, ...]]] = []
    for place, name in enumerate(tqdm(given["references"], desc="test sets", disable=None)):
        references, asked = read_set(run, given, name)
        report["sets"][name] = set_report(given, name, references, asked)
        pairs += [
            (question.predicted, question.gold)
            for one in asked.values()
            if one.system["kind"] != "majority"
            for question in one.questions
            if question.gold
        ]
        if confidence := confidence_of(asked):
            report["confidence"][name] = confidence
        count, more = divmod(EXAMPLES, len(given["references"]))
        report["examples"] += examples_of(name, references, asked, count + (place < more))
    report["ledger"] = ledger(pairs)
    report["curves"] = {name: curve(run / path) for name, path in (given.get("curves") or {}).items()}
    return report


def set_report(given: Json, name: str, references: list[Json], asked: dict[str, Asked]) -> Json:
    """One test set: every system's figures and failures, and the paired tests."""
    notes, systems = {record["id"]: record["text"] for record in references}, []
    for one in asked.values():
        row = system_row(one.system, one.questions)
        row["counts"] = asdict(one.counts)
        row["failures"] = count_failures(one.questions, notes, independent_answers(one.system, asked))
        systems.append(row)
    paired = [
        {"a": a, "b": b, "task": task, **test}
        for a, b in given.get("compare") or []
        if a in asked and b in asked
        for task, group in groups(asked[a].questions).items()
        if (test := paired_f1(group, asked[b].questions))
    ]
    return {
        "title": SET_TITLES.get(name, name),
        "notes": len(references),
        "patients": len(set(map(patient_of, references))),
        "systems": systems,
        "paired": paired,
    }


def independent_answers(system: Json, asked: dict[str, Asked]) -> dict[tuple[str, str], list[tuple[str, ...]]]:
    """The answers of other families' systems by (record, question), one answer per family."""
    found: dict[tuple[str, str], dict[str, tuple[str, ...]]] = {}
    for other in asked.values():
        family = family_of(other.system)
        if other.system["kind"] != "majority" and family != family_of(system):
            for one in other.questions:
                found.setdefault((one.record, one.name), {})[family] = one.predicted
    return {question: list(answers.values()) for question, answers in found.items()}


def family_of(system: Json) -> str:
    """The family of a system. Systems of one family share errors: two adapters of one base that agree are not
    independent evidence that the annotation is wrong."""
    return system.get("family") or ("models" if system["kind"] in ("model", "base") else system["kind"])


def system_row(system: Json, questions: list[Question]) -> Json:
    row: Json = {key: system.get(key) for key in ("name", "kind", "seconds", "peak_mb", "form", "grounded", "seen")}
    row["notes"] = len({one.record for one in questions})
    for preset in ("clinical", PAPER_PRESET):
        row[preset] = {name: figures(group, preset) for name, group in groups(questions).items()}
    row["per_phenotype"] = {}
    for name in PHENOTYPES:
        own = [one for one in questions if one.name == name and one.task == "phenotype"]
        answerable = [one for one in own if one.answerable]
        unanswerable = [one for one in own if not one.answerable]
        row["per_phenotype"][name] = {"answerable": figures(answerable), "unanswerable": figures(unanswerable)}
    codes = [one for one in questions if one.task == "diagnosis" and one.answerable]
    if codes:
        read = [(lookup(" ".join(one.predicted), 1), lookup(one.gold[0], 1)) for one in codes]
        exact = [100.0 * (predicted != [] and predicted[:1] == gold[:1]) for predicted, gold in read]
        category = [100.0 * (bool(predicted and gold) and predicted[0][:3] == gold[0][:3]) for predicted, gold in read]
        patients = [one.patient for one in codes]
        row["code"] = {"n": len(codes), "exact": spread(exact, patients), "category": spread(category, patients)}
    return row


def curve(path: Path) -> Json:
    """A run's training and validation losses by step. A line without a loss (a skipped step, or one without
    validation) is left out."""
    found: Json = {"step": [], "loss": [], "valid_step": [], "valid_loss": []}
    for number, line in read_jsonl(path):
        for steps, key in (("step", "loss"), ("valid_step", "valid_loss")):
            step, loss = line.get("step"), line.get(key)
            if not all(isinstance(value, int | float | None) for value in (step, loss)):
                raise UserError(f"{path}:{number}: 'step' or {key!r} is not a number; give a run's metrics.jsonl")
            if loss is not None:
                found[steps].append(step)
                found[key].append(loss)
    return found


def last_model(asked: dict[str, Asked], *kinds: str) -> Asked | None:
    """The last system in run.json of one of these kinds."""
    return next((one for one in reversed(asked.values()) if one.system["kind"] in kinds), None)


def confidence_of(asked: dict[str, Asked]) -> Json | None:
    """Calibration and least certain answers of the last model; None if its answers have no probabilities."""
    last = last_model(asked, "model")
    found = confidences(last.questions, last.predictions) if last else []
    if last is None or not found:
        return None
    tasks = {task: summary(group) for task, group in by_task(found).items()}
    return {"system": last.system["name"], "tasks": tasks, "review": review_first(found)}


def examples_of(name: str, references: list[Json], asked: dict[str, Asked], count: int) -> list[Json]:
    """`count` notes of a test set with the last model's answers."""
    last = last_model(asked, "model", "base")
    rows = examples(references, last.predictions, count) if last else []
    return [{"set": name, "system": last.system["name"], **row} for row in rows if last]


def write(run: Path) -> Json:
    """Build the report of `run` and write report.json and report.html into it (mode 0600)."""
    report = build(run)
    page = render(report)
    text = json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False)
    write_text(run / "report.json", text + "\n", mode=0o600)
    write_text(run / "report.html", page, mode=0o600)
    return report


def main(options: Options) -> None:
    print(terminal_table(write(options.run)))
    print(f"report: {options.run / 'report.html'}")
