"""IOB files become questions whose answers are at the places of their tags."""

import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.support.cli import UserError
from train.data.records import questions
from train.importers.conll import Options, entities, group, main, read_iob, records

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
@given(
    st.lists(
        st.lists(
            st.tuples(
                st.sampled_from("a 12 , . ( ) [ ] - / \" 's of %".split()), st.sampled_from("O B-X I-X B-Y I-Y".split())
            ),
            min_size=1,
            max_size=8,
        ),
        min_size=1,
        max_size=3,
    )
)
def test_joining_loses_no_token_and_keeps_spans(sentences):
    text, spans = group(sentences)
    assert text.replace(" ", "") == "".join(token for sentence in sentences for token, _ in sentence)
    tokens = [pair for sentence in sentences for pair in sentence]
    marked = "".join(token for token, tag in tokens if tag != "O")
    assert "".join(text[a:b].replace(" ", "") for a, b, _ in spans) == marked


def tags_of(scheme, found, length):
    """The tags of entities (start, end, type) in a scheme."""
    tags = ["O"] * length
    for number, (start, end, kind) in enumerate(found):
        marks = ["I"] * (end - start)
        touching = number and found[number - 1][1] == start and found[number - 1][2] == kind
        if scheme == "BIO" or (scheme == "IOB1" and touching):
            marks[0] = "B"
        if scheme in ("BIOES", "BILOU"):
            marks[0], marks[-1] = "B", scheme[2 if scheme == "BILOU" else 3]
            if len(marks) == 1:
                marks = [scheme[4]]
        tags[start:end] = [f"{mark}-{kind}" for mark in marks]
    return tags


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 3), st.sampled_from(["X", "Y-z"])), max_size=5))
def test_every_tagging_scheme_gives_the_entities_back(gaps):
    found, at = [], 0
    for gap, size, kind in gaps:
        found.append((at + gap, at + gap + size, kind))
        at += gap + size
    merged: list = []  # what IO cannot tell apart
    for start, end, kind in found:
        if merged and merged[-1][1:] == (start, kind):
            start = merged.pop()[0]
        merged.append((start, end, kind))
    for scheme in ("IO", "IOB1", "BIO", "BIOES", "BILOU"):
        read = [(first, last + 1, kind) for first, last, kind in entities(tags_of(scheme, found, at + 1))]
        assert read == (merged if scheme == "IO" else found), scheme


LETTERS = st.characters(exclude_categories=["Cs"], exclude_characters="\t\n\r")
TOKENS = st.text(LETTERS, min_size=1, max_size=6).filter(
    lambda token: token == token.strip(" ") != "" and not token.startswith(("\ufeff", "-DOCSTART-", "# newdoc"))
)
SENTENCES = st.lists(st.tuples(TOKENS, st.sampled_from(["O", "B-X", "I-X", "S-Y"])), min_size=1, max_size=3)
DOCUMENTS = st.lists(st.lists(SENTENCES, min_size=1, max_size=2), min_size=1, max_size=3)
DIVIDERS = ["-DOCSTART- -X- O\n\n", "-DOCSTART-\n", "# newdoc id = 1\n# text = hepatitis B\n"]


@given(DOCUMENTS, st.sampled_from("\t "), st.sampled_from(["\n", "\r\n", "\r"]), st.sampled_from(DIVIDERS))
def test_whatever_a_token_holds_it_is_read_whole_in_its_document(documents, column, end, divider):
    """NBSP, form feeds, U+0085, U+2028, spaces between tabs, "#": of a token; a byte order mark is not."""
    if column == " ":
        documents = [[[(token.replace(" ", "_"), tag) for token, tag in one] for one in some] for some in documents]
    written = "".join(
        divider + "\n".join("".join(f"{token}{column}{tag}\n" for token, tag in one) for one in sentences) + "\n"
        for sentences in documents
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "f.tsv"
        path.write_bytes(("\ufeff" + written.replace("\n", end)).encode())
        tokens = [line for line in written.split("\n") if line and not line.startswith(("#", "-DOCSTART-"))]
        if not tokens:  # no line gives the number of columns; `records` refuses such a file
            assert not any(read_iob(path))
            return
        assert [sentences for sentences in read_iob(path) if sentences] == documents


def test_a_record_is_of_one_document(tmp_path):
    (tmp_path / "f.tsv").write_text("a B-X\n-DOCSTART- O\nb O\n\nc O\n# newdoc\nd O\n")
    assert [record["text"] for record in records(tmp_path / "f.tsv")] == ["a", "b c", "d"]


def test_iob1_and_iob2():
    assert list(entities("O I-X I-X B-X I-Y O B-X".split())) == [(1, 2, "X"), (3, 3, "X"), (4, 4, "Y"), (6, 6, "X")]


def test_print_is_restored():
    sentence = [(token, "O") for token in 'A ( 2 . 5 % ) " B-cell " , X - linked and / or men \'s .'.split()]
    assert group([sentence])[0] == 'A (2. 5%) "B-cell", X-linked and/or men\'s.'


def test_a_type_without_a_mention_is_not_relevant(tmp_path):
    (tmp_path / "f.tsv").write_text("Flu B-Disease\n\nno O\n\nno O\n\nno O\n\nAspirin B-Drug\n")
    main(Options(tmp_path / "f.tsv", tmp_path / "f.jsonl"))
    rows = [json.loads(line) for line in (tmp_path / "f.jsonl").read_text().splitlines()]
    assert [questions(row, "both") for row in rows] == [
        [("Which disease names are mentioned?", " Flu"), ("Which drug names are mentioned?", " not relevant")],
        [("Which disease names are mentioned?", " not relevant"), ("Which drug names are mentioned?", " Aspirin")],
    ]


NOT_IOB = [
    ("non small B-X\na O\n", "tsv:2"),
    ("a O\nnon small B-X\n", "tsv:2.*3 columns where the first token has 2"),
    ("1\ta\tNOUN\tname=B-D\n", "tsv:1.*no such tag"),
    ("a\tO\nb O\n", "tsv:2"),
    ("\tO\n", "tsv:1"),
    ("a O\nb\n", "tsv:2"),
    ("a b\n", "tsv:1"),
    ("a O\n", "no entity"),
    ("", "no"),
]


@pytest.mark.parametrize("content, named", NOT_IOB)
def test_what_is_not_iob_is_named(content, named, tmp_path):
    (tmp_path / "f.tsv").write_text(content)
    with pytest.raises(UserError, match=named):
        list(records(tmp_path / "f.tsv"))


@pytest.mark.parametrize("given", [3, [], [{"question": "q"}], [{"question": 1, "answers": []}], [{"answers": []}]])
def test_questions_of_another_form_are_refused(given):
    with pytest.raises(ValueError, match="questions"):
        questions({"id": "1", "text": "a", "questions": given}, "both")
