"""Ranks and sharding: FSDP2 (`fully_shard`) under torchrun, and on one process where there are fp32 masters.

Each decoder block is a group of its own, gathered for its forward and backward pass and freed again; the embedding,
the last norm and the head are the root's group. Gradients of ranks are added, not averaged: the loss is already
divided by the whole step's token count (loss.py). FSDP2 divides by the number of ranks unless it is set
otherwise, so the factor is set to 1 on every group.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from model.support.cli import UserError, one_line
from model.transformer import Transformer

Made = TypeVar("Made")
BACKEND = {"cpu": "gloo", "cuda": "nccl"}
PATIENCE = timedelta(days=1)  # how long ranks wait while the first one tokenises, merges or writes


@dataclass(frozen=True)
class Ranks:
    """This process among the run's processes. gloo on a CPU, nccl on GPUs."""

    rank: int = 0
    world: int = 1
    device: torch.device = torch.device("cpu")
    cpu_group: Any = None  # a process group for waiting and for small messages, on CPUs whatever the device

    @classmethod
    def join(cls, device: str) -> Ranks:
        """Join torchrun's process group where there is one; choose the device."""
        kind = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        world = int(os.environ.get("WORLD_SIZE", "1"))
        local = int(os.environ.get("LOCAL_RANK", "0"))
        beside, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
        if kind == "cuda" and beside > gpus:
            raise UserError(
                f"device cuda: {beside} processes on this machine, where torch can use {gpus} GPUs; start "
                "one process a GPU, or take --device cpu"
            )
        where = torch.device(kind, local) if kind == "cuda" else torch.device(kind)
        if where.type == "cuda":
            torch.cuda.set_device(where)
        if world > 1 and not dist.is_initialized():
            dist.init_process_group(BACKEND[where.type])
        if world == 1:
            return cls(0, 1, where)
        return cls(dist.get_rank(), world, where, dist.new_group(backend="gloo", timeout=PATIENCE))

    @property
    def first(self) -> bool:
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, on every rank."""
        if self.world == 1:
            return [value]
        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, value, group=self.cpu_group)
        return found

    def run_on_all(self, work: Callable[[], Made]) -> Made:
        """`work()` on every rank. A user's mistake on one of them is raised on all, so that none waits for ever.

        `work` must not itself wait for other ranks.
        """
        made, wrong = None, None
        try:
            made = work()
        except (UserError, OSError) as error:
            if self.world == 1:
                raise
            wrong = one_line(error)
        found = [(rank, text) for rank, text in enumerate(self.gather(wrong)) if text]
        if found:
            rank, text = found[0]
            raise UserError(text if rank == 0 else f"on rank {rank}: {text}")
        return made  # type: ignore[return-value]

    def run_on_first(self, work: Callable[[], Made]) -> Made | None:
        """`work()` on the first rank alone (None on others); a user's mistake there is raised on all."""
        return self.run_on_all(lambda: work() if self.first else None)

    def of_first(self, work: Callable[[], Made]) -> Made:
        """What `work()` gives on the first rank, on every rank; a user's mistake there is raised on all."""
        return self.gather(self.run_on_first(work))[0]

    def assert_same(self, mine: dict[str, Any]) -> None:
        """Raise a UserError on every rank where one of them runs something else than the first."""
        first, *others = self.gather(mine)
        for rank, theirs in enumerate(others, start=1):
            if changed := differences(first, theirs, names=("on rank 0", f"on rank {rank}")):
                raise UserError(f"ranks disagree: {'; '.join(changed)}. Start all of them with one recipe and one code")

    def rows(self, count: int) -> slice:
        """This rank's rows of `count`, as FSDP2 shards them: the first ranks get one chunk each of ⌈count / ranks⌉."""
        chunk = -(-count // self.world)
        return slice(min(self.rank * chunk, count), min((self.rank + 1) * chunk, count))

    def any(self, flag: bool) -> bool:
        """Whether some rank's flag is set; the same answer on all."""
        if self.world == 1:
            return flag
        return bool(sum_over_ranks(torch.tensor(float(flag), device=self.device)) > 0)


def shard(model: Transformer, ranks: Ranks, compute: torch.dtype | None = None) -> Transformer:
    """Shard every parameter over the ranks, in place. Sums of gradients are at least fp32.

    `compute`: the dtype that parameters are gathered in (None: their own). fp32 parameters gathered in bf16 are the
    masters of mixed precision, on one process too: optimizer, checkpoint and accumulated gradients see fp32 only.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    if not dist.is_initialized():  # one process: a group of its own
        dist.init_process_group(BACKEND[ranks.device.type], store=dist.HashStore(), rank=0, world_size=1)
    mesh = init_device_mesh(ranks.device.type, (ranks.world,))
    wide = torch.promote_types(next(model.parameters()).dtype, torch.float32)
    policy = MixedPrecisionPolicy(compute, reduce_dtype=wide)
    for block in model.model.layers:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    # the root too, which FSDP2 else leaves gathered after a held-out loss, where a checkpoint needs its shards
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # else fp32 asks for a scaled sum, which gloo has not
    return model


def sum_over_ranks(value: Tensor) -> Tensor:
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(value)
    return value


def add_gradients(params: Iterable[Tensor], ranks: Ranks) -> None:
    """Add up the gradients of parameters that every rank holds whole; FSDP2 adds those of sharded ones."""
    held = [param for param in params if not hasattr(param, "device_mesh")]
    if ranks.world == 1 or not held:
        return
    grads = [torch.zeros_like(param) if param.grad is None else param.grad for param in held]
    sum_M = sum_over_ranks(torch.cat([grad.flatten() for grad in grads]))
    for param, part in zip(held, sum_M.split([param.numel() for param in held]), strict=True):
        param.grad = part.view_as(param)


def local(tensor: Tensor) -> Tensor:
    """This rank's rows of a sharded tensor, in its own memory; others as they are."""
    tensor = tensor.detach()
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def rows_of(param: Tensor, count: int) -> slice:
    """This rank's rows of a tensor of `count` rows that is sharded as `param` is."""
    if not hasattr(param, "device_mesh"):
        return slice(0, count)
    return Ranks(param.device_mesh.get_local_rank(), param.device_mesh.size()).rows(count)


def sharded_like(rows: Tensor, param: Tensor, shape: Sequence[int]) -> Tensor:
    """A tensor of `shape` whose first dimension is sharded as `param`'s is, from this rank's rows."""
    if not hasattr(param, "device_mesh"):
        return rows
    from torch.distributed.tensor import DTensor

    assert isinstance(param, DTensor)
    strides = torch.empty(tuple(shape), device="meta").stride()
    return DTensor.from_local(
        rows, param.device_mesh, param.placements, run_check=False, shape=torch.Size(shape), stride=strides
    )


def differences(
    old: dict[str, Any], new: dict[str, Any], at: str = "", names: tuple[str, str] = ("was", "is")
) -> list[str]:
    """What differs between two nested dicts, as "key was a, is b"."""
    found = []
    for key in sorted(old.keys() | new.keys()):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += differences(a, b, f"{at}{key}.", names)
        elif a != b:
            found.append(f"{at}{key} {names[0]} {a!r}, {names[1]} {b!r}")
    return found
