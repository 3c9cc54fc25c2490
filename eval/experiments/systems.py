"""Asks systems (baselines, bases, adapters) about the test sets and returns their entries in run.json. Shared by
`make demo` and `make scores`.

A system answers the notes of all test sets in one job. Untuned models get only a few notes of each set, because they
rarely stop before their token limit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eval.baselines import MajorityBaseline, RegexBaseline
from eval.experiments.steps import Run, argv, records_of
from model.support.files import write_jsonl

BASELINES: dict[str, tuple[str, type[MajorityBaseline | RegexBaseline]]] = {
    "majority": ("majority answer", MajorityBaseline),
    "regex": ("regular expressions", RegexBaseline),
}


@dataclass(frozen=True)
class System:
    """A base model or an adapter on it. `file` is the stem of its answers' file, `how` are options of infer.extract."""

    name: str
    file: str
    adapter: Path | str | None = None
    untuned: bool = False
    form: str = "template"
    how: dict[str, Any] = field(default_factory=dict)


def write_tests(run: Run, records: Mapping[str, Sequence[Mapping[str, Any]]], few: int) -> None:
    """Write each test set, all their notes (notes.jsonl), and the first `few` notes of each set (few.jsonl)."""
    for name, notes in records.items():
        write_jsonl(run.out / f"{name}.jsonl", notes)
    write_jsonl(run.out / "notes.jsonl", [note for notes in records.values() for note in notes])
    write_jsonl(run.out / "few.jsonl", [note for notes in records.values() for note in notes[:few]])
    (run.out / "predictions").mkdir(exist_ok=True)


def baseline(run: Run, kind: str, train: Path, tests: Iterable[str]) -> dict[str, Any]:
    """The run.json entry of a baseline fitted on the notes of `train`."""
    name, made = BASELINES[kind]

    def work() -> None:
        fitted, notes = made().fit(records_of(train)), records_of(run.out / "notes.jsonl")
        answers = [as_prediction(fitted.answers(note["text"]), note) for note in notes]
        write_jsonl(run.out / "predictions" / f"{kind}.jsonl", answers)

    run.step(f"baseline: {name}", work)
    predictions = split(run, kind, tests)
    return {"name": name, "kind": kind, "predictions": predictions, "seconds": run.took(f"baseline: {name}")}


def as_prediction(answers: dict[str, Any], note: dict[str, Any]) -> dict[str, Any]:
    """A baseline's answers in the form that infer.extract writes."""
    phenotypes = {
        name: {"answers": [{"text": text, "start": None, "end": None} for text in texts], "not_relevant": not texts}
        for name, texts in answers["phenotypes"].items()
    }
    return {"id": note["id"], "phenotypes": phenotypes, "diagnosis": {"text": answers["diagnosis"], "codes": []}}


def models(
    run: Run, systems: Sequence[System], weights: Path | str, few: int, tests: Iterable[str], **how: Any
) -> list[dict[str, Any]]:
    """Ask the systems and return their run.json entries. `few` is that of write_tests; `how` are options of
    infer.extract for all systems."""
    jobs = {}
    for one in sorted(systems, key=lambda one: one.untuned):  # jobs run in pairs: pair those of similar length
        notes = run.out / ("few.jsonl" if one.untuned else "notes.jsonl")
        out = run.out / "predictions" / f"{one.file}.jsonl"
        files = {"weights": weights, "adapter": one.adapter, "notes": notes, "out": out}
        asked = {"task": "both", "form": one.form, "grounded": not one.untuned} | how | one.how
        jobs[f"extraction: {one.name}"] = argv("infer.extract", **files, **asked)
    run.run_in_parallel(jobs)
    return [
        {
            "name": one.name,
            "kind": "base" if one.untuned else "model",
            "predictions": split(run, one.file, tests),
            "seconds": run.took(f"extraction: {one.name}"),
            "peak_mb": run.peak(f"extraction: {one.name}"),
            "form": one.form,
            "grounded": not one.untuned,
            **({"notes": few} if one.untuned else {}),
        }
        for one in systems
    ]


def split(run: Run, name: str, tests: Iterable[str]) -> dict[str, str]:
    """Split a system's answers into one file per test set. Returns {test set: path relative to the run's folder}."""
    answered = {record["id"]: record for record in records_of(run.out / "predictions" / f"{name}.jsonl")}
    paths = {}
    for test in tests:
        ids = [record["id"] for record in records_of(run.out / f"{test}.jsonl")]
        paths[test] = f"predictions/{name}-{test}.jsonl"
        write_jsonl(run.out / paths[test], [answered[one] for one in ids if one in answered])
    return paths
