"""From generated tokens to a record: values with their log-probabilities, why an answer ended, windows merged."""

from dataclasses import replace

import pytest
import torch
from answering_models import tiny_model
from hypothesis import example, given, settings
from hypothesis import strategies as st

from infer import tasks
from infer.engine.generate import Generation, Generator, RequestBatch
from infer.extract.answers import SCHEMA, best_diagnosis, diagnosis_record, merge, phenotype_record, written_values
from infer.extract.ask import Answer, Asker, Limits
from infer.extract.notes import Note
from infer.extract.places import occurrences
from infer.extract.schedule import Schedule, Work
from model.support.cli import UserError

NOTE = "Left breast, 2.5 cm; the right one is clear. 2.5  CM again"


def said(text, tokenizer):
    """A generation of this text, its n-th token of log-probability −n²."""
    tokens = tokenizer.encode(text)
    return Generation(text, tokens, [-float(n * n) for n in range(len(tokens))], "stop")


def record(text, tokenizer):
    """Every value at its first place in NOTE, whatever its case."""
    places = [occurrences(value, NOTE, ignore_case=True)[:1] for value, _ in written_values(text)]
    return phenotype_record(said(text, tokenizer), places, tokenizer.decode)


def test_each_value_has_its_place_and_the_log_probability_of_its_own_tokens(tokenizer):
    text = " left; 2.5 cm; 3 cm; left"
    found = record(text, tokenizer)
    assert [(a["text"], a["start"], a["end"]) for a in found["answers"]] == [
        ("left", 0, 4),
        ("2.5 cm", 13, 19),
        ("3 cm", None, None),
    ]
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


def test_a_character_of_several_tokens_counts_with_all_of_them(tokenizer):
    """The byte-level tokenizer spells µ and 癌 in two and three tokens, of which the first decode to nothing whole."""
    for text, values in ((" 5 µ; 2", ("5 µ", "2")), (" 癌", ("癌",)), (" 癌x", ("癌x",))):
        out = said(text, tokenizer)
        spelt = [len(tokenizer.encode(value)) for value in values]
        assert sum(spelt) + (1 if len(values) == 1 else 3) == len(out.tokens)  # spaces and the separator besides
        sums, start = [], 1
        for count in spelt:
            sums.append(sum(out.logprobs[start : start + count]))
            start += count + 2
        found = phenotype_record(out, [[] for _ in values], tokenizer.decode)
        assert [one["logprob"] for one in found["answers"]] == pytest.approx(sums)


@pytest.mark.parametrize(
    ("text", "not_relevant", "raw"), [(" not relevant", True, None), (" Not relevant.", True, None), ("", False, "")]
)
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


@pytest.mark.parametrize(
    ("token", "new", "reason"),
    [("</s>", 20, "stop"), ("Ċ", 20, "stop_string"), ("x", 20, "repetition"), ("x", 7, "length")],
)
def test_an_answer_ends_at_the_end_token_the_next_line_or_a_cycle_and_says_why(tokenizer, token, new, reason):
    model = saying(tokenizer, tokenizer.engine.model.token_to_id(token))
    asker = Asker(Generator(model, tokenizer), "both", "template", Limits(1500, new, new))
    (found,) = asker.records([Note("n", NOTE)])
    reasons = {name: one["finish_reason"] for name, one in found["phenotypes"].items()}
    assert set(reasons.values()) == {found["diagnosis"]["finish_reason"]} == {reason}
    assert "\n" not in found["diagnosis"]["text"]


@settings(deadline=None, max_examples=60)
@given(
    pieces=st.lists(st.text("ab é漢.\n", min_size=1, max_size=4), min_size=25, max_size=150), limit=st.integers(70, 200)
)
@example(pieces=["a"] * 24 + [" "], limit=200)
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
    assert not text[read:].strip()  # a note that is read whole keeps the white space at its end, a window does not
    asker.long = "truncate"
    (short,) = asker.parts(Note("n", text))
    assert text.startswith(short.text) and (len(parts) > 1) == (short.long is not None)
    asker.long = "error"
    if len(parts) > 1:
        with pytest.raises(UserError, match="too long by"):
            asker.parts(Note("n", text))


class Counting(RequestBatch):
    """Records the prompts that are added, and the number of active requests after each addition."""

    def __init__(self, generator):
        super().__init__(generator)
        self.added, self.at_once = [], []

    def add(self, states):
        self.added += [list(state.prompt) for state in states]
        self.at_once.append(len(self.active) + len(states))
        super().add(states)


def asked_in(batch, notes, tokenizer, task="both", limit=200):
    """(prompts, numbers of active requests, records) of notes, `batch` at once, in windows of `limit` tokens."""
    asker = Asker(Generator(tiny_model(), tokenizer), task, "template", Limits(limit, 4, 6), "windows", batch=batch)
    requests = Counting(asker.generator)
    schedule = Schedule(requests, asker.batch, asker.max_questions, lambda: None)
    records = schedule.results(Work(asker.work(note)) for note in notes)
    return sorted(requests.added), requests.at_once, records


@given(st.text(" \n\tLeft breast, 2.5 cm µ癌", min_size=1, max_size=40).filter(str.strip))
@settings(deadline=None, max_examples=50)
def test_a_notes_own_tokens_spell_all_of_it_and_the_first_token_is_none_of_them(tokenizer, note):
    prefix, spans = Asker(Generator(tiny_model(), tokenizer), "both", "template", Limits(1500, 8, 8)).encoded(note)
    assert len(spans) < len(prefix) and tokenizer.encode(tasks.NOTE, bos=True)[0] == prefix[0]
    spelt = {n for start, end in spans for n in range(start, end)}
    first = len(note) - len(note.lstrip())
    assert spelt == set(range(first, first + len(note.strip())))


@pytest.mark.parametrize("text", ["not relevant", " Not relevant.", ""])
def test_a_diagnosis_that_is_not_relevant_or_empty_has_no_code(tokenizer, text):
    assert diagnosis_record(said(text, tokenizer))["codes"] == []


@pytest.mark.parametrize("task", ["both", "phenotype", "diagnosis"])
def test_windows_are_asked_no_more_at_once_than_the_batch_s_notes(task, tokenizer):
    notes = [Note("long", "Left breast, 2.5 cm. " * 50), Note("bad", error="unread"), Note("short", NOTE)]
    whole, at_once, expected = asked_in(100, notes, tokenizer, task)
    questions = {"both": 9, "phenotype": 8, "diagnosis": 1}[task]
    assert expected[0]["long"]["windows"] > 5 and at_once[0] == (expected[0]["long"]["windows"] + 1) * questions
    asked, at_once, records = asked_in(2, notes, tokenizer, task)
    assert records == expected and asked == whole
    assert max(at_once) == 2 * questions


def test_own_questions_are_asked_no_more_at_once_than_a_batch_s_task_has(tokenizer):
    """What --memory plans with: as many answers, and as many tokens of questions."""
    short, long = tuple(f"Is it {n}?" for n in range(40)), tuple(f"{n} " + "x y " * 30 for n in range(5))
    notes = [Note("n", NOTE, questions=short), Note("m", NOTE, questions=(*long, "Which?")), Note("o", NOTE)]
    whole, _, expected = asked_in(100, notes, tokenizer, limit=400)
    asked, at_once, records = asked_in(1, notes, tokenizer, limit=400)
    assert records == expected and asked == whole
    assert at_once == [9, 9, 9, 9, 4, 4, 2, 9]  # a long question counts as two
    asked, at_once, records = asked_in(2, [Note("w", "Left breast, 2.5 cm. " * 50, questions=("Which?",))], tokenizer)
    assert records[0]["long"]["windows"] > 5 and max(at_once) == 2
    _, at_once, _ = asked_in(2, [Note(name, NOTE, questions=short[:12]) for name in "pq"], tokenizer, limit=400)
    assert at_once == [12, 12]  # not 18 and 6: a note's are asked together


def window(*values, not_relevant=False, reason="stop"):
    answers = [{"text": text, "start": 0, "end": 1, "logprob": logprob} for text, logprob in values]
    raw = {} if values or not_relevant else {"raw": " "}
    least = min((logprob for _, logprob in values), default=-3.0)
    return {"answers": answers, "not_relevant": not_relevant, "logprob": least, "finish_reason": reason, **raw}


def test_windows_are_merged_each_value_once_with_its_best_probability():
    found = merge([window(("left", -2.0)), window(not_relevant=True), window(("right", -1.0), ("left", -0.5))])
    assert [(a["text"], a["logprob"]) for a in found["answers"]] == [("left", -0.5), ("right", -1.0)]
    assert not found["not_relevant"] and found["logprob"] == -3.0  # that of the least sure window
    assert merge([window(not_relevant=True)] * 2)["not_relevant"]
    silent = merge([window(not_relevant=True), window(), window(not_relevant=True)])  # one window said nothing at all
    assert not silent["not_relevant"] and silent["raw"] == " "
    assert "raw" not in merge([window(), window(("left", -1.0))])
    assert merge([window(not_relevant=True)]) == window(not_relevant=True)


@pytest.mark.parametrize(
    ("reasons", "kept"),
    [
        ("stop stop", "stop"),
        ("length stop", "length"),
        ("stop repetition length", "repetition"),
        ("stop stop_string stop", "stop_string"),
        ("stop_string length", "length"),
    ],
)
def test_an_answer_that_one_window_cut_short_says_so(reasons, kept):
    assert merge([window(reason=reason) for reason in reasons.split()])["finish_reason"] == kept


def test_the_diagnosis_is_the_likeliest_window_s_and_says_which(tokenizer):
    outs = [Generation(text, [1, 2], [-logprob, -0.2], "stop") for text, logprob in (("a", 3), ("b", 1), ("c", 2))]
    found = best_diagnosis(outs, tokenizer.decode)
    assert (found["text"], found["window"]) == ("b", 1)
    assert "window" not in best_diagnosis(outs[:1], tokenizer.decode)
    note = Note("n", "Left breast, 2.5 cm. " * 50)
    *_, (record,) = asked_in(8, [note], tokenizer, "diagnosis")
    assert 0 <= record["diagnosis"]["window"] < record["long"]["windows"]
    assert set(record["diagnosis"]) <= set(SCHEMA["properties"]["diagnosis"]["properties"])


def test_a_diagnosis_that_was_cut_short_counts_the_tokens_that_are_left_of_it(tokenizer):
    """The n-th token has the log-probability −n²: what was said after the cut would show."""
    long = said(" Melanoma (C43) and", tokenizer)
    kept = len(tokenizer.encode(" Melanoma (C43)"))
    cut = replace(long, text=" Melanoma (C43)", finish_reason="length")
    assert best_diagnosis([cut], tokenizer.decode)["logprob"] == sum(long.logprobs[:kept])
    for whole in (replace(long, finish_reason="length"), long, replace(cut, finish_reason="stop_string")):
        assert best_diagnosis([whole], tokenizer.decode)["logprob"] == sum(long.logprobs)
    nothing = replace(cut, text="")
    assert best_diagnosis([nothing], tokenizer.decode)["logprob"] == 0
    assert best_diagnosis([nothing, cut], tokenizer.decode)["window"] == 1


def test_a_place_is_the_whole_note_s_whatever_window_said_it(tokenizer):
    """Only the last window holds the 7, so its answer's place is beyond the window's own characters."""
    text = "Breast. " * 60 + "Size 7"
    asker = Asker(Generator(tiny_model(), tokenizer), "both", "template", Limits(200, 4, 6), "windows")
    parts = asker.parts(Note("n", text))
    assert [("7" in part.text) for part in parts] == [False] * (len(parts) - 1) + [True] and len(parts) > 2
    answers = [
        [Answer(part, "tumor_size", "Size?", said(" 7" if "7" in part.text else " not relevant", tokenizer))]
        for part in parts
    ]
    places = asker.results([Work(asker.places(of_part)) for of_part in answers])
    (found,) = asker.record(answers, places)["phenotypes"]["tumor_size"]["answers"]
    assert (found["start"], found["end"]) == (len(text) - 1, len(text)) and found["end"] > len(parts[-1].text)
