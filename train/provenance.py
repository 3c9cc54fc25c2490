"""Which records made an update: `python -m train.provenance RUN --step N`.

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

from model.command import UserError, run
from model.files import read_json, read_jsonl
from train.dataset import Rows
from train.recipe import Recipe
from train.rows import ANSWER, order
from train.store import TokenStore


@dataclass(frozen=True)
class Options:
    """The records behind one optimizer step of a finished run."""

    run: Positional[str]
    """The run's folder."""
    step: int
    """The step, from 1, as metrics.jsonl counts them."""
    json: bool = False
    """Print JSON instead of a table."""


def records_of(folder: str | Path, step: int) -> list[dict[str, Any]]:
    """{"record", "tokens", "targets"} of a step, in order. Raises UserError for a step that the run did not make, or
    made from what is not there any more."""
    card = read_json(Path(folder) / "run.json")
    if not isinstance(card, dict) or not {"steps", "recipe", "data", "stage", "trained_parameters"} <= card.keys():
        raise UserError(f"{folder}/run.json: not the card of a training run; give the folder that a recipe calls out")
    if not 1 <= step <= card["steps"]:
        raise UserError(f"--step {step}: the run {folder} has steps 1 to {card['steps']}")
    names = {field.name for field in fields(Recipe)}
    held = {key: tuple(value) if isinstance(value, list) else value for key, value in card["recipe"].items()}
    recipe = Recipe(**{key: value for key, value in held.items() if key in names} | {"out": str(folder)})
    store = TokenStore(Path(folder) / "tokens" / "train")
    if store.manifest["identity"] != card["data"]:
        raise UserError(f"{store.path}: made from other data than the run; tokenise the run's own data again")
    rows = Rows(store, recipe, card["stage"])
    tokens: Counter[str] = Counter()
    targets: Counter[str] = Counter()
    for index in order(recipe.seed, step - 1, len(rows), recipe.batch_rows):
        for unit in rows[index].units:
            start = 0
            for name, _, length in unit.stretches:
                tokens[name] += length
                targets[name] += int((unit.kind[start : start + length] == ANSWER).sum())
                start += length
    counted = tokens_of(Path(folder) / "metrics.jsonl", step)
    if counted != sum(tokens.values()):
        raise UserError(f"{folder}: step {step} took {counted} tokens, and {sum(tokens.values())} by run.json: data or "
                        "recipe changed after it (--allow-changed), so its records are not known")  # fmt: skip
    return [{"record": name, "tokens": count, "targets": targets[name]} for name, count in tokens.items()]


def tokens_of(metrics: Path, step: int) -> int:
    """How many tokens a step took, by the run's own count; 0 where it is not there."""
    seen = {line["step"]: line["tokens"] for _, line in read_jsonl(metrics, ("step", "tokens"))}
    return seen.get(step, 0) - (seen.get(step - 1, 0) if step > 1 else 0)


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
