"""Wrong labels: trains an adapter for each rate of wrong training answers and scores all on the same clean notes.

A wrong answer is another record's answer of the same type (BioRAB's counterfactual test). Within a type the wrong
values come from a derangement: the distinct values are shuffled once and each is replaced by the next in that cycle, so
every value changes and none is invented. Records are ordered by a hash of their id and the first ones are wrong, so the
records wrong at 10 % are among those wrong at 20 %. The notes' texts are unchanged.

At `filter_rate` one more adapter is trained, for as many steps, without the records to whose answers the adapter of
that rate gives the highest loss, since wrong answers are learned later than right ones. The share of records to drop is
assumed to be known: it is the rate.
"""

from __future__ import annotations

import copy
import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm import tqdm

from eval.experiments.steps import LONG, Run, argv, experiment, extraction
from eval.questions import Question, read_references
from eval.robustness.curve import (
    check_rates,
    curve,
    name_of,
    questions,
    recovery,
    recovery_lines,
    text_table,
)
from lora import load_adapter
from model import Transformer
from model.support.cli import UserError
from model.support.files import read_json, read_jsonl, write_json, write_jsonl
from train.data import records as training
from train.data.dataset import Rows
from train.data.rows import collate, count
from train.data.store import Encoding, build_store
from train.loss import batch_loss
from train.recipe import Recipe, read_toml

Record = dict[str, Any]


@dataclass(frozen=True)
class Labels:
    """Train an adapter for each rate of wrong labels and score all on clean notes."""

    weights: str
    """The base model's folder."""
    recipe: str
    """The tuning recipe (train.instruct)."""
    data: Path
    """Annotated training notes, JSON lines."""
    notes: Path
    """Annotated test notes, JSON lines; never corrupted."""
    out: Path
    """The run's folder: data/, an adapter for each rate, answers/, result.json."""
    rates: tuple[float, ...] = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9)
    """Shares of training records with wrong answers; the records of a rate are a subset of those of a higher one."""
    filter_rate: float = 0.3
    """The rate at which training is repeated without the records of highest loss (0: never)."""
    adapter: str = ""
    """An adapter to train further, such as that of continued pre-training (empty: a new one)."""
    epochs: float = 0.0
    """Passes of each training over its notes (0: the recipe's steps)."""
    records: int = 0
    """Only the first training notes (0: all)."""
    limit: int = 0
    """Only the first test notes (0: all)."""
    grounded: bool = False
    """Use constrained decoding (infer.extract --grounded)."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the base during tuning."""
    overwrite: bool = False
    """Remove an existing run and start again."""

    def __post_init__(self) -> None:
        check_rates(self.rates)
        if self.filter_rate and self.filter_rate not in self.rates:
            raise UserError(f"--filter-rate {self.filter_rate}: must be among --rates, to be compared with")
        if min(self.epochs, self.records, self.limit) < 0:
            raise UserError("--epochs, --records and --limit are 0 or more")


# ---- the corruption -------------------------------------------------------------------------------------------


def wrong_ids(records: Sequence[Mapping[str, Any]], rate: float, seed: int = 0) -> set[str]:
    """The ids of the records that are wrong at a rate (rounded to a whole number of records)."""
    ranked = sorted(records, key=lambda one: hashlib.sha256(f"labels:{seed}:{one['id']}".encode()).digest())
    return {record["id"] for record in ranked[: round(rate * len(ranked))]}


def derangement(values: Sequence[str], seed: int = 0) -> dict[str, str]:
    """{value: another value} over the distinct values; {} if there are fewer than two."""
    cycle = sorted(set(values))
    if len(cycle) < 2:
        return {}
    random.Random(seed).shuffle(cycle)
    return dict(zip(cycle, cycle[1:] + cycle[:1], strict=True))


def corrupt(records: Sequence[Mapping[str, Any]], rate: float, seed: int = 0) -> list[Record]:
    """Copies of the records; in a share `rate` of them every answer, also the diagnosis, is a wrong one of its type.

    A wrong phenotype has no span, because it need not occur in the note. "Not relevant" is kept. Raises ValueError if
    the rate is outside 0 … 1.
    """
    if not 0 <= rate <= 1:
        raise ValueError(f"a rate of {rate} is not between 0 and 1")
    seen: dict[str, list[str]] = {"diagnosis": []}
    for record in records:
        for name, spans in (record.get("phenotypes") or {}).items():
            seen.setdefault(name, []).extend(span["text"] for span in spans)
        if record.get("diagnosis"):
            seen["diagnosis"].append(json.dumps(record["diagnosis"], sort_keys=True))
    wrong = {name: derangement(values, seed) for name, values in seen.items()}
    chosen, changed = wrong_ids(records, rate, seed), []
    for record in records:
        new = copy.deepcopy(dict(record))
        changed.append(new)
        if record["id"] not in chosen:
            continue
        for name, spans in (new.get("phenotypes") or {}).items():
            for span in spans:
                if span["text"] in wrong[name]:
                    span |= {"text": wrong[name][span["text"]], "start": None, "end": None}
        if new.get("diagnosis") and wrong["diagnosis"]:
            new["diagnosis"] = json.loads(wrong["diagnosis"][json.dumps(new["diagnosis"], sort_keys=True)])
    return changed


# ---- the experiment -------------------------------------------------------------------------------------------


def training_notes(path: Path) -> list[Record]:
    """The records of a file. Raises UserError if train.instruct could not use one."""
    lines = read_jsonl(path, ("id", "text", "phenotypes"), lambda record: training.questions(record, "both"))
    return [record for _, record in lines]


def run_labels(options: Labels) -> dict[str, Any]:
    """Run the unfinished steps, write result.json and return it."""
    records = training_notes(options.data)[: options.records or None]
    read_references(options.notes)  # report a mistake in them now: they are needed only after the tunings
    read_toml(options.recipe)
    if options.filter_rate and not 0 < round(options.filter_rate * len(records)) < len(records):
        raise UserError(f"{options.data}: {len(records)} notes are too few to filter at {options.filter_rate}")
    files = {"data": options.data, "notes": options.notes}
    models = (options.weights, options.adapter)
    return experiment(options, files, models, lambda run: measured(run, options, records))


def measured(run: Run, options: Labels, records: list[Record]) -> dict[str, Any]:
    """Train and score the adapters of all rates."""
    noisy = {rate: corrupt(records, rate) for rate in sorted(options.rates)}
    run.run_in_parallel(
        {f"{name_of(rate)}: tuning": tuning(run, options, name_of(rate), noisy[rate]) for rate in noisy}
    )
    asked = {rate: answered(run, options, name_of(rate)) for rate in noisy}
    series = {"trained on wrong labels": asked}
    result: dict[str, Any] = {"corrupted": "training records with wrong answers", "of": len(records)}
    result["changed"] = [sum(new != old for new, old in zip(noisy[rate], records, strict=True)) for rate in noisy]
    if rate := options.filter_rate:
        result["filter"], without = filtered(run, options, noisy[rate])
        series["highest losses left out"] = {rate: without}
        result["recovery"] = [{"rate": rate, **recovery(asked[0.0], asked[rate], without)}]
    return result | curve(series)


def tuning(run: Run, options: Labels, name: str, records: list[Record], share: float = 1.0) -> list[str]:
    """The command that tunes on these records. They are a `share` of all, so for the same number of steps the passes
    are divided by it."""
    data = run.out / "data" / f"{name}.jsonl"
    write_jsonl(data, records)
    passes = {"steps": 0, "epochs": options.epochs / share} if options.epochs else {}
    return argv(
        "train.instruct",
        options.recipe,
        weights=options.weights,
        adapter=options.adapter or None,
        data=data,
        out=run.out / name,
        dtype=options.dtype,
        **passes,
    )


def answered(run: Run, options: Labels, name: str) -> list[Question]:
    """The test questions with the answers of the adapter of this name."""
    out = run.out / "answers" / f"{name}.jsonl"
    out.parent.mkdir(exist_ok=True)
    how = LONG | {"limit": options.limit or None, "grounded": options.grounded}
    adapter = run.out / name / "adapter"
    run.step(f"{name}: answers", extraction(options.weights, adapter, options.notes, out, **how))
    return questions(options.notes, out, options.limit)


def filtered(run: Run, options: Labels, noisy: list[Record]) -> tuple[dict[str, Any], list[Question]]:
    """How well the loss identifies the wrong records, and the test questions after training without the records of
    highest loss."""
    name, path = name_of(options.filter_rate), run.out / "losses.json"
    data, adapter = run.out / "data" / f"{name}.jsonl", run.out / name / "adapter"
    run.step(
        "losses of the training records",
        lambda: write_json(path, answer_losses(options.weights, adapter, data, run.out / "loss-tokens")),
    )
    losses, wrong = read_json(path), wrong_ids(noisy, options.filter_rate)
    highest = set(ranking(losses)[: round(options.filter_rate * len(noisy))])
    kept = [record for record in noisy if record["id"] not in highest]
    found = {
        "rate": options.filter_rate,
        "dropped": len(highest),
        "wrong": len(wrong),
        "records": len(noisy),
        "dropped_wrong": len(wrong & highest),
        "auc": auc(losses, wrong),
    }
    name += "-filtered"
    run.step(f"{name}: tuning", tuning(run, options, name, kept, len(kept) / len(noisy)))
    return found, answered(run, options, name)


@torch.no_grad()
def answer_losses(weights: str, adapter: Path, data: Path, scratch: Path) -> dict[str, float]:
    """{record id: mean −log p of its answers' tokens} of annotated notes; `scratch` keeps their tokens."""
    store = build_store([str(data)], Encoding("instruct", weights), scratch)
    model = Transformer.from_pretrained(weights).eval()
    load_adapter(model, adapter)
    model.use_attention("fast")
    block = model.config.max_position_embeddings
    rows = Rows(
        store, Recipe(weights=weights, data=(str(data),), out=str(scratch), block=block, packing="none"), "instruct"
    )
    found = {}
    for number in tqdm(range(len(rows)), desc="losses", unit="record", disable=None):
        row = rows[number]
        found[row.documents[0].record] = float(batch_loss(model, collate([row]), count([row]))[0])
    return found


def ranking(losses: dict[str, float]) -> list[str]:
    """Record ids by falling loss; ties by id."""
    return sorted(losses, key=lambda name: (-losses[name], name))


def auc(losses: dict[str, float], wrong: set[str]) -> float | None:
    """Probability that a wrong record's loss exceeds a right one's (ties count half); None without either."""
    bad = [loss for name, loss in losses.items() if name in wrong]
    good = [loss for name, loss in losses.items() if name not in wrong]
    if not bad or not good:
        return None
    return sum((b > g) + 0.5 * (b == g) for b in bad for g in good) / len(bad) / len(good)


def format_result(result: dict[str, Any]) -> str:
    lines = [text_table(result)]
    if found := result.get("filter"):
        lines.append(
            f"filtering at {100 * found['rate']:.0f} %: {found['dropped_wrong']} of {found['dropped']} dropped records "
            f"were wrong ({found['wrong']} of {found['records']} are; AUC of the loss {found['auc']:.2f})"
        )
    return "\n".join([*lines, *recovery_lines(result.get("recovery", []))])
