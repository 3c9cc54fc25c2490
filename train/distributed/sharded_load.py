"""A model put into memory row by row: built on the meta device, sharded while it is empty, then filled.

Each rank reads its own rows of each tensor and no others, so a node reads the checkpoint once whatever the number of
its ranks, and no rank holds a whole tensor of it. A packed base's codes are rows of whole quantization blocks, so its
shards end on blocks; its scales, which are small, are whole on every rank. Fresh weights are drawn whole, from (seed,
name), and cut: drawing each rank's rows apart would give all ranks the same numbers.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lora.adapter import adapted
from lora.layer import first_a
from lora.peft import PREFIX
from model.checkpoints.weights import PIECE, Checkpoint, select
from model.quantize.blockwise import quantize_scales
from model.quantize.linear import QuantizedWeight
from model.support.init import first_weight
from train.distributed.sharding import Ranks, local, sum_over_ranks

Read = Callable[[str, slice], Tensor]  # (a weight's name in the checkpoint, rows) → those rows


@torch.no_grad()
def load_sharded(model: nn.Module, ranks: Ranks, read: Read, adapter: Mapping[str, Tensor] | None, seed: int) -> None:
    """Fill every parameter of an empty model: weights from `read`, adapters from PEFT's tensors or freshly drawn."""
    dtype = next(model.parameters()).dtype  # the embedding's: the base's
    packed = {f"{path}.quantized.codes": layer for path, layer in adapted(model).items() if layer.quantized is not None}
    for name, param in tqdm(
        list(model.named_parameters()),
        desc="loading",
        unit="tensor",
        leave=False,
        disable=None if ranks.first else True,
    ):
        mine, into = ranks.rows(len(param)), local(param)
        assert len(into) == mine.stop - mine.start, name
        if ".lora_A." in name or ".lora_B." in name:
            into.copy_(adapter_rows(name, param, adapter, seed)[mine])
            continue
        layer = packed.get(name)
        quantized = layer.quantized if layer else None
        weight, shape = (f"{layer.path}.weight", quantized.shape) if layer and quantized else (name, param.shape)
        step = max(1, PIECE // max(1, math.prod(shape[1:])))
        scales = []
        for start in range(mine.start, mine.stop, step):
            rows = slice(start, min(start + step, mine.stop))
            piece, place_of = finite(weight, read(weight, rows)), into[start - mine.start : rows.stop - mine.start]
            if quantized is not None:
                codes, absmax = quantized.codes_of(piece.to(dtype))
                place_of.copy_(codes.view_as(place_of))
                scales.append(absmax.to(torch.float32))
            else:
                place_of.copy_(piece)
        if quantized is not None:
            put_scales(quantized, scales, mine, ranks)


def put_scales(held: QuantizedWeight, scales: list[Tensor], mine: slice, ranks: Ranks) -> None:
    """A packed weight's scales, whole on every rank: each adds its own to zeros, so none of them is rounded."""
    whole_OG = torch.zeros(held.shape[0], held.scales.numel() // held.shape[0])
    if scales:
        whole_OG[mine] = torch.cat(scales).view(-1, whole_OG.shape[1])
    whole = whole_OG.flatten()
    if ranks.world > 1:
        whole = sum_over_ranks(whole.to(ranks.device)).cpu()
    if held.kind in ("int8", "w8a8"):
        held.scales.copy_(whole)
        return
    for buffer, value in zip((held.scales, held.scales_absmax, held.scales_mean), quantize_scales(whole), strict=True):
        buffer.copy_(value)


def adapter_rows(name: str, param: Tensor, adapter: Mapping[str, Tensor] | None, seed: int) -> Tensor:
    """The whole of one adapter matrix."""
    path, kind, _ = name.rsplit(".", 2)
    if adapter is not None:
        return adapter[f"{PREFIX}{path}.{kind}.weight"]
    return first_a(param.shape, param.dtype, seed, path) if kind == "lora_A" else torch.zeros(param.shape)


def fresh(seed: int, shapes: dict[str, torch.Size], layers: int) -> Read:
    """Rows of freshly drawn weights."""
    return lambda name, rows: first_weight(name, shapes[name], seed, layers)[rows]


def from_checkpoint(checkpoint: Checkpoint, shapes: dict[str, torch.Size], ranks: Ranks) -> Read:
    """Rows of a checkpoint whose names and shapes are the model's. Raises UserError listing what disagrees."""
    head = checkpoint.tensors.get("lm_head.weight")
    mine = (
        ranks.rows(head.shape[0]) if head is not None and head.shape else None
    )  # of a tied one, each looks at its own
    return select(checkpoint, {name: tuple(shape) for name, shape in shapes.items()}, mine).read


def finite(name: str, rows: Tensor) -> Tensor:
    if rows.numel() and not rows.isfinite().all():
        warnings.warn(f"{name} holds NaN or infinite numbers", stacklevel=2)
    return rows


def base_shapes(model: nn.Module) -> dict[str, torch.Size]:
    """The names and shapes of a model's weights in its checkpoint, with whatever adapters and packing are on it."""
    own = (".lora_", ".quantized.")
    shapes = {name: p.shape for name, p in model.named_parameters() if not any(part in name for part in own)}
    packed = {path: layer.quantized for path, layer in adapted(model).items() if layer.quantized is not None}
    return shapes | {f"{path}.weight": torch.Size(held.shape) for path, held in packed.items()}
