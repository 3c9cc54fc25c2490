"""Checkpoints that are whole or not there.

    checkpoints/step-000020/
        trainable.safetensors   every trained parameter, whole, by name
        optimizer.safetensors   "parameter|key" → state, whole
        adapter/                the adapter in PEFT's form (LoRA runs)
        state.json              step, tokens seen, best held-out loss, steps skipped
        manifest.json           the SHA-256 of each file above, written last

The folder is written beside its name and renamed. Reading takes the newest folder whose manifest and hashes hold; a
damaged one is named and passed over. Tensors are stored whole, so a run may go on with another number of ranks.
"""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lora.adapter import adapted, write_adapter
from model.command import UserError
from model.files import atomic_folder, read_json, sha256_file, write_json
from train.optimizer import named_trainable, state_tensors


@dataclass
class Progress:
    """Where a run stands. `step` is the number of steps done."""

    step: int = 0
    tokens: int = 0
    skipped: int = 0
    best: float | None = None
    best_step: int | None = None


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor gathered from all ranks (every rank has to call it); others as they are. On the CPU."""
    if hasattr(tensor, "full_tensor"):
        tensor = tensor.full_tensor()
    return tensor.detach().to("cpu", copy=True).contiguous()


def snapshot(model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Whole copies of (trained parameters by name, optimizer state by "name|key"). Every rank has to call it."""
    params = {name: whole(p) for name, p in named_trainable(model).items()}
    state = {f"{name}|{key}": whole(value) for name, key, value in state_tensors(model, optimizers)}
    return params, state


def adapter_tensors(model: nn.Module, params: dict[str, Tensor], name: str = "default") -> dict[str, Tensor]:
    """Trained parameters under PEFT's keys."""
    return {
        f"base_model.model.{path}.{kind}.weight": params[f"{path}.{kind}.{name}"]
        for path, layer in adapted(model).items()
        if name in layer.scale
        for kind in ("lora_A", "lora_B")
    }


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
        save_file(params, beside / "trainable.safetensors")
        save_file(state, beside / "optimizer.safetensors")
        if adapter is not None:
            (beside / "adapter").mkdir()
            write_adapter(beside / "adapter", *adapter)
        write_json(beside / "state.json", {**asdict(progress), "identity": identity})
        files = sorted(file for file in beside.rglob("*") if file.is_file())
        for file in files:
            with open(file, "rb") as written:
                os.fsync(written.fileno())
        write_json(beside / "manifest.json", {str(file.relative_to(beside)): sha256_file(file) for file in files})
    return path


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None where it is whole."""
    try:
        manifest = read_json(path / "manifest.json")
        for name, digest in manifest.items():
            if not (path / name).is_file():
                return f"{name} is missing"
            if sha256_file(path / name) != digest:
                return f"{name} is damaged"
    except (UserError, AttributeError, OSError):
        return "manifest.json is missing or damaged"
    return None


def steps_saved(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*") if path.is_dir())


def newest_whole(folder: Path) -> Path | None:
    """The newest checkpoint that is whole; damaged ones are named on stderr and passed over."""
    for path in reversed(steps_saved(folder)):
        wrong = damage(path)
        if wrong is None:
            return path
        print(f"checkpoint {path} passed over: {wrong}", file=sys.stderr)
    return None


def keep(folder: Path, last: int, best: int | None) -> None:
    """Remove all but the last `last` checkpoints and the best one; and what an interrupted write left behind."""
    for path in steps_saved(folder)[:-last]:
        if best is None or path.name != f"step-{best:06d}":
            shutil.rmtree(path)
    for left in [*folder.glob(".step-*.part"), *folder.glob(".step-*.old")]:
        shutil.rmtree(left, ignore_errors=True)


def restore(path: Path, model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> tuple[Progress, dict[str, Any]]:
    """Put a checkpoint's parameters and optimizer state in place. Returns the progress and the run's identity."""
    params, state = load_file(path / "trainable.safetensors"), load_file(path / "optimizer.safetensors")
    trainable = named_trainable(model)
    if params.keys() != trainable.keys():
        raise UserError(f"{path}: holds other parameters than this run trains; give another out folder")
    with torch.no_grad():
        for name, param in trainable.items():
            param.copy_(like(params[name], param))
    names = {p: name for name, p in trainable.items()}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for param in group["params"]:
                prefix = f"{names[param]}|"
                held = {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}
                if held:
                    optimizer.state[param] = {
                        key: value.clone() if value.dim() == 0 else like(value, param) for key, value in held.items()
                    }
    raw = read_json(path / "state.json")
    identity = raw.pop("identity")
    return Progress(**raw), identity


def like(value: Tensor, param: Tensor) -> Tensor:
    """`value` on `param`'s device, sharded as `param` is."""
    if hasattr(param, "device_mesh"):
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(value.to(param.device), param.device_mesh, param.placements)
    return value.to(param.device, copy=True)
