"""Record the base that an adapter was trained on, and refuse another base of the same shapes.

`trained_on.json` lies beside PEFT's two files; PEFT ignores it. It holds a hash of the base's norm weights and a hash
of each adapter merged into that base. Norm weights serve because every checkpoint format stores them unquantized and
full training changes them. They are hashed in bf16, the dtype of published weights, so a converted base has the same
hash. Adapters without the file are checked by their shapes alone.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from model.checkpoints.weights import MERGED, open_checkpoint
from model.support.cli import UserError
from model.support.files import read_json, sha256_file, write_json

TRAINED_ON = "trained_on.json"
OTHER_FORMATS = {
    "adapter_model.bin": "a pickle; convert it: python -m model.checkpoints.convert {path} NEW",
    "adapters.safetensors": "an adapter of MLX, whose matrices are transposed; fuse it into its base with mlx_lm.fuse "
    "and give the model that this writes",
    "adapters.npz": "an adapter of MLX; fuse it into its base with mlx_lm.fuse and give the model that this writes",
    "lora.safetensors": "an adapter of mistral-finetune, in the rotary layout of Mistral's own files; merge it there "
    "into its base and give the model that this writes",
}


def norms(weights: str | os.PathLike[str]) -> str:
    """SHA-256 of a checkpoint's norm weights in bf16; the same in every checkpoint format."""
    checkpoint, digest = open_checkpoint(weights), hashlib.sha256()
    for name in sorted(name for name in checkpoint.tensors if name.endswith("norm.weight")):
        digest.update(name.encode() + checkpoint.read(name).bfloat16().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def adapter_file(path: str | os.PathLike[str]) -> Path:
    """A PEFT folder's adapter_model.safetensors. Raises UserError if it is missing, naming another format's file."""
    where = Path(path) / "adapter_model.safetensors"
    for name, remedy in OTHER_FORMATS.items():
        if not where.exists() and (Path(path) / name).exists():
            raise UserError(f"{path}: {name} is {remedy.format(path=path)}")
    if not where.is_file():
        raise UserError(f"{where}: no such file; an adapter is a folder with adapter_config.json beside it")
    return where


def digest_of(adapter: str | os.PathLike[str]) -> str:
    return sha256_file(adapter_file(adapter))


def merged_into(weights: str | os.PathLike[str]) -> list[str]:
    """Hashes of the adapters that lora.merge merged into a base, in order."""
    mark = Path(weights) / MERGED
    return list(read_json(mark)) if mark.is_file() else []


def note_merge(out: Path, weights: str | os.PathLike[str], adapter: str | os.PathLike[str]) -> None:
    """Record in the folder of a merged model which adapters it contains."""
    write_json(out / MERGED, [*merged_into(weights), digest_of(adapter)])


def origin(base: str | os.PathLike[str]) -> dict[str, Any]:
    """The content of trained_on.json for an adapter on this base."""
    return {"norms": norms(base), "merged": merged_into(base)}


def check_origin(weights: str | os.PathLike[str], adapters: Sequence[str | os.PathLike[str]]) -> None:
    """Check that these adapters, applied in this order, belong on this base.

    Raises UserError if an adapter was trained on another base, or after other adapters than those before it. Adapters
    without trained_on.json pass.
    """
    here: dict[str, Any] | None = None
    for number, adapter in enumerate(adapters):
        mark = Path(adapter) / TRAINED_ON
        if not mark.is_file():
            continue
        recorded, here = read_json(mark), here or origin(weights)
        if not isinstance(recorded, dict) or not isinstance(recorded.get("merged"), list):
            raise UserError(f"{mark}: not what training writes there; remove it to check shapes alone")
        if recorded.get("norms") != here["norms"]:
            raise UserError(f"{adapter}: was trained on another base than {weights}; give that one, or remove {mark}")
        before = [*here["merged"], *map(digest_of, adapters[:number])]
        if recorded["merged"] != before:
            raise UserError(
                f"{adapter}: was trained on a base with {len(recorded['merged'])} adapters merged into it, and here "
                f"{len(before)} or others come before it; give the same in their order, or remove {mark}"
            )
