"""Several processes on one job, started by torchrun: they agree, wait for each other and have a GPU each."""

from __future__ import annotations

import atexit
import os
from datetime import timedelta
from types import ModuleType


def of_first(choice: int, world: int) -> int:
    """The first rank's choice, on all ranks."""
    if world == 1:
        return choice
    import torch

    choice_1 = torch.tensor([choice])
    joined().broadcast(choice_1, src=0)
    return int(choice_1)


def barrier(world: int) -> None:
    """Wait for the other processes. Raises RuntimeError if one has ended."""
    if world > 1:
        import torch

        joined().all_reduce(torch.zeros(1))


def joined() -> ModuleType:
    """torch.distributed, with torchrun's process group and this rank's GPU initialized, once. The timeout is long
    because ranks with fewer notes wait for the others."""
    import torch
    import torch.distributed as dist

    if not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
        dist.init_process_group("gloo", timeout=timedelta(days=7))
        atexit.register(dist.destroy_process_group)
    return dist
