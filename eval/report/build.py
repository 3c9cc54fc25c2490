"""The paper's tables for a run: `python -m eval.report RUN_DIR` writes report.html and report.json into it.

RUN_DIR/run.json names what was run (paths relative to RUN_DIR):

    {"title", "scale", "seconds", "peak_mb", "host", "references": {"heldout": path, "unseen": path},
     "systems": [{"name", "kind": "model"|"base"|"regex"|"majority", "predictions": {"heldout": path, "unseen": path},
                  "notes": how many notes it was given (default: all), "seconds", "peak_mb",
                  "family": systems of one family share errors (default: one family of all models),
                  and how it was asked: "form": "template", or the chat form, "grounded": true|false}],
     "compare": [[name, name], …]: the pairs of systems whose difference matters,
     "curves": {name: metrics.jsonl}, "bits_per_byte": [{"name", "before", "after"}],
     and where they were run, a result.json each: "wrong_labels", "misspelling", "canaries" (eval.robustness) and
     "retrieval": {"notes", "rows": [{"name", "note", "recall_at": {k: share}, "ndcg", "diagnosis": figures}]}}

Every figure is computed here from the predictions; answerable and unanswerable questions never share a mean. The report
quotes notes, so report.html and report.json can be read by their owner alone.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any

import tyro
from tqdm import tqdm

from eval.failures import count_failures
from eval.metrics import PRESETS
from eval.metrics.ledger import ledger
from eval.metrics.scoring import METRICS
from eval.metrics.statistics import format_interval, interval
from eval.questions import (
    Question,
    figures,
    pair,
    paired_f1,
    patient_of,
    read_predictions,
    read_references,
)
from eval.report import plots as report_plots
from eval.report.examples import examples
from eval.report.paper import PAPER
from eval.report.run_file import read_parts, read_run
from eval.score import NAMES, groups
from infer.codes import lookup
from infer.tasks import PHENOTYPES
from model.support.cli import UserError
from model.support.files import read_jsonl, write_text

Json = dict[str, Any]
TASKS = ("phenotype", "diagnosis", "phenotype, unanswerable")
OWN_TASKS = ("own question", "own question, unanswerable")
TASK_TITLES = {"phenotype": "phenotypes", "diagnosis": "diagnosis"}
PAPER_PRESET = "cancerllm"
SET_TITLES = {"heldout": "held-out patients", "unseen": "other patients, unseen styles"}


@dataclass(frozen=True)
class Options:
    """Write a run's report: the paper's tables, plots, failures and examples, as HTML and JSON."""

    run: Annotated[Path, tyro.conf.Positional]
    """The run's folder, with run.json."""
    examples: int = 10
    """Notes to show with their answers marked."""

    def __post_init__(self) -> None:
        if self.examples < 0:
            raise UserError(f"--examples {self.examples}: 0 or more")


def build(run: Path, examples_shown: int = 10) -> Json:
    """The report of a run folder as one JSON value. Raises UserError where run.json or a file that it names is
    wrong."""
    given = read_run(run)
    shown = ("title", "scale", "seconds", "peak_mb", "host", "bits_per_byte")
    report: Json = {key: given.get(key) for key in shown}
    report |= read_parts(run, given)
    report |= {"preset": "clinical", "second_preset": PAPER_PRESET, "paper": PAPER, "sets": {}}
    judged_pairs: list[tuple[tuple[str, ...], tuple[str, ...]]] = []
    for name, path in tqdm(given["references"].items(), desc="test sets", disable=None):
        references = read_references(run / path)
        report["sets"][name], pairs = set_report(run, given, name, references)
        judged_pairs += pairs
    report["ledger"] = ledger(judged_pairs)
    report["curves"] = {name: _curve(run / path) for name, path in (given.get("curves") or {}).items()}
    report["examples"] = _examples(run, given, examples_shown)
    return report


def set_report(run: Path, given: Json, name: str, references: list[Json]) -> tuple[Json, list]:
    """One test set: every system's figures and failures, the pairs compared, and the answers for the ledger."""
    notes = {record["id"]: record["text"] for record in references}
    asked = {}
    for system in given["systems"]:
        if name in system["predictions"]:
            predictions = read_predictions(run / system["predictions"][name])
            asked[system["name"]] = (system, *pair(references, predictions, system.get("notes")))
    result: Json = {
        "title": SET_TITLES.get(name, name),
        "notes": len(references),
        "systems": [],
        "patients": len(set(map(patient_of, references))),
    }
    pairs = []
    for system, questions, counts in asked.values():
        families: dict[tuple[str, str], dict[str, tuple[str, ...]]] = {}
        for their, theirs, _ in asked.values():
            if their["kind"] != "majority" and family_of(their) != family_of(system):
                for one in theirs:
                    families.setdefault((one.record, one.name), {})[family_of(their)] = one.predicted
        others = {question: list(answers.values()) for question, answers in families.items()}
        row = _row(system, questions)
        row["counts"] = counts.named()
        row["failures"] = count_failures(questions, notes, others)
        result["systems"].append(row)
        if system["kind"] != "majority":
            pairs += [(one.predicted, one.gold) for one in questions if one.gold]
    result["paired"] = [
        {"a": a, "b": b, "task": task, **test}
        for a, b in given.get("compare") or []
        if a in asked and b in asked
        for task, group in groups(asked[a][1]).items()
        if (test := paired_f1(group, asked[b][1]))
    ]
    return result, pairs


def family_of(system: Json) -> str:
    """Systems of one family share errors: adapters of one base are no independent evidence for each other."""
    return system.get("family") or ("models" if system["kind"] in ("model", "base") else system["kind"])


def _row(system: Json, questions: list[Question]) -> Json:
    row: Json = {key: system.get(key) for key in ("name", "kind", "seconds", "peak_mb", "form", "grounded")}
    row["notes"] = len({one.record for one in questions})
    for preset in ("clinical", PAPER_PRESET):
        row[preset] = {name: figures(group, preset) for name, group in groups(questions).items()}
    phenotype = [one for one in questions if one.task == "phenotype"]
    row["per_phenotype"] = {
        name: {
            "answerable": figures([one for one in phenotype if one.name == name and one.answerable]),
            "unanswerable": figures([one for one in phenotype if one.name == name and not one.answerable]),
        }
        for name in PHENOTYPES
    }
    codes = [one for one in questions if one.task == "diagnosis"]
    if codes:
        found = [(lookup(" ".join(one.predicted), 1), lookup(one.gold[0], 1)) for one in codes]
        patients = [one.patient for one in codes]
        row["code"] = {
            "n": len(codes),
            "exact": share([p != [] and p[:1] == g[:1] for p, g in found], patients),
            "category": share([p != [] and g != [] and p[0][:3] == g[0][:3] for p, g in found], patients),
        }
    return row


def share(hits: list[bool], patients: list[str]) -> Json:
    """How many of them, in percent, with the interval; under the name that figures have."""
    low, high = interval([100.0 * hit for hit in hits], patients)
    return {"f1": 100 * sum(hits) / len(hits), "low": low, "high": high}


def _curve(path: Path) -> Json:
    curve: Json = {"step": [], "loss": [], "valid_step": [], "valid_loss": []}
    for number, line in read_jsonl(path):
        loss = line.get("loss")
        if not all(isinstance(value, int | float | None) for value in (line.get("step"), loss, line.get("valid_loss"))):
            raise UserError(f"{path}:{number}: 'step', 'loss' and 'valid_loss' are numbers; give a run's metrics.jsonl")
        if loss is not None:  # null: the step was skipped
            curve["step"].append(line["step"])
            curve["loss"].append(line["loss"])
        if line.get("valid_loss") is not None:
            curve["valid_step"].append(line["step"])
            curve["valid_loss"].append(line["valid_loss"])
    return curve


def _examples(run: Path, given: Json, count: int) -> list[Json]:
    """Notes of both sets as the last model of run.json answered them."""
    models = [system for system in given["systems"] if system["kind"] in ("model", "base")]
    if not models or not count:
        return []
    names = [name for name in given["references"] if name in models[-1]["predictions"]]
    found = []
    for turn, name in enumerate(names):
        share = count // len(names) + (turn < count % len(names))
        rows = examples(
            read_references(run / given["references"][name]),
            read_predictions(run / models[-1]["predictions"][name]),
            share,
        )
        found += [{"set": name, "system": models[-1]["name"], **row} for row in rows]
    return found


# ---- shown ----------------------------------------------------------------------------------------------------


def terminal_table(report: Json) -> str:
    """The report's main figures as text: exact-match F1 and average F1 with intervals and numbers of questions."""
    width = max(
        [len("gold against gold"), *(len(row["name"]) for s in report["sets"].values() for row in s["systems"])]
    )
    lines = []
    for name, part in report["sets"].items():
        lines += [
            f"{part['title']} ({name}): {part['notes']} notes of {part['patients']} patients",
            f"  {'exact-match F1 [95 % interval] n':<{width}}  {'phenotypes':<26} {'diagnosis':<26} "
            f"{'not relevant':<26} average F1",
        ]
        for row in part["systems"]:
            group = row["clinical"]
            tasks = OWN_TASKS if "own question" in group else TASKS
            cells = [_cell(group.get(task)) for task in tasks]
            average = " / ".join(f"{group[task]['average_f1']['f1']:.1f}" for task in tasks[:2] if group.get(task))
            lines.append(
                f"  {row['name']:<{max(width, 32)}}  " + " ".join(f"{cell:<26}" for cell in cells) + f" {average}"
            )
        lines.append("")
    lines.append(
        "average F1: phenotypes / diagnosis, mean of exact match, BLEU-2 and ROUGE-L; gold against gold is 100 "
        "under the clinical scorer used here"
    )
    return "\n".join(lines)


def _cell(group: Json | None) -> str:
    if group is None:
        return "–"
    exact = group["exact_match"]
    return f"{exact['f1']:5.1f} {format_interval(exact['low'], exact['high'])} {group['n']}"


def render(report: Json) -> str:
    """The report as one HTML page that needs nothing else."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "figure": lambda value: "–" if value is None or value != value else f"{value:.1f}",
        "words": lambda name: name.replace("_", " "),
        "clock": _clock,
    }
    return environment.get_template("report.html").render(
        report=report,
        plots=plots(report),
        metrics=METRICS,
        names=NAMES,
        phenotypes=list(PHENOTYPES),
        presets=PRESETS,
        asked=prompting_notes(report),
        ceilings=ceilings,
        verdicts=verdicts(report),
        host=host_line(report.get("host")),
        has_own=any("own question" in row["clinical"] for part in report["sets"].values() for row in part["systems"]),
    )


def verdicts(report: Json) -> list[str]:
    """One sentence a test set: what the best model reaches, and what is reached without one."""
    found = []
    for part in report["sets"].values():
        task = "phenotype" if any(row["clinical"].get("phenotype") for row in part["systems"]) else "own question"
        best: dict[bool, Json] = {}
        for row in part["systems"]:
            of_model, group = row["kind"] in ("model", "base"), row["clinical"].get(task)
            if group and (of_model not in best or group["exact_match"]["f1"] >= _f1(best[of_model], task)):
                best[of_model] = row
        if True in best:
            row, diagnosis = best[True], best[True]["clinical"].get("diagnosis")
            exact = row["clinical"][task]["exact_match"]
            spread = format_interval(exact["low"], exact["high"])
            sentence = f"{part['title'][:1].upper()}{part['title'][1:]}: {row['name']} reaches an exact-match F1 of "
            sentence += f"{exact['f1']:.1f} {spread}".rstrip() + (" on phenotypes" if task == "phenotype" else "")
            sentence += f" and {diagnosis['exact_match']['f1']:.1f} on diagnoses" if diagnosis else ""
            if False in best:
                plain = best[False]
                sentence += f"; without a model, {plain['name']}: {_f1(plain, task):.1f}"
                sentence += f" and {_f1(plain, 'diagnosis'):.1f}" if plain["clinical"].get("diagnosis") else ""
            found.append(f"{sentence} ({part['patients']} patients).")
    return found


def _f1(row: Json, task: str) -> float:
    return row["clinical"][task]["exact_match"]["f1"]


def host_line(host: Json | str | None) -> str:
    """The machine in a few words."""
    if not isinstance(host, dict):
        return host or ""
    parts = [str(host[key]) for key in ("gpu", "cpu", "processor") if host.get(key)][:1]
    parts += [f"{host['cores']} cores"] if host.get("cores") else []
    parts += [f"torch {host['torch']}"] if host.get("torch") else []
    return ", ".join(parts)


def prompting_notes(report: Json) -> dict[str, list[str]]:
    """How the systems were asked, each way with their names; what run.json does not say is left out."""
    found: dict[str, list[str]] = {}
    for row in next(iter(report["sets"].values()))["systems"]:
        if row["grounded"] is not None and row["form"] is not None:
            form = "the tuning's form" if row["form"] == "template" else "their own chat form"
            how = "grounded: spans of the note, closed values, existing ICD-10-CM entries"
            how = how if row["grounded"] else "freely"
            found.setdefault(f"asked in {form}, answering {how}", []).append(row["name"])
    return found


def ceilings(rows: list[Json], preset: str, task: str) -> list[tuple[list[str], Json]]:
    """What gold against gold gives, with the systems' names: once where it is the same for all, since a system that
    was given fewer notes has other right answers to reach."""
    found: dict[str, tuple[list[str], Json]] = {}
    for row in rows:
        if group := row[preset].get(task):
            key = str([group[name] and round(group[name]["ceiling"], 1) for name in ("average_f1", *METRICS)])
            names = found.get(key, ([], group))[0] + [row["name"]]
            found[key] = names, group
    return list(found.values())


def _clock(seconds: float | None) -> str:
    return "–" if seconds is None else str(timedelta(seconds=round(seconds)))


def plots(report: Json) -> dict[str, str]:
    """The report's plots, as SVG text."""
    found = {}
    for name, part in report["sets"].items():
        rows = part["systems"]
        if not any(_spread(row["clinical"][task]) for row in rows for task in TASK_TITLES):
            continue
        found[f"f1 {name}"] = report_plots.bars(
            [row["name"] for row in rows],
            {title: [_spread(row["clinical"][task]) for row in rows] for task, title in TASK_TITLES.items()},
            f"exact-match F1, {part['title']}",
        )
    for name, curve in report["curves"].items():
        series: Json = {"training": (curve["step"], curve["loss"])}
        if curve["valid_step"]:
            series["held out"] = (curve["valid_step"], curve["valid_loss"])
        found[f"curve {name}"] = report_plots.lines(series, "step", "loss (nats a token)", log=min(curve["loss"]) > 0)
    for name, x in (("wrong_labels", "wrong training labels, %"), ("misspelling", "misspelled words, %")):
        if report[name]:
            found[name] = report_plots.lines(_corruption(report[name]), x, "average F1", zero=True)
    if report["canaries"]:
        rows = report["canaries"]["rows"]
        series = {
            title: (
                [str(row["count"]) for row in rows[title]],
                *([row[key] for row in rows[title]] for key in ("exposure", "low", "high")),
            )
            for title in rows
        }
        found["canaries"] = report_plots.lines(series, "notes with the canary", "exposure, bits", zero=True)
    return found


def _corruption(part: Json) -> dict[str, tuple]:
    """A curve's lines: average F1 with its interval for each task and series, by rate in percent."""
    found = {}
    for task, title in TASK_TITLES.items():
        for name, entry in part["series"].items():
            points = [
                (100 * rate, *(row["average_f1"][key] for key in ("f1", "low", "high")))
                for rate, row in zip(entry["rates"], entry.get(task) or (), strict=False)
                if row
            ]
            if points:
                found[f"{title}, {name}"] = tuple(map(list, zip(*points, strict=True)))
    return found


def _spread(group: Json | None) -> tuple[float, float, float] | None:
    """None too where there are too few patients for an interval."""
    if group is None or group["exact_match"]["low"] is None:
        return None
    return tuple(group["exact_match"][key] for key in ("f1", "low", "high"))


def write(run: Path, examples_shown: int = 10) -> Json:
    """Build the report of `run` and write report.json and report.html into it, for their owner alone (0600)."""
    report = without_nan(build(run, examples_shown))
    page = render(report)
    write_text(run / "report.json", json.dumps(report, indent=2, ensure_ascii=False) + "\n", mode=0o600)
    write_text(run / "report.html", page, mode=0o600)
    return report


def without_nan(value: Any) -> Any:
    """JSON has no nan: null takes its place."""
    if isinstance(value, dict):
        return {str(key): without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def main(options: Options) -> None:
    report = write(options.run, options.examples)
    print(terminal_table(report))
    print(f"report: {options.run / 'report.html'}")
