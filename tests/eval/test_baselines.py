"""The baselines: what regular expressions and the commonest answer reach, learnt from training notes alone."""

import pytest

from eval.baselines import MajorityBaseline, RegexBaseline
from eval.metrics import score
from infer.tasks import PHENOTYPES, diagnosis_answer
from train.clinic.program import Options, annotated


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    return annotated(Options(out=tmp_path_factory.mktemp("unused"), patients=220, seed=0))


@pytest.fixture(scope="module")
def regex(splits):
    return RegexBaseline().fit(splits["train"])


def phenotype_f1(baseline, notes):
    """Exact-match F1 of the answerable phenotype questions."""
    pairs = []
    for note in notes:
        given = baseline.answers(note["text"])["phenotypes"]
        pairs += [(given[name], [a["text"] for a in right]) for name, right in note["phenotypes"].items() if right]
    return score(*zip(*pairs, strict=True)).exact_match.f1


def diagnosis_f1(baseline, notes):
    right = [[diagnosis_answer(note["diagnosis"]["text"], note["diagnosis"]["code"]).strip()] for note in notes]
    return score([[baseline.answers(note["text"])["diagnosis"]] for note in notes], right).exact_match.f1


def test_notes_are_neither_solved_by_regular_expressions_nor_beyond_them(splits, regex):
    majority = MajorityBaseline().fit(splits["train"])
    assert 40 < phenotype_f1(regex, splits["heldout"]) < 70
    assert 10 < phenotype_f1(majority, splits["heldout"]) < 30
    assert phenotype_f1(regex, splits["unseen"]) < phenotype_f1(regex, splits["heldout"])
    assert diagnosis_f1(majority, splits["heldout"]) < diagnosis_f1(regex, splits["heldout"]) < 70


def test_every_note_gets_an_answer_of_the_right_shape(splits, regex):
    for note in splits["heldout"] + splits["unseen"]:
        given = regex.answers(note["text"])
        assert list(given["phenotypes"]) == list(PHENOTYPES)
        for name, found in given["phenotypes"].items():
            if PHENOTYPES[name].values:
                assert set(found) <= set(PHENOTYPES[name].values)
            elif found:
                assert found[0].lower() in note["text"].lower()


def test_nothing_but_the_fitted_notes_is_used(splits, regex):
    again = RegexBaseline().fit(splits["train"])
    assert all(again.answers(note["text"]) == regex.answers(note["text"]) for note in splits["unseen"])
    few = RegexBaseline().fit(splits["train"][:20])
    assert phenotype_f1(few, splits["heldout"]) < phenotype_f1(regex, splits["heldout"])


def test_plain_notes_are_read(regex):
    given = regex.answers("Diagnosis: adenocarcinoma of the prostate. Tumor size: 3.4 cm. Stage: stage IIIB.")
    assert given["phenotypes"]["tumor_size"] == ["3.4 cm"]
    assert given["phenotypes"]["cancer_stage"] == ["IIIB"]
    assert given["phenotypes"]["tumor_site"] == ["prostate"]
    assert given["diagnosis"] == "Malignant neoplasm of prostate (C61)"


def test_majority_answers_alike():
    note = {
        "text": "",
        "phenotypes": {name: [] for name in PHENOTYPES},
        "diagnosis": {"text": "Malignant neoplasm of prostate", "code": "C61"},
    }
    sided = note | {"phenotypes": note["phenotypes"] | {"tumor_laterality": [{"text": "left"}]}}
    majority = MajorityBaseline().fit([note, sided, note])
    assert majority.answers("anything") == majority.answers("")
    assert majority.answers("")["phenotypes"]["tumor_laterality"] == ["left"]
    assert majority.answers("")["diagnosis"] == "Malignant neoplasm of prostate (C61)"


def test_no_training_notes_give_no_answers():
    assert MajorityBaseline().fit([]).answers("x")["diagnosis"] == ""
    assert RegexBaseline().fit([]).answers("nothing here")["diagnosis"] == ""
