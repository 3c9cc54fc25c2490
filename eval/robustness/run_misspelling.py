"""Misspelled notes: a trained adapter answers the same notes at nested rates of misspelling, as they are and repaired.

The corruption is misspelling.py's, the repair infer.extract's. All rates are asked in one job each way.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from eval.experiments.steps import LONG, Run, begin, extraction, made_from
from eval.questions import Question, pair, read_predictions, read_references
from eval.robustness.curve import curve, recovery, recovery_lines, text_table
from eval.robustness.misspelling import eligible, misspell
from infer.retrieval.repair import read_lexicon
from model.support.cli import UserError
from model.support.files import write_json, write_jsonl

PLAIN, REPAIRED = "as misspelled", "repaired"


@dataclass(frozen=True)
class Misspelling:
    """Answer notes at nested rates of misspelling, plain and repaired."""

    weights: str
    """The base model's folder."""
    notes: Path
    """JSON lines of annotated test notes; their words are misspelled, their answers are not."""
    lexicon: Path
    """JSON lines whose `text` is spelled well (training notes): what repair corrects towards."""
    out: Path
    """The run's folder: the misspelled notes, answers, result.json."""
    adapter: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """The tuned adapter; one --adapter each, merged in this order."""
    rates: tuple[float, ...] = (0.0, 0.05, 0.1, 0.2, 0.4)
    """The shares of words (of four letters or more) that are misspelled; a word wrong at one rate is wrong in the same
    way at a higher one."""
    limit: int = 0
    """Only the first notes (0: all)."""
    grounded: bool = False
    """Ask as infer.extract --grounded does."""
    overwrite: bool = False
    """Remove the run that is there, and begin again."""

    def __post_init__(self) -> None:
        if not self.rates or 0.0 not in self.rates or any(not 0 <= rate <= 1 for rate in self.rates):
            raise UserError(f"--rates {' '.join(map(str, self.rates))}: rates between 0 and 1, and 0 among them")
        if len({at("", rate) for rate in self.rates}) < len(self.rates):
            raise UserError(f"--rates {' '.join(map(str, self.rates))}: two of them are the same tenth of a percent")
        if self.limit < 0:
            raise UserError(f"--limit {self.limit}: 0 or more")


def run_misspelling(options: Misspelling) -> dict[str, Any]:
    references = read_references(options.notes)[: options.limit or None]
    given, references = len(references), [record for record in references if record["text"].strip()]
    if not references:
        raise UserError(f"{options.notes}: every note is empty")
    if len(references) < given:
        print(f"{options.notes}: {given - len(references)} of {given} notes are empty and left out", file=sys.stderr)
    read_lexicon(options.lexicon)  # repair reads it after the plain answers; a mistake in it is reported first
    files = {"notes": options.notes, "lexicon": options.lexicon}
    made_of = made_from(options, files, (options.weights, *options.adapter))
    with begin(options.out, made_of, overwrite=options.overwrite) as run:
        return measured(run, options, references)


def measured(run: Run, options: Misspelling, references: list[dict[str, Any]]) -> dict[str, Any]:
    """The notes of all rates answered and scored, as they are and repaired; writes result.json."""
    rates, changed = sorted(options.rates), []
    asked = []
    for rate in rates:
        misspelled = [misspell(record, rate) for record in references]
        differing = sum(
            a != b
            for new, old in zip(misspelled, references, strict=True)
            for a, b in zip(new["text"].split(), old["text"].split(), strict=True)
        )
        changed.append(differing)
        asked += [{"id": at(record["id"], rate), "text": record["text"]} for record in misspelled]
    write_jsonl(options.out / "notes.jsonl", asked)
    series = {}
    for name, file, more in ((PLAIN, "plain", []), (REPAIRED, "repaired", ["--repair", str(options.lexicon)])):
        answers = options.out / f"{file}.jsonl"
        more += ["--grounded"] if options.grounded else []
        notes = options.out / "notes.jsonl"
        run.step(f"answers: {name}", extraction(options.weights, options.adapter, notes, answers, *LONG, *more))
        series[name] = by_rate(references, read_predictions(answers), rates)
    result: dict[str, Any] = {"what": "misspelling", "corrupted": "words misspelled", **curve(series)}
    result |= {
        "changed": changed,
        "of": sum(eligible(record["text"]) for record in references),
        "seconds": run.took(),
    }
    clean = series[PLAIN][0.0]
    result["recovery"] = [
        {"rate": rate, **recovery(clean, series[PLAIN][rate], series[REPAIRED][rate])} for rate in rates
    ]
    write_json(options.out / "result.json", result)
    return result


def at(name: str, rate: float) -> str:
    return f"{name}@{round(1000 * rate):03d}"


def by_rate(references: list[dict], predictions: list[dict], rates: list[float]) -> dict[float, list[Question]]:
    found = {}
    given = {prediction["id"]: prediction for prediction in predictions}
    for rate in rates:
        own = [{**given[at(record["id"], rate)], "id": record["id"]} for record in references]
        found[rate] = pair(references, own)[0]
    return found


def format_result(result: dict[str, Any]) -> str:
    return "\n".join([text_table(result), *recovery_lines(result["recovery"])])
