"""Memory planned by train.report.plan against measured memory: SmolLM2-135M on a CPU, a fresh process per setting.

Measured is the growth of resident memory over a process that has imported everything and run one optimizer step and one
GEMM (libraries load at their first call): after loading the model (weights, adapters), between two steps (plus
gradients and optimizer state, freed pages returned), and at the peak. `ratio` is planned / measured; each total should
be within 0.85 to 1.15.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from eval.bench.process import in_own_process, resident
from eval.bench.row import Row
from eval.bench.train import warm_up
from eval.experiments.steps import argv, programs
from infer.released import smollm2
from model.support.cli import UserError
from model.support.hardware import product_rate, return_freed_memory
from train.distributed.sharding import Ranks
from train.recipe import parse, read_toml
from train.report.plan import Options, plan
from train.session import prepare

SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "tuning, fp32": ("instruct", {}),
    "tuning, bf16 base": ("instruct", {"dtype": "bfloat16"}),
    "tuning, NF4 base": ("instruct", {"dtype": "bfloat16", "base": "nf4"}),
    "four notes at once": ("instruct", {"batch_rows": 4, "micro_rows": 4}),
    "texts, 2 rows of 1,024": ("pretrain", {"batch_rows": 2, "micro_rows": 2, "packing": "documents"}),
    "texts, blocks recomputed": (
        "pretrain",
        {"batch_rows": 2, "micro_rows": 2, "packing": "documents", "checkpoint_blocks": True},
    ),
    "dropout": ("instruct", {"dropout": 0.05}),
    "all weights": ("instruct", {"full": True}),
    "all weights in bf16, fp32 masters": ("instruct", {"full": True, "dtype": "bfloat16"}),
}
STEPS = 2  # the optimizer's state exists from the second step on
GROUPS = {
    "weights and adapters": ("weights", "adapters"),
    "gradients and optimizer": ("gradients", "optimizer"),
    "within a step": ("activations", "logits", "gathered", "fragmentation"),
}


def rows(only: str = "") -> list[Row]:
    """Planned against measured megabytes, by category. `only` selects the settings whose names contain it."""
    chosen = {name: setting for name, setting in SETTINGS.items() if only in name}
    if not chosen:
        raise UserError(f"--only {only}: no such setting; the settings are {', '.join(SETTINGS)}")
    made = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        weights = str(folder / "base")
        programs({"base": argv("model.checkpoints.convert", smollm2(), weights)})
        programs({"notes": argv("train.clinic", patients=20, seed=1, out=folder / "clinic")})
        for number, (name, (stage, changes)) in enumerate(chosen.items()):
            made += setting_rows(name, stage, recipe_file(folder, number, stage, changes, weights))
    return made


def recipe_file(folder: Path, number: int, stage: str, changes: dict[str, Any], weights: str) -> Path:
    """The demo's recipe of this stage with the setting's changes, and so little data that every row is used."""
    values = read_toml(f"train/recipes/demo-{stage}.toml") | {"valid_rows": 1, **changes}
    file = "train" if stage == "instruct" else "pretrain"
    values |= {
        "weights": weights,
        "data": (str(folder / "clinic" / f"{file}.jsonl"),),
        "steps": STEPS,
        "warmup": 0,
        "out": str(folder / f"run-{number}"),
        "records": 2 * values["batch_rows"],
    }
    if stage == "pretrain":
        values["records"] *= 8  # several texts share a row
    path = folder / f"{stage}-{number}.toml"
    path.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items()))
    return path


def setting_rows(name: str, stage: str, recipe: Path) -> list[Row]:
    planned = plan(Options(str(recipe), stage=stage))  # type: ignore[arg-type]
    measured = in_own_process(measure, stage, str(recipe))
    made = []
    for group, parts in GROUPS.items():
        detail = ", ".join(f"{part} {planned['bytes'][part] / 1e6:.0f}" for part in parts)
        total = sum(planned["bytes"][part] for part in parts) / 1e6
        made.append(Row(f"{name}: {group}", total, measured[group], "measured", "planned MB", f"planned {detail}"))
    setting = f"rows of at most {planned['data']['longest']}, {measured['threads']} threads"
    total = planned["total_bytes"] / 1e6
    return [*made, Row(f"{name}: total", total, measured["total"], "measured", "planned MB", setting)]


def measure(stage: str, recipe: str) -> dict[str, float]:
    """Megabytes above the imports, in the groups of GROUPS; call it in a fresh process."""
    asked = parse([recipe], stage)
    warm_up()
    product_rate(getattr(torch, asked.dtype), seconds=0.0)
    before = settled()
    trainer = prepare(asked, stage, Ranks())
    loaded = settled()
    between = loaded
    for step in range(STEPS):
        trainer.update(step, trainer.gradients(step)[1])
        between = settled() if step < STEPS - 1 else between
    peak = resident(peak=True)
    return {
        "weights and adapters": loaded - before,
        "gradients and optimizer": between - loaded,
        "within a step": peak - between,
        "total": peak - before,
        "threads": torch.get_num_threads(),
    }


def settled() -> float:
    """Resident megabytes after the allocator has returned freed memory."""
    return_freed_memory()
    return resident()
