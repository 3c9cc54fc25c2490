"""Checkpoints that are whole or not there.

    checkpoints/step-000020/
        trainable.safetensors   every trained parameter, whole, by name
        optimizer.safetensors   "parameter|key" → state, whole
        adapter/                the adapter in PEFT's form (LoRA runs)
        state.json              step, tokens seen, best held-out loss, steps skipped
        manifest.json           the SHA-256 of each file above, written last

The folder is written beside its name and renamed. Reading takes the newest folder whose manifest and hashes hold; a
corrupt one is named and skipped. Tensors are stored whole, so a run may resume on another number of ranks.
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
    skipped: int = 0
    best: float | None = None
    best_step: int | None = None


def whole(tensor: Tensor, keep: bool = True) -> Tensor:
    """A sharded tensor gathered from all ranks (every rank has to call it); others as they are. On the CPU.

    `keep` false: take part in the gathering, and free the result.
    """
    if hasattr(tensor, "full_tensor"):
        tensor = tensor.full_tensor()
    return tensor.detach().to("cpu", copy=True).contiguous() if keep else torch.empty(0)


def snapshot(
    model: nn.Module, optimizers: list[torch.optim.Optimizer], keep: bool = True
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Whole copies of (trained parameters by name, optimizer state by "name|key"). Every rank has to call it; only
    those that `keep` hold more than one tensor at a time, so a machine's memory does not fill with a copy a rank."""
    params = {name: whole(p, keep) for name, p in named_trainable(model).items()}
    state = {f"{name}|{key}": whole(value, keep) for name, key, value in state_tensors(model, optimizers)}
    return (params, state) if keep else ({}, {})


def save_checkpoint(
    folder: Path,
    progress: Progress,
    params: dict[str, Tensor],
    state: dict[str, Tensor],
    adapter: tuple[Any, dict[str, Tensor], str] | None,
    identity: dict[str, Any],
) -> Path:
    """Write one checkpoint under `folder`. `adapter` is (config, tensors, base) for a LoRA run."""
    path = folder / f"step-{progress.step:06d}"
    with atomic_folder(path) as beside:
        save_tensors(beside / "trainable.safetensors", params)
        save_tensors(beside / "optimizer.safetensors", state)
        if adapter is not None:
            (beside / "adapter").mkdir()
            write_adapter(beside / "adapter", *adapter)
        write_json(beside / "state.json", {**asdict(progress), "identity": identity})
        files = sorted(file for file in beside.rglob("*") if file.is_file())
        write_json(beside / "manifest.json", {str(file.relative_to(beside)): sha256_file(file) for file in files})
    return path


def find_corruption(path: Path, quickly: bool = False) -> str | None:
    """What is wrong with a checkpoint, or None where it is whole. `quickly` leaves out the tensors' hashes."""
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
    found = [path for path in folder.glob("step-*") if path.is_dir() and path.name[5:].isdecimal()]
    return sorted(found, key=step_of)


def step_of(path: Path) -> int:
    return int(path.name[5:])


def newest_whole(folder: Path) -> Path | None:
    """The newest checkpoint that is whole; corrupt ones are named on stderr and skipped."""
    for path in reversed(steps_saved(folder)):
        wrong = find_corruption(path)
        if wrong is None:
            return path
        print(f"checkpoint {path} skipped: {wrong}", file=sys.stderr)
    return None


def prune(folder: Path, last: int, best: int | None, stale: list[Path]) -> None:
    """Remove all but the last `last` checkpoints and the best one, and `stale` ones, corrupt or of an abandoned run."""
    for path in stale:
        shutil.rmtree(path, ignore_errors=True)
    for path in steps_saved(folder)[:-last]:
        if step_of(path) != best:
            shutil.rmtree(path)


def check_unchanged(folder: Path, identity: dict[str, Any], allowed: bool) -> None:
    """Refuse, before the model is read, to resume from another run's newest checkpoint."""
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
    """Put a checkpoint's parameters and optimizer state in place; each rank reads its rows. Returns the progress.

    Raises UserError, before anything is changed, where another run made it (unless `allowed`) or its shapes differ.
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
            local(param).copy_(rows_like(params[name], param))
    names = {p: name for name, p in trainable.items()}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for param in group["params"]:
                prefix = f"{names[param]}|"
                held = {key[len(prefix) :]: stored for key, stored in state.items() if key.startswith(prefix)}
                if held:
                    optimizer.state[param] = {key: as_state(stored, param) for key, stored in held.items()}
    return Progress(**raw)


def rows_like(stored: Stored, param: Tensor) -> Tensor:
    """The rows of a stored tensor that this rank holds of `param`."""
    return stored.read(rows_of(param, stored.shape[0]) if stored.shape else None)


def as_state(stored: Stored, param: Tensor) -> Tensor:
    """A stored optimizer tensor on `param`'s device, sharded as `param` is; single numbers stay on the CPU."""
    if not stored.shape:
        return stored.read(None)
    return sharded_like(rows_like(stored, param).to(local(param).device), param, stored.shape)
