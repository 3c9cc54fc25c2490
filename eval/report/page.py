"""Renders a report as one self-contained HTML page and as a table for the terminal."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import jinja2

from eval.metrics import PRESETS
from eval.metrics.scoring import METRICS
from eval.metrics.statistics import format_f1, format_interval
from eval.report.plots import line_plot
from eval.score import NAMES
from infer.tasks import PHENOTYPES

Json = dict[str, Any]
TASK_TITLES = {"phenotype": "phenotypes", "diagnosis": "diagnosis", "phenotype, unanswerable": "not relevant"}


def terminal_table(report: Json) -> str:
    """The main figures as text: exact-match F1 with interval and number of questions, and average F1."""
    width = max(32, *(len(row["name"]) for part in report["sets"].values() for row in part["systems"]))
    lines = []
    for name, part in report["sets"].items():
        lines.append(f"{part['title']} ({name}): {part['notes']} notes of {part['patients']} patients")
        columns = "".join(f"{title:<27}" for title in TASK_TITLES.values())
        lines.append(f"  {'exact-match F1 [95 % interval] n':<{width}}  {columns}average F1")
        for row in part["systems"]:
            group = row["clinical"]
            own = "own question" if "own question" in group else ""
            tasks = (own, "", f"{own}, unanswerable") if own else tuple(TASK_TITLES)
            cells = "".join(f"{cell(group.get(task)):<27}" for task in tasks)
            average = " / ".join(f"{group[task]['average_f1']['f1']:.1f}" for task in tasks[:2] if group.get(task))
            lines.append(f"  {row['name']:<{width}}  {cells}{average}")
        lines.append("")
    return "\n".join(
        [
            *lines,
            "average F1 (phenotypes / diagnosis): mean of exact match, BLEU-2 and ROUGE-L; gold against gold is 100 "
            "under the clinical preset used here",
        ]
    )


def cell(group: Json | None) -> str:
    if group is None:
        return "–"
    exact = group["exact_match"]
    return f"{exact['f1']:5.1f} {format_interval(exact['low'], exact['high'])} {group['n']}"


def render(report: Json) -> str:
    """The report as one self-contained HTML page."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "figure": lambda value: "–" if value is None else f"{value:.1f}",
        "words": lambda name: name.replace("_", " "),
        "clock": lambda seconds: "–" if seconds is None else str(timedelta(seconds=round(seconds))),
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
        verdicts=list(filter(None, map(verdict, report["sets"].values()))),
        host=host_line(report.get("host")),
        has_own=any("own question" in row["clinical"] for part in report["sets"].values() for row in part["systems"]),
    )


def verdict(part: Json) -> str:
    """One sentence per test set: the figures of the best model and of the best system without a model."""
    task = "phenotype" if any(row["clinical"].get("phenotype") for row in part["systems"]) else "own question"
    rows = sorted(
        (row for row in part["systems"] if row["clinical"].get(task)),
        key=lambda row: row["clinical"][task]["exact_match"]["f1"],
    )
    models = [row for row in rows if row["kind"] in ("model", "base")]
    others = [row for row in rows if row["kind"] not in ("model", "base")]
    if not models:
        return ""

    def reached(row: Json, of_task: str, of_diagnosis: str) -> str:
        exact, diagnosis = row["clinical"][task]["exact_match"], row["clinical"].get("diagnosis")
        text = format_f1(exact) + of_task
        return text + (f" and {diagnosis['exact_match']['f1']:.1f}{of_diagnosis}" if diagnosis else "")

    best = reached(models[-1], " on phenotypes" if task == "phenotype" else "", " on diagnoses")
    title = part["title"][:1].upper() + part["title"][1:]
    sentence = f"{title}: {models[-1]['name']} reaches an exact-match F1 of {best}"
    if others:
        sentence += f"; without a model, {others[-1]['name']}: {reached(others[-1], '', '')}"
    return f"{sentence} ({part['patients']} patients)."


def host_line(host: Json | None) -> str:
    """The machine in a few words."""
    host = host or {}
    parts = [str(host["cpu"])] if host.get("cpu") else []
    parts += [f"{host['cores']} cores"] if host.get("cores") else []
    parts += [f"torch {host['torch']}"] if host.get("torch") else []
    return ", ".join(parts)


def prompting_notes(report: Json) -> dict[str, list[str]]:
    """Prompt form and decoding → the systems that use them. Systems for which run.json gives neither are left out."""
    found: dict[str, list[str]] = {}
    for row in next(iter(report["sets"].values()))["systems"]:
        if row["grounded"] is not None and row["form"] is not None:
            form = "the tuning's prompt format" if row["form"] == "template" else "the model's chat format"
            constrained = "grounded decoding (spans of the note, closed lists, existing ICD-10-CM codes)"
            decoding = constrained if row["grounded"] else "unconstrained decoding"
            found.setdefault(f"{form}, {decoding}", []).append(row["name"])
    return found


def ceilings(rows: list[Json], preset: str, task: str) -> list[tuple[list[str], Json]]:
    """The distinct scores of gold against gold, each with the names of its systems. They differ only between systems
    that were given different numbers of notes."""
    found: dict[str, tuple[list[str], Json]] = {}
    for row in rows:
        if group := row[preset].get(task):
            key = str([group[name] and round(group[name]["ceiling"], 1) for name in ("average_f1", *METRICS)])
            found.setdefault(key, ([], group))[0].append(row["name"])
    return list(found.values())


def plots(report: Json) -> dict[str, str]:
    """The report's plots, as SVG text."""
    found = {}
    for name, curve in report["curves"].items():
        series: Json = {"training": (curve["step"], curve["loss"])}
        if curve["valid_step"]:
            series["held out"] = (curve["valid_step"], curve["valid_loss"])
        found[f"curve {name}"] = line_plot(series, "step", "loss (nats a token)", log=min(curve["loss"]) > 0)
    for name, part in report["sets"].items():
        if series := learning(part["systems"]):
            found[f"learning {name}"] = line_plot(series, "notes seen", "exact-match F1", zero=True)
    for name, x in (("wrong_labels", "wrong training labels, %"), ("misspelling", "misspelled words, %")):
        if report[name]:
            found[name] = line_plot(corruption(report[name]), x, "average F1", zero=True)
    for name, part in report["confidence"].items():
        bins: Json = {"perfect calibration": ([0, 1], [0, 1])}
        kept: Json = {}
        for task, one in part["tasks"].items():
            bins[task] = tuple([group[key] for group in one["reliability"]] for key in ("p", "right"))
            kept[task] = tuple(zip(*((100 * share, f1) for share, f1 in one["abstention"]), strict=True))
        found[f"reliability {name}"] = line_plot(bins, "probability", "share of exact matches")
        found[f"abstention {name}"] = line_plot(kept, "answers kept, %", "exact-match F1")
    if report["canaries"]:
        series = {}
        for name, rows in report["canaries"]["rows"].items():
            bits = [[row[key] for row in rows] for key in ("exposure", "low", "high")]
            series[name] = ([str(row["count"]) for row in rows], *bits)
        found["canaries"] = line_plot(series, "notes with the canary", "exposure, bits", zero=True)
    return found


def learning(systems: list[Json]) -> dict[str, tuple]:
    """The learning curve: for each task exact-match F1 with its interval, by number of training notes."""
    points = sorted((row for row in systems if row["seen"]), key=lambda row: row["seen"])
    found = {}
    for task in ("phenotype", "diagnosis") if len(points) > 1 else ():
        rows = [(row["seen"], row["clinical"][task]["exact_match"]) for row in points if row["clinical"].get(task)]
        f1s = [[exact[key] for _, exact in rows] for key in ("f1", "low", "high")]
        found[TASK_TITLES[task]] = ([seen for seen, _ in rows], *f1s)
    return found


def corruption(part: Json) -> dict[str, tuple]:
    """The corruption curve: for each task and series average F1 with its interval, by rate in percent."""
    found = {}
    for task in ("phenotype", "diagnosis"):
        for name, entry in part["series"].items():
            rows = [(rate, row["average_f1"]) for rate, row in zip(entry["rates"], entry[task], strict=True) if row]
            if rows:
                f1s = [[row[key] for _, row in rows] for key in ("f1", "low", "high")]
                found[f"{TASK_TITLES[task]}, {name}"] = ([100 * rate for rate, _ in rows], *f1s)
    return found
