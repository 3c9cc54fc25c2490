"""The benchmarks: `python -m eval.bench NAME`. Each gives ratios against a peer measured in the same run.

A benchmark is a module of this package with a function `rows(...)`, whose keyword arguments are its options and which
returns rows (row.py). `gpu` parses its options itself, because it also runs in a bare CUDA image without tyro.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from importlib import import_module
from pathlib import Path
from typing import Any

from eval.bench.row import table
from model.support.cli import UserError, guard, nearest, parse
from model.support.files import write_json
from model.support.hardware import host
from model.support.lock import output

NAMES = (
    "decode",
    "extract",
    "gpu",
    "job",
    "placing",
    "plan",
    "prefill",
    "rotation",
    "seven-b",
    "train",
)


def options_of(measure: Callable[..., Any], argv: list[str], program: str) -> dict[str, Any]:
    """The keyword arguments of `measure`, parsed from its options.

    tyro calls the function that it parses for. Here that is a stand-in with the same signature that returns its
    arguments, so that the benchmark itself runs outside the parser.
    """
    return parse(wraps(measure)(lambda **given: given), argv, program)


def main(argv: list[str]) -> int:
    if argv and argv[0] == "gpu":
        from eval.bench import gpu

        return gpu.main(argv[1:])
    if not argv or argv[0] in ("-h", "--help"):
        print(
            f"usage: python -m eval.bench NAME [--json FILE [--overwrite]] [options; NAME --help]\n"
            f"NAME: {', '.join(NAMES)}"
        )
        return 0
    name, options = argv[0], argv[1:]
    if name not in NAMES:
        raise UserError(f"no benchmark {name!r}{nearest(name, NAMES)}; the benchmarks are {', '.join(NAMES)}")
    out = None
    if "--json" in options:
        at = options.index("--json")
        if at + 1 == len(options):
            raise UserError("--json needs a file's name")
        out = Path(options[at + 1])
        del options[at : at + 2]
    overwrite = "--overwrite" in options
    options = [option for option in options if option != "--overwrite"]
    measure = import_module(f"eval.bench.{name.replace('-', '_')}").rows
    given = options_of(measure, options, f"python -m eval.bench {name} [--json FILE]")
    with output(out, overwrite):
        rows = [row.as_dict() for row in measure(**given)]
        print(table(rows))
        if out is not None:
            write_json(out, result(rows))
    return 0


def result(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The content of --json: the machine, the code's commit, and the rows."""
    from train.report.card import ROOT, code_version  # imports tyro

    return {"host": host(), "code": code_version(ROOT), "rows": rows}


if __name__ == "__main__":
    raise SystemExit(guard(lambda: main(sys.argv[1:]), "eval.bench"))
