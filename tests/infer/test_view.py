"""The page of a job's answers: what is beside what, what is wrong, unsure or not in the note, and what is refused."""

import json
import math
import os

import pytest

from infer import tasks, view
from infer.extract.notes import Note
from infer.extract.program import Options as ExtractOptions
from infer.extract.program import main as extract
from model.support.cli import UserError

TEXT = "Left breast 2.5 cm, then 2.5 cm."


def answer(*values, **more):
    return {"answers": list(values), "not_relevant": not values, "logprob": -0.5, "finish_reason": "stop", **more}


def value(text, start=None, end=None, **more):
    return {"text": text, "start": start, "end": end, "logprob": math.log(0.25), **more}


def diagnosis(text="Malignant neoplasm of left breast (C50.912)", code="C50.912"):
    return {"text": text, "codes": [{"code": code, "description": ""}], "logprob": -2.0, "finish_reason": "stop"}


RECORD = {
    "id": "a",
    "phenotypes": {
        "tumor_size": answer(value("2.5 cm", 12, 18, ambiguous=[[25, 31]])),
        "tumor_site": answer(value("lung")),
        "tumor_laterality": answer(value("left")),
        "cancer_stage": answer(),
    },
    "diagnosis": diagnosis(),
}
GOLD = {
    "phenotypes": {
        "tumor_size": [{"text": "2.5  CM", "start": 12, "end": 18}],
        "tumor_site": [{"text": "breast", "start": 5, "end": 11}],
        "cancer_stage": [],
    },
    "diagnosis": {"text": "Malignant neoplasm of right breast", "code": "C50.911"},
}


def rows(record=RECORD, gold=GOLD):
    return {row["name"]: row for row in view.answer_rows(record, gold)}


def test_a_row_says_places_probability_and_whether_it_is_right():
    found = rows()
    assert found["tumor_size"]["values"][0]["places"] == [[12, 18], [25, 31]]
    assert found["tumor_size"]["p"] == pytest.approx(math.exp(-0.5))
    right = {name: row["right"] for name, row in found.items()}
    assert right == {
        "tumor_size": True,  # case and spaces aside
        "tumor_site": False,
        "tumor_laterality": None,  # the gold does not say
        "cancer_stage": True,
        "diagnosis": False,  # another code
    }
    assert found["cancer_stage"]["gold"] == ["not relevant"] and found["tumor_laterality"]["gold"] is None


@pytest.mark.parametrize(("said", "right"), [("not relevant", True), ("Malignant neoplasm of lung (C34.90)", False)])
def test_a_note_without_a_cancer_has_no_code(said, right):
    codes = [{"code": "C34.90", "description": ""}] * (not right)
    record = {"diagnosis": {"text": said, "codes": codes, "logprob": -1.0, "finish_reason": "stop"}}
    row = rows(record, {"diagnosis": {"text": "not relevant"}})["diagnosis"]
    assert row["right"] is right and row["gold"] == ["not relevant"]


def test_a_note_is_ungrounded_by_a_span_and_not_by_a_closed_value_without_a_place():
    entry = view.entry(Note("a", TEXT), RECORD, GOLD)
    assert entry["ungrounded"] and entry["wrong"] and entry["least"] == pytest.approx(math.exp(-2))
    placed = {**RECORD, "phenotypes": {**RECORD["phenotypes"], "tumor_site": answer(value("breast", 5, 11))}}
    assert not view.entry(Note("a", TEXT), placed)["ungrounded"]


def test_a_calibrated_probability_comes_before_the_models_own():
    record = {"phenotypes": {"tumor_size": answer(probability=0.8)}}
    assert rows(record, {})["tumor_size"]["p"] == 0.8
    old = {"phenotypes": {"tumor_size": {"answers": [], "not_relevant": True, "finish_reason": "stop"}}}
    assert rows(old, {})["tumor_size"]["p"] is None  # a record of an older job has none for "not relevant"


def test_each_phenotype_has_a_letter_of_its_own():
    assert list(view.LETTERS) == list(tasks.PHENOTYPES) and len(set(view.LETTERS.values())) == 8


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def made(tmp_path, records, notes, **more):
    options = view.Options(
        write(tmp_path / "a.jsonl", *records), write(tmp_path / "n.jsonl", *notes), tmp_path / "page.html", **more
    )
    view.main(options)
    return (tmp_path / "page.html").read_text("utf-8")


def test_a_jobs_own_output_becomes_a_page_for_its_owner_that_holds_no_markup_of_a_note(weights, tmp_path):
    text = "</script><script>document.title=1</script> Left breast, 2.5 cm.\r\n\u2028\U0001f600"
    notes = write(tmp_path / "n.jsonl", {"id": "</script>", "text": text}, {"id": "b", "text": "  "})
    extract(ExtractOptions(weights=str(weights), notes=notes, out=tmp_path / "o.jsonl", grounded=True))
    view.main(view.Options(tmp_path / "o.jsonl", notes, tmp_path / "page.html"))
    page = (tmp_path / "page.html").read_text("utf-8")
    assert os.stat(tmp_path / "page.html").st_mode & 0o777 == 0o600
    assert page.count("<script") == 2 and page.count("</script>") == 2 and "http" not in page.split("<body>")[0][400:]
    data = json.loads(page.split('id="data">')[1].split("</script>")[0])
    assert [note["text"] for note in data["notes"]] == [text, ""]
    assert len(data["notes"][0]["rows"]) == 9 and data["notes"][1]["error"] == "the note is empty"


def test_own_questions_and_the_first_notes_alone_are_shown(tmp_path):
    record = {"id": "a", "answers": [{"question": "What was given?", **answer(value("breast", 5, 11))}]}
    page = made(tmp_path, [record], [{"id": "a", "text": TEXT}, {"id": "b", "text": TEXT}])
    assert "What was given?" in page


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({**RECORD, "id": "b"}, "is about another note"),
        (
            {"id": "a", "phenotypes": {"tumor_size": answer(value("2.5 cm", 12, 99))}},
            "not a record of infer.extract",
        ),
        ({"id": "a", "phenotypes": {"tumor_size": {"answers": "2.5 cm"}}}, "not a record of infer.extract"),
        ({"id": "a", "phenotypes": ["tumor_size"]}, "not a record of infer.extract"),
        ({"id": "a", "diagnosis": "C50"}, "not a record of infer.extract"),
    ],
)
def test_answers_that_are_not_of_these_notes_are_refused_and_nothing_is_written(tmp_path, record, said):
    with pytest.raises(UserError, match=said):
        made(tmp_path, [record], [{"id": "a", "text": TEXT}])
    assert not (tmp_path / "page.html").exists()


def test_more_answers_than_notes_are_refused(tmp_path):
    with pytest.raises(UserError, match="a.jsonl:2: .* has no note for it"):
        made(tmp_path, [RECORD, RECORD], [{"id": "a", "text": TEXT}])


def test_a_page_that_is_there_stays(tmp_path):
    (tmp_path / "page.html").write_text("mine")
    with pytest.raises(UserError, match="exists"):
        made(tmp_path, [RECORD], [{"id": "a", "text": TEXT}])
    assert made(tmp_path, [RECORD], [{"id": "a", "text": TEXT}], overwrite=True) != "mine"
