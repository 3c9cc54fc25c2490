"""A task on real text: disease names in PubMed abstracts. `make demo-ner`; longer, for the release, `make diseases`.

    IOB files → questions (train.importers.conll) → LoRA on SmolLM2 (train.instruct) → answers (infer.extract) → F1

Uses the whole train and test splits of the NCBI disease corpus. A record is three sentences with one question. Two
scores: exact-match precision, recall and F1 over the distinct names of each record, and, as published taggers report
it, over mentions by offset, where an answered name counts at every place where it occurs. `--adapter` scores an
existing adapter (`make scores`). An interrupted run continues.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.experiments.adapter import BASE, card, release, write_mean
from eval.experiments.steps import Run, argv, begin, check_folder, extraction, made_from, public_base, training_dtype
from eval.questions import pair, read_predictions, read_references
from infer.extract.places import Span, occurrences
from infer.released import smollm2
from model.support.cli import UserError, run
from model.support.files import read_json, sha256_file, write_json, write_text
from model.support.hardware import host
from train.report.card import ROOT, code_version

CORPUS = Path("train/data/ncbi_disease")
CARD = Path(__file__).with_name("diseases.md")
NAMED = Path("infer/released/diseases-smollm2-135m")
SEEDS = (1, 2)  # of the tunings of --further
PUBLISHED = "published taggers reach 85–91"


@dataclass(frozen=True)
class Options:
    """Tune the demo's base on annotated disease names and score the test split."""

    out: Path = Path("runs/demo-ner")
    """The run's folder."""
    recipe: str = "train/recipes/demo-ner.toml"
    """The tuning recipe."""
    adapter: str = ""
    """Score this adapter, whose folder has a training.json, instead of tuning one."""
    further: str = ""
    """The recipe of two more tunings that start from the first and are averaged (empty: none)."""
    release: bool = False
    """Copy the adapter with its card and scores into infer/released, replacing the one there."""
    overwrite: bool = False
    """Remove an existing run and start again."""


def main(options: Options) -> None:
    check_folder()
    if options.adapter:
        read_json(Path(options.adapter) / "training.json")  # report a missing one before any work
    with begin(options.out, made_from(options), "score.json", options.overwrite) as run:
        pipeline(run, options)


def pipeline(run: Run, options: Options) -> None:
    """All steps in order, then the score."""
    files = {split: run.out / f"{split}.jsonl" for split in ("train", "test")}
    for split, file in files.items():
        source = CORPUS / f"{split}.tsv"
        run.step(
            f"questions of {split}",
            argv("train.importers.conll", iob=source, out=file, overwrite=True),
        )
    base = public_base(run)
    adapter, answers = run.out / "adapter", run.out / "answers.jsonl"
    if options.adapter:
        shutil.copytree(options.adapter, adapter, dirs_exist_ok=True)
    else:
        tune(run, options, base, files["train"], adapter)
    how = {"grounded": True, "max_new_tokens": 120}
    run.step("answers", extraction(str(base), adapter, files["test"], answers, **how))
    training = read_json(adapter / "training.json")
    found = score(files["test"], answers) | totals(training["stages"])
    found |= {"host": host(), "code": code_version(ROOT), "published": PUBLISHED}
    write_json(run.out / "score.json", found)
    shown = "precision {precision:.1f}, recall {recall:.1f}, F1 {f1:.1f}"
    print(
        f"{found['records']} records, {found['names']} distinct names: {shown.format(**found)}; {found['mentions']} "
        f"mentions: {shown.format(**found['entities'])} ({PUBLISHED}); not relevant: {found['empty_right']} of "
        f"{found['empty']} right. {run.out / 'score.json'}"
    )
    write_text(run.out / "README.md", text_of_card(adapter, found, training))
    if options.release:
        release(adapter, NAMED, run.out, "score.json")


def tune(run: Run, options: Options, base: Path, data: Path, adapter: Path) -> None:
    """Train one adapter, or the mean of two further tunings of it, and write it with its training.json."""
    tuned = run.out / "tuned"
    how = {"weights": base, "data": data, "dtype": training_dtype(run.out)}
    run.step("tuning", argv("train.instruct", options.recipe, out=tuned, **how))
    ends = [tuned]
    if options.further:
        how["adapter"] = tuned / "adapter"
        ends = [run.out / f"further-{seed}" for seed in SEEDS]
        runs = {
            seed: argv("train.instruct", options.further, out=out, seed=seed, **how)
            for seed, out in zip(SEEDS, ends, strict=True)
        }
        run.run_in_parallel({f"further tuning {seed}": command for seed, command in runs.items()})
    write_mean([end / "adapter" for end in ends], adapter)
    stages = [card(read_json(out / "run.json")) for out in dict.fromkeys([tuned, *ends])]
    write_json(adapter / "training.json", {"stages": stages, "host": host(), "peak_mb": run.peak("tuning")})


def totals(stages: list[dict[str, Any]]) -> dict[str, Any]:
    """Seconds and steps of all tunings, and the number of rows of the training data."""
    seconds, steps = (sum(stage[key] for stage in stages) for key in ("training_seconds", "steps"))
    return {"training_seconds": seconds, "steps": steps, "rows": stages[0]["rows"]}


def text_of_card(adapter: Path, found: dict[str, Any], training: dict[str, Any]) -> str:
    """The model card of an adapter with these scores."""
    mean = ": the mean of two tunings with dropout that begin from\n  one without"
    names = {
        "further": mean if training["stages"][1:] else "",
        "base": BASE,
        "hash": sha256_file(smollm2())[:16],
        "rank": read_json(adapter / "adapter_config.json")["r"],
        "minutes": found["training_seconds"] / 60,
        "commit": str(training["stages"][-1]["code"]["commit"])[:10],
        "cpu": training["host"]["cpu"],
        "scored": str(found["code"]["commit"])[:10],
        "scored_on": found["host"]["cpu"],
    }
    return CARD.read_text(encoding="utf-8").format(**found, **names)


def score(references: Path, answers: Path) -> dict[str, Any]:
    """Precision, recall and F1 (percent) over distinct names and, under "entities", over mentions."""
    records = read_references(references)
    asked, counts = pair(records, read_predictions(answers))
    if counts.missing:
        raise UserError(f"{answers}: lacks record {counts.missing[0]!r}; give the answers to all of {references}")
    empty = [one for one in asked if not one.gold]
    texts = {record["id"]: record["text"] for record in records}
    marked = {(one["id"], question["question"]): spans(question) for one in records for question in one["questions"]}
    mentions = [(marked[one.record, one.name], found_in(texts[one.record], one.predicted)) for one in asked]
    return {
        "records": len({one.record for one in asked}),
        **counted([(distinct(one.gold), distinct(one.predicted)) for one in asked], "names"),
        "empty": len(empty),
        "empty_right": sum(not one.predicted and not one.empty_output for one in empty),
        "mentions": sum(len(gold) for gold, _ in mentions),
        "entities": counted(mentions, "mentions"),
    }


def counted(sets: Iterable[tuple[Collection[Any], Collection[Any]]], of: str) -> dict[str, Any]:
    """Micro-averaged precision, recall and F1 (percent) of predicted sets against gold sets."""
    pairs = [(set(gold), set(given)) for gold, given in sets]
    true, predicted = sum(len(gold) for gold, _ in pairs), sum(len(given) for _, given in pairs)
    right = sum(len(gold & given) for gold, given in pairs)
    shares = {"precision": 100 * right / max(1, predicted), "recall": 100 * right / max(1, true)}
    return {of: true, "predicted": predicted, "right": right, **shares, "f1": 200 * right / max(1, true + predicted)}


def spans(question: dict[str, Any]) -> list[Span]:
    """The offsets of the gold mentions."""
    return [(answer["start"], answer["end"]) for answer in question["answers"] if answer.get("start") is not None]


def found_in(text: str, names: Iterable[str]) -> list[Span]:
    """All occurrences of the names in a text, without overlaps: longer names take precedence."""
    found: list[Span] = []
    for name in sorted(names, key=len, reverse=True):
        free = [one for one in occurrences(name, text) if all(one[1] <= a or b <= one[0] for a, b in found)]
        found += free
    return found


def distinct(names: Iterable[str]) -> set[str]:
    return {" ".join(name.split()) for name in names}


if __name__ == "__main__":
    run(main, Options)
