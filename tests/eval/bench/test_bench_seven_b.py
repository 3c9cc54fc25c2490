"""The benchmark of a 7B model, on a tiny one: the planned format, then w8a8 within its own memory against it."""

import sys

import pytest

from eval.bench.decode import SHORT
from eval.bench.seven_b import rows
from model.support.files import write_json
from model.support.hardware import int8_products


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is read as Linux reports it")
@pytest.mark.skipif(not int8_products(), reason="this processor has no fast int8 GEMM")
def test_w8a8_is_measured_against_the_planned_format(tmp_path):
    pytest.importorskip("mistral_common", reason="needs mistral-common (the parity extra)")
    write_json(tmp_path / "config.json", {**SHORT, "vocab_size": 32000})
    found = rows(1, 40, 4, memory="2GB", w8a8="3GB", config=tmp_path / "config.json")
    names = [f"{name}, {form}" for form in ("wide", "w8a8") for name in ("peak resident memory", "decode", "prefill")]
    assert [row.name for row in found] == names
    assert [row.peer for row in found[1:]] == [None, None, *(row.ours for row in found[:3])]
    assert [row.peer_name for row in found] == ["the paper's GPU memory", None, None, *["ours, wide"] * 3]
    assert found[3].limit < found[0].limit and found[5].limit is None
