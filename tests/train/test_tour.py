"""The training step's tour: the loss by hand, a gradient by finite differences, AdamW by hand; a wrong loss is told."""

import pytest

from train import loop, tour


def test_every_number_worked_by_hand_is_the_programs(capsys):
    assert tour.main(tour.Options()) == 0
    assert "train/loop.py:" in capsys.readouterr().out


def wrong_count(model, batch, counts, note_loss=0.0):
    """The mean over the micro-batch's own targets, as a well-known trainer once had it."""
    own = {kind: int((batch.kind == kind).sum()) for kind in counts}
    return tour.batch_loss(model, batch, own, note_loss)


def wrong_gradient(model, batch, counts, note_loss=0.0):
    loss, summed = tour.batch_loss(model, batch, counts, note_loss)
    return loss * 1.001, summed


@pytest.mark.parametrize("wrong", [wrong_count, wrong_gradient])
def test_a_gradient_that_is_not_the_losss_is_told(capsys, monkeypatch, wrong):
    monkeypatch.setattr(loop, "batch_loss", wrong)
    assert tour.main(tour.Options()) == 1
    assert "One gradient, checked" in capsys.readouterr().err
