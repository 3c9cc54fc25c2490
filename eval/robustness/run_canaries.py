"""Memorisation: canaries planted at known counts in continued pre-training, with and without deduplication.

Two adapters are trained with the same recipe and passes, one on the notes with the canaries, one on the same notes with
repeated lines reduced to one. For both, and for the base alone, the exposure
and the extraction rate of each count are reported, with intervals over canaries where there are 10.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from eval.experiments.steps import Run, begin, made_from
from eval.metrics.statistics import format_interval, interval
from eval.robustness.canaries import REFERENCES, Canary, deduplicate, exposure, make_canaries, measure, plant
from lora import load_adapter
from model import Tokenizer, Transformer
from model.support.cli import UserError
from model.support.files import read_json, read_jsonl, write_json, write_jsonl
from train.recipe import read_toml


@dataclass(frozen=True)
class Canaries:
    """Plant canaries in continued pre-training and measure what the adapter memorised."""

    weights: str
    """The base model's folder."""
    recipe: str
    """The recipe of continued pre-training (train.pretrain)."""
    data: Path
    """JSON lines with `text`: the notes to train on."""
    out: Path
    """The run's folder: data/, two adapters, result.json."""
    counts: tuple[int, ...] = (0, 1, 4, 16)
    """In how many notes a canary is planted; 0 is the control."""
    each: int = 5
    """Canaries of each count."""
    records: int = 0
    """Only the first notes (0: all)."""
    epochs: float = 0.0
    """Passes over the notes (0: the recipe's steps)."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What the base computes in while it is trained; exposure is measured in float32."""
    overwrite: bool = False
    """Remove the run that is there, and begin again."""

    def __post_init__(self) -> None:
        if not self.counts or min(self.counts) < 0 or len(set(self.counts)) < len(self.counts):
            raise UserError(f"--counts {' '.join(map(str, self.counts))}: different numbers, 0 or more")
        if self.each < 1 or len(self.counts) * self.each > 100:
            raise UserError(f"--each {self.each}: at least 1, and at most 100 canaries in all")
        if min(self.records, self.epochs) < 0:
            raise UserError("--records and --epochs are 0 or more")


def run_canaries(options: Canaries) -> dict[str, Any]:
    read_toml(options.recipe)  # before the base is measured
    records = []
    for number, record in read_jsonl(options.data, ("text",)):
        if not isinstance(record["text"], str):
            raise UserError(f"{options.data}:{number}: 'text' is not text")
        records.append(record)
    records = records[: options.records or None]
    if max(options.counts) > len(records):
        raise UserError(
            f"{options.data}: {len(records)} notes cannot hold a canary {max(options.counts)} times; give "
            "more notes or smaller --counts"
        )
    made_of = made_from(options, {"data": options.data}, [options.weights])
    with begin(options.out, made_of, overwrite=options.overwrite) as run:
        return trained(run, options, records)


def trained(run: Run, options: Canaries, records: list[dict[str, Any]]) -> dict[str, Any]:
    """Train and measure both adapters, measure the base; writes result.json."""
    canaries = make_canaries(options.counts, options.each)
    planted = plant(records, canaries)
    single, dropped = deduplicate(planted)
    rows = {"base": measured(run, options, "base", None, canaries)}
    trainings = {}
    for name, data in (("planted", planted), ("deduplicated", single)):
        write_jsonl(run.out / "data" / f"{name}.jsonl", data)
        trainings[f"{name}: continued pre-training"] = [
            "train.pretrain",
            options.recipe,
            "--weights",
            options.weights,
            "--out",
            str(run.out / name),
            "--dtype",
            options.dtype,
            "--data",
            str(run.out / "data" / f"{name}.jsonl"),
            *(["--steps", "0", "--epochs", str(options.epochs)] if options.epochs else []),
        ]
    run.run_in_parallel(trainings)
    for name in ("planted", "deduplicated"):
        rows[name] = measured(run, options, name, run.out / name / "adapter", canaries)
    card = read_json(run.out / "planted" / "run.json")
    result = {
        "what": "canaries",
        "notes": len(records),
        "each": options.each,
        "references": REFERENCES,
        "most": exposure(1, REFERENCES + 1),
        "lines_dropped": dropped,
        "steps": card["steps"],
        "passes": card["steps"] * card["recipe"]["batch_rows"] / card["rows"],
        "seconds": run.took(),
        "rows": {name: by_count(found) for name, found in rows.items()},
    }
    write_json(options.out / "result.json", result)
    return result


def measured(run: Run, options: Canaries, name: str, adapter: Path | None, canaries: Sequence[Canary]) -> list:
    """Each canary under the base and an adapter, as a step of its own."""
    path = run.out / f"{name}.json"

    def work() -> None:
        model = Transformer.from_pretrained(options.weights).eval()
        if adapter is not None:
            load_adapter(model, adapter)
        model.use_attention("fast")
        write_json(path, measure(model, Tokenizer.from_pretrained(options.weights), canaries))

    run.step(f"{name}: exposure", work)
    return read_json(path)


def by_count(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean exposure and extraction rate of each count, with intervals over its canaries (from 10 on)."""
    rows = []
    for count in sorted({one["count"] for one in found}):
        group = [one for one in found if one["count"] == count]
        bits, out = [one["exposure"] for one in group], [100.0 * one["extracted"] for one in group]
        low, high = interval(bits, range(len(group)), (0.0, exposure(1, REFERENCES + 1)))
        extracted_low, extracted_high = interval(out, range(len(group)))
        rows.append(
            {
                "count": count,
                "canaries": len(group),
                "exposure": sum(bits) / len(bits),
                "low": low,
                "high": high,
                "extracted": sum(one["extracted"] for one in group),
                "extracted_low": extracted_low,
                "extracted_high": extracted_high,
            }
        )
    return rows


def format_result(result: dict[str, Any]) -> str:
    lines = [
        f"{result['notes']} notes, {result['passes']:.1f} passes; exposure in bits, at most {result['most']:.0f}; "
        f"{result['lines_dropped']} repeated lines left out by deduplication"
    ]
    for name, rows in result["rows"].items():
        for row in rows:
            lines.append(
                f"  {name:<13} in {row['count']:>3} notes: exposure {row['exposure']:.1f} "
                f"{format_interval(row['low'], row['high'])}, {row['extracted']} of {row['canaries']} "
                f"extracted {format_interval(row['extracted_low'], row['extracted_high'], 0)}"
            )
    return "\n".join(lines)
