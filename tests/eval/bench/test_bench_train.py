"""The training benchmark on its smallest shape: both sides do the same work, and every row has figures."""

import pytest

from eval.bench import train

ASKED = {"size": "tiny", "r": 4, "dtype": "float32", "threads": 1}


@pytest.mark.slow
@pytest.mark.parametrize("base", ["", "nf4"])
@pytest.mark.parametrize("kind", train.SIDES)
def test_each_side_begins_with_the_same_loss(kind, base, tmp_path):
    """The same weights and rows: in fp32 the losses are equal, over NF4 (bitsandbytes' and ours) too."""
    pytest.importorskip("peft", reason="needs peft: make test installs it")
    if base:
        pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: make test installs it")
    train.save_base("tiny", tmp_path)
    losses = {who: train.start(who, kind, folder=str(tmp_path), base=base, **ASKED) for who in train.SIDES[kind]}
    assert all(abs(loss - losses["peft"]) < 1e-5 * losses["peft"] for loss in losses.values())


@pytest.mark.slow
def test_every_row_has_figures(tmp_path):
    pytest.importorskip("peft", reason="needs peft: make test installs it")
    train.save_base("tiny", tmp_path)
    how = {**ASKED, "folder": str(tmp_path), "base": ""}
    rows = train.compared(train.in_turns("records", 1, **how), {**how, "kind": "records", "steps": 1})
    assert all(row.ours > 0 and row.ratio > 0 for row in rows)
    assert [row.name for row in rows] == ["records: speed", "records: speed", "records: memory"]
