"""A run's card: run.json says what was run, on what, and what it cost; loss.png shows how the loss fell.

Model FLOP utilisation is the arithmetic that the model asks for (train/report/plan.py; blocks that are computed again
count once) over what the device could have done in the time: on a CPU at its own rate of matrix products in the run's
dtype, measured for a tenth of a second when training is over; on a known GPU at its data sheet's bf16 rate. Held-out
losses and saving are in the time and not in the arithmetic.
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
    """Write run.json and loss.png; `peaks` is each rank's peak memory in bytes. A run that was at its end already
    keeps the card of the process that brought it there."""
    if not trainer.done["steps"] and (trainer.out / "run.json").is_file():
        return
    write_json(trainer.out / "run.json", run_card(trainer, seconds, peaks))
    try:
        draw_losses(trainer.out)
    except ImportError:
        print("loss.png left out: matplotlib is not installed (pip install matplotlib)", file=sys.stderr)


def run_card(trainer: Trainer, seconds: float, peaks: list[int]) -> dict[str, Any]:
    """What was run, on what, and what it cost."""
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
        "skipped_steps": progress.skipped,
        "best_valid_loss": progress.best,
        "best_step": progress.best_step,
        "trained_parameters": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        # what follows is of the process that ended the run: of the steps since it was started or resumed
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
    """{"model_flops", "model_flop_utilisation", "utilisation_of"} of this process's steps; None where not known."""
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
    """Dense bf16 FLOP/s of a GPU by its driver's name ("NVIDIA A100-SXM4-80GB"), or None. An H100 on PCIe is slower
    than the sheet's, so it is not known."""
    words = name.replace("-", " ").split()
    if "H100" in words and ("PCIe" in words or "NVL" in words):
        return None
    return next((peak for word, peak in SHEETS.items() if word in words), None)


def code_version(root: Path) -> dict[str, Any]:
    """{"hash"} of the programs that train, with {"commit", "dirty"} in a git checkout, else {"version"}."""
    held: dict[str, Any] = {"hash": code_hash(root)}
    commands = ("rev-parse --show-toplevel", "rev-parse HEAD", "status --porcelain --untracked-files=no")
    top, commit, changed = (git(root, *command.split()) for command in commands)
    if top is None or commit is None or Path(top).resolve() != root.resolve():
        return held | {"version": version("cancerllm-reference")}
    return held | {"commit": commit, "dirty": bool(changed)}


def git(root: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def code_hash(root: Path = ROOT) -> str:
    """A hash of the programs that train, by which ranks compare their checkouts."""
    files = sorted(file for package in ("model", "lora", "infer", "train") for file in (root / package).rglob("*.py"))
    return hashlib.sha256("".join(sha256_file(file) for file in files).encode()).hexdigest()[:16]


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def peak_memory(device: torch.device) -> int:
    """Bytes: the GPU's peak allocation, or the process's peak resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return int(max_resident_mb(resource.getrusage(resource.RUSAGE_SELF)) * 2**20)


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()


def draw_losses(out: Path) -> None:
    """loss.png: training and held-out loss over steps, from metrics.jsonl. Raises ImportError without matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    held = [line for line in lines if "valid_loss" in line]
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xlabel="step", ylabel="loss: mean of −log p of a supervised token", title=out.name)
    axes.plot([line["step"] for line in lines], [line["loss"] for line in lines], linewidth=1, label="training")
    if held:
        axes.plot([line["step"] for line in held], [line["valid_loss"] for line in held], "o-", label="held out")
    axes.grid(alpha=0.2)
    axes.legend(frameon=False)
    with atomic_file(out / "loss.png") as temporary:
        figure.savefig(temporary, format="png", dpi=120)
