"""Which records made an update: `python -m train.report.provenance RUN --step N`.

A step's rows are a function of (seed, step) and of the token store, so nothing has to be logged to know them again.
They must hold as many tokens as the run counted: where data or recipe changed since, they would be other rows.
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
from train.distributed.checkpoint import newest_whole
from train.recipe import Recipe, checked


@dataclass(frozen=True)
class Options:
    """The records behind one optimizer step of a run."""

    run: Positional[str]
    """The run's folder."""
    step: int
    """The step, from 1, as metrics.jsonl counts them."""
    json: bool = False
    """Print JSON instead of a table."""


def records_of(folder: str | Path, step: int) -> list[dict[str, Any]]:
    """{"record", "tokens", "targets"} of a step, in order. Raises UserError for a step that the run did not make, or
    made from what is not there any more."""
    folder = Path(folder)
    recipe, stage, data = recorded(folder)
    taken = {line["step"]: line["tokens"] for _, line in read_jsonl(folder / "metrics.jsonl", ("step", "tokens"))}
    if step not in taken:
        raise UserError(f"--step {step}: the run {folder} has steps 1 to {max(taken)}")
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
    counted = taken[step] - taken.get(step - 1, 0)
    if counted != sum(tokens.values()):
        raise UserError(
            f"{folder}: step {step} took {counted} tokens, and {sum(tokens.values())} by the run's recipe: "
            "data or recipe changed after it (--allow-changed), so its records are not known"
        )
    return [{"record": name, "tokens": count, "targets": targets[name]} for name, count in tokens.items()]


def recorded(folder: Path) -> tuple[Recipe, str, dict[str, Any]]:
    """(recipe, stage, the data's identity) from run.json, which a run writes at its end; before that from the newest
    whole checkpoint. Raises UserError where there is neither, or not of this form."""
    where = folder / "run.json"
    if where.is_file():
        card = read_json(where)
    elif found := newest_whole(folder / "checkpoints"):
        where = found / "state.json"
        card = read_json(where)["identity"]
    else:
        raise UserError(
            f"{folder}: holds neither run.json nor a whole checkpoint; give the folder that a recipe calls "
            "out, once a checkpoint is in it"
        )
    if not (
        isinstance(card, dict)
        and isinstance(card.get("recipe"), dict)
        and isinstance(card.get("data"), dict)
        and card.get("stage") in ("pretrain", "instruct")
    ):
        raise UserError(f"{where}: not the card of a training run; give the folder that a recipe calls out")
    known = {each.name for each in fields(Recipe)}
    options = {key: checked(key, value, str(where)) for key, value in card["recipe"].items() if key in known}
    return Recipe(**options | {"out": str(folder)}), card["stage"], card["data"]


def main(options: Options) -> int:
    found = records_of(options.run, options.step)
    if options.json:
        print(json.dumps(found, indent=2))
        return 0
    for row in found:
        print(f"{row['record']:30} {row['tokens']:7} tokens {row['targets']:6} targets")
    return 0


if __name__ == "__main__":
    run(main, Options)
