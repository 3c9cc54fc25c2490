"""Full training in bf16 updates fp32 masters: it trains as fp32 does, which plain bf16 parameters do not."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import as_recipe, mutate

from train.distributed.checkpoint import steps_saved
from train.session import train

PAPER = {"full": True, "optimizer": "adamw", "learning_rate": 2e-4, "dropout": 0.0}


def trained(options: dict, out: Path, **more) -> tuple[dict[str, torch.Tensor], float]:
    """(the trained parameters of the last checkpoint, the held-out loss)."""
    train(as_recipe({**options, **PAPER, "out": str(out), **more}), "instruct")
    last = steps_saved(out / "checkpoints")[-1]
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return load_file(last / "trainable.safetensors"), json.loads(lines[-1])["valid_loss"]


def trains_as_fp32_does(options: dict, folder: Path, expected: tuple[dict[str, torch.Tensor], float]) -> None:
    """100 steps at the paper's rate: every norm's gains move as far as in fp32, and the loss is within 0.01."""
    found, loss = trained(options, folder, dtype="bfloat16", steps=100)
    (wide, wide_loss), gains = expected, [name for name in found if "norm" in name]
    assert len(gains) == 5 and abs(loss - wide_loss) < 0.01
    for name in gains:  # all begin at 1
        moved, expected_move = (held[name].double() - 1 for held in (found, wide))
        assert expected_move.abs().max() > 2e-3
        assert (moved - expected_move).norm() < 0.05 * expected_move.norm(), name


@pytest.mark.slow
def test_bf16_with_masters_trains_as_fp32_does_and_without_does_not(options, tmp_path):
    options = options | {"save_every": 0, "valid_every": 0, "batch_rows": 1}
    expected = trained(options, tmp_path / "wide", steps=100)
    trains_as_fp32_does(options, tmp_path / "masters", expected)
    undo = mutate("train.recipe", "parameter_dtype", " if recipe.full else dtype", " if False else dtype")
    try:
        with pytest.raises(AssertionError):
            trains_as_fp32_does(options, tmp_path / "none", expected)
    finally:
        undo()


def test_masters_are_saved_in_fp32_and_the_model_in_the_recipe_s_dtype_and_a_resume_ends_with_the_same_bytes(
    options, tmp_path
):
    """The second run computes its blocks again, from the weights gathered again."""
    one, two = tmp_path / "one", tmp_path / "two"
    masters, _ = trained(options, one, dtype="bfloat16")
    trained(options, two, dtype="bfloat16", checkpoint_blocks=True)
    for path in steps_saved(two / "checkpoints")[1:]:
        shutil.rmtree(path)
    shutil.rmtree(two / "model")
    resumed, _ = trained(options, two, dtype="bfloat16", checkpoint_blocks=True)
    saved = load_file(one / "model" / "model.safetensors")
    assert {value.dtype for value in saved.values()} == {torch.bfloat16}
    for name, master in masters.items():
        assert master.dtype == torch.float32 and torch.equal(master, resumed[name])
        assert torch.equal(saved[name], master.bfloat16())
    assert any((master != master.bfloat16()).any() for master in masters.values())
    assert (one / "metrics.jsonl").read_bytes() == (two / "metrics.jsonl").read_bytes()
