"""A hospital's own table becomes records that the scorer and the trainer take, or one line says what is wrong with
it."""

import csv

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infer.codes import BILLABLE, CODES, canonical, describe, lookup
from infer.tasks import parse_answer
from model.support.cli import UserError
from train.data import neighbours
from train.data.records import questions
from train.importers import brat as from_brat
from train.importers import conll as from_ner
from train.importers import table as from_table
from train.importers.record import diagnosis, place, remarks
from train.importers.table import records

HEAD = "text,type,answer\n"
NOTE = '"Left breast, mass 2.5 cm; grade 2"'


def table(tmp_path, content, name="t.csv"):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_rows_of_one_text_are_one_record_with_spans(tmp_path):
    made = records(
        table(
            tmp_path,
            HEAD + f"{NOTE},tumor_size,2.5 cm\n{NOTE},Tumor Laterality,left\n{NOTE},cancer_stage,not relevant\n"
            f'{NOTE},diagnosis,"Malignant neoplasm of unspecified site of left female breast (C50.912)"\n',
        )
    )
    assert len(made) == 1
    record = made[0]
    size = record["phenotypes"]["tumor_size"][0]
    assert record["text"][size["start"] : size["end"]] == "2.5 cm"
    assert record["phenotypes"]["tumor_laterality"][0]["start"] == 0 and record["phenotypes"]["cancer_stage"] == []
    assert record["diagnosis"] == {
        "text": "Malignant neoplasm of unspecified site of left female breast",
        "code": "C50.912",
    }
    assert ("What is the cancer stage?", " not relevant") in questions(record, "both")


@pytest.mark.parametrize(("delimiter", "start"), [(",", b""), (";", b"\xef\xbb\xbf"), ("\t", b"")])
def test_delimiters_and_excels_mark(tmp_path, delimiter, start):
    lines = ["id text question answer patient".replace(" ", delimiter)]
    lines += [delimiter.join((f"a{i}", f"size {i} cm", "What is the tumor size?", f"{i} cm", "p1")) for i in range(3)]
    made = records(table(tmp_path, start + "\r\n".join(lines).encode()))
    assert [r["id"] for r in made] == ["a0", "a1", "a2"] and {r["patient"] for r in made} == {"p1"}


def test_a_table_as_a_spreadsheet_saves_it(tmp_path):
    """Semicolons, a mark at the start, a note of several lines in one cell, control characters, empty rows below."""
    note = 'Left breast;\r\nmass "2.5 cm"\n\x0cgrade 2\u2028ER+'
    cell = '"' + note.replace('"', '""') + '"'
    rows = f"Text;Type;Answer\r\n{cell};tumor_size;2.5 cm\r\n{cell};cancer_grade;grade 2\r\n;;\r\n;;\r\n"
    (made,) = records(table(tmp_path, b"\xef\xbb\xbf" + rows.encode()))
    assert made["text"] == note and note[slice(*places(made, "tumor_size"))] == "2.5 cm"
    (made,) = records(table(tmp_path, "text,type,answer\nsize\x0c3 cm,tumor_size,3 cm\n"))
    assert made["text"] == "size\x0c3 cm"


def places(record, name):
    return record["phenotypes"][name][0]["start"], record["phenotypes"][name][0]["end"]


def test_a_cell_is_one_answer_unless_a_separator_is_named(tmp_path):
    rows = [
        ("ER+; PR-. pT2, pN1a. 2,5 cm", kind, answer)
        for kind, answer in (
            ("hormone_receptor_status", "ER+; PR-"),
            ("cancer_stage", "pT2, pN1a"),
            ("tumor_size", "2,5 cm"),
        )
    ]
    with open(tmp_path / "t.csv", "w", newline="") as out:
        csv.writer(out).writerows([HEAD.strip().split(","), *rows])
    (one,), (divided,) = records(tmp_path / "t.csv"), records(tmp_path / "t.csv", ";")
    said = [[answer["text"] for answer in answers] for answers in one["phenotypes"].values()]
    assert said == [["ER+; PR-"], ["pT2, pN1a"], ["2,5 cm"]]
    assert [answer["text"] for answer in divided["phenotypes"]["hormone_receptor_status"]] == ["ER+", "PR-"]
    assert divided["phenotypes"]["cancer_stage"] == one["phenotypes"]["cancer_stage"]


@given(st.lists(st.sampled_from(["1", "2,5 cm", "pT2; pN1a", "a; b", "a;b", "x"]), min_size=1))
def test_as_many_answers_are_named_as_score_in_parts(answers):
    """The report counts what `parse_answer` would divide, whatever separates answers there."""
    spans = [{"text": answer, "start": 0, "end": 1} for answer in answers]
    divided = sum(len(parse_answer(answer)) > 1 for answer in answers)
    said = remarks([{"phenotypes": {"tumor_size": spans}}])
    assert (f"; {divided} answers hold the separator" in said) == (divided > 0)


def test_span_of_an_answer_that_stands_nowhere():
    assert place("mass of 3 cm", "2 cm") == {"text": "2 cm", "start": None, "end": None}
    assert place("LEFT breast", "left")["end"] == 4
    assert place("Cyst of 2.5 cm. Tumor of 5 cm.", "5 cm")["start"] == 25 and place("2.5 cm", "5 cm")["start"] is None
    assert place("Cleft palate; left breast", "left")["start"] == 14
    assert place("upper\r\n outer", "upper outer") == {"text": "upper outer", "start": 0, "end": 13}


FORMS = (
    "{code}",
    "{bare}",
    "{low}",
    "{text} ({code})",
    "{text} ({low})",
    "{text} [{code}]",
    "{text} ({bare})",
    "{code} {text}",
    "{code} - {text}",
    "{code}: {text}",
    "{bare}: {text}",
    "{text}, {code}.",
    "{text} {code}",
    "{text} \u2013 {code}",
    "{code}.",
    "{text}.",
)


@given(st.sampled_from(BILLABLE), st.sampled_from(FORMS))
def test_a_code_is_read_in_every_form_and_its_description_kept(code, form):
    text = describe(code)
    written = form.format(code=code, bare=code.replace(".", ""), low=code.lower(), text=text)
    assert diagnosis(written, "f:2") == {"text": text, "code": code}


@given(
    st.from_regex(r"\A([A-Z][0-9][0-9A-Z]\.[0-9][0-9A-Z]{0,3}|[CD][0-9][0-9][0-9]{1,4})\Z"),
    st.sampled_from(list(CODES.values())),
    st.sampled_from(["{code}", "{text} ({code})", "{code} - {text}", "{text} [{code}]", "{text}, {low}", "({code})"]),
)
def test_a_written_code_is_never_replaced(code, text, form):
    """Other chapters, retired and mistyped codes: refused by name, and no similar one is looked up either."""
    answer = form.format(code=code, low=code.lower(), text=text)
    if canonical(code):
        assert diagnosis(answer, "f:2")["code"] == canonical(code)
        return
    assert lookup(answer) == []
    with pytest.raises(UserError, match=rf"^f:2: (?i:{code}) is not an ICD-10-CM code"):
        diagnosis(answer, "f:2")


@pytest.mark.parametrize(
    "answer",
    [
        "Malignant neoplasm of breast (174.9)",
        "Lung cancer (8140/3)",
        "Lump",
        "Personal history of breast cancer (Z853)",
        "breast",
        "Malignant neoplasm of breast C1.80",
        "Malignant neoplasm of colon CI8.0",
    ],
)
def test_no_similar_diagnosis_is_looked_up(answer):
    with pytest.raises(UserError, match="^f:2: .*ICD-10-CM code"):
        diagnosis(answer, "f:2")


@given(
    st.lists(st.sampled_from(BILLABLE), min_size=2, max_size=3, unique=True),
    st.sampled_from([", ", " ", " and (", "; "]),
)
def test_several_codes_are_refused_and_all_named(some, between):
    with pytest.raises(UserError, match=f"several codes .{', '.join(some)}.; give one"):
        diagnosis(between.join(some), "f:2")


def test_words_beside_a_code_are_kept():
    assert diagnosis("Bone metastasis C79.51, level T12", "")["text"] == "Bone metastasis, level T12"
    assert diagnosis("colon (C18.0) left", "") == {"text": "colon left", "code": "C18.0"}


@pytest.mark.parametrize("answer", ["", "not relevant", "Not Relevant"])
def test_a_row_without_a_diagnosis_is_not_asked_and_counted(answer, tmp_path, capsys):
    path = table(tmp_path, f"{HEAD}a,diagnosis,{answer}\nb,diagnosis,C61\n")
    from_table.main(from_table.Options(path, tmp_path / "o.jsonl"))
    assert "1 diagnoses; 1 rows without a diagnosis" in capsys.readouterr().out


def test_columns_that_are_not_read_are_named(tmp_path, capsys):
    """An index column, a trailing comma, others of the user's own; cells under no name may only be empty."""
    path = table(tmp_path, ",text,ward,ward,type,answer,\n0,3 cm,a,b,tumor_size,3 cm,\n1,2 cm,a,b,tumor_size,2 cm,,,\n")
    from_table.main(from_table.Options(path, tmp_path / "o.jsonl"))
    assert "2 records" in (said := capsys.readouterr().out)
    assert "4 columns not read ((no name), ward, ward, (no name))" in said


def test_a_long_cell_is_read(tmp_path):
    (made,) = records(table(tmp_path, f"{HEAD}{'word ' * 50_000},tumor_size,1 cm\n"))
    assert len(made["text"]) == 250_000


@pytest.mark.parametrize(
    ("text", "answer", "start"),
    [
        ("Cyst of 2.5 cm. Tumor of 5 cm.", "5 cm", 25),
        ("Only a cyst of 2.5 cm.", "5 cm", None),
        ("Cleft palate repaired. Tumor in the left breast.", "left", 36),
        ("左乳癌，左側", "左側", 4),
    ],
)
def test_an_answer_is_placed_at_whole_words_and_numbers(text, answer, start):
    assert place(text, answer)["start"] == start


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "empty"),
        (HEAD, "no row"),
        ("text,answer\na,b\n", "needs text, answer, and type"),
        (HEAD + "a,tumour_sise,1 cm\n", "did you mean 'tumor_size'"),
        (HEAD + "a,tumor_size,1,2,3\n", "t.csv:2: more cells"),
        (HEAD + " ,tumor_size,1 cm\n", "t.csv:2: no text"),
        (HEAD + "a,diagnosis,a sort of lump\n", "t.csv:2: the diagnosis holds no ICD-10-CM code"),
        (HEAD + "a,diagnosis,C61\na,diagnosis,C61\n", "t.csv:3: a second diagnosis"),
        ("text,type,answer,answer\na,tumor_size,1,2\n", "2 columns are named 'answer'"),
        ("text,type,answer\n1,a,tumor_size,x\n", "t.csv:2: more cells .4. than columns .3.; .* index column"),
        (b"text,type,answer\n\xff,a,b\n", "not UTF-8"),
        ("text;type;answer\nTumor 3\u00a0cm, \u201eG2\u201c;tumor_size;3 cm\n".encode("cp1252"), "not UTF-8"),
        ("text,type,answer\na,tumor_size,1 cm\n".encode("utf-16"), "save it as 'CSV UTF-8'"),
        (HEAD + "a,tumor_size\n", "t.csv:2: fewer cells .2. than columns .3."),
        (HEAD + '"a,tumor_size,1 cm\n', "is a quotation mark missing"),
        ("id,text,type,answer\n1,a,tumor_size,x\n1,b,tumor_size,x\n", "its text is another"),
    ],
)
def test_mistakes_are_named(tmp_path, content, said):
    with pytest.raises(UserError, match=said):
        records(table(tmp_path, content))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (
            HEAD + "Mass, SECRET in the left breast,tumor_size\n",
            "t.csv:2: the column 'type' .* names no phenotype; there",
        ),
        (HEAD + "tumor_size,SECRET mass,2 cm\n", "t.csv:2: the column 'type' .* names no phenotype; there"),
        ("question,text,answer\nSECRET mass,a,b\n", "t.csv:2: the column 'question' .* names no phenotype; there"),
        ("id,text,type,answer\nSECRET,a,tumor_size,x\nSECRET,b,tumor_size,x\n", "t.csv:3: its text is another"),
        ("id,text,type,answer\n" + 2 * "SECRET,a,diagnosis,C61\n", "t.csv:3: a second diagnosis"),
    ],
)
def test_a_note_in_the_wrong_column_is_never_quoted(tmp_path, content, said):
    with pytest.raises(UserError, match=said) as refused:
        records(table(tmp_path, content))
    assert "SECRET" not in str(refused.value)


def test_a_table_without_a_header_is_refused_and_its_first_text_is_not_repeated(tmp_path):
    with pytest.raises(UserError, match="names no column; a header needs text, answer, and type") as caught:
        records(table(tmp_path, f"{NOTE},tumor_size,2.5 cm\n"))
    assert "breast" not in str(caught.value)


def test_what_is_read_is_not_written_over(tmp_path):
    """Nor through another spelling of its name, nor a folder's own files."""
    path = table(tmp_path, HEAD + f"{NOTE},tumor_size,2.5 cm\n", "t.txt")
    before = path.read_bytes()
    (tmp_path / "link").symlink_to(tmp_path)
    for door, options in (
        (from_table, from_table.Options(table=path, out=tmp_path / "link" / "t.txt")),
        (from_brat, from_brat.Options(folder=tmp_path, out=path)),
        (from_ner, from_ner.Options(iob=path, out=path)),
        (neighbours, neighbours.Options(data=path, index=tmp_path, tokenizer=tmp_path, out=path)),
    ):
        with pytest.raises(UserError, match="t.txt: is itself read; write to another place"):
            door.main(options)
    assert path.read_bytes() == before
