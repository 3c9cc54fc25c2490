"""Corruption is seeded and nested, wrong labels are wrong and of their type, and misspelling spares what is no word."""

from __future__ import annotations

import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eval.robustness.labels import corrupt, derangement
from eval.robustness.misspelling import RULES, misspell
from infer.retrieval.repair import Repair
from train.clinic.program import patient_notes
from train.clinic.terms import UNSEEN

TEXT = (
    "Biopsy shows invasive carcinoma of the left breast, 2.5 cm, pT2N1M0, ER+ HER2-, code C50.912, BRCA1 tested, "
    "stage IIIC."
)


def record(i):
    start = TEXT.index("left")
    return {
        "id": f"n{i}",
        "patient": f"p{i}",
        "text": TEXT,
        "phenotypes": {
            "tumor_laterality": [{"text": ["left", "right", "bilateral"][i % 3], "start": start, "end": start + 4}],
            "cancer_stage": [],
        },
        "diagnosis": {"text": f"disease {i % 5}", "code": f"C5{i % 5}"},
    }


RECORDS = [record(i) for i in range(300)]


@settings(deadline=None, max_examples=60)
@given(st.lists(st.text("ab", max_size=3), max_size=8), st.integers(0, 99))
def test_a_derangement_moves_every_value_to_another_and_invents_none(values, seed):
    moved = derangement(values, seed)
    assert all(a != b for a, b in moved.items())
    if len(set(values)) > 1:
        assert set(moved) == set(moved.values()) == set(values)


def test_wrong_labels_are_nested_of_their_type_and_never_right():
    wrong = []
    for rate in (0.0, 0.2, 0.5, 0.9, 1.0):
        changed = corrupt(RECORDS, rate)
        at = {new["id"] for new, old in zip(changed, RECORDS, strict=True) if new != old}
        assert len(at) == round(300 * rate)
        wrong.append(at)
        for new, old in zip(changed, RECORDS, strict=True):
            assert new["text"] == old["text"] and new["phenotypes"]["cancer_stage"] == []
            if new["id"] in at:
                said = new["phenotypes"]["tumor_laterality"][0]
                right = old["phenotypes"]["tumor_laterality"][0]["text"]
                assert said["text"] in {"left", "right", "bilateral"} - {right}
                assert said["start"] is None and new["diagnosis"] != old["diagnosis"]
    assert all(a <= b for a, b in zip(wrong, wrong[1:], strict=False))
    assert wrong[0] == set() and len(wrong[-1]) == 300


def test_misspelling_is_nested_seeded_and_spares_numbers_codes_and_receptors():
    assert misspell(RECORDS[0], 0.0) == RECORDS[0]
    assert misspell(RECORDS[0], 0.4, 1) == misspell(RECORDS[0], 0.4, 1) != misspell(RECORDS[0], 0.4, 2)
    for one in RECORDS[:60]:
        low, high = (misspell(one, rate)["text"].split() for rate in (0.2, 0.6))
        for clean, a, b in zip(one["text"].split(), low, high, strict=True):
            assert a in (clean, b)
        for kept in ("2.5 cm", "pT2N1M0", "ER+", "HER2-", "C50.912", "BRCA1", "IIIC"):
            assert kept in misspell(one, 1.0)["text"]


def test_about_the_rate_of_the_words_is_misspelled():
    words = changed = 0
    for one in RECORDS:
        for clean, new in zip(TEXT.split(), misspell(one, 0.3)["text"].split(), strict=True):
            if re.fullmatch(r"[A-Za-z]{4,},?", clean):
                words, changed = words + 1, changed + (clean != new)
    assert 0.25 < changed / words < 0.33


def test_answers_keep_their_words_and_their_places_move_along():
    for one in RECORDS[:60]:
        new = misspell(one, 0.7)
        span = new["phenotypes"]["tumor_laterality"][0]
        assert span["text"] == one["phenotypes"]["tumor_laterality"][0]["text"]
        assert re.search(r"of the (\S+) ", new["text"]).span(1) == (span["start"], span["end"])


def test_repair_leaves_the_short_forms_of_the_unseen_styles():
    """Repair knows none of the abbreviations that the unseen styles write with: it does not undo its own corruption."""
    lexicon = Repair(["nothing"])
    for number in range(150):
        for note in patient_notes("p", number, 3, UNSEEN):
            changes = lexicon.changes(note["text"])
            assert not changes, [change.before for change in changes]


@pytest.mark.parametrize("rule", RULES)
def test_repair_corrects_most_and_never_changes_a_known_word(rule):
    texts = [note["text"] for number in range(60) for note in patient_notes("p", number, 3)]
    corrector, rng, right, wrong, total = Repair(texts), random.Random(0), 0, 0, 0
    for match in re.finditer(r"(\w+) ([a-z]{5,}) (\w+)", " ".join(texts[:40])):
        typo = rule(match[2], rng)
        if typo != match[2]:
            found = corrector.correct(typo, match[1], match[3])
            right, wrong, total = right + (found == match[2]), wrong + (found not in (match[2], typo)), total + 1
        assert corrector.correct(match[2], match[1], match[3]) == match[2]
    assert right > 0.5 * total and wrong < 0.02 * total


@settings(deadline=None, max_examples=200)
@given(st.from_regex(r"[A-Za-z]{4,12}", fullmatch=True), st.sampled_from(RULES), st.integers(0, 999))
def test_a_rule_keeps_the_first_letter_and_edits_once(word, rule, seed):
    new = rule(word, random.Random(seed))
    assert new[0] == word[0] and new.isalpha() and abs(len(new) - len(word)) <= 1


def test_a_rate_beyond_one_is_refused():
    with pytest.raises(ValueError, match="not between 0 and 1"):
        misspell(RECORDS[0], 1.5)
    with pytest.raises(ValueError, match="not between 0 and 1"):
        corrupt(RECORDS, -0.1)
