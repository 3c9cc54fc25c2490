"""The benchmark of rotations: unrounded weights rotate without an error, rounded ones have one in every row."""

from answering_models import write_model

from eval.bench.rotation import BASES, WAYS, rows


def test_every_way_is_measured_on_the_same_notes(tmp_path):
    weights = write_model(tmp_path / "model", hidden_size=64, intermediate_size=128, head_dim=16)
    made = rows(str(weights), notes=1)
    found = {row.name.removeprefix("logits: "): row for row in made[: len(WAYS)]}
    assert list(found) == list(WAYS)
    assert [row.name for row in made[len(WAYS) :]] == [f"adapter's gradients: {name}" for name in BASES]
    fp32, bf16, int8, nf4 = (row.ours for row in made[len(WAYS) :])
    assert 0 < fp32 < 1e-3 and 0.01 < bf16 < int8 < 20 and int8 < nf4 < 100
    assert found.pop("rotated, fp32").ours < 1e-3
    assert all(0.05 < row.ours < 50 and row.peer_name == "int8 weights" for row in found.values())
    assert found["int8"].ratio == 1 and found["int4-64"].ours > 3 * found["int8"].ours
