"""Trains the released adapter, the mean of two tunings on different notes: `make adapter`.

    clinic → base → continued pre-training → two tunings of its adapter side by side → their mean, in bfloat16

Uses the demo's programs with longer recipes (train/recipes/released-*.toml). The tunings start from one continued
pre-training and run on one core each; on unseen styles their mean is better than either. An interrupted run continues.
`make scores` (eval.experiments.scores) then scores the mean and writes its card.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
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
CALIBRATED = 40  # notes for calibration, of held-out patients and of unseen styles each
PATHS = ("data", "out", "weights", "adapter", "valid_data", "tokenizer", "init")
CLINIC = {"patients": 500, "further_patients": 400, "clinical": 2200, "healthy": 0}
SEEDS = (22, 23)  # of the notes of each training


@dataclass(frozen=True)
class Options:
    """Train the released adapter."""

    out: Path = Path("runs/adapter")
    """The run's folder."""
    overwrite: bool = False
    """Remove an existing run and start again."""


def main(options: Options) -> int:
    check_folder()
    with begin(options.out, {"scale": "released", **CLINIC}, "released/training.json", options.overwrite) as run:
        stages(run)
    print(
        f"{options.out / 'released'}: python -m eval.experiments.scores --adapter {options.out / 'released'} scores it"
    )
    return 0


def clinic(out: Path, seed: int) -> list[str]:
    """The command that generates the notes of one training."""
    return argv("train.clinic", out=out, seed=seed, **CLINIC, overwrite=True)


def stages(run: Run) -> None:
    """All steps: notes, continued pre-training, both tunings, the mean, its calibration and training.json."""
    dtype, base = training_dtype(run.out), public_base(run)
    folders = {seed: run.out / f"training-{seed}" for seed in SEEDS}
    run.run_in_parallel({f"clinic: notes {seed}": clinic(folders[seed] / "data", seed) for seed in SEEDS})

    def recipe(program: str, files: Mapping[str, Path], **more: Any) -> list[str]:
        command = training if program == "pretrain" else argv
        return command(
            f"train.{program}", RECIPES / f"released-{program}.toml", weights=base, dtype=dtype, **files, **more
        )

    first, pretrained = folders[SEEDS[0]] / "data", run.out / "pretrained"
    texts = {"data": first / "pretrain.jsonl", "valid_data": first / "pretrain_valid.jsonl", "out": pretrained}
    run.step("continued pre-training", recipe("pretrain", texts))
    tunings = {}
    for seed, folder in folders.items():
        notes = {"data": folder / "data" / "train.jsonl", "valid_data": folder / "data" / "valid.jsonl"}
        tunings[f"tuning {seed}"] = recipe(
            "instruct", notes | {"out": folder / "tuned"}, adapter=pretrained / "adapter"
        )
    run.run_in_parallel(tunings)
    write_mean([folder / "tuned" / "adapter" for folder in folders.values()], run.out / "released")
    calibrate(run, base, folders[SEEDS[0]] / "data")
    done = {"continued pre-training": (SEEDS[0], pretrained)}
    done |= {f"tuning {seed}": (seed, folder / "tuned") for seed, folder in folders.items()}
    stages = [
        {"name": name, "clinic": {"seed": seed, **CLINIC}, **card(read_json(out / "run.json"))}
        for name, (seed, out) in done.items()
    ]
    write_json(run.out / "released" / "training.json", {"host": host(), "stages": stages})


def calibrate(run: Run, base: Path, data: Path) -> None:
    """Fit the temperatures on patients and styles that neither training nor make scores uses."""
    records = [record for name in ("heldout", "unseen") for record in records_of(data / f"{name}.jsonl")[:CALIBRATED]]
    notes, answers = run.out / "calibration.jsonl", run.out / "calibration-answers.jsonl"
    write_jsonl(notes, records)
    released = run.out / "released"
    run.step("answers to calibrate on", extraction(str(base), released, notes, answers, grounded=True))
    fitted = released / "calibration.json"
    run.step("calibration", argv("eval.calibration", predictions=answers, references=notes, out=fitted, overwrite=True))


def card(run_card: dict[str, Any]) -> dict[str, Any]:
    """A stage's run card without local paths."""
    kept = ("code", "steps", "rows", "tokens", "best_valid_loss", "training_seconds", "tokens_per_second", "ranks")
    recipe = {key: value for key, value in run_card["recipe"].items() if key not in PATHS}
    data = {Path(path).name: digest for path, digest in run_card["data"]["sources"].items()}
    return {"recipe": recipe, "data": data, **{key: run_card[key] for key in kept}}


def write_mean(adapters: Sequence[Path], out: Path) -> None:
    """Write the exact mean of the adapters' weight updates to `out`, in bfloat16, with the base's public name.

    The mean of s B₁A₁ and s B₂A₂ is s [B₁ B₂]/2 · [A₁; A₂], an adapter whose rank is the sum of theirs.
    """
    out.mkdir(parents=True, exist_ok=True)
    states = [load_file(adapter / "adapter_model.safetensors") for adapter in adapters]
    mean = {}
    for name in states[0]:
        parts = [tensors[name].float() for tensors in states]
        joined = torch.cat(parts) if ".lora_A." in name else torch.cat(parts, 1) / len(parts)
        mean[name] = joined.to(torch.bfloat16)
    with atomic_file(out / "adapter_model.safetensors") as path:
        save_file(mean, path, {"format": "pt"})
    config = read_json(adapters[0] / "adapter_config.json")
    ranks = {key: config[key] * len(states) for key in ("r", "lora_alpha")}
    write_json(out / "adapter_config.json", config | ranks | {"base_model_name_or_path": BASE})
    write_json(out / "trained_on.json", read_json(adapters[0] / "trained_on.json"))


def release(adapter: Path, named: Path, scored: Path, scores: str = "scores.json") -> None:
    """Put an adapter, and its card and scores from the folder `scored`, into infer/released."""
    if adapter.resolve() != named.resolve():
        shutil.copytree(adapter, named, dirs_exist_ok=True)
    shutil.copyfile(scored / "README.md", named / "README.md")
    shutil.copyfile(scored / scores, named / "scores.json")
    print(f"{named}: the adapter, its card and its scores")


if __name__ == "__main__":
    cli.run(main, Options)
