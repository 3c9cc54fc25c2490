"""Wrong labels: an adapter for each rate of wrong training answers, all scored on the same clean notes.

The corruption is wrong_labels.py's. At `filter_rate` one more adapter is trained without the records whose answers the
adapter of that rate finds least likely (filtering.py), for as many steps: the gain of filtering by loss. The share of
records to drop is the rate, taken as known.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from eval.experiments.steps import LONG, Run, begin, extraction, made_from
from eval.questions import read_references
from eval.robustness.curve import curve, questions, recovery, recovery_lines, text_table
from eval.robustness.filtering import answer_losses, ranking
from eval.robustness.wrong_labels import corrupt, wrong_ids
from model.support.cli import UserError
from model.support.files import read_json, read_jsonl, write_json, write_jsonl
from train.recipe import read_toml

FIELDS = ("id", "text", "phenotypes")


@dataclass(frozen=True)
class Labels:
    """Train an adapter for each rate of wrong labels and score all of them on clean notes."""

    weights: str
    """The base model's folder."""
    recipe: str
    """The tuning recipe (train.instruct)."""
    data: Path
    """JSON lines of annotated training notes."""
    notes: Path
    """JSON lines of annotated test notes; they stay clean."""
    out: Path
    """The run's folder: data/, an adapter for each rate, answers/, result.json."""
    rates: tuple[float, ...] = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9)
    """The shares of training records whose answers are wrong; the records of a rate are among those of a higher one."""
    filter_rate: float = 0.3
    """The rate at which training is repeated without the records of highest loss (0: not at all)."""
    adapter: str = ""
    """An adapter to train further, such as that of continued pre-training (empty: a new one)."""
    epochs: float = 0.0
    """Passes of each training over its notes (0: the recipe's steps)."""
    records: int = 0
    """Only the first training notes (0: all)."""
    limit: int = 0
    """Only the first test notes (0: all)."""
    grounded: bool = False
    """Ask as infer.extract --grounded does."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What the base computes in while it is tuned."""
    overwrite: bool = False
    """Remove the run that is there, and begin again."""

    def __post_init__(self) -> None:
        if wrong := [rate for rate in (*self.rates, self.filter_rate) if not 0 <= rate <= 1]:
            raise UserError(f"a rate of {wrong[0]}; a rate is between 0 and 1")
        if self.filter_rate and not {0.0, self.filter_rate} <= set(self.rates):
            raise UserError(f"--filter-rate {self.filter_rate} and 0 must be among --rates, to be compared with")
        if len({name_of(rate) for rate in self.rates}) < len(self.rates):
            raise UserError(f"--rates {' '.join(map(str, self.rates))}: two of them are the same whole percent")
        if min(self.epochs, self.records, self.limit) < 0:
            raise UserError("--epochs, --records and --limit are 0 or more")


def name_of(rate: float) -> str:
    """What is kept of a rate's adapter and answers is named by its whole percent."""
    return f"rate-{round(100 * rate):02d}"


def training_notes(path: Path) -> list[dict[str, Any]]:
    """The records of a file, their answers as train.instruct learns them. Raises UserError for another form."""
    records = []
    for number, record in read_jsonl(path, FIELDS):
        given, diagnosis = record["phenotypes"], record.get("diagnosis")
        many = list(given.values()) if isinstance(given, dict) else [None]
        answers = [one for part in many for one in (part if isinstance(part, list) else [None])]
        if not all(isinstance(one, dict) and "text" in one for one in (*answers, diagnosis or {"text": ""})):
            raise UserError(
                f"{path}:{number}: the answers are not {{'text': …}}, as training needs them; "
                "train.importers.table makes such records"
            )
        records.append(record)
    return records


def run_labels(options: Labels) -> dict[str, Any]:
    records = training_notes(options.data)[: options.records or None]
    read_references(options.notes)  # they are needed after the tunings only; a mistake in them is reported first
    read_toml(options.recipe)
    if options.filter_rate and not 0 < round(options.filter_rate * len(records)) < len(records):
        raise UserError(f"{options.data}: {len(records)} notes are too few to filter at {options.filter_rate}")
    files = {"data": options.data, "notes": options.notes}
    made_of = made_from(options, files, (options.weights, options.adapter))
    with begin(options.out, made_of, overwrite=options.overwrite) as run:
        return measured(run, options, records)


def measured(run: Run, options: Labels, records: list[dict[str, Any]]) -> dict[str, Any]:
    """The adapters of all rates trained and scored; writes result.json."""
    changed, tunings = {}, {}
    for rate in sorted(options.rates):
        noisy = corrupt(records, rate)
        changed[rate] = sum(new != old for new, old in zip(noisy, records, strict=True))
        tunings[f"{name_of(rate)}: tuning"] = tuning(run, options, name_of(rate), noisy)
    run.run_in_parallel(tunings)
    asked = {rate: answered(run, options, name_of(rate)) for rate in sorted(options.rates)}
    result: dict[str, Any] = {"what": "labels", "corrupted": "training records with wrong answers"}
    series = {"trained on wrong labels": asked}
    if options.filter_rate:
        result["filter"], without = filtered(run, options, corrupt(records, options.filter_rate))
        series["highest losses left out"] = {options.filter_rate: without}
        recovered = recovery(asked[0.0], asked[options.filter_rate], without)
        result["recovery"] = [{"rate": options.filter_rate, **recovered}]
    result |= curve(series)
    result |= {"changed": [changed[rate] for rate in result["rates"]], "of": len(records), "seconds": run.took()}
    write_json(options.out / "result.json", result)
    return result


def tuning(run: Run, options: Labels, name: str, records: list[dict[str, Any]], share: float = 1.0) -> list[str]:
    """The program that tunes on these records, a `share` of all: for as many steps, so for more passes."""
    data = run.out / "data" / f"{name}.jsonl"
    write_jsonl(data, records)
    return [
        "train.instruct",
        options.recipe,
        "--weights",
        options.weights,
        "--data",
        str(data),
        "--out",
        str(run.out / name),
        "--dtype",
        options.dtype,
        *(["--adapter", options.adapter] if options.adapter else []),
        *(["--steps", "0", "--epochs", str(options.epochs / share)] if options.epochs else []),
    ]


def answered(run: Run, options: Labels, name: str) -> list:
    """The test questions as the model answers them that was tuned under this name."""
    answers = run.out / "answers" / f"{name}.jsonl"
    answers.parent.mkdir(exist_ok=True)
    more = ["--limit", str(options.limit)] if options.limit else []
    more += ["--grounded"] if options.grounded else []
    adapter = str(run.out / name / "adapter")
    run.step(f"{name}: answers", extraction(options.weights, [adapter], options.notes, answers, *LONG, *more))
    return questions(options.notes, answers, options.limit)


def filtered(run: Run, options: Labels, noisy: list[dict[str, Any]]) -> tuple[dict[str, Any], list]:
    """How well the loss finds the wrong records, and the questions as answered after training without them."""
    name, path = name_of(options.filter_rate), run.out / "losses.json"
    run.step(
        "losses of the training records",
        lambda: write_json(
            path,
            answer_losses(
                options.weights,
                str(run.out / name / "adapter"),
                run.out / "data" / f"{name}.jsonl",
                run.out / "loss-tokens",
            ),
        ),
    )
    losses = read_json(path)
    wrong = wrong_ids(noisy, options.filter_rate)
    highest = ranking(losses)[: round(options.filter_rate * len(noisy))]
    kept = [record for record in noisy if record["id"] not in set(highest)]
    found = {
        "rate": options.filter_rate,
        "dropped": len(highest),
        "wrong": len(wrong),
        "records": len(noisy),
        "dropped_wrong": len(wrong & set(highest)),
        "auc": auc(losses, wrong),
    }
    name += "-filtered"
    run.step(f"{name}: tuning", tuning(run, options, name, kept, len(kept) / len(noisy)))
    return found, answered(run, options, name)


def auc(losses: dict[str, float], wrong: set[str]) -> float | None:
    """The chance that a wrong record's loss is above a right one's (ties half)."""
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
