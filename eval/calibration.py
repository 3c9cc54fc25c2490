"""Calibrates answer probabilities by temperature scaling, and measures how well calibrated they are.

    python -m eval.calibration --predictions F.jsonl --references G.jsonl [--out ADAPTER/calibration.json]

An answer's log-probability is the sum over its tokens, so long answers look too improbable; with --grounded it is taken
over the whole vocabulary, before masking. The calibrated probability is p = exp(logprob / T), with one T per task that
minimises the log loss of "the answer matches exactly" (temperature scaling, Guo et al. 2017, applied to whole answers).
T is fitted on held-out notes and stored in the adapter's folder; infer.extract then adds `probability` to its records.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from eval.failures import is_right
from eval.questions import Question, f1_of, pair, read_predictions, read_references
from infer.extract.answers import probability
from model.support.cli import UserError, run
from model.support.files import write_json
from model.support.lock import output

Json = dict[str, Any]
TEMPERATURES = [10 ** (step / 100) for step in range(-100, 201)]  # 0.1 to 100 in steps of 2.3 %
FEWEST = 50  # answers needed to fit a temperature
LEAST = 1e-6  # probabilities are clipped to [LEAST, 1 - LEAST] in the log loss
BINS = 10
SHARES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)  # of the answers, the most probable ones
FIRST = 20  # answers listed for review


@dataclass(frozen=True)
class Options:
    """Fit temperatures to answers on held-out notes, and print log loss and calibration error before and after."""

    predictions: Path
    """Predictions, JSON lines with one note each, as infer.extract writes them."""
    references: Path
    """The annotated notes; training must not have seen them."""
    out: Path | None = None
    """File for the temperatures: calibration.json in the adapter's folder."""
    overwrite: bool = False
    """Replace an existing file."""
    json: bool = False
    """Print one JSON object instead of the table."""


@dataclass(frozen=True)
class Confidence:
    """A question with the log-probability of its predicted answer."""

    question: Question
    logprob: float
    p: float
    """The record's calibrated probability if it has one, else exp(logprob)."""

    def at(self, temperature: float) -> Confidence:
        return replace(self, p=probability(self.logprob, temperature))


def main(options: Options) -> None:
    predictions = read_predictions(options.predictions)
    questions, _ = pair(read_references(options.references), predictions)
    found = confidences(questions, predictions)
    if not found:
        raise UserError(f"{options.predictions}: no answer with a log-probability; give infer.extract's output")
    fitted = {task: temperature(those) for task, those in by_task(found).items()}
    result: Json = {"temperature": fitted, "tasks": {}}
    for task, those in by_task(found).items():
        sides = {"before": 1.0, "after": fitted[task]}
        result["tasks"][task] = {name: summary([one.at(t) for one in those]) for name, t in sides.items()}
    with output(options.out, options.overwrite, options.predictions, options.references):
        if options.out is not None:
            write_json(options.out, {**fitted, "notes": len({one.question.record for one in found})})
    print(json.dumps(result, indent=2) if options.json else "\n".join(table(result)))
    if options.out is not None and not options.json:
        print(f"temperatures: {options.out}")


def table(result: Json) -> list[str]:
    lines = []
    for task, sides in result["tasks"].items():
        few = " (too few to fit one)" if sides["after"]["n"] < FEWEST else ""
        lines.append(f"{task}: temperature {result['temperature'][task]:.2f}{few}, n = {sides['after']['n']}")
        for name, one in sides.items():
            lines.append(f"  {name:<6} log loss {one['log_loss']:.3f}  expected calibration error {one['error']:.3f}")
        kept = ", ".join(f"{100 * share:.0f} %: {f1:.1f}" for share, f1 in sides["after"]["abstention"])
        lines.append(f"  exact-match F1 on the surest answers, {kept}")
    return lines


def confidences(questions: Sequence[Question], predictions: Sequence[Json]) -> list[Confidence]:
    """The questions whose answer has a log-probability, without the records' own questions and failed notes."""
    records = {record["id"]: record for record in reversed(predictions)}
    found = []
    for one in questions:
        record = records.get(one.record, {})
        answer = record.get("diagnosis") if one.name == "diagnosis" else (record.get("phenotypes") or {}).get(one.name)
        if isinstance(answer, dict) and isinstance(answer.get("logprob"), int | float) and not one.own:
            own = probability(answer["logprob"], 1.0)
            found.append(Confidence(one, answer["logprob"], answer.get("probability", own)))
    return found


def by_task(found: Sequence[Confidence]) -> dict[str, list[Confidence]]:
    tasks: dict[str, list[Confidence]] = {}
    for one in found:
        tasks.setdefault(one.question.task, []).append(one)
    return tasks


def temperature(found: Sequence[Confidence]) -> float:
    """The T of TEMPERATURES with the lowest log loss; 1 if there are fewer than FEWEST answers."""
    if len(found) < FEWEST:
        return 1.0
    right = [is_right(one.question) for one in found]
    losses = [log_loss([probability(one.logprob, t) for one in found], right) for t in TEMPERATURES]
    return round(TEMPERATURES[losses.index(min(losses))], 3)


def log_loss(ps: Sequence[float], right: Sequence[bool]) -> float:
    """Mean binary cross-entropy in nats: ps predict `right`."""
    clipped = [min(1 - LEAST, max(LEAST, p)) for p in ps]
    return -sum(math.log(p if hit else 1 - p) for p, hit in zip(clipped, right, strict=True)) / len(clipped)


def summary(found: Sequence[Confidence]) -> Json:
    """Reliability in equally filled bins, expected calibration error, exact-match F1 on the most probable answers."""
    ordered = sorted(found, key=lambda one: one.p)
    edges = [len(ordered) * turn // BINS for turn in range(BINS + 1)]
    bins = [ordered[start:end] for start, end in zip(edges, edges[1:], strict=False) if start < end]
    reliability = [
        {
            "p": sum(one.p for one in group) / len(group),
            "right": sum(is_right(one.question) for one in group) / len(group),
            "n": len(group),
        }
        for group in bins
    ]
    f1s = [f1_of(one.question) for one in ordered]
    kept = {share: f1s[-max(1, round(len(f1s) * share)) :] for share in SHARES}
    return {
        "n": len(ordered),
        "log_loss": log_loss([one.p for one in ordered], [is_right(one.question) for one in ordered]),
        "error": sum(group["n"] * abs(group["p"] - group["right"]) for group in reliability) / len(ordered),
        "reliability": reliability,
        "abstention": [[share, sum(surest) / len(surest)] for share, surest in kept.items()],
    }


def review_first(found: Sequence[Confidence], count: int = FIRST) -> list[Json]:
    """The `count` least probable answers."""
    return [
        {
            "record": one.question.record,
            "question": one.question.name,
            "answered": "; ".join(one.question.predicted) or "not relevant",
            "p": one.p,
            "right": is_right(one.question),
        }
        for one in sorted(found, key=lambda one: one.p)[:count]
    ]


if __name__ == "__main__":
    run(main, Options)
