"""A grounded answer is never invented: for random weights, any note, any temperature."""

import json
import re
from copy import copy
from dataclasses import replace

import pytest
from answering_models import tiny_model
from hypothesis import example, given, settings
from hypothesis import strategies as st

from eval import score
from infer import codes, tasks
from infer.engine.generate import Generator, Settings
from infer.extract import program as extract
from infer.extract.ask import FORMS, LONG, Asker, Limits
from infer.extract.grounded import Grammar, Grounded, Grounding, Vocabulary
from infer.extract.notes import Note
from infer.extract.places import edges, occurrences

letters, long_letters = (
    st.text("abt er cm2.5-,;\n+éß漢(", min_size=least, max_size=2 * least + 58).filter(str.strip) for least in (1, 40)
)


@pytest.fixture(scope="module", params=["bytes", "sentencepiece"])
def either(request, tokenizer):
    """A byte-level tokenizer, or Mistral's kind; with a chat form."""
    found = copy(request.getfixturevalue("sentencepiece") if request.param == "sentencepiece" else tokenizer)
    found.form = "mistral-v1" if request.param == "sentencepiece" else "alpaca"
    return found


def shorten(asker):
    """Set the limit so that some 20 tokens of a note are read at once."""
    asked = [len(asker.prompt("", *question)) for question in asker.questions(Note("n", ""))]
    asker.limits = replace(asker.limits, input=max(asked) + 28)


@settings(deadline=None, max_examples=15)
@given(
    note=st.one_of(letters, long_letters),
    seed=st.integers(0, 99),
    hot=st.sampled_from([0.0, 3.0]),
    new=st.integers(1, 12),
    form=st.sampled_from(FORMS),
    long=st.sampled_from(LONG),
)
def test_no_output_ever_breaks_it(either, note, seed, hot, new, form, long):
    generator = Generator(tiny_model(seed % 5, vocab_size=either.vocab_size), either)
    asker = Asker(generator, "both", form, Limits(1500, new, new * 9), long, grounded=True)
    if long != "error":
        shorten(asker)
    chosen = (asker.settings, asker.diagnosis_settings)
    asker.settings, asker.diagnosis_settings = (replace(s, temperature=hot, seed=seed) for s in chosen)
    (record,) = asker.records([Note("n", note)])
    for name, phenotype in tasks.PHENOTYPES.items():
        for answer in record["phenotypes"][name]["answers"]:
            if phenotype.values:
                assert answer["text"] in phenotype.values
            else:
                assert answer["text"] in " ".join(note.split())
                assert (answer["start"], answer["end"]) in occurrences(answer["text"], note)
    text = record["diagnosis"]["text"]
    if text == tasks.NOT_RELEVANT:
        assert record["diagnosis"]["codes"] == []
    elif text:
        found = re.fullmatch(r"(.*) \(([^()]*)\)", text)
        assert found and " ".join(codes.CODES[found[2]].split()) == found[1]


@settings(deadline=None, max_examples=10)
@given(note=letters, seed=st.integers(0, 99), hot=st.sampled_from([0.0, 3.0]), new=st.integers(1, 12))
def test_requests_that_share_a_constraint_get_what_each_would_alone(note, seed, hot, new, tokenizer):
    generator = Generator(tiny_model(seed % 5), tokenizer)
    grammar = Grammar(Vocabulary(tokenizer), generator.stop_ids, note=note)
    prompts, chosen = ["a", "tumor", "2.5 cm of"], Settings(new, temperature=hot, seed=seed)
    together = generator.generate(prompts, chosen, constraint=Grounded(grammar))
    for number, (prompt, out) in enumerate(zip(prompts, together, strict=True)):
        alone = replace(chosen, seed=seed + number, constraint=Grounded(grammar))
        assert out.tokens == generator.generate([prompt], alone)[0].tokens
        ended = out.finish_reason == "stop"
        assert grammar.read(grammar.begin(), out.text.encode()) or not out.text.isascii()  # a letter may be cut
        assert not ended or grammar.longest_complete(out.text) == out.text


@settings(deadline=None, max_examples=25)
@given(note=long_letters, form=st.sampled_from(FORMS), long=st.sampled_from(LONG[1:]))
@example(note="2.5 " * 20, form="template", long="windows")  # cut everywhere
def test_a_cut_note_offers_no_part_of_the_word_or_number_that_was_cut(either, note, form, long):
    """Of "12.5 cm", a window that begins with "2.5 cm" holds no size."""
    generator = Generator(tiny_model(vocab_size=either.vocab_size), either)
    asker = Asker(generator, "phenotype", form, Limits(1500, 5, 5), long, grounded=True)
    shorten(asker)
    for part in asker.parts(Note("n", note)):
        (request,) = [
            r
            for r, (name, _) in zip(asker.requests(part, {}), asker.questions(part.note), strict=True)
            if name == "tumor_size"
        ]
        spans = request.settings.constraint.grammar
        offered = {spans.note[start:stop].decode() for start in spans.starts for stop in spans.stops if stop > start}
        assert all(occurrences(value, note) for value in offered)


@settings(deadline=None, max_examples=60)
@given(note=letters, data=st.data())
def test_every_spelling_of_a_span_is_allowed(either, note, data):
    """Whatever tokens spell a span, each step allows the next of them, and the end after it."""
    text = " ".join(note.split())
    grammar = Grammar(Vocabulary(either), either.stop_ids, note=note)
    at = edges(text)
    start = data.draw(st.sampled_from(at[:-1]))
    end = data.draw(st.sampled_from([n for n in at if n > start]))
    span = text[start:end].strip()
    if not span or ";" in span or text[start] == " ":
        return
    follower, done = Grounded(grammar), []
    for letter in (" " + span).encode():  # the finest spelling: one token a byte
        ways = [i for i, spelt in grammar.vocabulary.bytes.items() if spelt == bytes([letter])]
        assert ways and set(ways) <= set(follower.allowed(done).tolist())
        done.append(ways[0])
    assert set(either.stop_ids) <= set(follower.allowed(done).tolist())
    coarse, done = Grounded(grammar), []
    for token in either.encode(" " + span):  # and the tokenizer's own
        assert token in coarse.allowed(done).tolist()
        done.append(token)


@settings(deadline=None, max_examples=40)
@given(note=long_letters, steps=st.lists(st.integers(0, 9), max_size=40))
@example(note="1,200 mm ; 3", steps=[0, 0, 0, 0])
def test_whatever_was_said_the_answer_can_still_become_whole(either, note, steps):
    """No token leads where only the forced end is left: into a word or number without an end."""
    grammar = Grammar(Vocabulary(either), either.stop_ids, note=note, edges=edges("1." + note + ".5"))
    states = grammar.begin()
    for step in steps:
        ahead = grammar.next(states)
        assert ahead or any(grammar.may_end(state) for state in states)
        if ahead:
            states = ahead[sorted(ahead)[step % len(ahead)]]


def test_what_is_not_in_the_note_is_refused(tokenizer):
    grammar = Grammar(Vocabulary(tokenizer), tokenizer.stop_ids, note="a tumor of 2.5 cm, grade 2")

    def legal(text):
        states = grammar.read(grammar.begin(), text.encode())
        return any(grammar.may_end(state) for state in states)

    for text in (" 2.5 cm", " tumor; 2.5 cm", " 2.5 cm, grade 2", " not relevant", " tumor of 2.5", "grade 2"):
        assert legal(text), text
    for text in (
        " 3 cm",
        " 5 cm",
        " of 2",
        " of 2.",
        " umor",
        " 2.5 c",
        " tumor; not relevant",
        " cm; grade 3",
        " tumor;",
        " tumor, 2.5 cm",
        " ",
        " Tumor",
    ):
        assert not legal(text), text
    assert grammar.longest_complete(" tumor; gra") == " tumor"
    assert grammar.longest_complete(" not relev") == ""


@pytest.mark.parametrize("name", ["hormone_receptor_status", "tumor_laterality"])
def test_closed_lists(name, tokenizer):
    grammar = Grounding(tokenizer, tokenizer.stop_ids).of_note("left right ER+")[name]
    values = tasks.PHENOTYPES[name].values
    assert grammar.longest_complete(f" {values[0]}; {values[1]}") == f" {values[0]}; {values[1]}"
    assert grammar.longest_complete(" lefty") in ("", " left")


@settings(deadline=None, max_examples=150)
@given(note=letters, data=st.data())
@example(note="2,5 cm; pT2, pN1a", data=None)
def test_what_may_be_said_is_what_has_a_place(tokenizer, note, data):
    """One definition: a value can be said where, and only where, it occurs in the note; but for our separator."""
    text = " ".join(note.split())
    grammar = Grammar(Vocabulary(tokenizer), tokenizer.stop_ids, note=note)
    start = data.draw(st.integers(0, len(text) - 1)) if data else 0
    value = text[start : data.draw(st.integers(start + 1, len(text)))].strip() if data else "2,5 cm"
    if value and value[0] != ";" and value[-1] != ";" and "; " not in value and value != tasks.NOT_RELEVANT:
        states = grammar.read(grammar.begin(), f" {value}".encode())
        assert any(grammar.may_end(state) for state in states) == bool(occurrences(value, note))
        assert not states or tasks.parse_answer(f" {value}") == [value]


def test_ungrounded_answers_are_invented(tokenizer):
    """The property above is not empty: without the automaton random weights do invent."""
    generator = Generator(tiny_model(), tokenizer)
    (out,) = generator.generate(["a tumor of 2.5 cm"], Settings(max_new_tokens=12))
    assert out.text.strip() not in "a tumor of 2.5 cm"


def test_the_score_says_how_many_answers_were_invented(weights, tmp_path, capsys):
    """A whole job with random weights: none where it was grounded, some where it was not."""
    notes = tmp_path / "n.jsonl"
    texts = ["Tumor of 2.5 cm, grade 2.", "A mass (3 x 1,200 mm) in the left breast; T2-N0.", "ER+/PR- carcinoma"]
    right = {name: {"answers": [], "not_relevant": True} for name in tasks.PHENOTYPES}
    lines = [{"id": str(n), "text": text, "phenotypes": right} for n, text in enumerate(texts)]
    notes.write_text("".join(json.dumps(line) + "\n" for line in lines))
    said = {}
    for grounded in (True, False):
        out = tmp_path / f"{grounded}.jsonl"
        extract.main(
            extract.Options(
                weights=str(weights),
                notes=notes,
                out=out,
                form="template",
                task="phenotype",
                grounded=grounded,
                max_new_tokens=12,
            )
        )
        capsys.readouterr()
        score.main(score.Options(predictions=out, references=notes, task="phenotype", json=True))
        said[grounded] = json.loads(capsys.readouterr().out)
    assert said[True]["invented"]["count"] == 0 < said[True]["invented"]["answers"]
    assert said[False]["invented"]["count"] > 0
