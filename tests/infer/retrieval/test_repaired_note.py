"""A repaired note's answers find their way back: places are the original's, abbreviations are answered as written."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infer.extract.notes import Note
from infer.extract.program import Options, main
from infer.retrieval.repair import Change, Repair, apply
from infer.retrieval.repaired_note import RepairedNote, repair_note
from model.support.cli import UserError

LEXICON = ["An invasive tumor of the left upper lobe, with nodes."] * 3


def test_the_worked_example():
    note, way = repair_note(Note("a", "T2 tumor of the LUL, invasvie."), Repair(LEXICON))
    assert note.text == "T2 tumor of the left upper lobe, invasive."
    answers = [("left upper lobe", 16, 31), ("invasive", 33, 41), ("upper lobe", 21, 31), ("T2", 0, 2)]
    found = {"phenotypes": {"x": {"answers": [{"text": t, "start": s, "end": e} for t, s, e in answers]}}}
    site = {"answers": [{"text": "left upper lobe", "start": 16, "end": 31}]}
    others = ("not relevant", "LUL", "left upper lobe", "left upper lobe; invasive")
    found["phenotypes"]["y"] = site | {"alternatives": [{"text": text, "logprob": -1.0} for text in others]}
    back = way.restore(found)
    alternatives = back["phenotypes"]["y"]["alternatives"]
    assert [one["text"] for one in alternatives] == ["not relevant", "LUL; invasive"], "without the answer, LUL"
    assert [tuple(one.values()) for one in back["phenotypes"]["x"]["answers"]] == [
        ("LUL", 16, 19),
        ("invasive", 21, 29),
        ("upper lobe", 16, 19),
        ("T2", 0, 2),
    ]
    assert back["repairs"] == [[16, 19, "left upper lobe"], [21, 29, "invasive"]]


@settings(deadline=None, max_examples=200)
@given(
    st.lists(st.tuples(st.text("abc ", min_size=1, max_size=4), st.none() | st.text("xyz", min_size=1, max_size=6))),
    st.data(),
)
def test_every_place_leads_to_what_stood_there(parts, data):
    """The words of a repaired span are those of its place in the original, with the changes in that place made."""
    original, changes = "", []
    for before, after in parts:
        if after is not None:
            changes.append(Change(len(original), len(original) + len(before), before, after))
        original += before
    way, text = RepairedNote(original, tuple(changes)), apply(original, changes)
    assert len(way.origin) == len(text)
    if text:
        start = data.draw(st.integers(0, len(text) - 1))
        end = data.draw(st.integers(start + 1, len(text)))
        back = way.answer(start, end, text[start:end])
        first, last = back["start"], back["end"]
        inside = [
            Change(c.start - first, c.end - first, c.before, c.after)
            for c in changes
            if first <= c.start and c.end <= last
        ]
        assert text[start:end] in apply(original[first:last], inside)


def test_a_job_reads_the_repaired_note_and_answers_about_the_original(weights, tmp_path):
    notes, lexicon = tmp_path / "n.jsonl", tmp_path / "l.jsonl"
    text = "T2 tumor of the LUL, invasvie, with nodse."
    notes.write_text(json.dumps({"id": "a", "text": text}) + "\n" + json.dumps({"id": "b", "text": " "}) + "\n")
    lexicon.write_text("".join(json.dumps({"text": one}) + "\n" for one in LEXICON))
    mended = tmp_path / "m.jsonl"
    mended.write_text(json.dumps({"id": "a", "text": Repair(LEXICON)(text)}) + "\n")

    def job(out, **more):
        small = {"max_new_tokens": 12, "max_new_diagnosis": 4, "form": "template"}
        return main(Options(weights=str(weights), out=tmp_path / out, **small, **more))

    assert job("plain.jsonl", notes=mended) == 0
    assert job("o.jsonl", notes=notes, repair=lexicon) == 1
    first, second = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    plain = json.loads((tmp_path / "plain.jsonl").read_text())
    assert first["diagnosis"] == plain["diagnosis"] and first["tokens"] == plain["tokens"]
    assert [text[start:end] for start, end, _ in first["repairs"]] == ["LUL", "invasvie", "nodse"]
    assert "error" in second and "repairs" not in second
    with pytest.raises(UserError, match="another job"):
        job("o.jsonl", notes=notes)
    with pytest.raises(UserError, match="lacks the field 'text'"):
        lexicon.write_text('{"id": 1}\n')
        job("p.jsonl", notes=notes, repair=lexicon)
