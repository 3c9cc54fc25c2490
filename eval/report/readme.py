"""Writes README.md's results from a run's folder: `python -m eval.report.readme runs/scores`, or `make readme`.

The table comes from the scores.json of `make scores`, the parity lines from parity.txt (output of eval.parity on the
run's base), the answers from quick.txt (output of infer.quick). The text between the markers `<!-- NAME -->` and
`<!-- /NAME -->` of README.md is replaced. Commit and processor are those of the run.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from eval.metrics.statistics import format_f1
from infer.tasks import PHENOTYPES
from model.support.cli import UserError, run
from model.support.files import read_json, write_text

SYSTEMS = ("regular expressions", "released adapter")
SETS = {"heldout": "held-out", "unseen": "unseen styles", "written-sealed": "hand-written, sealed half"}
TASKS = {"phenotype": "phenotypes", "diagnosis": "diagnosis"}
PARITY = (
    "stage",
    "  embedding",
    "  layer 0 q ",
    "  logits",
    "  loss",
    "  ours and theirs, cached",
    "parity holds",
)


@dataclass(frozen=True)
class Options:
    """Write README.md's results from a run."""

    run: Positional[Path] = Path("runs/scores")
    """The folder that make scores wrote."""
    readme: Path = Path("README.md")
    """The page to update."""


def results(run_folder: Path) -> str:
    """The table, and a line with its command, commit and processor."""
    scores = read_json(run_folder / "scores.json")
    columns = [(name, task) for name in SETS for task in TASKS]
    titles = [f"{SETS[name]}: {TASKS[task]}" for name, task in columns]
    lines = [f"| exact-match F1 | {' | '.join(titles)} |", "| --- |" + " --- |" * len(columns)]
    for system in SYSTEMS:
        cells = [format_f1(scores["sets"][name]["systems"][system]["groups"].get(task), 0) for name, task in columns]
        lines.append(f"| {system} | {' | '.join(cells)} |")
    notes = ", ".join(str(scores["sets"][name]["notes"]) for name in SETS)
    commit, cpu = str(scores["code"]["commit"])[:7], scores["host"]["cpu"]
    source = (
        f"`make scores` at commit {commit}, {cpu}; {notes} notes; brackets: 95 % confidence interval over patients."
    )
    return "\n".join([*lines, "", source])


def parity(run_folder: Path) -> str:
    """The lines of eval.parity's output that start with one of PARITY."""
    lines = (run_folder / "parity.txt").read_text(encoding="utf-8").splitlines()
    return "\n".join(["```", *(line for line in lines if line.startswith(PARITY)), "```"])


def fill(page: str, name: str, text: str) -> str:
    """`page` with `text` between the markers of `name`. Raises UserError unless each marker occurs once."""
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    if page.count(begin) != 1 or page.count(end) != 1:
        raise UserError(f"README.md: needs {begin} and {end} once each")
    return re.sub(f"{begin}.*?{end}", lambda _: f"{begin}\n{text}\n{end}", page, flags=re.DOTALL)


def quick(run_folder: Path) -> str:
    """The first lines of infer.quick's output."""
    lines = (run_folder / "quick.txt").read_text(encoding="utf-8").strip().splitlines()
    return "\n".join(["```", *lines[: 1 + len(PHENOTYPES) + 1], "```"])


def main(options: Options) -> None:
    for needed in ("scores.json", "parity.txt", "quick.txt"):
        if not (options.run / needed).is_file():
            raise UserError(f"{options.run / needed}: missing; run make scores, then make readme")
    page = options.readme.read_text(encoding="utf-8")
    for name, text in {"results": results, "parity": parity, "quick": quick}.items():
        page = fill(page, name, text(options.run))
    write_text(options.readme, page)


if __name__ == "__main__":
    run(main, Options)
