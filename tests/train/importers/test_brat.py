"""brat's standoff files become records; an annotation that does not fit its text is refused."""

import json
import tempfile
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.support.cli import UserError
from train.importers.brat import LINE_ENDS, MARK, Options, main, records
from train.importers.record import remarks

TEXT = "Left breast, tumour 2.5 cm\nand 3 mm apart. ER positive."


def folder(tmp_path, annotation, text=TEXT):
    (tmp_path / "a.txt").write_bytes(text.encode())
    (tmp_path / "a.ann").write_text(annotation)
    (tmp_path / "b.txt").write_text("Nothing here.")
    (tmp_path / "b.ann").write_text("")
    return tmp_path


def test_entities_become_answers_and_absent_types_not_relevant(tmp_path):
    made = records(
        folder(tmp_path, "T1\tTumorSize 20 26\t2.5 cm\nT2\tSide 0 4\tLeft\nR1\tOf Arg1:T1 Arg2:T2\n#1\tNote T1\tx\n"),
        {"Side": "tumor_laterality"},
    )
    assert made[0]["phenotypes"] == {
        "tumor_laterality": [{"text": "Left", "start": 0, "end": 4}],
        "tumor_size": [{"text": "2.5 cm", "start": 20, "end": 26}],
    }
    assert made[1]["phenotypes"] == {"tumor_laterality": [], "tumor_size": []}


def test_discontinuous_entities_and_types_passed_over(tmp_path):
    made = records(folder(tmp_path, "T1\ttumor_site 0 4;5 11\tLeft breast\nT2\tJunk 0 4\tLeft\n"), {"Junk": ""})
    assert made[0]["phenotypes"] == {"tumor_site": [{"text": "Left breast", "start": 0, "end": 11}]}


def test_offsets_count_carriage_returns(tmp_path):
    text = "one\r\ntwo 3 cm"
    made = records(folder(tmp_path, "T1\ttumor_size 9 13\t3 cm\n", text), {})
    assert made[0]["phenotypes"]["tumor_size"][0]["text"] == "3 cm"


PIECES = st.lists(st.sampled_from(["2.5 cm", " ", "\r\n", "\n", "\u2028", "\u00e4\u0308", "\U0001f600"]), max_size=6)


@given(PIECES, PIECES, st.booleans(), st.booleans())
def test_an_entity_stands_at_its_place_whatever_line_ends_and_marks_its_offsets_count(before, after, mark, lf):
    """brat counts the characters of the text as its own reader gave them, with "\\r\\n" as one or two."""
    before, after = "".join(before), "".join(after)
    text = "\ufeff" * mark + before + "T4 x" + after
    counted = text.replace("\r\n", "\n") if lf else text
    start = counted.index("T4 x")
    notices = Counter()
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "a.txt").write_bytes(text.encode())
        (Path(folder) / "a.ann").write_text(f"T1\ttumor_size {start} {start + 4}\tT4 x\n")
        (made,) = records(Path(folder), {}, notices)
    (answer,) = made["phenotypes"]["tumor_size"]
    assert made["text"][answer["start"] : answer["end"]] == "T4 x" and made["text"] in (text, counted)
    assert notices[LINE_ENDS] == (lf and "\r" in before) and notices[MARK] == 0


def test_offsets_without_the_mark(tmp_path):
    notices = Counter()
    (made, _) = records(folder(tmp_path, "T1\ttumor_size 20 26\t2.5 cm\n", "\ufeff" + TEXT), {}, notices)
    assert made["text"] == TEXT and notices[MARK] == 1


def test_parts_with_words_between_them_are_fragments(tmp_path):
    made = records(folder(tmp_path, "T1\ttumor_site 0 4;13 19\tLeft tumour\n"), {})
    assert made[0]["phenotypes"]["tumor_site"] == [
        {"text": "Left tumour", "start": None, "end": None, "fragments": [[0, 4], [13, 19]]}
    ]


def test_every_file_is_read_or_counted_with_a_name(tmp_path, capsys):
    """Sub-folders and endings in capitals are read; what has no partner and other files are named."""
    notes = tmp_path / "notes"
    pair = [("a.txt", "2 cm"), ("a.ann", "T1\ttumor_size 0 4\t2 cm\nR1\tOf Arg1:T1\n#1\tNote T1\tx\n")]
    for name, content in [
        *pair,
        *((f"x/y/{name}", content) for name, content in pair),
        ("B.TXT", "x"),
        ("B.ANN", ""),
        ("c.txt", "x"),
        ("d.txt", "x"),
        ("x/e.ann", ""),
        ("._a.txt", "x"),
        ("tools.conf", "x"),
        ("README", "x"),
    ]:
        (notes / name).parent.mkdir(parents=True, exist_ok=True)
        (notes / name).write_text(content)
    main(Options(notes, tmp_path / "o.jsonl"))
    made = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    assert [record["id"] for record in made] == ["B", "a", "x/y/a"]
    said = capsys.readouterr().out
    assert "4 annotations that are not entities, not read" in said and said.endswith(
        "not read: 2 texts without an .ann (c.txt, …), 1 annotations without a .txt (e.ann), 1 hidden files (._a.txt), "
        "1 other files (README), 1 .conf files (tools.conf)\n"
    )


@pytest.mark.parametrize("said", ["breast cancer", "C50.999"])
def test_a_diagnosis_without_a_code_names_the_line_and_the_way_out(tmp_path, said):
    with pytest.raises(UserError, match=r"a.ann:1 \(or ignore its type: --types Dx=\): .*ICD-10-CM"):
        records(folder(tmp_path, f"T1\tDx 0 {len(said)}\t{said}\n", said), {"Dx": "diagnosis"})


def test_a_mark_at_the_start_hides_no_entity(tmp_path):
    made = records(folder(tmp_path, "\ufeffT1\ttumor_size 20 26\t2.5 cm\r\n"), {})
    assert made[0]["phenotypes"]["tumor_size"][0]["start"] == 20


def test_the_first_of_several_diagnoses_is_asked_for_and_none_is_lost(tmp_path):
    text = "C50.912 here, C18.7 there, C50.912 again"
    lines = [
        f"T{i}\tdiagnosis {at} {at + len(code)}\t{code}\n"
        for i, (at, code) in enumerate([(0, "C50.912"), (14, "C18.7"), (27, "C50.912")])
    ]
    (made, _) = records(folder(tmp_path, "".join(lines), text), {})
    assert made["diagnosis"]["code"] == "C50.912" and [one["code"] for one in made["further_diagnoses"]] == ["C18.7"]
    assert "1 further diagnoses" in remarks([made])


@pytest.mark.parametrize("end", ["txt", "ann"])
def test_other_encodings_are_named(tmp_path, end):
    made = folder(tmp_path, "T1\ttumor_size 20 26\t2.5 cm\n")
    (made / f"a.{end}").write_bytes("Gr\u00f6\u00dfe".encode("cp1252"))
    with pytest.raises(UserError, match=f"a.{end}: not UTF-8"):
        records(made, {})


@pytest.mark.parametrize(
    ("annotation", "said"),
    [
        ("T1\ttumor_size 21 27\t2.5 cm\n", "a.ann:1: T1 is not the text at its offsets"),
        ("T1\ttumor_size 20 999\t2.5 cm\n", "is not the text at its offsets"),
        ("T1 tumor_size 20 26 2.5 cm\n", "not an entity"),
        ("T1\ttumor_size " + "9" * 5000 + " 26\t2.5 cm\n", "not an entity"),
        ("T1\tWeight 20 26\t2.5 cm\n", "--types Weight="),
    ],
)
def test_mistakes_are_named(tmp_path, annotation, said):
    with pytest.raises(UserError, match=said):
        records(folder(tmp_path, annotation), {})


def test_folder_without_pairs(tmp_path):
    with pytest.raises(UserError, match="holds no"):
        records(tmp_path, {})
