"""Write README.md's results from one run's folder: `python -m eval.report.readme runs/demo`, or `make readme`.

The table comes from the run's report.json, the parity lines from its parity.txt (the output of eval.parity on the
run's base). The text between the markers `<!-- NAME -->` and `<!-- /NAME -->` of README.md is replaced; commit and
processor are the run's own.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from eval.metrics.statistics import format_interval
from model.support.cli import UserError, run
from model.support.files import read_json, write_text

SYSTEMS = ("regular expressions", "base + tuning", "base + continued pre-training + tuning")
COLUMNS = (("heldout", "phenotype"), ("heldout", "diagnosis"), ("unseen", "phenotype"), ("unseen", "diagnosis"))
PARITY = (
    "stage",
    "  embedding",
    "  layer 0 q ",
    "  layer 0 attention",
    "  layer 0 MLP",
    "  final norm",
    "  logits",
    "  loss",
    "  ours and theirs, cached",
    "parity holds",
)


@dataclass(frozen=True)
class Options:
    """Write README.md's results from a run."""

    run: Positional[Path] = Path("runs/demo")
    """A finished demo's folder."""
    readme: Path = Path("README.md")
    """The page to write into."""


def cell(figures: dict[str, Any] | None) -> str:
    if figures is None:
        return "–"
    exact = figures["exact_match"]
    return f"{exact['f1']:.1f} {format_interval(exact['low'], exact['high'], 0)}".rstrip()


def results(run_folder: Path) -> str:
    """The table and the line that says where it comes from."""
    report = read_json(run_folder / "report.json")
    code = read_json(run_folder / "tuned" / "run.json")["code"]
    sets = {name: {system["name"]: system for system in one["systems"]} for name, one in report["sets"].items()}
    lines = [
        "| exact-match F1 | held-out: phenotypes | diagnosis | unseen styles: phenotypes | diagnosis |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name in SYSTEMS:
        cells = [cell(sets[where][name][report["preset"]].get(task)) for where, task in COLUMNS]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    notes = " and ".join(str(report["sets"][where]["notes"]) for where in ("heldout", "unseen"))
    host, commit = report["host"], code.get("commit", "unknown")[:7]
    lines += [
        "",
        f"`make demo`: {report['seconds'] / 60:.0f} minutes on {host['cores']} cores ({host['cpu']}), commit {commit}; "
        f"{notes} notes, `{report['preset']}` scorer. Brackets: 95 % over patients, not over trainings.",
    ]
    return "\n".join(lines)


def parity(run_folder: Path) -> str:
    """The lines of eval.parity's output that say most."""
    lines = (run_folder / "parity.txt").read_text(encoding="utf-8").splitlines()
    return "\n".join(["```", *(line for line in lines if line.startswith(PARITY)), "```"])


def fill(page: str, name: str, text: str) -> str:
    """`page` with `text` between the markers of `name`. Raises UserError where they are missing."""
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    if page.count(begin) != 1 or page.count(end) != 1:
        raise UserError(f"README.md: needs {begin} and {end} once each")
    return re.sub(f"{begin}.*?{end}", lambda _: f"{begin}\n{text}\n{end}", page, flags=re.DOTALL)


def main(options: Options) -> None:
    for needed in ("report.json", "parity.txt", "tuned/run.json"):
        if not (options.run / needed).is_file():
            raise UserError(f"{options.run / needed}: missing; run make demo, then make readme")
    page = options.readme.read_text(encoding="utf-8")
    page = fill(fill(page, "results", results(options.run)), "parity", parity(options.run))
    write_text(options.readme, page)


if __name__ == "__main__":
    run(main, Options)
