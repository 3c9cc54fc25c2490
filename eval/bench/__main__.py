"""The benchmarks: `python -m eval.bench NAME`, each a ratio against a peer measured in the same run.

Every benchmark is a module of this package with a function `rows(...)`, whose keyword arguments are its options and
which returns rows (row.py). `gpu` is a program of its own, because it must run in a bare CUDA image.
"""

from __future__ import annotations

import sys
from functools import wraps
from importlib import import_module
from pathlib import Path
from typing import Any

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


def main(argv: list[str]) -> int:
    if argv and argv[0] == "gpu":
        from eval.bench import gpu

        return gpu.main(argv[1:])
    from model.support.cli import UserError, nearest, parse
    from model.support.files import write_json
    from model.support.hardware import host
    from model.support.lock import output

    if not argv or argv[0] in ("-h", "--help"):
        print(
            f"usage: python -m eval.bench NAME [--json FILE [--overwrite]] [options; NAME --help]\n"
            f"NAME: {', '.join(NAMES)}"
        )
        return 0
    name, options = argv[0], argv[1:]
    if name not in NAMES:
        raise UserError(f"no benchmark {name!r}{nearest(name, NAMES)}; there are {', '.join(NAMES)}")
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
    # tyro calls what it parses for: only the options are taken from it, so that a benchmark runs outside the parser
    given = parse(wraps(measure)(lambda **given: given), options, f"python -m eval.bench {name} [--json FILE]")
    with output(out, overwrite):
        rows = [row.as_dict() for row in measure(**given)]
        print(table(rows))
        if out is not None:
            write_json(out, {"host": host(), "rows": rows})
    return 0


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    keys = ("name", "ours", "peer", "unit", "peer_name", "ratio", "limit", "share_of_limit", "setting")
    cells = [[key.replace("_", " ") for key in keys]] + [[shown(row[key]) for key in keys] for row in rows]
    width = [max(len(line[i]) for line in cells) for i in range(len(keys))]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(line, width, strict=True)) + " |" for line in cells]
    lines.insert(1, "| " + " | ".join("-" * w for w in width) + " |")
    return "\n".join(lines)


def shown(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    arguments = sys.argv[1:]
    if arguments and arguments[0] == "gpu":
        raise SystemExit(main(arguments))
    from model.support.cli import guard

    raise SystemExit(guard(lambda: main(arguments), "eval.bench"))
