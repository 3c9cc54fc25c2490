"""Tensor parallelism with torch's DTensor; each rank reads only its own shard of the files.

    torchrun --nproc-per-node 8 -m infer.extract --tensor-parallel 8 …

In attention and in the MLP, the first projections are sharded by outputs (heads, hidden units) and the last by inputs,
so a block needs two all-reduces (arXiv 1909.08053, section 3):

    q k v, gate up    y_r = x · W_rᵀ           each rank has its heads, its units      (ColwiseParallel)
    o, down           y = Σ_r x_r · W_rᵀ       all-reduce                              (RowwiseParallel)

Embedding, norms and output matrix are replicated, so all ranks compute the same logits and choose the same tokens.
Adapters are merged while the weights are read.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Sequence
from datetime import timedelta
from functools import cache
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

from infer.engine.load import DTYPES, merged_checkpoint
from model import ModelConfig, Tokenizer, Transformer
from model.checkpoints.weights import Checkpoint, select
from model.support.cli import UserError

OUTPUTS, INPUTS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "w1", "w3"), ("o_proj", "down_proj", "w2")


def join() -> None:
    """Initializes torchrun's process group, once; each rank gets a GPU if there are any. The timeout is long because
    ranks with fewer notes wait for the others."""
    if dist.is_initialized():
        return
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, timeout=timedelta(days=7))
    atexit.register(dist.destroy_process_group)


def wait() -> None:
    """Barrier over all ranks."""
    join()
    dist.all_reduce(torch.zeros(1))


def of_first(choice: int, together: int = 0) -> int:
    """Broadcasts the first rank's choice to all ranks; with `together`, within each group of that many ranks that hold
    one model."""
    join()
    held, group = torch.tensor(int(choice)), model_mesh(together).get_group() if together else None
    dist.broadcast(held, group=group, group_src=0)
    return int(held)


@cache
def model_mesh(size: int) -> DeviceMesh:
    """The mesh of this rank and the `size` − 1 adjacent ones that hold one model."""
    join()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape = (dist.get_world_size() // size, size)
    return init_device_mesh(device, shape, mesh_dim_names=("notes", "model"))["model"]


def check_divides(config: ModelConfig, size: int) -> None:
    """Raises UserError if `size` ranks cannot share heads and hidden units evenly."""
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        if getattr(config, name) % size:
            raise UserError(f"--tensor-parallel {size} does not divide the model's {name}, {getattr(config, name)}")


def shard(model: Transformer, mesh: DeviceMesh) -> Transformer:
    """Shards the blocks' linear layers over the mesh, in place; the model may be on meta. Returns the model."""
    check_divides(model.config, mesh.size())
    for block in model.model.layers:
        plan: dict[str, ParallelStyle] = {}
        for path, module in block.named_modules():
            leaf = path.rpartition(".")[2]
            if isinstance(module, nn.Linear) and leaf in OUTPUTS + INPUTS:
                plan[path] = ColwiseParallel() if leaf in OUTPUTS else RowwiseParallel()
        parallelize_module(block, mesh, plan, src_data_rank=None)
    return model


def load_parallel(
    weights: str | Path, adapters: Sequence[str | Path], dtype: str, size: int
) -> tuple[Transformer, Tokenizer]:
    """This rank's shard of a model on `size` ranks, with adapters merged in the order given, and the tokenizer.

    Raises UserError for files that are missing or belong to another model.
    """
    kind, mesh = DTYPES[dtype], model_mesh(size)
    tokenizer = Tokenizer.from_pretrained(weights)
    with torch.device("meta"):
        model = Transformer(ModelConfig.from_pretrained(weights))
    checkpoint = merged_checkpoint(model, weights, adapters, kind)
    checkpoint = select(checkpoint, {name: tuple(p.shape) for name, p in model.named_parameters()})
    shard(model, mesh)
    device = torch.device(mesh.device_type)
    for name, parameter in list(model.named_parameters()):
        path, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(path), leaf, read_shard(checkpoint, name, parameter, kind, device))
    return model.requires_grad_(False).eval(), tokenizer


def read_shard(
    checkpoint: Checkpoint, name: str, parameter: Tensor, dtype: torch.dtype, device: torch.device
) -> nn.Parameter:
    """This rank's shard of one tensor as a DTensor (an unsharded one whole), read a few megabytes at a time."""
    shape = list(checkpoint.tensors[name].shape)
    part = [slice(0, size) for size in shape]
    if isinstance(parameter, DTensor):
        (placement,) = parameter.placements
        if isinstance(placement, Shard):
            size = shape[placement.dim] // parameter.device_mesh.size()
            start = parameter.device_mesh.get_local_rank() * size
            part[placement.dim] = slice(start, start + size)
    local = torch.empty([s.stop - s.start for s in part], dtype=dtype, device=device)
    for rows, chunk in checkpoint.stream(name):
        begin, end = max(rows.start, part[0].start), min(rows.stop, part[0].stop)
        if begin < end:
            inside = (slice(begin - rows.start, end - rows.start), *part[1:])
            local[begin - part[0].start : end - part[0].start].copy_(chunk[inside])
    if isinstance(parameter, DTensor):
        local = DTensor.from_local(local, parameter.device_mesh, parameter.placements, run_check=False)
    return nn.Parameter(local, requires_grad=False)
