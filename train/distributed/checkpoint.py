"""Atomic, checksummed checkpoints.

    checkpoints/step-000020/
        trainable.safetensors   every trained parameter, unsharded, by name
        optimizer.safetensors   "parameter|key" → state, unsharded
        adapter/                the adapter in PEFT's form (LoRA runs)
        state.json              step, tokens seen, best held-out loss, the run's identity
        manifest.json           SHA-256 of each file above

A checkpoint is written to a temporary folder and renamed. A run resumes from the newest one whose hashes match; corrupt
ones are named and skipped. Tensors are unsharded, so a run may resume on another number of ranks.
"""

from __future__ import annotations

import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora.peft import write_adapter
from model.checkpoints.safetensors import Stored, open_safetensors, save_tensors
from model.support.cli import UserError
from model.support.files import atomic_folder, read_json, sha256_file, write_json
from train.distributed.sharding import differences, local, rows_of, sharded_like
from train.optim.optimizer import named_trainable, state_tensors


@dataclass
class Progress:
    """A run's progress. `step` is the number of steps done."""

    step: int = 0
    tokens: int = 0

    best: float | None = None
    best_step: int | None = None


def gathered(tensor: Tensor, keep: bool = True) -> Tensor:
    """A copy of the tensor on the CPU, gathered from all ranks if it is sharded (a collective: every rank calls it).

    `keep=False`: only takes part in the collective; returns an empty tensor.
    """
    if hasattr(tensor, "full_tensor"):
        tensor = tensor.full_tensor()
    return tensor.detach().to("cpu", copy=True).contiguous() if keep else torch.empty(0)


def snapshot(
    model: nn.Module, optimizers: list[torch.optim.Optimizer], keep: bool = True
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Unsharded copies on the CPU of (trained parameters by name, optimizer state by "name|key"). A collective.

    Ranks with `keep=False` hold one tensor at a time and return two empty dicts: one copy per run, not one per rank.
    """
    params = {name: gathered(p, keep) for name, p in named_trainable(model).items()}
    state = {f"{name}|{key}": gathered(value, keep) for name, key, value in state_tensors(model, optimizers)}
    return (params, state) if keep else ({}, {})


def save_checkpoint(
    folder: Path,
    progress: Progress,
    params: dict[str, Tensor],
    state: dict[str, Tensor],
    adapter: tuple[Any, dict[str, Tensor], str] | None,
    identity: dict[str, Any],
) -> Path:
    """Writes one checkpoint under `folder`. `adapter`: (config, tensors, base path) of a LoRA run."""
    path = folder / f"step-{progress.step:06d}"
    with atomic_folder(path) as temporary:
        save_tensors(temporary / "trainable.safetensors", params)
        save_tensors(temporary / "optimizer.safetensors", state)
        if adapter is not None:
            (temporary / "adapter").mkdir()
            write_adapter(temporary / "adapter", *adapter)
        write_json(temporary / "state.json", {**asdict(progress), "identity": identity})
        files = sorted(file for file in temporary.rglob("*") if file.is_file())
        hashes = {str(file.relative_to(temporary)): sha256_file(file) for file in files}
        write_json(temporary / "manifest.json", hashes)
    return path


def find_corruption(path: Path, quickly: bool = False) -> str | None:
    """Describes what is wrong with a checkpoint; None if it is intact. `quickly` does not hash the tensors."""
    try:
        manifest = read_json(path / "manifest.json")
        for name, digest in manifest.items():
            if not (path / name).is_file():
                return f"{name} is missing"
            if not (quickly and name.endswith(".safetensors")) and sha256_file(path / name) != digest:
                return f"{name} is corrupt"
    except (UserError, AttributeError, OSError):
        return "manifest.json is missing or corrupt"
    return None


def steps_saved(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first."""
    checkpoints = [path for path in folder.glob("step-*") if path.is_dir() and path.name[5:].isdecimal()]
    return sorted(checkpoints, key=step_of)


def step_of(path: Path) -> int:
    return int(path.name[5:])


def newest_intact(folder: Path) -> Path | None:
    """The newest intact checkpoint; corrupt ones are named on stderr and skipped."""
    for path in reversed(steps_saved(folder)):
        corruption = find_corruption(path)
        if corruption is None:
            return path
        print(f"checkpoint {path} skipped: {corruption}", file=sys.stderr)
    return None


def prune(folder: Path, last: int, best: int | None, stale: list[Path]) -> None:
    """Deletes the `stale` checkpoints (corrupt, or of an abandoned run) and all others but the last `last` and the best
    one."""
    for path in stale:
        shutil.rmtree(path, ignore_errors=True)
    for path in steps_saved(folder)[:-last]:
        if step_of(path) != best:
            shutil.rmtree(path)


def check_unchanged(folder: Path, identity: dict[str, Any], allowed: bool) -> None:
    """Raises UserError if the newest checkpoint is another run's. Cheap, for a check before the model is loaded."""
    saved = steps_saved(folder)
    if saved and find_corruption(saved[-1], quickly=True) is None:
        refuse_changes(saved[-1], read_json(saved[-1] / "state.json").get("identity", {}), identity, allowed)


def refuse_changes(path: Path, old: dict[str, Any], new: dict[str, Any], allowed: bool) -> None:
    changed = differences(old, new)
    if changed and not allowed:
        raise UserError(
            f"{path} was made by another run: {'; '.join(changed)}. Resume with --allow-changed, start again with "
            "--resume False, or give another out folder"
        )


def restore(
    path: Path,
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    identity: dict[str, Any],
    allowed: bool = False,
) -> Progress:
    """Loads a checkpoint's parameters and optimizer state; each rank reads its own rows. Returns the progress.

    Raises UserError, with nothing changed, if another run made it (unless `allowed`) or its shapes differ.
    """
    raw = read_json(path / "state.json")
    refuse_changes(path, raw.pop("identity"), identity, allowed)
    params = open_safetensors(path / "trainable.safetensors")
    state = open_safetensors(path / "optimizer.safetensors")
    trainable = named_trainable(model)
    if {name: stored.shape for name, stored in params.items()} != {n: tuple(p.shape) for n, p in trainable.items()}:
        raise UserError(f"{path}: holds other parameters than this run trains; give another out folder")
    with torch.no_grad():
        for name, param in trainable.items():
            local(param).copy_(read_rows(params[name], param))
    names = {p: name for name, p in trainable.items()}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for param in group["params"]:
                prefix = f"{names[param]}|"
                saved = {key[len(prefix) :]: stored for key, stored in state.items() if key.startswith(prefix)}
                if saved:
                    optimizer.state[param] = {key: read_state(stored, param) for key, stored in saved.items()}
    raw.pop("skipped", None)  # of checkpoints of an older version
    return Progress(**raw)


def read_rows(stored: Stored, param: Tensor) -> Tensor:
    """Reads this rank's rows of a tensor that is sharded as `param` is."""
    return stored.read(rows_of(param, stored.shape[0]) if stored.shape else None)


def read_state(stored: Stored, param: Tensor) -> Tensor:
    """Reads an optimizer tensor onto `param`'s device, sharded as `param` is; scalars stay on the CPU."""
    if not stored.shape:
        return stored.read(None)
    return sharded_like(read_rows(stored, param).to(local(param).device), param, stored.shape)
