"""Several processes on one job, started by torchrun: each has a rank and, if there are any, a GPU."""

from __future__ import annotations

import os

from model.support.cli import UserError


def ranks() -> tuple[int, int]:
    """(rank, number of processes) as torchrun sets them. Raises UserError for values that are none."""
    given = {name: os.environ.get(name, default) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"))}
    rank, world = (int(text) if text.isdecimal() else -1 for text in given.values())
    if not 0 <= rank < world:
        values = ", ".join(f"{name}={text}" for name, text in given.items())
        raise UserError(f"{values} in the environment: not a rank of a world; torchrun sets both, else unset them")
    return rank, world


def of_first(choice: int, world: int) -> int:
    """The first rank's choice, on all ranks."""
    if world == 1:
        return choice
    import torch
    import torch.distributed as dist

    join()
    choice_1 = torch.tensor([choice])
    dist.broadcast(choice_1, src=0)
    return int(choice_1)


def barrier(world: int) -> None:
    """Wait for the other processes. Raises RuntimeError if one has ended."""
    if world > 1:
        import torch
        import torch.distributed as dist

        join()
        dist.all_reduce(torch.zeros(1))


def join() -> None:
    """Initializes torchrun's process group and this rank's GPU, once. The timeout is long because ranks with fewer
    notes wait for the others."""
    import atexit
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    if dist.is_initialized():
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    dist.init_process_group("gloo", timeout=timedelta(days=7))
    atexit.register(dist.destroy_process_group)
