"""A training note's prompt with neighbours is, id for id, the prompt that inference asks with."""

from __future__ import annotations

import json

import pytest

from infer import tasks
from infer.extract.ask import Asker, Limits
from infer.extract.notes import Note
from infer.retrieval.index import Index, build
from infer.retrieval.index import Options as IndexOptions
from infer.retrieval.neighbours import Neighbours
from model.text.tokenizer import Tokenizer
from train.data.neighbours import Options, main
from train.data.records import note_texts


class Bare:
    """An Asker's prompts need a tokenizer of their Generator and the length that its model can read, nothing else."""

    stop_ids: tuple[int, ...] = ()

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.max_length = 4096


def test_training_and_inference_build_the_same_prompt(data, tmp_path):
    tokenizer_folder = data / "tok"
    rows = [
        {
            "id": f"n{i}",
            "patient": f"p{i // 2}",
            "text": f"Mass of the {site}, note {i}, {site} biopsy was done.",
            "phenotypes": {},
            "diagnosis": {"text": f"Neoplasm of {site}", "code": f"C{i}"},
        }
        for i, site in enumerate(["breast", "breast", "breast", "lung", "colon", "breast"])
    ]
    notes, out = tmp_path / "train.jsonl", tmp_path / "near.jsonl"
    notes.write_text("".join(json.dumps(row) + "\n" for row in rows))
    build(IndexOptions(out=tmp_path / "i", notes=notes))
    main(Options(data=notes, index=tmp_path / "i", tokenizer=tokenizer_folder, out=out, neighbours=2))
    near = [json.loads(line) for line in out.read_text().splitlines()]
    patients = {row["id"]: row["patient"] for row in rows}
    for record in near:
        assert record["patient"] not in [patients[one["id"]] for one in record["neighbours"]]
    tokenizer = Tokenizer.from_pretrained(tokenizer_folder)
    encode = note_texts(tokenizer, "note-first", "diagnosis", True)
    ask = Asker(Bare(tokenizer), "diagnosis", "template", Limits(), neighbours=Neighbours(Index(tmp_path / "i"), 2))
    for row, record in zip(rows, near, strict=True):
        prefix, prompt, _ = encode(record)
        note = Note(row["id"], row["text"], patient=row["patient"])
        bare = ask.prompt(row["text"], "diagnosis", tasks.DIAGNOSIS_QUESTION)
        asked, shown = ask.with_neighbours(note, row["text"], bare)
        assert shown and [*prefix, *prompt] == asked


def test_only_the_diagnosis_branch_holds_neighbours(data):
    tokenizer = Tokenizer.from_pretrained(data / "tok")
    record = {"id": "a", "text": "A mass.", "phenotypes": {"tumor_size": []}, "diagnosis": {"text": "x", "code": "C1"}}
    with_them = {**record, "neighbours": [{"id": "b", "text": "### Another note: c\n### Its diagnosis: d\n\n"}]}
    encode = note_texts(tokenizer, "note-first", "both", True)
    plain, shown = encode(record), encode(with_them)
    assert [list(a) == list(b) for a, b in zip(plain, shown, strict=True)] == [True, True, True, False, True]
    with pytest.raises(ValueError, match="train.data.neighbours"):
        encode({**record, "neighbours": ["c"]})
    with pytest.raises(ValueError, match="note-first only"):
        note_texts(tokenizer, "faithful", "both", True)(with_them)
