"""Neighbours beside the diagnosis question: guarded, within the limit, seen by no other question, named by id."""

from __future__ import annotations

import json

import pytest

from infer import tasks
from infer.engine.generate import Generator
from infer.engine.load import load
from infer.extract.ask import Asker, Limits
from infer.extract.notes import Note
from infer.extract.program import Options, main
from infer.retrieval.index import Index, build
from infer.retrieval.index import Options as IndexOptions
from infer.retrieval.neighbours import Neighbours, answer_of, beginning
from model.support.cli import UserError

CODES = {"breast": ("Malignant neoplasm of left breast", "C50.912"), "colon": ("Malignant neoplasm of colon", "C18.9")}
SMALL = {"max_new_tokens": 5, "max_new_diagnosis": 8, "form": "template"}


def note(number: int, site: str, words: str) -> dict:
    text, code = CODES[site]
    return {
        "id": f"n{number}",
        "patient": f"p{number}",
        "text": f"Carcinoma of the {site}, {words}.",
        "diagnosis": {"text": text, "code": code},
    }


NOTES = [
    note(0, "breast", "seen by ultrasound after a lump was felt in the shower one morning in May"),
    note(1, "breast", "found in screening"),
    note(2, "colon", "bleeding and anaemia led to the colonoscopy that found it in the end"),
    note(3, "colon", "found in screening too, no polyps elsewhere, the family well"),
    {"id": "bare", "patient": "p9", "text": "Carcinoma of the breast found in screening, no diagnosis in the record."},
]
QUERY = {"id": "q", "patient": "p1", "text": "Carcinoma of the breast, found in screening by ultrasound."}


@pytest.fixture
def index(tmp_path):
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in NOTES))
    build(IndexOptions(out=tmp_path / "bm25", notes=tmp_path / "train.jsonl"))
    return tmp_path / "bm25"


def extracted(weights, tmp_path, name, **options):
    (tmp_path / "notes.jsonl").write_text(json.dumps(QUERY) + "\n")
    out = tmp_path / f"{name}.jsonl"
    assert main(Options(weights=str(weights), notes=tmp_path / "notes.jsonl", out=out, **{**SMALL, **options})) == 0
    return json.loads(out.read_text())


def asker(weights, index, **how):
    model, tokenizer = load(weights, dtype="float64")
    near = Neighbours(Index(index), **how)
    return Asker(Generator(model, tokenizer), "diagnosis", "template", Limits(), neighbours=near)


def test_neighbours_are_named_and_only_the_diagnosis_sees_them(weights, index, tmp_path):
    plain = extracted(weights, tmp_path, "plain", dtype="float64")
    shown = extracted(weights, tmp_path, "shown", dtype="float64", retriever="bm25", index=index, neighbours=2)
    assert shown["neighbours"] == ["n0", "n3"]  # n1 is the patient's own, "bare" has no diagnosis
    assert shown["phenotypes"] == plain["phenotypes"] and "neighbours" not in plain
    assert shown["diagnosis"] != plain["diagnosis"]
    assert not any(row["text"] in json.dumps(shown) for row in NOTES)


def test_the_prompt_is_note_then_neighbours_then_question(weights, index):
    ask = asker(weights, index, count=2)
    bare = ask.prompt(QUERY["text"], "diagnosis", tasks.DIAGNOSIS_QUESTION)
    prompt, _ = ask.with_neighbours(Note(**QUERY), QUERY["text"], bare)
    near, far = (" ".join(beginning(ask.tokenizer, NOTES[i]["text"], 64).split()) for i in (0, 3))
    assert ask.tokenizer.decode(prompt) == (
        f"### Note: {QUERY['text']}\n\n"
        f"### Another note: {near}\n### Its diagnosis: Malignant neoplasm of left breast (C50.912)\n\n"
        f"### Another note: {far}\n### Its diagnosis: Malignant neoplasm of colon (C18.9)\n\n"
        "### Question: What is the diagnosis?\n### Answer:"
    )


def test_neighbours_take_the_room_that_is_left_and_never_the_notes(weights, index):
    ask = asker(weights, index)
    bare = ask.prompt(QUERY["text"], "diagnosis", tasks.DIAGNOSIS_QUESTION)
    counts = []
    for most in range(len(bare), len(bare) + 400, 7):
        ask.limits = Limits(most)
        assert ask.parts(Note(**QUERY))[0].long is None
        prompt, shown = ask.with_neighbours(Note(**QUERY), QUERY["text"], bare)
        assert len(prompt) <= most
        counts.append(len(shown))
    assert counts[0] == 0 and counts[-1] == 3 and counts == sorted(counts)


def test_a_neighbours_text_is_cut_at_whole_letters(tokenizer):
    text = "Größe 2·5 cm, ausgedehnt" * 3
    for tokens in range(1, 40):
        cut = beginning(tokenizer, text, tokens)
        assert text.startswith(cut) and len(tokenizer.encode(cut)) <= tokens + 3  # a letter is at most four bytes
    assert answer_of({"diagnosis": {"text": "x"}}) == answer_of({"diagnosis": "x "}) == " x"
    assert answer_of({}) == answer_of({"diagnosis": {"text": None}}) == answer_of({"diagnosis": " "}) == ""


def test_a_note_without_a_word_is_asked_without_neighbours(index):
    assert Neighbours(Index(index)).of({"id": "x", "text": "?!"}) == []


def test_what_does_not_fit_together_is_refused_before_anything_is_made(weights, index, tmp_path):
    (tmp_path / "bare.jsonl").write_text(json.dumps(NOTES[-1]) + "\n")
    build(IndexOptions(out=tmp_path / "bare", notes=tmp_path / "bare.jsonl"))
    wrong = [
        ({"retriever": "bm25"}, "needs --index"),
        ({"index": index}, "belong to a --retriever"),
        ({"retriever": "sgpt", "index": index}, "was built by bm25, not sgpt"),
        ({"retriever": "bm25", "index": tmp_path / "none"}, "no such index"),
        ({"retriever": "bm25", "index": tmp_path / "bare"}, "no note with a diagnosis"),
        ({"retriever": "bm25", "index": index, "task": "phenotype"}, "diagnosis question"),
        ({"retriever": "bm25", "index": index, "encoder_weights": tmp_path}, "has no weights"),
        ({"retriever": "bm25", "index": index, "neighbours": 0}, "--neighbours is 0"),
        ({"retriever": "bm25", "index": index, "neighbour_tokens": 3}, "at least 16 tokens"),
    ]
    (tmp_path / "notes.jsonl").write_text(json.dumps(QUERY) + "\n")
    for options, message in wrong:
        with pytest.raises(UserError, match=message):
            main(Options(weights=str(weights), notes=tmp_path / "notes.jsonl", out=tmp_path / "o.jsonl", **options))
    assert not list(tmp_path.glob("o.jsonl*"))


def test_narrow_activations_answer_too(weights, index, tmp_path):
    shown = extracted(weights, tmp_path, "narrow", dtype="bfloat16", retriever="bm25", index=index)
    assert shown["diagnosis"]["finish_reason"] and len(shown["neighbours"]) == 3
