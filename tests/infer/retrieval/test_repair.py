"""Repair mends words and never what carries clinical meaning: numbers, units, doses, TNM, genes, receptors, codes."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infer.codes import CODES
from infer.retrieval.repair import ABBREVIATIONS, Repair, one_edit

TEXTS = ["The patient has invasive carcinoma of the breast with axillary metastasis on mammography today."] * 3
REPAIR = Repair(TEXTS)
KEPT = st.one_of(
    st.decimals(0, 999, places=1).map(str),
    st.builds("{} {}".format, st.integers(1, 500), st.sampled_from(["mg", "cm", "mm", "mg/m2", "Gy", "mCi", "mL"])),
    st.from_regex(r"[cpy]?T[0-4][abc]?N[0-3]M[01X]", fullmatch=True),
    st.sampled_from(
        [
            "BRCA1",
            "EGFR",
            "KRAS",
            "ALK",
            "TP53",
            "HER2",
            "HER2+",
            "ER+",
            "PR-",
            "ER/PR",
            "Ki-67",
            "PD-L1",
            "ROS1",
            "BRAF",
            "MSI-H",
            "stage IIIB",
            "FOLFOX",
            "R-CHOP",
        ]
    ),
    st.sampled_from(sorted(CODES)),
)


@settings(deadline=None, max_examples=300)
@given(st.lists(KEPT, min_size=1, max_size=8), st.sampled_from([" ", ", ", "; ", ". ", "\n"]))
def test_numbers_units_doses_tnm_genes_receptors_and_codes_are_never_touched(pieces, between):
    text = between.join(pieces)
    assert REPAIR(text) == text


NOTE = "Mass in the left breast, grade 2. The left lung and the right lobe are clear.\nSTAGE OF DISEASE"
BESIDE = Repair([NOTE, NOTE, NOTE])


@settings(deadline=None, max_examples=300)
@given(st.lists(st.one_of(KEPT, st.sampled_from(NOTE.split())), min_size=1, max_size=12), st.booleans())
def test_what_carries_meaning_stays_among_words_and_in_a_line_of_capitals(pieces, capitals):
    text = " ".join(pieces)
    text = text.upper() if capitals else text
    assert BESIDE(text) == text


@pytest.mark.parametrize(
    "wrong, right",
    [
        ("mass in the lft breast", "mass in the left breast"),  # too short to be mended by itself
        ("the rihgt lobe", "the right lobe"),
        ("lft arm", "lft arm"),  # between other neighbours it may be anything
        ("the EGFS lobe", "the EGFS lobe"),
        ("STGAE OF DISEASE", "STAGE OF DISEASE"),  # a heading, all of it in capitals
        ("the STGAE OF disease", "the STGAE OF disease"),
    ],
)
def test_neighbours_mend_a_short_word(wrong, right):
    assert BESIDE(wrong) == right


def test_an_abbreviation_that_the_lexicon_uses_stays():
    known = Repair(["Pt with f/u after bx."])  # once is enough
    assert known("f/u of the bx, h/o DCIS") == "f/u of the bx, history of ductal carcinoma in situ"


@settings(deadline=None, max_examples=200)
@given(st.text(max_size=80))
def test_any_text_keeps_its_digits_and_signs_and_changes_add_up(text):
    changes = REPAIR.changes(text)
    assert all(text[c.start : c.end] == c.before for c in changes)
    assert all(a.end <= b.start for a, b in zip(changes, changes[1:], strict=False))
    assert re.findall(r"[\d+%<>=]", REPAIR(text)) == re.findall(r"[\d+%<>=]", text)


@pytest.mark.parametrize(
    "wrong, right",
    [
        ("invasvie carcinoma", "invasive carcinoma"),
        ("Carcinma of the brreast", "Carcinoma of the breast"),
        ("axilary metastasis", "axillary metastasis"),
        ("carcinomas", "carcinomas"),  # a plural
        ("Smithe came", "Smithe came"),  # a name is near nothing
    ],
)
def test_a_letter_wrong_is_mended(wrong, right):
    assert REPAIR(wrong) == right


def test_known_words_stay_whatever_they_resemble():
    assert REPAIR(TEXTS[0]) == TEXTS[0]
    for description in list(CODES.values())[::40]:
        assert REPAIR(description) == description


@pytest.mark.parametrize(
    ("known", "twin"), [("Microscopic", "Macroscopic"), ("dysphagia", "dysphasia"), ("ileum", "ilium")]
)
def test_a_word_of_medicine_never_becomes_its_twin(known, twin):
    repair = Repair([f"{known} description follows. The {known} was seen."] * 10)
    assert repair(f"{twin} description follows.") == f"{twin} description follows."
    assert repair(f"The {twin} was seen.") == f"The {twin} was seen."


def test_a_word_that_is_another_word_is_no_misspelling():
    repair = Repair(["A change of the desmoid seen by microscopy, the testis and the nodes."] * 3)
    for text in ("chance", "dermoid", "microscope", "tests", "nodes node", "A noded"):
        assert repair(text) == text


def test_abbreviations_are_expanded_and_ambiguous_ones_need_their_context():
    assert len(ABBREVIATIONS) >= 150
    assert REPAIR("Pt s/p bx, h/o DCIS.") == "Patient status post biopsy, history of ductal carcinoma in situ."
    assert REPAIR("sob story") == "sob story"
    assert REPAIR("PE unremarkable") == "PE unremarkable"
    assert "pulmonary embolism" in REPAIR("PE, on anticoagulation")
    assert REPAIR("lesion in UOQ") == "lesion in UOQ"
    assert "upper outer quadrant" in REPAIR("left breast UOQ")


@settings(deadline=None, max_examples=200)
@given(st.text("abc", max_size=5), st.text("abc", max_size=5))
def test_one_edit_is_what_a_list_of_all_edits_says(a, b):
    every = {a[:i] + a[i + 1 :] for i in range(len(a))} | {a[:i] + c + a[i:] for i in range(len(a) + 1) for c in "abc"}
    every |= {a[:i] + c + a[i + 1 :] for i in range(len(a)) for c in "abc"}
    every |= {a[:i] + a[i + 1] + a[i] + a[i + 2 :] for i in range(len(a) - 1)}
    assert one_edit(a, b) == (b in every or a == b)
