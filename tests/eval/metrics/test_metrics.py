"""Every preset against its public peer, to 1e-9 of a score of 1; the pathologies that the clinical preset must not
have."""

import doctest
import importlib
import math
import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eval.metrics import PRESETS, pairs, score
from eval.metrics.text import clinical, released, words_13a
from model.support.cli import UserError

CLINICAL = [
    "HER2+",
    "HER2-",
    "2.5",
    "25",
    "cm",
    "x",
    "C50.911",
    "left",
    "upper",
    "lobe",
    "carcinoma",
    "grade",
    "3",
    "T1c.",
    "(ER)",
    "not",
    "30%",
    "a-b",
    "..",
    "3.",
    ".5",
    "1,000",
    "&amp;",
    "it's",
    "\u00e9t\u00e9",
    "7-8",
]
words = st.one_of(
    st.sampled_from(CLINICAL),
    st.text(alphabet="ab.,-'&;<>1 \t\u00c9", min_size=1, max_size=6),
    st.text(min_size=1, max_size=4),
)
texts = st.lists(words, min_size=1, max_size=9).map(" ".join).filter(str.strip)
likely = settings(deadline=None, max_examples=250)


def one(p, g, preset):
    """m(p, g), 0 to 1, through the whole scorer."""
    return score([[p]], [[g]], preset).per_question[0]


@pytest.mark.parametrize("module", ["text", "pairs", "scoring"])
def test_worked_examples(module):
    result = doctest.testmod(importlib.import_module(f"eval.metrics.{module}"))
    assert result.attempted and not result.failed


@likely
@given(texts, texts)
def test_coco_is_pycocoevalcap(p, g):
    from pycocoevalcap.bleu.bleu_scorer import BleuScorer
    from pycocoevalcap.rouge.rouge import Rouge

    scorer = BleuScorer(n=2)
    scorer += (p.strip(), [g.strip()])
    ours = one(p, g, "coco")
    assert ours["bleu2"].f1 / 100 == pytest.approx(scorer.compute_score(option="closest")[1][1][0], abs=1e-9)
    assert ours["rouge_l"].f1 / 100 == pytest.approx(Rouge().calc_score([p.strip()], [g.strip()]), abs=1e-9)


@likely
@given(texts, texts)
def test_cancerllm_is_the_coco_scorers_on_stemmed_text(p, g):
    from pycocoevalcap.bleu.bleu_scorer import BleuScorer
    from pycocoevalcap.rouge.rouge import Rouge

    ours = one(p, g, "cancerllm")
    a, b = released(p.strip()), released(g.strip())
    assert ours["exact_match"].f1 == 100.0 * (a == b)
    if a and b:
        scorer = BleuScorer(n=2)
        scorer += (a, [b])
        assert ours["bleu2"].f1 / 100 == pytest.approx(scorer.compute_score(option="closest")[1][1][0], abs=1e-9)
        assert ours["rouge_l"].f1 / 100 == pytest.approx(Rouge().calc_score([a], [b]), abs=1e-9)


@likely
@given(texts, texts)
def test_sacrebleu_is_sacrebleu(p, g):
    from sacrebleu.metrics import BLEU

    peer = BLEU(max_ngram_order=2, effective_order=True)
    assert " ".join(words_13a(g)) == peer._preprocess_segment(g)
    ours = one(p, g, "sacrebleu")["bleu2"].f1
    assert ours == pytest.approx(peer.sentence_score(p.strip(), [g.strip()]).score, abs=1e-7)


@likely
@given(texts, texts)
def test_nltk_is_nltk(p, g):
    from nltk.translate.bleu_score import sentence_bleu

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peer = sentence_bleu([g.split()], p.split(), weights=(0.5, 0.5))
    assert one(p, g, "nltk")["bleu2"].f1 / 100 == pytest.approx(peer, abs=1e-9)


@likely
@given(texts, texts)
def test_rouge_score_is_rouge_score(p, g):
    from rouge_score.rouge_scorer import RougeScorer

    peer = RougeScorer(["rougeL"]).score(g.strip(), p.strip())["rougeL"].fmeasure
    assert one(p, g, "rouge_score")["rouge_l"].f1 / 100 == pytest.approx(peer, abs=1e-9)


def lcs_by_definition(a, b):
    """The longest common subsequence by a table of lengths."""
    above = [0] * (len(b) + 1)
    for item in a:
        row = [0]
        for j, other in enumerate(b):
            row.append(above[j] + 1 if item == other else max(above[j + 1], row[j]))
        above = row
    return above[-1]


@likely
@given(st.lists(st.integers(0, 5), max_size=90), st.lists(st.integers(0, 5), max_size=90))
def test_bit_parallel_lcs_is_the_table(a, b):
    assert pairs.lcs_length(a, b) == lcs_by_definition(a, b)


def test_known_pathologies_of_the_released_scorer():
    for a, b in (("HER2+", "HER2-"), ("2.5", "25"), ("C50.911", "C50911")):
        assert one(a, b, "cancerllm")["exact_match"].f1 == 100
    assert one("left", "left", "cancerllm")["bleu2"].f1 == pytest.approx(0.1, abs=1e-4)
    assert math.isnan(score(["left"], ["left"], "cancerllm-released").bleu2.f1)
    assert one("b a", "a b", "cancerllm-released")["rouge_l"].f1 == 100  # sets have no order


@likely
@given(st.lists(st.sampled_from(CLINICAL), max_size=4))
def test_gold_against_gold_is_100_under_clinical(gold):
    result = score([gold], [gold])
    if all(clinical(g) for g in gold):  # ".." has no word
        assert result.exact_match.f1 == 100 and result.bleu2.f1 == pytest.approx(100) == result.rouge_l.f1
    assert 0 <= result.average_f1 <= 100 + 1e-9


@pytest.mark.parametrize(
    ("p", "g", "expected"),
    [
        ([], [], (100, 100, 100)),
        (["x"], [], (0, 100, 0)),
        ([], ["x"], (100, 0, 0)),
        ("x; x", "x", (100, 100, 100)),
        ("not relevant", [], (100, 100, 100)),
        ("x; z", "x; y", (50, 50, 50)),
    ],
)
def test_set_scorers_edges(p, g, expected):
    result = score([p], [g]).exact_match
    assert (result.precision, result.recall, result.f1) == expected


@likely
@given(st.lists(words, max_size=4))
def test_a_list_is_the_text_that_joins_it(answers):
    """The paper's presets split on commas, which answers hold too: there the text of such a list is another one."""
    assert score(["; ".join(answers)], [answers]).exact_match.f1 == 100
    for preset in PRESETS:
        assert score([answers], [answers], preset).exact_match.f1 == 100
        if not any("," in answer for answer in answers):
            assert score([", ".join(answers)], [answers], "coco").exact_match.f1 == 100


@pytest.mark.parametrize("answer", ["2,5 cm", "pT2, pN1a", "1,000", "Malignant neoplasm of prostate, left (C61)"])
def test_a_comma_belongs_to_an_answer_but_in_the_papers_presets(answer):
    assert score([answer], [[answer]]).exact_match.f1 == 100
    assert score([f"{answer}; left"], [["left", answer]]).exact_match.f1 == 100
    assert score([answer], [answer.split(",")], "cancerllm").exact_match.f1 == 100


def test_mistakes_are_named():
    with pytest.raises(UserError, match="clinical"):
        score(["a"], ["a"], "clinicl")
    with pytest.raises(UserError, match="2 predictions for 1"):
        score(["a", "b"], ["a"])
    with pytest.raises(UserError, match="give lists"):
        score("left", "left")
    with pytest.raises(UserError, match="nothing"):
        score([], [])


def test_signature_names_every_choice():
    assert len({score(["a"], ["a"], name).signature for name in PRESETS}) == len(PRESETS)
    assert len({preset.choices for preset in PRESETS.values()}) == len(PRESETS)


@pytest.mark.parametrize("name", PRESETS)
def test_a_signature_alone_reproduces_a_score(name):
    asked = ["HER2+", "the left Upper lobe, 25 mm", ""], ["HER2-", "left lower lobe, 2.5 cm", "not relevant"]
    first = score(*asked, name)
    assert repr(score(*asked, first.signature)) == repr(first)
    with pytest.raises(UserError, match="cannot be reproduced"):
        score(*asked, first.signature.replace("|v:", "|v:0"))
