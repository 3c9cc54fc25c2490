"""A process takes its rank from torchrun's environment, and none outside its world."""

import pytest

from model.support.cli import UserError
from model.support.torchrun import rank_and_world


def test_a_process_is_the_first_of_one_unless_torchrun_says_otherwise(monkeypatch):
    assert rank_and_world() == (0, 1)
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert rank_and_world() == (2, 3)


@pytest.mark.parametrize(("rank", "world"), [("x", "2"), ("2", "2"), ("-1", "2"), ("1", ""), ("0", "0")])
def test_a_rank_that_is_none(rank, world, monkeypatch):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", world)
    with pytest.raises(UserError, match=f"RANK={rank}, WORLD_SIZE={world} in the environment: not a rank of a world"):
        rank_and_world()
