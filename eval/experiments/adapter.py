"""The released adapter: continued pre-training, then one pass of tuning over thousands of notes (`make adapter`).

    clinic → base → continued pre-training → tuning of the same adapter → OUT/released, in bfloat16

The same two programs as the demo's, with longer recipes (train/recipes/released-*.toml). An interrupted run continues;
each stage leaves an adapter. `make scores` (eval.experiments.scores) then asks it and writes its card.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from eval.experiments.steps import (
    RECIPES,
    Run,
    argv,
    begin,
    check_folder,
    extraction,
    public_base,
    records_of,
    training,
    training_dtype,
)
from model.support import cli
from model.support.files import atomic_file, read_json, write_json, write_jsonl
from model.support.hardware import host

BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
CALIBRATED = 40  # held-out notes, and as many in unseen styles
PATHS = ("data", "out", "weights", "adapter", "valid_data", "tokenizer", "init")
CLINIC = {"patients": 500, "seed": 22, "further_patients": 400, "clinical": 2000, "healthy": 0}


@dataclass(frozen=True)
class Options:
    """Train the adapter that is released."""

    out: Path = Path("runs/adapter")
    """The run's folder."""
    overwrite: bool = False
    """Remove the run that is there, and begin again."""


def main(options: Options) -> int:
    check_folder()
    with begin(options.out, {"scale": "released", **CLINIC}, "released/training.json", options.overwrite) as run:
        stages(run)
    print(
        f"{options.out / 'released'}: python -m eval.experiments.scores --adapter {options.out / 'released'} scores it"
    )
    return 0


def clinic(out: Path) -> list[str]:
    """The command that writes the notes that the adapter is trained on."""
    return argv("train.clinic", out=out, **CLINIC, overwrite=True)


def stages(run: Run) -> None:
    data, dtype = run.out / "data", training_dtype(run.out)
    run.step("clinic: notes and their truth", clinic(data))
    base = public_base(run)

    def stage(program: str, name: str, train: str, valid: str, adapter: Path | None = None) -> list[str]:
        files = {"data": data / train, "valid_data": data / valid, "out": run.out / name}
        recipe = RECIPES / f"released-{program}.toml"
        return training(f"train.{program}", recipe, weights=base, dtype=dtype, **files, adapter=adapter)

    pretrained = run.out / "pretrained" / "adapter"
    run.step("continued pre-training", stage("pretrain", "pretrained", "pretrain.jsonl", "pretrain_valid.jsonl"))
    run.step("tuning", stage("instruct", "tuned", "train.jsonl", "valid.jsonl", pretrained))
    release(run.out / "tuned" / "adapter", run.out / "released")
    calibrate(run, base)
    cards = {stage: card(read_json(run.out / stage / "run.json")) for stage in ("pretrained", "tuned")}
    made = {"host": host(), "clinic": CLINIC, "steps": run.steps, **cards}
    write_json(run.out / "released" / "training.json", made)


def calibrate(run: Run, base: Path) -> None:
    """Fit the probabilities to patients and styles that training did not see, and that make scores does not ask."""
    records = [
        record
        for name in ("heldout", "unseen")
        for record in records_of(run.out / "data" / f"{name}.jsonl")[:CALIBRATED]
    ]
    notes, answers = run.out / "calibration.jsonl", run.out / "calibration-answers.jsonl"
    write_jsonl(notes, records)
    released = run.out / "released"
    run.step("answers to calibrate on", extraction(str(base), released, notes, answers, grounded=True))
    fitted = released / "calibration.json"
    run.step("calibration", argv("eval.calibration", predictions=answers, references=notes, out=fitted, overwrite=True))


def card(run_card: dict[str, Any]) -> dict[str, Any]:
    """A stage's run card without the paths of its machine."""
    kept = ("code", "steps", "rows", "tokens", "best_valid_loss", "training_seconds", "tokens_per_second", "ranks")
    recipe = {key: value for key, value in run_card["recipe"].items() if key not in PATHS}
    data = {Path(path).name: digest for path, digest in run_card["data"]["sources"].items()}
    return {"recipe": recipe, "data": data, **{key: run_card[key] for key in kept}}


def release(adapter: Path, out: Path) -> None:
    """Write a trained adapter's files to `out`, its matrices in bfloat16, with the base's public name."""
    out.mkdir(exist_ok=True)
    matrices = load_file(adapter / "adapter_model.safetensors")
    with atomic_file(out / "adapter_model.safetensors") as path:
        save_file({name: matrix.to(torch.bfloat16) for name, matrix in matrices.items()}, path, {"format": "pt"})
    write_json(
        out / "adapter_config.json", read_json(adapter / "adapter_config.json") | {"base_model_name_or_path": BASE}
    )
    write_json(out / "trained_on.json", read_json(adapter / "trained_on.json"))


if __name__ == "__main__":
    cli.run(main, Options)
