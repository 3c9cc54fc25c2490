"""Which of torchrun's processes this one is."""

import os

from model.support.cli import UserError


def rank_and_world() -> tuple[int, int]:
    """(rank, number of processes) as torchrun sets them, else (0, 1). Raises UserError for values that are none."""
    rank, world = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    if not (rank.isdecimal() and world.isdecimal() and int(rank) < int(world)):
        given = f"RANK={rank}, WORLD_SIZE={world} in the environment"
        raise UserError(f"{given}: not a rank of a world; torchrun sets both, else unset them")
    return int(rank), int(world)
