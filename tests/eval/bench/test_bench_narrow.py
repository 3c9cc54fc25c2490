"""The benches of quantized weights on the smallest shapes: every row is whole, limits and ratios are numbers."""

import pytest

from eval.bench.decode import compare, generator_of, ours_once, past_the_window, read_bytes
from eval.bench.load_7b import SHAPE
from eval.bench.long import CONFIG
from model import ModelConfig, Transformer
from model.quantize.linear import quantize_model
from model.support.cli import UserError
from model.support.init import init_weights

KEYS = {"name", "ours", "peer", "peer_name", "ratio", "limit", "share_of_limit", "unit", "setting"}


class NoText:
    stop_ids, vocab_size = (), 0

    def decode(self, ids):
        return ""


def model():
    config = ModelConfig.from_dict({**CONFIG, "sliding_window": None, "num_hidden_layers": 1})
    return init_weights(Transformer(config), 0).requires_grad_(False).eval()


@pytest.mark.slow
def test_a_row_for_every_format_and_peer():
    pytest.importorskip("transformers")
    narrows, peers = {"int4": quantize_model(model(), "int4")}, {"constant": lambda: 1.0}
    rows = compare("tiny", model(), NoText(), narrows, peers, [5, 6, 7], 4, 1, "here")
    assert [(row["name"][-4:], row["peer_name"][:8]) for row in rows] == [
        ("fp32", "transfor"), ("int4", "transfor"), ("int4", "constant")]  # fmt: skip
    for row in rows:
        assert row.keys() == KEYS and row["ours"] > 0 and row["share_of_limit"] == row["ours"] / row["limit"]


def test_past_the_window_and_bytes():
    assert past_the_window(NoText(), window=16, new=140)["ours"] > 0
    assert ours_once(generator_of(model(), NoText()), [1, 2, 3], 3) > 0
    seven_b = ModelConfig.from_dict(SHAPE)
    assert read_bytes(seven_b, "fp32") == 4 * (32 * 218_103_808 + 32_000 * 4096)
    assert 7.110e9 * 4.5 / 8 == pytest.approx(read_bytes(seven_b, "int4"), rel=1e-3)


def test_narrow_weights_are_measured_on_a_demos_run_only(tmp_path):
    from eval.bench.narrow import rows

    with pytest.raises(UserError, match="make demo SCALE=nano"):
        rows(str(tmp_path))
