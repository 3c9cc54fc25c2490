"""Compares two runs: `python -m eval.compare RUN_A RUN_B` (folders with run.json, see eval.report).

Systems are matched by name, notes by id. Each line gives a system's exact-match F1 in A and in B on the questions that
both were asked, and the difference with its interval over patients and its p-value (both only from 10 patients on; see
eval.metrics.statistics). `--system-a X --system-b Y` compares two systems of one run or of two.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from eval.failures import is_right
from eval.metrics.statistics import format_interval, format_p
from eval.questions import Question, asked_both, paired_f1
from eval.report.run_file import read_run, read_set
from eval.score import groups
from model.support.cli import UserError, nearest, run


@dataclass(frozen=True)
class Options:
    """Compare two runs question by question."""

    a: Annotated[Path, tyro.conf.Positional]
    """The first run's folder."""
    b: Annotated[Path, tyro.conf.Positional]
    """The second run's folder; may be the same."""
    system_a: str = ""
    """A system of the first run (empty: every system that is in both runs)."""
    system_b: str = ""
    """The system of the second run to compare it with (empty: the one of the same name)."""
    changed: int = 5
    """Number of changed answers to show for each comparison."""
    json: bool = False
    """Print one JSON list."""

    def __post_init__(self) -> None:
        if self.changed < 0:
            raise UserError(f"--changed {self.changed}: 0 or more")


def changes(a: list[Question], b: list[Question]) -> list[dict[str, Any]]:
    """For each group of questions that both were asked: both means, the paired test, and the answers that changed.

    Raises UserError if a question has different gold answers in the two runs, which were then scored on different data.
    """
    found = []
    for task, group in groups(a).items():
        both = asked_both(group, b)
        if other := next((one.record for one, two in both if one.gold != two.gold), None):
            raise UserError(f"{other}: the two runs have different right answers; were they made from the same data?")
        if test := paired_f1(group, b):
            changed = [
                {
                    "record": one.record,
                    "question": one.name,
                    "gold": list(one.gold),
                    "a": list(one.predicted),
                    "b": list(two.predicted),
                    "now": "right" if is_right(two) else "wrong",
                }
                for one, two in both
                if is_right(one) != is_right(two)
            ]
            found.append({"task": task, **test, "changed": changed})
    return found


def system_pairs(options: Options) -> list[tuple[str, str]]:
    """The pairs of systems to compare. Raises UserError if a run lacks a system, or the runs have none in common."""
    names = [[system["name"] for system in read_run(run)["systems"]] for run in (options.a, options.b)]
    if options.system_b and not options.system_a:
        raise UserError("--system-b needs --system-a")
    if not options.system_a:
        if both := [(name, name) for name in names[0] if name in names[1]]:
            return both
        raise UserError(
            f"no system is in both runs ({', '.join(names[0])}; {', '.join(names[1])}); "
            "name two with --system-a and --system-b"
        )
    pair = options.system_a, options.system_b or options.system_a
    for folder, name, known in zip((options.a, options.b), pair, names, strict=True):
        if name not in known:
            raise UserError(f"{folder}: no system {name!r}{nearest(name, known)}; the run has {', '.join(known)}")
    return [pair]


def compare(options: Options) -> list[dict[str, Any]]:
    """A row for each test set, pair of systems and group of questions."""
    pairs, runs, rows = system_pairs(options), (read_run(options.a), read_run(options.b)), []
    for test_set in (name for name in runs[0]["references"] if name in runs[1]["references"]):
        (_, a), (_, b) = read_set(options.a, runs[0], test_set), read_set(options.b, runs[1], test_set)
        for first, second in pairs:
            if first in a and second in b:
                named = {"set": test_set, "system_a": first, "system_b": second}
                rows += [named | row for row in changes(a[first].questions, b[second].questions)]
    return rows


def main(options: Options) -> None:
    rows = compare(options)
    if options.json:
        print(json.dumps(rows, indent=2))
        return
    for row in rows:
        name = row["system_a"] if row["system_a"] == row["system_b"] else f"{row['system_a']} -> {row['system_b']}"
        print(
            f"{row['set']}, {row['task']}, {name}: {row['mean_a']:.1f} -> {row['mean_b']:.1f} "
            f"({row['difference']:+.1f} {format_interval(row['low'], row['high'])}, {format_p(row['p'])}, "
            f"n = {row['n']}; {row['better']} better, {row['worse']} worse)"
        )
        for one in row["changed"][: options.changed]:
            before, after = ("; ".join(one[side]) or "not relevant" for side in ("a", "b"))
            print(f"    {one['record']} {one['question']}: {before} -> {after} (now {one['now']})")


if __name__ == "__main__":
    run(main, Options)
