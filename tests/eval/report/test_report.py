"""Score and report as a user calls them: on real files, with nothing dropped and nothing unescaped."""

import doctest
import importlib
import json
import re
import subprocess
import sys
from dataclasses import replace
from itertools import combinations

import pytest

from eval import compare, score
from eval.failures import CLASSES, classify, invented, is_right
from eval.metrics.ledger import ONE_WORD, ledger
from eval.questions import Question, figures, pair, read_predictions, read_references, score_question
from eval.report.build import build, write
from eval.report.examples import examples, pieces
from eval.report.page import learning, render, terminal_table
from model.support.cli import UserError
from model.support.files import write_json, write_jsonl
from train.importers import conll

TEXT = "Breast <b>left</b>: ductal carcinoma, 2.5 cm, ER positive & HER2 negative. IIIC."


def note(number, patient, size="2.5 cm"):
    start = TEXT.index("2.5 cm")
    return {
        "id": f"n{number}",
        "patient": patient,
        "style": "prose",
        "text": TEXT,
        "phenotypes": {
            "tumor_size": [{"text": size, "start": start, "end": start + 6}],
            "cancer_stage": [],
            "hormone_receptor_status": [
                {"text": "ER+", "start": 40, "end": 51},
                {"text": "HER2-", "start": 54, "end": 67},
            ],
        },
        "diagnosis": {"text": "Malignant neoplasm of sigmoid colon", "code": "C18.7"},
    }


def answer(
    number, size="2.5 cm", status=("ER+", "HER2-"), stage=(), diagnosis="Malignant neoplasm of sigmoid colon (C18.7)"
):
    def made(texts):
        return {
            "answers": [
                {
                    "text": t,
                    "start": TEXT.find(t) if t in TEXT else None,
                    "end": TEXT.find(t) + len(t) if t in TEXT else None,
                    "logprob": -0.1,
                }
                for t in texts
            ],
            "not_relevant": not texts,
            "logprob": -0.1,
            "finish_reason": "eos",
        }

    return {
        "id": f"n{number}",
        "phenotypes": {
            "tumor_size": made([size] if size else []),
            "cancer_stage": made(stage),
            "hormone_receptor_status": made(status),
        },
        "diagnosis": {"text": diagnosis, "codes": []},
    }


@pytest.fixture
def run(tmp_path):
    notes = [note(i, f"p{i // 2}") for i in range(6)]
    for name in ("heldout", "unseen"):
        write_jsonl(tmp_path / f"{name}.jsonl", notes)
        write_jsonl(tmp_path / f"good.{name}.jsonl", [answer(i) for i in range(6)])
        write_jsonl(
            tmp_path / f"bad.{name}.jsonl",
            [answer(i, size="25 cm", status=("HER2+",), stage=("II",)) for i in range(3)],
        )
    write_jsonl(
        tmp_path / "curve.jsonl",
        [{"step": s, "loss": None if s == 4 else 3 / s, "valid_loss": 4 / s if s % 2 else None} for s in range(1, 9)],
    )
    write_json(
        tmp_path / "run.json",
        {
            "title": "T <script>",
            "compare": [["bad", "good"], ["bad", "nobody"]],
            "scale": "tiny",
            "seconds": 5,
            "peak_mb": 100,
            "host": {"cpu": "x"},
            "references": {"heldout": "heldout.jsonl", "unseen": "unseen.jsonl"},
            "curves": {"tuning": "curve.jsonl"},
            "bits_per_byte": [{"name": "notes", "before": 1.5, "after": 0.9}],
            "systems": [
                {
                    "name": n,
                    "kind": k,
                    "seconds": 1,
                    "peak_mb": 9,
                    "predictions": {s: f"{n}.{s}.jsonl" for s in ("heldout", "unseen")},
                    **extra,
                }
                for n, k, extra in (
                    ("bad", "base", {"notes": 3, "form": "chat", "grounded": False}),
                    ("good", "model", {"form": "template", "grounded": True}),
                )
            ],
        },
    )
    return tmp_path


def test_report_holds_the_figures_of_the_predictions(run):
    report = write(run)
    bad, good = report["sets"]["heldout"]["systems"]
    exact = good["clinical"]["phenotype"]["exact_match"]
    assert exact["f1"] == 100 and exact["low"] is exact["high"] is None  # three patients: no interval
    assert good["clinical"]["phenotype"]["n"] == 12 and good["clinical"]["phenotype, unanswerable"]["n"] == 6
    assert bad["notes"] == 3 and bad["clinical"]["phenotype"]["exact_match"]["f1"] == 0
    assert bad["cancerllm"]["phenotype"]["exact_match"]["f1"] > 50  # 25 cm and HER2+ pass for right there
    assert bad["clinical"]["phenotype, unanswerable"]["exact_match"]["f1"] == 0
    assert good["code"]["exact"] == {"f1": 100, "low": None, "high": None}
    failures = bad["failures"]
    assert (failures["n"], failures["wrong"], failures["invented"]) == (12, 9, 6)
    counts = {entry["name"]: entry["count"] for entry in failures["classes"]}
    assert counts == {"not asked for": 3, "another value": 6}
    assert all(len(entry["examples"]) == 3 for entry in failures["classes"]) and good["failures"]["wrong"] == 0
    size = bad["per_phenotype"]["tumor_size"]
    assert size["answerable"]["exact_match"]["f1"] == 0 and size["answerable"]["n"] == 3 and not size["unanswerable"]
    (added,) = [row for row in report["sets"]["heldout"]["paired"] if row["task"] == "phenotype"]
    assert (added["a"], added["b"], added["n"], added["difference"], added["p"]) == ("bad", "good", 6, 100, None)
    reasons = {(entry["predicted"], entry["gold"]) for entry in report["ledger"]}
    assert {("25 cm", "2.5 cm"), ("HER2+", "HER2-")} <= reasons
    assert json.loads((run / "report.json").read_text()) == json.loads(json.dumps(report))


def test_systems_that_saw_more_and_more_notes_make_a_learning_curve(run):
    assert "Learning curve" not in render(write(run))
    given = json.loads((run / "run.json").read_text())
    for seen, system in zip((500, 100), given["systems"], strict=True):
        system["seen"] = seen
    (run / "run.json").write_text(json.dumps(given))
    report = write(run)
    curve = learning(report["sets"]["heldout"]["systems"])
    assert curve["phenotypes"][:2] == ([100, 500], [100.0, 0.0])
    assert render(report).count("notes seen") == 2  # a plot's axis for each test set


def test_page_is_self_contained_and_escaped(run):
    write(run)
    page = (run / "report.html").read_text()
    assert "T &lt;script&gt;" in page and "<script" not in page and "<b>left</b>" not in page
    assert "&lt;b&gt;left&lt;/b&gt;" in page
    for outside in ("<link", "src=", "@import", "url(http"):
        assert outside not in page
    assert "<td>1.500</td><td>0.900</td>" in page  # bits per byte
    assert "<svg" in page and "Paper, private data" in page and '<mark class="right"' in page
    assert "Held-out patients: good reaches an exact-match F1 of 100.0 on phenotypes and 100.0 on diagnoses" in page
    assert page.index('class="verdict"') < page.index('<h2 id="ex">') < page.index('<h2 id="t1">')
    links = set(re.findall(r'<a href="#(\w+)"', page))
    assert links == set(re.findall(r'<h2 id="(\w+)"', page))
    assert not links & {"t3", "t4", "t6", "canaries"}  # not part of this run


def test_the_last_models_probabilities_are_compared_with_the_right_answers(run):
    report = write(run)
    part = report["confidence"]["heldout"]
    assert part["tasks"].keys() == {"phenotype"} and len(part["review"]) == min(20, part["tasks"]["phenotype"]["n"])
    page = (run / "report.html").read_text("utf-8")
    assert 'id="confidence"' in page and "Review these first" in page


def test_files_that_quote_notes_are_readable_by_their_owner_only(run):
    write(run)
    assert {(run / f"report.{kind}").stat().st_mode & 0o777 for kind in ("html", "json")} == {0o600}


def test_page_says_how_each_system_was_asked(run):
    write(run)
    page = (run / "report.html").read_text()
    assert (
        "bad: the model&#39;s chat format, unconstrained decoding.<br>good: the tuning&#39;s prompt format, "
        "grounded decoding (spans of the note, closed lists, existing ICD-10-CM codes).<"
    ) in page
    systems = json.loads((run / "run.json").read_text())["systems"]
    bare = [{key: value for key, value in one.items() if key not in ("form", "grounded")} for one in systems]
    given(run, systems=bare)
    write(run)
    assert "decoding" not in (run / "report.html").read_text()


def test_each_phenotypes_three_scores_and_each_systems_own_ceiling_are_shown(run):
    """The fewer notes that `bad` was given have no answer of one word, which the paper's BLEU-2 gives next to
    nothing."""
    side = {"tumor_laterality": [{"text": "left", "start": 10, "end": 14}]}
    notes = [note(i, f"p{i // 2}") for i in range(6)]
    more = [{**one, "phenotypes": one["phenotypes"] | side} for one in notes[3:]]
    write_jsonl(run / "heldout.jsonl", notes[:3] + more)
    write_jsonl(run / "good.heldout.jsonl", [answer(i, size="2.5 cm wide") for i in range(6)])
    found = write(run)["sets"]["heldout"]["systems"][1]["per_phenotype"]["tumor_size"]["answerable"]
    page = (run / "report.html").read_text()
    for name in ("bad", "good"):
        assert f"ceiling (gold against gold) of {name}<" in page
    exact, bleu, rouge = (found[metric]["f1"] for metric in ("exact_match", "bleu2", "rouge_l"))
    assert exact == 0 < bleu < rouge and f'<span class="n">{bleu:.1f} / {rouge:.1f}</span>' in page


TEXTS = """
const linear = v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
const light = c => c.match(/[\\d.]+/g).slice(0, 3).reduce(
  (sum, v, i) => sum + linear(v / 255) * [0.2126, 0.7152, 0.0722][i], 0);
const behind = e => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor;
  if (!c.startsWith("rgba(0, 0, 0, 0)")) return c; } };
return [...document.querySelectorAll("body *")].filter(e => e.checkVisibility() &&
    [...e.childNodes].some(n => n.nodeType == 3 && n.data.trim())).map(e => {
  const style = getComputedStyle(e), box = e.getBoundingClientRect(), svg = e.closest("svg");
  const ink = light(svg ? style.fill : style.color), paper = light(behind(e));
  return { text: e.textContent.trim().slice(0, 40), plot: svg ? [...document.querySelectorAll("svg")].indexOf(svg) : -1,
    contrast: (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05),
    size: parseFloat(style.fontSize) * (svg ? svg.getScreenCTM().a : 1),
    box: [box.left, box.top, box.right, box.bottom] };
});"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1200])
def test_page_can_be_read_on_any_screen(driver, screen, run, parts, width, scheme):
    """Nothing is wider than the screen but what scrolls in its own box; letters stand out from their ground (WCAG's
    4.5), are not tiny, and those of a plot do not cover each other."""
    for key, part in parts.items():
        write_json(run / f"{key}.json", part)
    write_json(run / "run.json", json.loads((run / "run.json").read_text()) | {key: f"{key}.json" for key in parts})
    write(run)
    screen(width, scheme)
    driver.get((run / "report.html").as_uri())
    assert driver.execute_script("return document.documentElement.scrollWidth") <= width
    texts = driver.execute_script(TEXTS)
    assert len(texts) > 500 and len({one["plot"] for one in texts}) == 9
    assert [one for one in texts if one["contrast"] < 4.5] == []
    assert [one for one in texts if one["size"] < 9] == []
    for plot in range(4):
        boxes = [one for one in texts if one["plot"] == plot]
        assert [(a["text"], b["text"]) for a, b in combinations(boxes, 2) if overlap(a["box"], b["box"])] == []


def overlap(a, b):
    return min(a[2], b[2]) - max(a[0], b[0]) > 1 and min(a[3], b[3]) - max(a[1], b[1]) > 1


def test_terminal_table_names_systems_and_n(run):
    table = terminal_table(build(run))
    assert "good" in table and "100.0  12" in table and "held-out patients" in table


def test_what_does_not_pair_up_is_counted():
    questions, counts = pair([note(0, "a"), note(1, "a")], [answer(0), answer(0, size="9 cm"), answer(7)])
    assert (counts.missing, counts.duplicate, counts.extra) == (["n1"], ["n0"], ["n7"])
    assert len(questions) == 8 and counts.empty_answers == 4
    assert figures([q for q in questions if q.name == "tumor_size"])["exact_match"]["f1"] == 50


def test_an_empty_output_is_not_the_answer_not_relevant():
    (_, stage, _, _), counts = pair([note(0, "a")], [])[0], pair([note(0, "a")], [])[1]
    assert stage.name == "cancer_stage" and stage.gold == () and counts.missing == ["n0"]
    for preset in ("clinical", "cancerllm"):
        assert score_question(stage, preset)["exact_match"].f1 == 0
        assert score_question(replace(stage, empty_output=False), preset)["exact_match"].f1 == 100
    assert not is_right(stage) and classify(stage) == "empty"


def test_short_forms_of_predictions_are_taken():
    mine = {
        "id": "n0",
        "phenotypes": {
            "tumor_size": "25 mm",
            "cancer_stage": "not relevant",
            "hormone_receptor_status": ["ER+", "HER2-"],
        },
        "diagnosis": "C18.7",
    }
    for status in (["ER+", "HER2-"], {"answers": "ER+; HER2-"}, {"answers": ["ER+", {"text": "HER2-"}]}):
        mine["phenotypes"]["hormone_receptor_status"] = status
        questions, _ = pair([note(0, "a")], [mine])
        assert figures([q for q in questions if q.task == "phenotype"])["exact_match"]["f1"] == 100


def test_short_forms_of_right_answers_are_taken(tmp_path):
    """A file of one's own need not know our records: text for a phenotype is not taken letter by letter."""
    mine = {
        "id": "n7",
        "text": TEXT,
        "phenotypes": {
            "tumor_size": "2.5 cm",
            "cancer_stage": "not relevant",
            "hormone_receptor_status": "ER+; HER2-",
            "tumor_site": None,
        },
        "diagnosis": "C18.7",
    }
    write_jsonl(tmp_path / "gold.jsonl", [mine])
    (tmp_path / "gold.jsonl").write_bytes(b"\xef\xbb\xbf" + (tmp_path / "gold.jsonl").read_bytes())
    (record,) = read_references(tmp_path / "gold.jsonl")
    questions, counts = pair(
        [record], [{**answer(7), "diagnosis": "C18.7", "phenotypes": {**answer(7)["phenotypes"], "tumor_site": []}}]
    )
    golds = {one.name: one.gold for one in questions}
    assert golds == {
        "tumor_size": ("2.5 cm",),
        "cancer_stage": (),
        "hormone_receptor_status": ("ER+", "HER2-"),
        "tumor_site": (),
        "diagnosis": ("C18.7",),
    }
    assert figures(questions)["exact_match"]["f1"] == 100 and counts.missing == []


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"phenotypes": ["2.5 cm"]}, "m.jsonl:1: 'phenotypes' is a list"),
        ({"phenotypes": {"tumour_size": "2.5 cm"}}, "did you mean 'tumor_size'"),
        ({"phenotypes": {"tumor_size": 2.5}}, "m.jsonl:1: tumor_size is neither"),
        ({"phenotypes": {"tumor_size": {"answers": [{"value": "2 cm"}]}}}, "tumor_size is neither"),
        ({"diagnosis": ["C18.7"]}, "m.jsonl:1: 'diagnosis' is neither"),
        ({"id": None, "phenotypes": {}}, "m.jsonl:1: 'id' is neither"),
        ({"id": ["n0"], "phenotypes": {}}, "m.jsonl:1: 'id' is neither"),
    ],
)
@pytest.mark.parametrize("read", [read_predictions, read_references])
def test_files_of_another_form_are_refused_with_their_line(tmp_path, read, changed, said):
    write_jsonl(tmp_path / "m.jsonl", [{"id": "1", "text": "a", **changed}])
    with pytest.raises(UserError, match=said):
        read(tmp_path / "m.jsonl")


def test_a_text_that_is_none_is_refused_with_its_line(tmp_path):
    write_jsonl(tmp_path / "m.jsonl", [{"id": "1", "text": 5, "phenotypes": {"tumor_size": "2 cm"}}])
    with pytest.raises(UserError, match="m.jsonl:1: 'text' is not text"):
        read_references(tmp_path / "m.jsonl")


@pytest.mark.parametrize("nobody", [None, "", "absent"])
def test_notes_that_name_no_patient_are_patients_of_their_own(nobody):
    notes = [
        {key: value for key, value in note(i, nobody).items() if (key, value) != ("patient", "absent")}
        for i in range(3)
    ]
    assert figures(pair(notes, [])[0])["patients"] == 3


@pytest.mark.parametrize(
    ("name", "gold", "said", "expected"),
    [
        ("tumor_size", ("2.5 cm",), ("2.5 cm thick",), "too much"),
        ("tumor_size", (), ("2.5 cm",), "not asked for"),
        ("histological_type", ("ductal carcinoma",), ("ductal carcinom",), "misspelling"),
        ("cancer_stage", ("IIIC",), ("III",), "another value"),
        ("cancer_grade", ("grade 2",), ("grade 3",), "another value"),
        ("tumor_size", ("7.5 cm",), ("2.5 cm",), "label noise suspected"),
        ("histological_type", ("ductal carcinoma",), ("the the the",), "repeated"),
        ("hormone_receptor_status", ("ER+", "HER2-"), ("ER+",), "incomplete"),
    ],
)
def test_failures_are_classified(name, gold, said, expected):
    assert classify(Question("n", "p", name, gold, said), TEXT) == expected and expected in CLASSES


def test_a_size_is_no_stage_group_and_a_group_no_size():
    size = Question("n", "p", "cancer_stage", ("IA",), ("4.5 x 2.9 x 2.7 cm",))
    assert classify(size) == "irrelevant"
    assert classify(replace(size, gold=("IIB",), predicted=("IIIC",))) == "another value"
    assert classify(replace(size, gold=("2 x 3 mm",))) == "another value"


def test_adapters_of_one_base_are_no_independent_evidence(run):
    """Adapters of one base that invent the same answer say nothing of the label; another program that does may."""
    sister = json.loads((run / "run.json").read_text())["systems"][0]
    for kind, name in (("model", "incomplete"), ("regex", "label noise suspected")):
        wrong = [answer(i, size="ductal") for i in range(6)]
        for file in ("bad.heldout.jsonl", "good.heldout.jsonl"):
            write_jsonl(run / file, wrong)
        systems = json.loads((run / "run.json").read_text())["systems"]
        given(run, systems=[{**sister, "kind": kind, "notes": 6}, systems[1]])
        (_, model) = build(run)["sets"]["heldout"]["systems"]
        counts = {entry["name"]: entry["count"] for entry in model["failures"]["classes"]}
        assert counts == {"irrelevant" if kind == "model" else name: 6}


def test_an_answer_is_marked_where_the_model_read_it():
    text = "Mass 2 cm in 2020; today the mass is 2 cm."
    right = {"text": "2 cm", "start": 5, "end": 9}
    record = {"id": "n", "text": text, "phenotypes": {"tumor_size": [right]}}
    read = {"text": "2 cm", "start": 37, "end": 41}
    (shown,) = examples([record], [{"id": "n", "phenotypes": {"tumor_size": {"answers": [read]}}}], 1)
    marked = [(piece["text"], piece["kind"]) for piece in shown["pieces"] if piece["kind"]]
    assert marked == [("2 cm", "right")] and shown["pieces"][0]["text"] == text[:37]


def test_records_with_questions_of_their_own_are_scored(tmp_path, capsys):
    """As train.importers.conll writes them and infer.extract answers them."""
    (tmp_path / "c.tsv").write_text("Gout\tB-Disease\nand\tO\nflu\tB-Disease\n\nNone\tO\n")
    write_jsonl(tmp_path / "gold.jsonl", conll.records(tmp_path / "c.tsv", 1))
    records = read_references(tmp_path / "gold.jsonl")
    replies = [{"answers": [{"text": "gout"}], "not_relevant": False}, {"answers": [], "not_relevant": True}]
    said = [{"id": record["id"], "answers": [reply]} for record, reply in zip(records, replies, strict=True)]
    write_jsonl(tmp_path / "said.jsonl", said)
    score.main(score.Options(tmp_path / "said.jsonl", tmp_path / "gold.jsonl", json=True))
    found = json.loads(capsys.readouterr().out)["groups"]
    assert found["own question"]["exact_match"]["precision"] == 100
    assert found["own question"]["exact_match"]["recall"] == 50
    assert found["own question, unanswerable"]["exact_match"]["f1"] == 100
    write_jsonl(tmp_path / "said.jsonl", said[:1])
    assert [one.empty_output for one in pair(records, read_predictions(tmp_path / "said.jsonl"))[0]] == [False, True]
    write_json(
        tmp_path / "run.json",
        {
            "references": {"test": "gold.jsonl"},
            "systems": [{"name": "m", "kind": "model", "predictions": {"test": "said.jsonl"}}],
        },
    )
    write(tmp_path)
    assert "The records' own questions" in (tmp_path / "report.html").read_text()
    write_jsonl(tmp_path / "bad.jsonl", [{"id": "1", "text": "a", "questions": [{"answers": []}]}])
    with pytest.raises(UserError, match="bad.jsonl:1: 'questions' is not a list of"):
        read_references(tmp_path / "bad.jsonl")


def test_invented_answers_do_not_occur_in_the_note():
    assert invented(Question("n", "p", "tumor_size", (), ("2.5 cm", "3 cm")), TEXT) == 1
    assert invented(Question("n", "p", "cancer_grade", (), ("grade 4",)), TEXT) == 0


@pytest.mark.parametrize(
    ("predicted", "gold", "reason"),
    [
        ("HER2+", "HER2-", "+ and − become equal"),
        ("25 cm", "2.5 cm", "the point in a number or code"),
        ("carcinomas", "carcinoma", "Porter stems"),
        ("ALL", "all", "stripping punctuation or case"),
        ("25 mm", "2.5 cm", "written differently (unit"),
        ("Left lobe.", "left lobe", "carries no clinical meaning"),
    ],
)
def test_the_ledger_says_why_presets_differ(predicted, gold, reason):
    (entry,) = ledger([((predicted,), (gold,))])
    assert reason in entry["why"] and len(set(entry["verdicts"].values())) == 2


def test_the_ledger_lists_right_answers_that_a_definition_scores_near_zero():
    entries = ledger([(("left",), ("left",)), (("25 mm",), ("2.5 cm",)), (("left lobe",), ("left lobe",))])
    assert [entry["why"] == ONE_WORD for entry in entries] == [False, True]
    assert entries[1]["verdicts"] == {name: "BLEU-2 0.1" for name in ("cancerllm", "coco", "rouge_score")} | {
        "nltk": "BLEU-2 0.0"
    }


def test_ledger_counts_equal_disagreements():
    entries = ledger([(("25 mm",), ("2.5 cm",))] * 3 + [(("x y",), ("x y",))])
    assert [(e["predicted"], e["count"]) for e in entries] == [("25 mm", 3)]
    assert entries[0]["verdicts"]["clinical"] == "right"


def test_pieces_joined_are_the_note():
    cut = pieces(TEXT, [(0, 6, "right", "tumor_site"), (3, 20, "missed", "tumor_size"), (70, 900, "wrong", "x")])
    assert "".join(piece["text"] for piece in cut) == TEXT
    assert [piece["kind"] for piece in cut[:3]] == ["right", "missed", "missed"]


def given(run, **changed):
    write_json(run / "run.json", json.loads((run / "run.json").read_text()) | changed)


def call(*arguments):
    return subprocess.run([sys.executable, "-m", *map(str, arguments)], capture_output=True, text=True)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda run: (run / "run.json").write_text("{"), "not JSON"),
        (lambda run: write_json(run / "run.json", {"systems": []}), "'systems' or 'references' is missing"),
        (lambda run: (run / "good.unseen.jsonl").unlink(), "good.unseen.jsonl: no such file"),
        (lambda run: (run / "heldout.jsonl").write_text('{"id": 1}\n'), "heldout.jsonl:1: lacks the field 'text'"),
        (lambda run: given(run, systems=[{"name": "a", "predictions": {}}]), r"systems\[0\] lacks kind"),
        (lambda run: given(run, references=["x"]), "run.json: 'systems' or 'references' is missing"),
        (
            lambda run: write_jsonl(run / "curve.jsonl", [{"step": 1, "loss": "low"}]),
            "curve.jsonl:1: 'step' or 'loss'",
        ),
        (lambda run: given(run, retrieval="report.json"), "report.json: no such file"),
    ],
)
def test_mistakes_are_one_line(run, spoil, said):
    spoil(run)
    with pytest.raises(UserError, match=said):
        write(run)
    assert not (run / "report.html").exists()


def test_two_systems_are_compared_on_what_both_were_asked(run, capsys):
    compare.main(compare.Options(a=run, b=run, system_a="bad", system_b="good", json=True))
    rows = json.loads(capsys.readouterr().out)
    tasks = ("phenotype", "phenotype, unanswerable", "diagnosis")
    assert [(row["set"], row["task"]) for row in rows] == [(s, task) for s in ("heldout", "unseen") for task in tasks]
    assert all(row["n"] == (6 if row["task"] == "phenotype" else 3) and row["patients"] == 2 for row in rows)
    assert [row["difference"] for row in rows[:3]] == [100, 100, 0] and len(rows[0]["changed"]) == 6
    compare.main(compare.Options(a=run, b=run, changed=1))
    assert "heldout, diagnosis, good: 100.0 -> 100.0" in capsys.readouterr().out
    with pytest.raises(UserError, match="did you mean 'good'"):
        compare.main(compare.Options(a=run, b=run, system_a="bad", system_b="goood"))


def test_score_as_a_program(run):
    done = call(
        "eval.score", "--predictions", run / "good.heldout.jsonl", "--references", run / "heldout.jsonl", "--json"
    )
    assert done.returncode == 0 and json.loads(done.stdout)["groups"]["diagnosis"]["exact_match"]["f1"] == 100
    done = call("eval.score", "--predictions", run / "none.jsonl", "--references", run / "heldout.jsonl")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "Traceback" not in done.stderr


@pytest.mark.parametrize("module", ["eval.failures", "eval.metrics.statistics", "eval.perplexity"])
def test_worked_examples(module):
    result = doctest.testmod(importlib.import_module(module))
    assert result.attempted and not result.failed
