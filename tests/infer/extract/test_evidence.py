"""Where a repeated value was read: what the answer loses without each occurrence, and what a record says of it."""

from copy import copy
from dataclasses import replace
from functools import partial

import pytest
import torch
from answering_models import tiny_model, tokens_read, unseen, write_model
from hypothesis import given, settings
from hypothesis import strategies as st

from eval.bench import placing
from infer import tasks
from infer.engine.generate import Generator, Settings
from infer.engine.load import load
from infer.engine.settings import Generation
from infer.extract.ask import FORMS, Answer, Asker, Limits
from infer.extract.evidence import MARGIN, MAX_SPANS, Forced, Reading, decide
from infer.extract.notes import Note
from infer.extract.places import occurrences
from infer.extract.schedule import Work
from infer.retrieval.repair import Change
from infer.retrieval.repaired_note import repair_note
from model.support.files import read_jsonl, write_jsonl

MODEL = tiny_model()
NOTE = "A cyst of 2.5 cm. Tumor: 2.5 cm (not 12.5 cm); left, LEFT breast. 2.5 cm"


def logprob(model, prompt, tokens):
    """The specification: log p(tokens | prompt), token by token, from one forward pass of the plain model."""
    logits_TV = model(torch.tensor([[*prompt, *tokens]]))[0, len(prompt) - 1 : -1]
    return logits_TV.log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0].tolist()


def answered(asker, note, name, text):
    """An answer that the model is made to give."""
    (part,) = asker.parts(Note("n", note))
    question = tasks.PHENOTYPES[name].question
    tokens = asker.tokenizer.encode(text)
    forced = Settings(max_new_tokens=len(tokens), constraint=Forced(tokens))
    (out,) = asker.generator.generate([asker.prompt(note, name, question)], forced)
    assert out.tokens == tokens and out.text == text
    return Answer(part, name, question, out)


def asked(model, tokenizer, form="template", **options):
    tokenizer = copy(tokenizer)
    tokenizer.form = "alpaca"
    return Asker(Generator(model, tokenizer), "phenotype", form, Limits(1500, 8, 8), **options)


@pytest.mark.parametrize("form", FORMS)
def test_losses_are_the_plain_models(tokenizer, form):
    """log p(value | note) − log p(value | note whose occurrence is not seen), of the value's own tokens alone."""
    model = tiny_model()
    asker = asked(model, tokenizer, form)
    answer = answered(asker, NOTE, "tumor_size", " cyst; 2.5 cm")
    (first, reading) = asker.readings(answer)
    assert len(first.spans) == 1 and reading.spans == [(10, 16), (25, 31), (len(NOTE) - 6, len(NOTE))]
    ((found,),) = asker.results([Work(asker.losses([reading]))])
    tokens = asker.tokenizer.encode(" cyst; 2.5 cm")
    own = len(tokens) - len(asker.tokenizer.encode("2.5 cm"))
    assert asker.tokenizer.decode(tokens[own:]) == "2.5 cm"

    prompt = asker.prompt(NOTE, "tumor_size", answer.question)

    def own_logprob(hidden):
        with unseen(model, hidden):
            return sum(logprob(model, prompt, tokens)[own:])

    for (start, end), (_, hidden), lost in zip(reading.spans, reading.hidden({}), found, strict=True):
        assert NOTE[start:end] == asker.tokenizer.decode(prompt[hidden.first : hidden.stop]).strip()
        assert lost == pytest.approx(own_logprob(None) - own_logprob(hidden), abs=2e-4)
    assert len(set(found)) == 3


@pytest.mark.parametrize("form", FORMS)
@settings(deadline=None, max_examples=40)
@given(st.lists(st.sampled_from(["2.5 cm", "left", ",", "癌", "cyst", "cm left"]), min_size=2, max_size=9), st.data())
def test_the_tokens_of_a_place_are_hidden_from_what_comes_after_the_note(tokenizer, form, words, data):
    text, value = " ".join(words), data.draw(st.sampled_from(words))
    asker = asked(MODEL, tokenizer, form)
    spans = occurrences(value, text) or [(0, 1)]
    out = Generation(value, [], [], "length")
    ask = partial(asker.prompt, name="tumor_size", question="Which?")
    prompt = ask(text)
    reading = Reading(ask, text, 0, out, (0, 1), spans)
    decode = asker.tokenizer.decode
    start = decode(prompt).index(text)
    for (first, stop), (_, hidden) in zip(spans, reading.hidden({}), strict=True):
        before = len(decode(prompt[: hidden.first])) - start
        said = decode(prompt[hidden.first : hidden.stop])
        assert first - 1 <= before <= first and said.strip() == text[first:stop]  # a space may be its first token's
        assert start + len(text) - 1 <= len(decode(prompt[: hidden.after])) <= start + len(text)


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=5), st.floats(0, 5))
def test_what_evidence_does_not_decide_stays_ambiguous(lost, margin):
    spans = [(n, n + 1) for n in range(len(lost))]
    kept = decide(spans, lost, margin)
    assert lost[kept[0][0]] == max(lost)
    assert set(kept) == {span for span in spans if max(lost) - lost[span[0]] <= margin} | {kept[0]}
    assert sorted((-lost[start], start) for start, _ in kept) == [(-lost[start], start) for start, _ in kept]


@settings(deadline=None, max_examples=12)
@given(
    st.lists(st.sampled_from(["2.5 cm", "12.5 cm", "left", "Left", ",", "癌", "cyst"]), min_size=5, max_size=12),
    st.integers(0, 9),
    st.booleans(),
)
def test_a_record_names_every_place_that_may_have_been_read(tokenizer, words, seed, grounded):
    text = " ".join(words)
    (record,) = asked(tiny_model(seed), tokenizer, grounded=grounded).records([Note("n", text)])
    for name, one in record["phenotypes"].items():
        for value in one["answers"]:
            closed = bool(tasks.PHENOTYPES[name].values)
            known = occurrences(value["text"], text, closed) or occurrences(value["text"], text, ignore_case=True)
            places = [(value["start"], value["end"]), *map(tuple, value.get("ambiguous", ()))]
            assert len(set(places)) == len(places)
            assert set(places) <= set(known) if known else places == [(None, None)]
            assert len(known) != 1 or places == known


def test_a_value_is_placed_in_the_window_that_said_it(tokenizer):
    """ "7 cm" is in every window; each window's answer is read in its own."""
    asker = asked(tiny_model(), tokenizer, long="windows")
    note = Note("n", "A breast of 7 cm. " * 40)
    asker.limits = Limits(200, 8, 8)
    parts = asker.parts(note)
    assert len(parts) > 2
    tokens = tokenizer.encode(" 7 cm")
    for part in parts:
        assert part.text == note.text[part.start : part.end]
        prompts = dict(zip((name for name, _ in asker.questions(note)), part.prompts, strict=True))
        forced = Settings(max_new_tokens=len(tokens), constraint=Forced(tokens))
        (out,) = asker.generator.generate([prompts["tumor_size"]], forced)
        answer = Answer(part, "tumor_size", tasks.PHENOTYPES["tumor_size"].question, out)
        (((places,),),) = asker.results([Work(asker.places([answer]))])
        assert places and all(part.start <= start and end <= part.end for start, end in places)
        assert all(note.text[start:end] == "7 cm" for start, end in places)


def test_a_value_that_occurs_too_often_to_be_tried_keeps_all_its_places(tokenizer):
    asker = asked(tiny_model(), tokenizer)
    few, many = (answered(asker, "1 cm " * count, "tumor_size", " 1 cm") for count in (MAX_SPANS, MAX_SPANS + 1))
    ((((first, *_),), (places,)),) = asker.results([Work(asker.places([few, many]))])
    assert first in occurrences("1 cm", "1 cm " * MAX_SPANS)
    assert places == occurrences("1 cm", "1 cm " * (MAX_SPANS + 1))


def tokens_of(tokenizer, text, monkeypatch):
    """How many tokens the engine computes for a note whose every question is answered with "2 cm"."""
    model = tiny_model()
    asker = asked(model, tokenizer)
    requests = asker.requests
    tokens = tokenizer.encode(" 2 cm")
    only = Settings(max_new_tokens=len(tokens), constraint=Forced(tokens))
    monkeypatch.setattr(asker, "requests", lambda *of: [replace(one, settings=only) for one in requests(*of)])
    with tokens_read(model) as read:
        (record,) = asker.records([Note("n", text)])
    assert all(one["answers"][0]["text"] == "2 cm" for one in record["phenotypes"].values())
    return sum(read)


def test_a_note_is_read_once_although_places_are_decided(tokenizer, monkeypatch):
    """It is in the cache until they are: however long it is, what is read beside it are its questions."""
    short, long = "1 cm and 2 cm. " * 3, "1 cm and 2 cm. " * 3 + "Nothing else. " * 80
    beside = {
        text: tokens_of(tokenizer, text, monkeypatch) - len(tokenizer.encode(text.strip())) for text in (short, long)
    }
    assert beside[short] == beside[long]


def counting(tokenizer, encoded):
    """The tokenizer, noting every text that it encodes."""

    class Counting(type(tokenizer)):
        def encode(self, text, *arguments, **options):
            encoded.append(text)
            return super().encode(text, *arguments, **options)

    found = copy(tokenizer)
    found.__class__ = Counting
    return found


@pytest.mark.parametrize("long", [False, True])
def test_a_note_is_encoded_once(tokenizer, long):
    """By the check of its length, the prompts of all questions and the count of its tokens together; a window once."""
    encoded: list[str] = []
    note = "Margins are clear. " * (40 if long else 2) + "Unique."
    asker = Asker(
        Generator(tiny_model(), counting(tokenizer, encoded)),
        "both",
        "template",
        Limits(1500, 4, 4),
        "windows",
        grounded=True,
    )
    asker.limits = Limits(200, 4, 4) if long else asker.limits
    encoded.clear()
    (record,) = asker.records([Note("n", note)])
    assert record["tokens"]["note"] == len(tokenizer.encode(note))
    whole = [text for text in encoded if "Unique." in text and len(text) >= len(note)]
    assert len(whole) == 1
    windows = record["long"]["windows"] if long else 0
    assert sum("Margins" in text for text in encoded) == 1 + windows


def test_ambiguous_places_are_the_original_notes_after_repair():
    note = Note("n", "tumr 5 cm, tumr 5 cm")
    changes = [Change(0, 4, "tumr", "tumor"), Change(11, 15, "tumr", "tumor")]
    repaired, way = repair_note(note, type("Two", (), {"changes": staticmethod(lambda text: changes)}))
    assert repaired.text == "tumor 5 cm, tumor 5 cm"
    answer = {"text": "tumor", "start": 12, "end": 17, "logprob": 0.0, "ambiguous": [[0, 5]]}
    record = way.restore({"id": "n", "phenotypes": {"tumor_site": {"answers": [answer]}}})
    (found,) = record["phenotypes"]["tumor_site"]["answers"]
    assert (found["start"], found["end"], found["ambiguous"]) == (11, 15, [[0, 4]])


def test_the_measuring_program_counts_repeated_values(tmp_path):
    """`python -m eval.bench placing` over three notes: which values it takes, and its shares from their losses."""
    weights = write_model(tmp_path / "model")

    def note(name, text, *answers):
        spans = {which: [{"text": value, "start": start, "end": end}] for which, value, start, end in answers}
        return {"id": name, "text": text, "phenotypes": spans}

    left = NOTE.index("left")
    write_jsonl(
        tmp_path / "n.jsonl",
        [
            note("a", NOTE, ("tumor_size", "2.5 cm", 25, 31), ("tumor_laterality", "left", left, left + 4)),
            note("b", "left breast, 3 cm", ("tumor_size", "3 cm", 13, 17), ("tumor_laterality", "left", 0, 4)),
            note(
                "c", "lt, left or left breast", ("tumor_laterality", "left", 0, 2)
            ),  # named otherwise: none of the two
        ],
    )
    found = placing.rows(str(weights), str(tmp_path / "n.jsonl"), dtype="float64")
    by_name = {(row.name, row.peer_name): row for row in found}
    first, last = (by_name["placed right: all", f"{which} occurrence"] for which in ("first", "last"))
    assert first.setting == "2 values of 3 notes" and (first.peer, last.peer) == (50.0, 0.0)
    records = [record for _, record in read_jsonl(tmp_path / "n.jsonl")]
    model, tokenizer = load(str(weights), (), "float64")
    values = placing.measure(Asker(Generator(model, tokenizer), "phenotype", "template", Limits()), records)
    assert [(row["id"], row["phenotype"], len(row["spans"])) for row in values] == [
        ("a", "tumor_size", 3),
        ("a", "tumor_laterality", 2),
    ]
    best = [row["spans"][max(range(len(row["losses"])), key=row["losses"].__getitem__)] for row in values]
    assert first.ours == 50.0 * sum(one == row["right"] for one, row in zip(best, values, strict=True))
    assert by_name["margin 0.0", None].setting == "100.0 % decided"
    assert any(row.name == f"margin {MARGIN} (in use)" for row in found)
