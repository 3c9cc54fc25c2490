"""All of the paper's tables, starting from a finished demo: `make tables`.

    runs/demo → wrong labels, misspelled notes, canaries, retrieval → runs/tables/report.html and report.json

Tables 1, 2 and 5 are the demo's own figures. Table 3 trains an adapter for each rate of wrong labels, with the demo's
recipe shortened; Tables 4 and 6 use the demo's tuned adapter; the canaries repeat its continued pre-training. Work is
budgeted in notes and passes, never in seconds. An interrupted run continues, even inside a step; a finished one only
rewrites its report.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from eval.experiments.demo import TITLES
from eval.experiments.programs import AMOUNTS, TITLES_OF, Demo, experiment
from eval.experiments.steps import Run, begin, check_folder
from eval.report.build import terminal_table, write
from eval.report.run_file import PARTS
from model.support import cli as command
from model.support.cli import UserError
from model.support.files import read_json, sha256_file, write_json
from model.support.hardware import host
from train.report.card import ROOT, code_version


@dataclass(frozen=True)
class Options:
    """Compute the paper's tables from a finished demo."""

    scale: Literal["full", "nano", "tiny"] = "full"
    """The demo's scale (make demo SCALE=…)."""
    run: Path | None = None
    """The demo's folder (default: runs/demo, runs/demo-nano or runs/demo-tiny)."""
    out: Path | None = None
    """The tables' folder (default: runs/tables, runs/tables-nano or runs/tables-tiny)."""
    overwrite: bool = False
    """Remove existing tables and start again."""


SIZES = {name: amounts["tables"] for name, amounts in AMOUNTS.items()}


def finished_demo(folder: Path, scale: str) -> Demo:
    """The demo in `folder`. Raises UserError if it is missing, unfinished or of another scale."""
    remedy = f"run make demo SCALE={scale} first, to its end"
    if not (folder / "report.html").is_file():
        raise UserError(f"{folder}: no finished demo; {remedy}")
    made_of = read_json(folder / "made-of.json")
    if made_of.get("scale") != scale:
        raise UserError(f"{folder}: a demo of scale {made_of.get('scale')!r}, not {scale!r}; give --scale or --run")
    demo = Demo(folder, scale)
    for needed in (demo.weights, demo.adapter("pretrained"), demo.adapter("tuned"), demo.data("train")):
        if not Path(needed).exists():
            raise UserError(f"{needed}: missing from the demo; {remedy}")
    return demo


def main(options: Options) -> int:
    check_folder()
    end = "" if options.scale == "full" else f"-{options.scale}"
    demo = finished_demo(options.run or Path("runs") / f"demo{end}", options.scale)
    out = options.out or Path("runs") / f"tables{end}"
    sizes = SIZES[options.scale]
    made_of = {"scale": options.scale, "demo": sha256_file(demo.folder / "run.json"), "sizes": sizes}
    with begin(out, made_of, overwrite=options.overwrite) as run:
        for name, title in TITLES_OF.items():
            run.step(title, experiment(demo, out, name, **sizes[name]))
        write_json(out / "run.json", run_json(run, demo))
        print(terminal_table(write(out)))
        print(f"{run.took() / 60:.1f} minutes of work\nreport: {out / 'report.html'}")
    return 0


def run_json(run: Run, demo: Demo) -> dict[str, Any]:
    """run.json: that of the demo, with paths relative to the tables' folder, plus the experiments' results."""
    given = read_json(demo.folder / "run.json")

    def moved(path: str) -> str:
        return os.path.relpath(demo.folder / path, run.out)

    systems = [
        {**one, "predictions": {name: moved(path) for name, path in one["predictions"].items()}}
        for one in given["systems"]
    ]
    parts = {key: f"{folder}/result.json" for key, folder in PARTS.items()}
    return {
        **given,
        "title": f"All tables: {TITLES[demo.scale]}",
        "host": host(),
        "code": code_version(ROOT),
        "steps": {**given["steps"], **run.steps},
        "seconds": given["seconds"] + run.took(),
        "peak_mb": max(given["peak_mb"], run.peak()),
        "systems": systems,
        "references": {name: moved(path) for name, path in given["references"].items()},
        "curves": {name: moved(path) for name, path in given["curves"].items()},
        **parts,
    }


if __name__ == "__main__":
    command.run(main, Options)
