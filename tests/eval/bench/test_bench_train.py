"""The training benchmark on its smallest shape: both sides do the same work, and every row has figures."""

import pytest

from eval.bench import train


@pytest.mark.slow
@pytest.mark.parametrize("base", ["", "nf4"])
@pytest.mark.parametrize("kind", ["plain", "records"])
def test_each_side_begins_with_the_same_loss(kind, base, tmp_path):
    """The same weights and rows: in fp32 the losses are equal, over NF4 (bitsandbytes' and ours) too."""
    pytest.importorskip("peft", reason="needs peft: make test installs it")
    if base:
        pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: make test installs it")
    train.save_base("tiny", tmp_path)
    asked = {
        "kind": kind,
        "size": "tiny",
        "steps": 1,
        "r": 4,
        "folder": str(tmp_path),
        "base": base,
        "dtype": "float32",
        "threads": 1,
    }
    sides = train.SIDES[kind]
    found = {who: train.job(who, **asked) for who in sides}
    assert all(abs(side["loss"] - found["peft"]["loss"]) < 1e-5 * found["peft"]["loss"] for side in found.values())
    rows = train.compared(found, asked)
    assert all(row.ours > 0 and row.ratio > 0 for row in rows)
    assert {row.name.split(": ")[1] for row in rows} >= {"speed", "memory"}
