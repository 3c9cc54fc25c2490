"""Merge an adapter into a checkpoint on disk: `python -m lora.merge --weights DIR --adapter DIR --out DIR`.

Base and adapter are streamed: rows of W + s·B A, a few megabytes at a time, are summed in fp32, rounded to the file's
dtype and written. Peak memory does not depend on the number of layers and shards. The base's files are not changed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lora.adapter import LoRAConfig
from lora.origin import check_origin, note_merge
from lora.peft import (
    AdapterFile,
    adapted_modules,
    check_tensors,
    drop_absent_targets,
    matrices,
    read_config,
    update_rows,
)
from model.checkpoints.convert import add_tokenizer
from model.checkpoints.safetensors import Stored
from model.checkpoints.weights import Checkpoint, config_dict, new_checkpoint, open_checkpoint, select, write_checkpoint
from model.config import ModelConfig
from model.support.cli import run
from model.support.lock import output
from model.transformer import Transformer


@dataclass(frozen=True)
class Options:
    """Merge an adapter into a checkpoint on disk, streaming."""

    weights: str
    """The base model's folder or GGUF file."""
    adapter: str
    """The adapter's folder (PEFT's two files)."""
    out: str
    """The merged model's folder."""
    overwrite: bool = False
    """Replace a model that is there; the folder's other files stay."""


def merged_rows(stored: Stored, adapter: Mapping[str, Tensor], module: str, scale: float) -> Stored:
    """A tensor on disk with its layer's update added, in at least fp32, as rows are read."""

    def read(rows: slice | None) -> Tensor:
        base = stored.read(rows)
        wide = torch.promote_types(base.dtype, torch.float32)
        update = update_rows(*matrices(adapter, module), scale, rows, wide)
        return update.add_(base.to(wide))

    return replace(stored, read=read)


def merge_checkpoint(checkpoint: Checkpoint, config: LoRAConfig, adapter: Mapping[str, Tensor]) -> Checkpoint:
    """The checkpoint with every adapted weight merged; lazy, nothing is read yet."""
    tensors = dict(checkpoint.tensors)
    for module in adapted_modules(adapter):
        name = f"{module}.weight"
        tensors[name] = merged_rows(tensors[name], adapter, module, config.scale(module))
    return replace(checkpoint, tensors=tensors)


def merge_folders(weights: str, adapter: str, out: str, dtype: torch.dtype | None = None, tokenizer: str = "") -> None:
    """Merge the adapter into the base at `weights` and write the model to `out`, in `dtype` (None: the base's), with a
    tokenizer (empty: the base's)."""
    raw = config_dict(weights)
    with torch.device("meta"):
        model = Transformer(ModelConfig.from_dict(raw))
    config, tensors = drop_absent_targets(read_config(adapter), model), AdapterFile(adapter)
    check_origin(weights, [adapter])
    base = select(open_checkpoint(weights), {name: tuple(p.shape) for name, p in model.named_parameters()})
    check_tensors(model, tensors, config, adapter, base)
    with new_checkpoint(out) as folder:
        write_checkpoint(merge_checkpoint(base, config, tensors), raw, folder, 5 * 2**30, dtype)
        note_merge(folder, weights, adapter)
        add_tokenizer(tokenizer or weights, folder, out)


def main(options: Options) -> int:
    with output(options.out, options.overwrite, options.weights):
        merge_folders(options.weights, options.adapter, options.out)
    print(options.out)
    return 0


if __name__ == "__main__":
    run(main, Options)
