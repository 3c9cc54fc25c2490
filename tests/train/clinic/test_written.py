"""The notes written by hand: answers stand in the text, the halves are equal, no wording is the generator's."""

import re
from collections import Counter
from pathlib import Path

import pytest

from eval.questions import pair, read_references
from infer.codes import CODES, is_billable
from infer.extract.places import occurs_in
from infer.tasks import PHENOTYPES
from train.clinic import program
from train.clinic.terms import TRAINING, UNSEEN

FILE = Path(program.__file__).with_name("written.jsonl")
NOTES = read_references(FILE)
HALVES = {split: [note for note in NOTES if note["split"] == split] for split in ("open", "sealed")}
CANCERS = {
    "breast": ("C50",),
    "lung": ("C34",),
    "colorectal": ("C18", "C19", "C20"),
    "prostate": ("C61",),
    "bladder": ("C67",),
    "kidney": ("C64",),
    "pancreas": ("C25",),
    "liver": ("C22",),
    "stomach": ("C16",),
    "esophagus": ("C15",),
    "thyroid": ("C73",),
    "ovary": ("C56",),
    "uterus": ("C54", "C55"),
    "melanoma": ("C43",),
    "brain": ("C71",),
    "lymphoma": ("C81", "C82", "C83", "C84", "C85"),
    "leukemia": ("C91", "C92", "C93", "C94", "C95"),
}
NAMES = {category: name for name, categories in CANCERS.items() for category in categories}
SHORT = "two-line post-operative note"


def cancer(note):
    return NAMES[note["diagnosis"]["code"][:3]] if "diagnosis" in note else "none"


def grams(text, n=8):
    words = re.findall(r"[a-z0-9]+", text.lower())
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}


def test_there_are_enough_notes_cancers_and_kinds():
    assert len(NOTES) >= 80 and len({note["id"] for note in NOTES}) == len({note["patient"] for note in NOTES})
    assert set(map(cancer, NOTES)) == {*CANCERS, "none"} and len(CANCERS) == 17
    assert min(Counter(map(cancer, NOTES)).values()) >= 4
    assert len({note["kind"] for note in NOTES}) >= 10
    assert sum(cancer(note) == "none" for note in NOTES) >= 10


def test_both_halves_hold_the_same_kinds_and_cancers():
    first, second = HALVES.values()
    assert len(first) == len(second) == len(NOTES) / 2
    assert Counter(note["kind"] for note in first) == Counter(note["kind"] for note in second)
    assert Counter(map(cancer, first)) == Counter(map(cancer, second))
    for name in PHENOTYPES:
        answered = [sum(bool(note["phenotypes"][name]) for note in half) for half in HALVES.values()]
        assert abs(answered[0] - answered[1]) <= 3, name


@pytest.mark.parametrize("note", NOTES, ids=lambda note: note["id"])
def test_answers_stand_in_the_note_and_closed_ones_in_their_lists(note):
    assert list(note["phenotypes"]) == list(PHENOTYPES)
    for name, found in note["phenotypes"].items():
        for answer in found:
            evidence = note["text"][answer["start"] : answer["end"]]
            assert evidence.strip() == evidence != ""
            if PHENOTYPES[name].values:
                assert answer["text"] in PHENOTYPES[name].values
            else:
                assert evidence == answer["text"] and "," not in evidence and "  " not in evidence
                assert occurs_in(evidence, note["text"])
        if not name.startswith("hormone"):
            assert len(found) <= 1
    types, states = (note["phenotypes"][f"hormone_receptor_{what}"] for what in ("type", "status"))
    assert [re.split(r"[+\- ]", answer["text"])[0] for answer in states] == [answer["text"] for answer in types]


@pytest.mark.parametrize("note", NOTES, ids=lambda note: note["id"])
def test_a_note_with_a_cancer_has_a_billable_code_and_one_without_has_no_answer(note):
    if "diagnosis" in note:
        code = note["diagnosis"]["code"]
        assert is_billable(code) and note["diagnosis"]["text"] == CODES[code]
        assert code not in note["text"]
    else:
        assert not any(note["phenotypes"].values())


def test_notes_have_40_to_400_words_and_two_line_notes_two_lines():
    for note in NOTES:
        words = len(note["text"].split())
        if note["kind"] == SHORT:
            assert len(note["text"].splitlines()) == 2 and words <= 60, note["id"]
        else:
            assert 40 <= words <= 400, note["id"]


def test_every_question_is_asked_but_the_diagnosis_of_a_note_without_cancer():
    questions, _ = pair(NOTES, [])
    assert len(questions) == 8 * len(NOTES) + sum(cancer(note) != "none" for note in NOTES)


@pytest.mark.parametrize("source", [TRAINING, UNSEEN], ids=["training", "unseen"])
def test_no_eight_words_in_a_row_are_the_generators(source):
    drawn = [
        grams(note["text"])
        for number in range(300)
        for note in program.patient_notes("w", number, 1, source, vary=source is TRAINING)
    ]
    assert len(drawn) > 400
    generated = set().union(*drawn)
    assert not {note["id"]: shared for note in NOTES if (shared := grams(note["text"]) & generated)}
