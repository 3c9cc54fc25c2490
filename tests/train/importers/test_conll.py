"""IOB files become questions whose answers stand in the text where the marks say."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.support.cli import UserError
from train.data.records import questions
from train.importers.conll import Options, entities, group, main, records

CORPUS = Path(__file__).parents[3] / "train" / "data" / "ncbi_disease"


@pytest.mark.parametrize("split, count", [("train", 5134), ("test", 960)])
def test_every_mention_of_the_corpus_is_an_answer_in_its_place(split, count):
    found = list(records(CORPUS / f"{split}.tsv"))
    answers = [(r["text"], a) for r in found for q in r["questions"] for a in q["answers"]]
    assert len(answers) == count and len({r["id"] for r in found}) == len(found)
    for text, answer in answers:
        assert text[answer["start"] : answer["end"]] == answer["text"] != ""
        assert answer["text"] == answer["text"].strip()


@settings(max_examples=200, deadline=None)
@given(st.lists(st.lists(st.tuples(st.sampled_from('a 12 , . ( ) [ ] - / " \'s of %'.split()),
                                   st.sampled_from("O B-X I-X B-Y I-Y".split())), min_size=1, max_size=8),
                min_size=1, max_size=3))  # fmt: skip
def test_joining_loses_no_token_and_keeps_spans(sentences):
    text, spans = group(sentences)
    assert text.replace(" ", "") == "".join(token for sentence in sentences for token, _ in sentence)
    tokens = [pair for sentence in sentences for pair in sentence]
    marked = "".join(token for token, tag in tokens if tag != "O")
    assert "".join(text[a:b].replace(" ", "") for a, b, _ in spans) == marked


def test_iob1_and_iob2():
    assert list(entities("O I-X I-X B-X I-Y O B-X".split())) == [(1, 2, "X"), (3, 3, "X"), (4, 4, "Y"), (6, 6, "X")]


def test_print_is_restored():
    sentence = [(token, "O") for token in "A ( 2 . 5 % ) \" B-cell \" , X - linked and / or men 's .".split()]
    assert group([sentence])[0] == "A (2. 5%) \"B-cell\", X-linked and/or men's."


def test_a_type_without_a_mention_is_not_relevant(tmp_path):
    (tmp_path / "f.tsv").write_text("Flu B-Disease\n\nno O\n\nno O\n\nno O\n\nAspirin B-Drug\n")
    main(Options(tmp_path / "f.tsv", tmp_path / "f.jsonl"))
    rows = [json.loads(line) for line in (tmp_path / "f.jsonl").read_text().splitlines()]
    assert [questions(row, "both") for row in rows] == [
        [("Which disease names are mentioned?", " Flu"), ("Which drug names are mentioned?", " not relevant")],
        [("Which disease names are mentioned?", " not relevant"), ("Which drug names are mentioned?", " Aspirin")],
    ]


NOT_IOB = [("a O\nb\n", "tsv:2"), ("a b\n", "tsv:1"), ("a O\n", "no entity"), ("", "no")]


@pytest.mark.parametrize("content, named", NOT_IOB)
def test_what_is_not_iob_is_named(content, named, tmp_path):
    (tmp_path / "f.tsv").write_text(content)
    with pytest.raises(UserError, match=named):
        list(records(tmp_path / "f.tsv"))


@pytest.mark.parametrize("given", [3, [], [{"question": "q"}], [{"question": 1, "answers": []}], [{"answers": []}]])
def test_questions_of_another_form_are_refused(given):
    with pytest.raises(ValueError, match="questions"):
        questions({"id": "1", "text": "a", "questions": given}, "both")
