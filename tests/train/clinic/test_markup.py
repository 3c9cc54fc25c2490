"""Marks carry the truth through templates: what is marked stands at its span, and nothing of a mark is left visible."""

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from train.clinic.markup import BAR, CLOSE, OPEN, choose, fill, mark, sentence, slots, unmark, upper

words = st.text(st.characters(codec="utf-8", exclude_characters=OPEN + BAR + CLOSE), min_size=1, max_size=12)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(words, words, st.booleans()), max_size=6))
def test_marked_words_stand_at_their_spans(parts):
    text = "".join(
        before + (mark(f"fact{i}", said) if marked else said) for i, (before, said, marked) in enumerate(parts)
    )
    plain, spans = unmark(text)
    assert plain == "".join(before + said for before, said, _ in parts)
    told = {f"fact{i}": said for i, (_, said, marked) in enumerate(parts) if marked}
    assert {span.name: plain[span.start : span.end] for span in spans} == told


def test_marks_nest_and_keep_a_value_apart_from_the_words():
    plain, spans = unmark("the " + mark("tumor_site", mark("tumor_laterality", "L", "left") + "UL") + " mass")
    assert plain == "the LUL mass"
    found = {span.name: (span.value, plain[span.start : span.end]) for span in spans}
    assert found == {"tumor_site": ("LUL", "LUL"), "tumor_laterality": ("left", "L")}


def test_upper_case_reaches_answers_that_are_the_words_themselves():
    plain, spans = unmark(upper(sentence(mark("tumor_size", "two cm")) + mark("cancer_grade", "well", "grade 1")))
    assert plain == "TWO CMWELL"
    assert {span.name: span.value for span in spans} == {"tumor_size": "TWO CM", "cancer_grade": "grade 1"}


def test_choices_nest_and_slots_fill():
    made = {choose("[a|b [c|d]] {x}", random.Random(seed)) for seed in range(40)}
    assert made == {"a {x}", "b c {x}", "b d {x}"}
    assert slots("{x} and {y}") == ["x", "y"] and fill("{x}-{y}", str.upper) == "X-Y"
