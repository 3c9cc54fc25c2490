"""The benchmark of decoding on the smallest shapes, and what a row's ratio means."""

import pytest

from eval.bench.decode import SHORT, compare, ours_once, past_the_window
from eval.bench.models import generator_of, read_bytes
from eval.bench.row import Row
from eval.bench.seven_b import SHAPE
from model import ModelConfig, Transformer
from model.quantize.linear import quantize_model
from model.support.files import read_json
from model.support.init import init_weights


class NoText:
    stop_ids, vocab_size = (), 0

    def decode(self, ids):
        return ""


def model():
    config = ModelConfig.from_dict({**SHORT, "num_hidden_layers": 1})
    return init_weights(Transformer(config), 0).requires_grad_(False).eval()


@pytest.mark.slow
def test_a_row_for_every_format_and_peer():
    pytest.importorskip("transformers", reason="needs transformers: make test installs it")
    models = {"fp32": model(), "bf16": model().bfloat16(), "int4": quantize_model(model(), "int4")}
    rows = compare("tiny", models, NoText(), {"constant": lambda: 1.0}, [5, 6, 7], 4, 1)
    assert [(row.name.split()[-1], row.peer_name.split()[0]) for row in rows] == [
        (form, peer) for form in models for peer in ("transformers", "constant")
    ]
    assert rows[2].limit == pytest.approx(2 * rows[0].limit)  # bf16 reads half of fp32's bytes
    assert all(row.ours > 0 and row.share_of_limit == row.ours / row.limit for row in rows)


@pytest.mark.parametrize(
    ("unit", "less"),
    [
        ("ms a pair", True),
        ("MB", True),
        ("s to the first token", True),
        ("tokens/s", False),
        ("GB/s", False),
        ("average F1", False),
    ],
)
def test_a_ratio_above_one_is_better_in_every_unit(unit, less):
    good, bad = (1.0, 4.0) if less else (4.0, 1.0)
    assert Row("x", good, bad, "peer", unit, "").ratio == 4 and Row("x", bad, good, "peer", unit, "").ratio == 1 / 4
    assert Row("x", bad, None, None, unit, "", limit=good).share_of_limit == 1 / 4
    assert Row("x", 1.0, None, None, unit, "").as_dict()["ratio"] is None


def test_past_the_window_and_bytes():
    assert past_the_window(NoText(), window=16, new=140).ours > 0
    assert ours_once(generator_of(model(), NoText(), lookup=False), [[1, 2, 3], [1, 2, 4]], 3) > 0
    seven_b = ModelConfig.from_dict(read_json(SHAPE))
    assert read_bytes(seven_b, "fp32") == 4 * (32 * 218_103_808 + 32_000 * 4096)
    assert 7.110e9 * 4.5 / 8 == pytest.approx(read_bytes(seven_b, "int4"), rel=1e-3)


def test_steps_of_several_rows_are_held_against_our_own_fp32_and_the_fastest_peer():
    models, peers = {"fp32": model(), "int4": model()}, {"slow": lambda: 1.0, "fast": lambda: 20.0}
    rows = compare("tiny", models, NoText(), peers, [1, 2, 3], 2, 1, size=2)
    named = [(row.name.split()[-1], row.peer_name) for row in rows]
    assert named == [("fp32", "fast"), ("int4", "ours, fp32"), ("int4", "fast")]
    assert all(row.ours > 0 and row.limit is None for row in rows)
    assert rows[0].peer == rows[2].peer == 20 and rows[1].peer == rows[0].ours
