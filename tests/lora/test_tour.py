"""The adapter's tour: every number worked by hand is the program's, and a wrong layer is told."""

import pytest

from lora import LoRAConfig, tour
from model.support.cli import UserError


def test_every_number_worked_by_hand_is_the_programs(capsys):
    assert tour.main(tour.Options()) == 0
    assert "lora/layer.py:" in capsys.readouterr().out


def test_another_layer_and_rank():
    seen = tour.prepare(tour.Options(module="model.layers.2.mlp.down_proj", r=3, alpha=4.0))
    hands = [hand for step in tour.steps(seen) for hand in step.hand]
    assert len(hands) >= 6 and all(hand.ok for hand in hands)


def test_a_layer_that_scales_otherwise_is_told(capsys, monkeypatch):
    monkeypatch.setattr(LoRAConfig, "scale", lambda self, path: self.alpha)
    assert tour.main(tour.Options()) == 1
    assert "α / R" in capsys.readouterr().err


def test_a_layer_that_is_not_there_is_refused():
    with pytest.raises(UserError):
        tour.main(tour.Options(module="model.layers.9.self_attn.q_proj"))
    with pytest.raises(UserError, match="whole name"):
        tour.main(tour.Options(module="q_proj"))
