"""Comparing runs, and bits per byte of a model that can be worked out by hand."""

import math

import pytest
import torch
from answering_models import tiny_model

from eval.compare import changes
from eval.perplexity import measure, read_texts, windows
from eval.questions import Question
from model.support.cli import UserError


def asked(*answers, gold="2 cm"):
    return [Question(f"n{i}", f"p{i}", "tumor_size", (gold,), (said,)) for i, said in enumerate(answers)]


def test_changes_name_what_turned_right_and_wrong():
    (row,) = changes(asked("2 cm", "9 cm", "9 cm", "2 cm"), asked("20 mm", "2 cm", "8 cm", "1 cm"))
    assert (row["mean_a"], row["mean_b"], row["better"], row["worse"], row["n"]) == (50, 50, 1, 1, 4)
    assert [(one["record"], one["now"]) for one in row["changed"]] == [("n1", "right"), ("n3", "wrong")]


def test_runs_on_different_data_are_refused():
    with pytest.raises(UserError, match="n0: the two runs have different right answers"):
        changes(asked("2 cm"), asked("2 cm", gold="3 cm"))


@pytest.mark.parametrize(("length", "block"), [(7, 4), (1000, 64), (5, 100), (2, 2), (9, 3), (30, 2)])
def test_every_token_is_predicted_once(length, block):
    cut = list(windows(length, block))
    assert [i for start, scored, end in cut for i in range(scored, end)] == list(range(1, length))
    assert all(start < scored < end <= start + block for start, scored, end in cut)


class Bytes:
    """A byte is a token; 256 begins a document."""

    bos_id = 256

    def encode(self, text, bos=False):
        return [256] * bos + list(text.encode())


@pytest.fixture
def model():
    return tiny_model(dtype=torch.float32, vocab_size=257)


def test_a_model_that_knows_nothing_needs_the_vocabularys_bits(model):
    with torch.no_grad():
        model.lm_head.weight.zero_()
    result = measure(model, Bytes(), ["h\u00e9llo", "x"])
    assert result.bits_per_byte == pytest.approx(math.log2(257)) and result.perplexity == pytest.approx(257)
    assert (result.documents, result.tokens, result.bytes) == (2, 7, 7)


def test_windows_change_little_and_one_window_is_the_definition(model):
    text = "Left breast mass, 2.5 cm. " * 4
    ids = torch.tensor([Bytes().encode(text, bos=True)])
    with torch.no_grad():
        logp = torch.log_softmax(model(ids)[0, :-1].double(), -1).gather(1, ids[0, 1:, None]).sum()
    assert measure(model, Bytes(), [text], block=512).nats == pytest.approx(-float(logp))
    assert measure(model, Bytes(), [text], block=16).nats == pytest.approx(-float(logp), rel=0.05)


def test_texts_are_read_and_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    assert read_texts(tmp_path / "a.jsonl", 1) == ["one"]
    (tmp_path / "b.jsonl").write_text('{"text": 3}\n')
    with pytest.raises(UserError, match="b.jsonl:1: 'text' is not text"):
        read_texts(tmp_path / "b.jsonl")
