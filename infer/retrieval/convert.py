"""Encoders and adapters out of pickles: `python -m infer.retrieval.convert DIR`.

Writes model.safetensors beside pytorch_model.bin and adapter.safetensors beside pytorch_adapter.bin. The .bin file is
opened with `torch.load(weights_only=True)`: no code in it runs.
"""

from __future__ import annotations

import pickle
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro

from model.checkpoints.safetensors import write_safetensors
from model.support.cli import UserError, run
from model.support.files import atomic_file

NAMES = {"pytorch_model.bin": "model.safetensors", "pytorch_adapter.bin": "adapter.safetensors"}


@dataclass(frozen=True)
class Options:
    """Turn an encoder's .bin files into safetensors."""

    folder: Annotated[Path, tyro.conf.Positional]
    """The encoder's folder."""


def main(options: Options) -> None:
    found = [name for name in NAMES if (options.folder / name).exists()]
    if not found:
        raise UserError(f"{options.folder}: holds no {' or '.join(NAMES)}")
    for name in found:
        source = options.folder / name
        try:
            loaded = torch.load(source, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            raise UserError(f"{source}: not a file of tensors only, or corrupt; download it again") from error
        # Adapter names are in brackets in the adapters library's files: adapters.[PROX].adapter_up
        tensors = {re.sub(r"[\[\]]", "", key): value for key, value in loaded.items() if torch.is_tensor(value)}
        with atomic_file(options.folder / NAMES[name]) as beside:
            shapes = {key: (tuple(value.shape), value.dtype) for key, value in tensors.items()}
            write_safetensors(beside, shapes, lambda key: iter([tensors[key]]))  # noqa: B023 - called before the next
        print(f"{options.folder / NAMES[name]}: {len(tensors)} tensors")


if __name__ == "__main__":
    run(main, Options)
