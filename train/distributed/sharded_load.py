"""Loads a model that was built on the meta device and sharded while empty.

Each rank reads only its own rows of each tensor, in pieces: all ranks together read the checkpoint once, and none holds
a whole tensor. In a quantized base no block spans two rows, so the codes shard by rows; the scales are small and
replicated. Fresh weights are drawn in full from (seed, name) and then cut, so that they do not depend on the number of
ranks.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lora.adapter import adapted
from lora.layer import init_a
from lora.peft import PREFIX
from model.checkpoints.weights import STREAM_NUMEL, Checkpoint, select
from model.quantize.blockwise import quantize_scales
from model.quantize.linear import QuantizedWeight
from model.support.init import first_weight
from train.distributed.sharding import Ranks, local, sum_over_ranks

Read = Callable[[str, slice], Tensor]  # (a weight's name in the checkpoint, rows) → those rows


@torch.no_grad()
def load_sharded(model: nn.Module, ranks: Ranks, read: Read, adapter: Mapping[str, Tensor] | None, seed: int) -> None:
    """Fills every parameter of an empty model: weights by `read`, adapters from `adapter` (PEFT's names) or initialised
    from `seed`."""
    dtype = next(model.parameters()).dtype  # of the embedding, hence of the base
    by_codes = {
        f"{path}.quantized.codes": layer for path, layer in adapted(model).items() if layer.quantized is not None
    }
    for name, param in tqdm(
        list(model.named_parameters()),
        desc="loading",
        unit="tensor",
        leave=False,
        disable=None if ranks.first else True,
    ):
        mine, target = ranks.rows(len(param)), local(param)
        assert len(target) == mine.stop - mine.start, name
        if ".lora_A." in name or ".lora_B." in name:
            target.copy_(adapter_matrix(name, param, adapter, seed)[mine])
            continue
        layer = by_codes.get(name)
        quantized = layer.quantized if layer else None
        weight, shape = (f"{layer.path}.weight", quantized.shape) if layer and quantized else (name, param.shape)
        step = max(1, STREAM_NUMEL // max(1, math.prod(shape[1:])))
        scales = []
        for start in range(mine.start, mine.stop, step):
            rows = slice(start, min(start + step, mine.stop))
            piece = warn_if_not_finite(weight, read(weight, rows))
            target_rows = target[start - mine.start : rows.stop - mine.start]
            if quantized is not None:
                codes, absmax = quantized.codes_of(piece.to(dtype))
                target_rows.copy_(codes.view_as(target_rows))
                scales.append(absmax.to(torch.float32))
            else:
                target_rows.copy_(piece)
        if quantized is not None:
            set_scales(quantized, scales, mine, ranks)


def set_scales(quantized: QuantizedWeight, scales: list[Tensor], mine: slice, ranks: Ranks) -> None:
    """Sets a quantized weight's scales, the same on every rank, from each rank's scales of its rows `mine`.

    They are all-reduced as a sum in which every other rank has zeros, so the values are exact.
    """
    all_OG = torch.zeros(quantized.shape[0], quantized.scales.numel() // quantized.shape[0])
    if scales:
        all_OG[mine] = torch.cat(scales).view(-1, all_OG.shape[1])
    flat = all_OG.flatten()
    if ranks.world > 1:
        flat = sum_over_ranks(flat.to(ranks.device)).cpu()
    if quantized.kind == "int8":
        quantized.scales.copy_(flat)
        return
    buffers = (quantized.scales, quantized.scales_absmax, quantized.scales_mean)
    for buffer, value in zip(buffers, quantize_scales(flat), strict=True):
        buffer.copy_(value)


def adapter_matrix(name: str, param: Tensor, adapter: Mapping[str, Tensor] | None, seed: int) -> Tensor:
    """One adapter matrix in full, from `adapter` or newly initialised (A random, B zero)."""
    path, kind, _ = name.rsplit(".", 2)
    if adapter is not None:
        return adapter[f"{PREFIX}{path}.{kind}.weight"]
    return init_a(param.shape, param.dtype, seed, path) if kind == "lora_A" else torch.zeros(param.shape)


def fresh(seed: int, shapes: dict[str, torch.Size], layers: int) -> Read:
    """Reads rows of newly initialised weights."""
    return lambda name, rows: first_weight(name, shapes[name], seed, layers)[rows]


def from_checkpoint(checkpoint: Checkpoint, shapes: dict[str, torch.Size], ranks: Ranks) -> Read:
    """Reads rows of a checkpoint. Raises UserError listing names and shapes that differ from the model's."""
    head = checkpoint.tensors.get("lm_head.weight")
    # to check that a tied head equals the embedding, each rank compares its own rows
    head_rows = ranks.rows(head.shape[0]) if head is not None and head.shape else None
    return select(checkpoint, {name: tuple(shape) for name, shape in shapes.items()}, head_rows).read


def warn_if_not_finite(name: str, rows: Tensor) -> Tensor:
    if rows.numel() and not rows.isfinite().all():
        warnings.warn(f"{name} holds NaN or infinite numbers", stacklevel=2)
    return rows


def base_shapes(model: nn.Module) -> dict[str, torch.Size]:
    """Names and shapes of the base weights as a checkpoint stores them: without adapters, not quantized."""
    added = (".lora_", ".quantized.")
    shapes = {name: p.shape for name, p in model.named_parameters() if not any(part in name for part in added)}
    quantized = {path: layer.quantized for path, layer in adapted(model).items() if layer.quantized is not None}
    return shapes | {f"{path}.weight": torch.Size(weight.shape) for path, weight in quantized.items()}
