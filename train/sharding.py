"""Ranks and sharding: nothing on one process, FSDP2 (`fully_shard`) under torchrun.

Each decoder block is a group of its own, gathered for its forward and backward pass and let go again; the embedding,
the last norm and the head are the root's group. Gradients of ranks are added, not averaged: the loss is already
divided by the whole step's token count (loss.py). FSDP2 divides by the number of ranks unless told otherwise, group
by group, so every group is told.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class Ranks:
    """This process among the run's processes. gloo on a CPU, nccl on GPUs."""

    rank: int = 0
    world: int = 1
    device: torch.device = torch.device("cpu")

    @classmethod
    def join(cls, device: str) -> Ranks:
        """Join torchrun's process group where there is one; choose the device."""
        kind = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        world = int(os.environ.get("WORLD_SIZE", "1"))
        local = int(os.environ.get("LOCAL_RANK", "0"))
        where = torch.device(kind, local) if kind == "cuda" else torch.device(kind)
        if where.type == "cuda":
            torch.cuda.set_device(where)
        if world > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if where.type == "cuda" else "gloo")
        return cls(dist.get_rank() if world > 1 else 0, world, where)

    @property
    def first(self) -> bool:
        return self.rank == 0

    def wait(self) -> None:
        if self.world > 1:
            dist.barrier()

    def any(self, flag: bool) -> bool:
        """Whether some rank's flag is set; the same answer on all."""
        if self.world == 1:
            return flag
        return bool(sum_over_ranks(torch.tensor(float(flag), device=self.device)) > 0)

    def sync_gradients(self, model: nn.Module, last: bool) -> None:
        """Reduce gradients over ranks in the last micro-batch of a step only."""
        if self.world > 1:
            model.set_requires_gradient_sync(last)


def shard(model: nn.Module, ranks: Ranks) -> nn.Module:
    """Shard every parameter over the ranks, in place. Compute stays in each parameter's dtype; sums are ≥ fp32."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(ranks.device.type, (ranks.world,))
    wide = torch.promote_types(next(model.parameters()).dtype, torch.float32)
    policy = MixedPrecisionPolicy(reduce_dtype=wide)
    for block in model.model.layers:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # else fp32 asks for a scaled sum, which gloo has not
    return model


def sum_over_ranks(value: Tensor) -> Tensor:
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(value)
    return value
