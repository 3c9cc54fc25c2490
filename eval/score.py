"""Scores a predictions file: `python -m eval.score --predictions F.jsonl --references G.jsonl`.

    python -m eval.score --predictions runs/demo/predictions/tuned-heldout.jsonl --references
    runs/demo/data/heldout.jsonl

eval/questions.py describes the two files. Answerable and unanswerable questions (right answer: "not relevant") are
scored separately, because a system that always answers "not relevant" would look good in a mean over both.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from eval.failures import invented, is_open
from eval.metrics.presets import chosen
from eval.metrics.scoring import METRICS
from eval.metrics.statistics import format_interval
from eval.questions import Counts, Question, figures, pair, read_predictions, read_references
from model.support.cli import UserError, run

NAMES = {"exact_match": "exact match", "bleu2": "BLEU-2", "rouge_l": "ROUGE-L", "average_f1": "average F1"}


@dataclass(frozen=True)
class Options:
    """Score a file of predictions against annotated notes."""

    predictions: Path
    """Predictions, JSON lines with one note each, as infer.extract writes them."""
    references: Path
    """Annotated notes, JSON lines, as train.clinic writes them."""
    task: Literal["phenotype", "diagnosis", "both"] = "both"
    """Questions to score; both includes the records' own questions."""
    preset: str = "clinical"
    """Metric definitions: clinical, cancerllm, cancerllm-released, coco, sacrebleu, nltk or rouge_score; or the
    signature printed with another score."""
    json: bool = False
    """Print one JSON object instead of the table."""

    def __post_init__(self) -> None:
        chosen(self.preset)


def groups(questions: list[Question], task: str = "both") -> dict[str, list[Question]]:
    """The questions in the groups that are reported: answerable phenotypes, unanswerable phenotypes, diagnosis, and the
    records' own questions if there are any."""
    found: dict[str, list[Question]] = {"phenotype": [], "phenotype, unanswerable": [], "diagnosis": []}
    for one in questions:
        if task in ("both", one.task):
            separate = one.task != "diagnosis" and not one.answerable
            found.setdefault(f"{one.task}, unanswerable" if separate else one.task, []).append(one)
    return found


def main(options: Options) -> None:
    references = read_references(options.references)
    questions, counts = pair(references, read_predictions(options.predictions))
    result: dict[str, Any] = {"counts": asdict(counts), "groups": {}}
    if options.task != "diagnosis":
        notes = {one["id"]: one["text"] for one in references}
        opened = [one for one in questions if is_open(one)]
        count = sum(invented(one, notes[one.record]) for one in opened)
        result["invented"] = {"count": count, "answers": sum(len(one.predicted) for one in opened)}
    for name, group in groups(questions, options.task).items():
        if group:
            result["groups"][name] = figures(group, chosen(options.preset).name)
    if not result["groups"]:
        asked = "question" if options.task == "both" else f"{options.task} question"
        raise UserError(f"{options.references}: no {asked}; give annotated notes")
    if options.json:
        print(json.dumps(result, indent=2))
        return
    print(table(result))
    warn(counts, options.predictions)


def table(result: dict[str, Any]) -> str:
    lines = []
    for name, group in result["groups"].items():
        lines.append(f"{name} (n = {group['n']} questions, {group['patients']} patients)")
        for metric in (*METRICS, "average_f1"):
            value = group[metric]
            if value is None:
                lines.append(f"  {NAMES[metric]:<12} not computed by this preset")
                continue
            parts = f"P {value['precision']:5.1f}  R {value['recall']:5.1f}  " if "precision" in value else " " * 18
            lines.append(
                f"  {NAMES[metric]:<12} {parts}F1 {value['f1']:5.1f}  {format_interval(value['low'], value['high'])}"
                f"  gold against gold {value['ceiling']:.1f}"
            )
    if "invented" in result:
        count, answers = result["invented"].values()
        lines.append(f"invented: {count} of {answers} answers to open questions do not occur in the note")
    return "\n".join([*lines, f"signature {group['signature']}"])


def warn(counts: Counts, where: Path) -> None:
    """Print to stderr what did not pair up."""
    kinds = {
        "notes without a prediction (every question of them is wrong)": counts.missing,
        "predictions for unknown notes": counts.extra,
        "notes predicted twice (the first counts)": counts.duplicate,
        "notes that failed": counts.failed,
    }
    for what, ids in kinds.items():
        if ids:
            print(f"{where}: {len(ids)} {what}: {', '.join(ids[:5])}{', …' * (len(ids) > 5)}", file=sys.stderr)
    if counts.empty_answers:
        print(f"{where}: {counts.empty_answers} empty answers", file=sys.stderr)


if __name__ == "__main__":
    run(main, Options)
