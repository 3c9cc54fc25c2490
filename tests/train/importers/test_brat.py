"""brat's standoff files become records; an annotation that does not fit its text is refused."""

import pytest

from model.support.cli import UserError
from train.importers.brat import records
from train.importers.table import remarks

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


def test_a_mark_at_the_start_hides_no_entity(tmp_path):
    made = records(folder(tmp_path, "\ufeffT1\ttumor_size 20 26\t2.5 cm\r\n"), {})
    assert made[0]["phenotypes"]["tumor_size"][0]["start"] == 20


def test_the_first_of_several_diagnoses_is_asked_for_and_none_is_lost(tmp_path):
    text = "C50.912 here, C18.7 there, C50.912 again"
    lines = [f"T{i}\tdiagnosis {at} {at + len(code)}\t{code}\n" for i, (at, code) in
             enumerate([(0, "C50.912"), (14, "C18.7"), (27, "C50.912")])]  # fmt: skip
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
        ("T1\ttumor_size 21 27\t2.5 cm\n", "a.ann:1: T1 does not stand"),
        ("T1\ttumor_size 20 999\t2.5 cm\n", "does not stand"),
        ("T1 tumor_size 20 26 2.5 cm\n", "not an entity"),
        ("T1\tWeight 20 26\t2.5 cm\n", "--types Weight="),
    ],
)
def test_mistakes_are_named(tmp_path, annotation, said):
    with pytest.raises(UserError, match=said):
        records(folder(tmp_path, annotation), {})


def test_folder_without_pairs(tmp_path):
    with pytest.raises(UserError, match="holds no"):
        records(tmp_path, {})
