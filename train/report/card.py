"""The run card: run.json (recipe, code, data, machine, cost) and loss.png (the learning curve).

Model FLOP utilisation is the model's FLOPs (train/report/plan.py; recomputed blocks count once) divided by time × peak
rate. The peak is measured on a CPU (GEMMs in the run's dtype, for a tenth of a second after training) and taken from
the data sheet (bf16) on a known GPU. The time includes held-out losses and checkpoints, the FLOPs do not.
"""

from __future__ import annotations

import hashlib
import json
import platform
import resource
import subprocess
import sys
from dataclasses import asdict, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from model.support.files import atomic_file, sha256_file, write_json
from model.support.hardware import max_resident_mb, product_rate
from train.report.plan import SHEETS, Load, arithmetic

if TYPE_CHECKING:
    from train.loop import Trainer

ROOT = Path(__file__).parents[2]


def write_card(trainer: Trainer, seconds: float, peaks: list[int]) -> None:
    """Writes run.json and loss.png. `peaks`: peak memory of each rank in bytes."""
    if not trainer.done["steps"] and (trainer.out / "run.json").is_file():
        return  # the run had ended before: keep the card of the process that trained
    write_json(trainer.out / "run.json", run_card(trainer, seconds, peaks))
    try:
        draw_losses(trainer.out)
    except ImportError:
        print("loss.png left out: matplotlib is not installed (pip install matplotlib)", file=sys.stderr)


def run_card(trainer: Trainer, seconds: float, peaks: list[int]) -> dict[str, Any]:
    """The content of run.json."""
    progress, done = trainer.progress, trainer.done
    packages = ("cancerllm-reference", "torch", "numpy", "safetensors", "tokenizers", "sentencepiece")
    return {
        **trainer.identity,  # stage, and the hashes of data and tokenizer
        "recipe": asdict(trainer.recipe),
        "code": code_version(ROOT),
        "steps": trainer.steps,
        "rows": len(trainer.rows),
        "records": len(trainer.rows.store),
        "rejected_records": trainer.rows.store.manifest["rejects"],
        "tokens": progress.tokens,
        "best_valid_loss": progress.best,
        "best_step": progress.best_step,
        "trained_parameters": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        # from here on: only of the process that ended the run, since it started or resumed
        "steps_of_this_process": done["steps"],
        "tokens_of_this_process": done["tokens"],
        "seconds": seconds,
        "training_seconds": trainer.seconds,
        "tokens_per_second": done["tokens"] / trainer.seconds if trainer.seconds else None,
        **utilisation(trainer),
        "peak_memory_bytes": max(peaks),
        "ranks": trainer.ranks.world,
        "device": device_name(trainer.ranks.device),
        "threads": torch.get_num_threads(),
        "packages": {name: version(name) for name in packages},
        "python": platform.python_version(),
    }


def utilisation(trainer: Trainer) -> dict[str, Any]:
    """{"model_flops", "model_flop_utilisation" (None if unknown), "utilisation_of"} of this process's steps."""
    done, recipe, ranks = trainer.done, replace(trainer.recipe, checkpoint_blocks=False), trainer.ranks
    if not done["tokens"] or not trainer.seconds:
        return {"model_flops": 0, "model_flop_utilisation": None, "utilisation_of": "no step was made"}
    load = Load(done["tokens"], done["targets"], 0, done["steps"], done["pairs"] / done["tokens"], "this run")
    flops = arithmetic(trainer.model.config, recipe, load)
    if ranks.device.type == "cpu":
        peak: float | None = product_rate(getattr(torch, recipe.dtype)) * 1e9
        of = f"{ranks.world} x {peak / 1e9:.0f} GFLOP/s, measured products in {recipe.dtype}"  # type: ignore[operator]
    else:
        name = torch.cuda.get_device_name(ranks.device)
        peak = sheet_peak(name)
        sheet = f"{ranks.world} x {(peak or 0) / 1e12:.0f} TFLOP/s, the data sheet's bf16 rate"
        of = sheet if peak else f"no data sheet here for {name}"
    share = None if peak is None else flops / trainer.seconds / (peak * ranks.world)
    return {"model_flops": flops, "model_flop_utilisation": share, "utilisation_of": of}


def sheet_peak(name: str) -> float | None:
    """Dense bf16 FLOP/s of a GPU by its driver's name ("NVIDIA A100-SXM4-80GB"); None if unknown."""
    words = name.replace("-", " ").split()
    if "H100" in words and ("PCIe" in words or "NVL" in words):
        return None  # slower than the SXM version in SHEETS
    return next((peak for word, peak in SHEETS.items() if word in words), None)


def code_version(root: Path) -> dict[str, Any]:
    """{"hash", "commit", "dirty"} in a git checkout, else {"hash", "version"}."""
    hashed: dict[str, Any] = {"hash": code_hash(root)}
    commands = ("rev-parse --show-toplevel", "rev-parse HEAD", "status --porcelain --untracked-files=no")
    top, commit, changed = (git(root, *command.split()) for command in commands)
    if top is None or commit is None or Path(top).resolve() != root.resolve():
        return hashed | {"version": version("cancerllm-reference")}
    return hashed | {"commit": commit, "dirty": bool(changed)}


def git(root: Path, *words: str) -> str | None:
    """Output of a git command in `root`; None if it fails."""
    try:
        done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def code_hash(root: Path = ROOT) -> str:
    """Hash of all code that training uses. Ranks compare it to detect different checkouts."""
    files = sorted(file for package in ("model", "lora", "infer", "train") for file in (root / package).rglob("*.py"))
    return hashlib.sha256("".join(sha256_file(file) for file in files).encode()).hexdigest()[:16]


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def peak_memory(device: torch.device) -> int:
    """Peak memory in bytes: allocated on the GPU, or resident in the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return int(max_resident_mb(resource.getrusage(resource.RUSAGE_SELF)) * 2**20)


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()


def draw_losses(out: Path) -> None:
    """Draws training and held-out loss over steps, from metrics.jsonl. Raises ImportError without matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    held_out = [line for line in lines if "valid_loss" in line]
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xlabel="step", ylabel="loss: mean of −log p of a supervised token", title=out.name)
    axes.plot([line["step"] for line in lines], [line["loss"] for line in lines], linewidth=1, label="training")
    if held_out:
        steps, losses = [line["step"] for line in held_out], [line["valid_loss"] for line in held_out]
        axes.plot(steps, losses, "o-", label="held out")
    axes.grid(alpha=0.2)
    axes.legend(frameon=False)
    with atomic_file(out / "loss.png") as temporary:
        figure.savefig(temporary, format="png", dpi=120)
