"""Lists the records behind one optimizer step: `python -m train.report.provenance RUN --step N`.

A step's rows are a function of (seed, step) and the token store, so nothing is logged during training. Their number of
tokens must equal the one in metrics.jsonl; it differs if the data or the recipe changed since.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from model.support.cli import UserError, run
from model.support.files import read_json, read_jsonl
from train.data.dataset import Rows
from train.data.rows import ANSWER, order
from train.data.store import TokenStore
from train.distributed.checkpoint import newest_intact
from train.recipe import Recipe, checked


@dataclass(frozen=True)
class Options:
    """List the records behind one optimizer step of a run."""

    run: Positional[str]
    """The run's folder."""
    step: int
    """The step, counted from 1 as in metrics.jsonl."""
    json: bool = False
    """Print JSON instead of a table."""


def records_of(folder: str | Path, step: int) -> list[dict[str, Any]]:
    """[{"record", "tokens", "targets"}, …] of a step, in order. Raises UserError if the run has no such step, or if the
    recipe or data that made it changed."""
    folder = Path(folder)
    recipe, stage, data = read_run(folder)
    seen = {line["step"]: line["tokens"] for _, line in read_jsonl(folder / "metrics.jsonl", ("step", "tokens"))}
    if step not in seen:
        raise UserError(f"--step {step}: the run {folder} has steps 1 to {max(seen)}")
    store = TokenStore(folder / "tokens" / "train")
    if store.manifest["identity"] != data:
        raise UserError(f"{store.path}: made from other data than the run; tokenise the run's own data again")
    rows = Rows(store, recipe, stage)
    tokens: Counter[str] = Counter()
    targets: Counter[str] = Counter()
    for index in order(recipe.seed, step - 1, len(rows), recipe.batch_rows):
        for document in rows[index].documents:
            start = 0
            for name, _, length in document.branches:
                tokens[name] += length
                targets[name] += int((document.kind[start : start + length] == ANSWER).sum())
                start += length
    counted = seen[step] - seen.get(step - 1, 0)  # metrics.jsonl holds running totals
    if counted != sum(tokens.values()):
        raise UserError(
            f"{folder}: step {step} took {counted} tokens, and {sum(tokens.values())} by the run's recipe: "
            "data or recipe changed after it (--allow-changed), so its records are not known"
        )
    return [{"record": name, "tokens": count, "targets": targets[name]} for name, count in tokens.items()]


def read_run(folder: Path) -> tuple[Recipe, str, dict[str, Any]]:
    """(recipe, stage, identity of the data) from run.json, or of an unfinished run from its newest intact checkpoint.

    Raises UserError if there is neither, or if it is malformed.
    """
    file = folder / "run.json"
    if file.is_file():
        card = read_json(file)
    elif checkpoint := newest_intact(folder / "checkpoints"):
        file = checkpoint / "state.json"
        card = read_json(file)["identity"]
    else:
        raise UserError(
            f"{folder}: holds neither run.json nor an intact checkpoint; give the folder that a recipe calls "
            "out, once a checkpoint is in it"
        )
    if not (
        isinstance(card, dict)
        and isinstance(card.get("recipe"), dict)
        and isinstance(card.get("data"), dict)
        and card.get("stage") in ("pretrain", "instruct")
    ):
        raise UserError(f"{file}: not the card of a training run; give the folder that a recipe calls out")
    known = {option.name for option in fields(Recipe)}
    options = {key: checked(key, value, str(file)) for key, value in card["recipe"].items() if key in known}
    return Recipe(**options | {"out": str(folder)}), card["stage"], card["data"]


def main(options: Options) -> int:
    records = records_of(options.run, options.step)
    if options.json:
        print(json.dumps(records, indent=2))
        return 0
    for record in records:
        print(f"{record['record']:30} {record['tokens']:7} tokens {record['targets']:6} targets")
    return 0


if __name__ == "__main__":
    run(main, Options)
