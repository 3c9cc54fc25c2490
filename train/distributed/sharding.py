"""Ranks and sharding: FSDP2 (`fully_shard`) under torchrun, and on one process for bf16 training with fp32 masters.

Each decoder block is an FSDP group, gathered for its forward and backward pass and freed again; embedding, final norm
and head form the root's group. Gradients are summed over ranks, not averaged, because the loss is already divided by
the step's global token count (loss.py); FSDP2 divides by the number of ranks by default, so its factor is set to 1.
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
from model.support.torchrun import rank_and_world
from model.transformer import Transformer

Result = TypeVar("Result")
BACKEND = {"cpu": "gloo", "cuda": "nccl"}
TIMEOUT = timedelta(days=1)  # other ranks wait while the first one tokenises, merges or writes


@dataclass(frozen=True)
class Ranks:
    """This process's rank, the number of ranks, and its device."""

    rank: int = 0
    world: int = 1
    device: torch.device = torch.device("cpu")
    cpu_group: Any = None  # gloo group for barriers and Python objects, whatever the device

    @classmethod
    def join(cls, device: str) -> Ranks:
        """Chooses the device, and joins torchrun's process group if there is one. Raises UserError if the environment's
        rank is none, or if there are fewer GPUs than processes."""
        kind = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        rank, world = rank_and_world()
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        local_world, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
        if kind == "cuda" and local_world > gpus:
            raise UserError(
                f"device cuda: {local_world} processes on this machine, where torch can use {gpus} GPUs; start "
                "one process a GPU, or take --device cpu"
            )
        chosen = torch.device(kind, local_rank) if kind == "cuda" else torch.device(kind)
        if chosen.type == "cuda":
            torch.cuda.set_device(chosen)
        if world > 1 and not dist.is_initialized():
            dist.init_process_group(BACKEND[chosen.type])
        if world == 1:
            return cls(0, 1, chosen)
        return cls(rank, world, chosen, dist.new_group(backend="gloo", timeout=TIMEOUT))

    @property
    def first(self) -> bool:
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, on every rank (all-gather of Python objects)."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value, group=self.cpu_group)
        return values

    def run_on_all(self, work: Callable[[], Result]) -> Result:
        """Runs `work()` on every rank. A UserError or OSError on one is raised on all, so that none waits for ever.

        `work` must not communicate with other ranks.
        """
        result, message = None, None
        try:
            result = work()
        except (UserError, OSError) as error:
            if self.world == 1:
                raise
            message = one_line(error)
        failed = [(rank, text) for rank, text in enumerate(self.gather(message)) if text]
        if failed:
            rank, text = failed[0]
            raise UserError(text if rank == 0 else f"on rank {rank}: {text}")
        return result  # type: ignore[return-value]

    def run_on_first(self, work: Callable[[], Result]) -> Result | None:
        """Runs `work()` on the first rank only. Returns its result there and None elsewhere; errors as run_on_all."""
        return self.run_on_all(lambda: work() if self.first else None)

    def of_first(self, work: Callable[[], Result]) -> Result:
        """Runs `work()` on the first rank only and returns its result on every rank; errors as run_on_all."""
        return self.gather(self.run_on_first(work))[0]

    def assert_same(self, mine: dict[str, Any]) -> None:
        """Raises UserError on every rank, naming the differences, unless all ranks pass the same dict."""
        first, *others = self.gather(mine)
        for rank, theirs in enumerate(others, start=1):
            if changed := differences(first, theirs, names=("on rank 0", f"on rank {rank}")):
                raise UserError(f"ranks disagree: {'; '.join(changed)}. Start all of them with one recipe and one code")

    def rows(self, count: int) -> slice:
        """This rank's part of `count` rows, as FSDP2 shards them: chunks of ⌈count / ranks⌉, the last ones shorter."""
        chunk = -(-count // self.world)
        return slice(min(self.rank * chunk, count), min((self.rank + 1) * chunk, count))

    def any(self, flag: bool) -> bool:
        """True on all ranks if the flag is set on any."""
        if self.world == 1:
            return flag
        return bool(sum_over_ranks(torch.tensor(float(flag), device=self.device)) > 0)


def shard(model: Transformer, ranks: Ranks, compute: torch.dtype | None = None) -> Transformer:
    """Shards every parameter over the ranks, in place. Gradients are reduced in at least fp32.

    `compute`: the dtype in which parameters are gathered (None: their own). With fp32 parameters and compute = bf16 the
    shards are the fp32 masters of mixed precision, on one process too: optimizer, checkpoint and accumulated gradients
    are fp32.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    if not dist.is_initialized():  # without torchrun: a group of one process
        dist.init_process_group(BACKEND[ranks.device.type], store=dist.HashStore(), rank=0, world_size=1)
    mesh = init_device_mesh(ranks.device.type, (ranks.world,))
    wide = torch.promote_types(next(model.parameters()).dtype, torch.float32)
    policy = MixedPrecisionPolicy(compute, reduce_dtype=wide)
    for block in model.model.layers:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    # reshard the root too: by default it stays gathered after a forward pass without backward (the held-out loss),
    # and a checkpoint needs the shards
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no scaled sum
    return model


def sum_over_ranks(value: Tensor) -> Tensor:
    """All-reduces `value` in place (sum); a no-op on one process."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(value)
    return value


def add_gradients(params: Iterable[Tensor], ranks: Ranks) -> None:
    """All-reduces the gradients of replicated parameters (FSDP2 reduces those of sharded ones)."""
    replicated = [param for param in params if not hasattr(param, "device_mesh")]
    if ranks.world == 1 or not replicated:
        return
    grads = [torch.zeros_like(param) if param.grad is None else param.grad for param in replicated]
    sum_M = sum_over_ranks(torch.cat([grad.flatten() for grad in grads]))
    for param, part in zip(replicated, sum_M.split([param.numel() for param in replicated]), strict=True):
        param.grad = part.view_as(param)


def local(tensor: Tensor) -> Tensor:
    """This rank's rows of a sharded tensor, sharing its memory; other tensors unchanged (detached)."""
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
    """The differences between two nested dicts, each as "key was a, is b". `at`: prefix of the keys."""
    texts = []
    for key in sorted(old.keys() | new.keys()):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            texts += differences(a, b, f"{at}{key}.", names)
        elif a != b:
            texts.append(f"{at}{key} {names[0]} {a!r}, {names[1]} {b!r}")
    return texts
