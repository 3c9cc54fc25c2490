"""How often answers of a given probability are right, and the temperature that corrects the probabilities.

    python -m eval.calibration --predictions F.jsonl --references G.jsonl [--out ADAPTER/calibration.json]

An answer's log-probability is a sum over its tokens, so that long answers look less sure than they are; a grounded
answer's is that of the whole vocabulary, before the tokens that are not allowed are masked. p = exp(logprob / T) with
one T for each task, which minimises the log loss of "the answer matches exactly" (temperature scaling, Guo et al. 2017,
over a whole answer). The T of held-out notes is kept beside the adapter; infer.extract then writes `probability` into
its records.
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
TEMPERATURES = [10 ** (step / 100) for step in range(-100, 201)]  # 0.1 to 100, each 2.3 % above the one before
FEWEST = 50  # answers that a temperature is fitted on
LEAST = 1e-6  # of a probability in the log loss
BINS = 10
SHARES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)
FIRST = 20  # answers to review first


@dataclass(frozen=True)
class Options:
    """Fit the temperature of an adapter's answers to held-out notes, and show how far probabilities can be trusted."""

    predictions: Path
    """JSON lines, one note each, as infer.extract writes them."""
    references: Path
    """The annotated notes, which training has not seen."""
    out: Path | None = None
    """Where to keep the temperatures: calibration.json in the adapter's folder."""
    overwrite: bool = False
    """Replace a file that is there."""
    json: bool = False
    """Print one JSON object instead of the table."""


@dataclass(frozen=True)
class Confidence:
    """An answered question with the log-probability of its answer."""

    question: Question
    logprob: float
    p: float
    """The probability in the record: the calibrated one where there is one."""

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
    """The questions whose record says how probable its answer is; own questions and failed notes are left out."""
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
    """The T of TEMPERATURES with the least log loss; 1 where there are fewer than FEWEST answers to fit it on."""
    if len(found) < FEWEST:
        return 1.0
    right = [is_right(one.question) for one in found]
    losses = [log_loss([probability(one.logprob, t) for one in found], right) for t in TEMPERATURES]
    return round(TEMPERATURES[losses.index(min(losses))], 3)


def log_loss(ps: Sequence[float], right: Sequence[bool]) -> float:
    """Mean negative log-likelihood (nats) of what was right."""
    clipped = [min(1 - LEAST, max(LEAST, p)) for p in ps]
    return -sum(math.log(p if hit else 1 - p) for p, hit in zip(clipped, right, strict=True)) / len(clipped)


def summary(found: Sequence[Confidence]) -> Json:
    """Reliability in bins of equally many answers, the expected calibration error, and exact-match F1 on the surest."""
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
    """The least sure answers, which a reader should look at first."""
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
