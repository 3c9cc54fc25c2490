"""From generated tokens to a record: values with their log-probabilities, why an answer ended, windows merged."""

import pytest
import torch
from answering_models import tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

from infer.answers import phenotype_record
from infer.ask import Asker, Limits, merge
from infer.generate import Generation, Generator
from infer.notes import Note
from model.command import UserError

NOTE = "Left breast, 2.5 cm; the right one is clear. 2.5  CM again"


def said(text, tokenizer):
    """A generation of this text, its n-th token of log-probability −n²."""
    tokens = tokenizer.encode(text)
    return Generation(text, tokens, [-float(n * n) for n in range(len(tokens))], "stop")


def record(text, tokenizer):
    return phenotype_record(said(text, tokenizer), NOTE, tokenizer.decode)


def test_each_value_has_its_place_and_the_log_probability_of_its_own_tokens(tokenizer):
    text = " left, 2.5 cm, 3 cm, left"
    found = record(text, tokenizer)
    assert [(a["text"], a["start"], a["end"]) for a in found["answers"]] == [
        ("left", 0, 4), ("2.5 cm", 13, 19), ("3 cm", None, None)]  # fmt: skip
    assert not found["not_relevant"] and "raw" not in found
    out, spelt = said(text, tokenizer), 0
    expected = dict.fromkeys(("left", "2.5 cm", "3 cm"), 0.0)
    for token, logprob in zip(out.tokens, out.logprobs, strict=True):  # no token spells parts of two values here
        begin, spelt = spelt, spelt + len(tokenizer.decode([token]))
        for value in expected:
            start = text.index(value)
            if begin < start + len(value) and spelt > start:
                expected[value] += logprob
    assert {a["text"]: a["logprob"] for a in found["answers"]} == pytest.approx(expected)
    assert len(set(expected.values())) == 3


@pytest.mark.parametrize(("text", "not_relevant", "raw"), [
    (" not relevant", True, None), (" Not relevant.", True, None), ("", False, "")])  # fmt: skip
def test_no_value_is_either_not_relevant_or_nothing_said(text, not_relevant, raw, tokenizer):
    found = record(text, tokenizer)
    assert found["answers"] == [] and found["not_relevant"] == not_relevant and found.get("raw") == raw


def saying(tokenizer, token):
    """A model that says one token whatever it reads."""
    model = tiny_model()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.zero_()
        parameter = model.get_parameter("model.embed_tokens.weight")
        parameter.copy_(parameter[0].expand_as(parameter))
        model.lm_head.weight.zero_()
        model.lm_head.weight[token] = parameter[0]
    return model


@pytest.mark.parametrize(("token", "new", "reason"), [
    ("</s>", 20, "stop"), ("Ċ", 20, "stop_string"), ("x", 20, "repetition"), ("x", 7, "length")])  # fmt: skip
def test_an_answer_ends_at_the_end_token_the_next_line_or_a_cycle_and_says_why(tokenizer, token, new, reason):
    model = saying(tokenizer, tokenizer.engine.model.token_to_id(token))
    asker = Asker(Generator(model, tokenizer), "both", "template", Limits(1500, new, new))
    (found,) = asker.records([Note("n", NOTE)])
    reasons = {name: one["finish_reason"] for name, one in found["phenotypes"].items()}
    assert set(reasons.values()) == {found["diagnosis"]["finish_reason"]} == {reason}
    assert "\n" not in found["diagnosis"]["text"]


@settings(deadline=None, max_examples=60)
@given(pieces=st.lists(st.text("ab é漢.\n", min_size=1, max_size=4), min_size=25, max_size=150),
       limit=st.integers(70, 200))  # fmt: skip
def test_windows_hold_all_of_a_long_note_overlap_and_keep_to_the_limit(pieces, limit, tokenizer):
    text = "".join(f"{number}{piece}" for number, piece in enumerate(pieces))  # no window stands at two places
    asker = Asker(Generator(tiny_model(), tokenizer), "diagnosis", "template", Limits(limit, 5, 5), "windows")
    asked = asker.questions(Note("n", text))
    try:
        parts = [part.text for part in asker.parts(Note("n", text))]
    except UserError as error:
        assert "leaves no room" in str(error)
        return
    assert all(len(asker.prompt(part, *asked[0])) <= limit for part in parts)
    read = 0  # characters of the note that the windows so far have read
    for number, part in enumerate(parts):
        assert text.count(part) == 1 and text.index(part) <= read - (number > 0)
        read = text.index(part) + len(part)
    assert read == len(text)
    asker.long = "truncate"
    (short,) = asker.parts(Note("n", text))
    assert text.startswith(short.text) and (len(parts) > 1) == (short.done is not None)
    asker.long = "error"
    if len(parts) > 1:
        with pytest.raises(UserError, match="too long by"):
            asker.parts(Note("n", text))


def window(*values, not_relevant=False, reason="stop"):
    answers = [{"text": text, "start": 0, "end": 1, "logprob": logprob} for text, logprob in values]
    return {"answers": answers, "not_relevant": not_relevant, "finish_reason": reason}


def test_windows_are_merged_each_value_once_with_its_best_probability():
    found = merge([window(("left", -2.0)), window(not_relevant=True), window(("right", -1.0), ("left", -0.5))])
    assert [(a["text"], a["logprob"]) for a in found["answers"]] == [("left", -0.5), ("right", -1.0)]
    assert not found["not_relevant"]
    assert merge([window(not_relevant=True)] * 2)["not_relevant"]
    assert not merge([window(not_relevant=True), window()])["not_relevant"]  # one window said nothing at all
    assert merge([window(not_relevant=True)]) == window(not_relevant=True)
