"""A note's truth is its case's, whatever the style; other cancers, samples and sides never become answers."""

import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train.clinic.notes import write_note
from train.clinic.patients import draw_case, pick, quantile
from train.clinic.program import styles_for
from train.clinic.terms import CANCERS, TRAINING, UNSEEN
from train.clinic.varied import TAKEN, VARIED, reshaped, varied

SOURCES = {"training": TRAINING, "varied": varied, "unseen": UNSEEN}


def one_note(seed, source):
    rng = random.Random(seed)
    case = draw_case(rng)
    if source is varied:
        style = varied(case.cancer.surgical, rng)
        return case, style.name, *write_note(case, style, TRAINING.world, rng)
    style = styles_for(case, source.styles, rng, 1)[0]
    return case, style.name, *write_note(case, style, source.world, rng)


def answers(truth, name):
    return [answer["text"] for answer in truth["phenotypes"][name]]


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
@settings(deadline=None, max_examples=150)
@given(seed=st.integers(0, 10**9))
def test_answers_are_the_cases_own(source, seed):
    case, style, text, truth = one_note(seed, source)
    for size in answers(truth, "tumor_size"):
        largest = max(float(number) for number in re.findall(r"\d+(?:\.\d+)?", size))
        assert round(largest * (1 if re.search("mm|milli", size, re.I) else 10)) == case.size
    assert answers(truth, "cancer_grade") in ([], [f"grade {case.grade}"])
    assert answers(truth, "tumor_laterality") in ([], [case.side])
    for stage in answers(truth, "cancer_stage"):
        said = re.sub(r"^[pc]|\s", "", stage, flags=re.I).lower()
        assert said in (case.stage.group.lower(), (case.stage.t + case.stage.n + case.stage.m).lower())
    assert set(answers(truth, "hormone_receptor_status")) <= {name + state for name, state in case.receptors}
    assert len(answers(truth, "histological_type")) == 1
    assert truth["diagnosis"]["code"] == case.code(sided=True)  # a side that the code needs is always told
    assert not re.search(r"[{}\[\]|\ue000-\ue002]" if style != "careplan" else r"[{}\[\]\ue000-\ue002]", text)
    if style not in ("careplan", "phone"):  # nothing that the note rules out is its own type
        own = answers(truth, "histological_type")[0].lower()
        for ruled in ("squamous cell carcinoma", "small cell carcinoma", "metastatic melanoma", "lymphoma", "sarcoma"):
            if ruled.split()[0] in own or ruled in own:
                assert not re.search(rf"\bno (evidence of )?{ruled}|stains for {ruled}|talk of {ruled}", text.lower())


def test_a_case_without_a_fact_has_no_answer_to_it():
    leukemias = [
        made for made in (one_note(seed, TRAINING) for seed in range(400)) if made[0].cancer.name == "leukemia"
    ]
    assert leukemias
    for *_, truth in leukemias:
        assert not any(
            answers(truth, name) for name in ("tumor_size", "tumor_site", "cancer_stage", "tumor_laterality")
        )


def test_styles_share_no_template_and_no_form_but_four():
    def templates(source):
        return {t for style in source.styles for bank in style.bank.values() for t in bank if told(t)}

    def forms(source):
        return {form for style in source.styles for many in style.words.values() for form in many}

    def short_names(new):
        names = [h.names for c in CANCERS for h in c.histologies] + [
            w for c in CANCERS for w in (c.operation, c.complaint)
        ]
        return {part for name in names for part in re.split(r"[\[\]|]", name.new_short if new else name.short) if part}

    assert not templates(TRAINING) & templates(UNSEEN)
    assert forms(TRAINING) & forms(UNSEEN) == {"left", "right", "ER", "PR"}
    assert not short_names(new=False) & short_names(new=True)
    assert not {style.name for style in TRAINING.styles} & {style.name for style in UNSEEN.styles}


def every(bank):
    return [template for templates in bank.values() for template in templates]


def told(template):
    return re.search(r"[a-z]{3}", re.sub(r"{\w+}", "", template))


def test_the_varied_wording_says_nothing_that_an_unseen_style_says():
    unseen = {form for style in UNSEEN.styles for forms in style.words.values() for form in forms}
    plain = {form for style in TRAINING.styles for forms in style.words.values() for form in forms}
    sentences = {t for style in UNSEEN.styles for bank in style.bank.values() for t in bank if told(t)}
    (care,) = (style.bank for style in UNSEEN.styles if style.name == "careplan")
    labels = {line.split(" |")[0] for line in every(care) if " |" in line}
    assert labels and not labels & set(every(VARIED["labels"]))
    for seed in range(200):
        style = varied(seed % 2 == 0, random.Random(seed))
        assert not {form for forms in style.words.values() for form in forms} & (unseen - plain)
        assert not set(every(style.bank)) & sentences
    assert {"superior lobe", "inner upper quadrant", "squam ca", "low-grade"} <= TAKEN
    for seed in range(300):
        case = draw_case(random.Random(seed))
        for name in (case.histology.names.full, case.histology.names.short, case.site.names.full):
            assert reshaped(name, "hist", random.Random(seed), terse=True) not in TAKEN


def test_the_varied_wording_varies():
    firsts = {re.split(r"\W", one_note(seed, varied)[2].split("\n")[1])[0] for seed in range(120)}
    types = {answers(one_note(seed, varied)[3], "histological_type")[0] for seed in range(200)}
    fixed = {answers(one_note(seed, TRAINING)[3], "histological_type")[0] for seed in range(200)}
    assert len(firsts) > 40 and len(types) > 1.5 * len(fixed)


def test_patients_in_a_row_meet_the_cancers_in_proportion():
    weights = sum(cancer.weight for cancer in CANCERS)
    for start in (0, 57):
        cases = [draw_case(random.Random(i), quantile(start + i, 0.3)) for i in range(150)]
        for cancer in CANCERS:
            count = sum(case.cancer is cancer for case in cases)
            assert abs(count - 150 * cancer.weight / weights) <= 3, cancer.name


@settings(deadline=None, max_examples=100)
@given(u=st.floats(0, 1, exclude_max=True))
def test_a_quantile_picks_by_weight_and_leaves_a_quantile(u):
    cancer, rest = pick(CANCERS, u)
    total = sum(one.weight for one in CANCERS)
    before = sum(one.weight for one in CANCERS[: CANCERS.index(cancer)])
    assert 0 <= rest < 1
    assert (before + rest * cancer.weight) / total == pytest.approx(u, abs=1e-9)
