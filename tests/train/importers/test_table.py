"""A hospital's own table becomes records that the scorer and the trainer take, or one line says what is wrong with
it."""

import pytest

from infer.retrieval import repair
from infer.tasks import PHENOTYPES
from model.support.cli import UserError
from train.data import neighbours
from train.data.records import questions
from train.importers import brat as from_brat
from train.importers import conll as from_ner
from train.importers import table as from_table
from train.importers.table import records, span

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


def test_several_answers_in_one_cell_or_in_rows(tmp_path):
    made = records(
        table(
            tmp_path,
            HEAD
            + 'ER+ PR-,hormone_receptor_status,"ER+, PR-"\n'
            + "ER+ PR-,hormone_receptor_type,ER\nER+ PR-,hormone_receptor_type,PR\n",
        )
    )
    assert [[s["text"] for s in spans] for spans in made[0]["phenotypes"].values()] == [["ER+", "PR-"], ["ER", "PR"]]
    assert set(made[0]["phenotypes"]) <= set(PHENOTYPES)


def test_span_of_an_answer_that_stands_nowhere():
    assert span("mass of 3 cm", "2 cm") == {"text": "2 cm", "start": None, "end": None}
    assert span("LEFT breast", "left")["end"] == 4


@pytest.mark.parametrize(("text", "answer", "start"), [
    ("Cyst of 2.5 cm. Tumor of 5 cm.", "5 cm", 25), ("Only a cyst of 2.5 cm.", "5 cm", None),
    ("Cleft palate repaired. Tumor in the left breast.", "left", 36), ("左乳癌，左側", "左側", 4)])  # fmt: skip
def test_an_answer_is_placed_at_whole_words_and_numbers(text, answer, start):
    assert span(text, answer)["start"] == start


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "empty"),
        (HEAD, "no row"),
        ("text,answer\na,b\n", "needs text, answer, and type"),
        (HEAD + "a,tumour_sise,1 cm\n", "did you mean 'tumor_size'"),
        (HEAD + "a,tumor_size,1,2,3\n", "t.csv:2: more cells"),
        (HEAD + " ,tumor_size,1 cm\n", "t.csv:2: no text"),
        (HEAD + "a,diagnosis,a sort of lump\n", "names no ICD-10-CM code"),
        (b"text,type,answer\n\xff,a,b\n", "not UTF-8"),
        ("text;type;answer\nTumor 3\u00a0cm, \u201eG2\u201c;tumor_size;3 cm\n".encode("cp1252"), "not UTF-8"),
        ("text,type,answer\na,tumor_size,1 cm\n".encode("utf-16"), "save it as 'CSV UTF-8'"),
        (HEAD + "a,tumor_size\n", "t.csv:2: fewer cells than columns: no answer"),
        (HEAD + '"a,tumor_size,1 cm\n', "is a quotation mark missing"),
        ("id,text,type,answer\n1,a,tumor_size,x\n1,b,tumor_size,x\n", "another text"),
    ],
)
def test_mistakes_are_named(tmp_path, content, said):
    with pytest.raises(UserError, match=said):
        records(table(tmp_path, content))


def test_a_table_without_a_header_is_refused_and_its_first_text_is_not_repeated(tmp_path):
    with pytest.raises(UserError, match="names no column; a header needs text, answer, and type") as told:
        records(table(tmp_path, f"{NOTE},tumor_size,2.5 cm\n"))
    assert "breast" not in str(told.value)


def test_what_is_read_is_not_written_over(tmp_path):
    """Nor through another spelling of its name, nor a folder's own files, nor notes by their repaired ones."""
    path = table(tmp_path, HEAD + f"{NOTE},tumor_size,2.5 cm\n", "t.txt")
    before = path.read_bytes()
    (tmp_path / "link").symlink_to(tmp_path)
    for door, options in (
        (from_table, from_table.Options(table=path, out=tmp_path / "link" / "t.txt")),
        (from_brat, from_brat.Options(folder=tmp_path, out=path)),
        (from_ner, from_ner.Options(iob=path, out=path)),
        (repair, repair.Options(notes=path, lexicon=tmp_path / "l", out=path)),
        (repair, repair.Options(notes=tmp_path / "n", lexicon=path, out=path)),
        (neighbours, neighbours.Options(data=path, index=tmp_path, tokenizer=tmp_path, out=path)),
    ):
        with pytest.raises(UserError, match="t.txt: is itself read; choose another --out"):
            door.main(options)
    assert path.read_bytes() == before
