"""Notes as clinics write them: answers are the case's own whatever happens to the text; nothing is the test sets'."""

import json
import random
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infer.codes import is_billable
from infer.tasks import NOT_RELEVANT, PHENOTYPES
from train.clinic import clinical
from train.clinic.markup import mark, unmark
from train.clinic.patients import draw_case
from train.clinic.program import UNSEEN, patient_notes

NOTES = list(clinical.clinical_notes(1500, 7))
WRITTEN = Path(clinical.__file__).with_name("written.jsonl")


def grams(text, size=8):
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[at : at + size]) for at in range(len(words) - size + 1)}


def prose_grams():
    return set().union(*(grams(text) for text in clinical.world()["prose"]))


@pytest.mark.parametrize("name", PHENOTYPES)
def test_answers_stand_in_the_note_and_closed_ones_in_their_lists(name):
    values = PHENOTYPES[name].values
    for note in NOTES:
        for answer in note["phenotypes"][name]:
            words = note["text"][answer["start"] : answer["end"]]
            assert words and (answer["text"] in values if values else answer["text"] == words), note["id"]


def test_a_note_has_one_answer_where_one_is_asked_for():
    for note in NOTES:
        for name in PHENOTYPES:
            assert len(note["phenotypes"][name]) <= (3 if name.startswith("hormone") else 1), (note["id"], name)


def test_a_note_of_a_person_without_cancer_answers_nothing_and_the_others_have_a_billable_code():
    without = [note for note in NOTES if note["diagnosis"] == {"text": NOT_RELEVANT}]
    assert 0.06 < len(without) / len(NOTES) < 0.11
    assert not any(found for note in without for found in note["phenotypes"].values())
    assert all(is_billable(note["diagnosis"]["code"]) for note in NOTES if note not in without)


def test_some_notes_begin_with_the_evidence_of_each_kind_of_fact():
    first = [
        name
        for note in NOTES
        for name, answers in note["phenotypes"].items()
        for answer in answers
        if answer["start"] == 0
    ]
    assert {"tumor_site", "tumor_laterality", "histological_type", "tumor_size"} <= set(first)
    assert 0.03 < len(first) / len(NOTES) < 0.2


def test_t_n_and_m_may_stand_beside_the_group_that_is_the_answer():
    tnm = re.compile(r"\bT[0-4][a-d]?\W{0,3}[pc]?N[0-3]", re.I)
    both = [
        note
        for note in NOTES
        if (stage := note["phenotypes"]["cancer_stage"])
        and re.fullmatch(r"I[VAB]*[ABC]?\d?|I{2,3}[ABC]?\d?", stage[0]["text"], re.I)
        and any(abs(found.start() - stage[0]["start"]) > 40 for found in tnm.finditer(note["text"]))
    ]
    assert len(both) > 20


def test_no_template_is_left_unfilled():
    left = [note["id"] for note in NOTES if re.search("[{}\\ue000-\\ue002]|<[~|]|<>", note["text"])]
    assert not left


@given(st.integers(0, 10**9))
def test_wear_keeps_the_evidence_of_closed_answers_and_the_words_of_open_ones(seed):
    rng = random.Random(seed)
    marked = f"Left: {mark('tumor_laterality', 'lt', 'left')} and {mark('tumor_size', '2.5 cm')}."
    marked += f" The lesion, {mark('histological_type', 'lobular carcinoma')}, is old."
    text, spans = unmark(clinical.worn(marked, rng))
    assert [span.name for span in spans] == ["tumor_laterality", "tumor_size", "histological_type"]
    assert spans[0].value == "left"
    assert all(span.value == text[span.start : span.end] for span in spans[1:])


def test_a_size_is_spoken_as_it_is_dictated():
    never = type("Never", (random.Random,), {"random": lambda self: 0.0})()
    assert (
        clinical.dictated("A mass of 2.5 cm, firm. T2 N0", never)
        == "a mass of two point five centimeters comma firm period t2 n0"
    )


def test_nothing_is_taken_from_the_notes_written_by_hand_or_from_the_unseen_styles():
    """Eight words in a row are shared with no unseen note, and with the written ones only in a letter's stock opening:
    of the real prose no test set holds any."""
    drawn = set().union(*(grams(note["text"]) for note in NOTES)) - prose_grams()
    written = [json.loads(line)["text"] for line in WRITTEN.read_text(encoding="utf-8").splitlines()]
    unseen = [note["text"] for number in range(300) for note in patient_notes("p", number, 1, UNSEEN)]
    assert drawn & set().union(*map(grams, written)) <= grams("Thank you for asking me to see this")
    assert not drawn & set().union(*map(grams, unseen))


def test_notes_differ_in_length_and_in_all_but_their_facts():
    lengths = sorted(len(note["text"].split()) for note in NOTES)
    assert lengths[len(lengths) // 20] < 40 and lengths[-len(lengths) // 20] > 120
    firsts = {note["text"].splitlines()[0] for note in NOTES}
    assert len(firsts) > 0.6 * len(NOTES)


def test_a_note_depends_on_the_seed_and_its_number_alone():
    again = list(clinical.clinical_notes(40, 7))
    assert again == NOTES[:40]
    assert list(clinical.clinical_notes(40, 8)) != again


def test_every_wider_case_can_be_written_in_every_kind():
    for kind in clinical._TABLES["kind"]:
        for layout in kind["layouts"]:
            assert set(re.findall(r"<~?\|?([^<>]+)>", layout)), layout
    rng = random.Random(3)
    seen = set()
    for _ in range(4000):
        case = draw_case(rng, cancers=clinical.CASES)
        seen.add((case.cancer.name, case.site.code))
        assert case.code(sided=True)
    assert len(seen) >= 60
